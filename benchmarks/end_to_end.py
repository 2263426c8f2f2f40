"""Minutes and peak memory of a whole `tools/dfq.py` run on the demos, here and in other checkouts of this repository.

    git worktree add /tmp/before ff31954  # before steps were made cheap
    python benchmarks/end_to_end.py --repo . /tmp/before

Demos that a checkout does not have are left out. A run includes start-up and both evaluations.
"""
import argparse
import os
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
    parser.add_argument('--tasks', nargs='+', choices=DEMOS, default=list(DEMOS), metavar='TASK')
    parser.add_argument('--json', type=Path)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from rich.console import Console
    from rich.table import Table

    from psaq_mm.engine import write_json
    table = Table('demo', 'checkout', 'minutes', 'peak, GB')
    results = {}
    out = Path(tempfile.mkdtemp(prefix='end_to_end_'))  # stays, with the logs
    print(f'runs and logs are in {out}', flush=True)
    for demo in map(DEMOS.get, args.tasks):
        for number, repo in enumerate(map(Path.resolve, args.repo)):
            if not (repo / 'demo' / demo).is_file():
                continue
            write_scenes = 'import sys; sys.path[:0] = ["demo"]; import scenes; from pathlib import Path; ' \
                           'scenes.write(Path("demo/data"), ("val", ))'
            subprocess.run([sys.executable, '-c', write_scenes], cwd=repo, check=True)
            folder = out / f'{number}_{demo}'
            with open(f'{folder}.log', 'w') as log:
                minutes, peak = timed([sys.executable, 'tools/dfq.py', f'demo/{demo}', '--work-dir', folder], repo, log)
            results[f'{demo} {repo}'] = dict(minutes=minutes, peak_gb=peak)
            table.add_row(demo, str(repo), f'{minutes:.1f}', f'{peak:.2f}')
            print(f'{demo} in {repo}: {minutes:.1f} minutes, {peak:.2f} GB', flush=True)
    Console().print(table)
    if args.json:
        write_json(results, args.json)
    return 0


if __name__ == '__main__':
    sys.exit(main())
