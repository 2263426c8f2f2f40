"""Python source text for the values of a config, such that running the text gives the values again.

mmengine prints a config with ``str`` for all that is no string, list or dict: a ``pathlib.Path`` becomes a syntax
error, ``inf`` an unknown name. Here each value becomes an expression. Text needs no import statement, because mmengine
takes a config that imports other packages for a lazy one: it says ``__import__('torch').float16``.
"""
from __future__ import annotations

import enum
import functools
import importlib
import keyword
import math
import pathlib
import pickle
import re
import types
from collections.abc import Iterator, Mapping

import numpy as np
import torch

WIDTH = 120
DICTS = ('dict', 'ConfigDict', 'OrderedDict')  # mmengine reads all of them as ConfigDict
LONG_INT = 1 << 13  # bits; Python refuses to read much longer decimals


class UnwritableError(ValueError):
    """A value that no source text gives again. ``keys`` lead to it.

    Args:
        reason (str): What is wrong.
        keys (tuple): From the top of the config to the value.
    """

    def __init__(self, reason: str, keys: tuple = ()):
        super().__init__(reason)
        self.reason, self.keys = reason, keys


def object_path(value) -> str | None:
    """Return 'module.name' of a class, function or other named object, or None if importing that gives another."""
    module, name = getattr(value, '__module__', None), getattr(value, '__qualname__', None)
    if not isinstance(module, str) or not isinstance(name, str) or '<' in name or module == '__main__':
        return None
    return f'{module}.{name}' if found(module, name) is value else None


def found(module: str, name: str):
    """Return an attribute of a module by its dotted name, or None."""
    try:
        return functools.reduce(getattr, name.split('.'), importlib.import_module(module))
    except (ImportError, AttributeError, ValueError):
        return None


def _named(value) -> str:
    path = object_path(value)
    if path is None:
        raise UnwritableError('is not found by importing it: define it at the top level of a module of yours')
    module, name = value.__module__, value.__qualname__
    if module == 'builtins':
        return name
    if '.' not in module:
        return f'__import__({module!r}).{name}'
    return f"__import__('importlib').import_module({module!r}).{name}"


def _string(text: str | bytes) -> str:
    # mmengine substitutes {{ ... }} in the text of a config before Python reads it.
    return repr(text).replace('{{', '{\\x7b')


def _integer(value: int) -> str:
    return hex(value) if value.bit_length() > LONG_INT else repr(value)


def _float(value: float) -> str:
    return repr(value) if math.isfinite(value) else f"float('{value}')"


def _array(value: np.ndarray) -> str:
    if value.dtype.hasobject or value.dtype.names:
        raise UnwritableError(f'is an array of {value.dtype}: write its numbers as a list')
    numbers = f"__import__('numpy').array({expression(value.ravel().tolist())}, dtype={value.dtype.str!r})"
    return numbers if value.ndim == 1 else f'{numbers}.reshape({value.shape!r})'


def _tensor(value: torch.Tensor) -> str:
    if value.layout is not torch.strided or value.is_quantized:
        raise UnwritableError('is a sparse or quantized tensor: write its numbers as a list')
    numbers = expression(value.detach().cpu().reshape(-1).tolist())
    return f"__import__('torch').tensor({numbers}, dtype=__import__('torch').{str(value.dtype).split('.')[1]})" \
           f'.reshape({tuple(value.shape)!r})'


def _path(value) -> str:
    name = 'Path' if type(value) is type(pathlib.Path()) else type(value).__name__
    return f"__import__('pathlib').{name}({_string(str(value))})"


def _partial(value) -> str:
    parts = [expression(value.func), *map(expression, value.args)]
    parts += [f'{name}={expression(item)}' for name, item in value.keywords.items()]
    return f"__import__('functools').partial({', '.join(parts)})"


def _set(value) -> str:
    return f"{type(value).__name__}([{', '.join(sorted(map(expression, value)))}])"


def _list(value) -> str:
    return '[' + ', '.join(_items(value)) + ']'


def _tuple(value) -> str:
    return '(' + ', '.join(_items(value)) + (',' if len(value) == 1 else '') + ')'


def _items(value) -> Iterator[str]:
    return (_at(index, item) for index, item in enumerate(value))


def _at(key, value, layout=None, *where) -> str:
    """Return the expression of a value at a key; an error names the key."""
    try:
        return (layout or expression)(value, *where)
    except UnwritableError as error:
        raise UnwritableError(error.reason, (key, *error.keys)) from None


WRITERS = {
    bool: repr, type(None): repr, type(...): repr, int: _integer, float: _float, str: _string, bytes: _string,
    list: _list, tuple: _tuple, set: _set, frozenset: _set, functools.partial: _partial, np.ndarray: _array,
    torch.Tensor: _tensor, types.FunctionType: _named, types.BuiltinFunctionType: _named,
    torch.dtype: lambda value: f"__import__('torch').{str(value).split('.')[1]}",
    torch.device: lambda value: f"__import__('torch').device({str(value)!r})",
    slice: lambda value: f'slice({expression(value.start)}, {expression(value.stop)}, {expression(value.step)})',
    range: repr,
    complex: lambda value: f'complex({_float(value.real)}, {_float(value.imag)})',
    re.Pattern: lambda value: f"__import__('re').compile({expression(value.pattern)}, {int(value.flags)})",
    types.ModuleType: lambda value: f"__import__('importlib').import_module({value.__name__!r})",
}


def expression(value) -> str:
    """Return one expression for a value.

    Raises:
        UnwritableError: If there is none.
    """
    kind = type(value)
    if kind in WRITERS:
        return WRITERS[kind](value)
    if isinstance(value, type):
        return _named(value)
    if isinstance(value, pathlib.PurePath) and kind.__module__.startswith('pathlib'):
        return _path(value)
    if isinstance(value, enum.Enum):
        return f'{_named(kind)}({expression(value.value)})'
    if isinstance(value, np.generic):
        if type(value.item()) in (bool, int, float, complex, str, bytes):
            return f"__import__('numpy').{kind.__name__}({expression(value.item())})"
        return _reduced(value)
    if isinstance(value, Mapping) and kind.__name__ in DICTS:
        return _dict(value)
    if getattr(value, '__qualname__', None) and object_path(value):
        return _named(value)
    return _reduced(value)


def _reduced(value) -> str:
    """Return the call by which ``pickle`` would build a value (of dates, decimals, counters), else its pickle."""
    kind = type(value).__name__
    try:
        reduced, pickled = value.__reduce_ex__(4), pickle.dumps(value)
    except Exception as error:  # of any class of the user's
        raise UnwritableError(f'is a {kind}, which cannot be written ({type(error).__name__}: {error})') from None
    if b'__main__' in pickled:
        raise UnwritableError(f'is a {kind} of the script that runs: define the class in a module of yours')
    if isinstance(reduced, tuple):
        build, arguments, *rest = reduced
        state, items, pairs, *_ = [*rest, None, None, None]
        if state is None and items is None and not build.__name__.startswith('__newobj'):
            arguments = [*arguments, *([dict(pairs)] if pairs is not None else [])]
            return f"{_named(build)}({', '.join(map(expression, arguments))})"
    return f"__import__('pickle').loads({_string(pickled)})"


def is_word(key) -> bool:
    """Whether a key can stand before an equals sign."""
    return isinstance(key, str) and key.isidentifier() and not keyword.iskeyword(key)


def _dict(value) -> str:
    if all(map(is_word, value)):
        return 'dict(' + ', '.join(f'{key}={_at(key, item)}' for key, item in _pairs(value)) + ')'
    return '{' + ', '.join(f'{expression(key)}: {_at(key, item)}' for key, item in _pairs(value)) + '}'


def _pairs(value):
    return dict.items(value) if isinstance(value, dict) else value.items()


def laid_out(value, used: int = 0, indent: int = 0) -> str:
    """Return an expression, on several lines where one is too long.

    Args:
        value: A value.
        used (int): Characters that stand before it on its first line.
        indent (int): Of the line that it begins on.
    """
    text = expression(value)
    container = type(value) in (list, tuple) or text.startswith(('dict(', '{'))
    if used + len(text) < WIDTH or not container or not value:
        return text
    inner, lines = indent + 4, []
    words = text.startswith('dict(')
    for key, item in _pairs(value) if isinstance(value, Mapping) else enumerate(value):
        name = f'{key}=' if words else f'{expression(key)}: ' if isinstance(value, Mapping) else ''
        lines.append(' ' * inner + name + laid_out(item, inner + len(name) + 1, inner) + ',')
    left, right = ('dict(', ')') if words else ('{', '}') if isinstance(value, Mapping) else \
        ('[', ']') if isinstance(value, list) else ('(', ')')
    return '\n'.join([left, *lines, ' ' * indent + right])


def statements(config: Mapping) -> str:
    """Return the text of a config file.

    Args:
        config (Mapping): By name.

    Raises:
        UnwritableError: Naming the keys that lead to a value without source text.
    """
    lines = []
    for key, value in sorted(_pairs(config), key=lambda pair: str(pair[0])):
        name = key if is_word(key) else f'globals()[{expression(key)}]'
        lines.append(f'{name} = ' + _at(key, value, laid_out, len(name) + 3))
    text = '\n'.join(lines) + '\n'
    try:
        text.encode()
    except UnicodeEncodeError:  # names of files that are no UTF-8
        text = text.encode('ascii', 'backslashreplace').decode()
    return text


def difference(a, b, keys: tuple = ()) -> tuple | None:
    """Return the keys that lead to the first difference of two values, or None.

    NaNs are equal here, dicts of any kind are equal to each other if what they hold is, and types count.
    """
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*dict.keys(a), *(key for key in dict.keys(b) if not dict.__contains__(a, key))]:
            if not (dict.__contains__(a, key) and dict.__contains__(b, key)):
                return (*keys, key)
            deeper = difference(dict.__getitem__(a, key), dict.__getitem__(b, key), (*keys, key))
            if deeper is not None:
                return deeper
        return None
    if type(a) in (list, tuple) and type(a) is type(b) and len(a) == len(b):
        return next((deeper for index, pair in enumerate(zip(a, b))
                     if (deeper := difference(*pair, (*keys, index))) is not None), None)
    return None if _same(a, b) else keys


def _same(a, b) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, functools.partial):
        return difference([a.func, a.args, a.keywords], [b.func, b.args, b.keywords]) is None
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and expression(a) == expression(b)
    try:
        if isinstance(a, torch.Tensor) or a != a:  # NaN
            return expression(a) == expression(b)
        return bool(a == b) or pickle.dumps(a) == pickle.dumps(b)
    except Exception:  # of comparisons that a class does not have
        return False
