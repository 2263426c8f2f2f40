"""Results for people and programs: tables for the terminal and for Markdown, a plot, JSON."""
from __future__ import annotations

from rich.table import Table

from ..files import OwnedFolder, write_json

# Metrics that people know: their name, and what makes a percentage of them.
METRICS = {
    'coco/bbox_mAP': ('box AP', 100),
    'coco/segm_mAP': ('mask AP', 100),
    'mIoU': ('mIoU', 1),
    'accuracy/top1': ('top-1', 1),
    'accuracy/top2': ('top-2', 1),
    'accuracy/top5': ('top-5', 1),
}


def metric_names(results) -> list[str]:
    """Metrics worth a column: the well-known ones that occur, otherwise all."""
    found = dict.fromkeys(key for metrics in results for key in metrics)
    return [key for key in METRICS if key in found] or list(found)


def title_of(key: str) -> str:
    """A metric's name in tables."""
    return METRICS[key][0] if key in METRICS else key


def percent(metrics: dict, key: str) -> float:
    """A metric in the unit that people write it in: AP, mIoU and accuracy in percent."""
    return metrics[key] * METRICS.get(key, ('', 1))[1]


def shown(metrics: dict, key: str) -> str:
    """A metric as people write it: one decimal in percent."""
    if key not in metrics:
        return '-'
    return f'{percent(metrics, key):.1f}' if key in METRICS else f'{metrics[key]:.4g}'


def fidelity_of(result: dict) -> tuple[str, float] | None:
    """Name and value, of 100, of the data-free fidelity of a run, where it has one."""
    found = (result.get('fidelity') or {}).get('predictions') or {}
    name = next((name for name in ('box AP', 'mask AP', 'mIoU', 'top-1 agreement') if name in found), None)
    return name and (name, found[name])


def rows_of(result: dict):
    """Header and rows of one run's table."""
    names = metric_names([result['full_precision'], result['quantized']])
    header = ['', *map(title_of, names), 'size, MB', 'minutes']
    bits = result['bits']
    mixed = ', mixed' if result.get('mixed') else ''
    label = f"quantized W{bits['weight']}A{bits['activation']}{mixed} ({', '.join(result['scope'])})"
    return header, [['full precision', *(shown(result['full_precision'], n) for n in names),
                     f"{result['size_mb']['full_precision']:.1f}", '-'],
                    [label, *(shown(result['quantized'], n) for n in names), f"{result['size_mb']['quantized']:.1f}",
                     f"{result['minutes']:.1f}"]]


def _table(header, rows, title, caption=None):
    table = Table(title=title, caption=caption, caption_justify='left')
    for index, name in enumerate(header):
        table.add_column(name, justify='right' if index else 'left')
    for row in rows:
        table.add_row(*row)
    return table


def result_table(result: dict) -> Table:
    """Full precision beside quantized, for one run of ``tools/dfq.py``."""
    caption = f"{result['checkpoint']}\ntest it with {result['test_config']}"
    if fidelity_of(result):
        caption += '\ndata-free {}, with full precision as the truth: {:.1f} of 100'.format(*fidelity_of(result))
    if 'report' in result:
        caption += f"\nreport: {result['report']}"
    if 'not_evaluated' in result:
        caption += f"\nnot evaluated: {result['not_evaluated']}"
    return _table(*rows_of(result), f"psaq_mm, {result['method']}, recipe '{result['recipe']}'", caption)


def scope_of(results: dict) -> str:
    """What is quantized, in words."""
    run = next(iter(results['runs'].values()), {})
    more = ', residual sums and outputs too' if run.get('placement') == 'all' else ''
    return f'{" and ".join(run.get("scope", ["nothing"]))} quantized{more}, the rest in float'


def comparison_rows(results: dict, minutes: bool = True):
    """Header and rows that compare several runs; of several seeds, mean ± standard deviation.

    Args:
        results (dict): From :func:`psaq_mm.engine.compare`.
        minutes (bool): Whether to tell how long they took, which no two runs agree on. Defaults to True.
    """
    full = results['full_precision']
    names = metric_names([full])
    judged = any(map(fidelity_of, results['runs'].values()))
    header = ['calibration', *map(title_of, names), *(f'{title_of(n)} - FP' for n in names), *['fidelity'] * judged,
              *['minutes'] * minutes]
    rows = [['full precision', *(shown(full, n) for n in names), *('' for _ in names), *[''] * judged, '']]
    for label, result in results['runs'].items():
        change = [f"{percent(result['quantized'], n) - percent(full, n):+.1f}" for n in names]
        fidelity, spread = fidelity_of(result), result.get('deviation', {})
        rows.append([label, *(shown(result['quantized'], n) + (f' ± {shown(spread, n)}' if n in spread else '')
                              for n in names), *change,
                     *[f'{fidelity[1]:.1f}' if fidelity else '-'] * judged, f"{result['minutes']:.1f}"])
    return header, [row[:len(header)] for row in rows]


def comparison_table(results, title) -> Table:
    """The comparison for the terminal."""
    return _table(*comparison_rows(results), f'{title}: {scope_of(results)}')


def plot_comparison(results: dict, title: str):
    """A figure: for every metric one line a method over the bit-widths, full precision dashed."""
    from matplotlib.figure import Figure
    full = results['full_precision']
    names = metric_names([full])
    bits = list(dict.fromkeys(label.split()[0] for label in results['runs']))
    methods = list(dict.fromkeys(label.split(' ', 1)[1] for label in results['runs']))
    figure = Figure(figsize=(1.5 + 4 * len(names), 4), layout='constrained')
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        axes.axhline(percent(full, name), color='black', linestyle='--', linewidth=1, label='full precision')
        for method, marker in zip(methods, 'sv^oDP*X'):
            found = [(b, results['runs'][f'{b} {method}']) for b in bits if f'{b} {method}' in results['runs']]
            axes.plot([b for b, _ in found], [percent(r['quantized'], name) for _, r in found], marker=marker,
                      linestyle='-' if len(found) > 1 else '', label=method, alpha=0.8)
        axes.set_ylabel(f'{title_of(name)}, %' if name in METRICS else name)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    axes.legend(fontsize='small')
    figure.suptitle(f'{title}: {scope_of(results)}', fontsize='medium')
    return figure


def markdown(header, rows) -> str:
    """A Markdown table."""
    lines = [header, ['---', *('---:' for _ in header[1:])], *rows]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines) + '\n'


WRITTEN = ('table.md', 'grid.png', 'metrics.json')  # by write_comparison


def write_comparison(results: dict, folder, title: str, json_path: str | None = None) -> Table:
    """Write ``table.md``, ``grid.png`` and ``metrics.json``.

    The same results give the same table: how long a run took is in the JSON and on the terminal only.

    Args:
        results (dict): From :func:`psaq_mm.engine.compare`.
        folder (str): Where to.
        title (str): Of table and plot.
        json_path (str, optional): Another file for the numbers.

    Returns:
        Table: For the terminal.
    """
    own = OwnedFolder(folder)
    text = markdown(*comparison_rows(results, minutes=False))
    own.write('table.md', f'{title}: {scope_of(results)}\n\n{text}'.encode())
    with own.writing('grid.png') as path:
        plot_comparison(results, title).savefig(path, dpi=120)
    own.write_json('metrics.json', results)
    if json_path:
        write_json(results, json_path)
    table = comparison_table(results, title)
    table.caption = f'{folder}/table.md, {folder}/grid.png'
    return table
