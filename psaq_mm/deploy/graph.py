"""Parts of a quantized model - backbone and neck as one, each head - as ONNX in QDQ form, weights stored as int8."""
from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import nn

from ..classification import Classifier
from ..errors import UserError
from ..models.features import FEATURE_PARTS, image_features, tensors
from ..quantization import QuantizedLinear, quantized_layers, quantizers
from ..quantization.layers import QuantizedLayer
from ..quantization.quantizer import Mode, UncalibratedError
from ..version import __version__
from .adapters import traceable
from .extras import need
from .operators import Dequantize, Linear, activation, integers_of

OPSET = 17  # the first with LayerNormalization; QuantizeLinear has had an axis since 13
INPUT = 'images'
PRESETS = ('asymmetric', 'symmetric')


@contextmanager
def exportable(model: nn.Module) -> Iterator[None]:
    """Within it, quantized layers compute on stored integers, and quantizers become QuantizeLinear in a graph."""
    changed = []

    def shadow(module, name, function):
        setattr(module, name, function)
        changed.append((module, name))

    for name, quantizer in quantizers(model).items():
        if quantizer.mode is Mode.QUANTIZE and not name.endswith('weight_quantizer'):
            shadow(quantizer, 'forward', partial(activation, quantizer))
    for name, layer in quantized_layers(model).items():
        quantizer = getattr(layer, 'weight_quantizer', None)
        if quantizer is None or quantizer.mode is not Mode.QUANTIZE:
            continue
        if quantizer.zero_point.any():
            raise UserError(f"'{name}': asymmetric weights cannot be exported, int8 kernels want zero point 0. "
                            'Quantize with quantization.weight.symmetric = True (the default)')
        integers, axis = integers_of(quantizer, layer.weight.detach()), quantizer.axis
        scale = quantizer.scale.expand(layer.weight.shape[axis])
        transposed = isinstance(layer, QuantizedLinear)  # stored as the product takes it
        inputs = layer.input_quantizer
        if transposed and layer.bias is not None and inputs is not None and inputs.scale.numel() == 1:
            # ONNX Runtime has no int8 kernel for a bias in float: int32, in units of both scales
            units = inputs.scale * quantizer.scale
            values = (layer.bias.detach() / units).round()
            if values.abs().max() < 2**31:
                layer.bias_scale = units.expand(len(values))
                layer.register_buffer('bias_integers', values.to(torch.int32))
                changed.extend([(layer, 'bias_integers'), (layer, 'bias_scale')])
        layer.register_buffer('integers', integers.T.contiguous() if transposed else integers)
        changed.append((layer, 'integers'))
        if transposed:

            def linear(x, weight, bias, layer=layer, scale=scale):
                if layer.input_quantizer is not None:
                    x = layer.input_quantizer(x)
                unit = getattr(layer, 'units', torch.ones(1))  # see operators.in_units
                if bias is not None and hasattr(layer, 'bias_integers'):
                    bias = Dequantize.apply(layer.bias_integers, tuple((layer.bias_scale / unit).tolist()), 0)
                elif bias is not None:
                    bias = bias / unit
                return Linear.apply(x, layer.integers, tuple((scale / unit).tolist()), bias)

            shadow(layer, 'linear', linear)
        else:
            shadow(quantizer, 'forward', lambda weight, layer=layer, scale=scale, axis=axis: Dequantize.apply(
                layer.integers, tuple(scale.tolist()), axis))
    try:
        yield
    finally:
        for module, name in changed:
            delattr(module, name)


class Features(nn.Module):
    """What is exported first: images to feature maps of backbone and neck; of a classifier, to logits."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        if isinstance(self.model, Classifier):
            return (self.model.logits(images), )
        return tuple(tensors(image_features(self.model, images)))


def check_calibrated(model: nn.Module) -> None:
    """Refuses a model that cannot be deployed.

    Raises:
        UserError: If it has no quantizers.
        UncalibratedError: If one of them has no scale.
    """
    found = quantizers(model)
    if not found:
        raise UserError('the model is not quantized: give the test_config.py and quantized.pth that tools/dfq.py wrote')
    missing = [name for name, quantizer in found.items() if not quantizer.calibrated]
    if missing:
        raise UncalibratedError(f"the checkpoint has no scale for '{missing[0]}' (and {len(missing) - 1} more): it is "
                                'a full-precision one. Run tools/dfq.py first and give the quantized.pth it writes')


def check_preset(model: nn.Module, preset: str) -> None:
    """Refuses activations that a preset cannot express.

    Raises:
        UserError: If the preset is unknown, or 'symmetric' and a zero point is not 0.
    """
    if preset not in PRESETS:
        raise UserError(f"preset '{preset}': must be one of {', '.join(PRESETS)}")
    if preset == 'symmetric':
        asymmetric = [name for name, q in quantizers(model).items() if q.quant_min >= 0]
        if asymmetric:
            raise UserError(
                f"preset 'symmetric' (TensorRT) needs zero points of 0, but '{asymmetric[0]}' (and "
                f'{len(asymmetric) - 1} more) has an unsigned grid: quantize again with '
                'quantization.activation.symmetric=True')


def write(network: nn.Module, inputs: tuple, path, input_names, output_names, axes, notes: dict, name: str) -> None:
    """Traces a network and writes the graph, BatchNorm folded.

    Raises:
        UserError: If there is something that ONNX does not know.
    """
    onnx = need('onnx')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # the tracer's, about Python numbers that are the same at every size
        try:
            torch.onnx.export(network, inputs, str(path), dynamo=False, opset_version=OPSET, input_names=input_names,
                              output_names=output_names, dynamic_axes=axes)
        except torch.onnx.errors.OnnxExporterError as error:
            raise UserError(f'{name} cannot be exported to ONNX: {error}') from None
    graph = onnx.load(str(path))
    onnx.helper.set_model_props(graph, dict(psaq_mm=__version__, **notes))
    fold_batch_norm(graph)
    onnx.checker.check_model(graph)
    onnx.save(graph, str(path))


@torch.no_grad()
def export_graph(model: nn.Module, path, size: tuple[int, int], dynamic: bool = False, preset: str = 'asymmetric',
                 integers: bool = True) -> None:
    """Writes backbone and neck as ONNX.

    Args:
        model (nn.Module): Quantized and calibrated, on CPU; or any float model with ``integers=False``.
        path (str | Path): The file to write.
        size (tuple[int, int]): (H, W) of the images, in dynamic graphs that of the trace.
        dynamic (bool): Whether the graph takes other sizes. Defaults to False.
        preset (str): 'asymmetric' or 'symmetric' activations.
        integers (bool): Whether to export what quantizers do. Defaults to True.

    Raises:
        UserError: If the model cannot be exported that way.
    """
    if integers:
        check_calibrated(model)
        check_preset(model, preset)
    model.eval()
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    features = Features(model).eval()  # the exporter brings the wrapper's mode to all of the model
    names = [f'feature_{i}' for i in range(len(features(images)))]
    axes = {INPUT: {2: 'height', 3: 'width'}, **{n: {2: f'{n}_height', 3: f'{n}_width'} for n in names}}
    with traceable(model), exportable(model) if integers else nullcontext():
        notes = dict(preset=preset, dynamic=str(dynamic), size=json.dumps(list(size)))
        kind = type(model.backbone).__name__
        write(features, (images, ), path, [INPUT], names, axes if dynamic else None, notes, kind)


def fold_batch_norm(graph) -> int:
    """Multiplies each BatchNormalization behind a convolution with stored integers into scales and bias; in place.

    Exact, as weights have a scale for each output channel; where the factor is negative the integers change sign.

    Args:
        graph (onnx.ModelProto): The model.

    Returns:
        int: How many there were.
    """
    import numpy as np
    onnx = need('onnx')
    helper, graph = onnx.numpy_helper, graph.graph
    initializers = {item.name: item for item in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    readers = Counter(name for node in graph.node for name in node.input)

    def value(name):
        node = makers.get(name)
        while node is not None and node.op_type == 'Identity':  # of equal tensors the exporter stores one
            name = node.input[0]
            node = makers.get(name)
        if name in initializers:
            return helper.to_array(initializers[name])
        return helper.to_array(node.attribute[0].t) if node is not None and node.op_type == 'Constant' else None

    def new(name, array):
        graph.initializer.append(helper.from_array(array, name))
        return name

    folded = []
    for norm in [node for node in graph.node if node.op_type == 'BatchNormalization']:
        convolution = makers.get(norm.input[0])
        if convolution is None or convolution.op_type not in ('Conv', 'ConvTranspose') or readers[norm.input[0]] > 1:
            continue
        weight = makers.get(convolution.input[1])
        if weight is None or weight.op_type != 'DequantizeLinear' or value(weight.input[0]) is None:
            continue
        gamma, beta, mean, variance = map(value, norm.input[1:])
        integers, scale = value(weight.input[0]), value(weight.input[1])
        axis = next(a.i for a in weight.attribute if a.name == 'axis')
        if len(scale) != len(gamma):  # a transposed convolution in groups shares scales
            continue
        epsilon = next((a.f for a in norm.attribute if a.name == 'epsilon'), 1e-5)
        factor = gamma / np.sqrt(variance + epsilon)
        shape = [-1 if i == axis else 1 for i in range(integers.ndim)]
        bias = value(convolution.input[2]) if len(convolution.input) > 2 else np.zeros_like(beta)
        prefix = f'{weight.input[0]}_folded'
        weight.input[0] = new(prefix, np.where(factor.reshape(shape) < 0, np.maximum(integers, -127) * -1, integers
                                               ).astype(np.int8))
        weight.input[1] = new(f'{prefix}_scale', np.maximum(scale * np.abs(factor), 1e-30).astype(np.float32))
        del convolution.input[2:]
        convolution.input.append(new(f'{prefix}_bias', ((bias - mean) * factor + beta).astype(np.float32)))
        convolution.output[0] = norm.output[0]
        folded.append(norm)
    for norm in folded:
        graph.node.remove(norm)
    while True:  # what only they read
        used = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
        idle = [node for node in graph.node if not any(output in used for output in node.output)]
        for node in idle:
            graph.node.remove(node)
        if not idle:
            break
    for item in [item for item in graph.initializer if item.name not in used]:
        graph.initializer.remove(item)
    return len(folded)


def float_layers(model: nn.Module) -> list[str]:
    """Names of linear layers and convolutions inside backbone and neck that the stanza keeps in float."""
    kinds = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
    parts = [(name, part) for name, part in model.named_children() if name in FEATURE_PARTS]
    return [f'{part}.{name}' for part, owner in parts for name, module in owner.named_modules()
            if isinstance(module, kinds) and not isinstance(module, QuantizedLayer)]
