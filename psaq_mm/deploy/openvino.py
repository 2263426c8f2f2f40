"""How graphs get round faults of OpenVINO: other operators that compute the same."""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

from .extras import need

# OpenVINO 2026.4.1 with AMX puts out noise for int8 convolutions of 32 and 48 channels whose strides are their kernel,
# of 4, 6 and 8 a side; not for 16, 24, 36, 40, 44, 64 and more channels.
FAULTY_CHANNELS, FAULTY_SIDE = range(32, 64), 4


def widen_patches(graph, value: Callable) -> int:
    """Give convolutions on integers whose strides are their kernel one more column of zeros, in place.

    OpenVINO computes some of them wrongly (:data:`FAULTY_CHANNELS`). SegFormer and PVT reduce keys and values so.

    Args:
        graph (onnx.ModelProto): The model.
        value (Callable): Gives the array of a name, or None.

    Returns:
        int: How many there were.
    """
    onnx = need('onnx')
    graph = graph.graph
    makers = {output: node for node in graph.node for output in node.output}
    nodes, count = [], 0
    for node in graph.node:
        weight = makers.get(node.input[1]) if node.op_type == 'Conv' else None
        integers = value(weight.input[0]) if weight is not None and weight.op_type == 'DequantizeLinear' else None
        if integers is not None and _is_faulty(node, integers.shape):
            name = f'{node.output[0]}_widened'
            graph.initializer.append(onnx.numpy_helper.from_array(
                np.pad(integers, [(0, 0)] * (integers.ndim - 1) + [(0, 1)]), f'{name}_integers'))
            copy = onnx.NodeProto()
            copy.CopyFrom(weight)
            copy.name, copy.input[0], copy.output[0] = name, f'{name}_integers', f'{name}_weight'
            nodes.append(copy)
            node.input[1] = f'{name}_weight'
            attributes = {item.name: item for item in node.attribute}
            attributes['kernel_shape'].ints[-1] += 1
            attributes['pads'].ints[-1] += 1
            count += 1
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    return count


def _is_faulty(node, shape) -> bool:
    attributes = {item.name: list(item.ints) or item.i for item in node.attribute}
    return (len(shape) == 4 and shape[1] in FAULTY_CHANNELS and shape[-1] >= FAULTY_SIDE
            and attributes.get('strides') == list(shape[2:]) and attributes.get('group', 1) == 1
            and not any(attributes.get('pads', [1])) and set(attributes.get('dilations', [1])) == {1})


def separate_readers(graph) -> int:
    """Put an operator that changes nothing behind each convolution with several readers, in place.

    OpenVINO 2026.4.1 moves the bias of such a convolution into its readers, and where shapes are dynamic some of them
    then put out zeros: a quantizer beside the resizing of a feature pyramid, pooling beside an output. No bias moves
    through a maximum.

    Args:
        graph (onnx.ModelProto): The model, with dynamic shapes.

    Returns:
        int: How many there were.
    """
    onnx = need('onnx')
    graph, lowest = graph.graph, 'lowest_float'
    readers = Counter(name for node in graph.node for name in node.input)
    readers.update(output.name for output in graph.output)
    nodes, count = [], 0
    for node in graph.node:
        nodes.append(node)
        if node.op_type in ('Conv', 'ConvTranspose') and readers[node.output[0]] > 1:
            name = node.output[0]
            node.output[0] = f'{name}_alone'
            nodes.append(onnx.helper.make_node('Max', [node.output[0], lowest], [name], name=f'{name}_separated'))
            count += 1
    if count:
        graph.initializer.append(onnx.numpy_helper.from_array(np.finfo(np.float32).min.reshape(1), lowest))
        del graph.node[:]
        graph.node.extend(nodes)
    return count
