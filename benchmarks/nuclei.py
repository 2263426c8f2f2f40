"""Real data: nuclei in microscopy images, a trained Mask R-CNN + Swin; full precision / noise / V1 / V2 / real images.

    python benchmarks/nuclei.py --bench ../shared/bench --out work_dirs/nuclei

Writes a Markdown table and JSON. Parts that are finished are not done again. Calibration never sees the 64 evaluation
images: 'real' uses 32 training images, everything else uses none.
"""
import argparse
import sys
from pathlib import Path

METHODS = ('noise', 'psaq_v1', 'psaq_v2', 'real')


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--bench', type=Path, required=True, help='folder with nuclei/')
    parser.add_argument('--methods', nargs='+', choices=METHODS, default=METHODS)
    parser.add_argument('--weight-bits', nargs='+', type=int, default=[8, 4])
    parser.add_argument('--activation-bits', type=int, default=8)
    parser.add_argument('--out', type=Path, default=Path('work_dirs/nuclei'))
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--json', metavar='FILE', help='also write the numbers to this file')
    args = parser.parse_args()
    from mmengine.config import Config
    from rich.console import Console

    from psaq_mm.engine import compare, comparison_rows, comparison_table, markdown, write_json
    from psaq_mm.errors import UserError
    config = args.bench / 'nuclei' / 'mask_rcnn_swin_mini_nuclei.py'
    if not config.is_file():
        print(f'error: {config} does not exist: --bench names the folder that holds nuclei/', file=sys.stderr)
        return 2
    cfg = Config.fromfile(config)
    cfg.randomness = dict(seed=args.seed)
    # The model's own test size; everything else at its default.
    cfg.quantization = dict(synthesis=dict(size=(288, 288)))
    try:
        results = compare(cfg, args.methods, [(bits, args.activation_bits) for bits in args.weight_bits], args.out)
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    header, rows = comparison_rows(results['runs'], results['full_precision'])
    table = '64 nuclei images; backbone and neck quantized, heads in float\n\n' + markdown(header, rows)
    (args.out / 'table.md').write_text(table)
    for path in filter(None, (args.out / 'metrics.json', args.json)):
        write_json(results, path)
    Console().print(comparison_table(results['runs'], results['full_precision'], 'Nuclei, backbone and neck quantized'))
    return 0


if __name__ == '__main__':
    sys.exit(main())
