"""Parts of a quantized model - backbone and neck as one, each head - as ONNX in QDQ form, weights stored as int8."""
from __future__ import annotations

import io
import itertools
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch import nn

from ..classification import Classifier
from ..errors import UserError
from ..files import write_atomically
from ..models import backbone_of, image_channels
from ..models.features import FEATURE_PARTS, image_features, tensors
from ..quantization import QuantizedLinear, quantized_layers, quantizer_mode, quantizers
from ..quantization.layers import SEPARATE, QuantizedLayer, QuantizedMatMul, QuantizedProjection
from ..quantization.quantizer import Mode, UncalibratedError
from ..version import __version__
from .adapters import ConstantResizing, traceable
from .convolutions import quantize_convolutions
from .extras import need
from .openvino import separate_readers, widen_patches
from .operators import Dequantize, Linear, activation, head_product, integers_of
from .tensorrt import check_for_tensorrt, for_tensorrt

OPSET = 17  # the first with LayerNormalization; QuantizeLinear has had an axis since 13
INPUT = 'images'
# Weights of fewer bits are stored as multiples of a power of 2 up to so many: the same weights, with smaller scales, in
# units of which biases are rounded to integers. With 8 bits, sums of two products overflow 16 on CPUs without VNNI.
STORED_BITS = 7
PRESETS = ('asymmetric', 'symmetric', 'onnxruntime')


class Form(NamedTuple):
    """What a graph is to be like.

    Args:
        preset (str): Of PRESETS: 'asymmetric', what OpenVINO has the best kernels for; 'symmetric', what TensorRT's
            parser takes; 'onnxruntime', with operands of attention products without a sign, and outputs of
            convolutions on integers, too: what ONNX Runtime has int8 kernels for.
        batch (bool): Whether it takes any number of images at once.
        images (tuple[Tensor]): As the graph takes them, for one size if the graph does. 'onnxruntime' measures on them
            in which range convolutions put out.
    """
    preset: str = 'asymmetric'
    batch: bool = False
    images: tuple = ()

    @property
    def same_roundings(self) -> bool:
        """Whether the graph rounds what the fake-quantized model does, and no more."""
        return self.preset != 'onnxruntime'


ASYMMETRIC = Form()


@contextmanager
def exportable(model: nn.Module, preset: str = 'asymmetric') -> Iterator[None]:
    """Within it, quantized layers compute on stored integers, and quantizers become QuantizeLinear in a graph.

    Args:
        model (nn.Module): Quantized and calibrated.
        preset (str): With 'symmetric' biases stay in float, and integers are not moved: TensorRT's parser takes no
            DequantizeLinear of int32, and no other operators on int8. With 'onnxruntime' activations have no sign:
            ONNX Runtime has no kernel on x86 for two operands that have one.
    """
    changed = []

    def shadow(module, name, function):
        setattr(module, name, function)
        changed.append((module, name))

    for name, quantizer in quantizers(model).items():
        if quantizer.mode is Mode.QUANTIZE and not name.endswith('weight_quantizer'):
            shadow(quantizer, 'forward', partial(activation, quantizer))
            shadow(quantizer, 'paired', preset == 'symmetric')
            shadow(quantizer, 'unsigned', preset == 'onnxruntime')
            # OpenVINO has no kernel for products of two activations with a zero point
            shadow(quantizer, 'signed', preset == 'asymmetric' and name.endswith(('a_quantizer', 'b_quantizer')))
    for product in model.modules():
        quantizer = getattr(product, 'a_quantizer', None)
        if isinstance(product, QuantizedMatMul) and quantizer is not None and len(quantizer.scale) > 1:
            shadow(product, 'forward', lambda a, b, product=product: product.output(
                head_product(a, product.a_quantizer, product.b_quantizer(b))))
    for name, layer in quantized_layers(model).items():
        quantizer = getattr(layer, 'weight_quantizer', None)
        if quantizer is None or quantizer.mode is not Mode.QUANTIZE:
            continue
        if quantizer.zero_point.any():
            raise UserError(f"'{name}': asymmetric weights cannot be exported, int8 kernels want zero point 0. "
                            'Quantize with quantization.weight.symmetric = True (the default)')
        finer = 1 if preset == 'symmetric' else 2**max(STORED_BITS - quantizer.config.bits, 0)
        integers, axis = integers_of(quantizer, layer.weight.detach()) * finer, quantizer.axis
        scale = quantizer.scale.expand(layer.weight.shape[axis]) / finer
        transposed = isinstance(layer, (QuantizedLinear, QuantizedProjection))  # stored as the product takes it
        inputs, own_bias = layer.input_quantizer, bias_of(layer)
        one_scale = inputs is not None and inputs.scale.numel() == 1 and inputs.config.bits == 8
        if transposed and preset != 'symmetric' and own_bias is not None and one_scale:
            # ONNX Runtime's kernel takes a bias as int32, in units of both scales. Where inputs have fewer bits these
            # are so large that rounding to them would be most of what tells graph and model apart.
            units = inputs.scale * quantizer.scale / finer
            values = (own_bias.detach() / units).round()
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
                return Linear.apply(x, layer.integers, tuple((scale / unit).tolist()), bias, preset == 'symmetric')

            shadow(layer, 'linear', linear)
            if 'weight' in layer._parameters or isinstance(layer, QuantizedProjection):
                # where a part or another form of the weight is applied
                shadow(quantizer, 'forward', lambda weight, layer=layer, scale=scale: Dequantize.apply(
                    layer.integers, tuple(scale.tolist()), 1).T)
        else:
            shadow(quantizer, 'forward', lambda weight, layer=layer, scale=scale, axis=axis: Dequantize.apply(
                layer.integers, tuple(scale.tolist()), axis))
    try:
        yield
    finally:
        for module, name in changed:
            delattr(module, name)


def bias_of(layer: nn.Module) -> torch.Tensor | None:
    """Return the bias of a quantized layer; of an attention's projection, its share of the attention's."""
    if not isinstance(layer, QuantizedProjection):
        return layer.bias
    bias, parts = layer.owner.in_proj_bias, [f'{name}_weight' for name in SEPARATE]
    return bias if bias is None or layer.parameter not in parts else bias.chunk(3)[parts.index(layer.parameter)]


class Features(nn.Module):
    """What is exported first: images to feature maps of backbone and neck; of a classifier, to logits.

    Its outputs are flat; ``outputs`` tells how they were nested, once it has run.
    """

    def __init__(self, model):
        super().__init__()
        self.model, self.outputs = model, None

    def forward(self, images):
        found = (self.model.logits(images), ) if isinstance(self.model, Classifier) else image_features(
            self.model, images)
        self.outputs = nesting(found)
        return tuple(tensors(found))


def nesting(value, number=None):
    """Return how tensors are nested: their numbers in lists that begin with 'tuple' or 'list'.

    Raises:
        UserError: If there is anything but tensors and None in them.
    """
    number = itertools.count() if number is None else number
    if isinstance(value, torch.Tensor):
        return next(number)
    if isinstance(value, (tuple, list)):
        return ['tuple' if isinstance(value, tuple) else 'list', *(nesting(item, number) for item in value)]
    if value is None:
        return None
    raise UserError(f'{type(value).__name__} is neither a tensor nor a list of them')


def nested(form, flat):
    """Return the tensors of a flat list as :func:`nesting` found them."""
    if isinstance(form, list):
        items = [nested(item, flat) for item in form[1:]]
        return tuple(items) if form[0] == 'tuple' else items
    return None if form is None else flat[form]


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


def check_form(model: nn.Module, form: Form) -> None:
    """Refuse a form that no graph of a model can have.

    Raises:
        UserError: If the preset is unknown, or 'symmetric' and a zero point is not 0, or 'onnxruntime' and there are
            no images.
    """
    if form.preset not in PRESETS:
        raise UserError(f"preset '{form.preset}': must be one of {', '.join(PRESETS)}")
    if form.preset == 'onnxruntime' and not form.images:
        raise UserError("preset 'onnxruntime' measures on images what convolutions put out, and there are none: keep "
                        'the synthetic.pt of the run beside quantized.pth, or use another preset')
    if form.preset == 'symmetric':
        asymmetric = [name for name, q in quantizers(model).items() if q.quant_min >= 0]
        if asymmetric:
            raise UserError(
                f"preset 'symmetric' (TensorRT) needs zero points of 0, but '{asymmetric[0]}' (and "
                f'{len(asymmetric) - 1} more) has an unsigned grid: quantize again with '
                'quantization.activation.symmetric=True')


def write(network: nn.Module, inputs: tuple, path, input_names, output_names, axes, notes: dict, name: str,
          form: Form = ASYMMETRIC) -> None:
    """Trace a network and write the graph, BatchNorm folded, as the preset of its form wants it.

    Args:
        network (nn.Module): To trace.
        inputs (tuple[Tensor]): To trace it with.
        path (str | Path): The file to write.
        input_names, output_names (list[str]): Of the graph.
        axes (dict | None): Open axes by name of an input or output, as torch takes them.
        notes (dict): For the graph's metadata.
        name (str): Of the network, for errors.
        form (Form): What the graph is to be like; each item of ``images`` is a tensor, or a tuple of one for each
            input.

    Raises:
        UserError: If there is something that ONNX does not know, or that TensorRT does not take with preset
            'symmetric'.
    """
    onnx = need('onnx')
    stream = io.BytesIO()
    with warnings.catch_warnings(), mock.patch.object(torch._C, '_jit_onnx_log', print_nothing, create=True):
        warnings.simplefilter('ignore')  # the tracer's, about Python numbers that are the same at every size
        try:
            # What is folded here is stored at its full size: each relative position bias for each pair of places.
            torch.onnx.export(network, inputs, stream, dynamo=False, opset_version=OPSET, input_names=input_names,
                              output_names=output_names, dynamic_axes=axes, do_constant_folding=False)
        except torch.onnx.errors.OnnxExporterError as error:
            raise UserError(f'{name} cannot be exported to ONNX: {str(error).splitlines()[0]}') from None
    graph = onnx.load_model_from_string(stream.getvalue())
    onnx.helper.set_model_props(graph, dict(psaq_mm=__version__, **notes))
    widen_patches(graph, stored_arrays(graph.graph))
    fold_batch_norm(graph)
    if form.preset == 'onnxruntime':
        examples = (item if isinstance(item, tuple) else (item, ) for item in form.images)
        quantize_convolutions(graph, ({key: value.numpy() for key, value in zip(input_names, item)}
                                      for item in examples))
    if axes:  # some length is open
        separate_readers(graph)
    if form.preset == 'symmetric':
        for_tensorrt(graph)
        check_for_tensorrt(graph, static=not set(input_names) & set(axes or ()))
    onnx.checker.check_model(graph)
    write_atomically(graph.SerializeToString(), Path(path))


def print_nothing(*text) -> None:
    """Take the place of the exporter's log: it prints the whole graph that it fails on, thousands of lines."""


def annotate(path, notes: dict[str, str]) -> None:
    """Add notes to a graph that was written, in place."""
    onnx = need('onnx')
    graph = onnx.load_model_from_string(Path(path).read_bytes())
    onnx.helper.set_model_props(graph, {**{item.key: item.value for item in graph.metadata_props}, **notes})
    write_atomically(graph.SerializeToString(), Path(path))


@torch.no_grad()
def export_graph(model: nn.Module, path, size: tuple[int, int], dynamic: bool = False, form: Form = ASYMMETRIC,
                 integers: bool = True) -> None:
    """Write backbone and neck as ONNX.

    Args:
        model (nn.Module): Quantized and calibrated, on CPU; or any float model with ``integers=False``.
        path (str | Path): The file to write.
        size (tuple[int, int]): (H, W) of the images, in dynamic graphs that of the trace.
        dynamic (bool): Whether the graph takes other sizes. Defaults to False.
        form (Form): What the graph is to be like; ``images`` (1, C, H, W) are normalised.
        integers (bool): Whether to export what quantizers do. Defaults to True.

    Raises:
        UserError: If the model cannot be exported that way.
    """
    if integers:
        check_calibrated(model)
        check_form(model, form)
    model.eval()
    images = torch.randn(1, image_channels(model), *size, generator=torch.Generator().manual_seed(0))
    features = Features(model).eval()  # the exporter brings the wrapper's mode to all of the model
    resizing = nullcontext() if dynamic else ConstantResizing()
    for image in (images.flip(-1), images):
        with resizing:
            found = features(image)
    names = [f'feature_{i}' for i in range(len(found))]
    rows = {0: 'batch'} if form.batch else {}
    axes = {name: {**rows, **({2: f'{name}_height', 3: f'{name}_width'} if dynamic and value.dim() == 4 else {})}
            for name, value in zip(names, found)}
    axes[INPUT] = {**rows, **({2: 'height', 3: 'width'} if dynamic else {})}
    axes = {name: sides for name, sides in axes.items() if sides}
    notes = dict(preset=form.preset, dynamic=str(dynamic), batch=str(form.batch), size=json.dumps(list(size)),
                 outputs=json.dumps(features.outputs))
    with traceable(model), resizing, exportable(model, form.preset) if integers else quantizer_mode(
            model, Mode.FLOAT):
        write(features, (images, ), path, [INPUT], names, axes or None, notes,
              type(backbone_of(model)).__name__, form)


def stored_arrays(graph) -> Callable:
    """Return what gives the array of a name in a graph (onnx.GraphProto), or None where it is computed."""
    helper = need('onnx').numpy_helper
    initializers = {item.name: item for item in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}

    def value(name):
        node = makers.get(name)
        while node is not None and node.op_type == 'Identity':  # of equal tensors the exporter stores one
            name = node.input[0]
            node = makers.get(name)
        if name in initializers:
            return helper.to_array(initializers[name])
        return helper.to_array(node.attribute[0].t) if node is not None and node.op_type == 'Constant' else None

    return value


def fold_batch_norm(graph) -> int:
    """Multiply each BatchNormalization behind a convolution with stored integers into scales and bias, in place.

    Exact, as weights have a scale for each output channel; where the factor is negative the integers change sign.

    Args:
        graph (onnx.ModelProto): The model.

    Returns:
        int: How many there were.
    """
    import numpy as np
    onnx = need('onnx')
    helper, graph = onnx.numpy_helper, graph.graph
    makers = {output: node for node in graph.node for output in node.output}
    readers = Counter(name for node in graph.node for name in node.input)
    value = stored_arrays(graph)

    def new(name, array):
        graph.initializer.append(helper.from_array(array, name))
        return name

    folded, weights = [], {}
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
        if bias is None:  # computed, not stored
            continue
        # A convolution may stand before several BatchNorms, as in heads that share it between levels: each gets scales
        # of its own, and integers of its own where signs change.
        prefix = f'{weight.input[0]}_folded_{len(folded)}'
        stored, negative = weight.input[0], factor.reshape(shape) < 0
        if negative.any():
            stored = new(prefix, np.where(negative, np.maximum(integers, -127) * -1, integers).astype(np.int8))
        scale = new(f'{prefix}_scale', np.maximum(scale * np.abs(factor), 1e-30).astype(np.float32))
        weights[norm.output[0]] = onnx.helper.make_node(
            'DequantizeLinear', [stored, scale, *weight.input[2:]], [f'{prefix}_weight'], name=prefix, axis=axis)
        convolution.input[1] = f'{prefix}_weight'
        del convolution.input[2:]
        convolution.input.append(new(f'{prefix}_bias', ((bias - mean) * factor + beta).astype(np.float32)))
        convolution.output[0] = norm.output[0]
        folded.append(norm)
    for norm in folded:
        graph.node.remove(norm)
    nodes = [node for old in graph.node for node in (weights.get(old.output[0]), old) if node is not None]
    del graph.node[:]
    graph.node.extend(nodes)  # a weight before its convolution
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
