"""DETR-like detectors: what lies in the padding, proposals of an encoder, and boxes from queries."""
from __future__ import annotations

import torch
from torch import Tensor

from .boxes import clipped
from .replace import number, replaces


def _same(side, other) -> bool:
    """Whether two sides of images are equal at every size, not only at that of a trace."""
    return side is other or not isinstance(side, Tensor) and not isinstance(other, Tensor) and side == other


def padding_of(samples, x: Tensor) -> Tensor | None:
    """Return which places of a map lie in the padding of images, (B, h, w), or None where no image is ever padded.

    Args:
        samples (list): Of data, one for each image, with ``img_shape`` and ``batch_input_shape``.
        x (Tensor): The map, (B, C, h, w). A place stands for the pixel that resizing by nearest neighbour takes.
    """
    if all(_same(*sides) for sample in samples for sides in zip(sample.batch_input_shape, sample.img_shape)):
        return None
    masks = []
    for sample in samples:
        rows, columns = (
            (torch.arange(places, dtype=torch.float32, device=x.device) * (number(whole, x) / places)).floor() >= inside
            for places, whole, inside in zip(x.shape[2:], sample.batch_input_shape, sample.img_shape))
        masks.append(rows[:, None] | columns)
    return torch.stack(masks)


def _sequence(x):
    """(B, C, h, w) to (B, h * w, C)."""
    return x.flatten(2).transpose(1, 2)


@replaces('mmdet.models.detectors.detr:DETR.pre_transformer')
def map_to_sequence(self, img_feats, batch_data_samples=None):
    """``DETR.pre_transformer``: what encoder and decoder read of the last map."""
    x = img_feats[-1]
    mask = padding_of(batch_data_samples, x)
    position = _sequence(self.positional_encoding(mask, input=x))
    mask = mask if mask is None else mask.flatten(1)
    return dict(feat=_sequence(x), feat_mask=mask, feat_pos=position), dict(memory_mask=mask, memory_pos=position)


@replaces('mmdet.models.detectors.deformable_detr:DeformableDETR.pre_transformer')
def maps_to_sequence(self, mlvl_feats, batch_data_samples=None):
    """``DeformableDETR.pre_transformer``: what encoder and decoder read of all maps, one behind the other."""
    masks = [padding_of(batch_data_samples, x) for x in mlvl_feats]
    positions = [_sequence(self.positional_encoding(mask, input=x)) + embedding
                 for mask, x, embedding in zip(masks, mlvl_feats, self.level_embed)]
    shapes = torch.stack([torch._shape_as_tensor(x)[2:] for x in mlvl_feats]).to(mlvl_feats[0].device)
    if masks[0] is None:
        mask, ratios = None, mlvl_feats[0].new_ones(mlvl_feats[0].shape[0], len(masks), 2)
    else:
        mask = torch.cat([mask.flatten(1) for mask in masks], 1)
        ratios = torch.stack([self.get_valid_ratio(mask) for mask in masks], 1)
    places = dict(spatial_shapes=shapes, valid_ratios=ratios,
                  level_start_index=torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]]))
    return (dict(feat=torch.cat([_sequence(x) for x in mlvl_feats], 1), feat_mask=mask, feat_pos=torch.cat(positions, 1),
                 **places), dict(memory_mask=mask, **places))


def best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest scores of (N, ) and their indices: so many, or all there are."""
    length = scores.shape[0]
    return scores.topk(torch.minimum(length, torch.tensor(count)) if isinstance(length, Tensor) else min(length, count))


def _boxes_of_queries(found, img_meta, rescale):
    """Boxes (N, 4) of an image in pixels, from centres and sides as shares of its own."""
    from mmdet.structures.bbox import bbox_cxcywh_to_xyxy
    height, width = (number(side, found) for side in img_meta['img_shape'][:2])
    boxes = clipped(bbox_cxcywh_to_xyxy(found) * torch.stack([width, height, width, height]), img_meta['img_shape'])
    if not rescale:
        return boxes
    return boxes / torch.stack([number(factor, boxes) for factor in img_meta['scale_factor']]).repeat(2)


def _answers(bboxes, scores, labels):
    from mmengine.structures import InstanceData
    return InstanceData(bboxes=bboxes, scores=scores, labels=labels)


@replaces('mmdet.models.dense_heads.detr_head:DETRHead._predict_by_feat_single')
def detections_of_queries(self, cls_score, bbox_pred, img_meta, rescale=True):
    """``DETRHead``: of all pairs of query and class the best; with a softmax each query's best class."""
    count = self.test_cfg.get('max_per_img', cls_score.shape[0])
    if self.loss_cls.use_sigmoid:
        scores, places = best(cls_score.sigmoid().reshape(-1), count)
        queries, labels = places // self.num_classes, places % self.num_classes
    else:
        scores, classes = cls_score.softmax(-1)[..., :-1].max(-1)
        scores, queries = best(scores, count)
        labels = classes[queries]
    return _answers(_boxes_of_queries(bbox_pred[queries], img_meta, rescale), scores, labels)
