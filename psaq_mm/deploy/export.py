"""The whole export, for scripts: graph, config and remaining weights; held against the quantized model."""
from __future__ import annotations

import copy
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS

from ..classification import Classifier
from ..engine.checkpoint import read_checkpoint
from ..engine.config import default_scope, test_config
from ..engine.loop import read_images
from ..errors import UserError
from ..files import write_atomically, write_json
from ..models import own_size, quantize_model_config, resolved
from ..models.features import FEATURE_PARTS, tensors
from ..stanza import QuantizationConfig
from .graph import Features, check_calibrated, export_graph, float_layers
from .heads import export_head, head_inputs, head_names
from .runtime import RUNTIMES, Graph, HeadGraph

QUANTIZED = 'psaq_mm.QuantizedModel'


def quantized_config(cfg: Config) -> Config:
    """The test config of a quantized model, from itself or from a config with a stanza.

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
    """The quantized model, calibrated, on CPU.

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


def exported_config(cfg: Config, model, runtime: str, graph: str, heads: dict[str, str] | None = None) -> Config:
    """The config with which the ecosystem's tools build the exported model.

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
    exported = dict(graph='{{ fileDirname }}/' + graph, runtime=runtime)
    if isinstance(model, Classifier):
        preprocessor = dict(type='mmengine.ImgDataPreprocessor', bgr_to_rgb=True, **{
            key: getattr(model.data_preprocessor, key).flatten().tolist() for key in ('mean', 'std')})
        cfg.model = ConfigDict(type='psaq_mm.ExportedClassifier', data_preprocessor=old.get(
            'data_preprocessor') or preprocessor, **exported)
        return cfg
    old.backbone = ConfigDict(type='psaq_mm.ExportedFeatures', **exported)
    old.pop('neck', None)
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
        old.heads = ConfigDict({name: '{{ fileDirname }}/' + file for name, file in heads.items()})
    return cfg


def sqnr(reference, other) -> float:
    """Signal to noise, dB."""
    noise = (reference - other).square().sum()
    return float(10 * torch.log10(reference.square().sum() / noise.clamp(min=1e-30)))


@torch.no_grad()
def export_heads(model, folder: Path, images: torch.Tensor, runtime: str, dynamic: bool, preset: str):
    """Writes the heads that can be exported.

    Returns:
        tuple[dict, dict]: By name of the head: its file, its SQNR against the quantized model (dB) and its products;
        of those that cannot be exported, why.
    """
    done, failed = {}, {}
    names = head_names(model)
    found = head_inputs(model, names, images)
    for name in names:
        if name not in found:
            failed[name] = 'is not run in prediction, or not by positional arguments'
            continue
        inputs, path = found[name], folder / f'{name}.onnx'
        try:
            export_head(model, name, inputs, path, dynamic, preset)
            graph = HeadGraph(str(path), runtime)
            outputs = zip(tensors(model.get_submodule(name)(*inputs)), tensors(graph(*inputs)))
            done[name] = dict(file=path.name, products=graph.session.products(),
                              sqnr=min(sqnr(ours, theirs) for ours, theirs in outputs))
        except Exception as error:  # the exporter's, the runtime's or the head's own: there is a way on without it
            path.unlink(missing_ok=True)
            failed[name] = f'{type(error).__name__}: {error}'.splitlines()[0]
    return done, failed


@torch.no_grad()
def agreement(model, graph: Graph, images: torch.Tensor) -> float:
    """Lowest SQNR of the graph's outputs, against the quantized model's, dB."""
    return min(sqnr(ours, theirs) for ours, theirs in zip(Features(model)(images), graph.run(images)))


def export(cfg: Config, checkpoint: str, work_dir: str, size: tuple[int, int] | None = None, runtime: str = 'openvino',
           preset: str = 'asymmetric') -> dict:
    """Writes ``features.onnx``, a graph for each quantized head, ``int8_config.py``, ``int8.pth`` and ``export.json``.

    Args:
        cfg (Config): Of the quantized model, or with a stanza.
        checkpoint (str): What tools/dfq.py wrote.
        work_dir (str): Where to.
        size (tuple[int, int], optional): (H, W): a graph for this size only. Default: for every size, except of
            classifiers, which have their own.
        runtime (str): What the config runs the graph with. Defaults to 'openvino'.
        preset (str): 'asymmetric' or 'symmetric'.

    Returns:
        dict: Sizes, layers in int8 and in float, SQNR against the quantized model.

    Raises:
        UserError: If it cannot be exported like that.
    """
    if runtime not in RUNTIMES:
        raise UserError(f"--runtime {runtime}: must be one of {', '.join(RUNTIMES)}")
    cfg = quantized_config(cfg)
    content = read_checkpoint(checkpoint)
    model = build(cfg, content['state_dict'], checkpoint)
    stanza = resolved(QuantizationConfig.parse(cfg.model.quantization), model)
    fixed = size or own_size(model)
    traced = fixed or stanza.synthesis.size[0]
    folder = Path(work_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / 'features.onnx'
    try:
        export_graph(model, path, traced, dynamic=not fixed, preset=preset)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f'{type(model.backbone).__name__} cannot be exported for images of {traced[0]} x {traced[1]} '
                        f'({type(error).__name__}: {str(error).splitlines()[0]}): give another --size H W') from None
    graph = Graph(str(path), runtime)
    images = calibration_images(Path(checkpoint).parent, traced)
    found = {f'{traced[0]} x {traced[1]}': agreement(model, graph, images)}
    if not fixed:
        other = traced[0] + 24, traced[1] + 72  # neither a multiple of windows nor of strides
        found[f'{other[0]} x {other[1]}'] = agreement(model, graph, torch.nn.functional.interpolate(
            images, other, mode='bilinear'))
    heads, not_exported = export_heads(model, folder, images, runtime, not fixed, preset)
    exported = exported_config(cfg, model, runtime, path.name, {name: head['file'] for name, head in heads.items()})
    (folder / 'int8_config.py').write_text(exported.pretty_text)
    exported_parts = () if isinstance(model, Classifier) else (*FEATURE_PARTS, *heads)
    parts = tuple(f'{name}.' for name in exported_parts) or ''  # of a classifier all: every name begins like that
    state = {key: value for key, value in model.state_dict().items() if not key.startswith(parts)}
    write_atomically(dict(state_dict=state, meta=content.get('meta', {})), folder / 'int8.pth')
    files = {name: folder / head['file'] for name, head in heads.items()}
    products = graph.session.products()
    for name, head in heads.items():
        products.update({f'{name}: {product}': integer for product, integer in head['products'].items()})
        found[name] = head['sqnr']
    result = dict(
        graph=str(path), config=str(folder / 'int8_config.py'), checkpoint=str(folder / 'int8.pth'), runtime=runtime,
        size=list(fixed) if fixed else None, preset=preset, sqnr_db={k: round(v, 1) for k, v in found.items()},
        heads={name: str(file) for name, file in files.items()}, heads_not_exported=not_exported,
        size_mb=dict(graph=round(sum(file.stat().st_size for file in (path, *files.values())) / 1e6, 2), float=round(
            4e-6 * sum(p.numel() for name, p in model.named_parameters() if name.startswith(parts)), 2)),
        int8=sum(products.values()), float=[name for name, integer in products.items() if not integer],
        kept_float=float_layers(model))
    write_json(result, folder / 'export.json')
    return result


def calibration_images(folder: Path, size) -> torch.Tensor:
    """One of the run's synthetic images in a size, (1, 3, H, W), or noise where there are none."""
    source = folder / 'synthetic.pt'
    if source.is_file():
        images = read_images(str(source))[0][:1]
        return torch.nn.functional.interpolate(images, tuple(size), mode='bilinear', align_corners=False)
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
