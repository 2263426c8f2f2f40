"""What ``model.json`` holds for other machines: an image, and what the quantized model answers to it.

Kernels differ between processors and between versions of a runtime. ``session.py`` beside a graph holds what a runtime
computes against this check where nobody has measured it.
"""
from __future__ import annotations

import base64
import importlib
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..quantization import Mode, quantizer_mode
from .agreement import disturbed
from .answers import OBJECTS
from .predictor import Predictor
from .session import agreement, host, runner, unpacked
from .whole import GOOD, MARGIN, SPREAD, as_traced, enlarged, expected

SIDES = 64, 96, 128  # the shorter side of images to check a graph for any size with
LARGEST = 128  # pixels of the longer side of what a check holds; larger images repeat them
SUREST = 20  # objects that a check holds
LEAST = 0.3  # what a check must demand, or it would tell nothing
ABOUT = ('content is a .npz file in base64: an image, to be repeated up to size, and the answers of the quantized '
         'model to it. A runtime computes the graph rightly where its own answers agree with them by at_least: '
         'agreement() in session.py says how that is counted, and python predict.py FILE --check does it. measured: '
         'on the machine of the export')
UNCHECKED = ('model.json holds no check for other processors and versions of the runtime: the model is not sure of its '
             'answers to the image that the graph was measured with')


class Check(NamedTuple):
    """What a graph can be checked with where the model is not at hand.

    Args:
        content (dict): As ``model.json`` holds it.
        answers (dict[str, list[int]]): Shapes of the answers by name.
    """
    content: dict
    answers: dict[str, list[int]]


def check_of(predictor: Predictor, graph: Path, image: Tensor, sizes: list[tuple[int, int]], runtimes: list[str],
             card: dict) -> Check | None:
    """Return a check at the first size that is good for one, or None.

    Args:
        predictor (Predictor): Of the model, in float or quantized.
        graph (Path): The file.
        image (Tensor): (1, H, W, C) uint8.
        sizes (list[tuple[int, int]]): (H, W) of images.
        runtimes (list[str]): That compute the graph rightly.
        card (dict): With ``mask_threshold``, if there are masks.
    """
    runs = {name: runner(Path(graph), name, dict(runtimes=[name], check=None)) for name in runtimes}
    found = (_check(predictor, image, size, runs, card) for size in sizes)
    return next(filter(None, found), None)


@torch.no_grad()
def _check(predictor, image, size, runs, card):
    """A check at one size; None where the model does not take that, or is not sure of its answers."""
    scale = min(1, LARGEST / max(size))
    image = enlarged(image, [max(round(side * scale), 1) for side in size])[0].numpy()
    check = dict(about=ABOUT, size=list(size), content=packed(dict(image=image)))
    images = unpacked(check)[1]

    def answers():
        return dict(zip(predictor.names, expected(predictor, torch.from_numpy(images)).answers))

    try:
        with as_traced(predictor):
            quantized = answers()
            with quantizer_mode(predictor.model, Mode.FLOAT):
                full = answers()
            with disturbed(predictor.model):
                other = answers()
        computed = {name: run(images) for name, run in runs.items()}
    except Exception:  # the model's own or the runtime's, at a size that it does not take
        return None
    aims = held(quantized, predictor.mask_form, card)
    if 'boxes' in aims and not aims['scores'].sum() > 0:
        return None
    measured = {name: dict(host=host(importlib.import_module(name)), agreement=round(agreement(aims, found, card), 3))
                for name, found in computed.items()}
    least = min(min(GOOD, agreement(aims, full, card)) - MARGIN, min(GOOD, agreement(aims, other, card)) - SPREAD,
                *(item['agreement'] - SPREAD for item in measured.values()))
    if least < LEAST:
        return None
    check.update(content=packed(dict(aims, image=image)), at_least=round(least, 3), measured=measured)
    return Check(check, {name: list(value.shape) for name, value in quantized.items()})


def held(answers: dict[str, np.ndarray], mask_form: str | None, card: dict) -> dict[str, np.ndarray]:
    """Return what a check holds of answers: the surest objects, no more than LARGEST rows and columns, small numbers.

    Args:
        answers (dict[str, np.ndarray]): (1, ...) each, by name.
        mask_form (str, optional): As of a predictor.
        card (dict): With ``mask_threshold``, if there are masks.
    """
    found = {name: value[0] for name, value in answers.items()}
    if 'boxes' in found:
        surest = np.argsort(-found['scores'], kind='stable')[:SUREST]
        found.update({name: found[name][surest] for name in OBJECTS if name in found})
    if 'masks' in found:
        found['masks'] = found['masks'] >= card['mask_threshold']
    for name in {'label_map', 'panoptic_map', 'depth', *(('masks', ) if mask_form == 'image' else ())} & set(found):
        value = found[name]
        size = [min(side, LARGEST) for side in value.shape[-2:]]
        rows, columns = (np.arange(new) * old // new for new, old in zip(size, value.shape[-2:]))
        found[name] = value[..., rows, :][..., columns]
    return {name: value.astype(np.float16) if name in ('depth', 'probabilities') else value
            for name, value in found.items()}


def check_sizes(image: Tensor, any_size: bool, measured: list[dict]) -> list[tuple[int, int]]:
    """Return sizes to check a graph at, the best first: small ones of the image's form, then those that were measured.

    Args:
        image (Tensor): (1, H, W, C).
        any_size (bool): Whether the graph takes images of any size.
        measured (list[dict]): With the ``size`` of each image that was measured.
    """
    height, width = image.shape[1:3]
    short = min(height, width)
    small = [(round(side * height / short), round(side * width / short)) for side in SIDES if any_size and side < short]
    return small + sorted((tuple(item['size']) for item in measured), key=np.prod)


def packed(arrays: dict[str, np.ndarray]) -> str:
    """Return arrays as a .npz file in base64."""
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return base64.b64encode(stream.getvalue()).decode()
