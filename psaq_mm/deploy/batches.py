"""From a graph for one image to one for any number: what is the same for all images runs once, the rest in a loop.

Backbone, neck and dense heads take a batch at once. Decoding and second stages work on so many boxes as there are, so
the graph takes them image by image, in ONNX's ``Loop``; the answers of an image are filled up to as many as there can
be.
"""
from __future__ import annotations

import numpy as np

from .extras import need

FILLING = dict(labels=-1)  # of what is filled up; everything else gets 0


def loop_over_images(model, rows: list[str], answers: list[str], limit: int) -> None:
    """Make the graph of one image one of a batch, in place.

    Args:
        model (onnx.ModelProto): Its input has an axis of images first; up to ``rows`` it computes for all at once.
        rows (list[str]): Tensors (B, ...), of which an image's answers need its own row.
        answers (list[str]): Outputs (1, N, ...).
        limit (int): The largest N.
    """
    onnx, graph = need('onnx'), model.graph
    helper, kinds = onnx.helper, onnx.TensorProto
    inside, depend = [], set(rows)
    for node in graph.node:
        if depend & set(_read(node)) and not set(node.output) & set(rows):
            depend.update(node.output)
            inside.append(node)
    taken = {id(node) for node in inside}
    outside = [node for node in graph.node if id(node) not in taken]
    steps, stored = [], []

    def constant(name, array):
        stored.append(onnx.numpy_helper.from_array(array, f'loop_{name}'))
        return f'loop_{name}'

    def step(kind, *inputs, output, **attributes):
        steps.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    first, last = constant('first', np.int64([0])), constant('last', np.int64([limit]))
    step('Identity', 'loop_goes_on', output='loop_still_on')
    step('Unsqueeze', 'loop_image', first, output='loop_row')
    for name in rows:
        step('Gather', name, 'loop_row', output=f'{name}_of_image', axis=0)
    for node in inside:
        for i, name in enumerate(node.input):
            if name in rows:
                node.input[i] = f'{name}_of_image'
    steps.extend(inside)
    values = {output.name: output.type.tensor_type for output in graph.output}
    ends = [helper.make_tensor_value_info('loop_still_on', kinds.BOOL, [])]
    for name in answers:
        kind, rank = values[name].elem_type, len(values[name].shape.dim) - 1
        own = step('Squeeze', name, first, output=f'{name}_alone')
        count = step('Gather', step('Shape', own, output=f'{name}_shape'), first, output=f'{name}_count')
        begin, behind = constant(f'{name}_begin', np.zeros(rank, np.int64)), constant(
            f'{name}_behind', np.zeros(rank - 1, np.int64))
        missing = step('Sub', last, count, output=f'{name}_missing')
        parts = [begin, missing] + [behind] * (rank > 1)
        amounts = step('Concat', *parts, output=f'{name}_amounts', axis=0)
        value = constant(f'{name}_filling', np.array(FILLING.get(name, 0), helper.tensor_dtype_to_np_dtype(kind)))
        step('Pad', own, amounts, value, output=f'{name}_filled', mode='constant')
        ends.append(helper.make_tensor_value_info(f'{name}_filled', kind, [
            limit, *(dim.dim_value or None for dim in values[name].shape.dim[2:])]))
    body = helper.make_graph(steps, 'image', [helper.make_tensor_value_info('loop_image', kinds.INT64, []),
                                              helper.make_tensor_value_info('loop_goes_on', kinds.BOOL, [])], ends)
    used = {name for node in outside for name in node.input}
    for item in [item for item in graph.initializer if item.name not in used]:
        body.initializer.append(item)  # where it is read: runtimes recognise weights there
        graph.initializer.remove(item)
    body.initializer.extend(stored)
    images = graph.input[0].name
    graph.initializer.append(onnx.numpy_helper.from_array(np.int64(0), 'loop_zero'))
    outside += [helper.make_node('Shape', [images], ['images_shape'], name='images_shape'),
                helper.make_node('Gather', ['images_shape', 'loop_zero'], ['images_count'], name='images_count'),
                helper.make_node('Loop', ['images_count', ''], list(answers), name='images', body=body)]
    del graph.node[:]
    graph.node.extend(outside)
    del graph.output[:]
    for name, end in zip(answers, ends[1:]):
        dims = [dim.dim_value or None for dim in end.type.tensor_type.shape.dim]
        graph.output.append(helper.make_tensor_value_info(name, values[name].elem_type, ['batch', *dims]))


def _read(node):
    """Names that a node reads, those of its subgraphs included."""
    names = list(node.input)
    for attribute in node.attribute:
        if attribute.HasField('g'):
            names += [name for inner in attribute.g.node for name in _read(inner)]
    return names
