"""From a graph of one image to one of a batch: rows are those of single images, filled up."""
import io

import numpy as np
import pytest
import torch
from torch import nn

from psaq_mm.deploy.batches import loop_over_images

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
    from psaq_mm.deploy.runtime import SESSIONS
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
