"""Hooks for as long as something runs."""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager


@contextmanager
def hooked(handles: Iterable) -> Iterator[None]:
    """Remove hooks when what is inside ``with`` ends, however it ends.

    Args:
        handles (Iterable[RemovableHandle]): What registering the hooks returned.
    """
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
