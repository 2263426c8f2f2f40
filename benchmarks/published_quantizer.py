"""Why does plain noise calibrate a ViT so well here, and so badly with the published quantizer?

    python benchmarks/deit_tiny.py --bench ../shared/bench --bits W8A8
    python benchmarks/published_quantizer.py --grid work_dirs/deit_tiny

psaq_mm quantizes the operands of products. V1's code also quantizes the sums that carry the tokens from block to block
(the residual stream) and the logits. This adds quantizers there, calibrates on the same images as the grid did and
prints top-1 with each. The student is not trained: methods differ in their images only.
"""
import argparse
import sys
import types
from pathlib import Path

# What is quantized beside the operands of products.
SCOPES = {'products': '', 'residual': 'residual', 'logits': 'logits', 'both': 'residual logits'}


def residual_forward(block, x):
    """timm's ViT block in evaluation, with both sums quantized."""
    x = block.sum_attention(x + block.attn(block.norm1(x)))
    return block.sum_mlp(x + block.mlp(block.norm2(x)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--grid', type=Path, default=Path('work_dirs/deit_tiny'), help="deit_tiny.py's --out")
    parser.add_argument('--weight-bits', type=int, default=8)
    parser.add_argument('--scopes', nargs='+', choices=SCOPES, default=list(SCOPES), metavar='SCOPE',
                        help=f'of {", ".join(SCOPES)} (default: all)')
    args = parser.parse_args()
    import torch
    from mmengine.config import Config
    from mmengine.registry import MODELS
    from mmengine.runner import Runner
    from rich.console import Console
    from rich.table import Table

    from psaq_mm.engine import NoiseDataset
    from psaq_mm.engine.checkpoint import float_checkpoint, load_float
    from psaq_mm.engine.config import default_scope, without_pretrained
    from psaq_mm.models import extract_features, quantize_model
    from psaq_mm.quantization import ActivationConfig, FakeQuantizer, calibrate
    from psaq_mm.synthesis import valid_range
    images = args.grid / 'W8A8_psaq_v1' / 'synthetic.pt'
    if not images.is_file():
        print(f'error: {images} does not exist: run benchmarks/deit_tiny.py first, --grid names its --out',
              file=sys.stderr)
        return 2
    cfg = Config.fromfile(args.grid / 'deit_tiny.py')
    default_scope(cfg)

    def build(scope):
        model = MODELS.build(without_pretrained(cfg.model.copy())).eval()
        content = float_checkpoint(model, cfg.load_from)
        quantize_model(model, dict(weight=dict(bits=args.weight_bits), targets=['backbone', 'head']))
        load_float(model, content)
        for block in model.backbone.blocks if 'residual' in scope else ():
            block.sum_attention = FakeQuantizer(ActivationConfig(observer='minmax'))
            block.sum_mlp = FakeQuantizer(ActivationConfig(observer='minmax'))
            block.forward = types.MethodType(residual_forward, block)
        if 'logits' in scope:
            model.head = torch.nn.Sequential(model.head, FakeQuantizer(ActivationConfig(observer='minmax')))
        return model

    def calibrated(scope, batches):
        model = build(scope)
        calibrate(model, lambda: [extract_features(model, batch, heads=True) for batch in batches])
        return model

    preprocessor = build('').data_preprocessor
    low, high = valid_range(preprocessor.mean.flatten(), preprocessor.std.flatten())
    noise = torch.stack([item['inputs'] for item in NoiseDataset(32, [(224, 224)], 32)])
    calibration = {
        'noise': noise.maximum(low).minimum(high).split(8),
        'psaq_v1': torch.load(images, weights_only=True)['images'],
        'real': [preprocessor(data)['inputs'] for data in Runner.build_dataloader(cfg.calib_dataloader)],
    }

    @torch.no_grad()
    def top1(model):
        correct = []
        for data in Runner.build_dataloader(cfg.test_dataloader):
            data = preprocessor(data)
            labels = torch.tensor([sample.gt_label for sample in data['data_samples']])
            correct.append(model(data['inputs']).argmax(1) == labels)
        return f'{100 * torch.cat(correct).float().mean():.1f}'

    table = Table(title=f'DeiT-Tiny W{args.weight_bits}A8, backbone and head quantized, top-1')
    for name in ('calibration', *args.scopes):
        table.add_column(name)
    for method, batches in calibration.items():
        table.add_row(method, *(top1(calibrated(SCOPES[scope], batches)) for scope in args.scopes))
    Console().print(table)
    return 0


if __name__ == '__main__':
    sys.exit(main())
