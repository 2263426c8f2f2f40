"""Minutes, peak memory and accuracy of whole `tools/dfq.py` runs on the demos, here and in other checkouts.

    git worktree add /tmp/before ff31954  # before steps were made cheap
    python benchmarks/end_to_end.py --repo . /tmp/before
    python benchmarks/end_to_end.py --variant= --variant=--amp

Demos that a checkout does not have are left out. A run includes start-up and both evaluations.
"""
import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from steps import DEMOS

ROOT = Path(__file__).resolve().parents[1]


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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--repo', nargs='+', type=Path, default=[ROOT], help='checkouts (default: this one)')
    parser.add_argument('--tasks', nargs='*', choices=DEMOS, default=list(DEMOS), metavar='TASK')
    parser.add_argument('--configs', nargs='+', type=Path, default=[], help='other configs, besides the demos or '
                        'instead of them (--tasks without a name)')
    parser.add_argument('--variant', action='append', metavar='OPTIONS', help='run each with these options of '
                        'tools/dfq.py, as in --variant=--amp; may be given several times (default: once without)')
    parser.add_argument('--json', type=Path)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from rich.console import Console
    from rich.table import Table

    from psaq_mm.engine import write_json
    from psaq_mm.report.tables import metric_names, percent, title_of
    table = Table('config', 'checkout', 'options', 'minutes', 'peak, GB', 'full precision', 'quantized')
    results = {}
    out = Path(tempfile.mkdtemp(prefix='end_to_end_'))  # stays, with the logs
    print(f'runs and logs are in {out}', flush=True)
    cases = [(config, repo, variant) for config in [*(Path('demo') / DEMOS[task] for task in args.tasks), *args.configs]
             for repo in map(Path.resolve, args.repo) for variant in args.variant or ['']]
    for number, (config, repo, variant) in enumerate(cases):
        if not (repo / config).is_file():
            continue
        if config.parts[0] == 'demo':
            write_scenes = 'import sys; sys.path[:0] = ["demo"]; import scenes; from pathlib import Path; ' \
                           'scenes.write(Path("demo/data"), ("val", ))'
            subprocess.run([sys.executable, '-c', write_scenes], cwd=repo, check=True)
        folder = out / f'{number}_{config.stem}'
        with open(f'{folder}.log', 'w') as log:
            minutes, peak = timed([sys.executable, 'tools/dfq.py', repo / config, '--work-dir', folder, '--json',
                                   f'{folder}.json', *shlex.split(variant)], repo, log)
        found = json.loads(Path(f'{folder}.json').read_text())
        full, quantized = found['full_precision'], found['quantized']
        name = metric_names([full])[0]
        results[f'{config} {repo} {variant}'.strip()] = dict(minutes=minutes, peak_gb=peak, full_precision=full,
                                                             quantized=quantized)
        table.add_row(config.stem, str(repo), variant, f'{minutes:.1f}', f'{peak:.2f}',
                      f'{percent(full, name):.1f} {title_of(name)}', f'{percent(quantized, name):.1f}')
        print(f'{config.stem} in {repo} {variant}: {minutes:.1f} minutes, {peak:.2f} GB, {percent(full, name):.1f} -> '
              f'{percent(quantized, name):.1f}', flush=True)
    Console().print(table)
    if args.json:
        write_json(results, args.json)
    return 0


if __name__ == '__main__':
    sys.exit(main())
