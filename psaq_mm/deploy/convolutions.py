"""What ONNX Runtime needs for int8 convolutions: what they put out on integers, too, with ranges measured on images."""
from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch

from ..quantization.config import ActivationConfig
from ..quantization.observers import affine_parameters, build_observer
from .extras import need

CONFIG = ActivationConfig(observer='mse')  # 8 bits, unsigned, one scale; our choice
CHANNELS = 8  # an image has fewer; our choice
IMAGES = 16  # that ranges are measured on; our choice


def quantize_convolutions(model, feeds: Iterable[Mapping[str, np.ndarray]]) -> int:
    """Put a pair of QuantizeLinear and DequantizeLinear behind each convolution on integers, in place.

    ONNX Runtime computes a convolution in int8 only if its output is quantized. Where a ReLU follows, the pair comes
    behind it, and the runtime makes both one kernel. Nothing is put where quantizers alone read the output, nor behind
    what reads pixels: that is little work, and in a transformer its error would pass through all blocks.

    Args:
        model (onnx.ModelProto): The graph.
        feeds (Iterable[Mapping[str, np.ndarray]]): Inputs of the graph by name, to measure ranges on.

    Returns:
        int: How many there were.
    """
    onnx = need('onnx')
    graph, helper = model.graph, onnx.helper
    names = unquantized_outputs(graph)
    observers = {name: build_observer(CONFIG) for name in names}
    if names:
        measure(model, feeds, observers)
    added = {}
    for name, observer in observers.items():
        ends = observer.range()
        if ends is None:  # no proposal reached it
            continue
        scale, zero = affine_parameters(*ends, CONFIG.bits, CONFIG.symmetric)
        grid = f'{name}_scale_of_output', f'{name}_zero_of_output'
        graph.initializer.extend([onnx.numpy_helper.from_array(scale.numpy()[0], grid[0]),
                                  onnx.numpy_helper.from_array(zero.numpy().astype(np.uint8)[0], grid[1])])
        added[name] = [
            helper.make_node('QuantizeLinear', [f'{name}_in_float', *grid], [f'{name}_integers'],
                             name=f'{name}_quantize'),
            helper.make_node('DequantizeLinear', [f'{name}_integers', *grid], [name], name=f'{name}_dequantize')]
    nodes = []
    for node in graph.node:
        nodes.append(node)
        if node.output[0] in added:
            nodes += added[node.output[0]]
            node.output[0] = f'{node.output[0]}_in_float'
    del graph.node[:]
    graph.node.extend(nodes)
    return len(added)


def unquantized_outputs(graph) -> list[str]:
    """Return names of what convolutions on integers put out, behind their ReLU, where not quantizers alone read it."""
    makers = {output: node for node in graph.node for output in node.output}
    readers = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.op_type)
    relus = {node.input[0]: node.output[0] for node in graph.node if node.op_type == 'Relu'}
    weights = {item.name: item.dims for item in graph.initializer}
    weights.update({node.output[0]: node.attribute[0].t.dims for node in graph.node if node.op_type == 'Constant'})
    found, outputs = [], {output.name for output in graph.output}
    for node in graph.node:
        operands = [makers[name].op_type if name in makers else None for name in node.input[:2]]
        if node.op_type != 'Conv' or operands != ['DequantizeLinear'] * 2:
            continue
        sides = weights.get(makers[node.input[1]].input[0])
        groups = next((item.i for item in node.attribute if item.name == 'group'), 1)
        if sides is not None and groups * sides[1] < CHANNELS:
            continue
        name = node.output[0]
        if readers.get(name) == ['Relu'] and name not in outputs:
            name = relus[name]
        if name in outputs or set(readers.get(name, ())) - {'QuantizeLinear'}:
            found.append(name)
    return found


def measure(model, feeds, observers) -> None:
    """Show observers what a graph computes.

    Args:
        model (onnx.ModelProto): The graph.
        feeds (Iterable[Mapping[str, np.ndarray]]): Its inputs by name.
        observers (dict): By name of a tensor in the graph.
    """
    onnx, ort = need('onnx'), need('onnxruntime')
    watched = onnx.ModelProto.FromString(model.SerializeToString())
    del watched.graph.output[:]
    watched.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
                                for name in observers)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(watched.SerializeToString(), options, providers=['CPUExecutionProvider'])
    inputs = [item.name for item in session.get_inputs()]
    for feed in feeds:
        for observer, array in zip(observers.values(), session.run(None, {name: feed[name] for name in inputs})):
            if array.size:
                observer.update(torch.from_numpy(array).reshape(1, -1))
