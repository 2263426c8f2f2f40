"""Boxes from what heads put out."""
from __future__ import annotations

import torch
from torch import Tensor

from .replace import number, replaces


def clipped(boxes: Tensor, shape, less: int = 0) -> Tensor:
    """Clip boxes to an image.

    Args:
        boxes (Tensor): (..., 4).
        shape (tuple): (H, W, ...), numbers or traced.
        less (int): How far inside the image's end a box ends. Defaults to 0.
    """
    height, width = (number(side, boxes) - less for side in shape[:2])
    return torch.minimum(boxes.clamp(min=0), torch.stack([width, height, width, height]))


def _decoded(rois, deltas, means, stds, wh_ratio_clip, add_ctr_clamp, ctr_clamp, pixel):
    """Boxes (N, classes * 4) from deltas of that shape, and rois (N, 4) whose sides are a pixel longer or not."""
    count = deltas.shape[1] // 4
    deltas = deltas.reshape(-1, 4) * deltas.new_tensor(stds) + deltas.new_tensor(means)
    rois = rois[:, None].expand(-1, count, 4).reshape(-1, 4)
    centre, sides = (rois[:, :2] + rois[:, 2:] - pixel) * 0.5, rois[:, 2:] - rois[:, :2]
    shift, growth = sides * deltas[:, :2], deltas[:, 2:]
    limit = abs(float(torch.tensor(wh_ratio_clip, dtype=torch.float64).log()))
    if add_ctr_clamp:
        shift, growth = shift.clamp(-ctr_clamp, ctr_clamp), growth.clamp(max=limit)
    else:
        growth = growth.clamp(-limit, limit)
    centre, half = centre + shift, (sides * growth.exp() - pixel) * 0.5
    return torch.cat([centre - half, centre + half], -1)


@replaces('mmdet.models.task_modules.coders.delta_xywh_bbox_coder:delta2bbox')
def delta2bbox(rois, deltas, means=(0., ) * 4, stds=(1., ) * 4, max_shape=None, wh_ratio_clip=16 / 1000,
               clip_border=True, add_ctr_clamp=False, ctr_clamp=32):
    """``delta2bbox``: boxes (N, classes * 4) from rois (N, 4)."""
    boxes = _decoded(rois, deltas, means, stds, wh_ratio_clip, add_ctr_clamp, ctr_clamp, 0)
    if clip_border and max_shape is not None:
        boxes = clipped(boxes, max_shape)
    return boxes.reshape(-1, deltas.shape[1] // 4 * 4)


@replaces('mmdet.models.task_modules.coders.delta_xywh_bbox_coder:delta2bbox_glip')
def delta2bbox_glip(rois, deltas, means=(0., ) * 4, stds=(1., ) * 4, max_shape=None, wh_ratio_clip=16 / 1000,
                    clip_border=True, add_ctr_clamp=False, ctr_clamp=32):
    """``delta2bbox_glip``, whose boxes end at their last pixel."""
    boxes = _decoded(rois, deltas, means, stds, wh_ratio_clip, add_ctr_clamp, ctr_clamp, 1)
    if clip_border and max_shape is not None:
        boxes = clipped(boxes, max_shape, 1)
    return boxes.reshape(-1, deltas.shape[1] // 4 * 4)


@replaces('mmdet.structures.bbox.transforms:distance2bbox')
def distance2bbox(points, distance, max_shape=None):
    """``distance2bbox``: boxes (..., 4) from points (..., 2) and distances to left, top, right and bottom."""
    boxes = torch.cat([points[..., :2] - distance[..., :2], points[..., :2] + distance[..., 2:]], -1)
    return boxes if max_shape is None else clipped(boxes, max_shape)


@replaces('mmdet.structures.bbox.transforms:scale_boxes')
def scale_boxes(boxes, scale_factor):
    """``scale_boxes``: boxes (N, 4) times factors of width and height."""
    factors = torch.stack([number(factor, boxes) for factor in scale_factor])
    return boxes * factors.repeat(boxes.size(-1) // 2)


def unscaled(boxes: Tensor, img_meta: dict) -> Tensor:
    """Return boxes (N, 4) in pixels of the image as it was before it was resized."""
    return scale_boxes(boxes, [1 / factor for factor in img_meta['scale_factor']])
