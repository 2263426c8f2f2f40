"""Quantizes the model of an mmdet config without any data.

    python tools/dfq.py configs/mask_rcnn_swin_s_w8a8.py
"""
import argparse
import os
import sys
from pathlib import Path


def parse_args():
    parser = argparse.ArgumentParser(
        description='Data-free quantization of the model of an mmdet config that has a quantization stanza.')
    parser.add_argument('config', help='config file with quantization = dict(...)')
    parser.add_argument('--checkpoint', metavar='FILE', help="full-precision weights instead of load_from")
    parser.add_argument('--work-dir', metavar='DIR', help='where results go (default: work_dirs/<config name>)')
    parser.add_argument('--cfg-options', nargs='+', metavar='KEY=VALUE', help='override settings of the config, '
                        "e.g. quantization.weight.bits=4 quantization.synthesis.size='(256,256)'")
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none', help='job launcher')
    parser.add_argument('--resume', action='store_true', help='go on where an interrupted run in the work dir stopped')
    parser.add_argument('--amp', action='store_true', help='compute features in bfloat16')
    parser.add_argument('--device', choices=['cpu', 'cuda'], help='default: cuda where there is one')
    parser.add_argument('--seed', type=int, help='of all randomness (default: the config\'s, or 0)')
    parser.add_argument('--no-eval', action='store_true', help='do not evaluate, only write the checkpoint')
    parser.add_argument('--json', metavar='FILE', help='also write the numbers to this file')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def load_config(args):
    """The config with the command line merged into it."""
    from mmengine.config import Config, DictAction

    from psaq_mm.errors import UserError
    if not Path(args.config).is_file():
        raise UserError(f'the config {args.config} does not exist')
    try:
        cfg = Config.fromfile(args.config)
    except Exception as error:  # mmengine raises all kinds of things, from SyntaxError to bare RuntimeError
        raise UserError(f'the config {args.config} cannot be read ({type(error).__name__}: {error})') from None
    if args.cfg_options:
        parser = argparse.ArgumentParser()
        parser.add_argument('--cfg-options', nargs='+', action=DictAction)
        try:
            cfg.merge_from_dict(parser.parse_args(['--cfg-options', *args.cfg_options]).cfg_options)
        except Exception as error:
            raise UserError(f'--cfg-options {" ".join(args.cfg_options)}: must be KEY=VALUE with keys of the config '
                            f'({type(error).__name__}: {error})') from None
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or f'work_dirs/{Path(args.config).stem}'
    if args.seed is not None:
        cfg.randomness = dict(cfg.get('randomness') or {}, seed=args.seed)
    return cfg


def main():
    args = parse_args()  # before the heavy imports: --help answers at once
    if args.device == 'cpu':
        os.environ['CUDA_VISIBLE_DEVICES'] = ''
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    import torch
    from rich.console import Console

    from psaq_mm.engine import quantize, result_table, write_json
    from psaq_mm.errors import UserError
    try:
        if args.device == 'cuda' and not torch.cuda.is_available():
            raise UserError('--device cuda: torch sees no CUDA device here, use --device cpu')
        result = quantize(load_config(args), args.checkpoint, args.resume, args.amp, not args.no_eval, not args.no_eval)
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    if int(os.environ.get('RANK', 0)) == 0:
        Console().print(result_table(result))
        if args.json:
            write_json(result, args.json)
    return 0


if __name__ == '__main__':
    sys.exit(main())
