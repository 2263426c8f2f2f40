"""The stanza's reference, from the classes that parse it: ``python -m psaq_mm.reference > docs/stanza.md``."""
from __future__ import annotations

import types
import typing
from typing import Literal

from pydantic import BaseModel

from .recipes import RECIPES
from .stanza import ROOT, QuantizationConfig, flat


def _kind(annotation) -> str:
    """A field's type in words."""
    if typing.get_origin(annotation) is Literal:
        return ', '.join(f"'{value}'" for value in typing.get_args(annotation))
    words = {'bool': 'True or False', 'int': 'whole number', 'float': 'number', 'str': 'text', 'dict': 'dict',
             'NoneType': 'None', 'tuple': 'list'}
    parts = [a for a in typing.get_args(annotation)] if typing.get_origin(annotation) in (
        typing.Union, types.UnionType) else [annotation]
    if len(parts) > 1:
        return ' or '.join(_kind(part) for part in parts)
    name = (typing.get_origin(parts[0]) or parts[0]).__name__
    return words.get(name, name)


def _limits(field) -> str:
    """A field's bounds in words."""
    signs = dict(ge='from {}', gt='above {}', le='to {}', lt='below {}')
    return ' '.join(text.format(getattr(limit, name)) for limit in field.metadata for name, text in signs.items()
                    if hasattr(limit, name))


def reference() -> str:
    """The reference of the stanza, Markdown, from the classes it is parsed by: docs/stanza.md."""
    lines = ['# The stanza', '', 'Written by `python -m psaq_mm.reference > docs/stanza.md` from the classes that '
             'parse it; a test holds it to them.', '',
             '`quantization = dict(...)` in a config. Everything has a default: `dict()` is W8A8 by PSAQ-ViT V2. '
             "Where a recipe has another default, the table names it: `recipe` says when it holds. A "
             'wrong key, type, value or name pattern is one clear error before any work starts. On the command line: '
             '`--cfg-options quantization.synthesis.steps=200`.', '']

    low_bit = dict(flat(RECIPES['low_bit']))

    def section(cls, path, default):
        title = path or ROOT
        lines.extend([f'## {title}', '', cls.__doc__.strip().replace('``', '`').splitlines()[0], '',
                      '| key | default | values | meaning |', '| --- | --- | --- | --- |'])
        nested = []
        for name, field in cls.model_fields.items():
            value = getattr(default, name, field.default)
            inner = next((k for k in (field.annotation, *typing.get_args(field.annotation))
                          if isinstance(k, type) and issubclass(k, BaseModel)), None)
            where = f'{path}.{name}' if path else name
            if inner is not None:
                nested.append((inner, where, value))
                anchor = where.replace('.', '')
                lines.append(f'| `{name}` | | [{"list of dicts" if field.annotation is not inner else "dict"}]'
                             f'(#{anchor}) | {field.description or inner.__doc__.splitlines()[0]} |'.replace('``', '`'))
                continue
            shown = 'required' if field.is_required() and default is None else f'`{_shown(value)}`'
            if where in low_bit:
                shown += f"; 'low_bit': `{_shown(low_bit[where])}`"
            kind = ' '.join(filter(None, (_kind(field.annotation), _limits(field))))
            lines.append(f'| `{name}` | {shown} | {kind} | {field.description or ""} |'.replace('``', '`'))
        lines.append('')
        for inner, where, value in nested:
            section(inner, where, value if isinstance(value, BaseModel) else None)

    def _shown(value):
        return list(value) if isinstance(value, tuple) else value if not isinstance(value, str) else f"'{value}'"

    section(QuantizationConfig, '', QuantizationConfig())
    return '\n'.join(lines).rstrip() + '\n'


if __name__ == '__main__':
    print(reference(), end='')
