"""Recognises attention by what a module does: its forward multiplies softmaxed scores with values.

A module is told by the source of its forward, and of the methods and functions of its own package that this calls: one
softmax and two matrix products, or a fused attention. Nothing has to run for that, so a model can be converted before
it has seen an image, and any class in anybody's package counts. Source: our choice.
"""
from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections import Counter
from functools import cache

from torch import nn

PRODUCTS, FUSED, SOFTMAX = 'product', 'fused', 'softmax'
WEIGHT = 'weight'
# What is asked of a weight without computing with it, and methods that do not compute.
ASKED = frozenset(('dtype', 'device', 'shape', 'ndim', 'size', 'dim', 'numel', 'requires_grad', 'data_ptr', 'is_cuda'))
NO_COMPUTATION = re.compile('^__|init|load|save|state|reset|fuse|merge|deploy|convert|repr|train|freeze|decay|param')
CALLS = dict(matmul=PRODUCTS, bmm=PRODUCTS, scaled_dot_product_attention=FUSED, softmax=SOFTMAX)


class _Reader:
    """Counts the products and softmaxes that a function makes at most, on any one way through its branches.

    Args:
        kind (type): The module's class, whose methods are followed.
        softmaxes (frozenset[str]): Attributes that hold an ``nn.Softmax``.
    """

    def __init__(self, kind, softmaxes):
        self.kind, self.softmaxes = kind, softmaxes
        self.package = kind.__module__.partition('.')[0]
        self.reading = []

    def function(self, function) -> Counter:
        """Counts of a function; none where there is no source, or it is being read already."""
        function = inspect.unwrap(function)
        if function in self.reading:
            return Counter()
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
        except (OSError, TypeError, SyntaxError):
            return Counter()
        if not isinstance(tree, ast.FunctionDef):
            return Counter()
        self.reading.append(function)
        try:
            return self.statements(tree.body, getattr(function, '__globals__', {}))
        finally:
            self.reading.pop()

    def statements(self, statements, names) -> Counter:
        total = Counter()
        for statement in statements:
            total += self.node(statement, names)
        return total

    def node(self, node, names) -> Counter:
        if isinstance(node, (ast.FunctionDef, ast.Lambda, ast.ClassDef)):
            return Counter()  # defined, not run
        if isinstance(node, ast.If):
            return self.node(node.test, names) + (self.statements(node.body, names) |
                                                  self.statements(node.orelse, names))
        if isinstance(node, ast.IfExp):
            return self.node(node.test, names) + (self.node(node.body, names) | self.node(node.orelse, names))
        total = self.statements(ast.iter_child_nodes(node), names)
        if isinstance(node, (ast.For, ast.While)):
            total += total  # more than once
        elif _names_a_weight(node):
            pass  # a layer's product, whichever function it is written in
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            total[PRODUCTS] += 1
        elif isinstance(node, ast.Call):
            total += self.call(node.func, names)
        return total

    def call(self, called, names) -> Counter:
        name = _called(called)
        own = isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) and called.value.id == 'self'
        if isinstance(called, ast.Attribute) and _is_super(called.value):
            return self.inherited(name)
        if own and name in self.softmaxes:
            return Counter((SOFTMAX, ))
        if own and inspect.isfunction(getattr(self.kind, name, None)):
            return self.function(getattr(self.kind, name))
        if name in CALLS:
            return Counter((CALLS[name], ))
        function = names.get(name) if isinstance(called, ast.Name) else None
        if inspect.isfunction(function) and function.__module__.partition('.')[0] == self.package:
            return self.function(function)
        return Counter()

    def inherited(self, name) -> Counter:
        """Counts of the method that ``super().name`` is in the one being read."""
        line = iter(self.kind.__mro__)
        for owner in line:
            if self.reading[-1] in map(inspect.unwrap, filter(inspect.isfunction, vars(owner).values())):
                break
        inherited = next((vars(owner)[name] for owner in line if name in vars(owner)), None)
        return self.function(inherited) if inspect.isfunction(inherited) else Counter()


def _names_a_weight(node):
    """Whether a product is one with a layer's weight."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
        operands = [node.left, node.right]
    elif isinstance(node, ast.Call) and CALLS.get(_called(node.func)) == PRODUCTS:
        operands = [node.func, *node.args]
    else:
        return False
    return any(isinstance(part, ast.Attribute) and part.attr == WEIGHT for operand in operands
               for part in ast.walk(operand))


def _called(function):
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, 'id', None)


def _is_super(node):
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'super'


@cache
def _is_attention(kind: type, softmaxes: frozenset[str]) -> bool:
    if kind.__module__.partition('.')[0] == 'torch':
        return False
    found = _Reader(kind, softmaxes).function(kind.forward)
    if found[FUSED]:  # one; a module may also know the way of two products, for where it must not be fused
        return found[FUSED] == 1 and found[PRODUCTS] in (0, 2)
    return found[PRODUCTS] == 2 and found[SOFTMAX] == 1


def is_attention(module: nn.Module) -> bool:
    """Whether a module's own forward makes an attention: two products around one softmax, or a fused one.

    ``nn.MultiheadAttention``, whose products torch hides, is known otherwise.

    Args:
        module (nn.Module): Not converted.
    """
    softmaxes = frozenset(name for name, child in module.named_children() if isinstance(child, nn.Softmax))
    return _is_attention(type(module), softmaxes)


def _parsed(function):
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    return tree if isinstance(tree, ast.FunctionDef) else None


def _weights_in(tree) -> set[str | None]:
    """Paths from ``self`` of what a function reads the ``weight`` of to compute with it; None for any other's."""
    asked = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in ASKED}
    asked |= {id(part) for node in ast.walk(tree) if isinstance(node, ast.Compare)
              for part in (node.left, *node.comparators)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == WEIGHT and isinstance(node.ctx, ast.Load) and \
                id(node) not in asked:
            path, owner = [], node.value
            while isinstance(owner, ast.Attribute):
                path.insert(0, owner.attr)
                owner = owner.value
            found.add('.'.join(path) if isinstance(owner, ast.Name) and owner.id == 'self' else None)
    return found


@cache
def applied_weights(kind: type) -> dict[str, frozenset[str | None]]:
    """Methods of a class that may compute with weights of other modules, and whose.

    Args:
        kind (type): Of a module.

    Returns:
        dict: By name of the method: paths of submodules, '' for the module itself, None for what the source does not
        tell.
    """
    package, found = kind.__module__.partition('.')[0], {}
    for name in dir(kind):
        function = inspect.getattr_static(kind, name, None)
        if not inspect.isfunction(function) or NO_COMPUTATION.search(name) or \
                function.__module__.partition('.')[0] == 'torch':
            continue
        tree = _parsed(function)
        if tree is None:
            continue
        weights = _weights_in(tree)
        names = getattr(inspect.unwrap(function), '__globals__', {})
        for call in ast.walk(tree):
            helper = names.get(call.func.id) if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) else None
            if inspect.isfunction(helper) and helper.__module__.partition('.')[0] == package:
                body = _parsed(helper)
                if body is not None and _weights_in(body):
                    weights.add(None)
        if weights:
            found[name] = frozenset(weights)
    return found


@cache
def computes_visibly(kind: type) -> bool:
    """Whether a subclass of a layer computes by functions that can be seen: not by deformable kernels."""
    tree = _parsed(kind.forward)
    return tree is not None and not any(isinstance(node, ast.Call) and 'deform' in (_called(node.func) or '')
                                        for node in ast.walk(tree))
