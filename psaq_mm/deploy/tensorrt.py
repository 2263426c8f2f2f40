"""What TensorRT's ONNX parser takes, as rules that a graph can be held against where there is no GPU.

Each rule names where it is documented. OPERATORS is the support matrix of TensorRT 10.0 and 10.1, ``docs/operators.md``
of onnx-tensorrt at its release 10.1. IMPORTERS is ``onnxOpImporters.cpp`` of the same release, which says why it
refuses a node. Nothing here was tried in TensorRT itself: that needs a GPU.
"""
from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from .extras import need

OPERATORS = 'https://github.com/onnx/onnx-tensorrt/blob/release/10.1-GA/docs/operators.md'
IMPORTERS = 'https://github.com/onnx/onnx-tensorrt/blob/release/10.1-GA/onnxOpImporters.cpp'
GRANULARITY = 'https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-quantized-types.html'
DATATYPE = ('https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api/infer/FoundationalTypes/'
            'DataType.html')
TOPK = 'https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/operators/TopK.html'
OPSETS, DOMAINS = range(9, 21), ('', 'ai.onnx')
TOP = 3840  # what K of TopK must not exceed
SMALL = 64  # values that a constant may have to be computed in advance: more than an image has sides
PASSING = 'Cast', 'Reshape', 'Squeeze', 'Unsqueeze', 'Identity'  # of one number, which stays what it is
KEPT = 'Constant', 'QuantizeLinear', 'DequantizeLinear', 'If', 'Loop', 'RandomNormalLike'  # that are not

RULES = dict(
    opset=('operators of opset 9 to 20', OPERATORS),
    operator=('an operator that the parser knows, of the domain of ONNX', OPERATORS),
    type=('an operator takes tensors of certain types only; of 8-bit integers none but QuantizeLinear and '
          'DequantizeLinear, and Cast of inputs', OPERATORS),
    # The page of the operator, operators/docs/Cast.html of TensorRT 10.6, allows all casts: the graph keeps to both.
    uint8=('inputs and outputs alone are uint8, and such are cast to floats and from floats', DATATYPE),
    zero_point=('the zero points of QuantizeLinear and DequantizeLinear are int8, constant and 0', IMPORTERS),
    scale=('the scales of QuantizeLinear and DequantizeLinear are constant and positive', IMPORTERS),
    granularity=('what is quantized while the graph runs has one scale; stored weights may have one for each channel',
                 GRANULARITY),
    pair=('integers come from QuantizeLinear or are stored, and DequantizeLinear alone reads them', OPERATORS),
    constant=('axes of Squeeze, Unsqueeze, Slice, Pad and Reduce*, the axis of CumSum and the depth of OneHot are '
              'constant', OPERATORS),
    top_k=(f'TopK sorts, and its K is not above {TOP}, whatever it is computed from', TOPK),
    loop=('what a Loop collects has a fixed length', OPERATORS),
    resize=('Resize is nearest or linear, without antialiasing', OPERATORS),
    scatter=('ScatterND and ScatterElements do not add up', OPERATORS),
    static=('a graph for one size has an input of fixed shape', 'our own: the engine needs no profile of shapes then'),
)
"""What each rule demands, and where that is documented."""

_FLOAT, _INTEGER, _BOOL = {'float32', 'float16'}, {'int32', 'int64'}, {'bool'}
# Types of the first input (of Where: the second), by operators. Where ONNX fixes all types, nothing is said.
TAKES = [
    (_FLOAT, 'Acos Asin Atan AveragePool BatchNormalization Ceil Celu Clip Conv ConvTranspose Cos CumSum '
     'DeformConv Einsum Elu Erf Exp Floor Gemm GlobalAveragePool GlobalMaxPool GridSample '
     'GroupNormalization HardSigmoid HardSwish InstanceNormalization IsInf LayerNormalization LeakyRelu '
     'Log LogSoftmax LpNormalization MatMul MaxPool Mish NonMaxSuppression NonZero PRelu Pow '
     'QuantizeLinear Reciprocal Resize RoiAlign Round Selu Sigmoid Sin Softmax Softplus Softsign Sqrt Tan '
     'Tanh'),
    (_FLOAT | _INTEGER, 'Abs Add ArgMax ArgMin DepthToSpace Div Equal Gelu Greater GreaterOrEqual IsNaN Less '
     'LessOrEqual Max Mean Min Mod Mul Neg Pad Range ReduceL1 ReduceL2 ReduceLogSumExp ReduceMax ReduceMean ReduceMin '
     'ReduceProd ReduceSum ReduceSumSquare Relu ScatterElements ScatterND Sign SpaceToDepth Sub Sum TopK'),
    (_FLOAT | _INTEGER | _BOOL, 'Concat Constant ConstantOfShape Expand EyeLike Flatten Gather GatherElements GatherND '
     'Identity If Loop OneHot Reshape Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where'),
    (_FLOAT | _INTEGER | _BOOL | {'uint8'}, 'Cast'),
    (_BOOL, 'And Not Or Xor'),
    ({'int8'}, 'DequantizeLinear'),
]
TYPES = {operator: types for types, operators in TAKES for operator in operators.split()}
CONSTANT = dict(Squeeze=1, Unsqueeze=1, Slice=3, Pad=3, CumSum=1, OneHot=1, ReduceSum=1)


class Violation(NamedTuple):
    """A node that breaks a rule.

    Args:
        rule (str): Of RULES.
        node (str): Its name.
        what (str): What is wrong.
    """
    rule: str
    node: str
    what: str

    def __str__(self):
        demand, source = RULES[self.rule]
        return f'{self.node}: {self.what}. TensorRT demands: {demand} ({source})'


def check_for_tensorrt(model, static: bool = False) -> None:
    """Refuse a graph that TensorRT's parser does not take.

    Args:
        model (onnx.ModelProto): The graph.
        static (bool): Whether it shall be for images of one size. Defaults to False.

    Raises:
        UserError: If it breaks a rule.
    """
    found = violations(model, static)
    if found:
        more = f' (and {len(found) - 1} more places)' if len(found) > 1 else ''
        raise UserError(f"TensorRT's parser does not take it. {found[0]}{more}")


def for_tensorrt(model) -> None:
    """Bring a graph into a form that the parser takes, in place: what NonZero reads is a number, sizes are constants,
    and floats are what becomes uint8.

    Args:
        model (onnx.ModelProto): The graph.
    """
    onnx = need('onnx')
    fold_sizes(model)
    types = _Reader(onnx, onnx.shape_inference.infer_shapes(model).graph)
    nodes = []
    for node in model.graph.node:
        to_bytes = node.op_type == 'Cast' and onnx.TensorProto.UINT8 in [item.i for item in node.attribute
                                                                        if item.name == 'to']
        if node.op_type == 'NonZero' and types.type(node.input[0]) == 'bool' or to_bytes and types.type(
                node.input[0]) not in _FLOAT:
            name = f'{node.output[0]}_number'
            nodes.append(onnx.helper.make_node('Cast', [node.input[0]], [name], name=name,
                                               to=onnx.TensorProto.FLOAT))
            node.input[0] = name
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def fold_sizes(model) -> int:
    """Compute in advance what depends on nothing but sizes of tensors that are known, in place.

    Args:
        model (onnx.ModelProto): The graph.

    Returns:
        int: How many operators there were.
    """
    onnx = need('onnx')
    from onnx.reference import ReferenceEvaluator
    graph, total = model.graph, 0
    while True:
        reader = _Reader(onnx, onnx.shape_inference.infer_shapes(model, data_prop=True).graph)
        known, nodes = {}, []

        def value(name, reader=reader, known=known):
            return known[name] if name in known else reader.value(name)

        for node in graph.node:
            shape = reader.shapes.get(node.input[0]) if node.op_type == 'Shape' else None
            if shape is not None and not node.attribute:
                known[node.output[0]] = np.int64(shape)
                continue
            values = [value(name) for name in node.input if name]
            small = all(item is not None and item.size <= SMALL for item in values)
            if not values or not small or node.op_type in KEPT or len(node.output) > 1:
                nodes.append(node)
                continue
            helper = onnx.helper
            alone = helper.make_model(helper.make_graph(
                [node], 'alone', [helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(item.dtype), None)
                                  for name, item in zip(filter(None, node.input), values)],
                [helper.make_tensor_value_info(node.output[0], 0, None)]), opset_imports=model.opset_import)
            found, = ReferenceEvaluator(alone).run(None, dict(zip(filter(None, node.input), values)))
            if np.size(found) > SMALL:
                nodes.append(node)
            else:
                known[node.output[0]] = np.asarray(found)
        if not known:
            return total
        total += len(known)
        outputs = {output.name for output in graph.output}
        used = {name for node in nodes for name in node.input} | outputs
        del graph.node[:]
        graph.node.extend(nodes)
        graph.initializer.extend(onnx.numpy_helper.from_array(item, name) for name, item in known.items()
                                 if name in used)


def violations(model, static: bool = False) -> list[Violation]:
    """Return where a graph breaks the rules of TensorRT's parser.

    Args:
        model (onnx.ModelProto): The graph.
        static (bool): Whether it shall be for images of one size. Defaults to False.
    """
    onnx, found = need('onnx'), []
    for opset in model.opset_import:
        if opset.domain in DOMAINS and opset.version not in OPSETS:
            found.append(Violation('opset', 'opset_import', f'opset {opset.version}'))
    if static:
        for value in model.graph.input:
            if any(not axis.HasField('dim_value') for axis in value.type.tensor_type.shape.dim):
                found.append(Violation('static', value.name, 'an input with an open axis'))
    inferred = onnx.shape_inference.infer_shapes(model, check_type=False, strict_mode=False)
    return found + list(_Reader(onnx, inferred.graph).violations())


class _Reader:
    """Knows types, makers and constants of a graph.

    Args:
        onnx: The package.
        graph (onnx.GraphProto): With inferred types.
        outer (_Reader, optional): That of the graph around it.
    """

    def __init__(self, onnx, graph, outer=None):
        self.onnx, self.graph, self.outer = onnx, graph, outer
        self.makers = {output: node for node in graph.node for output in node.output}
        self.stored = {item.name: item for item in graph.initializer}
        self.readers = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        kind = onnx.helper.tensor_dtype_to_np_dtype
        self.types = {value.name: np.dtype(kind(value.type.tensor_type.elem_type)).name for value in (
            *graph.value_info, *graph.input, *graph.output) if value.type.tensor_type.elem_type}
        self.shapes = {value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim] for value in (
            *graph.value_info, *graph.input) if value.type.tensor_type.HasField('shape') and all(
            axis.HasField('dim_value') for axis in value.type.tensor_type.shape.dim)}
        self.types.update({item.name: np.dtype(kind(item.data_type)).name for item in graph.initializer})

    def type(self, name):
        """The type of a tensor by name, None where it was not inferred."""
        return self.types.get(name) or (self.outer.type(name) if self.outer else None)

    def value(self, name):
        """The array of a constant; None of any other tensor."""
        if name in self.stored:
            return self.onnx.numpy_helper.to_array(self.stored[name])
        maker = self.makers.get(name)
        if maker is not None and maker.op_type == 'Identity':
            return self.value(maker.input[0])
        if maker is not None and maker.op_type == 'Constant':
            return self.onnx.numpy_helper.to_array(maker.attribute[0].t)
        return self.outer.value(name) if maker is None and self.outer else None

    def limit(self, name):
        """The largest number that a scalar can be, None where nothing in the graph says so."""
        value = self.value(name)
        if value is not None:
            return value.max().item()
        maker = self.makers.get(name)
        if maker is None:
            return None
        if maker.op_type in PASSING:
            return self.limit(maker.input[0])
        if maker.op_type == 'Min':
            return min((found for found in map(self.limit, maker.input) if found is not None), default=None)
        return None

    def length(self, node):
        """The length of the axis that TopK sorts, infinite where it is not known."""
        axis = next((item.i for item in node.attribute if item.name == 'axis'), -1)
        return (self.shapes.get(node.input[0]) or {axis: math.inf})[axis]

    def violations(self) -> Iterator[Violation]:
        """Yield what breaks a rule."""
        for node in self.graph.node:
            for rule, what in self.of(node):
                yield Violation(rule, node.name or node.output[0], what)
            for attribute in node.attribute:
                if attribute.HasField('g'):
                    yield from _Reader(self.onnx, attribute.g, self).violations()

    def of(self, node):
        """Yield which rules a node breaks, and how."""
        kind, attributes = node.op_type, {a.name: self.onnx.helper.get_attribute_value(a) for a in node.attribute}
        if kind not in TYPES or node.domain not in DOMAINS:
            yield 'operator', f'{kind} of {node.domain}' if node.domain else kind
            return
        if node.input:
            first = node.input[1 if kind == 'Where' else 0]
            found = self.type(first)
            found = 'float32' if found == 'float64' else found  # the parser makes it that
            if kind != 'DequantizeLinear' and found not in TYPES[kind]:
                yield 'type', f'{kind} of {found or "a type that cannot be inferred"}'
        if kind in ('QuantizeLinear', 'DequantizeLinear'):
            yield from self.of_pair(node, kind)
        if kind == 'Cast':
            yield from self.of_cast(node, attributes['to'])
        place = CONSTANT.get(kind, 1 if kind.startswith('Reduce') else None)
        if place is not None and len(node.input) > place and node.input[place] and \
                self.value(node.input[place]) is None:
            yield 'constant', f'{kind} computes it'
        if kind == 'TopK':
            if not attributes.get('sorted', 1):
                yield 'top_k', 'sorted is 0'
            if self.limit(node.input[1]) is None and self.length(node) > TOP:
                yield 'top_k', 'K is computed, and nothing limits it'
            elif (self.limit(node.input[1]) or 0) > TOP:
                yield 'top_k', f'K is up to {self.limit(node.input[1])}'
        if kind == 'Loop':
            body = attributes['body']
            carried = len(node.input) - 2
            for output in body.output[1 + carried:]:
                if any(not axis.HasField('dim_value') for axis in output.type.tensor_type.shape.dim):
                    yield 'loop', f'{output.name} has an open axis'
        if kind == 'Resize' and (attributes.get('mode', b'nearest') not in (b'nearest', b'linear') or
                                 attributes.get('antialias', 0)):
            yield 'resize', f"mode is {attributes.get('mode', b'nearest').decode()}"
        if kind.startswith('Scatter') and attributes.get('reduction', b'none') != b'none':
            yield 'scatter', f"reduction is {attributes['reduction'].decode()}"

    def of_cast(self, node, target):
        """Yield how Cast breaks the rule of uint8."""
        source, target = self.type(node.input[0]), np.dtype(
            self.onnx.helper.tensor_dtype_to_np_dtype(target)).name
        if 'uint8' in (source, target) and not {source, target} & (_FLOAT | {'float64'}):
            yield 'uint8', f'Cast from {source} to {target}'
        if target == 'uint8' and node.output[0] not in {output.name for output in self.graph.output}:
            yield 'uint8', f'{node.output[0]} is no output'

    def of_pair(self, node, kind):
        """Yield which rules QuantizeLinear or DequantizeLinear breaks, and how."""
        zero = self.value(node.input[2]) if len(node.input) > 2 else None
        if zero is None or zero.dtype != np.int8 or zero.any():
            yield 'zero_point', 'there is none' if zero is None else f'{zero.dtype} {zero.ravel()[0]}'
        scale = self.value(node.input[1])
        if scale is None or not (scale > 0).all():
            yield 'scale', 'it is computed' if scale is None else 'it is 0 or less'
        if kind == 'QuantizeLinear' and scale is not None and scale.size > 1 and self.value(node.input[0]) is None:
            yield 'granularity', f'there are {scale.size} scales'
        if kind == 'DequantizeLinear':
            maker = self.makers.get(node.input[0])
            stored = self.value(node.input[0])
            if stored is None and (maker is None or maker.op_type != 'QuantizeLinear'):
                yield 'pair', f"integers of {maker.op_type if maker else 'another graph'}"
            elif stored is not None and stored.dtype != np.int8:
                yield 'pair', f'stored as {stored.dtype}'
        else:
            others = {reader.op_type for reader in self.readers.get(node.output[0], ())} - {'DequantizeLinear'}
            if others:
                yield 'pair', f"{', '.join(sorted(others))} reads its integers"
