"""Dense heads, region proposal networks among them."""
from __future__ import annotations

from .boxes import scale_boxes
from .operators import above, batched_nms
from .replace import replaces


@replaces('mmdet.models.utils.misc:filter_scores_and_topk')
def filter_scores_and_topk(scores, score_thr, topk, results=None):
    """``filter_scores_and_topk``: (scores, labels, indices, results) of the best pairs of place and class."""
    valid = above(scores, score_thr)
    places = valid.nonzero()
    scores, order = scores[valid].sort(descending=True)
    if topk > 0:
        scores, order = scores[:topk], order[:topk]
    kept, labels = places[order].unbind(1)
    if isinstance(results, dict):
        results = {key: value[kept] for key, value in results.items()}
    elif isinstance(results, (list, tuple)):
        results = [value[kept] for value in results]
    elif results is not None:
        results = results[kept]
    return scores, labels, kept, results


@replaces('mmdet.models.dense_heads.base_dense_head:BaseDenseHead._bbox_post_process',
          'mmdet.models.dense_heads.rpn_head:RPNHead._bbox_post_process')
def post_process(self, results, cfg, rescale=False, with_nms=True, img_meta=None):
    """``_bbox_post_process``: what is left of boxes behind score factors, small ones, suppression and the limit."""
    from mmdet.structures.bbox import get_box_tensor, get_box_wh
    if rescale:
        results.bboxes = scale_boxes(results.bboxes, [1 / factor for factor in img_meta['scale_factor']])
    if 'score_factors' in results:
        results.scores = results.scores * results.pop('score_factors')
    if cfg.get('min_bbox_size', -1) >= 0:
        width, height = get_box_wh(results.bboxes)
        results = results[(width > cfg.min_bbox_size) & (height > cfg.min_bbox_size)]
    proposals = 'level_ids' in results  # of a region proposal network
    if with_nms:
        settings = cfg.nms and dict(cfg.nms)
        if settings and settings.get('type', 'nms') == 'nms' and cfg.max_per_img > 0:
            settings.setdefault('max_num', cfg.max_per_img)  # no more than these are looked at
        found, keep = batched_nms(get_box_tensor(results.bboxes), results.scores,
                                  results.level_ids if proposals else results.labels, settings)
        results = results[keep]
        results.scores = found[:, -1]
        results = results[:cfg.max_per_img]
    if proposals:
        results.labels = results.pop('level_ids') * 0
    return results
