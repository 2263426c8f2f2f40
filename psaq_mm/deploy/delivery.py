"""The config with which the ecosystem's tools build an exported model, and a check that they can."""
from __future__ import annotations

import copy
import re
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS
from torch import Tensor

from ..classification import Classifier
from ..engine.config_file import config_text as plain_text
from ..errors import UserError
from ..models import BACKBONES, image_channels, quantize_model_config, resolved
from ..models.features import image_features, tensors
from ..stanza import QuantizationConfig
from .agreement import compare, first_line
from .graph import nesting
from .heads import head_names
from .parts import place_of

FOLDER = '<folder of this file>'


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
