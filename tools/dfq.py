"""Quantizes the model of an mmdet, mmseg or timm config without any data.

    python tools/dfq.py configs/mask_rcnn_swin_s_w8a8.py
"""
import argparse
import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

# By path: as a module of this name it would hide one of the user's.
common = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name('common.py'))))


def parse_args():
    parser = argparse.ArgumentParser(
        description='Data-free quantization of the model of a config that has a quantization stanza.')
    common.config_arguments(parser)
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none', help='job launcher')
    parser.add_argument('--resume', action='store_true', help='go on where an interrupted run in the work dir stopped')
    parser.add_argument('--amp', action='store_true', help='compute features in bfloat16')
    parser.add_argument('--no-eval', action='store_true', help='do not evaluate, only write the checkpoint')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def quantize(args):
    """Reads the config, quantizes, prints the table."""
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    from rich.console import Console

    from psaq_mm.engine import quantize, result_table, write_json
    cfg = common.load_config(args, f'work_dirs/{Path(args.config).stem}')
    cfg.launcher = args.launcher
    result = quantize(cfg, args.checkpoint, args.resume, args.amp, not args.no_eval, not args.no_eval,
                      args.quiet)
    if int(os.environ.get('RANK', 0)) == 0:
        if not args.quiet:
            Console().print(result_table(result))
        if args.json:
            write_json(result, args.json)


if __name__ == '__main__':
    sys.exit(common.run(parse_args(), quantize))
