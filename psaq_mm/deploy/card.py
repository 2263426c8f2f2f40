"""``model.json``, what people and programs need to know of a whole model in one file, and the script that runs both."""
from __future__ import annotations

import inspect
import re
import shutil
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
from mmengine.config import Config
from mmengine.registry import DATASETS
from torch import Tensor

from ..engine.checkpoint import versions
from ..files import digest, write_json
from ..models import backbone_of
from ..quantization import QuantizedLinear, quantized_layers, quantizers
from .answers import OBJECTS
from .check import check_of, check_sizes
from .extras import need
from .pixels import loader_of, pipeline_of, test_dataset
from .predictor import Predictor, limits

CARD, SCRIPTS = 'model.json', ('predict.py', 'session.py')
PACKAGES = 'onnx', 'onnxruntime', 'openvino'  # whose versions a card names
UNNAMED = re.compile(r'dim_\d+$|^$')  # what the exporter calls lengths that have no name
ORDERS = {1: 'L', 3: 'RGB', 4: 'BGRA'}  # of channels; OpenCV and Pillow load four like that if nothing is to be changed
UPRIGHT = 'cv2', 'pillow'  # what turns images as their EXIF orientation says when it decodes them
MEANINGS = dict(
    boxes='x1, y1, x2, y2 in pixels of the image: x2 and y2 are where a box ends, pixel centres lie at + 0.5',
    scores='0 to 1, one a box',
    labels='index into classes, one a box',
    label_map='index into classes, one a pixel',
    panoptic_map='index into classes + 1000 * number of the instance, one a pixel; the index that '
    'nothing says is none of them',
    depth='metres, one a pixel',
    probabilities='0 to 1, one a class; they add up to 1')
MASKS = dict(
    box='probabilities in a grid of w columns and h rows that covers the box. A pixel of the image with its centre at '
        '(x + 0.5, y + 0.5) has the place ((x + 0.5 - x1) / (x2 - x1) * w - 0.5, (y + 0.5 - y1) / (y2 - y1) * h - 0.5) '
        'in it; interpolate bilinearly, with 0 around the grid; the pixel is in the mask where that is >= '
        'mask_threshold',
    image='one number a pixel of the image; the pixel is in the mask where it is >= mask_threshold')

BATCHES = 'one image', 'any number of images of one size'
FILLED = '; where an image has fewer objects than there are rows, the rest have label -1 and score 0'


def kind_of(names) -> str:
    """Name what a model does by the names of its answers."""
    kinds = dict(panoptic_map='panoptic', masks='instance segmentation', boxes='detection', label_map='segmentation',
                 depth='depth', probabilities='classification')
    return next(kind for name, kind in kinds.items() if name in names)


def ports(values, measured: list[dict]) -> list[dict]:
    """Return names, types and shapes of a graph's inputs or outputs; letters are lengths that vary.

    Args:
        values (Iterable[ValueInfoProto]): The inputs or outputs.
        measured (list[dict]): As of :func:`describe`. Tells lengths that the exporter did not know to be the same.
    """
    onnx = need('onnx')
    found = []
    for value in values:
        kind, seen = value.type.tensor_type, [item['answers'].get(value.name) or () for item in measured]
        shape = [axis.dim_value if axis.HasField('dim_value') else axis.dim_param for axis in kind.shape.dim]
        for place, length in enumerate(shape):
            if isinstance(length, str) and UNNAMED.search(length):
                lengths = {shape[place] for shape in seen}
                shape[place] = lengths.pop() if len(lengths) == 1 else None
        found.append(dict(name=value.name, shape=shape,
                          type=np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)).name))
    return found


def quantization_of(model) -> dict | None:
    """Return which parts of a model are quantized, and to how many bits; None of a model in float."""
    layers = quantized_layers(model)
    if not layers:
        return None

    def bits(weights):
        """How many quantizers have so many bits, by these."""
        found = Counter((q.quant_max - q.quant_min).bit_length() for name, q in quantizers(model).items()
                        if name.endswith('weight_quantizer') == weights)
        return {str(count): number for count, number in sorted(found.items())}

    return dict(parts=sorted({name.partition('.')[0] for name in layers}), layers=len(layers),
                linear_layers=sum(isinstance(layer, QuantizedLinear) for layer in layers.values()),
                bits_of_weights=bits(True), bits_of_activations=bits(False))


def reduces_zero_label(cfg: Config) -> bool:
    """Return whether label 0 of stored label maps is ignored in an evaluation, so that classes begin at 1."""
    dataset = test_dataset(cfg)
    kind = dataset.get('type')
    if isinstance(kind, str):
        with DATASETS.switch_scope_and_registry(None) as registry:
            kind = registry.get(kind)
    default = inspect.signature(kind).parameters.get('reduce_zero_label') if kind else None
    given = dataset.get('reduce_zero_label', default.default if default else False)
    return bool(given) or any(step.get('reduce_zero_label') for step in pipeline_of(cfg))


class Loading(NamedTuple):
    """What is left to do before a graph.

    Args:
        steps (list[str]): In words.
        upright (bool): Whether images are turned as they were held.
        unchanged (bool): Whether the library would keep more than 8 bits, so that there must not be more.
        channels (str | None): Their order, of 'RGBA' or 'L'. None: as in the training images.
    """
    steps: list[str]
    upright: bool
    unchanged: bool
    channels: str | None


def loading_of(cfg: Config, channels: int) -> Loading:
    """Return what is left to do before a graph that takes images of so many channels."""
    loader = loader_of(cfg)
    colour = loader.get('color_type', 'color')
    upright = loader.get('imdecode_backend', 'cv2') in UPRIGHT and colour in ('color', 'grayscale')
    stored = loader.get('imdecode_backend') == 'tifffile'
    letters = 'RGBA' if channels == 4 and stored else ORDERS.get(channels)
    orders = {1: 'one channel, grey', 3: 'three channels in the order R, G, B',
              4: f'four channels in the order {", ".join(letters or "")}, the last one opacity'}
    turning = 'turn it as its EXIF orientation says' if upright else 'leave it as it is stored, without turning it'
    order = orders.get(channels, f'{channels} channels in the order of the training images')
    return Loading(['decode the image to 8 bits a channel', turning, order], upright, colour == 'unchanged' or stored,
                   letters)


def describe(predictor: Predictor, cfg: Config, meta: dict, graph: Path, measured: list[dict], runtimes: list[str],
             example: Tensor) -> dict:
    """Return what ``model.json`` says.

    Args:
        predictor (Predictor): Of the model, in float or quantized.
        cfg (Config): Its config.
        meta (dict): Classes and palette, see ``engine.config.dataset_meta``.
        graph (Path): The file.
        measured (list[dict]): Of each size that was measured ``size``, (H, W), ``answers``, shapes by name, and what
            else is worth telling.
        runtimes (list[str]): Those that were found to compute the graph rightly.
        example (Tensor): An image to check with, (1, H, W, C) uint8, of a size that was measured.
    """
    onnx = need('onnx')
    model, pixels = predictor.model, predictor.pixels
    content = onnx.load(str(graph), load_external_data=False).graph
    image, = ports(content.input, measured)
    channels = image['shape'][-1]
    loading = loading_of(cfg, channels)
    normalised = [] if pixels.mean is None else [
        f'subtract {pixels.mean.flatten().tolist()}, divide by {pixels.std.flatten().tolist()}']
    card = dict(
        kind=kind_of(predictor.names), model=type(model).__name__, backbone=type(backbone_of(model)).__name__,
        file=Path(graph).name, sha256=digest(graph), runtimes=list(runtimes),
        input=dict(image, range=[0, 255], channels=loading.channels),
        outputs=[dict(port, **({'meaning': MEANINGS[port['name']]} if port['name'] in MEANINGS else {}))
                 for port in ports(content.output, measured)],
        outside=loading.steps, upright=loading.upright, unchanged=loading.unchanged,
        inside=[*pixels.done, *normalised, *padding_of(pixels), *windows_of(predictor), 'the network',
                'decoding of its answers'],
        sizes=dict(any=not isinstance(image['shape'][1], int), measured=measured),
        batch=BATCHES[isinstance(image['shape'][0], str)], **limits(model))
    if card['batch'] == BATCHES[True] and set(OBJECTS) & set(predictor.names):
        card['batch'] += FILLED
    if 'masks' in predictor.names:
        card.update(mask_form=predictor.mask_form, mask_meaning=MASKS[predictor.mask_form])
        if predictor.mask_form == 'image':
            card['mask_threshold'] = 0.5  # the graph has applied the model's own: masks are 0 or 1
        card.setdefault('mask_threshold', 0.5)
    if 'label_map' in predictor.names:
        card['reduce_zero_label'] = reduces_zero_label(cfg)
    if 'panoptic_map' in predictor.names:
        card['nothing'] = model.panoptic_fusion_head.num_classes
    check = check_of(predictor, graph, example, check_sizes(example, card['sizes']['any'], measured), runtimes, card)
    card['check'] = check and check.content
    if check and card['check']['size'] not in [list(item['size']) for item in measured]:
        card['sizes']['measured'] = [*measured, dict(size=card['check']['size'], answers=check.answers)]
    card['sizes']['at_least'] = min(min(item['size']) for item in card['sizes']['measured'])
    palette = meta.get('palette')
    return dict(card, classes=list(meta.get('classes') or ()) or None,
                palette=[list(map(int, colour)) for colour in palette] if isinstance(palette, (list, tuple)) else None,
                quantized=quantization_of(model),
                versions=dict(versions(), **{name: metadata.version(name) for name in PACKAGES if is_installed(name)}))


def padding_of(pixels) -> list[str]:
    """Return how a data preprocessor pads, in words."""
    if pixels.size:
        return [f'pad to at least {pixels.size[0]} x {pixels.size[1]}']
    return [f'pad to multiples of {pixels.size_divisor}'] if pixels.size_divisor > 1 else []


def windows_of(predictor) -> list[str]:
    """Return which windows slide over an image, in words."""
    if getattr(predictor, 'mode', 'whole') == 'whole':
        return []
    sizes = [' x '.join(map(str, predictor.model.test_cfg[key])) for key in ('crop_size', 'stride')]
    return [f'windows of {sizes[0]} in steps of {sizes[1]}, their values averaged']


def is_installed(name: str) -> bool:
    """Whether a package is there."""
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False


def deliver(card: dict, folder: Path) -> None:
    """Write ``model.json`` and the scripts that run it beside a graph."""
    write_json(card, Path(folder) / CARD)
    for name in SCRIPTS:
        shutil.copyfile(Path(__file__).with_name(name), Path(folder) / name)
