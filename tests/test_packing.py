"""Weights of fewer than 8 bits in a graph: as small as their bits, and the same integers in both runtimes."""
import numpy as np
import pytest

from psaq_mm.deploy.packing import bits_for, pack, pack_weights, planes_of
from psaq_mm.deploy.runtime import RUNTIMES

onnx = pytest.importorskip('onnx')


@pytest.mark.parametrize('bits', range(2, 8))
def test_planes_hold_all_bits(bits):
    assert sum(planes_of(bits)) == bits
    values = np.tile(np.arange(-2**(bits - 1), 2**(bits - 1)), 5)
    packed = pack(values, bits)
    assert all(part.dtype == np.uint8 for part in packed)
    assert sum(map(len, packed)) - len(packed) < len(values) * bits / 8 <= sum(map(len, packed))
    assert bits_for(values) == bits and bits_for(np.int8([127])) == 8


def product(weight, scale):
    """A graph: images (1, rows, in) on 8 bits, times a stored weight."""
    helper, kinds, array = onnx.helper, onnx.TensorProto, onnx.numpy_helper.from_array
    nodes = [helper.make_node('QuantizeLinear', ['images', 'step', 'zero'], ['integers']),
             helper.make_node('DequantizeLinear', ['integers', 'step', 'zero'], ['values']),
             helper.make_node('DequantizeLinear', ['weight', 'scale', 'zeros'], ['float_weight'], axis=1),
             helper.make_node('MatMul', ['values', 'float_weight'], ['product'])]
    stored = [array(np.float32(0.03), 'step'), array(np.uint8(128), 'zero'), array(weight, 'weight'),
              array(scale, 'scale'), array(np.zeros(len(scale), np.int8), 'zeros')]
    ends = [helper.make_tensor_value_info(name, kinds.FLOAT, [1, 5, width])
            for name, width in (('images', len(weight)), ('product', len(scale)))]
    graph = helper.make_graph(nodes, 'product', ends[:1], ends[1:], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=9)


@pytest.mark.parametrize('runtime', RUNTIMES)
@pytest.mark.parametrize('bits', range(2, 8))
def test_a_packed_weight_is_the_same_weight(bits, runtime, tmp_path):
    pytest.importorskip(runtime)
    from psaq_mm.deploy.runtime import SESSIONS
    rng = np.random.default_rng(bits)
    weight = rng.integers(-2**(bits - 1), 2**(bits - 1), (255, 129)).astype(np.int8)
    weight[0, 0] = -2**(bits - 1)
    weight *= 2**max(7 - bits, 0) if bits % 2 else 1  # as graphs store them, and as they are
    model = product(weight, rng.random(129).astype(np.float32) + 0.1)
    images = rng.standard_normal((1, 5, 255)).astype(np.float32)
    found, sizes = [], []
    for packed in (False, True):
        if packed:
            assert pack_weights(model) == 1
            onnx.checker.check_model(model)
        path = tmp_path / f'{packed}.onnx'
        path.write_bytes(model.SerializeToString())
        sizes.append(path.stat().st_size)
        session = SESSIONS[runtime](str(path), 1)
        found.append(session.run(dict(images=images))[0])
        assert any(session.products().values())
    np.testing.assert_array_equal(*found)
    assert sizes[0] - sizes[1] > weight.size * (8 - bits) / 8 - 2500  # the operators that unpack


def test_weights_of_8_bits_stay(tmp_path):
    model = product(np.int8([[127, -3]] * 8), np.ones(2, np.float32))
    assert pack_weights(model) == 0
