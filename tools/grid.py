"""Compares calibration methods and bit-widths on one config: a table and a plot.

    python tools/grid.py demo/dfq_w8a8.py --bits W8A8 W4A8

Every combination is a run of tools/dfq.py in a folder of its own. The command skips finished ones, and goes on with
an interrupted one. Writes table.md, grid.png and metrics.json.
"""
import argparse
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

# By path: as a module of this name it would hide one of the user's.
common = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name('common.py'))))

RECIPES = common.RECIPES
METHODS = ('noise', 'psaq_v1', 'psaq_v2', 'real')


def bits(text):
    """(weight, activation) from 'W4A8'."""
    found = re.fullmatch(r'[Ww]([2-8])[Aa]([2-8])', text)
    if not found:
        raise argparse.ArgumentTypeError(f"'{text}' is not like W8A8 (2 to 8 bits each)")
    return int(found[1]), int(found[2])


def parse_args():
    parser = argparse.ArgumentParser(description='Calibration methods x bit-widths on one config.')
    common.config_arguments(parser)
    parser.add_argument('--methods', nargs='+', choices=METHODS, metavar='METHOD',
                        help=f'of {", ".join(METHODS)} (default: all; real only where there is a calib_dataloader)')
    parser.add_argument('--bits', nargs='+', type=bits, metavar='WxAy', default=[(8, 8), (6, 6), (4, 8), (4, 4)],
                        help='default: W8A8 W6A6 W4A8 W4A4')
    parser.add_argument('--recipes', nargs='+', choices=RECIPES, default=(), metavar='RECIPE',
                        help=f"of {', '.join(RECIPES)} (default: the config's, or 'paper' at W8A8 and 'low_bit' below)")
    parser.add_argument('--seeds', nargs='+', type=int, default=(), metavar='SEED',
                        help='make every run with each of them, and show mean and standard deviation')
    parser.add_argument('--title', help="of table and plot (default: the config's name)")
    return parser.parse_args()


def grid(args):
    """Runs all combinations, writes and prints the comparison."""
    from rich.console import Console

    from psaq_mm.engine import compare, write_comparison
    cfg = common.load_config(args, f'work_dirs/{Path(args.config).stem}_grid')
    methods = args.methods or [m for m in METHODS if m != 'real' or cfg.get('calib_dataloader')]
    if not args.methods and 'real' not in methods:
        print("method 'real' is left out: the config has no calib_dataloader (a data loader of images that are not "
              'evaluated on)')
    results = compare(cfg, methods, args.bits, cfg.work_dir, args.checkpoint, args.quiet, args.recipes,
                      args.seeds)
    table = write_comparison(results, cfg.work_dir, args.title or Path(args.config).stem, args.json)
    if not args.quiet:
        Console().print(table)


if __name__ == '__main__':
    sys.exit(common.run(parse_args(), grid))
