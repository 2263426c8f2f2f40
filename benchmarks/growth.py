"""How time and memory of a synthesis and of a student step grow with image size, batch and depth: a plot.

    python benchmarks/growth.py --out work_dirs/growth

Writes growth.png, growth.md and growth.json. Steps are measured as in step_cost.py. The number of images in all only
multiplies the number of steps: time grows in proportion to it, memory (beyond the images) does not.
"""
import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / 'benchmarks'))
from step_cost import measure, student_case, student_cost, synthesis_case  # noqa: E402

# Axis of the plot: its values, and for each of them config, batch, (height, width) and options.
AXES = {
    'image side, pixels (Mask R-CNN Swin-T, batch 1)': {
        side: ('configs/mask_rcnn_swin_t_w8a8.py', 1, (side, side), {}) for side in (224, 320, 448, 640, 896)},
    'batch (Swin-T, 224 x 224)': {
        batch: ('configs/swin_t_w8a8.py', batch, (224, 224), {}) for batch in (1, 2, 4, 8)},
    'blocks (DeiT-Tiny, batch 8, 224 x 224)': {
        depth: ('configs/deit_t_w8a8.py', 8, (224, 224), {'model.depth': depth}) for depth in (3, 6, 12, 24)},
}
LINES = ('bare pass', 'synthesis step', 'plain training step', 'student step')


def point(path, batch, size, options, repeats, device):
    """Seconds and peak MB of the four kinds of steps."""
    case = ROOT / path, batch, size, device, options
    seconds, peaks = measure(synthesis_case(*case), repeats, device)
    trained = student_cost(*measure(student_case(*case), repeats, device))
    seconds, peaks = ([*x, *y[::-1]] for x, y in zip((seconds, peaks), trained))
    return dict(zip(LINES, zip(seconds, [p / 1e6 for p in peaks])))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', type=Path, default=Path('work_dirs/growth'))
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--device', default='cpu')
    args = parser.parse_args()
    import logging
    logging.disable(logging.WARNING)
    from matplotlib.figure import Figure

    from psaq_mm.engine import markdown, write_json
    results, rows = {}, []
    for axis, cases in AXES.items():
        for value, case in cases.items():
            found = results.setdefault(axis, {})[value] = point(*case, args.repeats, args.device)
            rows.append([f'{axis}: {value}', *(f'{found[n][0]:.2f} s, {found[n][1]:.0f} MB' for n in LINES)])
            print(*rows[-1], sep=' | ', flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / 'growth.md').write_text(markdown(['', *LINES], rows))
    write_json(results, args.out / 'growth.json')
    figure = Figure(figsize=(4.2 * len(results), 6.4), layout='constrained')
    grid = figure.subplots(2, len(results))
    for column, (axis, found) in enumerate(results.items()):
        for row, unit in enumerate(('seconds', 'peak, MB')):
            for line, style in zip(LINES, ('k--', 'o-', 'k:', 's-')):
                grid[row][column].plot(list(found), [f[line][row] for f in found.values()], style, label=line)
            grid[row][column].set(xlabel=axis, ylabel=unit, ylim=(0, None))
            grid[row][column].grid(alpha=0.3)
    grid[0][0].legend(fontsize='small')
    figure.savefig(args.out / 'growth.png', dpi=110)
    return 0


if __name__ == '__main__':
    sys.exit(main())
