"""The embedded demos: quantize three small models without data and compare with what else one could do.

    python demo/run.py                             # or make demo: detection, segmentation, classification
    python demo/run.py segmentation --bits W4A8

Renders the evaluation images, then full precision, noise, V1, V2 and real-data calibration side by side. Pictures and
tables go to work_dirs/demo. The command skips finished parts: delete that folder to start over.
"""
import argparse
import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
grid = SimpleNamespace(**runpy.run_path(str(HERE.parent / 'tools' / 'grid.py')))

CONFIGS = dict(detection='dfq_w8a8.py', segmentation='dfq_segmentation_w8a8.py',
               classification='dfq_classification_w8a8.py')
TITLES = dict(
    detection='Mask R-CNN + Swin, 100 rendered scenes', segmentation='UperNet + Swin, 100 rendered scenes',
    classification='ViT, 600 rendered objects')


def parse_args():
    parser = argparse.ArgumentParser(description='The embedded demos.')
    parser.add_argument('tasks', nargs='*', metavar='TASK', help=f'of {", ".join(CONFIGS)} (default: all)')
    parser.add_argument('--methods', nargs='+', choices=grid.METHODS, default=grid.METHODS)
    parser.add_argument('--bits', nargs='+', type=grid.bits, metavar='WxAy', default=[(8, 8)], help='default: W8A8')
    parser.add_argument('--recipes', nargs='+', choices=grid.RECIPES, default=(), metavar='RECIPE',
                        help='as of tools/grid.py')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/demo'))
    parser.add_argument('--json', metavar='FILE', help='also write the numbers of all tasks to this file')
    args = parser.parse_args()
    wrong = [task for task in args.tasks if task not in CONFIGS]
    if wrong:
        parser.error(f"no demo '{wrong[0]}' (choose from {', '.join(CONFIGS)})")
    return args


def main():
    args = parse_args()
    os.environ.setdefault('CUDA_VISIBLE_DEVICES', '')  # small enough for any machine, and the same numbers on all
    import pictures
    import scenes
    from mmengine.config import Config
    from rich.console import Console

    from psaq_mm.engine import compare, float_config, write_comparison, write_json
    from psaq_mm.errors import UserError
    scenes.write(HERE / 'data', ('val', 'calib'))
    console, everything, tables = Console(), {}, []
    for task in args.tasks or CONFIGS:
        out = args.work_dir / task
        cfg = Config.fromfile(HERE / CONFIGS[task])
        try:
            everything[task] = results = compare(cfg, args.methods, args.bits, out, recipes=args.recipes)
        except UserError as error:
            print(f'error: {error}', file=sys.stderr)
            return 2
        table = write_comparison(results, out, TITLES[task])
        first = 'W{}A{} psaq_v2'.format(*args.bits[0])
        best = next((run for label, run in results['runs'].items() if label.startswith(first)), None)
        if best:
            picture = out / 'predictions.png'
            pictures.draw(task, (float_config(cfg), cfg.load_from), (best['test_config'], best['checkpoint']),
                          HERE / 'data', picture)
            table.caption += (f"\nreport: {best.get('report')}"
                              f"\nsynthetic images: {Path(best['checkpoint']).parent / 'synthetic.png'}"
                              f'\npredictions, full precision above, quantized below: {picture}')
        tables.append(table)
    for table in tables:
        console.print(table)
    if args.json:
        write_json(everything, args.json)
    return 0


if __name__ == '__main__':
    sys.exit(main())
