"""What the tools' command lines share. Imports nothing heavy: --help answers at once.

The tools load it by its path: nothing here can be taken for a module of the user's.
"""
import argparse
import datetime
import os
import runpy
import sys
import tempfile
import time
import traceback
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
# Python puts a script's folder first; a user's package of the same name as a tool would not be found.
sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != FOLDER]
STARTED = time.time()
RECIPES = tuple(runpy.run_path(str(FOLDER.parent / 'psaq_mm' / 'recipes.py'))['RECIPES'])  # psaq_mm is heavy to import
OURS = 'psaq_mm, '  # what error.log begins with


def config_arguments(parser):
    """Add the arguments that say what to quantize, with which settings, on what."""
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
    debug_argument(parser)


def debug_argument(parser):
    """Add the argument that shows tracebacks."""
    parser.add_argument('--debug', action='store_true', help='show the traceback of an error')


def parse_options(words):
    """Return the words behind --cfg-options as mmengine reads them, a dict.

    mmengine is heavy to import: parsers keep the words.

    Raises:
        UserError: If a word is not KEY=VALUE.
    """
    from mmengine.config import DictAction

    from psaq_mm.errors import UserError
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={})
    options = {}
    for word in words or []:
        if not word.partition('=')[0].strip() or '=' not in word:
            raise UserError(f'--cfg-options {word}: must be KEY=VALUE with keys of the config')
        try:
            options.update(parser.parse_args(['--cfg-options', word]).cfg_options)
        except Exception as error:  # of brackets that do not match
            raise UserError(f'--cfg-options {word}: must be KEY=VALUE ({error})') from None
    return options


def load_config(args, work_dir):
    """Return the config with the command line merged into it.

    Args:
        args (argparse.Namespace): Of :func:`config_arguments`; its ``work_dir`` becomes the config's.
        work_dir (str): Where results go if neither command line nor config says so.

    Raises:
        UserError: If it cannot be read, or an option is wrong.
    """
    import torch

    from psaq_mm.engine import read_config
    from psaq_mm.errors import UserError, doing
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise UserError('--device cuda: torch sees no CUDA device here, use --device cpu')
    if args.seed is not None and not 0 <= args.seed < 2**32:
        raise UserError(f'--seed {args.seed}: must be from 0 to 2**32 - 1')
    with doing(f'reading {args.config}'):
        cfg = read_config(args.config, parse_options(args.cfg_options))
    if getattr(args, 'weights', None) and isinstance(cfg.get('quantization'), dict):
        cfg.quantization['load_weights'] = args.weights
    cfg.work_dir = args.work_dir = str(args.work_dir or cfg.get('work_dir') or work_dir)
    check_folder('--work-dir', args.work_dir)
    if args.seed is not None:
        cfg.randomness = dict(cfg.get('randomness') or {}, seed=args.seed)
    return cfg


def writable(folder):
    """Return why nothing can be written in a folder, there or not, or None. Nothing is left behind.

    Args:
        folder (Path): The folder.
    """
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        return f'{folder} is not a folder'
    try:
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f'{error.strerror or error}: {folder}'


def check_file(option, path):
    """Find out before the work whether a file can be written.

    Raises:
        UserError: If not.
    """
    from psaq_mm.errors import UserError
    if not str(path):
        raise UserError(f'{option} is empty: name a file')
    path = Path(path).absolute()
    reason = 'it is a folder, name a file' if path.is_dir() else 'it is not a file' \
        if path.exists() and not path.is_file() else writable(path.parent)
    if reason:
        raise UserError(f'{option} {path}: cannot be written ({reason})')


def check_folder(option, path):
    """Find out before the work whether files can be written in a folder.

    Raises:
        UserError: If not.
    """
    from psaq_mm.errors import UserError
    reason = writable(Path(path).absolute())
    if reason:
        name = 'the work dir' if option == '--work-dir' else 'the folder'
        raise UserError(f'cannot write to {name} {path} ({reason}): choose another with {option}')


def run(args, work):
    """Do the work. An error ends in one message, not in a traceback.

    Args:
        args (argparse.Namespace): What the command line says.
        work (Callable): Takes ``args``; may return an exit status.

    Returns:
        int: Exit status: 0, what ``work`` returns, 2 after an error, 130 after Ctrl-C.
    """
    if getattr(args, 'device', None) == 'cpu':
        os.environ['CUDA_VISIBLE_DEVICES'] = ''
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):  # names of classes and files may be more than the locale can show
            stream.reconfigure(errors='backslashreplace')
    try:
        for name in ('json', 'markdown'):
            if getattr(args, name, None) is not None:
                check_file(f'--{name}', getattr(args, name))
        for name in ('work_dir', 'logs'):
            if getattr(args, name, None):
                check_folder(f"--{name.replace('_', '-')}", getattr(args, name))
        return work(args) or 0
    except BaseException as error:  # the outermost net: whatever it is, the user is told in words
        return explain(args, error)


def chain(error):
    """Yield an error and those that it came from."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def explain(args, error):
    """Print what went wrong and return the exit status.

    Args:
        args (argparse.Namespace): What the command line says.
        error (BaseException): Anything.
    """
    errors = sys.modules.get('psaq_mm.errors')
    if getattr(args, 'debug', False):
        traceback.print_exception(error)
    if errors and isinstance(error, errors.UserError):
        print(f'error: {error}', file=sys.stderr)
        return 2
    # Libraries turn Ctrl-C into errors of their own, as when it comes during an import.
    if any(isinstance(part, KeyboardInterrupt) for part in chain(error)):
        print('interrupted' + goes_on(args), file=sys.stderr)
        return 130
    stage = getattr(error, 'doing', None) or ('starting' if 'psaq_mm' not in sys.modules else 'working')
    text = ' '.join(str(error).split())
    message = f'error: {type(error).__name__}{": " if text else ""}{text[:600]} (while {stage}).'
    done = finished(getattr(args, 'work_dir', None))
    if done:
        message += f' What is finished is in {args.work_dir}: {done}.'
    message += f' The traceback is in {write_error(args, error)}; --debug shows it'
    print(message, file=sys.stderr)
    return 2


def goes_on(args):
    """What --resume would do now, of commands that have it."""
    if not hasattr(args, 'resume'):
        return ''
    pipeline = sys.modules.get('psaq_mm.engine.pipeline')
    if pipeline and pipeline.was_interrupted(getattr(args, 'work_dir', None) or ''):
        return ', --resume goes on'
    return '. Nothing to go on from was written yet'


def finished(folder):
    """Return the names of results that this process left in a folder."""
    if not folder or not Path(folder).is_dir():
        return ''
    names = sorted(path.name for path in Path(folder).iterdir()
                   if path.is_file() and path.stat().st_mtime >= STARTED and not path.name.startswith(('.', 'error')))
    return ', '.join(names[:8]) + (f' and {len(names) - 8} more' if len(names) > 8 else '')


def write_error(args, error):
    """Write a traceback to error.log in the work dir, else to a temporary file, and return its path.

    Earlier ones stay, and a file of that name that is not ours, too. Each process of a distributed job has its own.
    """
    rank = os.environ.get('RANK', '0') if int(os.environ.get('WORLD_SIZE') or 1) > 1 else None
    name = 'error.log' if rank is None else f'error.rank{rank}.log'
    text = f"{OURS}{datetime.datetime.now():%Y-%m-%d %H:%M:%S} {' '.join(map(str, sys.argv))}\n" \
        + ''.join(traceback.format_exception(error)) + '\n'
    for folder in filter(None, (getattr(args, 'work_dir', None), getattr(args, 'logs', None))):
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            path = Path(folder) / name
            if path.exists() and not path.read_text(encoding='utf-8', errors='replace').startswith(OURS):
                continue
            with open(path, 'a', encoding='utf-8', errors='backslashreplace') as stream:
                stream.write(text)
            return path
        except OSError:
            continue
    with tempfile.NamedTemporaryFile('w', encoding='utf-8', errors='backslashreplace', prefix='psaq_mm_error_',
                                     suffix='.log', delete=False) as stream:
        stream.write(text)
    return stream.name
