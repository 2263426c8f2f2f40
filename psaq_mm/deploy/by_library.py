"""What the library itself answers to an image: the config's pipeline, the data preprocessor, the model's test step."""
from __future__ import annotations

import numpy as np
import torch
from mmengine.dataset import Compose, pseudo_collate
from torch import Tensor

from ..classification import Classifier
from ..engine.config import default_scope
from .pixels import LOADERS, is_for_annotations, kind_of, pipeline_of
from .predictor import Predictor


@torch.no_grad()
def library_answers(predictor: Predictor, image: Tensor) -> list[np.ndarray]:
    """Return the answers to an image as an evaluation computes them, behind its decoding.

    Args:
        predictor (Predictor): Of the model; it says what the answers are.
        image (Tensor): (1, H, W, C) uint8, three channels as RGB.

    Returns:
        list[np.ndarray]: As the predictor names them; masks in pixels of the image.
    """
    cfg, model = predictor.cfg, predictor.model
    default_scope(cfg)
    pixels, size = image[0].numpy(), tuple(image.shape[1:3])
    if pixels.shape[2] == 3:
        pixels = np.ascontiguousarray(pixels[..., ::-1])
    elif pixels.shape[2] == 1 and not isinstance(model, Classifier):
        pixels = pixels[..., 0]  # as a grey image is loaded
    steps = pipeline_of(cfg)
    for step in steps:
        if kind_of(step) in LOADERS and step.get('to_float32'):
            pixels = pixels.astype(np.float32)
    steps = [step for step in steps if kind_of(step) not in LOADERS and not is_for_annotations(step)]
    results = dict(img=pixels, img_shape=size, ori_shape=size, height=size[0], width=size[1], scale_factor=(1.0, 1.0),
                   img_path='', img_id=0, gt_label=0, reduce_zero_label=False, seg_fields=[], **predictor.prompt)
    data = Compose(steps or [dict(type=predictor.pack)])(results)
    sample, = model.test_step(pseudo_collate([data]))
    return [value.numpy() for value in predictor.of_sample(sample)]
