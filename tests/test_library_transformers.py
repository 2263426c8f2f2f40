"""What stands in for the libraries' functions around queries: the same numbers, graphs for every image."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.model import ImgDataPreprocessor
from torch import nn

from psaq_mm.deploy.library import Traced, masks, traceable_library, transformers
from psaq_mm.deploy.predictor import MaskClassificationPredictor, predictor_of, prompt_of, untraced
from psaq_mm.errors import UserError

from .graphs import adapted, runs, written

SIZES = [((64, 96), (64, 96)), ((64, 96), (50, 96)), ((96, 64), (65, 33)), ((40, 72), (40, 71))]  # padded, image


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def assert_close(found, expected):
    found, expected = list(found), list(expected)
    assert [tuple(value.shape) for value in found] == [tuple(value.shape) for value in expected]
    for value, other in zip(found, expected):
        np.testing.assert_allclose(np.asarray(value), np.asarray(other), rtol=1e-4, atol=1e-5)


def check(function, example, others, parts=()):
    """The library's answers, ours and those of the graph are the same, for the example and for other inputs."""
    graph = runs(function, example, parts=parts)
    for inputs in (example, *others):
        expected = function(*inputs)
        assert_close(adapted(function, *inputs), expected)
        for run in graph:
            assert_close(run(*inputs), expected)


def samples(padded, image):
    return [SimpleNamespace(batch_input_shape=padded, img_shape=image)]


@pytest.mark.parametrize('padded, image', SIZES)
@pytest.mark.parametrize('places', [(8, 12), (7, 9), (5, 4)])
def test_padding_of_a_map_is_that_of_resized_masks(padded, image, places):
    mask = torch.ones(1, 1, *padded)
    mask[:, :, :image[0], :image[1]] = 0
    expected = torch.nn.functional.interpolate(mask, places)[0].bool()
    found = transformers.padding_of(samples(padded, image), torch.zeros(1, 2, *places))
    assert found is None and not expected.any() if padded == image else torch.equal(found, expected)


def whole_numbers(encoder, decoder):
    """Tensors that a detector hands to encoder and decoder, in order of their names, masks as numbers."""
    return [part[key].float() for part in (encoder, decoder) for key in sorted(part) if part[key] is not None]


def detector(kind):
    from mmdet.models.layers import SinePositionalEncoding
    model = object.__new__(kind)
    nn.Module.__init__(model)
    model.positional_encoding = SinePositionalEncoding(num_feats=4, normalize=True)
    model.level_embed = nn.Parameter(torch.randn(2, 8))
    return model


@pytest.mark.parametrize('name', ['DETR', 'DeformableDETR'])
def test_sequences_of_maps_know_the_padding_of_each_image(name):
    from mmdet.models import detectors
    model = detector(getattr(detectors, name))

    def function(image, x, y):
        height, width = image.shape[2:]
        meta = samples(Traced((height + -height % 32, width + -width % 32)), Traced((height, width)))
        return whole_numbers(*model.pre_transformer([x, y], meta))

    inputs = [(torch.zeros(1, 3, *image), torch.randn(1, 8, *places), torch.randn(1, 8, places[0] // 2, 5))
              for image, places in (((64, 96), (8, 12)), ((50, 90), (8, 12)), ((33, 65), (6, 7)))]
    with traceable_library():  # unlike the library's, a trace always has a mask where there may be padding
        expected = [function(*values) for values in inputs[1:]]
    for values, answers in zip(inputs[1:], expected):
        assert_close(answers, function(*values))
    for run in runs(function, inputs[0], parts=[model]):
        for values, answers in zip(inputs[1:], expected):
            assert_close(run(*values), answers)


def test_a_map_that_is_never_padded_has_no_mask():
    from mmdet.models.detectors import DeformableDETR
    size = torch.tensor(64), torch.tensor(96)  # traced ones
    encoder, _ = transformers.maps_to_sequence(detector(DeformableDETR), [torch.randn(1, 8, 4, 6)] * 2,
                                               samples(Traced(size), Traced(size)))
    assert encoder['feat_mask'] is None and encoder['valid_ratios'].eq(1).all()


def test_deformable_attention_is_standard_operators():
    from mmcv.ops import MultiScaleDeformableAttention
    attention = MultiScaleDeformableAttention(embed_dims=16, num_heads=2, num_levels=2, num_points=2,
                                              batch_first=True).eval()
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.3)

    def function(query, x, y, points):
        shapes = torch.stack([torch._shape_as_tensor(value)[2:] for value in (x, y)])
        value = torch.cat([value.flatten(2).transpose(1, 2) for value in (x, y)], 1)
        return [attention(query, value=value, reference_points=points, spatial_shapes=shapes)]

    def inputs(queries, *sizes):
        return (torch.randn(1, queries, 16), *(torch.randn(1, 16, *size) for size in sizes),
                torch.rand(1, queries, 2, 2))

    check(function, inputs(5, (4, 6), (2, 3)), [inputs(7, (5, 3), (3, 2)), inputs(1, (1, 1), (6, 1))], [attention])


def detr_head(sigmoid, count=10):
    return SimpleNamespace(test_cfg=dict(max_per_img=count), num_classes=4,
                           loss_cls=SimpleNamespace(use_sigmoid=sigmoid))


@pytest.mark.parametrize('rescale', [True, False])
@pytest.mark.parametrize('sigmoid', [True, False])
def test_detections_of_queries(sigmoid, rescale):
    from mmdet.models.dense_heads import DETRHead

    def function(image, scores, boxes):
        height, width = image.shape[2:]
        meta = dict(img_shape=Traced((height, width)), scale_factor=Traced((width / 32, height / 48)))
        found = DETRHead._predict_by_feat_single(detr_head(sigmoid), scores, boxes, meta, rescale)
        return found.bboxes, found.scores, found.labels

    def inputs(height, width):
        return torch.zeros(1, 3, height, width), torch.randn(12, 4 if sigmoid else 5) * 3, torch.rand(12, 4)

    check(function, inputs(64, 96), [inputs(50, 41), inputs(96, 64)])


def test_as_many_detections_as_there_are():
    for sigmoid, count in ((True, 12), (False, 3)):
        found = transformers.detections_of_queries(detr_head(sigmoid, 100), torch.randn(3, 4 + (not sigmoid)),
                                                   torch.rand(3, 4), dict(img_shape=(9, 9)), False)
        assert len(found) == count and found.scores.diff().le(0).all()


def test_scores_of_classes_are_means_of_their_words():
    from mmdet.models.dense_heads.atss_vlfusion_head import convert_grounding_to_cls_scores as library
    logits, maps = torch.rand(2, 5, 9), [{1: [1, 2], 2: [4], 3: [5, 6, 8]}, {1: [1], 2: [2, 3], 3: [8]}]
    for words in (maps, maps[:1] * 2):
        assert_close([transformers.scores_of_words(logits, words)], [library(logits, words)])
    assert transformers.scores_of_words(logits[:1], [{1: [], 2: [3]}])[0, :, 0].eq(0).all()  # a word that was cut off


@pytest.mark.parametrize('words', [{1: [1, 2], 2: [4], 3: [5, 6]}, None])
def test_detections_of_words(words):
    from mmdet.models.dense_heads import GroundingDINOHead
    head = SimpleNamespace(test_cfg=dict(max_per_img=8))

    def function(image, scores, boxes):
        meta = dict(img_shape=Traced(image.shape[2:]), scale_factor=Traced((2.0, 2.0)))
        found = GroundingDINOHead._predict_by_feat_single(head, scores, boxes, words, meta, True)
        return found.bboxes, found.scores, found.labels

    def inputs(height, width):
        return torch.zeros(1, 3, height, width), torch.randn(12, 9) * 3, torch.rand(12, 4)

    check(function, inputs(64, 96), [inputs(50, 41)])


@pytest.mark.parametrize('kind', [torch.bool, torch.int64, None])
def test_image_and_text_attend_to_each_other(kind):
    from mmdet.models.utils.vlfuse_helper import SingleScaleBiAttentionBlock
    block = SingleScaleBiAttentionBlock(v_dim=8, l_dim=8, embed_dim=16, num_heads=2, init_values=1.0).eval()
    mask = kind and torch.tensor([[1, 1, 1, 0, 0]]).to(kind)

    def function(image, text):
        return block(image, text, attention_mask_l=mask)

    text = torch.randn(1, 5, 8)
    graph = runs(function, (torch.randn(1, 6, 8), text), parts=[block])
    for count in (6, 11, 1):
        image = torch.randn(1, count, 8)
        expected = function(image, text)
        assert_close(adapted(function, image, text), expected)
        for run in graph:
            assert_close(run(image, text), expected)


def distinct_decoder(threshold=0.5):
    from mmdet.models.layers.transformer.ddq_detr_layers import DDQTransformerDecoder
    decoder = object.__new__(DDQTransformerDecoder)
    nn.Module.__init__(decoder)
    decoder.cache_dict = dict(num_heads=2, cls_branches=nn.ModuleList([nn.Linear(8, 3)]), distinct_query_mask=[],
                              dqs_cfg=dict(type='nms', iou_threshold=threshold), dis_query_info=[0, 12])
    return decoder


@pytest.mark.parametrize('hidden', [(), (0, 3, 4)])
def test_queries_that_overlap_do_not_see_each_other(hidden):
    decoder = distinct_decoder()
    mask = torch.zeros(2, 12, 12, dtype=torch.bool)
    for query in hidden:
        mask[:, query, list(hidden)] = True

    def function(references, query):
        return [decoder.select_distinct_queries(references, query, mask, 0).int()]

    def inputs():
        centres = torch.rand(1, 12, 2)
        return torch.cat([centres, torch.full((1, 12, 2), 0.5)], -1), torch.randn(1, 12, 8)

    example, other = inputs(), inputs()
    assert not torch.equal(function(*example)[0], function(*other)[0])
    check(function, example, [other], parts=[decoder.cache_dict['cls_branches']])


@pytest.mark.parametrize('threshold', [0.8, 0.05])  # enough distinct proposals; too few
def test_distinct_proposals_become_queries(threshold):
    from mmdet.models.detectors import DDQDETR
    model = object.__new__(DDQDETR)
    nn.Module.__init__(model)
    model.num_queries, model.dense_topk_ratio = 12, 1.5
    model.decoder = nn.Module()
    model.decoder.num_layers = 0
    model.bbox_head = nn.Module()
    model.bbox_head.cls_branches, model.bbox_head.reg_branches = (
        nn.ModuleList([nn.Linear(8, count)]) for count in (3, 4))
    model.memory_trans_fc, model.memory_trans_norm, model.query_map = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)
    model.cache_dict = dict(dqs_cfg=dict(type='nms', iou_threshold=threshold))
    model.bbox_head.reg_branches[0].bias.data[2:] = 2.0  # large boxes overlap
    model.eval()

    def function(x):
        shapes = torch._shape_as_tensor(x)[2:][None]
        found, _ = model.pre_decoder(x.flatten(2).transpose(1, 2), None, shapes)
        return found['query'], found['reference_points']

    example = torch.randn(1, 8, 6, 7)
    assert bool((function(example)[0] == 0).all(-1).any()) == (threshold < 0.1)
    others = [(torch.randn(1, 8, *size), ) for size in ((5, 9), (9, 8))]
    check(function, (example, ), others, parts=[model])


def some_masks(count, height, width):
    found = torch.zeros(count, height, width, dtype=torch.bool)
    for mask in found:
        top, left = int(torch.randint(height, ())), int(torch.randint(width, ()))
        mask[top:top + 3, left:left + 4] = True
        mask[-1, left] = True
    return found


def test_boxes_around_masks():
    from mmdet.structures.mask import utils

    def function(numbers):
        return [utils.mask2bbox(numbers > 0)]

    empty = some_masks(3, 6, 9).float()
    empty[1] = 0
    check(function, (some_masks(4, 7, 8).float(), ),
          [(empty, ), (some_masks(1, 12, 3).float(), ), (torch.zeros(0, 4, 5), )])


def fusion_head(stuff=3, **test_cfg):
    from mmdet.models.seg_heads import MaskFormerFusionHead
    return MaskFormerFusionHead(num_things_classes=5 - stuff, num_stuff_classes=stuff, test_cfg=ConfigDict(test_cfg))


@pytest.mark.parametrize('stuff', [0, 3, 5])
def test_instances_of_queries(stuff):
    head = fusion_head(stuff, max_per_image=9)

    def function(classes, logits):
        found = head.instance_postprocess(classes, logits)
        order = found.scores.sort(descending=True)[1]
        return found.bboxes[order], found.scores[order], found.labels[order], found.masks[order].int()

    def inputs(height, width, queries=12):
        logits = torch.where(some_masks(queries, height, width), 1.0, -1.0) * torch.rand(queries, height, width)
        return torch.randn(queries, 6) * 2, logits

    check(function, inputs(7, 8), [inputs(12, 5), inputs(4, 9, 30)])


def segments(height, width, queries=10):
    """Classes and logits of queries, some of which cover what others want."""
    logits = torch.nn.functional.interpolate(torch.randn(queries, 1, 3, 3) * 6, (height, width), mode='bilinear')[:, 0]
    return torch.randn(queries, 6) * 4, logits


@pytest.mark.parametrize('least, share, filter_low_score', [
    (0.5, 0.3, True), (0.7, 0.8, False), (1.0, 0.8, True), (0.0, 0.0, False)])
def test_panoptic_maps_of_queries(least, share, filter_low_score):
    head = fusion_head(object_mask_thr=least, iou_thr=share, filter_low_score=filter_low_score)

    def function(classes, logits):
        return [head.panoptic_postprocess(classes, logits).sem_seg]

    inputs = [segments(*size) for size in ((16, 16), (9, 20), (31, 12), (8, 8), (24, 24))]
    counts = [len(function(*values)[0].unique()) for values in inputs]
    assert max(counts) == 1 if least == 1 else max(counts) > 1
    check(function, inputs[0], inputs[1:])


def test_a_panoptic_map_of_one_query_and_of_none_in_the_example():
    head = fusion_head(object_mask_thr=0.5, iou_thr=0.5)

    def function(classes, logits):
        return [head.panoptic_postprocess(classes, logits).sem_seg]

    classes, logits = segments(8, 9, 4)
    nothing, one = torch.zeros(4, 6), torch.zeros(4, 6)
    nothing[:, 5] = one[1:, 5] = one[0, 0] = 9
    check(function, (nothing, logits), [(one, logits), (classes, logits)])


def test_what_a_language_model_makes_of_words_is_a_constant():
    language = nn.Linear(4, 4)

    def function(x):
        with untraced(language):
            return [x + language(torch.ones(1, 4))]

    import onnx
    graph = onnx.load_model_from_string(written(function, (torch.zeros(3, 4), ), parts=[language])).graph
    assert {node.op_type for node in graph.node} <= {'Add', 'Constant'} and 'forward' not in vars(language)
    check(function, (torch.zeros(3, 4), ), [(torch.randn(5, 4), )], [language])


def prompt_config(**dataset):
    step = dict(type='PackDetInputs', meta_keys=('text', 'caption_prompt'))
    return Config(dict(test_dataloader=dict(dataset=dict(type='CocoDataset', pipeline=[step], **dataset))))


def test_the_prompt_is_the_names_of_the_classes():
    names = dict(classes=('cat', 'dog'))
    assert prompt_of(prompt_config(metainfo=names)) == dict(text=('cat', 'dog'), custom_entities=True)
    enhanced = dict(cat=dict(suffix=', a small one'))
    assert prompt_of(prompt_config(metainfo=names, caption_prompt=enhanced, return_classes=True)
                     )['caption_prompt'] == enhanced
    with pytest.raises(UserError, match='test_dataloader.dataset.metainfo'):
        prompt_of(Config(dict(test_dataloader=dict(dataset=dict(type='Unknown', pipeline=[])))))


def test_mask_classification_answers_what_the_config_asks_for():
    def predictor(**settings):
        model = nn.Module()
        model.data_preprocessor, model.panoptic_fusion_head = ImgDataPreprocessor(), fusion_head(**settings)
        model.backbone = nn.Conv2d(3, 4, 1)
        return MaskClassificationPredictor(model, Config(dict(model={})))

    assert predictor().names == ('panoptic_map', )
    assert predictor(panoptic_on=False, instance_on=True).names == ('boxes', 'scores', 'labels', 'masks')
    assert predictor(instance_on=True).names == ('panoptic_map', 'boxes', 'scores', 'labels', 'masks')
    for settings, message in ((dict(semantic_on=True), 'semantic_on'), (dict(panoptic_on=False), 'instance_on')):
        with pytest.raises(UserError, match=message):
            predictor(**settings)


def test_models_of_videos_are_refused():
    from mmdet.models.mot import BaseMOTModel

    class Video(BaseMOTModel):

        def loss(self):
            pass

        def predict(self):
            pass

    with pytest.raises(UserError, match='Video: videos'):
        predictor_of(Video(), Config({}))


def test_panoptic_maps_of_two_stages_are_refused():
    from mmdet.models.detectors import PanopticFPN
    model = object.__new__(PanopticFPN)
    nn.Module.__init__(model)
    with pytest.raises(UserError, match='PanopticFPN: its panoptic maps'):
        predictor_of(model, Config({}))


def test_maps_of_an_image_are_copied_as_they_are():
    import copy
    model = SimpleNamespace(backbone=lambda x: [x], neck=None, with_neck=False)
    x = torch.zeros(1)
    assert copy.deepcopy(transformers.maps_of_image(model, x))[0] is x


def test_every_replacement_is_found():
    from psaq_mm.deploy.library.replace import REPLACEMENTS
    assert {function.__module__ for function in REPLACEMENTS.values()} >= {transformers.__name__, masks.__name__}
    with traceable_library():
        pass
