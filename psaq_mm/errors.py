"""The one kind of error a user can mend, and what was being done when any other one came."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A setting, file or checkpoint that cannot work. Tools print the message, without a traceback."""


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
