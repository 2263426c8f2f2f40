"""Files that are whole or not there, and folders in which psaq_mm touches nothing but its own files."""
from __future__ import annotations

import hashlib
import json
import os
import platform
import secrets
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from .errors import UserError

TEMPORARY = '.{name}.{token}.tmp'
"""Names of files while they are written."""


def temporary_beside(path: Path) -> Path:
    """Return a name in the same folder that no other process uses."""
    return path.with_name(TEMPORARY.format(name=path.name, token=secrets.token_hex(8)))


def write_atomically(content, path: Path) -> None:
    """Write a file so that either the old file or the whole new one is there, even if the machine stops.

    Args:
        content: What ``torch.save`` takes, or bytes.
        path (Path): Where to.

    Raises:
        OSError: If it cannot be written.
    """
    path = Path(path)
    temporary = temporary_beside(path)
    try:
        with open(temporary, 'xb') as stream:
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
    """Write indented JSON, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(_as_json(content), path)


def _as_json(content) -> bytes:
    """Return indented JSON."""
    return (json.dumps(content, indent=2) + '\n').encode()


def as_data(content) -> dict:
    """Return content as it comes back from a JSON file; what JSON does not know, such as classes, becomes text."""
    return json.loads(json.dumps(content, default=str))


def read_json(path) -> dict:
    """Read what :func:`write_json` wrote; return an empty dict where there is no such file."""
    try:
        return json.loads(Path(path).read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return {}


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    found = hashlib.sha256()
    with open(path, 'rb') as stream:
        while chunk := stream.read(1 << 20):
            found.update(chunk)
    return found.hexdigest()


class OwnedFolder:
    """A folder of the user's that psaq_mm writes results to.

    The folder may hold anything else, such as the checkpoints of the training run. psaq_mm replaces and removes only
    files that it wrote and that nobody changed since: ``.psaq_mm/manifest.json`` in the folder has the SHA-256 of each.
    All writing goes through :meth:`write` or :meth:`writing`.

    Args:
        path (str | Path): The folder.
        option (str): The command line option that chooses another folder, for errors. Defaults to '--work-dir'.
    """
    STATE = '.psaq_mm'

    def __init__(self, path, option: str = '--work-dir'):
        self.path, self.option = Path(path), option
        self.state = self.path / self.STATE

    # -- what is ours ------------------------------------------------------------------------------------------------

    def manifest(self) -> dict[str, list[str]]:
        """Return the digests that each of our files may have, by name relative to the folder; none of a sub-folder
        that is ours as a whole, whose name ends in '/'.
        """
        return read_json(self.state / 'manifest.json').get('files', {})

    def _record(self, changes: dict[str, list[str] | None]) -> None:
        files = {name: digests for name, digests in {**self.manifest(), **changes}.items() if digests is not None}
        write_json(dict(files=dict(sorted(files.items()))), self.state / 'manifest.json')

    def is_ours(self, name: str, known: dict | None = None) -> bool:
        """Return whether psaq_mm wrote the file, and nobody has changed it since.

        Args:
            name (str): Of the file.
            known (dict, optional): The manifest, where it has been read already.
        """
        path, digests = self.path / name, (self.manifest() if known is None else known).get(name)
        return bool(digests) and path.is_file() and not path.is_symlink() and digest(path) in digests

    def foreign(self, names: Iterable[str]) -> list[str]:
        """Return the files of some names that psaq_mm must not replace.

        Args:
            names (Iterable[str]): Of files, of sub-folders, and of sub-folders that are ours as a whole ('name/').
        """
        found, known = [], self.manifest()
        for name in names:
            path = self.path / name.rstrip('/')
            if name.endswith('/'):
                if os.path.lexists(path) and name not in known and (not path.is_dir() or any(path.iterdir())):
                    found.append(name)
            elif path.is_dir() and not path.is_symlink():
                found += [inner for inner in self._inside(name) if not self.is_ours(inner, known)]
            elif os.path.lexists(path) and not self.is_ours(name, known):
                found.append(name)
        return found

    def _inside(self, name: str) -> list[str]:
        """Return the files in a sub-folder, less hidden ones, which file managers leave everywhere."""
        return sorted(str(path.relative_to(self.path)) for path in (self.path / name).rglob('*')
                      if not path.is_dir() and not path.name.startswith('.'))

    def claim(self, names: Iterable[str]) -> None:
        """Refuse early what would replace a file of the user's.

        Args:
            names (Iterable[str]): As of :meth:`foreign`.

        Raises:
            UserError: Naming the file.
        """
        found = self.foreign(names)
        if found:
            known = self.manifest()
            why = 'was changed after psaq_mm wrote it' if found[0] in known else 'was not written by psaq_mm'
            more = f' ({len(found) - 1} more such files)' if len(found) > 1 else ''
            raise UserError(f'{self.path / found[0]} {why}, and a file of that name would be written{more}: move it '
                            f'away, or choose another folder with {self.option}')

    # -- writing -----------------------------------------------------------------------------------------------------

    def own(self, name: str) -> Path:
        """Make a sub-folder in which everything is ours, and return it.

        Half-written files of a process that was killed are removed.
        """
        self.claim([f'{name}/'])
        (self.path / name).mkdir(parents=True, exist_ok=True)
        for path in (self.path / name).rglob(TEMPORARY.format(name='*', token='*')):
            path.unlink()
        if f'{name}/' not in self.manifest():
            self._record({f'{name}/': []})
        return self.path / name

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Give a path where nothing is yet; what is written there, a file or a folder of files, takes its place.

        A folder replaces our files of the last time that it no longer has. The old content stays where the body fails.

        Args:
            name (str): Of the file or sub-folder.

        Raises:
            UserError: If a file of the user's is in the way.
        """
        temporary = self.state / 'tmp' / secrets.token_hex(8) / Path(name).name
        temporary.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            self._place(name, temporary)
        finally:
            shutil.rmtree(temporary.parent, ignore_errors=True)

    def write_all(self, source: Path) -> None:
        """Copy all files of another folder, none or all, and leave ours of other names.

        Args:
            source (Path): The folder.

        Raises:
            UserError: If a file of the user's is in the way.
        """
        temporary = self.state / 'tmp' / secrets.token_hex(8)
        try:
            shutil.copytree(source, temporary)
            self._replace({path.name: path for path in sorted(temporary.iterdir())})
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _place(self, name: str, temporary: Path) -> None:
        if not temporary.is_dir():
            self._replace({name: temporary})
            return
        new = {f'{name}/{path.relative_to(temporary)}': path for path in sorted(temporary.rglob('*'))
               if not path.is_dir()}
        gone = {key: None for key in self.manifest() if key.startswith(f'{name}/') and key not in new}
        self._replace(new)
        for key in gone:
            if self.is_ours(key):
                (self.path / key).unlink()
        self._record(gone)

    def _replace(self, new: dict[str, Path]) -> None:
        """Move files to their places, by name."""
        for path in new.values():
            with open(path, 'rb') as stream:
                os.fsync(stream.fileno())
        old, digests = self.manifest(), {key: digest(path) for key, path in new.items()}
        self.claim(new)
        # Both are ours until all are in place: whenever the process ends, a file has one of the digests.
        self._record({key: [*old.get(key, ()), value] for key, value in digests.items()})
        for key, path in new.items():
            (self.path / key).parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, self.path / key)
        self._record({key: [value] for key, value in digests.items()})

    def write(self, name: str, content) -> Path:
        """Write a file, whole or not at all.

        Args:
            name (str): Of the file.
            content: What ``torch.save`` takes, or bytes.

        Returns:
            Path: The file.

        Raises:
            OSError: If it cannot be written.
            UserError: If a file of the user's is in the way.
        """
        with self.writing(name) as temporary:
            write_atomically(content, temporary)
        return self.path / name

    def write_json(self, name: str, content) -> Path:
        """Write indented JSON; otherwise as :meth:`write`."""
        return self.write(name, _as_json(content))

    def remove(self, name: str) -> None:
        """Remove a file if it is ours."""
        if self.is_ours(name):
            (self.path / name).unlink()
            self._record({name: None})

    # -- one at a time -----------------------------------------------------------------------------------------------

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep the folder for this process until the context or the process ends.

        Raises:
            UserError: If another process has it, or nothing can be written there.
        """
        try:
            str(self.path.absolute()).encode()
        except UnicodeEncodeError:  # libraries write the name in UTF-8; OpenCV crashes with it
            raise UserError(f'{ascii(str(self.path))}: Python reads this name of a folder as bytes, since the locale '
                            f'is not UTF-8. Set PYTHONUTF8=1, or LC_ALL=C.UTF-8, or choose another {self.option}'
                            ) from None
        holder = self.state / 'holder.json'
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        try:
            self.state.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.state / 'lock', timeout=0)
            lock.acquire()
        except Timeout:
            by = read_json(holder)
            who = f"process {by['pid']} on {by['host']}, since {by['since']}: {by['command']}" if by else 'not known'
            raise UserError(f'another command of psaq_mm is at work in {self.path} ({who}): wait until it is done, or '
                            f'choose another folder with {self.option}') from None
        except OSError as error:
            raise UserError(f'cannot write to {self.path} ({error}): choose another folder with {self.option}'
                            ) from None
        try:
            write_json(dict(pid=os.getpid(), host=platform.node(), since=time.strftime('%Y-%m-%d %H:%M:%S'),
                            command=' '.join(sys.argv)), holder)
            shutil.rmtree(self.state / 'tmp', ignore_errors=True)  # of a process that was killed
            yield
        finally:
            holder.unlink(missing_ok=True)
            if made and [path.name for path in self.path.rglob('*')] == [self.STATE, 'lock']:  # nothing came of it
                shutil.rmtree(self.path)
                for folder in made[1:]:
                    folder.rmdir()
            lock.release()
