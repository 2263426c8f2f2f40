"""What the tools' command lines share. Imports nothing heavy: --help answers at once."""
import argparse
import os
import sys
from pathlib import Path


def config_arguments(parser):
    """Arguments that say what to quantize, with which settings, on what."""
    parser.add_argument('config', help='config file with quantization = dict(...)')
    parser.add_argument('--checkpoint', metavar='FILE', help='full-precision weights instead of load_from')
    parser.add_argument('--weights', choices=['ema', 'plain'], help='which set of a checkpoint that holds two, one '
                        "averaged over training (default: what the library's own test tool loads)")
    parser.add_argument('--work-dir', metavar='DIR', help='where results go (default: work_dirs/<config name>)')
    parser.add_argument('--cfg-options', nargs='+', metavar='KEY=VALUE', help='override settings of the config, '
                        "e.g. quantization.weight.bits=4 quantization.synthesis.size='(256,256)'")
    parser.add_argument('--device', choices=['cpu', 'cuda'], help='default: cuda where there is one')
    parser.add_argument('--seed', type=int, help='of all randomness (default: the config\'s, or 0)')
    parser.add_argument('--quiet', action='store_true', help='print warnings and errors only')
    parser.add_argument('--json', metavar='FILE', help='also write the numbers to this file')


def parse_options(words):
    """The words behind --cfg-options as mmengine reads them, a dict. It is heavy to import: parsers keep the words."""
    from mmengine.config import DictAction
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={})
    return parser.parse_args(['--cfg-options', *words] if words else []).cfg_options


def load_config(args, work_dir):
    """The config with the command line merged into it.

    Args:
        args (argparse.Namespace): Of :func:`config_arguments`.
        work_dir (str): Where results go if neither command line nor config says so.

    Raises:
        UserError: If it cannot be read, or an option is wrong.
    """
    import torch
    from mmengine.config import Config

    from psaq_mm.errors import UserError
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise UserError('--device cuda: torch sees no CUDA device here, use --device cpu')
    if not Path(args.config).is_file():
        raise UserError(f'the config {args.config} does not exist')
    try:
        cfg = Config.fromfile(args.config)
    except Exception as error:  # mmengine raises all kinds of things, from SyntaxError to bare RuntimeError
        raise UserError(f'the config {args.config} cannot be read ({type(error).__name__}: {error})') from None
    if args.cfg_options:
        try:
            cfg.merge_from_dict(parse_options(args.cfg_options))
        except Exception as error:
            raise UserError(f'--cfg-options {" ".join(args.cfg_options)}: must be KEY=VALUE with keys of the config '
                            f'({type(error).__name__}: {error})') from None
    if getattr(args, 'weights', None) and isinstance(cfg.get('quantization'), dict):
        cfg.quantization['load_weights'] = args.weights
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or work_dir
    if args.seed is not None:
        cfg.randomness = dict(cfg.get('randomness') or {}, seed=args.seed)
    return cfg


def run(args, work):
    """Does the work; a mistake of the user's is one message, not a traceback.

    Args:
        args (argparse.Namespace): Of :func:`config_arguments`.
        work (Callable): Takes ``args``.

    Returns:
        int: Exit status.
    """
    if args.device == 'cpu':
        os.environ['CUDA_VISIBLE_DEVICES'] = ''
    from psaq_mm.errors import UserError
    try:
        work(args)
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('interrupted' + (', --resume goes on' if hasattr(args, 'resume') else ''), file=sys.stderr)
        return 130
    return 0
