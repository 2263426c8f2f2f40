"""A finished graph is made small and computes the same."""
import numpy as np
import pytest

from psaq_mm.deploy.compact import compact

onnx = pytest.importorskip('onnx')
helper, kinds = onnx.helper, onnx.TensorProto


def node(kind, inputs, *outputs, **attributes):
    return helper.make_node(kind, inputs, list(outputs), name=f'a/long/name/of/{kind}', **attributes)


def constant(name, value):
    return node('Constant', [], name, value=onnx.numpy_helper.from_array(np.asarray(value)))


def test_it_computes_the_same_with_fewer_bytes():
    """With equal constants, copies, an input left out, constants as outputs, and a loop that reads from outside."""
    two = np.full((20, 20), 2, np.float32)
    body = helper.make_graph(
        [constant('inner', two), node('Add', ['carried', 'inner'], 'added'),
         node('Mul', ['added', 'second/two'], 'new'), node('Identity', ['on'], 'still')], 'body',
        [helper.make_tensor_value_info('i', kinds.INT64, []), helper.make_tensor_value_info('on', kinds.BOOL, []),
         helper.make_tensor_value_info('carried', kinds.FLOAT, [20, 20])],
        [helper.make_tensor_value_info('still', kinds.BOOL, []),
         helper.make_tensor_value_info('new', kinds.FLOAT, [20, 20])])
    graph = helper.make_graph(
        [constant('first/two', two), node('Identity', ['second/two'], 'copy'), constant('fixed', two),
         node('Add', ['x', 'first/two'], 'sum'), node('Clip', ['sum', '', 'most'], 'clipped'),
         node('Mul', ['clipped', 'copy'], 'product'), node('Loop', ['trips', '', 'product'], 'y', body=body)],
        'g', [helper.make_tensor_value_info('x', kinds.FLOAT, [20, 20])],
        [helper.make_tensor_value_info(name, kinds.FLOAT, [20, 20]) for name in ('y', 'fixed')],
        [onnx.numpy_helper.from_array(value, name) for name, value in (
            ('second/two', two), ('most', np.float32(3)), ('trips', np.int64(2)))])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8)
    small = onnx.ModelProto.FromString(model.SerializeToString())
    compact(small)
    onnx.checker.check_model(small)
    assert small.ByteSize() < 0.75 * model.ByteSize()  # one of four is a copy
    assert [value.name for value in (*small.graph.input, *small.graph.output)] == ['x', 'y', 'fixed']
    assert max(len(name) for node in small.graph.node for name in (*node.input, *node.output)) <= 5
    x = np.random.default_rng(0).standard_normal((20, 20)).astype(np.float32)
    ort = pytest.importorskip('onnxruntime')
    ours, theirs = (ort.InferenceSession(one.SerializeToString(), providers=['CPUExecutionProvider']).run(
        None, dict(x=x)) for one in (small, model))
    assert all(map(np.array_equal, ours, theirs))
