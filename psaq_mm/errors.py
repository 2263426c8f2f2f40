"""The one kind of error a user can mend, how others are told, and what was being done when one came."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A setting, file or checkpoint that cannot work. Tools print the message, without a traceback."""


OUT_OF_MEMORY = ('out of memory', "can't allocate memory", 'not enough memory', 'failed to allocate')


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory has ended: Python's own, or torch's on any device."""
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and any(
        words in str(error).lower() for words in OUT_OF_MEMORY)


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Say what is being done, with which config key or file, for an error that nobody foresaw.

    Args:
        what (str): E.g. 'evaluating in full precision (test_dataloader, test_evaluator)'.
    """
    try:
        yield
    except BaseException as error:
        if not hasattr(error, 'doing'):
            error.doing = what  # the innermost is the most exact
        raise
