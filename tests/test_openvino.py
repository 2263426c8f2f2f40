"""Graphs that get round faults of OpenVINO."""
import numpy as np
import pytest
import torch

from psaq_mm.deploy.agreement import sqnr
from psaq_mm.deploy.graph import stored_arrays
from psaq_mm.deploy.openvino import widen_patches

onnx = pytest.importorskip('onnx', reason="needs pip install 'psaq_mm[deploy]'")
pytest.importorskip('onnxruntime')
pytest.importorskip('openvino')


def convolution(channels, kernel, stride, pads=(0, 0, 0, 0), group=1):
    """A convolution to 8 channels, on integers."""
    helper, value, rng = onnx.helper, onnx.helper.make_tensor_value_info, np.random.default_rng(0)
    stored = dict(weight=rng.integers(-127, 128, (8, channels // group, kernel, kernel)).astype(np.int8),
                  weight_scale=rng.uniform(0.001, 0.01, 8).astype(np.float32), weight_zero=np.zeros(8, np.int8),
                  scale=np.float32(0.02), zero=np.uint8(120), bias=rng.standard_normal(8).astype(np.float32))
    body = [helper.make_node('QuantizeLinear', ['x', 'scale', 'zero'], ['x_integers']),
            helper.make_node('DequantizeLinear', ['x_integers', 'scale', 'zero'], ['x_float']),
            helper.make_node('DequantizeLinear', ['weight', 'weight_scale', 'weight_zero'], ['weight_float'], axis=0),
            helper.make_node('Conv', ['x_float', 'weight_float', 'bias'], ['y'], kernel_shape=[kernel, kernel],
                             strides=[stride, stride], pads=pads, dilations=[1, 1], group=group)]
    return helper.make_model(helper.make_graph(
        body, 'graph', [value('x', 1, [1, channels, 25, 34])], [value('y', 1, [1, 8, None, None])],
        [onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in stored.items()]),
        opset_imports=[helper.make_opsetid('', 17)], ir_version=8)


@pytest.mark.parametrize('channels, kernel, expected', [(32, 4, 1), (48, 6, 1), (32, 8, 1), (64, 8, 0), (32, 2, 0)])
def test_convolutions_over_patches_are_right_in_both_runtimes(channels, kernel, expected, tmp_path):
    from psaq_mm.deploy.runtime import SESSIONS
    model, path = convolution(channels, kernel, kernel), tmp_path / 'graph.onnx'
    x = dict(x=np.random.default_rng(1).standard_normal((1, channels, 25, 34)).astype(np.float32))
    path.write_bytes(model.SerializeToString())
    reference, = SESSIONS['onnxruntime'](str(path), 1).run(x)
    assert widen_patches(model, stored_arrays(model.graph)) == expected
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    for runtime, session in SESSIONS.items():
        found, = session(str(path), 1).run(x)
        assert sqnr(torch.from_numpy(reference), torch.from_numpy(found)) > 70, runtime


@pytest.mark.parametrize('kind', [dict(stride=2), dict(stride=4, pads=(1, 1, 1, 1)), dict(stride=4, group=2)])
def test_other_convolutions_stay(kind):
    model = convolution(32, 4, **kind)
    before = model.SerializeToString()
    assert widen_patches(model, stored_arrays(model.graph)) == 0 and model.SerializeToString() == before
