"""Files that are whole or not there."""
from __future__ import annotations

import json
import os
from pathlib import Path

import torch


def write_atomically(content, path: Path) -> None:
    """``torch.save`` that leaves either the old file or the whole new one, even if the machine stops.

    Args:
        content: What ``torch.save`` takes, or bytes.
        path (Path): Where to.

    Raises:
        OSError: If it cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f'{path.name}.tmp')
    try:
        with open(temporary, 'wb') as stream:
            try:
                stream.write(content) if isinstance(content, bytes) else torch.save(content, stream)
            except RuntimeError as error:  # torch's own word for a failing stream
                raise error.__context__ if isinstance(error.__context__, OSError) else OSError(str(error)) from error
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(content, path) -> None:
    """Indented JSON, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically((json.dumps(content, indent=2) + '\n').encode(), path)


def read_json(path) -> dict:
    """What :func:`write_json` wrote, or nothing where there is no such file."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError):
        return {}
