"""Graphs for ONNX Runtime's int8 kernels: convolutions whose outputs are on integers, operands without a sign."""
import numpy as np
import pytest
import torch

from psaq_mm.deploy.agreement import reference, sqnr
from psaq_mm.deploy.convolutions import quantize_convolutions
from psaq_mm.deploy.graph import Features, Form, export_graph
from psaq_mm.errors import UserError

from .test_deploy import FAMILIES_BY_NAME, calibrated

onnx = pytest.importorskip('onnx', reason="needs pip install 'psaq_mm[deploy]'")
ort = pytest.importorskip('onnxruntime')


@pytest.mark.parametrize('family, dynamic', [('mmdet_swin', True), ('mmseg_vit_pyramid', False)])
def test_products_and_convolutions_run_in_integers(family, dynamic, tmp_path):
    from psaq_mm.deploy.runtime import OnnxRuntimeSession
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 64)
    model = calibrated(FAMILIES_BY_NAME[family]().eval(), {}, images)
    item, floats = reference(model, Features(model), (images[:1], ), same_roundings=False), {}
    for preset in ('asymmetric', 'onnxruntime'):
        path = tmp_path / f'{preset}.onnx'
        export_graph(model, path, (64, 64), dynamic, Form(preset, images=images.split(1)))
        session = OnnxRuntimeSession(str(path), 1)
        floats[preset] = [name for name, integer in session.products().items() if not integer]
        found = session.run(dict(images=images[:1].numpy()))
        for ours, theirs, mark in zip(item.quantized, found, item.required, strict=True):
            assert sqnr(ours, torch.from_numpy(theirs)) > mark
    left = [name for name in floats['onnxruntime'] if 'ConvTranspose' not in name]
    assert len(left) == 1 and 'patch_embed' in left[0], 'it reads pixels'
    assert len(floats['asymmetric']) > 5 or family != 'mmdet_swin'


def graph_of(*tail):
    """A convolution on integers with a bias, and what follows: nodes from 'y' on, and the names of outputs."""
    helper, (nodes, outputs) = onnx.helper, tail
    rng = np.random.default_rng(0)
    stored = dict(weight=rng.integers(-127, 128, (4, 8, 3, 3)).astype(np.int8), weight_scale=np.float32(0.01),
                  weight_zero=np.int8(0), scale=np.float32(0.02), zero=np.uint8(128),
                  bias=rng.standard_normal(4).astype(np.float32))
    body = [helper.make_node('QuantizeLinear', ['x', 'scale', 'zero'], ['x_integers']),
            helper.make_node('DequantizeLinear', ['x_integers', 'scale', 'zero'], ['x_float']),
            helper.make_node('DequantizeLinear', ['weight', 'weight_scale', 'weight_zero'], ['weight_float']),
            helper.make_node('Conv', ['x_float', 'weight_float', 'bias'], ['y']), *nodes]
    value = helper.make_tensor_value_info
    return helper.make_model(helper.make_graph(
        body, 'graph', [value('x', 1, [1, 8, 8, 8])], [value(name, 1, [1, 4, 6, 6]) for name in outputs],
        [onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in stored.items()]),
        opset_imports=[helper.make_opsetid('', 17)], ir_version=8)


def feeds(count=3):
    rng = np.random.default_rng(1)
    return [dict(x=rng.standard_normal((1, 8, 8, 8)).astype(np.float32)) for _ in range(count)]


def run(model):
    return ort.InferenceSession(model.SerializeToString()).run(None, feeds()[0])


def test_the_pair_stands_behind_the_relu_and_rounds_to_half_a_step():
    model = graph_of([onnx.helper.make_node('Relu', ['y'], ['z'])], ['z'])
    expected, = run(model)
    assert quantize_convolutions(model, feeds()) == 1
    assert [node.op_type for node in model.graph.node][-3:] == ['Relu', 'QuantizeLinear', 'DequantizeLinear']
    onnx.checker.check_model(model)
    found, = run(model)
    scale = next(onnx.numpy_helper.to_array(item) for item in model.graph.initializer
                 if item.name == 'z_scale_of_output')
    inside = expected < 255 * scale
    assert inside.mean() > 0.95 and expected.max() < 2 * 255 * scale
    assert 0 < np.abs(found - expected)[inside].max() < 0.51 * scale + 1e-5


def test_what_quantizers_alone_read_stays():
    nodes = [onnx.helper.make_node('QuantizeLinear', ['y', 'scale', 'zero'], ['q']),
             onnx.helper.make_node('DequantizeLinear', ['q', 'scale', 'zero'], ['z'])]
    assert quantize_convolutions(graph_of(nodes, ['z']), feeds()) == 0
    assert quantize_convolutions(graph_of(nodes, ['z', 'y']), feeds()) == 1, 'an output reads it, too'


def test_what_reads_pixels_stays():
    model = graph_of([onnx.helper.make_node('Relu', ['y'], ['z'])], ['z'])
    weight = next(item for item in model.graph.initializer if item.name == 'weight')
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight)[:, :3], 'weight'))
    assert quantize_convolutions(model, []) == 0


def test_without_images_it_is_refused(tmp_path):
    model = calibrated(FAMILIES_BY_NAME['mmseg_swin']().eval(), {}, torch.randn(1, 3, 64, 64))
    with pytest.raises(UserError, match='synthetic.pt of the run beside quantized.pth'):
        export_graph(model, tmp_path / 'features.onnx', (64, 64), form=Form('onnxruntime'))


def test_no_other_runtime_runs_it(tmp_path):
    from mmengine.config import Config

    from psaq_mm.deploy import Graph, export
    model = calibrated(FAMILIES_BY_NAME['mmseg_swin']().eval(), {}, torch.randn(1, 3, 64, 64))
    images = (torch.randn(1, 3, 64, 64), )
    export_graph(model, tmp_path / 'features.onnx', (64, 64), form=Form('onnxruntime', images=images))
    Graph(tmp_path / 'features.onnx', 'onnxruntime')
    with pytest.raises(UserError, match="preset 'onnxruntime' and runs in no other.*set runtime to 'onnxruntime'"):
        Graph(tmp_path / 'features.onnx', 'openvino')
    with pytest.raises(UserError, match="preset 'onnxruntime' is for onnxruntime alone"):
        export(Config(dict()), 'quantized.pth', str(tmp_path), runtime='openvino', preset='onnxruntime')


def test_below_8_bits_graph_and_model_are_one(tmp_path):
    """But for last bits of floats: biases that are rounded to integers are 30 dB worse here."""
    from psaq_mm.deploy.runtime import SESSIONS
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 64)
    model = calibrated(FAMILIES_BY_NAME['mmseg_vit_pyramid']().eval(), dict(
        weight=dict(bits=4), activation=dict(bits=4, observer='mse'), targets=['backbone']), images)
    item = reference(model, Features(model), (images[:1], ))
    marks, without = item.required, item._replace(disturbed=[]).required
    assert all(mark >= other for mark, other in zip(marks, without)) and max(marks) > max(without) + 6
    export_graph(model, tmp_path / 'features.onnx', (64, 64))
    for runtime, session in SESSIONS.items():
        pytest.importorskip(runtime)
        session = session(str(tmp_path / 'features.onnx'), 1)
        found = [torch.from_numpy(out) for out in session.run(dict(images=images[:1].numpy()))]
        assert all(sqnr(ours, theirs) > mark for ours, theirs, mark in zip(item.quantized, found, marks, strict=True))
        assert not [name for name, integer in session.products().items() if not integer and 'in_proj' in name]
