"""What stands in for the libraries' functions behind a detector's maps: the same numbers, graphs for every image."""
import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from torch import nn

from psaq_mm.deploy.library import Traced, refuse, traceable_library
from psaq_mm.deploy.library.operators import above, best
from psaq_mm.deploy.library.refused import REFUSED
from psaq_mm.errors import UserError

from .graphs import adapted, runs, written

onnx = pytest.importorskip('onnx')

META = dict(img_shape=Traced((64, 96)), ori_shape=Traced((32, 48)), scale_factor=Traced((2., 2.)),
            batch_input_shape=Traced((64, 96)))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def assert_close(found, expected, tolerance=1e-4):
    found, expected = ([np.asarray(value) for value in (values if isinstance(values, (tuple, list)) else [values])]
                       for values in (found, expected))
    assert [value.shape for value in found] == [value.shape for value in expected]
    for value, other in zip(found, expected):
        np.testing.assert_allclose(value.astype(np.float64), other.astype(np.float64), tolerance, tolerance)


def boxes(count, low=0., high=90.):
    corners = low + torch.rand(count, 2) * (high - low)
    return torch.cat([corners, corners + 1 + torch.rand(count, 2) * 30], 1)


@pytest.mark.parametrize('stride, padding, dilation, groups, deform_groups, kernel', [
    (1, 1, 1, 1, 1, 3), (2, 1, 1, 1, 1, 3), (1, 2, 2, 2, 2, 3), (1, 0, 1, 8, 8, 1)])
def test_deformable_convolution(stride, padding, dilation, groups, deform_groups, kernel):
    from mmcv.ops.deform_conv import deform_conv2d
    from mmcv.ops.modulated_deform_conv import modulated_deform_conv2d
    weight = nn.Conv2d(8, 8, kernel, groups=groups).weight.detach()

    def inputs(height, width, batch=1):
        size = [(side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 for side in (height, width)]
        return (torch.randn(batch, 8, height, width), torch.randn(batch, deform_groups * 2 * kernel**2, *size) * 3,
                torch.rand(batch, deform_groups * kernel**2, *size))

    def masked(x, offset, mask):
        from mmcv.ops import modulated_deform_conv as library
        return library.modulated_deform_conv2d(x, offset, mask, weight, None, stride, padding, dilation, groups,
                                               deform_groups)

    x, offset, mask = inputs(11, 13, 2)
    wanted = modulated_deform_conv2d(x, offset, mask, weight, None, stride, padding, dilation, groups, deform_groups)
    assert_close(adapted(masked, x, offset, mask), wanted)
    for run in runs(masked, inputs(7, 9), [(0, 2, 3)] * 3):
        assert_close(run(x, offset, mask), [wanted])
    plain = deform_conv2d(x, offset, weight, stride, padding, dilation, groups, deform_groups)
    assert_close(adapted(masked, x, offset, None), plain)


def test_offsets_of_a_larger_map_are_read_as_mmcv_reads_them():
    from mmcv.ops import ModulatedDeformConv2d
    layer = ModulatedDeformConv2d(4, 4, 3, padding=1)
    x, offset, mask = torch.randn(1, 4, 4, 5), torch.randn(1, 18, 8, 10), torch.rand(1, 9, 8, 10)
    wanted = layer(x, offset, mask)
    assert_close(adapted(layer, x, offset, mask), wanted)
    example = torch.randn(1, 4, 3, 3), torch.randn(1, 18, 6, 6), torch.rand(1, 9, 6, 6)
    for run in runs(layer, example, [(2, 3)] * 3, [layer]):
        assert_close(run(x, offset, mask), [wanted])


def test_maps_smaller_than_a_deformable_kernel():
    from mmcv.ops import DeformConv2d
    layer = DeformConv2d(4, 4, 3, padding=1)
    x, offset = torch.randn(1, 4, 2, 2), torch.randn(1, 18, 2, 2)
    assert_close(adapted(layer, x, offset), layer(x, offset))


@pytest.mark.parametrize('name', ['DeltaXYWHBBoxCoder', 'DeltaXYWHBBoxCoderForGLIP', 'DistancePointBBoxCoder',
                                  'TBLRBBoxCoder'])
def test_coders_clip_to_the_image_they_are_given(name):
    from mmdet.registry import TASK_UTILS
    coder = TASK_UTILS.build(dict(type=name))

    def decode(priors, deltas, image):
        return coder.decode(priors[:, :2] if 'Point' in name else priors, deltas, max_shape=tuple(image.shape))

    def inputs(count, height, width):
        scale = 20 if 'Point' in name else 1
        return boxes(count), torch.randn(count, 4).abs() * scale, torch.zeros(height, width)

    inside = inputs(40, 50, 70)
    wanted = decode(*inside)
    assert wanted[:, 2].max() > 60
    assert_close(adapted(decode, *inside), wanted)
    for run in runs(decode, inputs(7, 30, 20), [(0, ), (0, ), (0, 1)]):
        for count in (40, 1, 0):
            some = *(value[:count] for value in inside[:2]), inside[2]
            assert_close(run(*some), [decode(*some)])


def test_a_dimension_of_one_goes_without_a_branch():
    def forms(x):
        one = x.shape[0] // x.shape[0]  # of which the exporter does not know how much it is
        longer = x.reshape(x.shape[0], one, one, x.shape[1])
        return torch.stack([longer.squeeze(1).squeeze(1), torch.squeeze(longer, dim=-2)[:, 0]])

    graph = onnx.load_model_from_string(written(forms, (torch.zeros(3, 2), )))
    assert not [node for node in graph.graph.node if node.op_type == 'If']
    for run in runs(forms, (torch.zeros(3, 2), )):
        assert_close(run(torch.ones(5, 4)), [torch.ones(2, 5, 4)])


def test_lists_of_traced_numbers_stay_traced():
    def scale(x):
        return x.new_tensor([x.shape[0], 2.]).repeat((1, 2))

    def sides(x):  # of an image, as EmbeddingRPN asks for them; and as integers
        height, width = x.shape
        sides = x.new_tensor([[width, height, width, 1]], dtype=torch.int64)
        return torch.cat([x.new_tensor([[width, height, width, height]]), sides // 2])

    for run in runs(scale, (torch.zeros(3, 2), ), [(0, )]):
        assert_close(run(torch.zeros(5, 2)), [torch.tensor([[5., 2., 5., 2.]])])
    for run in runs(sides, (torch.zeros(3, 2), )):
        assert_close(run(torch.zeros(5, 7)), [torch.tensor([[7., 5., 7., 5.], [3., 2., 3., 0.]])])
    assert_close(adapted(sides, torch.zeros(5, 7)), sides(torch.zeros(5, 7)))
    assert adapted(lambda x: x.new_tensor(x[0]), torch.ones(2, 2, dtype=torch.int64)).dtype == torch.int64


@pytest.mark.parametrize('rows', [30, 1, 0])
def test_the_best_scores_of_maps_of_other_sizes(rows):
    from mmdet.models.utils import misc

    def pick(scores, boxes):
        found, labels, kept, others = misc.filter_scores_and_topk(scores, 0.5, 6, dict(boxes=boxes))
        return found, labels, kept, others['boxes']

    inputs = torch.rand(rows, 3), torch.rand(rows, 4)
    wanted = pick(*inputs)
    assert_close(adapted(pick, *inputs), wanted)
    nothing = torch.rand(8, 3) * 0.4, torch.rand(8, 4)  # a trace whose example has no score above
    for run in runs(pick, nothing, [(0, )] * 2):
        assert_close(run(*inputs), wanted)


def test_no_more_than_so_many_whatever_the_example_had():
    for count in (4, 40):
        for run in runs(lambda x: best(x, 10), (torch.rand(count), ), [(0, )]):
            for length in (25, 10, 3):
                x = torch.rand(length)
                assert_close(run(x), x.topk(min(length, 10)))
    assert len(best(torch.rand(5), -1)[0]) == 5


def test_above_has_something_in_a_trace_only():
    assert not above(torch.tensor([0.1, 0.2]), 0.5).any()
    for run in runs(lambda x: above(x, 0.5), (torch.tensor([0.1, 0.2]), ), [(0, )]):
        assert_close(run(torch.tensor([0.1, 0.6, 0.5])), [torch.tensor([False, True, False])])


@pytest.mark.parametrize('agnostic', [False, True])
def test_suppression_of_classes(agnostic):
    from mmdet.models.layers import bbox_nms

    def suppress(regressed, scores):
        return bbox_nms.multiclass_nms(regressed, scores, 0.3, dict(type='nms', iou_threshold=0.5), 20)

    def inputs(count):
        regressed = boxes(count) if agnostic else torch.cat([boxes(count) for _ in range(3)], 1)
        return regressed, (torch.randn(count, 4) * 3).softmax(-1)

    graph = runs(suppress, (inputs(5)[0], torch.zeros(5, 4)), [(0, )] * 2)
    for count in (60, 1, 0):
        some = inputs(count)
        wanted = suppress(*some) if count else (torch.zeros(0, 5), torch.zeros(0))
        assert count < 2 or len(wanted[0]) == 20
        assert_close(adapted(suppress, *some), wanted)
        for run in graph:
            assert_close(run(*some), wanted)


@pytest.mark.parametrize('kind', ['soft_nms', 'nms_quadri'])
def test_other_suppressions_are_refused(kind):
    from mmcv.ops import batched_nms
    from mmdet.models.layers import bbox_nms
    with traceable_library(), pytest.raises(UserError, match=f"nms of type '{kind}'"):
        bbox_nms.multiclass_nms(boxes(3), torch.rand(3, 4), 0.1, dict(type=kind, iou_threshold=0.5))
    assert batched_nms.__module__ == 'mmcv.ops.nms'  # all is as it was


def test_voting():
    from mmdet.models.dense_heads import PAAHead
    head = PAAHead(4, 8, anchor_generator=dict(type='AnchorGenerator', ratios=[1.], octave_base_scale=8,
                                               scales_per_octave=1, strides=[8]))
    candidates = boxes(30, high=40.)
    scores = torch.cat([torch.rand(30, 4), torch.zeros(30, 1)], 1)
    labels = torch.tensor([3, 0, 3, 1])
    found = torch.cat([candidates[:4], scores[torch.arange(4), labels][:, None]], 1)
    arguments = found, labels, candidates, scores, 0.1
    wanted = head.score_voting(*arguments)
    assert not torch.allclose(wanted[0][:, :4].sort(0)[0], found[:, :4].sort(0)[0])
    assert_close(adapted(lambda: head.score_voting(*arguments)), wanted)


@pytest.fixture
def instances():
    """A head of RTMDet-Ins, and what it reads."""
    from mmdet.models.dense_heads import RTMDetInsHead
    head = RTMDetInsHead(3, 8, num_prototypes=4, dyconv_channels=4, test_cfg=ConfigDict(
        nms=dict(type='nms', iou_threshold=0.6), score_thr=0.05, max_per_img=10, mask_thr_binary=0.5, min_bbox_size=0),
        anchor_generator=dict(type='MlvlPointGenerator', offset=0, strides=[8]))

    def inputs(count, height=8, width=12):
        return (boxes(count, high=60), torch.rand(count), torch.randn(count, head.num_gen_params),
                torch.cat([boxes(count)[:, :2], torch.full((count, 2), 8.)], 1), torch.randn(4, height, width))

    return head, inputs


def test_masks_of_kernels(instances):
    head, inputs = instances

    def masks(boxes, scores, kernels, priors, features):
        return head._mask_predict_by_feat_single(features, kernels, priors)

    some = inputs(7)
    wanted = masks(*some)
    assert_close(adapted(masks, *some), wanted)
    graph = runs(masks, inputs(3, 5, 6), [(0, )] * 4 + [(1, 2)])
    for count in (7, 1, 0):
        some = inputs(count)
        for run in graph:
            assert_close(run(*some), [masks(*some)])


def test_boxes_with_masks_of_the_whole_image(instances):
    head, inputs = instances

    def predict(boxes, scores, kernels, priors, features, image=None):
        size = META['ori_shape'] if image is None else Traced(image.shape)
        meta = dict(META, ori_shape=size, scale_factor=Traced((2 * features.shape[2] * 4 / size[1], ) * 2))
        results = InstanceData(bboxes=boxes, scores=scores, kernels=kernels, priors=priors,
                               labels=(scores * 3).long())
        found = head._bbox_mask_post_process(results, features, head.test_cfg, True, True, meta)
        return found.bboxes, found.scores, found.labels, found.masks

    some = inputs(12)
    wanted = predict(*some, torch.zeros(32, 48))
    assert wanted[3].shape[1:] == (32, 48) and 0 < wanted[3].float().mean() < 1
    assert_close(adapted(predict, *some, torch.zeros(32, 48)), wanted)
    graph = runs(predict, (*inputs(5, 5, 6), torch.zeros(20, 24)), [(0, )] * 4 + [(1, 2), (0, 1)])
    for count in (12, 1, 0):
        some = *inputs(count), torch.zeros(32, 48)
        for run in graph:
            assert_close(run(*some), predict(*some))


@pytest.fixture
def second_stage():
    """A second stage with masks, and features and proposals for it."""
    from mmdet.registry import MODELS
    layer = dict(type='RoIAlign', sampling_ratio=0)
    head = MODELS.build(dict(
        type='StandardRoIHead',
        bbox_roi_extractor=dict(type='SingleRoIExtractor', roi_layer=dict(layer, output_size=3), out_channels=4,
                                featmap_strides=[4, 8], finest_scale=16),
        bbox_head=dict(type='Shared2FCBBoxHead', in_channels=4, fc_out_channels=8, roi_feat_size=3, num_classes=3,
                       bbox_coder=dict(type='DeltaXYWHBBoxCoder'), loss_cls=dict(type='CrossEntropyLoss')),
        mask_roi_extractor=dict(type='SingleRoIExtractor', roi_layer=dict(layer, output_size=4), out_channels=4,
                                featmap_strides=[4, 8], finest_scale=16),
        mask_head=dict(type='FCNMaskHead', num_convs=1, in_channels=4, conv_out_channels=4, num_classes=3),
        test_cfg=ConfigDict(score_thr=0.4, nms=dict(type='nms', iou_threshold=0.5), max_per_img=5,
                            mask_thr_binary=0.5))).eval()
    for parameter in head.parameters():
        parameter.normal_(0, 0.5)
    for layer in (head.bbox_head.fc_cls, head.bbox_head.shared_fcs[0], head.bbox_head.shared_fcs[1]):
        layer.bias.zero_()
    return head


def features(height=16, width=24, factor=3.):
    return torch.randn(1, 4, height, width) * factor, torch.randn(1, 4, height // 2, width // 2) * factor


def detect(head):
    from mmdet.structures import DetDataSample

    def predict(fine, coarse, proposals):
        meta = dict(META, img_shape=Traced((fine.shape[2] * 4, fine.shape[3] * 4)))
        found, = head.predict((fine, coarse), [InstanceData(bboxes=proposals)], [DetDataSample(metainfo=meta)],
                              rescale=True)
        return found.bboxes, found.scores, found.labels, found.masks

    return predict


def test_a_trace_whose_example_finds_nothing_serves_images_with_objects(second_stage):
    predict, axes = detect(second_stage), [(2, 3), (2, 3), (0, )]
    blank = *features(12, 12, 0), boxes(6, high=40)
    assert not len(predict(*blank)[0])
    graph = runs(predict, blank, axes, [second_stage])
    inputs = *features(), boxes(30, high=60)
    wanted = predict(*inputs)  # the library's, with masks pasted
    assert len(wanted[0]) == 5
    masks = adapted(predict, *inputs)[3]
    assert masks.shape == (5, 8, 8)
    for run in graph:
        assert_close(run(*inputs), (*wanted[:3], masks))
        assert [value.shape[0] for value in run(*blank)] == [0] * 4
        assert [value.shape[0] for value in run(*inputs[:2], torch.zeros(0, 4))] == [0] * 4
        assert_close(run(*inputs[:2], inputs[2][:1])[0], predict(*inputs[:2], inputs[2][:1])[0])


def test_rois_from_the_level_of_their_size(second_stage):
    extractor = second_stage.bbox_roi_extractor

    def extract(fine, coarse, rois):
        return extractor((fine, coarse), rois)

    rois = torch.cat([torch.zeros(9, 1), boxes(9, high=60)], 1)
    rois[3:5, 3:] = rois[3:5, 1:3] + torch.tensor([60., 30.])  # of the coarse level
    rois[7, 3] = rois[7, 1] - 5  # inverted: of none
    rois[5, 3] = rois[5, 1]  # empty
    inputs = *features(), rois
    wanted = extract(*inputs)
    assert not wanted[[5, 7]].any() and wanted[3].any()
    assert_close(adapted(extract, *inputs), wanted)
    for run in runs(extract, (*features(8, 8), rois[:2]), [(2, 3), (2, 3), (0, )]):
        for count in (9, 1, 0):
            assert_close(run(*inputs[:2], rois[:count]), [wanted[:count]])


def test_maps_in_any_layout_are_read_as_what_they_are(second_stage):
    fine, coarse = features()
    rois = torch.cat([torch.zeros(3, 1), boxes(3, high=40)], 1)
    wanted = second_stage.bbox_roi_extractor((fine, coarse), rois)
    turned = [x.contiguous(memory_format=torch.channels_last) for x in (fine, coarse)]
    assert_close(adapted(second_stage.bbox_roi_extractor, turned, rois), wanted)


@pytest.mark.parametrize('softmax', [False, True])
def test_proposals_of_images_of_other_sizes(softmax):
    from mmdet.models.dense_heads import RPNHead
    head = RPNHead(4, num_classes=1, feat_channels=4, anchor_generator=dict(
        type='AnchorGenerator', scales=[4], ratios=[0.5, 1., 2.], strides=[4, 8]),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
        loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=not softmax), test_cfg=ConfigDict(
            nms_pre=50, max_per_img=20, nms=dict(type='nms', iou_threshold=0.7), min_bbox_size=0)).eval()
    for parameter in head.parameters():
        parameter.normal_(0, 0.5)

    def propose(fine, coarse):
        from mmdet.structures import DetDataSample
        meta = dict(META, img_shape=Traced((fine.shape[2] * 4, fine.shape[3] * 4)))
        found, = head.predict((fine, coarse), [DetDataSample(metainfo=meta)], rescale=False)
        return found.bboxes, found.scores

    inputs = features(16, 24, 1.)
    wanted = propose(*inputs)
    assert_close(adapted(propose, *inputs), wanted)
    for example in (features(4, 4, 1.), features(20, 20, 1.)):  # fewer anchors than nms_pre, and more
        for run in runs(propose, example, [(2, 3)] * 2, [head]):
            assert_close(run(*inputs), wanted)
            assert_close(run(*(x[..., :4, :4] for x in inputs)), propose(*(x[..., :4, :4] for x in inputs)))


def test_what_cannot_be_a_graph_is_refused_by_name(monkeypatch):
    class Odd(nn.Module):
        pass

    class Child(Odd):
        pass

    monkeypatch.setitem(REFUSED, 'Odd', 'because it is odd')
    model = nn.Module()
    refuse(model)
    model.head = Child()
    with pytest.raises(UserError, match='model.head: Odd cannot be one graph .*, because it is odd'):
        refuse(model)


def test_soft_suppression_is_refused_before_anything_is_traced():
    model = nn.Module()
    model.test_cfg = dict(rpn=dict(nms=dict(type='nms')), rcnn=dict(nms=dict(type='soft_nms', iou_threshold=0.5)))
    with pytest.raises(UserError, match="nms of type 'soft_nms' has no ONNX operator"):
        refuse(model)
    model.test_cfg['rcnn']['nms'] = dict(iou_threshold=0.5)
    refuse(model)
