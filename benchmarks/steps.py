"""How many steps are enough: accuracy after ever more steps of synthesis, or of the game, and what guides them.

    python benchmarks/steps.py                                           # synthesis, the embedded demos
    python benchmarks/steps.py --bench ../shared/bench --tasks deit_tiny
    python benchmarks/steps.py --of game --bits W4A8 --bench ../shared/bench --tasks deit_tiny
    python benchmarks/steps.py --steps 25 50 100 --cfg-options quantization.synthesis.warm_start=0.5

Of synthesis: each number of steps calibrates the plain quantizer (psaq_v1: what V2's game starts from); 0 steps are
Gaussian noise. Beside the accuracy stands the entropy of the images. Of the game: images of as many steps as the
stanza says, made once, then psaq_v2 with ever more updates; 0 is the plain calibration. Beside the accuracy stands the
discrepancy on held-back images, relative to that of the plain calibration. Writes steps.md, steps.png and steps.json;
the command skips finished runs.
"""
import argparse
import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / 'demo'), str(ROOT / 'benchmarks')]
parse_options = runpy.run_path(str(ROOT / 'tools' / 'common.py'))['parse_options']
bits = runpy.run_path(str(ROOT / 'tools' / 'grid.py'))['bits']
from run import CONFIGS as DEMOS  # noqa: E402

STEPS = dict(synthesis=[0, 10, 25, 50, 100, 200], game=[0, 50, 100, 200, 400])
GUIDES = dict(synthesis='entropy, nats a block', game='held-back discrepancy / plain')


def entropy(run):
    """Entropy of a block, nats, at the end of synthesis; of noise nan."""
    return run['stages'].get('synthesis', {}).get('entropy', float('nan'))


def remaining(run):
    """Discrepancy on held-back images after the game, as a share of that before."""
    game = run['stages'].get('game', {})
    return game['best'] / game['initial'] if 'best' in game else 1.0


def configs(tasks, bench, out):
    """The config of each task; its data is there."""
    from mmengine.config import Config
    for task in tasks:
        if task == 'deit_tiny':
            folder = out / 'deit_tiny_full_precision'  # also writes the config
            subprocess.run([sys.executable, ROOT / 'benchmarks' / 'deit_tiny.py', '--bench', bench, '--out', folder,
                            '--methods', 'noise', '--bits', 'W8A8'], check=True)
            yield task, Config.fromfile(folder / 'deit_tiny.py')
        else:
            import scenes
            scenes.write(ROOT / 'demo' / 'data', ('val', ))
            yield task, Config.fromfile(ROOT / 'demo' / DEMOS[task])


def plot(results, of, path):
    """Accuracy and what guides it against the steps, a panel for each task."""
    from matplotlib.figure import Figure

    from psaq_mm.report.tables import title_of
    guide = GUIDES[of]
    figure = Figure(figsize=(4 * len(results), 3.6), layout='constrained')
    for axes, (task, found) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items()):
        steps = sorted(found)
        first = found[steps[0]]
        axes.axhline(first['full'], color='black', linestyle='--', linewidth=1, label='full precision')
        axes.plot(steps, [found[s]['value'] for s in steps], 'o-', label='quantized')
        axes.set_xscale('symlog', linthresh=min(s for s in steps if s))
        axes.set_xticks(steps, map(str, steps))
        axes.minorticks_off()
        axes.set(title=task, xlabel=f'steps of the {of}', ylabel=f"{title_of(first['metric'])}, %")
        other = axes.twinx()
        other.plot(steps, [found[s]['guide'] for s in steps], 's:', color='tab:green', label=guide)
        other.set_ylabel(guide)
    figure.legend(handles=[*axes.get_lines(), *other.get_lines()], loc='outside lower center', ncols=3)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--of', choices=STEPS, default='synthesis', help='what has the steps (default: synthesis)')
    parser.add_argument('--tasks', nargs='+', choices=[*DEMOS, 'deit_tiny'], default=list(DEMOS), metavar='TASK')
    parser.add_argument('--bench', type=Path, help='folder with deit_tiny/, for that task')
    parser.add_argument('--steps', nargs='+', type=int, help='default: ' + '; '.join(
        f'of {kind} {" ".join(map(str, steps))}' for kind, steps in STEPS.items()))
    parser.add_argument('--bits', type=bits, default=(8, 8), metavar='WxAy', help='default: W8A8')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/steps'))
    parser.add_argument('--cfg-options', nargs='+', metavar='KEY=VALUE', default=[], help='as of tools/dfq.py')
    args = parser.parse_args()
    if 'deit_tiny' in args.tasks and not args.bench:
        parser.error('--tasks deit_tiny needs --bench')
    from psaq_mm.engine import compare, markdown, with_stanza, write_json
    from psaq_mm.report.tables import metric_names, percent, title_of
    rows, results, guide = [], {}, GUIDES[args.of]
    for task, cfg in configs(args.tasks, args.bench, args.out):
        cfg = with_stanza(cfg, recipe='paper')  # at any bits: whose steps these are
        cfg.merge_from_dict(parse_options(args.cfg_options))
        images = None
        if args.of == 'game':
            folder = args.out / task / 'images'
            compare(cfg, ['psaq_v1'], [args.bits], folder)
            images = str(next(folder.glob('*/synthetic.pt')))
        for steps in args.steps or STEPS[args.of]:
            if args.of == 'game':
                method, changes = 'psaq_v2', dict(synthesis=dict(reuse=images), game=dict(steps=steps))
            else:
                method, changes = 'psaq_v1' if steps else 'noise', dict(synthesis=dict(steps=max(steps, 1)))
            work_dir = args.out / task / f'{steps}_steps'
            compared = compare(with_stanza(cfg, **changes), [method], [args.bits], work_dir)
            run, = compared['runs'].values()
            full, metrics = compared['full_precision'], run['quantized']
            name = metric_names([full])[0]
            guided = remaining(run) if args.of == 'game' else entropy(run)
            minutes = run['minutes'] if args.of == 'game' else run['synthesis_minutes']
            results.setdefault(task, {})[steps] = dict(metric=name, full=percent(full, name),
                                                       value=percent(metrics, name), guide=guided, minutes=minutes)
            rows.append([f'{task}, {steps}', f'{guided:.3f}' if guided == guided else '-', title_of(name),
                         f'{percent(full, name):.1f}', f'{percent(metrics, name):.1f}', f'{minutes:.2f}'])
            print(*rows[-1], sep=' | ', flush=True)
    text = markdown(['task, steps', guide, 'metric', 'full precision', 'quantized', 'minutes'], rows)
    (args.out / 'steps.md').write_text(text)
    write_json(results, args.out / 'steps.json')
    plot(results, args.of, args.out / 'steps.png')
    print(text)
    return 0


if __name__ == '__main__':
    sys.exit(main())
