"""Weights of fewer than 8 bits take as many bits in the file: packed into bytes, unpacked by operators of the graph.

Both runtimes fold the unpacking when they load a graph, and then run the int8 kernels of stored int8. The
INT4 of opset 21 is no smaller, and in a trial both runtimes multiplied it in float (ONNX Runtime 1.32, OpenVINO
2026.4.1).

A weight is stored in planes of 4, 2 or 1 bits, of which a byte holds 2, 4 or 8: a weight of 7 bits has one of each.
"""
from __future__ import annotations

import numpy as np

from .extras import need


def planes_of(bits: int) -> list[int]:
    """Return the bits of the planes that hold so many bits, the highest bits first."""
    return [plane for plane in (4, 2, 1) if bits & plane]


def common_power(values: np.ndarray) -> int:
    """Return the largest power of 2, up to 64, that all integers are multiples of."""
    return next(power for power in (64, 32, 16, 8, 4, 2, 1) if not (values % power).any())


def bits_for(values: np.ndarray) -> int:
    """Return how many bits signed integers need, 2 at least."""
    return next(bits for bits in range(2, 9) if -2**(bits - 1) <= values.min() and values.max() < 2**(bits - 1))


def pack(values: np.ndarray, bits: int) -> list[np.ndarray]:
    """Pack signed integers into bytes, the first value in the lowest bits.

    Args:
        values (np.ndarray): Of any shape, from -2 ** (bits - 1) to 2 ** (bits - 1) - 1.
        bits (int): 2 to 7.

    Returns:
        list[np.ndarray]: (bytes, 1) uint8 for each plane of :func:`planes_of`; the last byte is filled up with zeros.
    """
    codes, left, packed = values.reshape(-1).astype(np.int64) + 2**(bits - 1), bits, []
    for plane in planes_of(bits):
        left -= plane
        part = codes >> left & 2**plane - 1
        part = np.pad(part, (0, -len(part) % (8 // plane))).reshape(-1, 8 // plane)
        packed.append((part << plane * np.arange(8 // plane)).sum(1, keepdims=True).astype(np.uint8))
    return packed


class _Unpacking:
    """Operators that unpack weights, and their constants.

    Args:
        graph (onnx.GraphProto): Takes the constants.
    """

    def __init__(self, graph):
        self.onnx, self.graph, self.nodes, self.constants = need('onnx'), graph, [], {}

    def constant(self, *values):
        """Return the name of a constant: a number, or several numbers as a row."""
        if values not in self.constants:
            self.constants[values] = f'unpacking_{len(self.constants)}'
            array = np.array(values if len(values) > 1 else values[0], np.int32)
            self.graph.initializer.append(self.onnx.numpy_helper.from_array(array, self.constants[values]))
        return self.constants[values]

    def shape(self, *values):
        """Return the name of a constant (n, ) int64."""
        key = 'shape', *values
        if key not in self.constants:
            self.constants[key] = f'unpacking_{len(self.constants)}'
            self.graph.initializer.append(self.onnx.numpy_helper.from_array(np.int64(values), self.constants[key]))
        return self.constants[key]

    def apply(self, kind, *inputs, output=None, **attributes):
        """Add an operator; return the name of what it puts out."""
        output = output or f'unpacked_{len(self.nodes)}'
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def add(self, name: str, values: np.ndarray, bits: int):
        """Take up a weight: its planes become constants, and operators put out what had the name.

        Args:
            name (str): Of the weight.
            values (np.ndarray): Signed integers.
            bits (int): That they need, divided by their :func:`common_power`.
        """
        power = common_power(values)
        values, kinds, left, total = values // power, self.onnx.TensorProto, bits, None
        for plane, packed in zip(planes_of(bits), pack(values, bits)):
            left -= plane
            stored = f'{name}_bits_{left}'
            self.graph.initializer.append(self.onnx.numpy_helper.from_array(packed, stored))
            # Divisions instead of shifts: OpenVINO 2026.4.1 shifts 8-bit integers wrongly, and its int64 has 32 bits.
            rest = self.apply('Div', self.apply('Cast', stored, to=kinds.INT32),
                              self.constant(*(2**(plane * i) for i in range(8 // plane))))
            higher = self.apply('Mul', self.apply('Div', rest, self.constant(2**plane)), self.constant(2**plane))
            part = self.apply('Reshape', self.apply('Sub', rest, higher), self.shape(-1))
            if values.size % (8 // plane):
                part = self.apply('Slice', part, self.shape(0), self.shape(values.size))
            if left:
                part = self.apply('Mul', part, self.constant(2**left))
            total = part if total is None else self.apply('Add', total, part)
        total = self.apply('Sub', total, self.constant(2**(bits - 1)))
        if power > 1:
            total = self.apply('Mul', total, self.constant(power))
        total = self.apply('Cast', total, to=kinds.INT8)
        self.apply('Reshape', total, self.shape(*values.shape), output=name)


def pack_weights(model) -> int:
    """Pack all stored weights that need fewer than 8 bits, in place.

    Args:
        model (onnx.ModelProto): With weights as int8 initializers that DequantizeLinear reads.

    Returns:
        int: How many there were.
    """
    onnx, graph = need('onnx'), model.graph
    stored = {item.name: item for item in graph.initializer}
    weights = {node.input[0] for node in graph.node if node.op_type == 'DequantizeLinear'}
    others = {name for node in graph.node for i, name in enumerate(node.input)
              if i or node.op_type != 'DequantizeLinear'}
    unpacking, count = _Unpacking(graph), 0
    for name in [name for name in stored if name in weights - others]:
        values = onnx.numpy_helper.to_array(stored[name])
        if values.dtype != np.int8 or values.ndim < 2:
            continue
        bits = bits_for(values // common_power(values))
        if bits > 7:
            continue
        graph.initializer.remove(stored[name])
        unpacking.add(name, values, bits)
        count += 1
    nodes = [*unpacking.nodes, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return count
