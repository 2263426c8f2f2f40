"""Mask classification (MaskFormer, Mask2Former): instances and panoptic maps from masks of queries."""
from __future__ import annotations

import torch

from .operators import best
from .replace import replaces


@replaces('mmdet.structures.mask.utils:mask2bbox')
def mask2bbox(masks):
    """``mask2bbox``: the smallest boxes (N, 4) around masks (N, H, W); zeros where a mask is empty."""
    numbers = masks.to(torch.float32)
    ends = []
    for axis in (1, 2):
        places = torch.arange(masks.shape[3 - axis], dtype=torch.float32, device=masks.device)
        inside = numbers.amax(axis) > 0
        last = torch.where(inside, places + 1, 0.0).amax(1)
        first = torch.where(inside, places, last[:, None]).amin(1)
        ends.append((first, last))
    (left, right), (top, bottom) = ends
    return torch.stack([left, top, right, bottom], 1)


@replaces('mmdet.models.seg_heads.panoptic_fusion_heads.maskformer_fusion_head:'
          'MaskFormerFusionHead.instance_postprocess')
def instances_of_queries(self, mask_cls, mask_pred):
    """``instance_postprocess``: of all pairs of query and class the best, those of things."""
    from mmengine.structures import InstanceData
    scores = mask_cls.softmax(-1)[:, :-1]
    scores, places = best(scores.reshape(-1), self.test_cfg.get('max_per_image', 100))
    queries, labels = places // self.num_classes, places % self.num_classes
    if self.num_things_classes < self.num_classes:
        things = labels < self.num_things_classes
        scores, queries, labels = scores[things], queries[things], labels[things]
    logits = mask_pred[queries]
    masks = logits > 0
    weights = masks.to(torch.float32)
    scores = scores * (logits.sigmoid() * weights).sum((1, 2)) / (weights.sum((1, 2)) + 1e-6)
    return InstanceData(bboxes=mask2bbox(masks), labels=labels, scores=scores, masks=masks)


@replaces('mmdet.models.seg_heads.panoptic_fusion_heads.maskformer_fusion_head:'
          'MaskFormerFusionHead.panoptic_postprocess')
def panoptic_map_of_queries(self, mask_cls, mask_pred):
    """``panoptic_postprocess``: each place belongs to its most probable query, unless too little of that one is left.

    Behind the queries stands one that wins nowhere, for there may be none.
    """
    from mmdet.evaluation.functional import INSTANCE_OFFSET
    from mmengine.structures import PixelData
    scores, labels = mask_cls.softmax(-1).max(-1)
    kept = ((labels != self.num_classes) & (scores > self.test_cfg.get('object_mask_thr', 0.8))).nonzero()[:, 0]
    rows = torch.cat([kept, kept.new_zeros(1)])
    scores, labels = torch.cat([scores[kept], scores.new_full((1, ), -1)]), labels[rows]
    masks = mask_pred[rows].sigmoid()
    winners = (scores[:, None, None] * masks).argmax(0)
    queries = torch.arange(rows.shape[0], device=rows.device)
    inside = masks >= 0.5
    own = (winners == queries[:, None, None]).to(torch.float32).sum((1, 2))
    whole = inside.to(torch.float32).sum((1, 2))
    valid = (own > 0) & (whole > 0) & (own / whole >= self.test_cfg.get('iou_thr', 0.8)) & (scores > 0)
    things = (valid & (labels < self.num_things_classes)).to(labels.dtype)
    numbers = labels + things * things.cumsum(0) * INSTANCE_OFFSET
    found = torch.where(valid, numbers, self.num_classes)[winners]
    if self.test_cfg.get('filter_low_score', False):
        found = torch.where(inside.gather(0, winners[None])[0], found, self.num_classes)
    return PixelData(sem_seg=found[None].to(torch.int32))
