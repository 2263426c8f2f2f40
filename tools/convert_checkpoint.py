"""Brings a checkpoint of Swin-Transformer-Object-Detection or -Semantic-Segmentation to mmdet 3's and mmseg 1's layout.

    python tools/convert_checkpoint.py cascade_mask_rcnn_swin_small_patch4_window7.pth converted.pth

tools/dfq.py does the same by itself when it loads such a file; this is for other tools.
"""
import argparse
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

# By path: as a module of this name it would hide one of the user's.
common = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name('common.py'))))


def parse_args():
    parser = argparse.ArgumentParser(description='Converts a mmdet 2 / mmseg 0 Swin checkpoint for mmdet 3 / mmseg 1.')
    parser.add_argument('source', help='checkpoint: path or http(s) address')
    parser.add_argument('target', help='file to write')
    parser.add_argument('--weights', choices=['ema', 'plain'], help='which set of a file that holds two, one averaged '
                        "over training (default: what the library's own test tool loads)")
    parser.add_argument('--overwrite', action='store_true', help='replace the target if it exists')
    common.debug_argument(parser)
    return parser.parse_args()


def convert(args):
    """Convert, say how much."""
    from psaq_mm.engine import convert_file
    from psaq_mm.errors import UserError, doing
    common.check_file('the target', args.target)
    if Path(args.target).exists() and not args.overwrite:
        raise UserError(f'{args.target} exists: give another target, or --overwrite')
    with doing(f'converting {args.source}'):
        tensors = convert_file(args.source, args.target, args.weights)
    print(f'{args.target}: {tensors} tensors in the layout of mmdet 3 and mmseg 1')


if __name__ == '__main__':
    sys.exit(common.run(parse_args(), convert))
