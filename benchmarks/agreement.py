"""How closely each model of a DeiT-Tiny grid follows full precision on the 500 photographs: less noisy than top-1.

    python benchmarks/deit_tiny.py --bench ../shared/bench --out work_dirs/deit_tiny
    python benchmarks/agreement.py --grid work_dirs/deit_tiny
    python benchmarks/agreement.py --grid work_dirs/deit_tiny --runs work_dirs/steps/deit_tiny/*_steps/W*

Top-1 counts chance hits: a model that changes 70 of 500 answers can come out two points higher or lower. Agreement is
the share of photographs with full precision's answer; the Kullback-Leibler divergence compares all probabilities.
Labels play no part in either.
"""
import argparse
import sys
from pathlib import Path


def closeness(found, full) -> dict[str, float]:
    """How closely log-probabilities follow those of full precision, (images, classes) each."""
    import torch
    return dict(agreement=100 * (found.argmax(1) == full.argmax(1)).float().mean().item(),
                kl=torch.nn.functional.kl_div(found, full, log_target=True, reduction='batchmean').item())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--grid', type=Path, default=Path('work_dirs/deit_tiny'), help="deit_tiny.py's --out")
    parser.add_argument('--runs', nargs='+', type=Path, metavar='FOLDER', help="folders of other runs on this model, "
                        "instead of the grid's")
    args = parser.parse_args()
    metrics = args.grid / 'metrics.json'
    missing = next((path for path in [args.grid / 'full_precision.pth', *[metrics] * (not args.runs)]
                    if not path.is_file()), None)
    if missing:
        print(f'error: {missing} does not exist: run benchmarks/deit_tiny.py first, --grid names its --out',
              file=sys.stderr)
        return 2
    import json
    import logging
    import warnings
    warnings.simplefilter('ignore')
    logging.disable(logging.WARNING)
    import torch
    from mmengine.config import Config
    from mmengine.registry import MODELS
    from mmengine.runner import Runner, load_checkpoint

    from psaq_mm.engine import markdown, write_json
    from psaq_mm.engine.config import default_scope, float_config
    cfg = Config.fromfile(args.grid / 'deit_tiny.py')
    default_scope(cfg)
    images = list(Runner.build_dataloader(cfg.test_dataloader))

    @torch.no_grad()
    def probabilities(cfg, checkpoint):
        model = MODELS.build(cfg.model).eval()
        load_checkpoint(model, str(checkpoint), map_location='cpu', strict=True)
        return torch.cat([model(model.data_preprocessor(data)['inputs']).log_softmax(1) for data in images])

    full = probabilities(float_config(cfg), args.grid / 'full_precision.pth')
    rows, results = [], {}
    folders = {str(folder): folder for folder in args.runs or ()}
    if not args.runs:
        for label, run in json.loads(metrics.read_text())['runs'].items():
            for seed, one in run.get('seeds', {'': run}).items():
                folders[f'{label}{seed and f", seed {seed}"}'] = Path(one['checkpoint']).parent
    for label, folder in folders.items():
        found = probabilities(Config.fromfile(folder / 'test_config.py'), folder / 'quantized.pth')
        close = results[label] = closeness(found, full)
        rows.append([label, f"{close['agreement']:.1f}", f"{close['kl']:.4f}"])
        print(*rows[-1], flush=True)
    text = markdown(['calibration', 'agreement, %', 'KL divergence, nats'], rows)
    if args.runs:
        print(text)
    else:
        (args.grid / 'agreement.md').write_text(text)
        write_json(results, args.grid / 'agreement.json')
    return 0


if __name__ == '__main__':
    sys.exit(main())
