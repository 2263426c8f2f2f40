"""``report.html``: one file that needs nothing else, from ``page.html`` by Jinja2."""
from __future__ import annotations

import base64
import io
import re

import numpy as np
from PIL import Image

from ..quantization.analysis import CEILING
from .tables import METRICS, fidelity_of, metric_names, shown, title_of

SIDE = 256  # pixels that pictures in the page have at most
LOW_SQNR = 20.0  # dB below which a layer is worth a thought; noise is a tenth of the signal then. Our choice
CLIPPED = 0.01  # share of values outside a range that is worth a word; our choice
# From which value on the data-free fidelity is good, and below which bad: read off docs/report.md, our choice.
LIMITS = {'box AP': (80, 60), 'mask AP': (80, 60), 'mIoU': (75, 55), 'top-1 agreement': (80, 30)}
ADVISED = 5  # layers that get advice


def picture(pixels: np.ndarray) -> str:
    """A picture as a data address, no larger than the page shows it."""
    image = Image.fromarray(pixels)
    image.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    image.save(stream, 'JPEG', quality=90)
    return 'data:image/jpeg;base64,' + base64.b64encode(stream.getvalue()).decode()


def advice(layers: list[dict]) -> list[dict]:
    """What to try for the layers with the lowest SQNR.

    Args:
        layers (list[dict]): From :meth:`LayerError.to_dict`.

    Returns:
        list[dict]: ``name``, ``sqnr``, ``why`` in words, ``side``, and whether ``more`` bits may help; at most five,
        none where none is low.
    """
    found = []
    for layer in sorted(layers, key=lambda layer: layer['sqnr'])[:ADVISED]:
        if layer['sqnr'] >= LOW_SQNR or not layer['operands']:
            continue
        name, operand = min(layer['operands'].items(), key=lambda item: item[1]['sqnr'])
        side = 'weight' if name == 'weight' else 'activation'
        what = dict(weight='its weight', input='what comes in', a='its first operand', b='its second operand')[name]
        why = f"{what} has {operand['bits']} bits and {operand['sqnr']:.1f} dB"
        if operand['clipped'] > CLIPPED:
            why += f"; {100 * operand['clipped']:.1f} % of its values lie outside the range"
        found.append(dict(name=layer['name'], sqnr=layer['sqnr'], why=why, side=side, more=operand['bits'] < 8))
    return found


def stanza_of(found: list[dict]) -> str:
    """Advice as one stanza to copy: more bits where there are fewer than 8, otherwise float."""
    parts = []
    overrides = [f"    dict(pattern='{item['name']}', {item['side']}=dict(bits=8))," for item in found if item['more']]
    if overrides:
        parts.append('overrides=[\n' + '\n'.join(overrides) + '\n]')
    names = [item['name'] for item in found if not item['more']]
    if names:
        parts.append(f'keep_float={names}')
    return 'quantization = dict(' + ',\n'.join(parts) + ')'


def verdict(result: dict) -> tuple[str, str]:
    """A word of 'good', 'doubtful', 'bad' or 'unknown', and a sentence, from the data-free fidelity alone.

    See docs/report.md for what that is worth.
    """
    if fidelity_of(result) is None:
        return 'unknown', (result.get('fidelity') or {}).get('problem') or 'no data-free comparison was made'
    name, value = fidelity_of(result)
    good, bad = LIMITS[name]
    word = 'good' if value >= good else 'bad' if value < bad else 'doubtful'
    says = dict(good='the quantized model does nearly what full precision does',
                doubtful='the quantized model differs from full precision: look at the layers, or give it more bits',
                bad='the quantized model often does otherwise than full precision: not to be used unevaluated')[word]
    if result.get('method') == 'noise' and word == 'good':
        word, says = 'doubtful', 'but ranges calibrated on noise look better here than they are on real images'
    return word, f'{name} with full precision as the truth is {value:.1f} of 100: {says}.'


def scalars(result: dict) -> dict[str, float]:
    """The report's numbers for the Visualizer."""
    found = result.get('fidelity') or {}
    numbers = {f'fidelity/{name}': value for name, value in (found.get('predictions') or {}).items()}
    if 'cosine' in found:
        numbers['fidelity/cosine'] = found['cosine']
    for side in ('full_precision', 'quantized'):
        numbers.update((f'{side}/{key}', value) for key, value in (result.get(side) or {}).items())
    return numbers


def metric_rows(result: dict) -> list[list[str]]:
    """Name, full precision and quantized of the real metrics, where there are any."""
    full, quantized = result.get('full_precision') or {}, result.get('quantized') or {}
    names = metric_names([full, quantized])
    return [[title_of(name) + (', %' if name in METRICS else ''), shown(full, name), shown(quantized, name)]
            for name in names]


def marked(text: str):
    """Return plain text as HTML in which what stands between backticks is code."""
    from markupsafe import Markup, escape
    return Markup(re.sub('`([^`]*)`', r'<code>\1</code>', str(escape(text))))


def render(content: dict) -> str:
    """The page.

    Args:
        content (dict): ``result`` (what ``metrics.json`` holds), ``layers``, ``gallery`` (pairs of arrays), ``figures``
            (``<svg>`` elements by name), ``stages`` (lists of :class:`Plot` by title), ``stanza``, ``command``,
            ``config``, ``title``.

    Returns:
        str: HTML.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    environment = Environment(loader=PackageLoader('psaq_mm.report', ''), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)
    environment.filters['marked'] = marked
    pairs = [dict(start=None if pair['start'] is None else picture(pair['start']), image=picture(pair['image']))
             for pair in content['gallery']]
    layers = sorted(content['layers'], key=lambda layer: layer['sqnr'])
    word, sentence = verdict(content['result'])
    advised = advice(layers)
    return environment.get_template('page.html').render(
        dict(content, gallery=pairs, layers=layers, advice=advised, to_try=stanza_of(advised), verdict=word,
             sentence=sentence, metrics=metric_rows(content['result']), low=LOW_SQNR, ceiling=CEILING,
             learned=any('weight' in layer['operands'] and layer['operands']['weight']['sqnr'] >= CEILING
                         for layer in layers)))
