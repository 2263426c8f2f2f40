"""Graphs of small functions in both runtimes: for tests of what takes the place of the libraries' functions."""
import io
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from psaq_mm.deploy.library import traceable_library

pytest.importorskip('onnx', reason="needs pip install 'psaq_mm[deploy]'")
ort = pytest.importorskip('onnxruntime')
ov = pytest.importorskip('openvino')


class Calls(nn.Module):
    """A function as a module, with modules whose parameters it uses."""

    def __init__(self, function, *parts):
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)

    def forward(self, *inputs):
        return self.function(*inputs)


def written(function, example, axes=None, parts=()):
    """Return a function's graph, bytes; its inputs are x0, x1, ...

    Args:
        function (Callable): Of tensors.
        example (tuple[Tensor]): To trace with.
        axes (list[Iterable[int]], optional): Which dimensions of each input vary. Default: all, but for the first one
            where that has a length of 1.
        parts (Sequence[nn.Module]): Whose parameters the function uses.
    """
    names = [f'x{i}' for i in range(len(example))]
    axes = axes or [[dim for dim, length in enumerate(value.shape) if dim or length > 1] for value in example]
    varying = {name: {dim: f'{name}_{dim}' for dim in dims} for name, dims in zip(names, axes)}
    stream = io.BytesIO()
    with warnings.catch_warnings(), traceable_library():
        warnings.simplefilter('ignore')
        torch.onnx.export(Calls(function, *parts).eval(), example, stream, dynamo=False, opset_version=17,
                          input_names=names, dynamic_axes=varying)
    return stream.getvalue()


def runs(function, example, axes=None, parts=()):
    """Return what runs a function's graph, in ONNX Runtime and in OpenVINO: from tensors to a list of arrays.

    Args:
        function, example, axes, parts: As of :func:`written`.
    """
    graph = written(function, example, axes, parts)
    options, core = ort.SessionOptions(), ov.Core()
    options.log_severity_level = 4
    session = ort.InferenceSession(graph, options, providers=['CPUExecutionProvider'])
    compiled = core.compile_model(core.read_model(io.BytesIO(graph)), 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    read = [value.name for value in session.get_inputs()]

    def feed(inputs):
        named = {f'x{i}': np.asarray(value) for i, value in enumerate(inputs)}
        return {name: named[name] for name in read}

    return [lambda *inputs: session.run(None, feed(inputs)), lambda *inputs: list(compiled(feed(inputs)).values())]


def adapted(function, *inputs):
    """Return what a function computes with the libraries' functions replaced."""
    with traceable_library():
        return function(*inputs)
