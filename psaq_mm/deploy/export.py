"""The whole export, for scripts: graphs, config and remaining weights, each measured before it is delivered."""
from __future__ import annotations

import copy
import logging
import tempfile
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import MODELS
from torch import Tensor

from ..classification import Classifier
from ..engine.checkpoint import read_checkpoint
from ..engine.config import dataset_meta, default_scope, test_config
from ..engine.images import read_images
from ..errors import UserError
from ..files import OwnedFolder, write_atomically, write_json
from ..models import backbone_name, image_channels, own_size, resolved
from ..models.features import FEATURE_PARTS
from ..stanza import QuantizationConfig
from .agreement import eight_bits, first_line, reference
from .card import CARD, SCRIPTS, deliver, describe
from .check import UNCHECKED
from .convolutions import IMAGES
from .delivery import check_delivery, config_text, exported_config
from .extras import need
from .graph import Features, Form, check_calibrated, check_form, float_layers
from .parts import Part, export_features, export_heads, place_of, refusal, resized
from .pixels import missing_pipeline
from .predictor import Predictor, predictor_of
from .runtime import RUNTIMES
from .whole import MODEL, Whole, export_whole, in_pixels

QUANTIZED = 'psaq_mm.QuantizedModel'
# And a graph for each quantized head.
RESULTS = ('features.onnx', 'int8_config.py', 'int8.pth', 'export.json', MODEL, CARD, *SCRIPTS)
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
