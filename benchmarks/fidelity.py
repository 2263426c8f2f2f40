"""Is the data-free fidelity any good? How it ranks methods and bit-widths, beside how real data ranks them.

    python demo/run.py --bits W8A8 W6A6 W4A8 W4A4 --work-dir work_dirs/study
    python benchmarks/deit_tiny.py --bench ../shared/bench --out work_dirs/study/deit_tiny
    python benchmarks/nuclei.py --bench ../shared/bench --out work_dirs/study/nuclei
    python benchmarks/fidelity.py work_dirs/study/*/ --out docs/images/fidelity.png

Takes folders of finished comparisons and measures the fidelity of each run in them anew, on the fresh images of the
first. Writes a scatter plot and JSON, prints rank correlations as Markdown: Spearman's, and how
many of the pairs that differ by a point or more on real data are in the right order.
"""
import argparse
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

COLOURS = dict(noise='#8a929c', psaq_v1='#3b82c4', psaq_v2='#d9822b', real='#3a9d5d')


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('grids', nargs='+', type=Path, help="work dirs of tools/grid.py or the demos'")
    parser.add_argument('--measured', type=Path, metavar='FILE', help='numbers of an earlier run (--json): not anew')
    parser.add_argument('--out', type=Path, default=Path('fidelity.png'))
    parser.add_argument('--json', type=Path, metavar='FILE', help='also write the numbers to this file')
    return parser.parse_args()


def measure(grid):
    """One row a run of a comparison: its metrics on real data, and its fidelity."""
    import torch
    from mmengine.config import Config
    from mmengine.registry import MODELS

    from psaq_mm.engine.checkpoint import load_float, load_safely, read_checkpoint
    from psaq_mm.engine.config import default_scope
    from psaq_mm.engine.reporting import views_of
    from psaq_mm.quantization import Mode, set_mode
    from psaq_mm.report.fidelity import fidelity
    from psaq_mm.stanza import QuantizationConfig
    from psaq_mm.synthesis import valid_range
    runs = json.loads((grid / 'metrics.json').read_text())['runs']
    images = load_safely(min(grid.glob('*/fresh.pt')))['images']
    teacher, rows = None, []
    for name, result in runs.items():
        folder = grid / name.replace(' ', '_')
        cfg = Config.fromfile(folder / 'test_config.py')
        default_scope(cfg)
        student = MODELS.build(cfg.model).eval()
        student.load_state_dict(read_checkpoint(str(folder / 'quantized.pth'))['state_dict'])
        stanza = QuantizationConfig.parse(cfg.model.quantization)
        if teacher is None:
            teacher = MODELS.build(cfg.model).eval()
            full = grid / 'full_precision.pth'  # where the checkpoint had another layout
            if not full.exists():
                full = json.loads((folder / 'compared.json').read_text())['inputs']['checkpoint'][0]
            load_float(teacher, read_checkpoint(str(full)), stanza.targets)
            set_mode(teacher, Mode.FLOAT)
            pixels = teacher.data_preprocessor
            low, high = valid_range(pixels.mean.flatten(), pixels.std.flatten())
            views = views_of(SimpleNamespace(quantization=stanza, runner=SimpleNamespace(seed=0), low=low, high=high),
                             images)
        with torch.no_grad():
            found = fidelity(teacher, student, views, any(
                target.split('.')[0] not in ('backbone', 'neck') for target in stanza.targets))
        bits, method = name.split(' ', 1)
        rows.append(dict(bits=bits, method=method, real=result['quantized'], fidelity=dict(
            found['predictions'], cosine=found['cosine'],
            sqnr=sum(f['sqnr'] for f in found['features']) / len(found['features']))))
        print(grid.name, name, rows[-1], file=sys.stderr, flush=True)
    return rows


def ordered(real, values):
    """Of the pairs of runs that real data tells apart by a point or more, how many are in that order: '41 of 43'."""
    pairs = [(real[a] - real[b]) * (values[a] - values[b]) > 0 for a, b in itertools.combinations(range(len(real)), 2)
             if abs(real[a] - real[b]) >= 1]
    return f'{sum(pairs)} of {len(pairs)}'


def main():
    args = parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import logging
    import warnings
    warnings.simplefilter('ignore')
    logging.disable(logging.WARNING)
    from matplotlib.figure import Figure
    from scipy.stats import spearmanr

    from psaq_mm.engine import markdown, write_json
    from psaq_mm.report.tables import fidelity_of, metric_names, percent, title_of
    everything, table = {}, []
    known = json.loads(args.measured.read_text()) if args.measured else {}
    figure = Figure(figsize=(3.6 * len(args.grids), 3.6), layout='constrained')
    for axes, grid in zip(figure.subplots(1, len(args.grids), squeeze=False)[0], args.grids):
        rows = everything[grid.name] = known.get(grid.name) or measure(grid)
        key = metric_names([row['real'] for row in rows])[0]
        name = fidelity_of(dict(fidelity=dict(predictions=rows[0]['fidelity'])))[0]
        real = [percent(row['real'], key) for row in rows]
        others = [i for i, row in enumerate(rows) if row['method'] != 'noise']
        for measure_name in [name, *(n for n in rows[0]['fidelity'] if n != name)]:
            values = [row['fidelity'][measure_name] for row in rows]
            if measure_name.startswith('KL'):
                values = [-value for value in values]
            table.append([grid.name if measure_name == name else '', title_of(key), measure_name,
                          f'{spearmanr(real, values).statistic:.2f}', ordered(real, values),
                          ordered([real[i] for i in others], [values[i] for i in others]), str(len(rows))])
        for row, value in zip(rows, real):
            axes.scatter(row['fidelity'][name], value, color=COLOURS[row['method']], s=26)
            axes.annotate(row['bits'], (row['fidelity'][name], value), fontsize=6, alpha=0.7,
                          xytext=(3, 3), textcoords='offset points')
        axes.set_title(f'{grid.name}: rank correlation {spearmanr(real, [r["fidelity"][name] for r in rows])[0]:.2f}',
                       fontsize=9)
        axes.set_xlabel(f'data-free {name}', fontsize=8)
        axes.set_ylabel(f'{title_of(key)} on real data, %', fontsize=8)
        axes.grid(alpha=0.3)
    for method, colour in COLOURS.items():
        axes.scatter([], [], color=colour, label=method)
    axes.legend(fontsize=7)
    figure.savefig(args.out, dpi=110)
    if args.json:
        write_json(everything, args.json)
    header = ['comparison', 'real metric', 'data-free measure', 'rank correlation', 'pairs in order',
              'without noise', 'runs']
    print(markdown(header, table))
    return 0


if __name__ == '__main__':
    sys.exit(main())
