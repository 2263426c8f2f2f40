"""The exported int8 model against the quantized one: both runtimes, several sizes, the ecosystem's tools."""
import copy
import inspect
import itertools
import json
import re
import sys

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from PIL import Image
from torch import nn

from psaq_mm.deploy import RUNTIMES, Graph, HeadGraph, export, export_graph, export_head, head_inputs, head_names
from psaq_mm.deploy.adapters import ADAPTERS, shifted_window_mask, traceable
from psaq_mm.deploy.agreement import eight_bits, packed, reference, required, sqnr, unpacked
from psaq_mm.deploy.delivery import check_delivery, config_text, exported_config
from psaq_mm.deploy.export import quantized_config
from psaq_mm.deploy.extras import need
from psaq_mm.deploy.graph import Features, Form, nesting
from psaq_mm.deploy.parts import export_features, export_heads
from psaq_mm.engine.config import default_scope
from psaq_mm.errors import UserError
from psaq_mm.models import extract_features, quantize_model, quantize_model_config
from psaq_mm.models.features import data_samples, tensors
from psaq_mm.quantization import (
    FakeQuantizer,
    Mode,
    UncalibratedError,
    calibrate,
    quantized_layers,
    quantizers,
    set_mode,
)
from psaq_mm.stanza import QuantizationConfig

from .conftest import DEMO_CONFIG, ROOT, run_tool
from .test_families import FAMILIES, calibrated, images_for
from .test_families import family as family  # noqa: PLC0414
from .test_tools import ap_of, mmdet_tool

SEGMENTATION = ROOT / 'demo' / 'dfq_segmentation_w8a8.py'
onnx = pytest.importorskip('onnx', reason="needs pip install 'psaq_mm[deploy]'")
ort = pytest.importorskip('onnxruntime')
pytest.importorskip('openvino')


def plain_session(path):
    """ONNX Runtime that computes the graph as it is written, in float."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = ort.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    return lambda images: [torch.from_numpy(v) for v in session.run(None, {'images': images.numpy()})]


def is_classifier(model):
    return hasattr(model, 'head')


def test_a_graph_holds_at_other_sizes_than_the_traced_one(family, tmp_path):
    """In float, where differences are rounding only: windows, masks, merging and position embeddings."""
    model, images = family[0], images_for(family[0], 1)
    sizes = [images.shape[-2:]] if is_classifier(model) else [(72, 104), (64, 64), (90, 131)]
    export_graph(model, tmp_path / 'float.onnx', tuple(images.shape[-2:]), not is_classifier(model), integers=False)
    run = plain_session(tmp_path / 'float.onnx')
    for size in sizes:
        images = torch.randn(1, 3, *size)
        with torch.no_grad():
            expected = Features(model)(images)
        for ours, theirs in zip(expected, run(images), strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope='module')
def exported(family, tmp_path_factory):
    """A family's quantized model and the graph of it."""
    model, images = family[0], images_for(family[0])
    targets = dict(targets=['backbone', 'head']) if is_classifier(model) else {}
    quantized = calibrated(model, targets, images, is_classifier(model))
    path = tmp_path_factory.mktemp('graph') / 'features.onnx'
    export_graph(quantized, path, tuple(images.shape[-2:]), not is_classifier(model))
    return quantized, path


def test_a_graph_computes_on_the_models_integers(exported):
    """Rounding passes on what differs in the last bit of float, so two ways to compute the same differ by about as much
    as quantization itself; by more they must not."""
    model, path = exported
    for size in [(64, 96)] if is_classifier(model) else [(72, 104), (90, 131)]:
        images = torch.randn(1, 3, *size)
        with torch.no_grad():
            expected = Features(model)(images)
            set_mode(model, Mode.FLOAT)
            full = Features(model)(images)
            set_mode(model, Mode.QUANTIZE)
        for run in (plain_session(path), Graph(path, 'onnxruntime').run, Graph(path, 'openvino').run):
            for plain, ours, theirs in zip(full, expected, run(images), strict=True):
                assert sqnr(ours, theirs) > min(sqnr(plain, ours), 40) - 3


@pytest.mark.parametrize('activation', [dict(symmetric_products=False), dict(bits=6), dict(symmetric=True)])
def test_windows_of_other_grids(activation, tmp_path):
    """Attention whose operands cannot, or can all, be moved as integers."""
    torch.manual_seed(0)
    model = calibrated(FAMILIES_BY_NAME['mmdet_swin']().eval(), dict(activation=activation), torch.randn(2, 3, 72, 104))
    export_graph(model, tmp_path / 'swin.onnx', (72, 104), dynamic=True)
    images = torch.randn(1, 3, 90, 131)
    with torch.no_grad():
        expected = Features(model)(images)
        set_mode(model, Mode.FLOAT)
        full = Features(model)(images)
    for plain, ours, theirs in zip(full, expected, plain_session(tmp_path / 'swin.onnx')(images), strict=True):
        assert sqnr(ours, theirs) > min(sqnr(plain, ours), 40) - 3


@pytest.mark.parametrize('builder', ['mmdet_swin', 'timm_vit'])
def test_residual_sums_of_placement_all(builder, tmp_path):
    torch.manual_seed(0)
    model = FAMILIES_BY_NAME[builder]().eval()
    images, single = images_for(model, 2), is_classifier(model)
    targets = dict(targets=['backbone', 'head']) if single else {}
    model = calibrated(model, dict(targets, placement='all'), images, single)
    export_graph(model, tmp_path / 'all.onnx', tuple(images.shape[-2:]), not single)
    with torch.no_grad():
        expected = Features(model)(images[:1])
        set_mode(model, Mode.FLOAT)
        full = Features(model)(images[:1])
    for plain, ours, theirs in zip(full, expected, plain_session(tmp_path / 'all.onnx')(images[:1]), strict=True):
        assert sqnr(ours, theirs) > min(sqnr(plain, ours), 40) - 3
    sums = [name for name in quantizers(model) if name.endswith('_sum_quantizer')]
    kinds = [node.op_type for node in onnx.load(str(tmp_path / 'all.onnx')).graph.node]
    assert sums and kinds.count('QuantizeLinear') > len(sums) + len(quantized_layers(model)) - 8


def test_what_a_graph_stores(exported):
    model, path = exported
    graph = onnx.load(str(path)).graph
    kinds = [node.op_type for node in graph.node]
    activations = [n for n in quantizers(model) if not n.endswith('weight_quantizer')]
    weights = [layer for layer in quantized_layers(model).values() if getattr(layer, 'weight_quantizer', None)]
    # torch's exporter merges what is computed twice alike, e.g. mmseg's ViT quantizes one tensor for several readers
    windows = sum(type(module).__name__ == 'QuantizedWindowMSA' for module in model.modules())  # q, k, v in one
    assert len(activations) - 2 * windows - 8 <= kinds.count('QuantizeLinear') <= len(activations) - 2 * windows + 8
    integers = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer if item.data_type == 3}
    assert sum(map(np.size, integers.values())) == sum(layer.weight.numel() for layer in weights)
    large = [item.name for item in graph.initializer if item.data_type == 1 and np.prod(item.dims) > 5000]
    assert not large, 'weights in float'
    assert 'BatchNormalization' not in kinds


def test_products_of_the_runtimes_are_reported(exported):
    model, path = exported
    for runtime in ('openvino', 'onnxruntime'):
        products = Graph(path, runtime).session.products()
        assert sum(products.values()) >= 0.5 * len([
            1 for layer in quantized_layers(model).values() if getattr(layer, 'weight_quantizer', None)]), runtime
        if runtime == 'openvino':
            assert all(integer or 'BackpropData' in name for name, integer in products.items()), products


@pytest.mark.parametrize('bits', [4, 8])
@pytest.mark.parametrize('builder', ['mmdet_swin', 'mmseg_vit', 'timm_vit'])
def test_a_range_for_each_head(builder, bits, tmp_path):
    """Attention weights with a scale a head, in both runtimes, from windows, from MultiheadAttention and from timm."""
    torch.manual_seed(0)
    model = FAMILIES_BY_NAME[builder]().eval()
    images = images_for(model)
    settings = dict(activation=dict(bits=bits, softmax='per_head'), targets=['backbone'])
    model = calibrated(model, settings, images, is_classifier(model))
    scales = [q.scale for name, q in quantizers(model).items() if name.endswith('matmul_context.a_quantizer')]
    assert scales and all(len(scale) > 1 and scale.unique().numel() > 1 for scale in scales)
    for scale in scales:  # as learned ranges, which the largest weights are clipped to
        scale *= 0.7
    export_graph(model, tmp_path / 'heads.onnx', tuple(images.shape[-2:]), dynamic=builder != 'timm_vit')
    item = reference(model, Features(model), (images[:1], ))
    if (builder, bits) == ('mmseg_vit', 4):
        assert max(item.required) == 34, 'OpenVINO had 19'
    found = [Graph(tmp_path / 'heads.onnx', runtime).run(images[:1]) for runtime in ('onnxruntime', 'openvino')]
    for full, ours, own, mark, *both in zip(item.full, item.quantized, item.disturbed, item.required, *found,
                                            strict=True):
        assert min(sqnr(ours, theirs) for theirs in both) > max(mark, min(sqnr(full, ours), 40) - 3)
        # OpenVINO lost the upper end of Clip where shapes are dynamic
        assert sqnr(*both) > min(30, sqnr(ours, own) - 3)


@pytest.mark.parametrize('bits', [4, 8])
@pytest.mark.parametrize('symmetric', [True, False])
def test_one_layer_is_exact(tmp_path, bits, symmetric):
    """Nothing to pass on in a single layer: every value of the graph is the fake-quantized model's."""
    model = calibrated(FAMILIES_BY_NAME['mmseg_swin']().eval(), dict(
        weight=dict(bits=bits), activation=dict(bits=bits, symmetric=symmetric), patch_embed_bits=bits,
        keep_float=['backbone.stages.*', 'neck.*']), torch.randn(2, 3, 64, 64))
    model.extract_feat = lambda images: [model.backbone.patch_embed(images)[0]]
    export_graph(model, tmp_path / 'one.onnx', (64, 64), form=Form('symmetric' if symmetric else 'asymmetric'))
    images = 3 * torch.randn(1, 3, 64, 64)  # some outside the range
    with torch.no_grad():
        expected, = Features(model)(images)
    torch.testing.assert_close(plain_session(tmp_path / 'one.onnx')(images)[0], expected, rtol=1e-4, atol=1e-5)


FAMILIES_BY_NAME = {builder.__name__: builder for builder in FAMILIES}


def test_batch_norm_is_folded_exactly(tmp_path):
    """Also where its factor is negative."""
    model = FAMILIES_BY_NAME['mmseg_vit_pyramid']().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
            nn.init.normal_(module.weight), nn.init.normal_(module.bias)
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 2)
    model = calibrated(model, {}, torch.randn(2, 3, 64, 64))
    pixels = torch.randn(1, 32, 4, 4)
    model.extract_feat = lambda images: [model.neck.upsample_4x(images[:, :1].expand(-1, 32, -1, -1))]
    export_graph(model, tmp_path / 'neck.onnx', (16, 16))
    images = pixels[:, :3].repeat(1, 1, 4, 4)
    with torch.no_grad():
        expected, = Features(model)(images)
    found, = plain_session(tmp_path / 'neck.onnx')(images)
    assert sqnr(expected, found) > 35
    assert 'BatchNormalization' not in [node.op_type for node in onnx.load(str(tmp_path / 'neck.onnx')).graph.node]


def test_masks_are_those_of_the_library():
    from mmdet.models.backbones.swin import ShiftWindowMSA
    layer, seen = ShiftWindowMSA(8, 2, 4, 2), []
    layer.w_msa.forward = lambda windows, mask: seen.append(mask) or windows
    layer(torch.randn(1, 11 * 9, 8), (11, 9))
    assert torch.equal(seen[0], shifted_window_mask(12, 12, 4, 2)) and ADAPTERS


# -- errors ------------------------------------------------------------------------------------------------------------


def test_wrong_sizes_runtimes_and_files_are_explained(tmp_path):
    model = calibrated(FAMILIES_BY_NAME['mmdet_swin']().eval(), {}, torch.randn(1, 3, 64, 64))
    path = tmp_path / 'fixed.onnx'
    export_graph(model, path, (64, 64))
    with pytest.raises(UserError, match='takes images of 64 x 64, not 32 x 64.*--size'):
        Graph(path, 'openvino').run(torch.randn(1, 3, 32, 64))
    assert len(Graph(path, 'openvino').run(torch.randn(3, 3, 64, 64))[0]) == 3
    with pytest.raises(UserError, match='tensorflow.*must be one of'):
        Graph(path, 'tensorflow')
    with pytest.raises(UserError, match='does not exist.*tools/export.py'):
        Graph(tmp_path / 'nothing.onnx')
    (tmp_path / 'text.onnx').write_text('no graph')
    with pytest.raises(UserError, match='no ONNX graph'):
        Graph(tmp_path / 'text.onnx')
    with pytest.raises(UserError, match='symmetric.*activation.symmetric=True'):
        export_graph(model, path, (64, 64), form=Form('symmetric'))
    next(q for q in quantizers(model).values()).calibrated = False
    with pytest.raises(UncalibratedError, match='no scale for .*tools/dfq.py'):
        export_graph(model, path, (64, 64))
    with pytest.raises(UserError, match='not quantized'):
        export_graph(FAMILIES_BY_NAME['mmdet_swin'](), path, (64, 64))


def test_missing_and_old_packages_are_named(monkeypatch):
    import psaq_mm.deploy.extras as extras
    monkeypatch.setitem(extras.OLDEST, 'no_such_runtime', '1.0')
    with pytest.raises(UserError, match=r"no_such_runtime is not installed.*pip install 'psaq_mm\[deploy\]'"):
        need('no_such_runtime')
    monkeypatch.setitem(extras.OLDEST, 'onnx', '99')
    with pytest.raises(UserError, match=r"onnx .* is too old: pip install 'onnx>=99'"):
        need('onnx')


def test_exporting_leaves_the_model_as_it_was(exported):
    model, _ = exported
    assert all('forward' not in module.__dict__ and 'linear' not in module.__dict__ for module in model.modules())
    assert not any(name.endswith('integers') for name, _ in model.named_buffers())
    assert all(type(q) is FakeQuantizer and q.mode is Mode.QUANTIZE for q in quantizers(model).values())


# -- nothing is called right that was not measured ---------------------------------------------------------------------


class Frozen(nn.Module):
    """A backbone whose trace holds for one size: it counts pixels in Python."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 1)

    def forward(self, images):
        x = self.stem(images)
        return (self.head(x * (int(x.shape[-1]) / 10)), )


class OneSize(Frozen):
    """A backbone that takes one size."""

    def forward(self, images):
        x = self.stem(images)
        return (self.head(x + torch.ones(1, 8, 20, 24)), )


class Whole(nn.Module):
    """A model around a backbone."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone


def frozen(kind=Frozen):
    model = quantize_model(Whole(kind()).eval(), dict(targets=['backbone']))
    calibrate(model, lambda: model.backbone(torch.randn(2, 3, 40, 48)))
    return model, eight_bits(torch.randn(1, 3, 40, 48))


@pytest.mark.parametrize('kind, why', [(Frozen, 'no graph for every size is right: in .* SQNR of .* needs 60'),
                                       (OneSize, 'the model itself takes no other size')])
def test_a_graph_that_is_wrong_at_other_sizes_becomes_one_for_one_size(kind, why, tmp_path):
    model, image = frozen(kind)
    found = export_features(model, tmp_path, image, (40, 48), False, list(RUNTIMES))
    assert found['size'] == (40, 48) and re.search(why, found['reason'])
    assert {item.runtime for item in found['part'].findings if item.passed} == set(RUNTIMES)
    assert [path.name for path in tmp_path.iterdir()] == ['features.onnx']
    with pytest.raises(UserError, match='takes images of 40 x 48, not 40 x 64'):
        Graph(tmp_path / 'features.onnx').run(torch.randn(1, 3, 40, 64))


def test_a_runtime_that_computes_wrongly_is_refused_by_name(tmp_path, monkeypatch):
    """The chosen one ends the export, the other one is noted in the graph and refused when it is loaded."""
    from psaq_mm.deploy.runtime import OnnxRuntimeSession
    model, image = frozen()
    right = OnnxRuntimeSession.run
    monkeypatch.setattr(OnnxRuntimeSession, 'run', lambda self, inputs: [0.5 * out for out in right(self, inputs)])
    with pytest.raises(UserError, match='onnxruntime .* SQNR of .*; openvino computes it rightly, use --runtime'):
        export_features(model, tmp_path, image, (40, 48), True, ['onnxruntime', 'openvino'])
    found = export_features(model, tmp_path, image, (40, 48), True, ['openvino', 'onnxruntime'])
    assert found['part'].passed('openvino') and not found['part'].passed('onnxruntime')
    Graph(tmp_path / 'features.onnx', 'openvino')
    with pytest.raises(UserError, match="onnxruntime computes .*features.onnx wrongly here.*runtime to 'openvino'"):
        Graph(tmp_path / 'features.onnx', 'onnxruntime')


def test_a_graph_checks_itself_where_it_was_not_measured(tmp_path, monkeypatch):
    import psaq_mm.deploy.runtime as runtime
    model, image = frozen()
    export_features(model, tmp_path, image, (40, 48), True, ['openvino'])
    path, checked = tmp_path / 'features.onnx', []
    Graph(path, 'onnxruntime')  # not measured, but right
    right, original = runtime.OpenVinoSession.run, runtime.host
    monkeypatch.setattr(runtime.OpenVinoSession, 'run', lambda self, inputs: checked.append(1) or [
        0 * out for out in right(self, inputs)])
    Graph(path, 'openvino')
    assert not checked
    monkeypatch.setattr(runtime, 'host', lambda name: f'{original(name)} amx_int8')  # another CPU
    with pytest.raises(UserError, match='openvino computes .* wrongly here: .* 0.0 dB .*ONEDNN_MAX_CPU_ISA'):
        Graph(path, 'openvino')
    assert checked


def test_sizes_outside_what_was_measured_are_refused(tmp_path):
    model, image = frozen(type('Plain', (Frozen, ), dict(forward=lambda self, x: (self.head(self.stem(x)), ))))
    found = export_features(model, tmp_path, image, (40, 48), False, ['openvino'])
    graph = Graph(tmp_path / 'features.onnx')
    assert found['size'] is None and found['reason'] is None and len(found['sizes']) == 5
    least = found['at_least']
    assert graph.run(torch.randn(1, 3, least, 333))[0].shape[-1] == 167
    with pytest.raises(UserError, match=f'{least} pixels a side and more'):
        graph.run(torch.randn(1, 3, least - 1, 64))
    with pytest.raises(UserError, match='3 channels, not 4'):
        graph.run(torch.randn(1, 4, 64, 64))


def test_a_folder_whose_name_the_locale_cannot_read_is_refused_early(tmp_path):
    with pytest.raises(UserError, match='PYTHONUTF8=1'):
        export(Config(dict()), 'quantized.pth', str(tmp_path / 'Gr\udcc3\udcbc'))


def test_marks_and_probes():
    assert [required(value) for value in (60, 20, 5, -10)] == [34, 14, 3, 3]
    assert [required(5, own) for own in (-3, 20, 90)] == [3, 14, 34], 'what last bits do to the model itself'
    zeros, ones = torch.zeros(4), torch.ones(4)
    assert sqnr(ones, zeros) == 0 and sqnr(zeros, zeros) == 200 and sqnr(ones, ones * torch.nan) == -200
    assert sqnr(ones, torch.ones(5)) == -200
    from psaq_mm.deploy.agreement import Probe
    x = eight_bits(torch.randn(1, 3, 8, 8))
    probe, = unpacked(packed([Probe('8 x 8', (x, ), [ones, zeros], [3.0, 4.0])]))
    torch.testing.assert_close(probe.inputs[0], x)
    assert probe.place == '8 x 8' and len(probe.samples) == 2 and probe.required == [3, 4]


def test_the_symmetric_preset_is_what_tensorrt_takes(tmp_path):
    """No DequantizeLinear of int32, zero points of 0, int8 alone."""
    model = calibrated(FAMILIES_BY_NAME['mmdet_swin']().eval(), dict(activation=dict(symmetric=True)),
                       torch.randn(2, 3, 64, 64))
    export_graph(model, tmp_path / 'symmetric.onnx', (64, 64), form=Form('symmetric'))
    graph = onnx.load(str(tmp_path / 'symmetric.onnx')).graph
    values = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
    values.update({node.output[0]: onnx.numpy_helper.to_array(node.attribute[0].t) for node in graph.node
                   if node.op_type == 'Constant'})
    zeros = [values[node.input[2]] for node in graph.node if node.op_type in ('QuantizeLinear', 'DequantizeLinear')]
    assert len(zeros) > 50 and all(zero.dtype == np.int8 and not zero.any() for zero in zeros)
    assert not any(value.dtype == np.int32 for value in values.values())


@pytest.mark.parametrize('folder', ["O'Brien", 'a {b} 100% "c" \\N', 'Grüße'])
def test_a_config_is_read_in_a_folder_of_any_name(folder, with_heads, tmp_path):
    cfg, model = with_heads
    cfg = copy.deepcopy(cfg)
    cfg.classes = ('Füße', "l'eau", '{x}')
    path = tmp_path / folder / 'int8_config.py'
    path.parent.mkdir()
    path.write_text(config_text(exported_config(cfg, model, 'openvino', 'features.onnx')), encoding='utf-8')
    read = Config.fromfile(path)
    name = next(name for name in ('backbone', 'image_encoder') if read.model.get(name))
    assert read.model[name].graph == str(path.parent / 'features.onnx').replace('\\', '/')
    assert read.classes == cfg.classes


def test_nested_outputs_and_a_required_neck_come_back(tmp_path):
    """DPT reads pairs of map and class token; a RetinaNet cannot be built without a neck."""
    from psaq_mm.deploy import ExportedFeatures

    class Pairs(Frozen):

        def forward(self, images):
            x = self.head(self.stem(images))
            return [(x, x.mean((2, 3))), (2 * x, 2 * x.mean((2, 3)))]

    model, image = frozen(Pairs)
    export_features(model, tmp_path, image, (40, 48), True, ['openvino'])
    found = ExportedFeatures(str(tmp_path / 'features.onnx'))(image)
    assert nesting(found) == nesting(model.backbone(image))
    retina = Config.fromfile(DEMO_CONFIG).model
    stanza = QuantizationConfig.parse({})
    anchors = dict(type='AnchorGenerator', octave_base_scale=4, scales_per_octave=3, ratios=[1.0],
                   strides=[4, 8, 16, 32, 64])
    head = dict(type='RetinaHead', num_classes=3, in_channels=32, feat_channels=32, stacked_convs=1,
                anchor_generator=anchors)
    neck = dict(retina.neck, out_channels=32)
    plain = dict(type='RetinaNet', backbone=retina.backbone, neck=neck, bbox_head=head, train_cfg=None, test_cfg=dict(
        nms_pre=10, score_thr=0.05, nms=dict(type='nms', iou_threshold=0.5), max_per_img=5),
        data_preprocessor=retina.data_preprocessor)
    cfg = quantized_config(Config(dict(default_scope='mmdet', model=quantize_model_config(plain, stanza))))
    model = MODELS.build(copy.deepcopy(cfg.model)).eval()
    images = eight_bits(torch.randn(1, 3, 64, 96))
    calibrate(model, lambda: extract_features(model, images))
    export_graph(model, tmp_path / 'features.onnx', (64, 96))
    text = config_text(exported_config(cfg, model, 'onnxruntime', 'features.onnx'))
    (tmp_path / 'int8_config.py').write_text(text, encoding='utf-8')
    torch.save(dict(state_dict={k: v for k, v in model.state_dict().items() if k.startswith('bbox_head')}),
               tmp_path / 'int8.pth')
    check_delivery(model, tmp_path, images, [10.0] * 5, 'onnxruntime')
    torch.save(dict(state_dict={}), tmp_path / 'int8.pth')
    with pytest.raises(UserError, match="other weights than int8.pth .'bbox_head"):
        check_delivery(model, tmp_path, images, [10.0] * 5, 'onnxruntime')


def test_a_convolution_shared_by_levels_is_folded_into_each_batch_norm(tmp_path):
    """As in the head of an RTMDet; its checkpoint has every name of a shared quantizer."""
    from psaq_mm.engine.checkpoint import load_float

    class Shared(nn.Module):

        def __init__(self):
            super().__init__()
            conv = nn.Conv2d(3, 6, 3)
            self.levels = nn.ModuleList(nn.Sequential(conv, nn.BatchNorm2d(6)) for _ in range(3))

        def forward(self, images):
            return tuple(level(images) for level in self.levels)

    plain = Whole(Shared()).eval()
    for norm in plain.backbone.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    state = copy.deepcopy(plain.state_dict())
    model = quantize_model(plain, dict(targets=['backbone']))
    load_float(model, dict(state_dict=state, path='x.pth'))
    images = torch.randn(1, 3, 20, 20)
    calibrate(model, lambda: model.backbone(images))
    model.load_state_dict(model.state_dict())  # not refused
    export_graph(model, tmp_path / 'shared.onnx', (20, 20))
    with torch.no_grad():
        expected = model.backbone(images)
    for ours, theirs in zip(expected, plain_session(tmp_path / 'shared.onnx')(images), strict=True):
        assert sqnr(ours, theirs) > 80


# -- in the ecosystem's tools ------------------------------------------------------------------------------------------


def test_a_work_dir_holds_a_finished_run(tmp_path):
    done = run_tool(ROOT / 'tools' / 'export.py', tmp_path, check=False)
    assert done.returncode == 2 and f'{tmp_path}/test_config.py does not exist: give the work dir' in done.stderr
    (tmp_path / 'test_config.py').write_text('')
    done = run_tool(ROOT / 'tools' / 'export.py', tmp_path / 'test_config.py', check=False)
    assert done.returncode == 2 and f'{tmp_path}/quantized.pth does not exist' in done.stderr


def by_strangers(folder, work_dir, *options):
    """What benchmarks/strangers.py measures of a delivered graph by runtime, and what the library did."""
    done = run_tool(ROOT / 'benchmarks' / 'strangers.py', folder / 'model.onnx', *options, '--expect', work_dir /
                    'metrics.json', '--json', folder / 'strangers.json', check=False)
    assert done.returncode in (0, 1) and 'imported' not in done.stdout, done.stdout + done.stderr
    assert ('TOO FAR' in done.stdout) == bool(done.returncode)
    found = json.loads((folder / 'strangers.json').read_text())
    return [found[runtime] for runtime in RUNTIMES], found['expected']


def test_detector_by_mmdets_own_tools(quantized_run, scenes, tmp_path):
    work_dir, _ = quantized_run
    done = run_tool(ROOT / 'tools' / 'export.py', work_dir, '--batch', '--work-dir', tmp_path / 'int8', '--json',
                    tmp_path / 'numbers.json', cwd=tmp_path)
    result = json.loads((tmp_path / 'numbers.json').read_text())
    assert result['size'] is None and result['size_mb']['graph'] < 0.45 * result['size_mb']['float']
    assert min(result['sqnr_db'].values()) > 20 and f"{result['int8']} of" in done.stdout
    whole = result['whole']
    assert whole['size'] is None and all(item['passed'] for item in whole['measured'])
    assert {item['graph'] for item in whole['measured']} == {'library', 'replaced', 'float', 'int8'}
    claimed = json.loads((work_dir / 'metrics.json').read_text())['size_mb']['quantized']
    assert whole['size_mb'] == pytest.approx(claimed, rel=0.05)
    batches = [(item['graph'], item['runtime']) for item in whole['measured'] if item['place'].startswith('3 images')]
    assert set(itertools.product(('float', 'int8'), RUNTIMES)) == set(batches)
    assert all((tmp_path / 'int8' / name).is_file() for name in ('model.onnx', 'model.json', 'predict.py'))
    graph, images = Graph(tmp_path / 'int8' / 'features.onnx'), torch.randn(3, 3, 96, 128)
    for together, *alone in zip(graph.run(images), *(graph.run(image[None]) for image in images)):
        assert sqnr(torch.cat(alone), together) > 20
    tested = run_tool(mmdet_tool('test.py'), tmp_path / 'int8' / 'int8_config.py', tmp_path / 'int8' / 'int8.pth',
                      '--work-dir', tmp_path / 'tested', cwd=tmp_path)
    quantized = json.loads((work_dir / 'metrics.json').read_text())['quantized']['coco/bbox_mAP']
    assert ap_of(tested.stdout + tested.stderr) == pytest.approx(quantized, abs=0.03)  # of six images
    found, library = by_strangers(tmp_path / 'int8', work_dir, '--images', scenes / 'val', '--coco',
                                  scenes / 'val.json')
    assert json.loads((tmp_path / 'int8' / 'strangers.json').read_text())['matched'] > 0.7
    for name, key in (('box', 'coco/bbox_mAP'), ('mask', 'coco/segm_mAP')):
        assert [item[name] for item in found] == pytest.approx([100 * library[key]] * 2, abs=3)
    from mmdet.apis import DetInferencer, inference_detector, init_detector
    files = [str(tmp_path / 'int8' / name) for name in ('int8_config.py', 'int8.pth')]
    image = np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8)
    found = inference_detector(init_detector(*files, device='cpu'), image).pred_instances
    inferred = DetInferencer(*files, device='cpu')(image)['predictions'][0]
    assert inferred['scores'] == pytest.approx(found.scores.tolist())


@pytest.mark.slow
def test_four_bits_are_four_bits_in_the_file(small_config, tmp_path):
    """A whole graph is as large as tools/dfq.py says."""
    run_tool(ROOT / 'tools' / 'dfq.py', small_config, '--work-dir', tmp_path, '--cfg-options',
             'quantization.weight.bits=4', '--no-eval')
    run_tool(ROOT / 'tools' / 'export.py', tmp_path, '--json', tmp_path / 'numbers.json', cwd=tmp_path)
    whole, metrics = (json.loads((tmp_path / name).read_text()) for name in ('numbers.json', 'metrics.json'))
    whole, size = whole['whole'], metrics['size_mb']
    assert metrics['bits']['weight'] == 4 and size['quantized'] < 0.4 * size['full_precision']
    assert whole['size_mb'] == pytest.approx(size['quantized'], rel=0.05)
    assert whole['size_mb'] == pytest.approx((tmp_path / 'int8' / 'model.onnx').stat().st_size / 1e6, abs=0.01)
    assert all(item['passed'] for item in whole['measured'])


@pytest.mark.slow
def test_segmentor_and_classifier(segmentation_run, classification_config, scenes, tmp_path):
    from mmseg.apis import inference_model, init_model
    work_dir, _ = segmentation_run
    run_tool(ROOT / 'tools' / 'export.py', work_dir / 'test_config.py', work_dir / 'quantized.pth', '--runtime',
             'onnxruntime', '--work-dir', tmp_path / 'seg', cwd=tmp_path)
    image = np.random.default_rng(0).integers(0, 255, (96, 128, 3), np.uint8)
    maps = []
    for config, weights in ((work_dir / 'test_config.py', work_dir / 'quantized.pth'),
                            (tmp_path / 'seg' / 'int8_config.py', tmp_path / 'seg' / 'int8.pth')):
        maps.append(inference_model(init_model(str(config), str(weights), device='cpu'), image).pred_sem_seg.data)
    assert (maps[0] == maps[1]).float().mean() > 0.95
    found, library = by_strangers(tmp_path / 'seg', work_dir, '--images', scenes / 'val', '--maps', scenes / 'val_maps')
    assert [item['miou'] for item in found] == pytest.approx([library['mIoU']] * 2, abs=1)
    run_tool(ROOT / 'tools' / 'dfq.py', classification_config, '--work-dir', tmp_path / 'cls')
    run_tool(ROOT / 'tools' / 'export.py', tmp_path / 'cls' / 'test_config.py', tmp_path / 'cls' / 'quantized.pth',
             cwd=tmp_path)
    done = run_tool(mmdet_tool('test.py'), tmp_path / 'cls' / 'int8' / 'int8_config.py', tmp_path / 'cls' / 'int8' /
                    'int8.pth', '--work-dir', tmp_path / 'tested', cwd=tmp_path)
    quantized = json.loads((tmp_path / 'cls' / 'metrics.json').read_text())['quantized']['accuracy/top1']
    found = float(re.findall(r'accuracy/top1: (\S+)', done.stdout + done.stderr)[-1])
    assert found == pytest.approx(quantized, abs=7)  # two of thirty
    images = '--images', scenes / 'objects' / 'val'
    found, _ = by_strangers(tmp_path / 'cls' / 'int8', tmp_path / 'cls', *images)
    assert [item['top1'] for item in found] == pytest.approx([quantized] * 2, abs=7)
    run_tool(ROOT / 'benchmarks' / 'tradeoff.py', tmp_path / 'cls', '--config', classification_config, *images,
             '--repeats', '1', '--out', tmp_path)
    table = json.loads((tmp_path / 'tradeoff.json').read_text())
    full = json.loads((tmp_path / 'cls' / 'metrics.json').read_text())['full_precision']['accuracy/top1']
    titles = dict(onnxruntime='ONNX Runtime', openvino='OpenVINO')
    plain, ours = ([table[f'{titles[name]}{kind}'] for name in RUNTIMES]
                   for kind in (' float', ', psaq_mm, W8A8'))
    assert [item['top1'] for item in plain] == pytest.approx([full] * 2, abs=0.1)
    assert [item['top1'] for item in ours] == pytest.approx([item['top1'] for item in found], abs=0.01)
    assert all(item['seconds'] > 0 and item['size_mb'] < table['OpenVINO float']['size_mb'] / 2 for item in ours)
    assert Image.open(tmp_path / 'tradeoff.png').size[0] > 500


def test_heads_that_are_quantized_stay_so_in_the_exported_config(tmp_path):
    """Their settings go along; patterns that only meant backbone and neck, which are gone, do not."""
    cfg = Config.fromfile(DEMO_CONFIG)
    stanza = QuantizationConfig.parse(dict(
        targets=['backbone', 'neck', 'rpn_head'], keep_float=['backbone.stages.0.*', 'rpn_head.rpn_reg'],
        overrides=[dict(pattern='neck.*', weight=dict(bits=4)), dict(pattern='*', weight=dict(bits=6))]))
    quantized = quantized_config(Config(dict(model=quantize_model_config(cfg.model, stanza))))
    exported = exported_config(quantized, MODELS.build(copy.deepcopy(quantized.model)), 'onnxruntime', 'g.onnx').model
    assert exported.type == 'psaq_mm.QuantizedModel' and exported.float_type == cfg.model.type
    assert exported.backbone.type == 'psaq_mm.ExportedFeatures' and exported.neck == dict(type='psaq_mm.ExportedNeck')
    found = exported.quantization
    assert found['targets'] == ['rpn_head'] and found['keep_float'] == ['rpn_head.rpn_reg']
    assert [o['pattern'] for o in found['overrides']] == ['*']


# -- heads -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module', params=[(DEMO_CONFIG, ['rpn_head', 'roi_head']), (SEGMENTATION, ['decode_head'])],
                ids=['detector', 'segmentor'])
def with_heads(request):
    """Config and quantized model of a demo, heads included, on the scales of random images."""
    config, heads = request.param
    cfg = Config.fromfile(config)
    stanza = QuantizationConfig.parse(dict(targets=['backbone', 'neck', *heads]))
    cfg = quantized_config(Config(dict(model=quantize_model_config(cfg.model, stanza))))
    torch.manual_seed(0)
    model = MODELS.build(copy.deepcopy(cfg.model)).eval()
    images = torch.randn(2, 3, 96, 128)
    calibrate(model, lambda: extract_features(model, images, True))
    return cfg, model


@pytest.mark.parametrize('runtime', RUNTIMES)
def test_a_heads_graph_computes_what_the_head_does(with_heads, runtime, tmp_path):
    """Of any number of proposals, none included, and of images of other sizes, several at once."""
    _, model = with_heads
    names = head_names(model)
    assert names == (['decode_head'] if hasattr(model, 'decode_head') else
                     ['rpn_head', 'roi_head.bbox_head', 'roi_head.mask_head'])
    traced = head_inputs(model, names, torch.randn(1, 3, 64, 96))
    for name in names:
        export_head(model, name, traced[name], tmp_path / 'head.onnx', dynamic=True)
        graph, head = HeadGraph(str(tmp_path / 'head.onnx'), runtime), model.get_submodule(name)
        assert any(graph.session.products().values()) or runtime == 'onnxruntime'
        if name.startswith('roi_head'):
            features, = traced[name]
            cases = [(torch.cat([features] * 2)[:count], ) for count in (0, 1, 7)]
        else:
            cases = [head_inputs(model, [name], torch.randn(2, 3, *size))[name] for size in ((64, 96), (90, 130))]
        for inputs in cases:
            with torch.no_grad():
                expected, found = head(*inputs), graph(*inputs)
            assert nesting(expected) == nesting(found)
            for ours, theirs in zip(tensors(expected), tensors(found), strict=True):
                assert ours.shape == theirs.shape
                assert not len(ours) or sqnr(ours, theirs) > 40
    with pytest.raises(UserError, match='feature maps, not'):
        graph(*inputs, inputs[0])


def test_the_exported_model_has_heads_without_weights(with_heads, tmp_path):
    cfg, model = with_heads
    inputs = head_inputs(model, head_names(model), torch.randn(1, 3, 64, 96))
    export_graph(model, tmp_path / 'features.onnx', (64, 96))
    for name in inputs:
        export_head(model, name, inputs[name], tmp_path / f'{name}.onnx')
    written = tmp_path / 'config.py'
    written.write_text(config_text(exported_config(cfg, model, 'openvino', 'features.onnx',
                                                   {name: f'{name}.onnx' for name in inputs})))
    exported = MODELS.build(Config.fromfile(written).model).eval()
    assert sum(p.numel() for p in exported.parameters()) < 0.05 * sum(p.numel() for p in model.parameters()) or hasattr(
        exported, 'auxiliary_head')
    assert not any(key.startswith(tuple(f'{name}.' for name in inputs)) for key in exported.state_dict())
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        ours, theirs = (extract_features(m, images, True) for m in (model, exported))
    for a, b in zip(ours, theirs, strict=True):
        assert sqnr(a, b) > 15  # random weights: differences in the last bit grow
    samples = [type(s)(metainfo=dict(s.metainfo)) for s in data_samples(images)]
    if hasattr(exported, 'roi_head'):
        from mmdet.structures import DetDataSample
        found, = exported.predict(images, [DetDataSample(metainfo=samples[0].metainfo)])
        assert found.pred_instances.masks.shape[1:] == (64, 96)


def test_a_head_that_cannot_be_exported_stays_fake_quantized(with_heads, tmp_path, monkeypatch):
    """Its file goes, the reason is told, and the config quantizes it as before; graphs serve the others."""
    cfg, model = with_heads
    names = head_names(model)
    images = torch.randn(1, 3, 64, 96)

    def fails(model, name, inputs, path, *args):
        if name == names[-1]:
            path.write_text('half a graph')
            raise ValueError('')
        return export_head(model, name, inputs, path, *args)

    monkeypatch.setattr(sys.modules['psaq_mm.deploy.parts'], 'export_head', fails)
    heads, failed = export_heads(model, tmp_path, {'64 x 96': images}, ['openvino'], True)
    assert failed == {names[-1]: 'ValueError'} and list(heads) == names[:-1]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f'{name}.onnx' for name in names[:-1])
    export_graph(model, tmp_path / 'features.onnx', (64, 96))
    written = tmp_path / 'config.py'
    written.write_text(config_text(exported_config(cfg, model, 'openvino', 'features.onnx', {
        name: part.file.name for name, part in heads.items()})))
    exported = MODELS.build(Config.fromfile(written).model)
    state = {k: v for k, v in model.state_dict().items() if k.startswith(f'{names[-1]}.')}
    kept = {k: v for k, v in exported.state_dict().items() if k.startswith(f'{names[-1]}.')}
    assert kept.keys() == state.keys() and any(k.endswith('_quantizer.scale') for k in kept)
    with pytest.raises(UserError, match='not of a head'):
        HeadGraph(str(tmp_path / 'features.onnx'))


def test_a_head_that_is_called_by_names_has_no_recorded_inputs(with_heads, monkeypatch):
    _, model = with_heads
    first = head_names(model)[0]
    head = model.get_submodule(first)
    argument = next(iter(inspect.signature(head.forward).parameters))

    def by_name(images, samples, mode):
        return head.forward(**{argument: model.extract_feat(images)})

    monkeypatch.setattr(model, 'forward', by_name)
    assert head_inputs(model, [first], torch.randn(1, 3, 64, 96)) == {}
    assert 'forward' not in vars(head)


def test_heads_of_a_cascade_are_exported_one_by_one():
    cfg = Config.fromfile(ROOT / 'configs' / 'cascade_mask_rcnn_swin_t_w8a8.py')
    cfg.model.backbone.update(embed_dims=24, depths=(1, 1, 1, 1), init_cfg=None)
    cfg.model.neck.update(in_channels=[24, 48, 96, 192])
    default_scope(cfg)
    model = quantize_model(MODELS.build(cfg.model), dict(targets=['backbone', 'neck', 'roi_head']))
    assert head_names(model) == [f'roi_head.{kind}_head.{i}' for kind in ('bbox', 'mask') for i in range(3)]


@pytest.mark.parametrize('size, bins', [((7, 9), 3), ((5, 5), (2, 4)), ((16, 16), 6), ((2, 3), 6)])
def test_adaptive_pooling_is_traced_for_every_size(size, bins):
    pool = nn.AdaptiveAvgPool2d(bins)
    x = torch.randn(2, 4, *size)
    with traceable(nn.Sequential(pool)):
        torch.testing.assert_close(pool(x), nn.AdaptiveAvgPool2d(bins)(x))


@pytest.mark.slow
def test_a_segmentor_with_an_int8_head_by_mmsegs_own_functions(segmentation_config, tmp_path):
    from mmseg.apis import inference_model, init_model
    run_tool(ROOT / 'tools' / 'dfq.py', segmentation_config, '--work-dir', tmp_path, '--no-eval', '--cfg-options',
             "quantization.targets=['backbone','neck','decode_head']")
    run_tool(ROOT / 'tools' / 'export.py', tmp_path / 'test_config.py', tmp_path / 'quantized.pth', '--parts-only')
    maps = []
    for folder, name, weights in ((tmp_path, 'test_config.py', 'quantized.pth'),
                                  (tmp_path / 'int8', 'int8_config.py', 'int8.pth')):
        image = np.random.default_rng(0).integers(0, 255, (96, 128, 3), np.uint8)
        model = init_model(str(folder / name), str(folder / weights), device='cpu')
        maps.append(inference_model(model, image).pred_sem_seg.data)
    assert (maps[0] == maps[1]).float().mean() > 0.95


@pytest.mark.slow
def test_a_detector_with_int8_heads_by_mmdets_own_tools(small_config, tmp_path):
    run_tool(ROOT / 'tools' / 'dfq.py', small_config, '--work-dir', tmp_path, '--cfg-options',
             "quantization.targets=['backbone','neck','rpn_head','roi_head']")
    run_tool(ROOT / 'tools' / 'export.py', tmp_path / 'test_config.py', tmp_path / 'quantized.pth', '--json',
             tmp_path / 'numbers.json')
    result = json.loads((tmp_path / 'numbers.json').read_text())
    assert set(result['heads']) == {'rpn_head', 'roi_head.bbox_head', 'roi_head.mask_head'}
    assert not result['heads_not_exported'] and result['size_mb']['graph'] < 0.45 * result['size_mb']['float']
    assert (tmp_path / 'int8' / 'int8.pth').stat().st_size < 20_000
    tested = run_tool(mmdet_tool('test.py'), tmp_path / 'int8' / 'int8_config.py', tmp_path / 'int8' / 'int8.pth',
                      '--work-dir', tmp_path / 'tested', cwd=tmp_path)
    quantized = json.loads((tmp_path / 'metrics.json').read_text())['quantized']['coco/bbox_mAP']
    assert ap_of(tested.stdout + tested.stderr) == pytest.approx(quantized, abs=0.03)


def test_a_float_checkpoint_is_refused(quantized_run, tmp_path):
    work_dir, _ = quantized_run
    state = torch.load(work_dir / 'quantized.pth', weights_only=True)
    state['state_dict'] = {k: v for k, v in copy.copy(state['state_dict']).items() if 'quantizer' not in k}
    torch.save(state, tmp_path / 'float.pth')
    done = run_tool(ROOT / 'tools' / 'export.py', work_dir / 'test_config.py', tmp_path / 'float.pth', check=False)
    assert done.returncode == 2 and 'no scale for' in done.stderr and 'Traceback' not in done.stderr


def test_a_model_that_cannot_be_one_graph_is_told_so_before_anything_is_traced(quantized_run, tmp_path, monkeypatch):
    work_dir, _ = quantized_run
    cfg, module, said = Config.fromfile(work_dir / 'test_config.py'), sys.modules[export.__module__], []
    cfg.test_dataloader.dataset.pipeline[1] = dict(type='Mosaic')

    def export_features(*args):
        raise UserError(f'traced; said before: {said}')

    monkeypatch.setattr(module, 'export_features', export_features)
    monkeypatch.setattr(module, 'print_log', lambda text, *args: said.append(text))
    with pytest.raises(UserError, match='traced; said before: .*no model.onnx.*Mosaic'):
        export(cfg, str(work_dir / 'quantized.pth'), str(tmp_path / 'int8'))
