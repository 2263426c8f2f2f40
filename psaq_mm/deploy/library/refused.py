"""Which parts of the libraries cannot be a part of a graph, known before anything is traced."""
from __future__ import annotations

from torch import nn

from ...errors import UserError

REFUSED: dict[str, str] = {}  # by name of the class, or of one it inherits: why


def refuse(model: nn.Module) -> None:
    """Raise if a model has a part that cannot be traced.

    Raises:
        UserError: If so.
    """
    for name, module in model.named_modules():
        for kind in type(module).__mro__:
            if kind.__name__ in REFUSED:
                raise UserError(f'model.{name}: {kind.__name__} cannot be one graph with the rest, '
                                f'{REFUSED[kind.__name__]}; export the parts of the model instead')
