"""What the benchmarks on real models share: the material beside the repository, and tools/grid.py on it."""
import argparse
import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def material(bench, name, needed):
    """Return the folder of a benchmark's material; where what is needed is missing, end with an error that says so."""
    folder = (bench / name).resolve()
    if not (folder / needed).exists():
        print(f'error: {folder} does not exist: --bench names the folder that holds {name}/', file=sys.stderr)
        raise SystemExit(2)
    return folder


def cfg_options(parser, words):
    """Return the words behind --cfg-options as tools/dfq.py reads them; a wrong one ends in the parser's error."""
    from psaq_mm.errors import UserError
    try:
        return runpy.run_path(str(ROOT / 'tools' / 'common.py'))['parse_options'](words)
    except UserError as error:
        parser.error(str(error))


def run_grid(description, name, write_config):
    """Parse the command line, and compare methods and bit-widths.

    Args:
        description (str): The script's docstring.
        name (str): Of the material's folder.
        write_config (Callable): ``write_config(bench, out)`` writes the config, and returns its path and a title.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument('--bench', type=Path, required=True, help=f'folder with {name}/')
    parser.add_argument('--out', type=Path, default=Path('work_dirs') / name)
    parser.epilog = 'everything else goes to tools/grid.py, e.g. --bits W4A8 --methods psaq_v2'
    args, rest = parser.parse_known_args()
    config, title = write_config(args.bench, args.out)
    command = [sys.executable, ROOT / 'tools' / 'grid.py', config, '--work-dir', args.out, '--title', title, *rest]
    return subprocess.run(command).returncode
