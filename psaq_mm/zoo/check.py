"""Which configs of the installed zoos can be quantized: each is made small and taken through the whole job."""
from __future__ import annotations

import copy
import importlib.util
import logging
import multiprocessing
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch import Tensor, nn

from ..engine.checkpoint import in_own_layout
from ..engine.config import data_free_config, dataset_meta, default_scope, test_config
from ..engine.config_file import folder_of, read_config, zoo_message
from ..engine.pipeline import build_float, check
from ..errors import UserError
from ..files import OwnedFolder
from ..models import FEATURE_PARTS, extract_features, image_channels, scope
from ..quantization import SCORES, QuantizedMatMul, hooked, quantized_layers
from .standins import without_language

ZOOS = ('mmdet', 'mmseg')
SIZE = 64  # pixels of a side: enough for every stage of every backbone
QUERIES = 30  # at most, of a DETR
LIKELY = 1.0  # deviation of the class logits of a model whose graph is checked: of random weights they hardly differ
CLASSES = re.compile(r'cls\w*(\.\d+)*$')  # layers that put out logits of classes
THRESHOLDS = 'score_thr', 'object_mask_thr'  # in test settings: below which there are no objects
# Types of which a config has one if its backbone, neck or encoder is a transformer.
TRANSFORMER = re.compile(r'Swin|Vision?Transformer|Former|ViT|BEiT|MAE|PCPVT|SVT|DETR|DINO|MSDeform|CLIP|GLIP|VPD')
# What is quantized of a config: those of these that its model has.
TARGETS = (*FEATURE_PARTS, 'encoder', 'decode_head.pixel_decoder', 'panoptic_head.pixel_decoder')


def zoo_configs(zoos=ZOOS) -> Iterator[tuple[str, Path]]:
    """All configs that the installed zoos' model index names, ``('mmdet::swin/...', path)``, once each.

    A zoo that is installed without its configs is left out with a warning, as long as another one has some.

    Raises:
        UserError: Where no zoo has configs.
    """
    import yaml
    roots = {zoo: folder_of(zoo, '.mim') for zoo in zoos}
    absent = [zoo_message(zoo) for zoo, root in roots.items() if not (root / 'model-index.yml').is_file()]
    if len(absent) == len(roots):
        raise UserError('\n'.join(absent))
    for message in absent:
        print_log(message, 'current', logging.WARNING)
    for zoo, root in roots.items():
        if not (root / 'model-index.yml').is_file():
            continue
        found = {}
        for metafile in yaml.safe_load((root / 'model-index.yml').read_text(encoding='utf-8'))['Import']:
            if (root / metafile).is_file():
                meta = yaml.safe_load((root / metafile).read_text(encoding='utf-8')) or {}
                found.update((m['Config'], root / m['Config']) for m in meta.get('Models') or []
                             if (root / m['Config']).is_file())
        for config, path in sorted(found.items()):
            yield f'{zoo}::{config.removeprefix("configs/")}', path


def types(config) -> Iterator[str]:
    """Names of all types in a nested config."""
    for part in _dicts(config):
        if 'type' in part:
            yield getattr(part['type'], '__name__', str(part['type']))


def is_transformer(model: dict) -> bool:
    """Whether a model config has a transformer for backbone, neck or encoder."""
    return any(TRANSFORMER.search(kind) for kind in types(model))


def shrink(model: dict, size: int = SIZE) -> dict:
    """Makes a model config shallow, in place, and fit for small images; widths stay, as parts rely on each other's.

    Args:
        model (dict): Of a detector or segmentor.
        size (int): Pixels of a side. Defaults to 64.
    """
    for part in _dicts(model):
        depths, layers, indices = part.get('depths'), part.get('num_layers'), part.get('out_indices')
        if isinstance(depths, (list, tuple)):
            part['depths'] = [2] + [1] * (len(depths) - 1)  # one stage with shifted windows
        if isinstance(layers, (list, tuple)):
            part['num_layers'] = [1] * len(layers)
        for key in ('max_per_img', 'num_proposals'):  # of QueryInst as many of one as of the other
            if isinstance(part.get(key), int):
                part[key] = min(part[key], QUERIES)
        if 'panoptic_on' in part and importlib.util.find_spec('panopticapi') is None:  # their masks need it
            part['panoptic_on'], part['instance_on'] = False, True
        part.pop('num_cp', None)  # layers that compute their activations again: needs fairscale, and there is no need
        if 'img_size' in part:
            part['img_size'] = (size, size)
            if isinstance(layers, int):
                count = len(indices) if isinstance(indices, (list, tuple)) else 2
                part['num_layers'] = max(count, 2)
                if indices is not None:
                    part['out_indices'] = tuple(range(count)) if isinstance(indices, (list, tuple)) else count - 1
    if isinstance(model.get('num_queries'), int):  # two-stage DETRs choose so many of the few positions there are
        model['num_queries'] = min(model['num_queries'], QUERIES)
    for name in ('encoder', 'decoder', 'text_encoder'):
        if isinstance(model.get(name), dict) and 'num_layers' in model[name]:
            model[name]['num_layers'] = 2
    if 'templates' in (model.get('text_encoder') or {}):
        model['text_encoder']['templates'] = ['a photo of a {}.']  # one of dozens for each class
    preprocessor = model.get('data_preprocessor') or {}
    preprocessor.pop('batch_augments', None)
    if preprocessor.get('size'):
        preprocessor['size'] = (size, size)
    if (model.get('test_cfg') or {}).get('mode') == 'slide':
        model['test_cfg'] = dict(mode='whole')
    return model


def _dicts(config):
    if isinstance(config, dict):
        yield config
        for value in config.values():
            yield from _dicts(value)
    elif isinstance(config, (list, tuple)):
        for item in config:
            yield from _dicts(item)


def initialise(model: nn.Module) -> None:
    """Random weights, in place: by the model's own rules where it has any that work without a file."""
    try:
        if hasattr(model, 'init_weights'):
            model.init_weights()
    except AttributeError:  # SAN's call what their parents do not have, and leave tables as memory was
        for parameter in model.parameters():
            nn.init.trunc_normal_(parameter, std=0.02)


def sample_of(cfg: Config, image: Tensor) -> dict:
    """One image as the config's data pipeline would hand it to ``model.test_step``.

    Args:
        cfg (Config): For its scope, and whether its model wants videos; the image is one of a single frame then.
        image (Tensor): (channels, H, W), uint8.
    """
    size = tuple(image.shape[1:])
    meta = dict(img_shape=size, ori_shape=size, pad_shape=size, scale_factor=(1.0, 1.0), flip=False,
                flip_direction=None, img_path='', img_id=0, text='a . b', custom_entities=True, tokens_positive=None)
    if cfg.get('default_scope', 'mmdet') == 'mmseg':
        from mmseg.structures import SegDataSample as Sample
    else:
        from mmdet.structures import DetDataSample as Sample
    sample = Sample(metainfo=meta)
    if (cfg.model.get('data_preprocessor') or {}).get('type') == 'TrackDataPreprocessor':
        from mmdet.structures import TrackDataSample
        video = TrackDataSample(metainfo=dict(meta, key_frames_inds=[0], ref_frames_inds=[]))
        video.video_data_samples = [sample]
        return dict(inputs=[image[None]], data_samples=[video])
    return dict(inputs=[image], data_samples=[sample])


def tensors_of(predictions) -> list[Tensor]:
    """All tensors in predictions, in order of their names."""
    if isinstance(predictions, Tensor):
        return [predictions]
    if isinstance(predictions, (list, tuple)):
        return [tensor for item in predictions for tensor in tensors_of(item)]
    if hasattr(predictions, 'to_dict'):
        predictions = predictions.to_dict()
    if isinstance(predictions, dict):
        return [tensor for key in sorted(predictions) for tensor in tensors_of(predictions[key])]
    return []


@torch.no_grad()
def can_predict(model: nn.Module, cfg: Config, image: Tensor) -> bool:
    """Whether the float model predicts for an image without annotations, as tools/dfq.py never asks it to.

    Args:
        model (nn.Module): In float; its copy predicts.
        cfg (Config): Its config.
        image (Tensor): (channels, H, W), uint8.
    """
    try:
        return bool(tensors_of(copy.deepcopy(model).eval().test_step(sample_of(cfg, image))))
    except Exception:  # of the user's own predict
        return False


def without_resizing(pipeline: list[dict]) -> list[dict]:
    """Return a test pipeline that leaves small images small."""
    from ..deploy.pixels import kind_of
    kinds = [kind_of(step) for step in pipeline]
    return [step for step, kind in zip(pipeline, kinds) if not ('Resize' in kind or kind in ('Pad', 'CenterCrop'))]


@torch.no_grad()
def find_objects(predictor, image: Tensor) -> None:
    """Let a model of random weights find objects, in place: by classes that differ, otherwise without thresholds.

    Args:
        predictor (Predictor): Of the model.
        image (Tensor): (1, H, W, C) uint8.
    """
    from ..deploy.answers import anything
    from ..deploy.library.refused import dicts
    model, known = predictor.model, set()
    quantized = set(quantized_layers(model).values())

    def spread(layer, args, output):
        deviation = float(output.std())
        if layer not in known and deviation > 0:
            layer.weight *= LIKELY / deviation
        known.add(layer)  # levels share it
        return layer.forward(*args)

    layers = [layer for name, layer in model.named_modules() if CLASSES.search(name) and layer not in quantized
              and isinstance(layer, (nn.Linear, nn.Conv2d))]
    with hooked([layer.register_forward_hook(spread) for layer in layers]):
        predictor(image)
    if not anything(predictor.names, [value.numpy() for value in predictor(image)]):
        for settings in (part for module in model.modules() for part in dicts(vars(module).get('test_cfg'))):
            settings.update(dict.fromkeys(set(THRESHOLDS) & set(settings), 0.0))


def check_export(model: nn.Module, cfg: Config, work_dir, size: int = SIZE) -> dict:
    """Write a quantized model as one graph, and hold it against the model at two sizes in both runtimes.

    The model finds objects, see :func:`find_objects`: where there are none, nothing is known of decoding, suppression
    and masks.

    Args:
        model (nn.Module): Quantized, on CPU; its copy is exported.
        cfg (Config): Its config.
        work_dir (str | Path): For the graph.
        size (int): Pixels of a side that the model is made for. A graph for any size is held against the model at twice
            as many, since OpenVINO 2026.4.1 computes deformable attention to maps of a single pixel wrongly; one image
            is square, one half as wide again. Defaults to 64.

    Returns:
        dict: ``export``: 'any size', 'one size', 'refused' or 'failed'; ``export_reason``, why not or not any size; and
        ``sqnr`` of the int8 graph's feature maps against the model's, dB, the lowest.
    """
    from ..deploy.agreement import first_line
    from ..deploy.graph import Form
    from ..deploy.pixels import test_dataset
    from ..deploy.predictor import predictor_of
    from ..deploy.runtime import RUNTIMES
    from ..deploy.whole import MODEL, Trial, enlarged
    cfg = copy.deepcopy(cfg)
    dataset = test_dataset(cfg)
    dataset.pipeline = without_resizing(dataset.pipeline)
    image = torch.randint(0, 256, (1, size, size, image_channels(model)), dtype=torch.uint8,
                          generator=torch.Generator().manual_seed(0))
    try:
        predictor = predictor_of(copy.deepcopy(model), cfg).eval()
        find_objects(predictor, image)
    except UserError as error:
        return dict(export='refused', export_reason=str(error))
    except Exception as error:  # the model's own
        return dict(export='failed', export_reason=first_line(error))
    reason = None
    for dynamic, sizes in ((True, [(2 * size, 2 * size), (2 * size, 3 * size)]), (False, [(size, size)]),
                           (False, [(size, size * 3 // 2)])):
        try:
            examples = {f'{height} x {width}': enlarged(image, (height, width)) for height, width in sizes}
            found = Trial(predictor, examples, dynamic, Form(), list(RUNTIMES)).run(Path(work_dir) / MODEL)
            failed = [str(item) for runtime in RUNTIMES for item in found.failures(runtime)]
            failed += [] if found.anything else ['no object was found: the answers were compared on none']
        except UserError as error:
            return dict(export='refused', export_reason=str(error))
        except Exception as error:  # the exporter's, the library's or a runtime's
            failed = [first_line(error)]
        if not failed:
            measured = [item.sqnr for item in found.findings if item.graph == 'int8']
            if dynamic:
                return dict(export='any size', sqnr=round(min(measured), 1))
            return dict(export='one size', export_reason=reason, sqnr=round(min(measured), 1))
        reason = reason or failed[0]
    return dict(export='failed', export_reason=reason)


def check_config(path, work_dir, size: int = SIZE, stanza: dict | None = None, export: bool = False) -> dict:
    """Take a config through the whole job: stanza, conversion, synthesis, calibration, two updates of the game,
    prediction, saving, reloading, and the same prediction again.

    Args:
        path (str | Path): The config.
        work_dir (str | Path): For what is written.
        size (int): Pixels of a side. Defaults to 64.
        stanza (dict, optional): Settings besides the sizes and numbers of steps.
        export (bool): Whether to go on to :func:`check_export`. Defaults to False.

    Returns:
        dict: What :func:`check_export` gives; ``scope``; ``compared``: 'predictions', or 'features' where the float
        model needs annotations to predict; ``layers``, how many are quantized; ``attentions``, of how many the products
        are.

    Raises:
        UserError: Where psaq_mm or the library says no.
        AssertionError: If the reloaded model has other weights or scales, or predicts anything else.
    """
    cfg = read_config(path)
    cfg.model = without_language(shrink(copy.deepcopy(cfg.model), size))
    cfg.work_dir, cfg.log_level = str(work_dir), 'ERROR'
    default_scope(cfg)
    torch.manual_seed(0)
    model = build_float(cfg)
    initialise(model)
    weights = Path(work_dir) / 'float.pth'
    weights.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(state_dict=model.state_dict()), weights)
    image = torch.randint(0, 256, (image_channels(model), size, size), dtype=torch.uint8,
                          generator=torch.Generator().manual_seed(0))
    predicts = can_predict(model, cfg, image)
    names = dict(model.named_modules())
    # An encoder that reads text as well runs in predictions only, of which calibration has none.
    targets = [target for target in TARGETS if names.get(target) is not None
               and not (target == 'encoder' and 'language_model' in names)]
    cfg.quantization = dict(stanza or {}, targets=targets or None, reconstruction=dict(steps=2, views=2) if (
                                stanza or {}).get('recipe') == 'low_bit' else {},
                            synthesis=dict(num_images=2, batch_size=1, size=(size, size), steps=2), game=dict(steps=2))
    quantization, content, *_ = check(cfg, str(weights), False)
    run = data_free_config(cfg, quantization, in_own_layout(content, OwnedFolder(work_dir)), dataset_meta(cfg, {}))
    run.experiment_name = f'zoo_{time.time_ns()}'
    run.log_level = 'ERROR'
    runner = Runner.from_cfg(run)
    runner.train()
    loop, student = runner.train_loop, runner.train_loop.student

    def outputs(model):
        if predicts:
            return tensors_of(model.test_step(sample_of(cfg, image)))
        return extract_features(model, loop.images[0][:1])

    with torch.no_grad():
        expected = outputs(student)
        reloaded = MODELS.build(test_config(cfg, quantization).model).eval()
        saved = torch.load(Path(work_dir) / 'quantized.pth', map_location='cpu', weights_only=True)
        reloaded.load_state_dict(saved['state_dict'])
        found = outputs(reloaded)
    assert expected and [a.shape for a in expected] == [b.shape for b in found], 'predictions differ, or there are none'
    for key, value in student.state_dict().items():
        assert torch.equal(value.nan_to_num(), reloaded.state_dict()[key].nan_to_num()), f'{key} is not what was saved'
    for a, b in zip(expected, found):  # where memory lies moves the last bits of torch's own products
        torch.testing.assert_close(a.float(), b.float(), rtol=1e-4, atol=1e-5)
    layers = quantized_layers(student)
    attentions = sum(isinstance(layer, QuantizedMatMul) and name.endswith(SCORES) for name, layer in layers.items())
    found = check_export(reloaded, cfg, work_dir, size) if export else {}
    return dict(scope=scope(student, quantization), compared='predictions' if predicts else 'features',
                layers=len(layers), attentions=attentions, **found)


def _work(connection, path, work_dir, log, stanza, export):
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    try:
        connection.send(dict(result='pass', **check_config(path, work_dir, stanza=stanza, export=export)))
    except UserError as error:
        connection.send(dict(result='refused', reason=str(error)))
    except BaseException as error:  # what nobody foresaw is what this is to find
        import traceback
        traceback.print_exc()
        connection.send(dict(result='failed', reason=f'{type(error).__name__}: {error}'))


def check_apart(path, work_dir, log, timeout: float, stanza: dict | None = None, export: bool = False) -> dict:
    """:func:`check_config` in a process of its own, which may crash or hang.

    Args:
        path (str | Path): The config.
        work_dir (str | Path): For what is written.
        log (str | Path): For what is printed.
        timeout (float): Seconds.
        stanza (dict, optional), export (bool): See :func:`check_config`.

    Returns:
        dict: ``result``: 'pass', 'refused' (a clear error) or 'failed'; ``reason``; and what a pass gives.
    """
    context = multiprocessing.get_context('fork')
    ours, theirs = context.Pipe(False)
    process = context.Process(target=_work, args=(theirs, path, work_dir, log, stanza, export))
    process.start()
    theirs.close()
    try:
        if ours.poll(timeout):
            return ours.recv()
        return dict(result='failed', reason=f'not done after {timeout:.0f} s')
    except EOFError:
        process.join()
        return dict(result='failed', reason=f'the process ended with {process.exitcode}')
    finally:
        process.kill()
        process.join()
