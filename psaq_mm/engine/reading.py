"""Reading the files in which people keep weights, as plain data, whichever tool wrote them."""
from __future__ import annotations

import argparse
import builtins
import collections
import datetime
import json
import os
import pathlib
import pickle
import pickletools
import re
import shlex
import tarfile
import zipfile
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import safetensors.torch
import torch

from ..errors import UserError


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or not the model's."""


def local_path(source: str) -> Path:
    """Return the file of a path or an http(s) address; an address is fetched into torch's hub folder, once.

    Raises:
        CheckpointError: If it isn't there.
    """
    source = os.fspath(source)
    if re.match(r'https?://', source):
        path = Path(torch.hub.get_dir()) / 'checkpoints' / os.path.basename(urlparse(source).path)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            print(f'fetching {source} to {path}')
            try:
                torch.hub.download_url_to_file(source, str(path))
            except Exception as error:
                raise CheckpointError(
                    f'cannot fetch the checkpoint {source} ({error}). Download it elsewhere and pass it with '
                    f'--checkpoint FILE, or place it at {path}') from None
        return path
    path = Path(source).expanduser()
    if path.is_dir():
        raise CheckpointError(f'the checkpoint {source} is a folder: name the file in it that holds the weights')
    if not path.is_file():
        raise CheckpointError(f'the checkpoint {source} does not exist: correct its name where you gave it, on the '
                              'command line (--checkpoint FILE) or in the config (load_from)')
    return path


# -- what is data ------------------------------------------------------------------------------------------------------


class Opaque:
    """Stands for an object of a settings library: takes whatever the file hands to it, keeps and runs nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


class Mapping:
    """Stands for any kind of dict: what it makes is an ``OrderedDict``, which torch can fill."""

    def __new__(cls, *args):
        return collections.OrderedDict(*(arg for arg in args if isinstance(arg, dict)))


# What training tools store beside weights. Everything here is a value without behaviour, or a stand-in that does
# nothing; paths are pure ones, which cannot touch a file system.
CONTAINERS = [
    argparse.Namespace, torch.torch_version.TorchVersion,
    datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone,
    *(type(np.dtype(code)) for code in 'SUMmO'),
    *((kind, f'builtins.{kind.__name__}') for kind in (list, dict, tuple, int, float, str, bool, frozenset)),
    *((pure, f'{module}.{name}') for module in ('pathlib', 'pathlib._local')
      for pure, names in ((pathlib.PurePosixPath, ('PosixPath', 'PurePosixPath')),
                          (pathlib.PureWindowsPath, ('WindowsPath', 'PureWindowsPath'))) for name in names),
    *((Mapping, name) for name in (
        'collections.defaultdict', 'addict.addict.Dict', 'easydict.EasyDict', 'munch.Munch', 'box.box.Box',
        'yacs.config.CfgNode', 'fvcore.common.config.CfgNode', 'detectron2.config.config.CfgNode',
        'mmcv.utils.config.ConfigDict', 'mmengine.config.config.ConfigDict',
        'pytorch_lightning.utilities.parsing.AttributeDict', 'lightning.pytorch.utilities.parsing.AttributeDict',
        'lightning_fabric.utilities.data.AttributeDict', 'lightning.fabric.utilities.data.AttributeDict')),
    *((Opaque, name) for name in (
        'types.SimpleNamespace', 'typing.Any', 'omegaconf.dictconfig.DictConfig', 'omegaconf.listconfig.ListConfig',
        *(f'omegaconf.base.{kind}' for kind in ('ContainerMetadata', 'Metadata', 'SCMode')),
        *(f'omegaconf.nodes.{kind}Node' for kind in (
            'Any', 'String', 'Integer', 'Float', 'Boolean', 'Enum', 'Path', 'Bytes', 'Interpolation')))),
]


def check_archive(path: Path) -> None:
    """Refuses a zip that would become larger than it is: torch stores tensors as they are, bombs are compressed.

    Raises:
        CheckpointError: Before anything is unpacked.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
            names = archive.namelist()
    except Exception as error:  # a damaged archive is what torch.load complains of, too
        raise CheckpointError(f'{path} is no readable checkpoint ({type(error).__name__}: {error}). It may be truncated'
                              ) from None
    foreign = foreign_archive(path, names)
    if foreign:
        raise CheckpointError(foreign)
    if unpacked > path.stat().st_size:
        raise CheckpointError(f'{path} has {path.stat().st_size / 1e6:.1f} MB and would unpack to {unpacked / 1e6:.1f} '
                              'MB: torch.save compresses nothing, so this is no checkpoint of its making')


def load_safely(path: Path):
    """Return what a file holds, on the CPU: runs no code, unpacks no bomb.

    Args:
        path (Path): A file of ``torch.save`` or of safetensors.

    Raises:
        CheckpointError: If it is damaged or holds anything but data.
    """
    return load_plainly(path)[0]


def load_plainly(path: Path) -> tuple[object, str | None]:
    """:func:`load_safely`, and why mmengine's reader, which is ``torch.load``, could not read the file (None: it can).
    """
    path = Path(path)
    try:
        if is_safetensors(path):
            return safetensors.torch.load_file(path), 'is a safetensors file'
        check_archive(path)
        try:
            content = _torch_load(path)
        except pickle.UnpicklingError:
            known = torch.serialization.get_safe_globals()  # these stay when the block ends
            with torch.serialization.safe_globals([kind for kind in CONTAINERS if kind not in known]):
                return _torch_load(path), 'holds objects beside the weights'
        return content, 'has a name that torch takes for a safetensors file' if path.suffix == '.safetensors' else None
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(why_unreadable(path, error)) from None


def _torch_load(path):
    with open(path, 'rb') as stream:
        return torch.load(stream, map_location='cpu', weights_only=True)


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as the safetensors format does: the length of a header, and the header, a JSON object."""
    with open(path, 'rb') as stream:
        start = stream.read(9)
    return len(start) == 9 and start[8:] == b'{' and 2 <= int.from_bytes(start[:8], 'little') <= 100_000_000


# -- what is not -------------------------------------------------------------------------------------------------------

COMPRESSED = {b'\x1f\x8b': 'gzip', b'BZh': 'bzip2', b'\xfd7zXZ': 'xz', b'7z\xbc\xaf': '7z', b'Rar!': 'rar',
              b'\x28\xb5\x2f\xfd': 'zstandard'}
HARMFUL = ('os', 'posix', 'nt', 'sys', 'subprocess', 'shutil', 'socket', 'importlib', 'runpy', 'ctypes', 'pty')
TRUSTED = 'Convert it, but only if you trust it, as that may run code from the file:'


def _convert(path: Path, code: str) -> str:
    """Return the line of Python that writes a checkpoint of weights alone, for the shell."""
    new = path.with_name(f'{path.stem}_weights.pth')
    code = code.format(file=json.dumps(str(path)), new=json.dumps(str(new)))
    return f"python -c {shlex.quote(f'import torch; {code}')}"


def foreign_archive(path: Path, names: list[str]) -> str | None:
    """Say what a zip of other tools is and how to convert it, or None where it is a file of ``torch.save``."""
    ends = {name.rsplit('/', 1)[-1] for name in names}
    if 'constants.pkl' in ends:
        line = _convert(path, 'torch.save(torch.jit.load({file}, map_location="cpu").state_dict(), {new})')
        return f'{path} is a TorchScript archive, not a checkpoint. {TRUSTED} {line}'
    if 'archive_format' in ends or any(name.startswith('serialized_exported_program') for name in ends):
        line = _convert(path, 'torch.save(torch.export.load({file}).state_dict, {new})')
        return f'{path} is a program of torch.export, not a checkpoint. {TRUSTED} {line}'
    if 'data.pkl' in ends or not names:
        return None
    if all(name.endswith('.npy') for name in names):
        line = _convert(path, 'import numpy; torch.save({{k: torch.from_numpy(v) for k, v in '
                        'numpy.load({file}).items()}}, {new})')
        return f'{path} is an archive of NumPy arrays, not a checkpoint. Convert it: {line}'
    return f'{path} is a zip archive of other files ({", ".join(names[:3])}): unpack it and name the checkpoint in it'


def why_unreadable(path: Path, error: Exception) -> str:
    """Say what a file is that torch cannot load as data, and what to do."""
    with open(path, 'rb') as stream:
        start = stream.read(300)
    if not start:
        return f'{path} is empty: download or copy it again'
    for magic, kind in COMPRESSED.items():
        if start.startswith(magic):
            return f'{path} is compressed ({kind}): unpack it and name the checkpoint in it'
    if start.startswith(b'version https://git-lfs'):
        return f'{path} is a pointer of Git LFS, not the file itself: fetch it with git lfs pull'
    if start.lstrip()[:14].lower().startswith((b'<!doctype', b'<html', b'<?xml')):
        return f'{path} is a web page, not a checkpoint: the download went wrong, repeat it'
    if start.startswith(b'\x89HDF'):
        return f'{path} is an HDF5 file, as Keras writes them: psaq_mm reads checkpoints of PyTorch'
    if start.lstrip().startswith(b'{'):
        return f'{path} is a JSON file: name the file that holds the weights, or join those that this one lists'
    if start[257:262] == b'ustar' or tarfile.is_tarfile(path):
        return _about_tar(path)
    text = re.sub(r'\x1b\[[0-9;]*m', '', str(error).strip()) or 'no reason given'
    wanted = re.search(r'GLOBAL ([A-Za-z_][\w.]*) ', text)
    if not wanted and 'the checkpoint asks for' not in text:
        if isinstance(error, pickle.UnpicklingError):  # what follows is torch's advice for other cases
            text = text.rpartition('WeightsUnpickler error:')[2].strip() or text
        text = ''.join(letter if letter.isprintable() else '?' for letter in text.splitlines()[0][:200])
        return (f'{path} is no readable checkpoint ({type(error).__name__}: {text}). '
                'It may be truncated, or no checkpoint at all')
    name = wanted[1] if wanted else text.partition('the checkpoint ')[2].splitlines()[0]
    if not wanted or name.partition('.')[0] in HARMFUL or '.' not in name and not isinstance(
            getattr(builtins, name, None), type):
        return (f'{path} is no readable checkpoint: besides weights it asks for {name}, which psaq_mm does not load. '
                'No checkpoint needs that: the file may be malicious')
    whole = _holds_an_object(path)
    code = 'torch.save(torch.load({file}, map_location="cpu", weights_only=False).state_dict(), {new})' if whole else (
        'c = torch.load({file}, map_location="cpu", weights_only=False); torch.save({{k: {{n: t for n, t in getattr(v, '
        '"state_dict", lambda: v)().items() if torch.is_tensor(t)}} for k, v in c.items() if isinstance(v, (dict, '
        'torch.nn.Module))}}, {new})')
    what = 'is a whole pickled object' if whole else 'holds more than data'
    return (f'{path} {what} ({name}), which psaq_mm does not load. {TRUSTED} {_convert(path, code)}')


def _about_tar(path: Path) -> str:
    try:
        with tarfile.open(path) as archive:
            names = archive.getnames()
    except tarfile.TarError:
        names = []
    if {'pickle', 'storages', 'tensors'} <= set(names):
        line = _convert(path, 'torch.save(torch.load({file}, map_location="cpu", weights_only=False), {new})')
        return (f'{path} is in the format of PyTorch before 0.1.10, which cannot be read as mere data. {TRUSTED} '
                f'{line}')
    return f'{path} is a tar archive ({", ".join(names[:3]) or "damaged"}): unpack it and name the checkpoint in it'


def _holds_an_object(path: Path) -> bool:
    """Whether a file of ``torch.save`` holds one object rather than a dict; its pickle is read, not run."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                name = next(name for name in archive.namelist() if name.endswith('data.pkl'))
                with archive.open(name) as stream:
                    return _makes_an_object(stream)
        with open(path, 'rb') as stream:
            for _ in range(3):  # magic number, version, and system come first in the older format
                collections.deque(pickletools.genops(stream), 0)
            return _makes_an_object(stream)
    except Exception:
        return False


def _makes_an_object(stream):
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name not in ('PROTO', 'FRAME'):
            return opcode.name != 'EMPTY_DICT' and argument != 'collections OrderedDict'
    return False
