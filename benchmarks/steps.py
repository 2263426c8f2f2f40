"""How many synthesis steps are enough: entropy and accuracy after ever more steps, and what ends them earlier.

    python benchmarks/steps.py                                           # the embedded demos
    python benchmarks/steps.py --bench ../shared/bench --tasks deit_tiny
    python benchmarks/steps.py --steps 25 50 100 --cfg-options quantization.synthesis.warm_start=0.5

Each number of steps calibrates the plain quantizer (psaq_v1: what V2's game starts from); 0 steps are Gaussian noise.
Writes steps.md, steps.png and steps.json; finished runs are not done again.
"""
import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / 'demo'), str(ROOT / 'tools'), str(ROOT / 'benchmarks')]
from common import parse_options  # noqa: E402
from grid import bits  # noqa: E402
from run import CONFIGS as DEMOS  # noqa: E402


def last_entropy(folder):
    """Entropy of a block, nats, at the end of synthesis, from the log of a run."""
    import re
    logs = ''.join(path.read_text() for path in sorted(folder.glob('*/*.log')))
    found = re.findall(r' entropy: (-?[0-9.]+)', logs)
    return float(found[-1]) if found else float('nan')


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--tasks', nargs='+', choices=[*DEMOS, 'deit_tiny'], default=list(DEMOS), metavar='TASK')
    parser.add_argument('--bench', type=Path, help='folder with deit_tiny/, for that task')
    parser.add_argument('--steps', nargs='+', type=int, default=[0, 10, 25, 50, 100, 200])
    parser.add_argument('--bits', type=bits, default=(8, 8), metavar='WxAy', help='default: W8A8')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/steps'))
    parser.add_argument('--cfg-options', nargs='+', metavar='KEY=VALUE', default=[], help='as of tools/dfq.py')
    args = parser.parse_args()
    if 'deit_tiny' in args.tasks and not args.bench:
        parser.error('--tasks deit_tiny needs --bench')
    from matplotlib.figure import Figure
    from mmengine.config import Config

    from psaq_mm.engine import compare, markdown, with_stanza, write_json
    from psaq_mm.engine.report import metric_names, percent, title_of
    rows, results = [], {}
    for task in args.tasks:
        if task == 'deit_tiny':
            folder = args.out / 'deit_tiny_full_precision'  # also writes the config
            subprocess.run([sys.executable, ROOT / 'benchmarks' / 'deit_tiny.py', '--bench', args.bench, '--out',
                            folder, '--methods', 'noise', '--bits', 'W8A8'], check=True)
            cfg = Config.fromfile(folder / 'deit_tiny.py')
        else:
            import scenes
            scenes.write(ROOT / 'demo' / 'data', ('val', ))
            cfg = Config.fromfile(ROOT / 'demo' / DEMOS[task])
        cfg.merge_from_dict(parse_options(args.cfg_options))
        for steps in args.steps:
            method = 'psaq_v1' if steps else 'noise'
            changed = with_stanza(cfg, synthesis=dict(steps=max(steps, 1)))
            work_dir = args.out / task / f'{steps}_steps'
            compared = compare(changed, [method], [args.bits], work_dir)
            (label, run), = compared['runs'].items()
            full, metrics = compared['full_precision'], run['quantized']
            name = metric_names([full])[0]
            entropy = last_entropy(work_dir / label.replace(' ', '_'))
            results.setdefault(task, {})[steps] = dict(
                metric=name, full=percent(full, name), value=percent(metrics, name), entropy=entropy,
                minutes=run['synthesis_minutes'])
            rows.append([f'{task}, {steps}', f'{entropy:.3f}' if steps else '', title_of(name),
                         f'{percent(full, name):.1f}', f'{percent(metrics, name):.1f}',
                         f"{run['synthesis_minutes']:.2f}"])
    text = markdown(['task, steps', 'entropy, nats a block', 'metric', 'full precision', 'quantized', 'minutes'], rows)
    (args.out / 'steps.md').write_text(text)
    write_json(results, args.out / 'steps.json')
    figure = Figure(figsize=(4 * len(results), 3.6), layout='constrained')
    for axes, (task, found) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items()):
        steps = sorted(found)
        first = found[steps[0]]
        axes.axhline(first['full'], color='black', linestyle='--', linewidth=1, label='full precision')
        axes.plot(steps, [found[s]['value'] for s in steps], 'o-', label='quantized')
        axes.set_xscale('symlog', linthresh=10)
        axes.set_xticks(steps, map(str, steps))
        axes.set(title=task, xlabel='synthesis steps', ylabel=f"{title_of(first['metric'])}, %")
        other = axes.twinx()
        other.plot(steps, [found[s]['entropy'] for s in steps], 's:', color='tab:green', label='entropy')
        other.set_ylabel('entropy, nats a block')
        axes.legend(loc='lower right', fontsize='small')
    figure.savefig(args.out / 'steps.png', dpi=120)
    print(text)
    return 0


if __name__ == '__main__':
    sys.exit(main())
