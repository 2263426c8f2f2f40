"""Makes a finished graph small without changing what it computes: equal constants are one, names are short."""
from __future__ import annotations

import numpy as np

from .extras import need


def compact(model) -> None:
    """Store each constant once, without nodes of its own, and give short names to all but inputs and outputs, in place.

    The names that torch gives tell where in the model a tensor is computed. In the file of a small model they take as
    much room as its weights.

    Args:
        model (onnx.ModelProto): The graph; nobody shall want to know its tensors by name any more.
    """
    onnx, graph = need('onnx'), model.graph
    names = {value.name: value.name for value in (*graph.input, *graph.output)}
    names[''] = ''  # an optional input that is left out

    def short(name):
        if name not in names:
            names[name] = f'_{np.base_repr(len(names), 36).lower()}'
        return names[name]

    def shorten(graph, outer):
        """Do it in a graph, given what stands for names of the graphs around it."""
        aliases, found, tensors, nodes = dict(outer), {}, {}, []
        outputs = {value.name for value in graph.output}

        def store(name, tensor):
            array = onnx.numpy_helper.to_array(tensor)
            key = tensor.data_type, array.shape, array.tobytes()
            if key in found and name not in outputs:
                aliases[name] = found[key]
            else:
                found.setdefault(key, name)
                tensors[name] = onnx.TensorProto.FromString(tensor.SerializeToString())

        for item in graph.initializer:
            store(item.name, item)
        for node in graph.node:
            output, first = node.output[0], aliases.get(node.input[0], node.input[0]) if node.input else None
            if node.op_type == 'Constant' and node.attribute[0].name == 'value' and output not in outputs:
                store(output, node.attribute[0].t)
            elif node.op_type == 'Identity' and first in tensors and output not in outputs:
                aliases[output] = first
            else:
                nodes.append(onnx.NodeProto.FromString(node.SerializeToString()))
        for node in nodes:
            node.name = node.doc_string = ''
            node.input[:] = [short(aliases.get(name, name)) for name in node.input]
            for attribute in node.attribute:
                if attribute.HasField('g'):
                    shorten(attribute.g, aliases)
            node.output[:] = [short(name) for name in node.output]
        for name, tensor in tensors.items():
            tensor.name, tensor.doc_string = short(name), ''
        for value in (*graph.input, *graph.output):
            value.name = short(value.name)
        del graph.initializer[:], graph.value_info[:], graph.node[:]
        graph.initializer.extend(tensors.values())
        graph.node.extend(nodes)

    shorten(graph, {})
