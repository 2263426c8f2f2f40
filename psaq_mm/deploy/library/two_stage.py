"""Second stages: what they read of the maps, and masks."""
from __future__ import annotations

import torch

from .boxes import clipped, unscaled
from .operators import above, at_most, batched_nms, outside
from .replace import replaces


@replaces('mmdet.models.roi_heads.roi_extractors.single_level_roi_extractor:SingleRoIExtractor.forward')
def extract(self, feats, rois, roi_scale_factor=None):
    """``SingleRoIExtractor``: each roi from the level of its size, (N, C, h, w).

    One that ends before it begins has no level, and zeros for features.
    """
    if len(feats) == 1:
        return self.roi_layers[0](feats[0], rois)
    rois = outside(rois, (rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2]) < 0)
    levels = self.map_roi_levels(rois, len(feats))
    if roi_scale_factor is not None:
        rois = self.roi_rescale(rois, roi_scale_factor)
    found, places = [], []
    for level, (layer, features) in enumerate(zip(self.roi_layers, feats)):
        places.append((levels == level).nonzero()[:, 0])
        found.append(layer(features, rois[places[-1]]))
    places = torch.cat(places)
    order = torch.zeros_like(places).scatter(0, places, torch.arange(places.shape[0]))  # without a sort
    return torch.cat(found)[order]


@replaces('mmdet.models.roi_heads.mask_heads.fcn_mask_head:FCNMaskHead._predict_by_feat_single')
def masks_of_boxes(self, mask_preds, bboxes, labels, img_meta, rcnn_test_cfg, rescale=False, activate_map=False):
    """``FCNMaskHead``: masks as they are before they are pasted, probabilities within each box, (N, h, w).

    Rescales the boxes in place, as the library's does.
    """
    masks = mask_preds if activate_map else mask_preds.sigmoid()
    if rescale:
        bboxes.copy_(unscaled(bboxes, img_meta))
    if self.class_agnostic:
        return masks[:, 0]
    return masks[torch.arange(masks.shape[0]), labels]


@replaces('mmdet.models.layers.bbox_nms:multiclass_nms')
def multiclass_nms(multi_bboxes, multi_scores, score_thr, nms_cfg, max_num=-1, score_factors=None, return_inds=False,
                   box_dim=4):
    """``multiclass_nms``: boxes with scores (K, 5) and labels (K, ), best first; with ``return_inds`` their indices."""
    scores = multi_scores[:, :-1]
    classes = scores.shape[1]
    boxes = multi_bboxes.reshape(-1, multi_bboxes.shape[1] // box_dim, box_dim).expand(-1, classes, box_dim)
    places = above(scores, score_thr).nonzero()
    rows, labels = places.unbind(1)
    boxes, kept = boxes[rows, labels], scores[rows, labels]
    if score_factors is not None:
        kept = kept * score_factors[rows]
    found, keep = batched_nms(boxes, kept, labels, at_most(nms_cfg, max_num))
    if max_num > 0:
        found, keep = found[:max_num], keep[:max_num]
    if return_inds:
        return found, labels[keep], (rows * classes + labels)[keep]
    return found, labels[keep]


@replaces('mmdet.models.roi_heads.bbox_heads.bbox_head:BBoxHead._predict_by_feat_single')
def boxes_of_rois(self, roi, cls_score, bbox_pred, img_meta, rescale=False, rcnn_test_cfg=None):
    """``BBoxHead``: detections of one image from rois (N, 5), of which there may be none."""
    from mmdet.structures.bbox import get_box_tensor
    from mmengine.structures import InstanceData
    scores = self.loss_cls.get_activation(cls_score) if self.custom_cls_channels else cls_score.softmax(-1)
    boxes, kinds = roi[:, 1:], 1
    if bbox_pred is None:  # as of Grid R-CNN
        boxes = clipped(boxes, img_meta['img_shape'])
    else:
        kinds = 1 if self.reg_class_agnostic else self.num_classes
        size = self.bbox_coder.encode_size
        rois = boxes[:, None].expand(-1, kinds, -1).reshape(roi.shape[0] * kinds, 4)
        deltas = bbox_pred.reshape(roi.shape[0] * kinds, size)
        boxes = get_box_tensor(self.bbox_coder.decode(rois, deltas, max_shape=img_meta['img_shape']))
    if rescale:
        boxes = unscaled(boxes, img_meta)
    boxes = boxes.reshape(roi.shape[0], kinds * 4)
    if rcnn_test_cfg is None:
        return InstanceData(bboxes=boxes, scores=scores)
    found, labels = multiclass_nms(boxes, scores, rcnn_test_cfg.score_thr, rcnn_test_cfg.nms,
                                   rcnn_test_cfg.max_per_img)
    return InstanceData(bboxes=found[:, :4], scores=found[:, 4], labels=labels)


@replaces('mmdet.models.roi_heads.mask_scoring_roi_head:MaskScoringRoIHead.predict_mask')
def predict_scored_masks(self, x, batch_img_metas, results_list, rescale=False):
    """``MaskScoringRoIHead.predict_mask``: masks, and scores times how well each mask may fit."""
    from mmdet.structures.bbox import bbox2roi
    results, = results_list
    found = self._mask_forward(x, bbox2roi([results.bboxes]))
    masks, labels = found['mask_preds'], results.labels
    places = torch.arange(labels.shape[0])
    fit = self.mask_iou_head(found['mask_feats'], masks[places, labels])[places, labels]
    results_list = self.mask_head.predict_by_feat((masks, ), results_list, batch_img_metas, self.test_cfg, rescale)
    results_list[0].scores = results.scores * fit
    return results_list
