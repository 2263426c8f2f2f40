"""Reading full-precision checkpoints with all questions asked, writing quantized ones."""
from __future__ import annotations

import logging
import os
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import torch
from mmengine import dist
from mmengine.fileio import LocalBackend, register_backend
from mmengine.logging import print_log
from torch import nn

from ..errors import UserError
from ..files import OwnedFolder, write_atomically
from ..models import PATCH_BIAS, convert_state, convert_swin, is_original_swin
from ..quantization import quantizers
from ..quantization.kernels import IS_COMPILED
from ..version import __version__


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or not the model's."""


def local_path(source: str) -> Path:
    """A file for a path or an http(s) address; the address is fetched into torch's hub folder, once.

    Raises:
        CheckpointError: If it isn't there.
    """
    if re.match(r'https?://', source):
        path = Path(torch.hub.get_dir()) / 'checkpoints' / os.path.basename(source)
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
    if not path.is_file():
        raise CheckpointError(f'the checkpoint {source} does not exist: correct load_from in the config, '
                              'or pass --checkpoint FILE')
    return path


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
    except Exception as error:  # a damaged archive is what torch.load complains of, too
        raise CheckpointError(f'{path} is no readable checkpoint ({type(error).__name__}: {error}). It may be truncated'
                              ) from None
    if unpacked > path.stat().st_size:
        raise CheckpointError(f'{path} has {path.stat().st_size / 1e6:.1f} MB and would unpack to {unpacked / 1e6:.1f} '
                              'MB: torch.save compresses nothing, so this is no checkpoint of its making')


def load_safely(path: Path):
    """``torch.load``, onto the CPU, of what may come from anywhere: runs no code, unpacks no bomb.

    Args:
        path (Path): A file.

    Raises:
        CheckpointError: If it is damaged or holds anything but data.
    """
    try:
        check_archive(path)
        return torch.load(path, map_location='cpu', weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:
        reason = (str(error).strip() or 'no reason given').splitlines()[0]
        raise CheckpointError(f'{path} is no readable checkpoint ({type(error).__name__}: {reason}). It may be '
                              'truncated, or hold objects other than weights, which psaq_mm does not load') from None


def _newest_first(folder: Path) -> list[Path]:
    return sorted(Path(folder).glob('iter_*.pth'), key=lambda path: path.stat().st_mtime_ns, reverse=True)


STATE = 'data_free'  # what a checkpoint of an interrupted run has and that of a training run has not


def resumable_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of interrupted data-free runs in a folder, the newest first.

    Files are told by what is in them: a training run names its checkpoints ``iter_*.pth``, too.
    """
    def is_one(path):
        try:
            with zipfile.ZipFile(path) as archive:
                name = next(name for name in archive.namelist() if name.endswith('/data.pkl'))
                return STATE.encode() in archive.read(name)
        except (OSError, zipfile.BadZipFile, StopIteration, zlib.error):
            return False

    return [path for path in _newest_first(folder) if is_one(path)]


def interrupted_run(folder: Path) -> str | None:
    """Return the newest checkpoint from which the run in a folder can go on; pass over damaged ones.

    Returns:
        str: Its path, or None if the run has left none.

    Raises:
        CheckpointError: If it has left some, and none can be read.
    """
    found = _newest_first(folder)
    for path in found:
        try:
            content = load_safely(path)
            if isinstance(content, dict) and {STATE, 'state_dict', 'meta'} <= content.keys():
                return str(path)
            reason = f'{path} is no checkpoint of a data-free run'
        except CheckpointError as error:
            reason = str(error)
        print_log(f'{reason}. Looking for an earlier one', 'current', logging.WARNING)
    if found:
        raise CheckpointError(f'--resume: none of the {len(found)} checkpoints iter_*.pth in {folder} can be read: '
                              'start afresh without --resume')
    return None


def read_checkpoint(source: str) -> dict:
    """Loads a checkpoint safely (``weights_only=True``) onto the CPU.

    Args:
        source (str): Path or http(s) address.

    Returns:
        dict: ``state_dict`` without 'module.' prefixes, ``meta``, ``path``; ``layout`` None, see
        :func:`float_checkpoint`.

    Raises:
        CheckpointError: If it is missing, damaged, holds code, or holds no weights.
    """
    path = local_path(source)
    content = load_safely(path)
    if not isinstance(content, dict):
        raise CheckpointError(f'{path} holds a {type(content).__name__}, not a dict of weights')
    state = content.get('state_dict', content.get('model', content))
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: 'state_dict' is a {type(state).__name__}, not a dict of weights")
    state = {re.sub(r'^module\.', '', str(k)): v for k, v in state.items() if isinstance(v, torch.Tensor)}
    if not state:
        raise CheckpointError(f'{path} holds no weights')
    odd = sorted(k for k, v in state.items()
                 if v.layout != torch.strided or v.is_quantized or v.is_complex() or v.is_meta)
    if odd:
        raise CheckpointError(f'{path} holds sparse, quantized, complex or empty tensors in {_listing(odd)}: none that '
                              'a full-precision model has')
    meta = content.get('meta')
    return dict(state_dict=state, meta=meta if isinstance(meta, dict) else {}, path=str(path), layout=None)


def float_checkpoint(model: nn.Module, source: str) -> dict:
    """:func:`read_checkpoint`, in the layout of the model whatever layout the file has.

    Args:
        model (nn.Module): Float.
        source (str): Path or http(s) address.

    Returns:
        dict: ``layout`` names what it was converted from, if it was.

    Raises:
        CheckpointError: If it cannot be read or converted.
    """
    content = read_checkpoint(source)
    content['keys'] = sorted(content['state_dict'])  # as the file has them, for errors
    with conversion_of(content['path']):
        content['state_dict'], content['layout'] = convert_state(content['state_dict'], model)
    return content


@contextmanager
def conversion_of(path: str) -> Iterator[None]:
    """Makes whatever a converter stumbles over in a malformed file an error that names the file."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(f'{path} has the keys of a layout that psaq_mm converts, but not its shapes '
                              f'({type(error).__name__}: {str(error).splitlines()[0]})') from None


FULL_PRECISION, QUANTIZED = 'full_precision.pth', 'quantized.pth'


def in_own_layout(content: dict, folder: OwnedFolder) -> str:
    """Return the path of a file that mmengine loads into the model: the checkpoint itself, or what it was converted to.

    Args:
        content (dict): From :func:`float_checkpoint`.
        folder (OwnedFolder): Where ``full_precision.pth`` goes if one is needed.

    Raises:
        UserError: If a file of that name is there that is not ours.
    """
    if content['layout'] is None:
        return content['path']
    if dist.is_main_process():
        folder.write(FULL_PRECISION, dict(meta=plain(content['meta']), state_dict=content['state_dict']))
    dist.barrier()
    return str(folder.path / FULL_PRECISION)


def convert_file(source: str, target: str) -> int:
    """Writes a checkpoint of the original Swin detectors or segmentors in the layout of mmdet 3 and mmseg 1.

    Returns:
        int: Number of tensors written.

    Raises:
        CheckpointError: If the checkpoint cannot be read, has another layout, or the target cannot be written.
    """
    content = read_checkpoint(source)
    state = content['state_dict']
    if not is_original_swin(state):
        has = 'is in the layout of mmdet 3 and mmseg 1 already' if any(
            key.startswith('backbone.stages.') for key in state) else f'has keys like {_listing(sorted(state))}'
        raise CheckpointError(f"{content['path']} {has}; what can be converted are Swin detectors and segmentors with "
                              "keys like 'backbone.layers.0.blocks.0.attn.qkv.weight'")
    with conversion_of(content['path']):
        state = convert_swin(state)
    try:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(dict(meta=plain(content['meta']), state_dict=state), Path(target))
    except (OSError, RuntimeError) as error:  # torch reports some of what the system refuses as RuntimeError
        raise CheckpointError(f'cannot write {target} ({error})') from None
    return len(state)


# Buffers that follow from the architecture; some versions store them, some don't.
DERIVED = ('num_batches_tracked', 'relative_position_index', 'attn_mask')


def _listing(items):
    return ', '.join(items[:3]) + (f' and {len(items) - 3} more' if len(items) > 3 else '')


def load_float(model: nn.Module, checkpoint: dict, targets=('backbone', 'neck')) -> None:
    """Loads full-precision weights into a float or a converted model, or says why they don't fit.

    Args:
        model (nn.Module): The model.
        checkpoint (dict): From :func:`read_checkpoint`.
        targets (Sequence[str]): Submodules in which the checkpoint may hold nothing the model lacks.

    Raises:
        CheckpointError: If parameters are missing, have other shapes, are not finite, or the checkpoint belongs to
            another architecture, or is quantized already.
    """
    state, path = checkpoint['state_dict'], checkpoint['path']
    if any(key.endswith('_quantizer.scale') for key in state):
        raise CheckpointError(f'{path} is quantized already: pass the full-precision checkpoint')
    quantizer_keys = tuple(f'{name}.' for name in quantizers(model, every_name=True))
    own = {k: v for k, v in model.state_dict().items() if not (quantizer_keys and k.startswith(quantizer_keys))}
    shapes = [
        f'{k} is {tuple(state[k].shape)} in the checkpoint, {tuple(v.shape)} in the model' for k, v in own.items()
        if k in state and state[k].shape != v.shape
    ]
    if shapes:
        classes = all(re.match(r'(\S*(fc_cls|fc_reg|conv_logits|conv_seg)|head)\.', text) for text in shapes)
        hint = ('The number of classes differs: set num_classes in the model config to the checkpoint\'s.'
                if classes else 'The checkpoint belongs to another architecture.')
        raise CheckpointError(f'{path} does not fit the model: {_listing(shapes)}. {hint}')
    kinds = [f'{k} is {state[k].dtype} in the checkpoint, {v.dtype} in the model' for k, v in own.items()
             if k in state and v.is_floating_point() and not state[k].is_floating_point()]
    if kinds:
        raise CheckpointError(f'{path} does not fit the model: {_listing(kinds)}. It may be quantized already')
    missing = sorted(k for k in own if k not in state and not k.endswith(DERIVED))
    if missing:
        raise CheckpointError(f'{path} does not fit the model: it lacks {_listing(missing)} ({len(missing)} of '
                              f'{len(own)} tensors). The checkpoint belongs to another architecture; its keys are like '
                              f"{_listing(checkpoint.get('keys') or sorted(state))}")
    prefixes = tuple(f'{t}.' for t in targets)
    extra = sorted(k for k in state if k not in own and k.startswith(prefixes) and not k.endswith(DERIVED))
    if extra:
        hint = ('Set model.backbone.patch_bias = True: mmseg 1 builds its ViT without that bias, older files have it' if
                extra == [PATCH_BIAS] else 'The checkpoint belongs to another (deeper?) architecture')
        raise CheckpointError(
            f'{path} does not fit the model: it holds {_listing(extra)}, which the model lacks. {hint}')
    broken = sorted(k for k in own if k in state and not torch.isfinite(state[k].float()).all())
    if broken:
        raise CheckpointError(f'{path} holds NaN or infinite values in {_listing(broken)}')
    model.load_state_dict({k: state[k] for k in own if k in state}, strict=False)


def plain(value):
    """A copy made of plain Python values and tensors, so that a file of it loads anywhere with weights_only."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set)):
        return (tuple if isinstance(value, tuple) else list)(plain(v) for v in value)
    if isinstance(value, (str, int, float, bool, torch.Tensor)) or value is None:
        return value
    return value.tolist() if hasattr(value, 'tolist') else str(value)


def versions() -> dict[str, str]:
    """Versions of everything the result depends on, as far as it is installed."""
    found = dict(psaq_mm=__version__)
    for name in ('torch', 'mmengine', 'mmcv', 'mmdet', 'mmsegmentation', 'timm'):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return dict(found, kernels='compiled' if IS_COMPILED else 'none')


@register_backend('psaq_mm.atomic')
class AtomicBackend(LocalBackend):
    """mmengine's files on disk, each written whole or not at all."""

    def put(self, obj, filepath):
        write_atomically(obj, filepath)


def save_quantized(model: nn.Module, folder: OwnedFolder, quantization, dataset_meta: dict, **meta) -> Path:
    """Write the quantized checkpoint: weights, scales, zero points, the stanza and versions.

    Args:
        model (nn.Module): Converted and calibrated.
        folder (OwnedFolder): Where ``quantized.pth`` goes.
        quantization (QuantizationConfig): The stanza.
        dataset_meta (dict): Classes and palette, as mm* checkpoints carry them.
        **meta: More entries for ``meta``.

    Returns:
        Path: The file.
    """
    meta = dict(quantization=quantization.to_dict(), versions=versions(), dataset_meta=dataset_meta,
                mmengine_version=versions()['mmengine'], **meta)
    state = {k: v.detach().cpu() for k, v in model.state_dict().items()}
    return folder.write(QUANTIZED, dict(meta=plain(meta), state_dict=state))
