"""Graphs that TensorRT's parser takes: the rules, what breaks them, and engines, as far as they go without a GPU."""
import json

import numpy as np
import pytest
import torch
from torch import nn

from psaq_mm.deploy.check import packed
from psaq_mm.deploy.engine import build_engine, compared
from psaq_mm.deploy.graph import Features, Form, export_graph
from psaq_mm.deploy.predictor import predictor_of
from psaq_mm.deploy.runtime import SESSIONS
from psaq_mm.deploy.tensorrt import RULES, check_for_tensorrt, fold_sizes, for_tensorrt, violations
from psaq_mm.deploy.whole import complete, write_graph
from psaq_mm.errors import UserError

from .conftest import ROOT
from .test_card import model_of
from .test_deploy import calibrated, run_tool, sqnr

onnx = pytest.importorskip('onnx')
helper, kinds = onnx.helper, onnx.TensorProto


def model(nodes, stored=None, shape=(2, 3), kind=kinds.FLOAT, opset=17, others=()):
    """A graph from x to y."""
    graph = helper.make_graph(nodes, 'g', [helper.make_tensor_value_info('x', kind, shape)],
                              [helper.make_tensor_value_info('y', 0, None)],
                              [onnx.numpy_helper.from_array(np.asarray(value), name)
                               for name, value in (stored or {}).items()])
    return helper.make_model(graph, opset_imports=[
        helper.make_opsetid('', opset), *(helper.make_opsetid(name, 1) for name in others)])


def node(kind, *inputs, output='y', **attributes):
    return helper.make_node(kind, inputs, [output], name=f'{kind}_{output}', **attributes)


ONE, ZERO, SIGNED = np.float32(0.1), np.uint8(0), np.int8(0)
BAD = [
    ('opset', model([node('Relu', 'x')], opset=8)),
    ('operator', model([node('Gelu', 'x', domain='com.microsoft')], others=['com.microsoft'])),
    ('operator', model([node('Det', 'x')])),
    ('type', model([node('Transpose', 'x')], kind=kinds.UINT8)),
    ('type', model([node('Cast', 'x', output='b', to=kinds.BOOL), node('NonZero', 'b')])),
    ('uint8', model([node('ArgMax', 'x', output='i'), node('Cast', 'i', to=kinds.UINT8)])),
    ('uint8', model([node('Cast', 'x', to=kinds.INT64)], kind=kinds.UINT8)),
    ('uint8', model([node('Cast', 'x', output='b', to=kinds.UINT8), node('Cast', 'b', to=kinds.FLOAT)])),
    ('zero_point', model([node('QuantizeLinear', 'x', 's', 'z')], dict(s=ONE, z=ZERO))),
    ('zero_point', model([node('QuantizeLinear', 'x', 's', 'z')], dict(s=ONE, z=np.int8(3)))),
    ('zero_point', model([node('QuantizeLinear', 'x', 's')], dict(s=ONE))),
    ('scale', model([node('QuantizeLinear', 'x', 's', 'z')], dict(s=np.float32(-1), z=SIGNED))),
    ('pair', model([node('QuantizeLinear', 'x', 's', 'z', output='q'), node('Transpose', 'q', output='t'),
                    node('DequantizeLinear', 't', 's', 'z')], dict(s=ONE, z=SIGNED))),
    ('pair', model([node('DequantizeLinear', 'w', 's', 'z')], dict(w=np.int32([3]), s=ONE, z=np.int32(0)))),
    ('constant', model([node('Shape', 'x', output='s'), node('Unsqueeze', 'x', 's')], shape=('a', 'b'))),
    ('top_k', model([helper.make_node('TopK', ['x', 'k'], ['y', 'i'])], dict(k=np.int64([4000])))),
    ('top_k', model([node('Shape', 'x', output='s'), node('Slice', 's', 'o', 't', output='k'),
                     helper.make_node('TopK', ['x', 'k'], ['y', 'i'])], dict(o=np.int64([1]), t=np.int64([2])),
                    shape=(2, 'n'))),
    ('granularity', model([node('QuantizeLinear', 'x', 's', 'z')], dict(s=np.float32([0.1, 0.2, 0.3]),
                                                                        z=np.int8([0, 0, 0])))),
    ('top_k', model([helper.make_node('TopK', ['x', 'k'], ['y', 'i'], sorted=0)], dict(k=np.int64([2])))),
    ('resize', model([node('Resize', 'x', '', 's', mode='cubic')], dict(s=np.float32([1, 2])))),
    ('scatter', model([node('ScatterND', 'x', 'i', 'u', reduction='add')],
                      dict(i=np.int64([[0]]), u=np.float32([[1, 2, 3]])))),
    ('static', model([node('Relu', 'x')], shape=(1, 'height'))),
]


@pytest.mark.parametrize('rule, graph', BAD, ids=[f'{i}-{rule}' for i, (rule, _) in enumerate(BAD)])
def test_what_breaks_a_rule_is_named(rule, graph):
    found = violations(graph, static=True)
    assert rule in [item.rule for item in found], found
    demand, source = RULES[rule]
    text = str(next(item for item in found if item.rule == rule))
    assert demand in text and source in text
    with pytest.raises(UserError, match='TensorRT'):
        check_for_tensorrt(graph, static=True)


def test_every_rule_is_seen_to_be_broken():
    body = helper.make_graph(
        [node('Identity', 'on', output='still'), node('NonZero', 'x', output='row')], 'body',
        [helper.make_tensor_value_info('i', kinds.INT64, []), helper.make_tensor_value_info('on', kinds.BOOL, [])],
        [helper.make_tensor_value_info('still', kinds.BOOL, []),
         helper.make_tensor_value_info('row', kinds.INT64, [2, None])])
    graph = model([helper.make_node('Loop', ['n', ''], ['y'], body=body)], dict(n=np.int64(2)))
    assert [item.rule for item in violations(graph)] == ['loop']
    assert {rule for rule, _ in BAD} | {'loop'} == set(RULES)


def test_pairs_of_signed_integers_break_none():
    graph = model([node('QuantizeLinear', 'x', 's', 'z', output='q'),
                   node('DequantizeLinear', 'q', 's', 'z', output='a'),
                   node('DequantizeLinear', 'w', 's', 'z', output='b'), node('MatMul', 'a', 'b')],
                  dict(s=ONE, z=SIGNED, w=np.ones((3, 4), np.int8)))
    assert not violations(graph, static=True)


def test_a_number_of_the_best_that_is_limited_breaks_none():
    nodes = [node('Shape', 'x', output='s'), node('Slice', 's', 'o', 't', output='n'),
             node('Min', 'n', 'l', output='m'), node('Cast', 'm', output='k', to=kinds.INT64),
             helper.make_node('TopK', ['x', 'k'], ['y', 'i'])]
    stored = dict(o=np.int64([1]), t=np.int64([2]), l=np.int64([1000]))
    assert not violations(model(nodes, stored, shape=(2, 'n')))
    assert violations(model(nodes, dict(stored, l=np.int64([4000])), shape=(2, 'n')))[0].what == 'K is up to 4000'


def test_labels_become_bytes_by_way_of_floats():
    graph = model([node('ArgMax', 'x', output='i', axis=1), node('Cast', 'i', to=kinds.UINT8)], shape=(2, 200))
    assert [item.rule for item in violations(graph)] == ['uint8']
    for_tensorrt(graph)
    assert not violations(graph)
    graph.graph.output[0].type.tensor_type.elem_type = kinds.UINT8
    session = pytest.importorskip('onnxruntime').InferenceSession(graph.SerializeToString())
    x = np.random.default_rng(0).random((2, 200), np.float32)
    found, = session.run(None, dict(x=x))
    assert found.dtype == np.uint8 and (found[:, 0] == x.argmax(1)).all()


def test_a_graph_for_one_size_must_be_static(monkeypatch, tmp_path):
    """And is held to that when it is written."""
    from psaq_mm.deploy import graph as graphs
    seen = []
    monkeypatch.setattr(graphs, 'check_for_tensorrt', lambda model, static=False: seen.append(static))
    for axes in (None, {'y': {1: 'n'}}, {'x': {1: 'n'}}):
        graphs.write(nn.Linear(4, 3), (torch.zeros(2, 4), ), tmp_path / 'g.onnx', ['x'], ['y'], axes, {}, 'Linear',
                     Form('symmetric'))
    assert seen == [True, True, False]


def test_sizes_are_computed_in_advance():
    """And nothing else: what the graph computes stays the same."""

    class Halves(nn.Module):
        def forward(self, x):
            height, width = x.shape[2:]
            x = nn.functional.interpolate(x, (height // 2 + 1, width * 3 // 2), mode='bilinear')
            return x.reshape(x.shape[0], -1, x.shape[3]), (x > 0.5).nonzero()

    import io
    stream, x = io.BytesIO(), torch.rand(1, 2, 9, 12)
    torch.onnx.export(Halves(), (x, ), stream, dynamo=False, opset_version=17, input_names=['x'],
                      output_names=['y', 'places'], do_constant_folding=False)
    graph = onnx.load_model_from_string(stream.getvalue())
    before = len(graph.graph.node)
    for_tensorrt(graph)
    assert len(graph.graph.node) < before and 'Shape' not in [item.op_type for item in graph.graph.node]
    assert not violations(graph, static=True)
    session = pytest.importorskip('onnxruntime').InferenceSession(graph.SerializeToString())
    for ours, theirs in zip(session.run(None, dict(x=x.numpy())), Halves()(x), strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-6)
    assert fold_sizes(graph) == 0


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """For each demo the quantized model, and its features and the whole of it as TensorRT takes them."""
    found = {}
    for task in ('detection', 'segmentation', 'classification'):
        folder, (cfg, float_model) = tmp_path_factory.mktemp(task), model_of(task)
        size = (96, 96) if task == 'classification' else (128, 160)
        torch.manual_seed(0)
        quantized = calibrated(float_model, dict(activation=dict(symmetric=True)), torch.randn(2, 3, *size),
                               task == 'classification')
        export_graph(quantized, folder / 'features.onnx', size, form=Form('symmetric'))
        predictor = predictor_of(quantized, cfg).eval()
        images = torch.randint(0, 255, (1, *size, 3), dtype=torch.uint8)
        write_graph(predictor, folder / 'model.onnx', images, False, Form('symmetric'))
        complete(folder / 'model.onnx', predictor, Form('symmetric'))
        found[task] = folder, quantized, predictor, images
    return found


@pytest.mark.parametrize('task', ['detection', 'segmentation', 'classification'])
def test_demos_break_no_rule(exported, task):
    folder, quantized, predictor, images = exported[task]
    for name in ('features.onnx', 'model.onnx'):
        assert not violations(onnx.load(str(folder / name)), static=True)
    x = torch.randn(1, 3, *images.shape[1:3], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = Features(quantized)(x)
    for runtime in ('onnxruntime', 'openvino'):
        pytest.importorskip(runtime)
        found = SESSIONS[runtime](str(folder / 'features.onnx'), 1).run(dict(images=x.numpy()))
        for ours, theirs in zip(expected, found, strict=True):
            assert sqnr(ours, torch.from_numpy(theirs)) > 20


def test_the_other_preset_breaks_rules(tmp_path):
    _, float_model = model_of('classification')
    quantized = calibrated(float_model, {}, torch.randn(2, 3, 96, 96), True)
    export_graph(quantized, tmp_path / 'features.onnx', (96, 96))
    assert 'zero_point' in {item.rule for item in violations(onnx.load(str(tmp_path / 'features.onnx')))}


class Session:
    """ONNX Runtime in the place of TensorRT, which needs a GPU."""
    engine = b'engine'

    def __init__(self, path):
        self.session = SESSIONS['onnxruntime'](path, 1)
        self.names = [output.name for output in onnx.load(path).graph.output]

    def run(self, inputs):
        return dict(zip(self.names, self.session.run(inputs)))


class Wrong(Session):
    def run(self, inputs):
        return {name: value * 0 for name, value in super().run(inputs).items()}


def test_an_engine_is_held_against_its_graph(exported, tmp_path):
    graph, target = exported['detection'][0] / 'model.onnx', tmp_path / 'model.engine'
    assert 'agree' in build_engine(graph, target, Session) and target.read_bytes() == b'engine'
    with pytest.raises(UserError, match='is there already'):
        build_engine(graph, target, Session)
    target.unlink()
    with pytest.raises(UserError, match='computes .* wrongly'):
        build_engine(graph, target, Wrong)
    assert not target.exists()


def test_an_engine_is_compared_on_what_the_export_was_checked_with(exported, tmp_path, monkeypatch):
    graph = exported['detection'][0] / 'model.onnx'
    shape = [axis.dim_value for axis in onnx.load(str(graph)).graph.input[0].type.tensor_type.shape.dim]
    given = []

    def run(inputs):
        given.append(inputs['images'])
        return Session(str(path)).run(inputs)

    path = tmp_path / 'model.onnx'
    path.write_bytes(graph.read_bytes())
    assert 'to noise (model.json has no check image) agree' in compared(run, path)[0]
    image = torch.randint(0, 255, (1, *shape[1:]), dtype=torch.uint8).numpy()
    check = dict(size=shape[1:3], content=packed(dict(image=image[0])))
    (tmp_path / 'model.json').write_text(json.dumps(dict(check=check)))
    text, good = compared(run, path)
    assert good and 'to the image of model.json' in text and np.array_equal(given[1], image)
    monkeypatch.setattr('psaq_mm.deploy.engine.anything', lambda *args: False)
    assert 'in which there is no object' in compared(run, path)[0]


def test_errors_are_one_line(exported, tmp_path):
    done = run_tool(ROOT / 'tools' / 'tensorrt_engine.py', tmp_path / 'none.onnx', check=False)
    assert done.returncode == 2 and 'none.onnx does not exist: write it with tools/export.py' in done.stderr
    pytest.importorskip('onnx')
    try:
        import tensorrt  # noqa: F401
    except ImportError:
        graph = exported['classification'][0] / 'model.onnx'
        done = run_tool(ROOT / 'tools' / 'tensorrt_engine.py', graph, check=False)
        assert done.returncode == 2 and "pip install 'psaq_mm[tensorrt]'" in done.stderr
    (tmp_path / 'open.onnx').write_bytes(BAD[-1][1].SerializeToString())
    done = run_tool(ROOT / 'tools' / 'tensorrt_engine.py', tmp_path / 'open.onnx', check=False)
    assert done.returncode == 2 and '--preset symmetric --size H W' in done.stderr
    assert not list(tmp_path.glob('*.engine'))


def test_batches_are_refused_early(tmp_path):
    from mmengine.config import Config

    from psaq_mm.deploy import export
    with pytest.raises(UserError, match="preset 'symmetric': TensorRT gets graphs for one image.*leave --batch out"):
        export(Config(dict()), 'quantized.pth', str(tmp_path), preset='symmetric', batch=True)
