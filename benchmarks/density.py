"""Estimators of the similarity density against the formula itself on a fine grid: error of entropy and gradient, cost.

    python benchmarks/density.py

Tokens are those of the embedded demo's ViT (144 patches, three of its blocks), on its rendered images and on Gaussian
noise. The reference evaluates every kernel at 2001 points in double precision, gradient by autograd. 'ten points' is
what V1's code does: points between the smallest and the largest similarity.
"""
import argparse
import math
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / 'demo'), str(ROOT / 'benchmarks')]
IMAGES = 2
BLOCKS = (0, 2, 5)  # first, middle, last


def plain(tokens, images, bandwidth, points):
    """Entropy (images,) by the formula as it stands, differentiable; points None: V1's ten."""
    import torch
    tokens = torch.nn.functional.normalize(tokens, dim=-1)
    entropies = []
    for values in (tokens @ tokens.transpose(1, 2)).reshape(images, -1):
        if points is None:
            at = torch.linspace(values.min().item(), values.max().item(), 10)
        else:
            at = torch.linspace(-1 - 5 * bandwidth, 1 + 5 * bandwidth, points, dtype=values.dtype)
        density = torch.exp(-0.5 * ((values - at[:, None]) / bandwidth)**2).mean(1)
        density = density / (bandwidth * math.sqrt(2 * math.pi))
        entropies.append(torch.trapezoid(-density * density.clamp(min=1e-30).log(), at))
    return torch.stack(entropies)


def tokens_of_demo():
    """Tokens of some blocks, by kind of image."""
    import mmcv
    import scenes
    import torch
    from mmengine.config import Config
    from mmengine.registry import MODELS

    import psaq_mm.classification  # noqa: F401
    from psaq_mm.engine.checkpoint import float_checkpoint, load_float
    from psaq_mm.models import quantize_model, similarity_taps
    from psaq_mm.synthesis import PatchSimilarityTap
    cfg = Config.fromfile(ROOT / 'demo' / 'dfq_classification_w8a8.py')
    model = MODELS.build(dict(cfg.model, _scope_='psaq_mm')).eval()
    content = float_checkpoint(model, cfg.load_from)
    load_float(quantize_model(model, dict(keep_float=['*'])), content)
    scenes.write(ROOT / 'demo' / 'data', ('calib', ))
    files = sorted((ROOT / 'demo' / 'data' / 'objects' / 'calib').rglob('*.png'))[::len(scenes.CLASSES)][:IMAGES]
    real = [torch.from_numpy(mmcv.imread(str(f)).transpose(2, 0, 1).copy()) for f in files]
    images = dict(rendered=model.data_preprocessor(dict(inputs=real))['inputs'],
                  noise=torch.randn(IMAGES, 3, 96, 96))
    tap = PatchSimilarityTap(*similarity_taps(model.backbone, torch.zeros(1, 3, 96, 96)))
    found = {}
    for kind, batch in images.items():
        with torch.no_grad():
            tap.run(model.backbone, batch)
        found[kind] = [tap.tokens[block] for block in BLOCKS]
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--bandwidth', type=float, default=0.01)
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--json', metavar='FILE')
    args = parser.parse_args()
    import logging
    logging.disable(logging.WARNING)
    import torch
    from rich.console import Console
    from rich.table import Table
    from step_cost import peak_bytes

    from psaq_mm.engine import write_json
    from psaq_mm.synthesis import patch_similarity_entropy
    torch.manual_seed(0)
    estimators = {
        'binned (default)': lambda t: patch_similarity_entropy(t, IMAGES, args.bandwidth),
        'exact': lambda t: patch_similarity_entropy(t, IMAGES, args.bandwidth, 'exact'),
        'ten points (V1)': lambda t: plain(t, IMAGES, args.bandwidth, None),
    }

    def evaluate(estimator, tokens):
        tokens = tokens.detach().requires_grad_()
        entropy = estimator(tokens)
        return entropy.detach().double(), torch.autograd.grad(entropy.sum(), tokens)[0].double()

    results = {}
    for kind, blocks in tokens_of_demo().items():
        references = [evaluate(lambda t: plain(t, IMAGES, args.bandwidth, 2001), t.double()) for t in blocks]
        for name, estimator in estimators.items():
            found = [evaluate(estimator, t) for t in blocks]
            entropy = max((f[0] - r[0]).abs().max().item() for f, r in zip(found, references))
            gradient = max(((f[1] - r[1]).norm() / r[1].norm()).item() for f, r in zip(found, references))
            taken = []
            for _ in range(args.repeats):
                started = time.perf_counter()
                for tokens in blocks:
                    evaluate(estimator, tokens)
                taken.append(time.perf_counter() - started)
            peak = peak_bytes(lambda e=estimator, b=blocks: [evaluate(e, t) for t in b], 'cpu')
            results[f'{kind}, {name}'] = dict(entropy_error=entropy, gradient_error=gradient,
                                              seconds=statistics.median(taken), peak_mb=peak / 1e6)
    table = Table(title=f'{IMAGES} images, 144 patches, {len(BLOCKS)} blocks, bandwidth {args.bandwidth}: largest '
                  'errors against a grid of 2001 points')
    for name in ('images, estimator', 'entropy, nats', 'gradient, relative', 'ms', 'peak, MB'):
        table.add_column(name, justify='right' if ',' not in name[:8] else 'left')
    for name, r in results.items():
        table.add_row(name, f"{r['entropy_error']:.5f}", f"{r['gradient_error']:.5f}", f"{r['seconds'] * 1e3:.1f}",
                      f"{r['peak_mb']:.1f}")
    Console(width=120).print(table)
    if args.json:
        write_json(results, args.json)
    return 0


if __name__ == '__main__':
    sys.exit(main())
