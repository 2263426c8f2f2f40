"""From a graph of one image to one of a batch: rows are those of single images, filled up."""
import io

import numpy as np
import pytest
import torch
from torch import nn

from psaq_mm.deploy.answers import agreement, single
from psaq_mm.deploy.batches import loop_over_images
from psaq_mm.deploy.graph import Form
from psaq_mm.deploy.predictor import predictor_of
from psaq_mm.deploy.runtime import SESSIONS
from psaq_mm.deploy.whole import as_traced, complete, export_whole, write_graph
from psaq_mm.errors import UserError

from .small_models import pictures, small_model
from .test_card import model_of
from .test_deploy import calibrated

onnx = pytest.importorskip('onnx')


class Bright(nn.Module):
    """Places of an image that are brighter than a threshold, and the map that says so."""

    def forward(self, images):
        maps = images.mean(3) * 2
        places = (maps[0] > 1.5).nonzero()
        return places[None].float(), maps[0][places[:, 0], places[:, 1]][None], places[None, :, 0], maps


@pytest.mark.parametrize('runtime', ['onnxruntime', 'openvino'])
def test_rows_of_a_batch_are_those_of_single_images(runtime, tmp_path):
    pytest.importorskip(runtime)
    stream, names = io.BytesIO(), ['boxes', 'scores', 'labels', 'maps']
    axes = {'images': {0: 'batch', 1: 'height', 2: 'width'}, 'maps': {0: 'batch', 1: 'h', 2: 'w'},
            **{name: {1: 'detections'} for name in names[:3]}}
    torch.onnx.export(Bright(), (torch.rand(1, 6, 5, 3), ), stream, dynamo=False, opset_version=17,
                      input_names=['images'], output_names=names, dynamic_axes=axes)
    model = onnx.load_model_from_string(stream.getvalue())
    loop_over_images(model, ['maps'], names[:3], 40)
    onnx.checker.check_model(model)
    (tmp_path / 'batch.onnx').write_bytes(model.SerializeToString())
    session = SESSIONS[runtime](str(tmp_path / 'batch.onnx'), 1)
    images = torch.rand(3, 4, 7, 3)
    images[1] = 0  # nothing there
    found = session.run(dict(images=images.numpy()))
    assert [value.shape for value in found] == [(3, 40, 2), (3, 40), (3, 40)]
    for row, image in enumerate(images):
        for value, filling, expected in zip(found, (0, 0, -1), Bright()(image[None])):
            count = expected.shape[1]
            np.testing.assert_allclose(value[row, :count], expected[0].numpy(), rtol=1e-5)
            assert (value[row, count:] == filling).all() and count < 40


@pytest.mark.parametrize('runtime', ['onnxruntime', 'openvino'])
def test_a_row_may_be_computed_from_another_by_way_of_what_answers_read(runtime, tmp_path):
    """As levels of a pyramid are: what lies between two rows is computed for the batch, and in the loop once more."""
    pytest.importorskip(runtime)
    helper = onnx.helper
    nodes = [('Relu', ['images'], 'p3'), ('Neg', ['p3'], 'p4_alone'), ('Abs', ['p4_alone'], 'p4'),
             ('Sum', ['p3', 'p4', 'p4_alone'], 'scores')]
    graph = helper.make_graph(
        [helper.make_node(kind, inputs, [output]) for kind, inputs, output in nodes], 'pyramid',
        [helper.make_tensor_value_info('images', 1, ['batch', 4])],
        [helper.make_tensor_value_info('scores', 1, [1, 'detections'])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8)
    loop_over_images(model, ['p3', 'p4'], ['scores'], 5)
    onnx.checker.check_model(model)
    assert [node.op_type for node in model.graph.node if node.op_type in 'Relu Neg Abs Sum'] == ['Relu', 'Neg', 'Abs']
    (tmp_path / 'batch.onnx').write_bytes(model.SerializeToString())
    images = np.float32([[1, -2, 3, 4], [5, 6, -7, 8], [9, 1, 2, 3]])
    found, = SESSIONS[runtime](str(tmp_path / 'batch.onnx'), 1).run(dict(images=images))
    np.testing.assert_array_equal(found, np.pad(images.clip(0), [(0, 0), (0, 1)]))


@pytest.mark.parametrize('name', ['RetinaNet', 'CondInst'])
def test_a_batch_of_a_dense_head_whose_levels_hang_on_each_other(name, tmp_path):
    cfg, model = small_model(name)
    predictor, path, form = predictor_of(model, cfg).eval(), tmp_path / 'batch.onnx', Form(batch=True)
    write_graph(predictor, path, pictures(1, 128, 160), True, form, False)
    complete(path, predictor, form)
    images = pictures(2, 97, 190)
    with torch.no_grad(), as_traced(predictor):
        wanted = [[value.numpy() for value in predictor(image[None])] for image in images]
    for runtime in ('onnxruntime', 'openvino'):
        pytest.importorskip(runtime)
        rows = single(predictor.names, SESSIONS[runtime](str(path), 1).run(dict(images=images.numpy())))
        for found, expected in zip(rows, wanted, strict=True):
            assert expected[0].shape[1] > 3 and agreement(predictor.names, expected, found) > 0.99


@pytest.mark.parametrize('task', ['detection', 'segmentation', 'classification'])
def test_a_batch_is_answered_as_its_images_are(task, tmp_path):
    """By whole models in float: bit for bit in ONNX Runtime."""
    cfg, model = model_of(task)
    predictor = predictor_of(model, cfg).eval()
    size = (96, 96) if task == 'classification' else (112, 144)
    images = torch.randint(0, 255, (3, *size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[1] = 0
    path = tmp_path / 'batch.onnx'
    write_graph(predictor, path, images[:1], task != 'classification', Form(batch=True), False)
    complete(path, predictor, Form(batch=True))
    assert {opset.domain for opset in onnx.load(str(path)).opset_import} == {''}, 'standard operators only'
    for runtime in ('onnxruntime', 'openvino'):
        pytest.importorskip(runtime)
        session = SESSIONS[runtime](str(path), 1)
        rows = single(predictor.names, session.run(dict(images=images.numpy())))
        assert len(rows) == 3
        for i, row in enumerate(rows):
            alone, = single(predictor.names, session.run(dict(images=images[i:i + 1].numpy())))
            for found, expected in zip(row, alone, strict=True):
                if runtime == 'onnxruntime':
                    assert np.array_equal(found, expected)
                else:
                    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    if task == 'detection':
        assert len({row[0].shape[1] for row in rows}) > 1, 'as many objects in each'


def test_rows_need_a_limit():
    cfg, model = model_of('detection')
    predictor = predictor_of(model, cfg)
    assert predictor.limit() == model.test_cfg.rcnn.max_per_img
    del model.test_cfg.rcnn['max_per_img']
    with pytest.raises(UserError, match='max_per_img'):
        predictor.limit()


def test_a_model_of_one_size_is_exported_for_that(tmp_path):
    cfg, model = model_of('classification')
    model = calibrated(model, {}, torch.randn(2, 3, 96, 96), True)
    images = torch.randint(0, 255, (1, 96, 96, 3), dtype=torch.uint8)
    found = export_whole(predictor_of(model, cfg).eval(), tmp_path, images, False, ['onnxruntime'])
    assert found.size == (96, 96) and "doesn't match model (96)" in found.reason and found.file.is_file()
