"""Reading full-precision checkpoints with all questions asked, writing quantized ones."""
from __future__ import annotations

import logging
import re
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import torch
from mmengine import dist
from mmengine.fileio import LocalBackend, register_backend
from mmengine.logging import print_log
from torch import nn

from ..files import OwnedFolder, write_atomically
from ..models import explain_classes
from ..models.converters import (
    DERIVED,
    ORIGINAL_SWIN,
    PATCH_BIAS,
    WeightSet,
    convert_state,
    convert_swin,
    sets_for,
    weight_sets,
)
from ..quantization import quantizers
from ..quantization.kernels import IS_COMPILED
from ..stanza import ROOT
from ..version import __version__
from .reading import CheckpointError, load_plainly, load_safely, local_path


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
    """Return a checkpoint whose names are the model's already, as ``quantized.pth`` and ``full_precision.pth`` are.

    Args:
        source (str): Path or http(s) address.

    Returns:
        dict: ``state_dict`` without 'module.' prefixes, ``meta``, ``path``.

    Raises:
        CheckpointError: If it is missing, damaged, holds code, or holds no weights.
    """
    path, content, _ = _read(source)
    state = content.get('state_dict', content.get('model', content))
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: 'state_dict' is a {type(state).__name__}, not a dict of weights")
    state = {re.sub(r'^module\.', '', str(k)): v for k, v in state.items() if isinstance(v, torch.Tensor)}
    return dict(state_dict=_checked(state, path), meta=_meta(content), path=path)


def _read(source):
    path = local_path(source)
    content, foreign = load_plainly(path)
    if not isinstance(content, dict):
        raise CheckpointError(f'{path} holds a {type(content).__name__}, not a dict of weights')
    return str(path), content, foreign


def _meta(content):
    return content['meta'] if isinstance(content.get('meta'), dict) else {}


def _checked(state, path):
    """The state.

    Raises:
        CheckpointError: If it is empty, or holds tensors of a kind that no model in full precision has.
    """
    if not state:
        raise CheckpointError(f'{path} holds no weights')
    odd = sorted(k for k, v in state.items()
                 if v.layout != torch.strided or v.is_quantized or v.is_complex() or v.is_meta)
    if odd:
        raise CheckpointError(f'{path} holds sparse, quantized, complex or empty tensors in {_listing(odd)}: none that '
                              'a full-precision model has')
    return state


def float_checkpoint(model: nn.Module, source: str, weights: str | None = None) -> dict:
    """Return the weights that a file holds for a model, by the model's names, whatever names and place the file has.

    Args:
        model (nn.Module): Float.
        source (str): Path or http(s) address.
        weights (str, optional): 'ema' or 'plain', of a file that holds both. Default: what the library's own test
            tool would load.

    Returns:
        dict: ``state_dict``; ``meta``; ``path``; ``keys``, the names in the file; ``layout``, what the weights were
        converted from, or None; ``weights``, 'ema', 'plain', or None where that is unknown; ``why``, for what reason
        mmengine would not load just these from the file, or None where it would.

    Raises:
        CheckpointError: If it cannot be read or converted, or lacks the wanted set of weights.
    """
    path, content, foreign = _read(source)
    with conversion_of(path):
        sets = weight_sets(content, model)
    if not sets:  # another architecture's, which load_float explains
        sets = [WeightSet('', read_checkpoint(source)['state_dict'])]
    chosen = _choose(sets, weights, content, path)
    state = _checked(chosen.state, path)
    with conversion_of(path):
        state, layout = convert_state(state, model)
    kind = {True: 'ema', False: 'plain', None: _own(content).get('weights')}[chosen.ema]
    return dict(state_dict=state, meta=_meta(content), path=path, layout=layout, weights=kind,
                keys=sorted(chosen.keys or chosen.state), why=foreign or _difference(content, state, layout, chosen))


def _own(content):
    """What :func:`in_own_layout` noted in a file that it wrote, or nothing."""
    noted = _meta(content).get('full_precision')
    return noted if isinstance(noted, dict) else {}


def _choose(sets, weights, content, path):
    """The set of weights to use.

    Raises:
        CheckpointError: If the wanted one isn't there.
    """
    words = {True: 'averaged over training', False: 'not averaged', None: 'of unknown kind'}
    listing = ', '.join(f"'{found.name or 'the file itself'}' ({words[found.ema]})" for found in sets)
    wanted = sets
    if weights:
        wanted = [found for found in sets if found.ema is (weights == 'ema')]
        if not wanted and len(sets) == 1 and sets[0].ema is None and (
                weights == 'plain' or _own(content).get('weights') == 'ema'):
            wanted = sets
    if not wanted:
        raise CheckpointError(f"{ROOT}.load_weights = '{weights}' (--weights): {path} holds no such weights for this "
                              f'model, only {listing}. Leave the setting out')
    if len(sets) > 1:
        print_log(f"{path} holds {len(sets)} sets of weights: {listing}. Used: '{wanted[0].name or 'the file itself'}'"
                  + ('' if weights else '. --weights ema or plain chooses'), 'current',
                  logging.INFO if weights else logging.WARNING)
    return wanted[0]


def _difference(content, state, layout, chosen) -> str | None:
    """Why mmengine's ``load_checkpoint`` would not load exactly these weights from this file, or None if it would."""
    if layout:
        return f'has the layout of {layout}'
    theirs = content.get('state_dict', content)
    if isinstance(theirs, dict) and theirs.keys() == state.keys() and not any(
            key.startswith('module') for key in theirs) and all(theirs[key] is state[key] for key in state):
        return None
    return f"holds the weights at '{chosen.name}'" if chosen.name not in ('', 'state_dict') else \
        'has more, or other names, than the model'


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
    """Return the path of a file from which mmengine loads just what was read: the checkpoint itself, or a copy.

    Args:
        content (dict): From :func:`float_checkpoint`.
        folder (OwnedFolder): Where ``full_precision.pth`` goes if one is needed.

    Raises:
        UserError: If a file of that name is there that is not ours.
    """
    if content['why'] is None:
        return content['path']
    if dist.is_main_process():
        noted = dict(source=content['path'], why=content['why'], weights=content.get('weights'))
        state = {key: value.clone() if value.untyped_storage().nbytes() > value.nbytes else value
                 for key, value in content['state_dict'].items()}  # torch.save writes the whole storage of a view
        folder.write(FULL_PRECISION, dict(meta=plain(dict(content['meta'], full_precision=noted)), state_dict=state))
    dist.barrier()
    return str(folder.path / FULL_PRECISION)


def convert_file(source: str, target: str, weights: str | None = None) -> int:
    """Writes a checkpoint of the original Swin detectors or segmentors in the layout of mmdet 3 and mmseg 1.

    Args:
        source (str): Path or http(s) address.
        target (str): File to write.
        weights (str, optional): 'ema' or 'plain', of a file that holds both.

    Returns:
        int: Number of tensors written.

    Raises:
        CheckpointError: If the checkpoint cannot be read, has another layout, or the target cannot be written.
    """
    path, content, _ = _read(source)
    if Path(target).exists() and Path(target).samefile(path):
        raise CheckpointError(f'{target} is the file to convert: give another target')
    sets = sets_for(content, {ORIGINAL_SWIN})
    if not sets:
        state = read_checkpoint(source)['state_dict']
        has = 'is in the layout of mmdet 3 and mmseg 1 already' if any(
            'backbone.stages.' in key for key in state) else f'has keys like {_listing(sorted(state))}'
        raise CheckpointError(f'{path} {has}; what can be converted are Swin detectors and segmentors with '
                              f"keys like '{ORIGINAL_SWIN}'")
    state = _checked(_choose(sets, weights, content, path).state, path)
    with conversion_of(path):
        state = convert_swin(state)
    try:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(dict(meta=plain(_meta(content)), state_dict=state), Path(target))
    except (OSError, RuntimeError) as error:  # torch reports some of what the system refuses as RuntimeError
        raise CheckpointError(f'cannot write {target} ({error})') from None
    return len(state)


def _listing(items):
    return ', '.join(items[:3]) + (f' and {len(items) - 3} more' if len(items) > 3 else '')


def load_float(model: nn.Module, checkpoint: dict, targets=('backbone', 'neck'), config=None) -> None:
    """Loads full-precision weights into a float or a converted model, or says why they don't fit.

    Args:
        model (nn.Module): The model.
        checkpoint (dict): From :func:`float_checkpoint` or :func:`read_checkpoint`.
        targets (Sequence[str]): Submodules in which the checkpoint may hold nothing the model lacks.
        config (dict, optional): The model's, to name the keys in it that errors are about.

    Raises:
        CheckpointError: If parameters are missing, have other shapes, are not finite, or the checkpoint belongs to
            another architecture, or is quantized already.
    """
    state, path = checkpoint['state_dict'], checkpoint['path']
    if any(key.endswith('_quantizer.scale') for key in state):
        raise CheckpointError(f'{path} is quantized already: pass the full-precision checkpoint')
    quantizer_keys = tuple(f'{name}.' for name in quantizers(model, every_name=True))
    own = {k: v for k, v in model.state_dict().items() if not (quantizer_keys and k.startswith(quantizer_keys))}
    missing = sorted(k for k in own if k not in state and not k.endswith(DERIVED))
    shapes = {k: (tuple(state[k].shape), tuple(v.shape)) for k, v in own.items()
              if k in state and state[k].shape != v.shape}
    if shapes:
        listed = _listing([f'{k} is {theirs} in the checkpoint, {ours} in the model'
                           for k, (theirs, ours) in shapes.items()])
        hint = (not missing and explain_classes(shapes, model, config, targets)
                or 'The checkpoint belongs to another architecture.')
        raise CheckpointError(f'{path} does not fit the model: {listed}. {hint}')
    kinds = [f'{k} is {state[k].dtype} in the checkpoint, {v.dtype} in the model' for k, v in own.items()
             if k in state and v.is_floating_point() and not state[k].is_floating_point()]
    if kinds:
        raise CheckpointError(f'{path} does not fit the model: {_listing(kinds)}. It may be quantized already')
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
    fitting = OrderedDict((k, state[k]) for k in own if k in state)
    fitting._metadata = model.state_dict()._metadata  # the names are the present version's
    model.load_state_dict(fitting, strict=False)


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
    """Write the quantized checkpoint: weights, scales, zero points, stanza, departures from its recipe, versions.

    Args:
        model (nn.Module): Converted and calibrated.
        folder (OwnedFolder): Where ``quantized.pth`` goes.
        quantization (QuantizationConfig): The stanza.
        dataset_meta (dict): Classes and palette, as mm* checkpoints carry them.
        **meta: More entries for ``meta``.

    Returns:
        Path: The file.
    """
    meta = dict(quantization=quantization.to_dict(), departures=quantization.departures, versions=versions(),
                dataset_meta=dataset_meta, mmengine_version=versions()['mmengine'], **meta)
    state = {k: v.detach().cpu() for k, v in model.state_dict().items()}
    return folder.write(QUANTIZED, dict(meta=plain(meta), state_dict=state))
