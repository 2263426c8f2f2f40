"""DETR-like detectors: what lies in the padding, proposals of an encoder, and boxes from queries."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .boxes import clipped
from .operators import batched_nms, best
from .replace import Traced, number, replaces


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
    x = torch.cat([_sequence(x) for x in mlvl_feats], 1)
    return (dict(feat=x, feat_mask=mask, feat_pos=torch.cat(positions, 1), **places),
            dict(memory_mask=mask, **places))


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


def _distinct(boxes, scores, settings):
    """Indices of what suppression leaves of boxes (N, 4) as centres and sides, best first."""
    from mmdet.structures.bbox import bbox_cxcywh_to_xyxy
    return batched_nms(bbox_cxcywh_to_xyxy(boxes), scores, torch.ones_like(scores), settings)[1]


@replaces('mmdet.models.detectors.ddq_detr:DDQDETR.pre_decoder')
def distinct_proposals(self, memory, memory_mask, spatial_shapes, batch_data_samples=None):
    """``DDQDETR.pre_decoder``: the best proposals that do not overlap become queries; where there are too few, zeros
    fill up.
    """
    head, last = self.bbox_head, self.decoder.num_layers
    features, proposals = self.gen_encoder_output_proposals(memory, memory_mask, spatial_shapes)
    scores = head.cls_branches[last](features).max(-1)[0].sigmoid()
    places = head.reg_branches[last](features) + proposals
    self.cache_dict['dis_query_info'] = [0, self.num_queries]
    queries, references = [], []
    for image in range(int(memory.shape[0])):
        keep = _distinct(places[image].sigmoid(), scores[image], self.cache_dict['dqs_cfg'])[:self.num_queries]
        missing = 0, 0, 0, self.num_queries - keep.shape[0]
        queries.append(F.pad(self.query_map(memory[image])[keep], missing))
        references.append(F.pad(places[image][keep], missing))
    queries, references = (torch.stack(found).reshape(len(found), self.num_queries, found[0].shape[-1])
                           for found in (queries, references))
    return dict(query=queries, memory=memory, reference_points=references.sigmoid(), dn_mask=None), {}


@replaces('mmdet.models.layers.transformer.ddq_detr_layers:DDQTransformerDecoder.select_distinct_queries')
def mask_of_distinct_queries(self, reference_points, query, self_attn_mask, layer_index):
    """``select_distinct_queries``: which pairs of queries a layer hides from each other, those without a distinct one.

    Candidates are those that the first query sees.
    """
    scores = self.cache_dict['cls_branches'][layer_index](query).sigmoid().max(-1).values
    heads, masks = self.cache_dict['num_heads'], []
    for image in range(int(query.shape[0])):
        candidates = (~self_attn_mask[image * heads, 0]).nonzero()[:, 0]
        keep = candidates[_distinct(reference_points[image][candidates], scores[image][candidates],
                                    self.cache_dict['dqs_cfg'])]
        other = torch.ones_like(scores[image]).scatter(0, keep, torch.zeros_like(keep, dtype=scores.dtype)) > 0
        masks.append((other[:, None] & other)[None].expand(heads, -1, -1))
    mask = torch.cat(masks)
    self.cache_dict['distinct_query_mask'].append(~mask)
    return mask


@replaces('mmdet.models.utils.vlfuse_helper:BiAttentionBlock.single_attention_call')
def fuse(self, visual, lang, attention_mask_v=None, attention_mask_l=None):
    """``BiAttentionBlock``: image and text attend to each other.

    A mask of text must be of numbers, 0 where there is padding. The library turns each value of one of booleans into
    True, so that it hides nothing; so do we.
    """
    visual, lang = self.layer_norm_v(visual), self.layer_norm_l(lang)
    if attention_mask_l is not None:
        attention_mask_l = None if attention_mask_l.dtype == torch.bool else attention_mask_l.to(visual.dtype)
    of_visual, of_lang = self.attn(visual, lang, attention_mask_v, attention_mask_l)
    return visual + self.drop_path(self.gamma_v * of_visual), lang + self.drop_path(self.gamma_l * of_lang)


@replaces('mmdet.models.dense_heads.atss_vlfusion_head:convert_grounding_to_cls_scores')
def scores_of_words(logits, positive_maps):
    """``convert_grounding_to_cls_scores``: scores of classes (B, N, classes), each the mean of its words'.

    Args:
        logits (Tensor): (B, N, words).
        positive_maps (list[dict]): Of each image, words by class; classes count from 1.
    """
    classes, images = len(positive_maps[0]), []
    for scores, words in zip(logits, positive_maps):
        weights = torch.zeros(scores.shape[-1], classes, dtype=scores.dtype)
        for label, places in words.items():
            weights[places, label - 1] = 1 / max(len(places), 1)
        images.append(scores @ weights)
    return torch.stack(images)


@replaces('mmdet.models.dense_heads.grounding_dino_head:GroundingDINOHead._predict_by_feat_single')
def detections_of_words(self, cls_score, bbox_pred, token_positive_maps, img_meta, rescale=True):
    """``GroundingDINOHead``: of all pairs of query and class the best; each query's best word where there are no
    classes.
    """
    count, scores = self.test_cfg.get('max_per_img', cls_score.shape[0]), cls_score.sigmoid()
    if token_positive_maps is None:
        scores, queries = best(scores.max(-1)[0], count)
        labels = torch.zeros_like(queries)
    else:
        scores = scores_of_words(scores[None], [token_positive_maps])[0]
        classes = scores.shape[-1]
        scores, places = best(scores.reshape(-1), count)
        queries, labels = places // classes, places % classes
    return _answers(_boxes_of_queries(bbox_pred[queries], img_meta, rescale), scores, labels)


@replaces('mmdet.models.detectors.base_detr:DetectionTransformer.extract_feat')
def maps_of_image(self, batch_inputs):
    """``DetectionTransformer.extract_feat``, whose maps may be asked for copies: a copy would be a constant."""
    x = self.backbone(batch_inputs)
    return Traced(self.neck(x) if self.with_neck else x)
