"""The whole export, for scripts: graphs, config and remaining weights, each measured before it is delivered."""
from __future__ import annotations

import copy
import json
import logging
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..classification import Classifier
from ..engine.checkpoint import read_checkpoint
from ..engine.config import dataset_meta, default_scope, test_config
from ..engine.config_file import config_text as plain_text
from ..engine.images import read_images
from ..errors import UserError
from ..files import OwnedFolder, write_atomically, write_json
from ..models import BACKBONES, backbone_name, backbone_of, image_channels, own_size, quantize_model_config, resolved
from ..models.features import FEATURE_PARTS, image_features, tensors
from ..quantization import Mode, quantizer_mode
from ..stanza import QuantizationConfig
from .agreement import (
    SAME_DB,
    Finding,
    Reference,
    compare,
    eight_bits,
    first_line,
    packed,
    probes,
    reference,
)
from .card import CARD, SCRIPTS, deliver, describe
from .check import UNCHECKED
from .convolutions import IMAGES
from .extras import need
from .graph import (
    ASYMMETRIC,
    Features,
    Form,
    annotate,
    check_calibrated,
    check_form,
    export_graph,
    float_layers,
    nesting,
)
from .heads import export_head, head_inputs, head_names
from .pixels import missing_pipeline
from .predictor import Predictor, predictor_of
from .runtime import RUNTIMES, Graph, HeadGraph, host
from .whole import MODEL, Whole, export_whole, in_pixels

QUANTIZED = 'psaq_mm.QuantizedModel'
FOLDER = '<folder of this file>'
# And a graph for each quantized head.
RESULTS = ('features.onnx', 'int8_config.py', 'int8.pth', 'export.json', MODEL, CARD, *SCRIPTS)
PROPOSALS = 16  # that a head's graph keeps to check itself with
CHECK_SIDE = 256  # the check image is stored in this size at most, and enlarged
TRIED = 16  # images, of which the first with an object checks the whole graph


def quantized_config(cfg: Config) -> Config:
    """Return the test config of a quantized model, from itself or from a config with a stanza.

    Raises:
        UserError: If it is neither.
    """
    if cfg.get('quantization') is not None:
        return test_config(cfg, QuantizationConfig.parse(cfg.quantization))
    if cfg.get('model') is None or cfg.model.get('type') != QUANTIZED:
        raise UserError(f'{cfg.filename} is no config of a quantized model: give the test_config.py that tools/dfq.py '
                        'wrote beside quantized.pth')
    return cfg


def build(cfg: Config, state: dict, checkpoint: str):
    """Build the quantized model, calibrated, on CPU.

    Args:
        cfg (Config): Of the quantized model.
        state (dict): Its state dict.
        checkpoint (str): Where that comes from, for errors.

    Raises:
        UserError: If the checkpoint does not fit or has no scales.
    """
    default_scope(cfg)
    model = MODELS.build(copy.deepcopy(cfg.model))
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise UserError(f'{checkpoint} does not fit the config: {error}') from None
    check_calibrated(model)
    if missing or unexpected:
        key, kind = (missing[0], 'lacks') if missing else (unexpected[0], 'has, and the config does not know,')
        raise UserError(f"{checkpoint} {kind} '{key}' (and {len(missing) + len(unexpected) - 1} more): use the config "
                        'and the checkpoint of the same run')
    return model.eval()


# -- what is measured --------------------------------------------------------------------------------------------------


@dataclass
class Part:
    """A graph that was written.

    Args:
        file (Path): The graph.
        findings (list[Finding]): All comparisons that were made.
        products (dict[str, bool]): Products in the chosen runtime, and whether they run in int8.
    """
    file: Path
    findings: list[Finding]
    products: dict[str, bool] = field(default_factory=dict)

    def failures(self, runtime: str) -> list[Finding]:
        """Return what did not pass in a runtime, the worst first."""
        failed = [item for item in self.findings if item.runtime == runtime and not item.passed]
        return sorted(failed, key=lambda item: (item.graph == 'int8', item.sqnr - item.required))

    def passed(self, runtime: str) -> bool:
        """Whether the graph was measured in a runtime and found right."""
        return any(item.runtime == runtime for item in self.findings) and not self.failures(runtime)

    def note(self, references: dict[str, Reference], **claims: str) -> None:
        """Write into the graph what was measured, and what to repeat that with."""
        runtimes = {item.runtime for item in self.findings}
        annotate(self.file, dict(claims, probes=packed(probes(references)), measured=json.dumps({
            name: dict(host=host(name), wrong=str(self.failures(name)[0]) if self.failures(name) else None)
            for name in runtimes})))


def installed(runtime: str) -> list[str]:
    """Return the runtimes to measure in: the chosen one, and the other where it is there.

    Raises:
        UserError: If the chosen one is not installed, or too old.
    """
    need(runtime)
    found = [runtime]
    for other in RUNTIMES:
        if other != runtime:
            try:
                need(other)
                found.append(other)
            except UserError:
                pass
    return found


@torch.no_grad()
def write_part(file: Path, write: Callable, kind: type[Graph], references: dict[str, Reference],
               runtimes: list[str]) -> Part:
    """Write a graph in int8 and in float, hold both against the model, and keep the one in int8.

    Args:
        file (Path): The graph.
        write (Callable): Takes a path and ``integers``, as :func:`export_graph` does.
        kind (type[Graph]): What runs it.
        references (dict[str, Reference]): By place, e.g. '64 x 96'.
        runtimes (list[str]): To measure in; the first one is the chosen.
    """
    part = Part(file, [])
    for graph, path in (('float', file.with_suffix('.float.onnx')), ('int8', file)):
        write(path, integers=graph == 'int8')
        for runtime in runtimes:
            try:
                session = kind(str(path), runtime)
            except UserError as error:
                part.findings.append(Finding(next(iter(references)), graph, runtime, 0.0, SAME_DB, str(error)))
                continue
            for place, item in references.items():
                expected, marks = (item.full, [SAME_DB] * len(item.full)) if graph == 'float' else (
                    item.quantized, item.required)
                part.findings.append(compare(session.compute, tuple(tensors(item.inputs)), expected, marks, place=place,
                                             graph=graph, runtime=runtime))
            if path == file and runtime == runtimes[0]:
                part.products = session.session.products()
            del session
        if path != file:
            path.unlink()
    return part


def synthetic_images(folder: Path, channels: int) -> list[Tensor]:
    """Return the synthetic images of a run, (1, C, H, W) each; none where its folder holds none for the model."""
    source = folder / 'synthetic.pt'
    batches = read_images(str(source)) if source.is_file() else []
    return [image.float() for batch in batches if batch.shape[1] == channels for image in batch.split(1)]


def check_images(images: list[Tensor], channels: int, size: tuple[int, int]) -> list[Tensor]:
    """Return the first of some images, or noise where there are none, (1, C, H, W) each, on 8-bit grids."""
    found = []
    for image in images[:TRIED] or [torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(0))]:
        scale = CHECK_SIDE / max(image.shape[-2:])
        if scale < 1:
            image = resized(image, [max(round(side * scale), 1) for side in image.shape[-2:]])
        found.append(eight_bits(image))
    return found


def resized(image: Tensor, size) -> Tensor:
    """Return an image in another size, (1, C, H, W)."""
    return eight_bits(nn.functional.interpolate(image, tuple(size), mode='bilinear', align_corners=False))


def place_of(size) -> str:
    """Name a size."""
    return f'{size[0]} x {size[1]}'


@torch.no_grad()
def refusal(model: nn.Module, image: Tensor) -> str | None:
    """Return why a model itself cannot take an image, or None."""
    try:
        with quantizer_mode(model, Mode.FLOAT):
            Features(model)(image)
    except UserError:
        raise
    except Exception as error:  # whatever a forward raises at a size that it was not made for
        return first_line(error)
    return None


def sizes_to_measure(model: nn.Module, image: Tensor, traced: tuple[int, int]) -> tuple[list, int, str | None]:
    """Choose sizes that stand for all: small with narrow maps, large, flat and tall, not of even strides.

    Args:
        model (nn.Module): Quantized.
        image (Tensor): To be enlarged and reduced.
        traced (tuple[int, int]): (H, W) of the trace.

    Returns:
        tuple[list[tuple[int, int]], int, str | None]: The sizes, the traced one first; what the model wants sides to be
        multiples of; if it takes no other size, why.
    """
    height, width = traced
    kinds = (((130, 70), (height // 2 + 1, width // 2 + 3), (height - 7, width - 9)),  # the first that it takes counts
             ((height + 24, width + 72), ), ((height * 5 // 4, width), ), ((height + 104, width - width // 4), ))
    reason = None
    for unit in (1, 2, 4, 8, 16, 32, 64, 128):
        found = [traced]
        if any(side % unit for side in traced):
            break
        for choices in kinds:
            for size in choices:
                size = tuple(max(side // unit, 1) // 2 * 2 * unit + unit for side in size)  # odd multiples
                why = None if size in found else refusal(model, resized(image, size))
                reason = reason or why
                if why is None:
                    found.append(size)
                    break
            else:
                break
        else:
            return list(dict.fromkeys(found)), unit, None
    return [traced], 1, reason


def export_features(model, folder: Path, image: Tensor, traced: tuple[int, int], fixed: bool, runtimes: list[str],
                    form: Form = ASYMMETRIC) -> dict:
    """Write ``features.onnx``: for every size if that is right in the chosen runtime, otherwise for the traced one.

    Args:
        model (nn.Module): Quantized.
        folder (Path): Where to.
        image (Tensor): To check with, (1, C, H, W).
        traced (tuple[int, int]): (H, W).
        fixed (bool): Whether a graph for the traced size is wanted.
        runtimes (list[str]): To measure in, the chosen one first.
        form (Form): As of :func:`export_graph`.

    Returns:
        dict: ``part``, ``sizes``, ``size`` (None for every size), ``multiple_of``, ``at_least``, and ``reason``: why
        the graph is for one size though every size was wanted, or None.

    Raises:
        UserError: If no graph is right in the chosen runtime.
    """
    why = refusal(model, resized(image, traced))
    if why is not None:
        raise UserError(f'{type(backbone_of(model)).__name__} cannot take images of {place_of(traced)} ({why}): give '
                        'a size that it takes with --size H W')
    sizes, unit, reason = ([traced], 1, None) if fixed else sizes_to_measure(model, image, traced)
    reason = reason and f'the model itself takes no other size ({reason})'
    for dynamic in (True, False):
        if dynamic and len(sizes) == 1:
            continue
        sizes = sizes if dynamic else [traced]
        inputs = {place_of(size): resized(image, size) for size in sizes}
        if form.batch:
            one = inputs[place_of(traced)]
            inputs[f'3 images of {place_of(traced)}'] = torch.cat([one, one.flip(3), eight_bits(-one)])
        references = {place: reference(model, Features(model), (value, ), form.same_roundings)
                      for place, value in inputs.items()}
        try:
            part = write_part(folder / 'features.onnx', lambda path, integers, dynamic=dynamic: export_graph(
                model, path, traced, dynamic, form, integers), Graph, references, runtimes)
        except Exception as error:  # the exporter's or the model's, which traces what it never did
            if isinstance(error, UserError) and not dynamic:
                raise
            failure = f'it cannot be traced ({first_line(error)})'
        else:
            failed = part.failures(runtimes[0])
            failure = str(failed[0]) if failed else None
        if failure is None:
            least = min(min(size) for size in sizes)
            part.note(references, multiple_of=str(unit), at_least=str(least))
            return dict(part=part, sizes=sizes, size=None if dynamic else traced, multiple_of=unit, at_least=least,
                        reason=reason)
        if dynamic:
            reason = f'no graph for every size is right: {failure}'
    hint = ''.join(f'; {name} computes it rightly, use --runtime {name}' for name in runtimes[1:]
                   if 'cannot be traced' not in failure and part.passed(name))
    raise UserError(f'{type(backbone_of(model)).__name__} cannot be exported for images of {place_of(traced)}: '
                    f'{failure}{hint or ". Try another --size H W"}')


@torch.no_grad()
def export_heads(model, folder: Path, images: dict[str, Tensor], runtimes: list[str], dynamic: bool,
                 form: Form = ASYMMETRIC):
    """Write the heads whose graphs are right in the chosen runtime.

    Args:
        model (nn.Module): Quantized.
        folder (Path): Where to.
        images (dict[str, Tensor]): By place, that of the trace first, (1, C, H, W).
        runtimes (list[str]): To measure in, the chosen one first.
        dynamic (bool): Whether heads shall take maps of every size.
        form (Form): What their graphs are to be like; ``images`` are those of the model, (1, C, H, W).

    Returns:
        tuple[dict[str, Part], dict[str, str]]: By name of the head; of those that stay fake-quantized, why.
    """
    done, failed = {}, {}
    names = head_names(model)
    seen = {place: head_inputs(model, names, image) for place, image in images.items()} if names else {}
    more = [head_inputs(model, names, image) for image in form.images] if names else []
    for name in names:
        inputs = {place: tuple_of_bytes(found[name]) for place, found in seen.items() if name in found}
        if not inputs:
            failed[name] = 'is not run in prediction, or not by positional arguments'
            continue
        path = folder / f'{name}.onnx'
        try:
            references = {f'{name}, {place}': reference(
                model, model.get_submodule(name), value, form.same_roundings)
                          for place, value in inputs.items() if all(x.numel() for x in tensors(value))}
            traced = next(iter(references.values())).inputs
            own = form._replace(images=tuple(found[name] for found in more if name in found))
            part = write_part(path, lambda file, integers, name=name, traced=traced, own=own: export_head(
                model, name, traced, file, dynamic, own, integers), HeadGraph, references, runtimes)
            if part.failures(runtimes[0]):
                raise UserError(str(part.failures(runtimes[0])[0]))
            if '.' in name:  # any number of proposals: a few are enough to repeat the measurement with
                references = {place: reference(model, model.get_submodule(name), tuple_of_bytes(
                    item.inputs, PROPOSALS), form.same_roundings) for place, item in references.items()}
            part.note(references)
            done[name] = part
        except Exception as error:  # the exporter's, the runtime's or the head's own: there is a way on without it
            path.unlink(missing_ok=True)
            path.with_suffix('.float.onnx').unlink(missing_ok=True)
            failed[name] = str(error) if isinstance(error, UserError) else first_line(error)
    return done, failed


def tuple_of_bytes(nested, count: int | None = None):
    """Return nested tensors, or the first so many rows of each, on 8-bit grids, so that they can be stored."""
    if isinstance(nested, Tensor):
        return eight_bits(nested[:count]) if nested.numel() else nested
    return type(nested)(tuple_of_bytes(item, count) for item in nested)


# -- what is delivered -------------------------------------------------------------------------------------------------


def exported_config(cfg: Config, model, runtime: str, graph: str, heads: dict[str, str] | None = None) -> Config:
    """Return the config with which the ecosystem's tools build the exported model.

    Args:
        cfg (Config): Of the quantized model.
        model (nn.Module): Built from it.
        runtime (str): Of RUNTIMES.
        graph (str): File name of the graph, in the folder of the config.
        heads (dict[str, str], optional): File names of those of heads, by name of the head.
    """
    cfg = copy.deepcopy(cfg)
    old = cfg.model
    stanza = resolved(QuantizationConfig.parse(old.pop('quantization')), model)
    old.type = old.pop('float_type')
    exported = dict(graph=f'{FOLDER}/{graph}', runtime=runtime)
    if isinstance(model, Classifier):
        own = model.data_preprocessor
        preprocessor = dict(
            type='mmengine.ImgDataPreprocessor' if image_channels(model) in (1, 3) else 'psaq_mm.ChannelPreprocessor',
            bgr_to_rgb=getattr(own, '_channel_conversion', True),
            **{key: getattr(own, key).flatten().tolist() for key in ('mean', 'std')})
        cfg.model = ConfigDict(type='psaq_mm.ExportedClassifier', data_preprocessor=old.get(
            'data_preprocessor') or preprocessor, **exported)
        return cfg
    old[next(name for name in BACKBONES if old.get(name))] = ConfigDict(type='psaq_mm.ExportedFeatures', **exported)
    if old.get('neck'):
        old.neck = ConfigDict(type='psaq_mm.ExportedNeck')
    left = [name for name in head_names(model) if name not in (heads or {})]
    if left:  # they stay fake-quantized
        targets = []
        for name in left:
            whole = f'{name}.'.startswith(tuple(f'{target}.' for target in stanza.targets))
            targets += [name] if whole else [t for t in stanza.targets if t.startswith(f'{name}.')]
        prefixes = tuple(f'{target}.' for target in targets)  # also of layers in float, which keep_float names
        names = [n for n, _ in model.named_modules() if f'{n}.'.startswith(prefixes)]
        changed = dict(stanza.to_dict(), targets=targets, placement='operands')
        for key, pattern in (('keep_float', lambda p: p), ('overrides', lambda o: o['pattern'])):
            changed[key] = [item for item in changed[key] if any(fnmatchcase(n, pattern(item)) for n in names)]
        cfg.model = old = ConfigDict(quantize_model_config(old, QuantizationConfig.parse(changed)))
    if heads:
        old.exported_type, old.type, old.runtime = old.type, 'psaq_mm.ExportedModel', runtime
        old.heads = ConfigDict({name: f'{FOLDER}/{file}' for name, file in heads.items()})
    return cfg


def config_text(cfg: Config) -> str:
    """Return a config as Python, in which mmengine puts the config's own folder in place of :data:`FOLDER`.

    The name of the folder may hold quotes.
    """
    return re.sub(rf"'{FOLDER}/([^'\n]*)'", r'r"""{{ fileDirname }}/\1"""', plain_text(cfg))


@torch.no_grad()
def check_delivery(model, folder: Path, image: Tensor, marks: list[float], runtime: str) -> None:
    """Build what was written as the ecosystem's tools will, run it once, and hold it against the quantized model.

    Args:
        model (nn.Module): Quantized.
        folder (Path): With ``int8_config.py`` and ``int8.pth``.
        image (Tensor): (1, C, H, W).
        marks (list[float]): What each feature map must reach, dB.
        runtime (str): For errors.

    Raises:
        UserError: If it cannot be built or loaded, or computes something else.
    """
    try:
        cfg = Config.fromfile(folder / 'int8_config.py')
        delivered = MODELS.build(copy.deepcopy(cfg.model)).eval()
        lost = delivered.load_state_dict(torch.load(folder / 'int8.pth', weights_only=True)['state_dict'], strict=False)
        run = delivered.logits if isinstance(model, Classifier) else lambda images: image_features(delivered, images)
        ours = model.logits(image) if isinstance(model, Classifier) else image_features(model, image)
        found = run(image)
    except Exception as error:
        raise UserError(f'{type(model).__name__} cannot be built around an exported graph ({first_line(error)}): '
                        'please report it. The graph alone is what export_graph of psaq_mm.deploy writes') from error
    if any(lost):
        names = [name for keys in lost for name in keys]
        raise UserError(f"{type(model).__name__} around an exported graph has other weights than int8.pth "
                        f"('{names[0]}' and {len(names) - 1} more): please report it")
    finding = compare(lambda _: found, (image, ), list(tensors(ours)), marks, place=place_of(image.shape[-2:]),
                      graph='int8', runtime=runtime)
    if nesting(found) != nesting(ours) or not finding.passed:
        raise UserError(f'{type(model).__name__} around an exported graph computes other features than the quantized '
                        f'model: {finding}. Please report it')


def whole_predictor(model, cfg: Config, batch: bool) -> Predictor | str:
    """Return the predictor of a model, or say at once why there will be no graph of the whole model.

    Args:
        model (nn.Module): Quantized.
        cfg (Config): Its config.
        batch (bool): Whether the graph shall take any number of images at once.
    """
    try:
        predictor = predictor_of(model, cfg).eval()
        if batch and predictor.one_by_one:
            predictor.limit()
        return predictor
    except UserError as error:
        why = str(error)
    except Exception as error:  # of what only the user's own code understands
        why = ('test_dataloader.dataset.pipeline or model.test_cfg has settings that a graph does not know '
               f'({first_line(error)})')
    print_log(f'there will be no {MODEL}, only the parts: {why}', 'current', logging.WARNING)
    return why


def deliver_whole(predictor: Predictor, cfg: Config, meta: dict, folder: Path, images: list[Tensor],
                  size: tuple[int, int], fixed: bool, runtimes: list[str], form: Form) -> dict:
    """Write ``model.onnx``, ``model.json`` and ``predict.py``.

    Args:
        predictor (Predictor): Of a quantized model.
        cfg (Config): The model's config.
        meta (dict): Of the checkpoint.
        folder (Path): Where to.
        images (list[Tensor]): To check with, as :func:`export_whole` chooses, (1, C, H, W) each.
        size (tuple[int, int]): (H, W) of the trace.
        fixed, runtimes: As of :func:`export_whole`.
        form (Form): What the graph is to be like; ``images`` are those of the model, (1, C, H, W).

    Returns:
        dict: ``size``, ``at_least``, ``size_mb``, ``reason`` and what was ``measured``; or ``refused``, why there is no
        such graph. With ``warnings``.
    """
    form = form._replace(images=tuple(in_pixels(predictor, item) for item in form.images))
    checks = torch.cat([in_pixels(predictor, resized(image, size)) for image in images])
    try:
        found = export_whole(predictor, folder, checks, fixed, runtimes, form)
    except UserError as error:
        (folder / MODEL).unlink(missing_ok=True)
        return dict(refused=str(error), warnings=[])
    measured = [dict(item._asdict(), passed=item.passed) for item in (*found.differences, *found.findings)]
    right = [runtime for runtime in runtimes if not found.failures(runtime)]
    card = describe(predictor, cfg, dataset_meta(cfg, meta), found.file, found.answers, right, found.image)
    deliver(card, folder)
    warnings = [*filter(None, [missing_pipeline(cfg)]), *warnings_of({MODEL: found}, runtimes, found.reason)]
    if not found.anything:
        warnings.append(f'{MODEL}: the model finds no object in the images that check the graph, so answers were '
                        'compared on none')
    elif card['check'] is None:
        warnings.append(UNCHECKED)
    return dict(size=found.size, at_least=card['sizes']['at_least'], reason=found.reason,
                size_mb=round(found.file.stat().st_size / 1e6, 2), measured=measured, warnings=warnings)


def export(cfg: Config, checkpoint: str, work_dir: str, size: tuple[int, int] | None = None,
           runtime: str | None = None, preset: str = 'asymmetric', whole: bool = True, batch: bool = False) -> dict:
    """Write a quantized model for runtimes: its parts for the ecosystem's tools, and all of it as one graph.

    The former are ``features.onnx``, a graph for each quantized head, ``int8_config.py`` and ``int8.pth``; the latter
    ``model.onnx``, ``model.json`` and ``predict.py``, where the model can be one graph. ``export.json`` tells of both.

    Each graph is measured in every runtime that is installed, at sizes that stand for all that it is said to take, see
    :mod:`psaq_mm.deploy.agreement`; what the config builds is run once. Files appear only if all is right in the chosen
    runtime.

    Args:
        cfg (Config): Of the quantized model, or with a stanza.
        checkpoint (str): What tools/dfq.py wrote.
        work_dir (str): Where to.
        size (tuple[int, int], optional): (H, W): a graph for this size only. Default: for every size, except of
            classifiers, which have their own, and of models whose graph is right at one size only.
        runtime (str, optional): What the config runs the graph with. Default: 'openvino', but 'onnxruntime' with the
            preset of that name, which no other runtime is measured with.
        preset (str): Of PRESETS, see :class:`Form`.
        whole (bool): Whether to write the whole model, too. Defaults to True.
        batch (bool): Whether that and ``features.onnx`` shall take any number of images at once. Defaults to False.

    Returns:
        dict: Sizes, layers in int8 and in float, SQNR against the quantized model, warnings.

    Raises:
        UserError: If it cannot be exported like that.
    """
    own = preset if preset in RUNTIMES else None
    runtime = runtime or own or 'openvino'
    if runtime not in RUNTIMES:
        raise UserError(f"--runtime {runtime}: must be one of {', '.join(RUNTIMES)}")
    if own and runtime != own:
        raise UserError(f"--runtime {runtime}: preset '{preset}' is for {own} alone; leave one of the two out")
    if batch and preset == 'symmetric':
        raise UserError("preset 'symmetric': TensorRT gets graphs for one image, as tools/tensorrt_engine.py builds "
                        'engines without profiles of shapes; leave --batch out')
    target = OwnedFolder(work_dir)
    need('onnx')
    runtimes = installed(runtime)[:1 if own else None]
    with target.lock():
        target.claim(RESULTS)
        return _export(cfg, checkpoint, target, size, runtimes, preset, whole, batch)


def _export(cfg, checkpoint, target, size, runtimes, preset, whole, batch):
    folder, runtime = target.path, runtimes[0]
    cfg = quantized_config(cfg)
    content = read_checkpoint(checkpoint)
    model = build(cfg, content['state_dict'], checkpoint)
    owner = backbone_name(model).rpartition('.')[0]
    if owner:
        raise UserError(f"{type(model).__name__} holds its backbone in '{owner}', and only models that hold it "
                        f"themselves can be exported: quantize and export with the config of the model in '{owner}'")
    predictor = whole_predictor(model, cfg, batch) if whole else None
    used = resolved(QuantizationConfig.parse(cfg.model.quantization), model).synthesis.size[0]
    synthetic = synthetic_images(Path(checkpoint).parent, image_channels(model))
    checks = check_images(synthetic, image_channels(model), used)
    image = checks[0]
    own = own_size(model)
    traced = size or (own if own and refusal(model, resized(image, used)) else tuple(used))
    form = Form(preset, batch, tuple(resized(item, traced) for item in synthetic[:IMAGES])
                if preset == 'onnxruntime' else ())
    check_form(model, form)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        features = export_features(model, work, image, traced, bool(size) or isinstance(model, Classifier), runtimes,
                                   form)
        fixed, graph = features['size'], features['part']
        images = {place_of(item): resized(image, item) for item in features['sizes']}
        heads, not_exported = export_heads(model, work, images, runtimes, not fixed, form)
        exported = exported_config(cfg, model, runtime, 'features.onnx',
                                   {name: part.file.name for name, part in heads.items()})
        (work / 'int8_config.py').write_text(config_text(exported), encoding='utf-8')
        exported_parts = () if isinstance(model, Classifier) else (*FEATURE_PARTS, *heads)
        parts = tuple(f'{name}.' for name in exported_parts) or ''  # of a classifier all: every name begins like that
        state = {key: value for key, value in model.state_dict().items() if not key.startswith(parts)}
        write_atomically(dict(state_dict=state, meta=content.get('meta', {})), work / 'int8.pth')
        first = images[place_of(traced)]
        check_delivery(model, work, first, reference(
            model, Features(model), (first, ), form.same_roundings).required, runtime)
        written = {'features.onnx': graph, **{part.file.name: part for part in heads.values()}}
        findings = [item for part in written.values() for item in part.findings]
        products = dict(graph.products)
        for name, part in heads.items():
            products.update({f'{name}: {product}': integer for product, integer in part.products.items()})
        floats = sum(p.numel() for name, p in model.named_parameters() if name.startswith(parts))
        result = dict(
            graph=str(folder / 'features.onnx'), config=str(folder / 'int8_config.py'),
            checkpoint=str(folder / 'int8.pth'), runtime=runtime, preset=preset, size=list(fixed) if fixed else None,
            multiple_of=features['multiple_of'], at_least=features['at_least'], one_size_because=features['reason'],
            sqnr_db={item.place: round(item.sqnr, 1) for item in findings
                     if item.graph == 'int8' and item.runtime == runtime},
            measured=[dict(item._asdict(), sqnr=round(item.sqnr, 1), required=round(item.required, 1),
                           passed=item.passed) for item in findings],
            warnings=warnings_of(written, runtimes, features['reason']) + [
                f'{name} is not installed: nothing was measured in it' for name in RUNTIMES
                if name not in runtimes and preset not in RUNTIMES],
            heads={name: str(folder / part.file.name) for name, part in heads.items()}, heads_not_exported=not_exported,
            size_mb=dict(graph=round(sum(part.file.stat().st_size for part in written.values()) / 1e6, 2),
                         float=round(4e-6 * floats, 2)),
            int8=sum(products.values()), float=[name for name, integer in products.items() if not integer],
            kept_float=float_layers(model))
        if whole:
            result['whole'] = dict(refused=predictor, warnings=[]) if isinstance(predictor, str) else deliver_whole(
                predictor, cfg, content.get('meta', {}), work, checks, traced, bool(size), runtimes, form)
            result['warnings'] += result['whole'].pop('warnings')
        write_json(result, work / 'export.json')
        for name in (MODEL, CARD, *SCRIPTS):  # of an earlier export
            target.remove(name)
        target.write_all(work)
    return result


def warnings_of(parts: dict[str, Part | Whole], runtimes: list[str], reason: str | None) -> list[str]:
    """Say what a user must know: graphs for one size that was not asked for, a runtime that computes one wrongly."""
    found = [f'{next(iter(parts))} takes one image size: {reason}'] if reason else []
    for runtime in runtimes[1:]:
        for name, part in parts.items():
            if part.failures(runtime):
                found.append(f'{name} must not be used with {runtime}: {part.failures(runtime)[0]}')
    return found
