"""Dense heads, region proposal networks among them."""
from __future__ import annotations

import torch
import torch.nn.functional as F

from .boxes import unscaled
from .operators import above, at_most, batched_nms, best, deform_conv2d
from .replace import number, replaces


@replaces('mmdet.models.utils.misc:filter_scores_and_topk')
def filter_scores_and_topk(scores, score_thr, topk, results=None):
    """``filter_scores_and_topk``: (scores, labels, indices, results) of the best pairs of place and class."""
    valid = above(scores, score_thr)
    places = valid.nonzero()
    scores = scores[valid]
    if isinstance(scores.shape[0], torch.Tensor):  # traced: TensorRT wants to know the largest number
        scores, order = best(scores, topk)
    else:  # of equal scores the library takes those that its sort puts first
        scores, order = scores.sort(descending=True)
        scores, order = (scores[:topk], order[:topk]) if topk > 0 else (scores, order)
    kept, labels = places[order].unbind(1)
    if isinstance(results, dict):
        results = {key: value[kept] for key, value in results.items()}
    elif isinstance(results, (list, tuple)):
        results = [value[kept] for value in results]
    elif results is not None:
        results = results[kept]
    return scores, labels, kept, results


@replaces('mmdet.models.dense_heads.rpn_head:RPNHead._predict_by_feat_single')
def proposals(self, cls_score_list, bbox_pred_list, score_factor_list, mlvl_priors, img_meta, cfg, rescale=False,
              with_nms=True):
    """``RPNHead._predict_by_feat_single``: of each level no more than ``nms_pre``, on images of every size."""
    from mmdet.structures.bbox import cat_boxes
    from mmengine.structures import InstanceData
    cfg = self.test_cfg if cfg is None else cfg
    found = []
    for level, (logits, deltas, priors) in enumerate(zip(cls_score_list, bbox_pred_list, mlvl_priors)):
        logits = logits.permute(1, 2, 0).reshape(-1, self.cls_out_channels)
        scores = logits[:, 0].sigmoid() if self.use_sigmoid_cls else logits.softmax(-1)[:, 0]
        scores, kept = best(scores, cfg.get('nms_pre', -1))
        deltas = deltas.permute(1, 2, 0).reshape(-1, self.bbox_coder.encode_size)[kept]
        found.append((priors[kept], deltas, scores, torch.full_like(kept, level)))
    priors, deltas, scores, levels = zip(*found)
    boxes = self.bbox_coder.decode(cat_boxes(priors), torch.cat(deltas), max_shape=img_meta['img_shape'])
    results = InstanceData(bboxes=boxes, scores=torch.cat(scores), level_ids=torch.cat(levels))
    return self._bbox_post_process(results, cfg=cfg, rescale=rescale, img_meta=img_meta)


@replaces('mmdet.models.dense_heads.cascade_rpn_head:StageCascadeRPNHead._predict_by_feat_single')
def proposals_of_stage(self, cls_scores, bbox_preds, mlvl_anchors, img_meta, cfg, rescale=False):
    """``StageCascadeRPNHead._predict_by_feat_single``: as other region proposal networks'."""
    return proposals(self, cls_scores, bbox_preds, None, mlvl_anchors, img_meta, cfg, rescale)


@replaces('mmdet.models.dense_heads.paa_head:PAAHead._predict_by_feat_single')
def candidates_for_voting(self, cls_score_list, bbox_pred_list, score_factor_list, mlvl_priors, img_meta, cfg=None,
                          rescale=False, with_nms=True):
    """``PAAHead._predict_by_feat_single``: of each level no more than ``nms_pre``, on images of every size."""
    from mmengine.structures import InstanceData
    cfg = self.test_cfg if cfg is None else cfg
    found = []
    for logits, deltas, factors, priors in zip(cls_score_list, bbox_pred_list, score_factor_list, mlvl_priors):
        scores = logits.permute(1, 2, 0).reshape(-1, self.cls_out_channels).sigmoid()
        factors = factors.permute(1, 2, 0).reshape(-1).sigmoid()
        kept = best((scores * factors[:, None]).sqrt().max(1)[0], cfg.get('nms_pre', -1))[1]
        boxes = self.bbox_coder.decode(priors[kept], deltas.permute(1, 2, 0).reshape(-1, 4)[kept],
                                       max_shape=img_meta['img_shape'])
        found.append((boxes, scores[kept], factors[kept]))
    boxes, scores, factors = map(torch.cat, zip(*found))
    results = InstanceData(bboxes=boxes, scores=scores, score_factors=factors)
    return self._bbox_post_process(results, cfg, rescale, with_nms, img_meta)


@replaces('mmdet.models.dense_heads.base_dense_head:BaseDenseHead._bbox_post_process',
          'mmdet.models.dense_heads.rpn_head:RPNHead._bbox_post_process',
          'mmdet.models.dense_heads.yolox_head:YOLOXHead._bbox_post_process')
def post_process(self, results, cfg, rescale=False, with_nms=True, img_meta=None):
    """``_bbox_post_process``: what is left of boxes behind score factors, small ones, suppression and the limit."""
    from mmdet.structures.bbox import get_box_tensor, get_box_wh
    if rescale:
        results.bboxes = unscaled(results.bboxes, img_meta)
    if 'score_factors' in results:
        results.scores = results.scores * results.pop('score_factors')
    if cfg.get('min_bbox_size', -1) >= 0:
        width, height = get_box_wh(results.bboxes)
        results = results[(width > cfg.min_bbox_size) & (height > cfg.min_bbox_size)]
    proposals = 'level_ids' in results  # of a region proposal network
    if with_nms:
        limit = cfg.get('max_per_img')  # YOLOX has none
        found, keep = batched_nms(get_box_tensor(results.bboxes), results.scores,
                                  results.level_ids if proposals else results.labels, at_most(cfg.nms, limit))
        results = results[keep]
        results.scores = found[:, -1]
        results = results[:limit]
    if proposals:
        results.labels = results.pop('level_ids') * 0
    return results


@replaces('mmdet.models.dense_heads.paa_head:PAAHead.score_voting')
def score_voting(self, det_bboxes, det_labels, mlvl_bboxes, mlvl_nms_scores, score_thr):
    """``PAAHead.score_voting``: each box the mean of those of its class that overlap it, by score; class by class."""
    from mmdet.structures.bbox import bbox_overlaps
    scores = mlvl_nms_scores.t()[det_labels]  # (boxes, candidates)
    overlaps = bbox_overlaps(det_bboxes[:, :4], mlvl_bboxes)
    weights = (-(1 - overlaps)**2 / 0.025).exp() * scores
    weights = weights * ((scores > score_thr) & (overlaps > 0.01)).to(weights.dtype)
    voted = weights @ mlvl_bboxes / weights.sum(1, keepdim=True)
    places = torch.arange(det_labels.shape[0])
    order = (det_labels * det_labels.shape[0] + places).sort()[1]  # of equal labels the first stays first
    return torch.cat([voted, det_bboxes[:, 4:]], 1)[order], det_labels[order]


@replaces('mmdet.models.dense_heads.tood_head:TOODHead.deform_sampling')
def deform_sampling(self, feat, offset):
    """``TOODHead.deform_sampling``: each channel at a place of its own."""
    channels = int(feat.shape[1])
    return deform_conv2d(feat, offset, torch.ones(channels, 1, 1, 1), groups=channels, deform_groups=channels)


def dynamic_convolutions(x, kernels, weights, biases):
    """Pointwise convolutions, rectified in between, with kernels that each instance has of its own.

    Args:
        x (Tensor): (N, C, places).
        kernels (Tensor): (N, numbers): weights of all layers, then biases.
        weights, biases (list[int]): How many numbers each layer has of them.

    Returns:
        Tensor: Of the last layer's first channel, (N, places).
    """
    parts = kernels.split([*weights, *biases], 1)
    for i, (weight, bias) in enumerate(zip(parts, parts[len(weights):])):
        weight = weight.reshape(kernels.shape[0], biases[i], weights[i] // biases[i])
        x = weight @ (x.relu() if i else x) + bias[:, :, None]
    return x[:, 0]


@replaces('mmdet.models.dense_heads.rtmdet_ins_head:RTMDetInsHead._mask_predict_by_feat_single')
def masks_of_kernels(self, mask_feat, kernels, priors):
    """``RTMDetInsHead``: logits (N, h, w) from mask features (C, h, w) and kernels of instances."""
    height, width = mask_feat.shape[1:]
    grid = self.prior_generator.single_level_grid_priors((height, width), level_idx=0, device=mask_feat.device)
    relative = (priors[:, None, :2] - grid).transpose(1, 2) / (priors[:, 2, None, None] * 8)
    features = mask_feat.flatten(1)[None].expand(priors.shape[0], -1, -1)
    found = dynamic_convolutions(torch.cat([relative, features], 1), kernels, self.weight_nums, self.bias_nums)
    return found.reshape(priors.shape[0], height, width)


def scaled(side, factor):
    """Return a side of a map times a factor, rounded up; both numbers or traced."""
    return (number(side, torch.empty(0, dtype=torch.float64)) * factor).ceil().to(torch.int64)


@replaces('mmdet.models.dense_heads.rtmdet_ins_head:RTMDetInsHead._bbox_mask_post_process')
def post_process_masks(self, results, mask_feat, cfg, rescale=False, with_nms=True, img_meta=None):
    """``RTMDetInsHead._bbox_mask_post_process``: boxes as other heads', and masks in pixels of the image."""
    results = post_process(self, results, cfg, rescale, with_nms, img_meta)
    logits = self._mask_predict_by_feat_single(mask_feat, results.kernels, results.priors)[:, None]
    logits = F.interpolate(logits, scale_factor=self.prior_generator.strides[0][0], mode='bilinear')
    if rescale:
        # The library multiplies the height by the factor of the width, too.
        size = [scaled(side, 1 / factor) for side, factor in zip(logits.shape[2:], img_meta['scale_factor'])]
        height, width = img_meta['ori_shape'][:2]
        logits = F.interpolate(logits, size=size, mode='bilinear', align_corners=False)[..., :height, :width]
    results.masks = logits[:, 0].sigmoid() > cfg.mask_thr_binary
    return results


@replaces('mmdet.models.dense_heads.condinst_head:CondInstMaskHead.forward_single')
def masks_of_parameters(self, mask_feat, positive_info):
    """``CondInstMaskHead``: logits (N, h, w) from mask features (C, h, w) and parameters of instances."""
    from mmdet.models.utils import aligned_bilinear, relative_coordinate_maps
    size, parameters = mask_feat.shape[1:], positive_info.param_preds
    count = parameters.shape[0]
    places = self.prior_generator.single_level_grid_priors(size, 0, device=mask_feat.device)
    relative = relative_coordinate_maps(places, positive_info.points, positive_info.strides, self.size_of_interest,
                                        size).reshape(count, 2, -1)
    features = mask_feat.flatten(1)[None].expand(count, -1, -1)
    found = dynamic_convolutions(torch.cat([relative, features], 1), parameters, self.weight_nums, self.bias_nums)
    found = found.reshape(count, 1, *size)
    return (aligned_bilinear(found, int(self.mask_feat_stride / self.mask_out_stride))[:, 0], )
