"""From a graph for one image to one for any number: what is the same for all images runs once, the rest in a loop.

Backbone, neck and dense heads take a batch at once. Decoding and second stages work on so many boxes as there are, so
the graph takes them image by image, in ONNX's ``Loop``; the answers of an image are filled up to as many as there can
be.
"""
from __future__ import annotations

import numpy as np

from .answers import OBJECTS
from .extras import need

FILLING = dict(labels=-1)  # of what is filled up; everything else gets 0


def loop_over_images(model, rows: list[str], answers: list[str], limit: int) -> None:
    """Make the graph of one image one of a batch, in place.

    Args:
        model (onnx.ModelProto): Its input has an axis of images first; up to ``rows`` it computes for all at once.
        rows (list[str]): Tensors (B, ...), of which an image's answers need its own row.
        answers (list[str]): Outputs (1, N, ...) of so many objects as an image has, or others (1, ...); see OBJECTS.
        limit (int): The largest N.
    """
    onnx, graph = need('onnx'), model.graph
    helper, kinds = onnx.helper, onnx.TensorProto
    makers = {output: node for node in graph.node for output in node.output}
    rows = list(dict.fromkeys(_original(name, makers) for name in rows))
    inside, outside = _divide(graph, rows)
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
        _rename(node, {name: f'{name}_of_image' for name in rows})
    steps.extend(inside)
    values = {output.name: output.type.tensor_type for output in graph.output}
    ends = [helper.make_tensor_value_info('loop_still_on', kinds.BOOL, [])]
    for name in answers:
        kind, rank = values[name].elem_type, len(values[name].shape.dim) - 1
        own = step('Squeeze', name, first, output=f'{name}_alone')
        if name not in OBJECTS:
            ends.append(helper.make_tensor_value_info(own, kind, [
                dim.dim_value or None for dim in values[name].shape.dim[1:]]))
            continue
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
    used = {name for node in outside for name in _read(node)}
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


def _divide(graph, rows):
    """Return the nodes of the loop, from rows to answers with the constants that only they read, and all other nodes.

    What rows are computed of stays outside. Where answers read it, too, the loop computes it again, of one image's row.
    """
    of_rows, of_images = set(rows), {item.name for item in graph.input}
    for node in graph.node:
        read = set(_read(node))
        if of_rows & read:
            of_rows.update(node.output)
        if of_images & read:
            of_images.update(node.output)
    read_inside, read_outside, inside, outside = {output.name for output in graph.output}, set(rows), [], []
    for node in reversed(graph.node):
        made, read = set(node.output), _read(node)
        if made & read_outside or made & read_inside and made & of_images and not made & of_rows:
            outside.insert(0, node)
            read_outside.update(read)
        if made & read_inside - set(rows) and (made & of_rows or not made & (of_images | read_outside)):
            copy = type(node)()  # runtimes recognise weights where they are read
            copy.CopyFrom(node)
            inside.insert(0, copy)
            read_inside.update(read)
    again = {name for node in inside for name in node.output} & {name for node in outside for name in node.output}
    for node in inside:
        _rename(node, {name: f'{name}_again' for name in again})
        node.output[:] = [f'{name}_again' if name in again else name for name in node.output]
    return inside, outside


def _rename(node, names):
    """Let a node, its subgraphs included, read other tensors, given by name."""
    node.input[:] = [names.get(name, name) for name in node.input]
    for attribute in node.attribute:
        for inner in attribute.g.node if attribute.HasField('g') else ():
            _rename(inner, names)


def _original(name, makers):
    """Return the tensor that one which is computed by Identity is equal to."""
    while name in makers and makers[name].op_type == 'Identity':
        name = makers[name].input[0]
    return name


def _read(node):
    """Names that a node reads, those of its subgraphs included."""
    names = list(node.input)
    for attribute in node.attribute:
        if attribute.HasField('g'):
            names += [name for inner in attribute.g.node for name in _read(inner)]
    return names
