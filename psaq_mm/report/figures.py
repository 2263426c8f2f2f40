"""The report's pictures, by matplotlib. Each function returns a figure; :func:`svg` puts one into a page."""
from __future__ import annotations

import functools
import io
import re
from collections.abc import Sequence

import numpy as np

# Colours that :func:`svg` replaces by the page's own.
INK, FAINT = '#010203', '#040506'
VARIABLES = {INK: 'var(--ink)', FAINT: 'var(--faint)'}
BLUE, ORANGE, GREEN, GREY = '#3b82c4', '#d9822b', '#3a9d5d', '#8a929c'  # seen on white and on black
STYLE = {
    'text.color': INK, 'axes.labelcolor': INK, 'axes.edgecolor': FAINT, 'xtick.color': INK, 'ytick.color': INK,
    'grid.color': FAINT, 'grid.alpha': 0.5, 'axes.grid': True, 'axes.axisbelow': True, 'axes.spines.top': False,
    'axes.spines.right': False, 'font.size': 10, 'legend.frameon': False, 'legend.labelcolor': INK,
    'svg.fonttype': 'none', 'svg.hashsalt': 'psaq_mm', 'font.family': 'sans-serif',
}


def styled(draw):
    """Makes a function draw in the style above."""

    @functools.wraps(draw)
    def wrapped(*args, **kwargs):
        import matplotlib
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return wrapped


def new_figure(width=8.0, height=3.2, columns=1, **kwargs):
    """A figure without pyplot's global state, and its axes."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), layout='constrained')
    return figure, figure.subplots(1, columns, squeeze=False, **kwargs)[0]


@styled
def svg(figure) -> str:
    """An ``<svg>`` element that takes text and lines in the colours of the page it stands in."""
    stream = io.StringIO()
    figure.savefig(stream, format='svg', transparent=True, metadata=dict(Date=None, Creator=None))
    text = stream.getvalue()
    text = text[text.index('<svg'):]
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, variable)
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', '', text, count=1)


@styled
def pixels(figure, dpi: int = 100) -> np.ndarray:
    """The figure as an image on white, (H, W, 3) uint8, for mmengine's Visualizer."""
    from PIL import Image
    stream = io.BytesIO()
    figure.savefig(stream, format='png', dpi=dpi, facecolor='white')
    return np.array(Image.open(stream).convert('RGB'))


@styled
def stage_curve(history: Sequence[dict], stage: str, number: str):
    """Draw a number of a stage over its updates.

    Args:
        history (Sequence[dict]): Of :class:`DataFreeLoop`.
        stage, number (str): Names.
    """
    points = [(update['index'] + 1, update[number]) for update in history
              if update['stage'] == stage and number in update]
    if not points:
        return None
    figure, (axes, ) = new_figure()
    axes.plot(*zip(*points), color=BLUE, linewidth=1.4)
    axes.set_xlabel(f'update of {stage}')
    axes.set_ylabel(number)
    return figure


@styled
def synthesis_curve(history: Sequence[dict], steps: int, raised: str):
    """Draw what synthesis raises over its steps, a line a batch.

    Args:
        history (Sequence[dict]): Of :class:`DataFreeLoop`; ``index`` counts on from batch to batch.
        steps (int): Of a batch.
        raised (str): The number that is drawn: 'entropy', 'diversity' or 'agreement'.
    """
    batches = {}
    for update in history:
        if update['stage'] == 'synthesis' and raised in update:
            batches.setdefault(update['index'] // steps, []).append((update['index'] % steps + 1, update[raised]))
    if not batches:
        return None
    figure, (axes, ) = new_figure()
    for number, (batch, points) in enumerate(sorted(batches.items())):
        axes.plot(*zip(*points), color=BLUE, alpha=0.35 + 0.65 * (number == 0), linewidth=1.4,
                  label=f'batch {batch + 1}' if len(batches) == 1 else ('first batch' if number == 0 else
                                                                         'the others' if number == 1 else None))
    axes.set_xlabel('step of synthesis')
    axes.set_ylabel('entropy, nats a block' if raised == 'entropy' else raised)
    axes.legend(loc='lower right')
    return figure


@styled
def similarity_densities(densities: Sequence[dict]):
    """Draw densities of patch similarities in some blocks, of images and of what they started from.

    Args:
        densities (Sequence[dict]): ``name``; ``grid``, ``starts`` and ``images``, arrays of one length.
    """
    if not densities:
        return None
    figure, row = new_figure(9, 2.8, len(densities), sharex=True)
    for axes, block in zip(row, densities):
        axes.fill_between(block['grid'], block['starts'], color=GREY, alpha=0.35, linewidth=0)
        axes.plot(block['grid'], block['starts'], color=GREY, linewidth=1, label='at the start')
        axes.plot(block['grid'], block['images'], color=BLUE, linewidth=1.6, label='images')
        axes.set_title(block['name'], fontsize=10, color=INK)
        axes.set_xlabel('similarity of two patches')
        axes.set_xlim(-1, 1)
        axes.set_ylim(0, 1.1 * max(np.quantile(block['starts'], 0.99), max(block['images'])))
    row[0].set_ylabel('density')
    row[0].legend()
    return figure


@styled
def game_curve(history: Sequence[dict], plain: float | None = None):
    """The discrepancy over the updates of the game, the images' turns shaded, and looks at held-back images.

    Args:
        history (Sequence[dict]): Of :class:`DataFreeLoop`.
        plain (float, optional): Discrepancy on the held-back images before the game: their reference.
    """
    updates = [update for update in history if update['stage'] == 'game']
    if not updates:
        return None
    figure, (axes, ) = new_figure()
    start = None
    for update, following in zip(updates, [*updates[1:], dict(turn=None)]):
        if update['turn'] == 'images' and start is None:
            start = update['index'] + 0.5
        if start is not None and following['turn'] != 'images':
            axes.axvspan(start, update['index'] + 1.5, color=ORANGE, alpha=0.25, linewidth=0)
            start = None
    axes.plot([], [], color=ORANGE, alpha=0.4, linewidth=6, label="the images' turn")
    axes.plot([u['index'] + 1 for u in updates], [u['ratio'] for u in updates], color=BLUE, linewidth=0.9,
              label='on what is played with')
    looks = [(u['index'] + 1, u['holdout'] / plain) for u in updates if 'holdout' in u and plain]
    if looks:
        axes.plot(*zip(*looks), color=GREEN, marker='o', markersize=4, label='on held-back images')
    axes.axhline(1, color=INK, linewidth=0.8, linestyle='--')
    axes.set_xlabel('update of the game')
    axes.set_ylabel('discrepancy / before the game')
    axes.set_ylim(bottom=0)
    figure.legend(*axes.get_legend_handles_labels(), loc='outside upper right', ncols=3, fontsize=9)
    return figure


@styled
def block_errors(errors: dict):
    """Draw the error of each reconstructed block as calibrated and as learned, in the order of the model.

    Args:
        errors (dict): By name, both squared errors, relative to the power of the block's output.
    """
    if not errors:
        return None
    figure, (axes, ) = new_figure(8, 0.9 + 0.24 * len(errors))
    before, after = zip(*errors.values())
    places = range(len(errors))
    axes.hlines(places, after, before, color=GREY, linewidth=2)
    axes.plot(before, places, 'o', color=GREY, label='as calibrated')
    axes.plot(after, places, 'o', color=BLUE, label='learned')
    axes.set_yticks(places, errors, fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale('log')
    axes.set_xlabel('squared error of the output, relative')
    axes.legend(loc='best', fontsize=9)
    return figure


@styled
def layer_bars(layers: Sequence[dict], limit: int = 20):
    """SQNR of the layers with the lowest, a bar each, the worst on top."""
    if not layers:
        return None
    worst = sorted(layers, key=lambda layer: layer['sqnr'])[:limit]
    figure, (axes, ) = new_figure(8, 0.9 + 0.24 * len(worst))
    places = range(len(worst))
    colours = dict(product=ORANGE, convolution=GREEN, linear=BLUE)
    axes.barh(places, [layer['sqnr'] for layer in worst], color=[colours[layer['kind']] for layer in worst], height=0.7)
    axes.set_yticks(places, [layer['name'] for layer in worst], fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis='y', visible=False)
    axes.set_xlabel('SQNR of the output, dB')
    from matplotlib.patches import Patch
    kinds = dict.fromkeys(layer['kind'] for layer in worst)
    figure.legend(handles=[Patch(color=colours[kind], label=kind) for kind in kinds], loc='outside upper right',
                  fontsize=9, ncols=3)
    return figure


@styled
def range_bars(layers: Sequence[dict], part: str):
    """Ranges of one operand of all layers in their order: what is representable, and what was seen, on a symmetric
    logarithmic axis.

    Args:
        layers (Sequence[dict]): In order.
        part (str): 'weight', or anything else for activations.
    """
    rows = [(layer, operand) for layer in layers for key, operand in layer['operands'].items()
            if (key == 'weight') == (part == 'weight')]
    if not rows:
        return None
    figure, (axes, ) = new_figure(9, 2.8)
    places = np.arange(len(rows))
    low, high, seen_low, seen_high = (np.array([operand[key] for _, operand in rows])
                                      for key in ('low', 'high', 'seen_low', 'seen_high'))
    axes.vlines(places, seen_low, seen_high, color=ORANGE, linewidth=5, alpha=0.45, label='seen')
    axes.vlines(places, low, high, color=BLUE, linewidth=1.6, label='representable')
    axes.set_yscale('symlog', linthresh=max(1e-3, float(np.median(np.abs(high))) / 2))
    axes.set_xlabel('weights of the layers, input to output' if part == 'weight' else
                    'operands of layers and products, input to output')
    figure.legend(*axes.get_legend_handles_labels(), loc='outside upper right', fontsize=9, ncols=2)
    return figure


@styled
def sensitivity_bars(rows: Sequence[dict], bits: Sequence[int]):
    """What rounding one side of one layer costs, all layers in the order of the rows.

    Args:
        rows (Sequence[dict]): From :meth:`psaq_mm.engine.analysis.Analysis.rows`.
        bits (Sequence[int]): Bit-widths to draw.
    """
    figure, row = new_figure(10, 3.4, 2, sharey=True)
    for axes, side in zip(row, ('weight', 'activation')):
        for width, colour in zip(bits, (ORANGE, BLUE, GREEN, GREY, INK, FAINT, ORANGE)):
            points = [(i, r['errors'][str(width)][side]) for i, r in enumerate(rows) if side in r['errors'][str(width)]]
            axes.plot(*zip(*points), color=colour, marker='.', linestyle='', label=f'{width} bits')
        axes.set_yscale('log')
        axes.set_title(f'{side}s', fontsize=10)
        axes.set_xlabel('layers, the most sensitive first')
    row[0].set_ylabel('squared error of outputs / squares')
    row[1].legend()
    return figure
