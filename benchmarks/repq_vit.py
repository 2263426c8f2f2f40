"""Beside RepQ-ViT's quantizer: the same DeiT-Tiny and photographs, calibrated on 32 photographs and on our images.

    python benchmarks/repq_vit.py --bench ../shared/bench --bits W4A4 W6A6 --out work_dirs/repq_vit

The baseline is written from the formulas of the paper (Li et al., ICCV 2023): behind each LayerNorm one scale by
reparameterisation, attention weights on powers of the square root of 2, everything else uniform with zero points,
weights by channel. Each range is that of the percentile with the least squared error. As in the paper, nothing is
trained. Ours: attention weights have 2^bits powers and 0 besides, one value more than the bits can tell apart; layers
behind norms get the range of what they read then, instead of the mean scale and zero point. Writes a Markdown table and
JSON. The command skips finished runs of ours and makes the baseline anew.
"""
import argparse
import sys
from pathlib import Path

import deit_tiny
import torch
from low_bit import bits
from torch import nn

PERCENTILES = (99.0, 99.9, 99.99, 99.999)  # tried for each range
ROWS = 1 << 20  # values of a tensor that ranges are chosen on


class LogSqrt2(nn.Module):
    """Attention weights on powers of the square root of 2: ``s 2^(-k / 2)``, k = 0 .. 2^bits - 1, and 0 below them.

    Args:
        bits (int): Bit-width.
        scale (float): s, which larger values become.
    """

    def __init__(self, bits, scale):
        super().__init__()
        self.levels, self.scale = 2**bits, scale

    def forward(self, weights):
        """(..., N, N) to the same shape."""
        power = (-2 * (weights / self.scale).clamp(min=1e-30).log2()).round().clamp(min=0)
        return torch.where(power < self.levels, self.scale * 2**(-power / 2), torch.zeros_like(weights))


def ends(values, config):
    """Return the range of the percentile with the least squared error of values (channels, n): two (channels,)."""
    from psaq_mm.quantization.observers import affine_parameters, quantization_grid
    grid = quantization_grid(config.bits, config.symmetric)
    best = None
    for percentile in PERCENTILES:
        tail = (1 - percentile / 100) / 2 if not config.symmetric else 1 - percentile / 100
        count = max(1, round(tail * values.shape[1]))
        low, high = (-(-values).kthvalue(values.shape[1] - count + 1, 1).values,
                     values.kthvalue(values.shape[1] - count + 1, 1).values)
        scale, zero = affine_parameters(low, high, config.bits, config.symmetric)
        error = (torch.fake_quantize_per_channel_affine(values, scale, zero, 0, *grid) - values).square().mean(1)
        if best is None:
            best = low, high, error
        else:
            better = error < best[2]
            best = tuple(torch.where(better, new, old) for new, old in zip((low, high, error), best))
    return best[:2]


def fitted(values, bits):
    """Return the :class:`LogSqrt2`, its scale a percentile, with the least squared error of values (n,)."""
    values = values[torch.randperm(len(values))[:ROWS]].float()
    found = [LogSqrt2(bits, values.kthvalue(max(1, round(share / 100 * len(values)))).values.item())
             for share in (*PERCENTILES, 100.0)]
    return min(found, key=lambda quantizer: (quantizer(values) - values).square().mean().item())


def give_range(quantizer, values):
    """Set scale and zero point of a quantizer from values (channels, n)."""
    from psaq_mm.quantization.observers import affine_parameters
    thinned = values[:, torch.randperm(values.shape[1])[:ROWS // len(values)]].float()
    scale, zero = affine_parameters(*ends(thinned, quantizer.config), quantizer.config.bits, quantizer.config.symmetric)
    quantizer.scale.copy_(scale), quantizer.zero_point.copy_(zero)
    quantizer.calibrated, quantizer.observer = True, None


def seen_by(model, quantizer_inputs, images):
    """Return what each module of a dict {module: place of the argument} gets from images, flat, while model runs."""
    seen = {}

    def see(module, arguments):
        for place in quantizer_inputs[module]:
            value = arguments[place].detach()
            seen.setdefault((module, place), []).append(value.reshape(-1, value.shape[-1]))

    handles = [module.register_forward_pre_hook(see) for module in quantizer_inputs]
    for batch in images.split(8):
        model.logits(batch)
    for handle in handles:
        handle.remove()
    return {key: torch.cat(values) for key, values in seen.items()}


@torch.no_grad()
def quantize_as_repq(model, images):
    """Calibrate a converted classifier in place.

    Args:
        model (TimmClassifier): In float.
        images (Tensor): (B, C, H, W).
    """
    from psaq_mm.quantization import Mode, quantized_layers, quantizer_mode, set_mode
    from psaq_mm.quantization.layers import QuantizedMatMul
    from psaq_mm.quantization.reparameterization import apply, find_sites
    from psaq_mm.stanza import reads_pixels
    torch.manual_seed(0)
    layers = quantized_layers(model)
    with quantizer_mode(model, Mode.FLOAT):
        sites, _ = find_sites(model, lambda: [model.logits(images[:1])])
        for site in sites:  # scale s_c and zero point z_c of each channel become their means
            values = seen_by(model, {site.readers[0]: [0]}, images)[site.readers[0], 0]
            config = site.readers[0].input_quantizer.config
            low, high = ends(values[torch.randperm(len(values))[:4096]].T.contiguous().float(), config)
            low, high = low.clamp(max=0), high.clamp(min=0)  # zero points are integers of the grid
            scale = ((high - low) / (2**config.bits - 1)).clamp(min=1e-8)
            zero = -low / scale
            ratio = scale / scale.mean()
            apply(site, ratio, low / ratio + zero.mean() * scale.mean())
    with quantizer_mode(model, Mode.OBSERVE):  # in float, with products that show their operands
        inputs = {layer: [0, 1] if isinstance(layer, QuantizedMatMul) else [0] for layer in layers.values()}
        seen = seen_by(model, {layer: places for layer, places in inputs.items() if not reads_pixels(layer)},
                       images)
    for layer in layers.values():
        if reads_pixels(layer):
            give_range(layer.input_quantizer, images.reshape(1, -1))
        elif isinstance(layer, QuantizedMatMul):
            for place, quantizer in ((0, layer.a_quantizer), (1, layer.b_quantizer)):
                give_range(quantizer, seen[layer, place].reshape(1, -1))
            continue
        else:
            give_range(layer.input_quantizer, seen[layer, 0].reshape(1, -1))
        give_range(layer.weight_quantizer, layer.weight.flatten(1))
    set_mode(model, Mode.QUANTIZE)
    for name, layer in layers.items():
        if name.endswith('matmul_context'):
            logarithmic = fitted(seen[layer, 0].flatten(), layer.a_quantizer.config.bits)
            layer.a_quantizer.mode = Mode.FLOAT
            layer.register_forward_pre_hook(lambda module, arguments, q=logarithmic: (q(arguments[0]), arguments[1]))


def calibrated(cfg, images):
    """Return the config's model, quantized as RepQ-ViT does."""
    from psaq_mm.engine.checkpoint import load_float, read_checkpoint
    from psaq_mm.engine.pipeline import build_float
    from psaq_mm.models import quantize_model, resolved
    from psaq_mm.stanza import QuantizationConfig
    model = build_float(cfg).eval()
    stanza = resolved(QuantizationConfig.parse(cfg.quantization), model)
    quantize_model(model, stanza)
    load_float(model, read_checkpoint(cfg.load_from), stanza.targets)
    quantize_as_repq(model, images)
    return model


def photographs(cfg):
    """Return the calibration photographs as the model takes them, (B, C, H, W)."""
    from mmengine.runner import Runner

    from psaq_mm.engine.pipeline import build_float
    preprocess = build_float(cfg).data_preprocessor
    return torch.cat([preprocess(data, False)['inputs'] for data in Runner.build_dataloader(cfg.calib_dataloader)])


def top1(model, cfg):
    """Return the accuracy on the test photographs, %, by mmengine's test loop."""
    from mmengine.runner import Runner

    from psaq_mm.engine.config import float_config
    cfg = float_config(cfg)
    cfg.work_dir, cfg.load_from = str(Path(cfg.work_dir) / 'evaluation'), None
    runner = Runner(model=model, work_dir=cfg.work_dir, test_dataloader=cfg.test_dataloader,
                    test_evaluator=cfg.test_evaluator, test_cfg=cfg.get('test_cfg') or {}, log_level='ERROR',
                    default_scope='psaq_mm', experiment_name='repq_vit')
    return runner.test()['accuracy/top1']


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--bench', type=Path, required=True, help='folder with deit_tiny/')
    parser.add_argument('--bits', nargs='+', type=bits, default=[(4, 4)], metavar='WxAy')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--out', type=Path, default=Path('work_dirs/repq_vit'))
    args = parser.parse_args()
    from mmengine.config import Config

    from psaq_mm.engine import compare, markdown, with_stanza, write_json
    from psaq_mm.engine.config import default_scope
    from psaq_mm.engine.images import read_images
    cfg = Config.fromfile(deit_tiny.write_config(args.bench, args.out)[0])
    cfg.randomness = dict(seed=args.seed)
    rows, results = [], {}
    for pair in args.bits:
        ours = with_stanza(cfg, report=dict(images=0), recipe='low_bit')
        found = compare(ours, ['psaq_v1', 'real'], [pair], args.out)
        full = found['full_precision']['accuracy/top1']
        label = f'W{pair[0]}A{pair[1]}'
        for title, method in (('our images', 'psaq_v1'), ('photographs', 'real')):
            folder = args.out / f'{label}_{method}'
            images = torch.cat(read_images(str(folder / 'synthetic.pt'))) if method != 'real' else photographs(cfg)
            images = images[:32]  # as many of both
            changed = with_stanza(cfg, recipe='paper', weight=dict(bits=pair[0], symmetric=False), activation=dict(
                bits=pair[1], symmetric_products=False))
            changed.load_from = str(args.out / 'full_precision.pth')
            changed.work_dir = str(args.out / f'{label}_repq_{method}')
            default_scope(changed)
            model = calibrated(changed, images)
            baseline = top1(model, changed)
            ours = found['runs'][f'{label} {method}']['quantized']['accuracy/top1']
            rows.append([label, title, f'{full:.1f}', f'{baseline - full:+.1f}', f'{ours - full:+.1f}'])
            results[f'{label} {title}'] = dict(full_precision=full, repq_vit=baseline, low_bit=ours)
            text = f'DeiT-Tiny, 500 photographs, backbone and head, seed {args.seed}\n\n' + markdown(
                ['bits', 'calibrated on', 'full precision', "change, RepQ-ViT's quantizer (32 of them)",
                 'change, low_bit without the game (all of them)'], rows)
            (args.out / f'repq_vit_seed_{args.seed}.md').write_text(text)
            write_json(results, args.out / f'repq_vit_seed_{args.seed}.json')
            print(text, flush=True)
    return 0


if __name__ == '__main__':
    sys.exit(main())
