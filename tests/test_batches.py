"""From a graph of one image to one of a batch: rows are those of single images, filled up."""
import io

import numpy as np
import pytest
import torch
from torch import nn

from psaq_mm.deploy.answers import single
from psaq_mm.deploy.batches import loop_over_images
from psaq_mm.deploy.graph import Form
from psaq_mm.deploy.predictor import predictor_of
from psaq_mm.deploy.runtime import SESSIONS
from psaq_mm.deploy.whole import complete, export_whole, write_graph
from psaq_mm.errors import UserError

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
