"""Minutes, peak memory and accuracy of whole `tools/dfq.py` runs: both recipes beside each other, or other options.

    python benchmarks/end_to_end.py --bits W4A4   # recipe 'low_bit' as multiples of 'paper', on the demos
    git worktree add /tmp/before ff31954          # before steps were made cheap
    python benchmarks/end_to_end.py --variant= --repo . /tmp/before
    python benchmarks/end_to_end.py --variant= --variant=--amp

A recipe runs with its own defaults: of a config's stanza remain what is quantized, image size and batch size. Both
recipes go without the report's images. A run includes start-up and both evaluations; the minutes of quantization are
told apart. Demos that a checkout does not have are left out.
"""
import argparse
import json
import os
import runpy
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from steps import DEMOS

ROOT = Path(__file__).resolve().parents[1]
grid = runpy.run_path(str(ROOT / 'tools' / 'grid.py'))
PAPER = 'paper'  # the recipe that others are compared with
WRITE_SCENES = ('import sys; sys.path[:0] = ["demo"]; import scenes; from pathlib import Path; '
                'scenes.write(Path("demo/data"), ("val", ))')


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--repo', nargs='+', type=Path, default=[ROOT], help='checkouts (default: this one)')
    parser.add_argument('--tasks', nargs='*', choices=DEMOS, default=list(DEMOS), metavar='TASK')
    parser.add_argument('--configs', nargs='+', type=Path, default=[], help='other configs, besides the demos or '
                        'instead of them (--tasks without a name)')
    parser.add_argument('--recipes', nargs='+', choices=grid['RECIPES'], metavar='RECIPE',
                        help=f"of {', '.join(grid['RECIPES'])} (default: all, or none where --variant is given)")
    parser.add_argument('--bits', type=grid['bits'], metavar='WxAy', help='of the recipes (default: W4A4)')
    parser.add_argument('--variant', action='append', metavar='OPTIONS', help='run each with these options of '
                        'tools/dfq.py, as in --variant=--amp; may be given several times')
    parser.add_argument('--json', type=Path)
    args = parser.parse_args()
    if args.recipes is None:
        args.recipes = [] if args.variant else grid['RECIPES']
    if args.bits and not args.recipes:
        parser.error('--bits are those of --recipes: name a recipe, or give the bits with --variant')
    args.bits = args.bits or (4, 4)
    return args


def timed(command, repo, log):
    """Minutes and peak resident GB of a process."""
    environment = dict(os.environ, PYTHONPATH=str(repo))
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=repo, env=environment, stdout=log, stderr=log)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        print(f'error: {" ".join(map(str, command))} failed, see {log.name}', file=sys.stderr)
        sys.exit(1)
    unit = 1 if sys.platform == 'darwin' else 1024
    return (time.perf_counter() - started) / 60, usage.ru_maxrss * unit / 1e9


def bare_recipe(stanza, recipe, bits):
    """Return a stanza with nothing of the method in it but a recipe's name and the bits.

    Args:
        stanza (dict): Of a config. What is quantized, image size and batch size stay.
        recipe (str): The recipe.
        bits (tuple[int, int]): Of weights and activations.
    """
    from psaq_mm.stanza import METHOD
    kept = {key: value for key, value in stanza.items() if key not in METHOD['include']}
    synthesis = {key: value for key, value in stanza.get('synthesis', {}).items()
                 if key in METHOD['exclude']['synthesis'] - {'reuse'}}
    return dict(kept, recipe=recipe, synthesis=synthesis, weight=dict(bits=bits[0]), activation=dict(bits=bits[1]),
                report=dict(images=0))


def recipe_config(config, recipe, bits, path):
    """Write a config that is another one with a recipe's own defaults, and return its path."""
    from psaq_mm.engine import read_config
    stanza = bare_recipe(read_config(config).quantization.to_dict(), recipe, bits)
    path.write_text(f'_base_ = [{str(config)!r}]\nquantization = dict(_delete_=True, **{stanza!r})\n')
    return path


def measured(config, repo, recipe, variant, args, folder):
    """Run one case.

    Returns:
        dict: ``minutes`` and ``peak_gb`` of the whole run, ``quantization_minutes`` of it, and metrics of both models.
    """
    path = (repo / config).resolve()
    if config.parts[0] == 'demo':
        subprocess.run([sys.executable, '-c', WRITE_SCENES], cwd=repo, check=True)
    if recipe:
        path = recipe_config(path, recipe, args.bits, Path(f'{folder}.py'))
    with open(f'{folder}.log', 'w') as log:
        minutes, peak = timed([sys.executable, 'tools/dfq.py', path, '--work-dir', folder, '--json', f'{folder}.json',
                               *shlex.split(variant)], repo, log)
    found = json.loads(Path(f'{folder}.json').read_text())
    return dict(minutes=minutes, quantization_minutes=found['minutes'], peak_gb=peak,
                full_precision=found['full_precision'], quantized=found['quantized'])


def ratios(runs):
    """What each recipe takes as multiples of what the paper's takes.

    Args:
        runs (dict[tuple, dict]): By config, checkout, recipe and options, from :func:`measured`.

    Returns:
        dict[tuple, dict[str, float]]: By the same; ``time`` of the whole run, ``quantization`` of it, ``memory``.
    """
    found = {}
    for (config, repo, recipe, variant), run in runs.items():
        paper = runs.get((config, repo, PAPER, variant))
        if paper and recipe not in ('', PAPER):
            found[config, repo, recipe, variant] = {
                name: run[key] / paper[key] for name, key in (
                    ('time', 'minutes'), ('quantization', 'quantization_minutes'), ('memory', 'peak_gb'))}
    return found


def table_of(runs):
    """A row for each run."""
    from rich.table import Table

    from psaq_mm.report.tables import metric_names, percent, title_of
    table = Table('config', 'checkout', 'recipe, options', 'minutes', 'quantization', 'peak, GB', 'full precision',
                  'quantized')
    for (config, repo, recipe, variant), run in runs.items():
        name = metric_names([run['full_precision']])[0]
        table.add_row(config.stem, str(repo), f'{recipe} {variant}'.strip(), f"{run['minutes']:.1f}",
                      f"{run['quantization_minutes']:.1f}", f"{run['peak_gb']:.2f}",
                      f"{percent(run['full_precision'], name):.1f} {title_of(name)}",
                      f"{percent(run['quantized'], name):.1f}")
    return table


def label(case):
    """A case in one line."""
    return ' '.join(str(part) for part in case if part)


def main():
    args = parse_args()
    sys.path.insert(0, str(ROOT))
    from rich.console import Console

    from psaq_mm.engine import write_json
    out = Path(tempfile.mkdtemp(prefix='end_to_end_'))  # stays, with the logs
    print(f'runs and logs are in {out}', flush=True)
    runs = {}
    cases = [(config, repo, recipe, variant)
             for config in [*(Path('demo') / DEMOS[task] for task in args.tasks), *args.configs]
             for repo in map(Path.resolve, args.repo) if (repo / config).is_file()
             for variant in args.variant or [''] for recipe in args.recipes or ['']]
    for number, case in enumerate(cases):
        run = runs[case] = measured(*case, args, out / f'{number}_{case[0].stem}')
        print(f"{label(case)}: {run['minutes']:.1f} minutes, {run['peak_gb']:.2f} GB", flush=True)
        if args.json:
            found = {label(case): times for case, times in ratios(runs).items()}
            write_json({**{label(case): run for case, run in runs.items()}, **(dict(ratios=found) if found else {})},
                       args.json)
    Console().print(table_of(runs))
    for case, times in ratios(runs).items():
        print(f"{label(case)} / {PAPER}: {times['time']:.2f} times the minutes, {times['quantization']:.2f} times "
              f"those of quantization, {times['memory']:.2f} times the peak memory")
    return 0


if __name__ == '__main__':
    sys.exit(main())
