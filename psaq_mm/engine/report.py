"""Tables of results, for the terminal and for Markdown."""
from __future__ import annotations

from rich.table import Table

METRICS = {'coco/bbox_mAP': 'box AP', 'coco/segm_mAP': 'mask AP'}
AS_PERCENT = tuple(METRICS)


def metric_names(results) -> list[str]:
    """Metrics worth a column: the well-known ones that occur, otherwise all."""
    found = dict.fromkeys(key for metrics in results for key in metrics)
    return [key for key in METRICS if key in found] or list(found)


def shown(metrics: dict, key: str) -> str:
    """A metric as people write it: AP in percent, one decimal."""
    if key not in metrics:
        return '-'
    return f'{metrics[key] * 100:.1f}' if key in AS_PERCENT else f'{metrics[key]:.4g}'


def rows_of(result: dict):
    """Header and rows of one run's table."""
    names = metric_names([result['full_precision'], result['quantized']])
    header = ['', *(METRICS.get(n, n) for n in names), 'size, MB', 'minutes']
    bits = result['bits']
    label = f"quantized W{bits['weight']}A{bits['activation']} ({', '.join(result['scope'])})"
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
    if 'not_evaluated' in result:
        caption += f"\nnot evaluated: {result['not_evaluated']}"
    return _table(*rows_of(result), f"psaq_mm, {result['method']}", caption)


def comparison_rows(results: dict[str, dict], full_precision: dict):
    """Header and rows that compare several runs: ``results`` maps a label to what ``quantize`` returned."""
    names = metric_names([full_precision])
    header = ['calibration', *(METRICS.get(n, n) for n in names), *(f'{METRICS.get(n, n)} - FP' for n in names),
              'minutes']
    rows = [['full precision', *(shown(full_precision, n) for n in names), *('' for _ in names), '']]
    for label, result in results.items():
        change = [f"{(result['quantized'][n] - full_precision[n]) * (100 if n in AS_PERCENT else 1):+.1f}"
                  for n in names]
        rows.append([label, *(shown(result['quantized'], n) for n in names), *change, f"{result['minutes']:.1f}"])
    return header, rows


def comparison_table(results, full_precision, title) -> Table:
    """The comparison for the terminal."""
    return _table(*comparison_rows(results, full_precision), title)


def markdown(header, rows) -> str:
    """A Markdown table."""
    lines = [header, ['---', *('---:' for _ in header[1:])], *rows]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines) + '\n'
