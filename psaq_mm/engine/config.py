"""From a config with a stanza to the configs of a run: full precision, data-free, test."""
from __future__ import annotations

import copy
import logging
import os
from collections.abc import Collection
from pathlib import Path

from mmengine.config import Config, ConfigDict
from mmengine.dataset import BaseDataset
from mmengine.dist import get_world_size
from mmengine.logging import print_log
from mmengine.registry import DATASETS, DefaultScope
from mmengine.utils import is_abs

from ..errors import UserError
from ..models import DEFAULT_SIZE, quantize_model_config, without_pretrained
from ..stanza import QuantizationConfig

# Default hooks of mmdet and mmseg that make sense without data.
KEPT_HOOKS = ('timer', 'logger', 'param_scheduler', 'sampler_seed', 'runtime_info')
OWN_KEYS = ('quantization', 'calib_dataloader', 'runner_type')
TRAINING_KEYS = ('train_dataloader', 'train_cfg', 'optim_wrapper', 'param_scheduler', 'auto_scale_lr', 'custom_hooks')
PATHS = ('ann_file', 'proposal_file', 'seg_prefix')  # of data sets and metrics: files and folders they read
LOCAL_BACKENDS = ('local', 'disk', 'hard_disk')
NESTED = ('dataset', 'datasets', 'metrics')  # of wrappers: what they wrap
# mmengine's default names a GPU for each process; without device_ids the same wrapper serves GPU and CPU.
MODEL_WRAPPER = dict(type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False)


def float_config(cfg: Config) -> Config:
    """The config without the stanza and without training: what evaluates the full-precision model."""
    cfg = copy.deepcopy(cfg)
    for key in (*OWN_KEYS, *TRAINING_KEYS):
        cfg.pop(key, None)
    for split in ('dataloader', 'cfg', 'evaluator'):  # one evaluation is enough: test stays
        cfg.pop(f'val_{split}', None)
    cfg.resume = False
    cfg.model_wrapper_cfg = MODEL_WRAPPER
    without_pretrained(cfg.model)
    return cfg


def test_config(cfg: Config, quantization: QuantizationConfig) -> Config:
    """The config with which the ecosystem's own tools build, load and evaluate the quantized model."""
    cfg = float_config(cfg)
    cfg.model = ConfigDict(quantize_model_config(cfg.model, quantization))
    imports = cfg.get('custom_imports') or dict(allow_failed_imports=False)
    named = imports.get('imports') or []
    named = [named] if isinstance(named, str) else named
    # In front: it mends what a module of the user's may import, such as torchvision.
    cfg.custom_imports = dict(imports, imports=['psaq_mm', *(name for name in named if name != 'psaq_mm')])
    cfg.load_from = None
    return cfg


def dataset_meta(cfg: Config, checkpoint_meta: dict, counts: Collection[int] = ()) -> dict:
    """Classes and palette: the checkpoint's if it has them, otherwise those of the test data set.

    Names are taken only where there are as many as the model has classes: a data set without ``metainfo`` has those of
    COCO or ADE20K.

    Args:
        cfg (Config): The user's.
        checkpoint_meta (dict): ``meta`` of the checkpoint.
        counts (Collection[int]): Numbers of classes that the model may have; empty: whatever there is.

    Returns:
        dict: Empty, after a warning, where no names fit.
    """
    refused = []
    for source, meta in _dataset_metas(cfg, checkpoint_meta):
        names = meta.get('classes')
        if not counts or names is not None and len(names) in counts:
            return meta
        if names is not None:
            refused.append(f'{source} has {len(names)}')
    if refused:
        print_log(f'The model has {" or ".join(map(str, sorted(counts)))} classes, {", ".join(refused)} names: '
                  "quantized.pth gets none. Name them in test_dataloader.dataset.metainfo = dict(classes=(...))",
                  'current', logging.WARNING)
    return {}


def _dataset_metas(cfg, checkpoint_meta):
    """Where classes and palette may come from, in words, and these, the best first."""
    known = checkpoint_meta.get('dataset_meta')
    if known and isinstance(known, dict):
        yield 'the checkpoint', {str(key).lower(): value for key, value in known.items()}
    if isinstance(checkpoint_meta.get('CLASSES'), (list, tuple)):
        yield 'the checkpoint', dict(classes=checkpoint_meta['CLASSES'], **(
            dict(palette=checkpoint_meta['PALETTE']) if checkpoint_meta.get('PALETTE') else {}))
    for key in ('test_dataloader', 'val_dataloader'):
        if cfg.get(key):
            meta = metainfo_of(cfg[key].get('dataset') or {})
            if meta:
                yield f"{key}'s {described(cfg[key]['dataset'])}", meta
            break
    if cfg.get('metainfo'):
        yield 'metainfo', dict(cfg['metainfo'])


def described(dataset) -> str:
    """Return the types in a data set's config, and the annotation file, in words."""
    if not isinstance(dataset, dict):
        return str(dataset)
    kind, inner = dataset.get('type'), next(filter(None, (dataset.get(name) for name in NESTED)), None)
    text = getattr(kind, '__name__', str(kind))
    if inner:
        return f'{text} of {described(inner[0] if isinstance(inner, (list, tuple)) else inner)}'
    return text + (f", {dataset['ann_file']}" if dataset.get('ann_file') else '')


def metainfo_of(dataset: dict) -> dict:
    """Return classes and palette that a data set's config and class know without its files.

    Args:
        dataset (dict): Its config; of a wrapper, that of the first data set in it.

    Returns:
        dict: Empty where they cannot be told.
    """
    inner = next((part for part in (dataset.get('dataset'), *(dataset.get('datasets') or ())) if part), None)
    if isinstance(inner, dict):
        return metainfo_of(inner)
    dataset, kind = copy.deepcopy(dataset), dataset.get('type')
    known = dict(dataset.get('metainfo') or {})
    try:
        if isinstance(kind, str):
            with DATASETS.switch_scope_and_registry(None) as registry:
                kind = registry.get(kind)
        if isinstance(kind, type) and issubclass(kind, BaseDataset):
            if 'pipeline' in dataset:  # of no use here, and it may need what is not installed
                dataset['pipeline'] = []
            return dict(DATASETS.build(dict(dataset, lazy_init=True)).metainfo)
        return dict(getattr(kind, 'METAINFO', None) or {}, **known)
    except Exception:  # of data sets that may be the user's own; names are optional
        return known


def absent_path(part, key: str) -> str | None:
    """Name the first local file or folder that the config of a data set or metric names and that is not there.

    Args:
        part (dict | list): The config; of wrappers, concatenations and lists, everything in it is looked at.
        key (str): Where it stands, for the answer.
    """
    if isinstance(part, (list, tuple)):
        return next(filter(None, (absent_path(item, f'{key}[{index}]') for index, item in enumerate(part))), None)
    if not isinstance(part, dict):
        return None
    backend = (part.get('backend_args') or {}).get('backend', 'local')
    named = {name: part.get(name) for name in PATHS} if backend in LOCAL_BACKENDS else {}
    prefixes = part.get('data_prefix') if named else None
    named.update({f'data_prefix.{name}': prefixes[name] for name in prefixes} if isinstance(prefixes, dict) else
                 dict(data_prefix=prefixes))
    root = str(part.get('data_root') or '')
    named = {name: os.path.join(root, path) if not is_abs(path) else path
             for name, path in named.items() if path and isinstance(path, str)}
    if not named and root and backend in LOCAL_BACKENDS:
        named['data_root'] = root
    for name, path in named.items():
        if '://' not in path and not Path(path).exists():
            return f'{key}.{name}: {path} does not exist'
    return next(filter(None, (absent_path(part.get(name), f'{key}.{name}') for name in NESTED)), None)


def evaluation_gap(cfg: Config) -> str | None:
    """Say why the config cannot be evaluated here, naming the path that is missing, or None if nothing is known
    against it.
    """
    if not cfg.get('test_dataloader') or not cfg.get('test_evaluator') or cfg.get('test_cfg') is None:
        return 'the config has no test_dataloader, test_cfg and test_evaluator'
    return absent_path(cfg.test_dataloader.get('dataset'), 'test_dataloader.dataset') or absent_path(
        cfg.test_evaluator, 'test_evaluator')


def calibration_gap(cfg: Config) -> str | None:
    """Say why method 'real' cannot run with the config, or None if nothing is known against it."""
    if not cfg.get('calib_dataloader'):
        return ("quantization.synthesis.method = 'real' needs calib_dataloader in the config: a data loader of real "
                'images that are not evaluated on')
    gap = absent_path(cfg.calib_dataloader.get('dataset'), 'calib_dataloader.dataset')
    return gap and f"{gap}, and method 'real' needs its images"


def name_visualizer(cfg: Config, name: str) -> None:
    """Give a config's Visualizer a name of its own, in place.

    One that exists already, as after another run in the same process, would go on showing everything in that run's
    folder.
    """
    if cfg.get('visualizer'):
        cfg.visualizer['name'] = name


def evaluation_config(cfg: Config, name: str) -> Config:
    """A copy of a config for an evaluation that shows nothing to anyone: it leaves files in its own folder.

    Experiment loggers hold the data-free run, which reports the metrics, too. Hooks that are no part of every
    mmengine run, as those that draw predictions, are left out.

    Args:
        cfg (Config): A float or test config.
        name (str): Of the experiment and the Visualizer.
    """
    cfg = copy.deepcopy(cfg)
    cfg.experiment_name = name
    if cfg.get('visualizer'):
        cfg.visualizer.vis_backends = [dict(type='mmengine.LocalVisBackend')]
    name_visualizer(cfg, name)
    cfg.default_hooks = kept_hooks(cfg)
    return cfg


def kept_hooks(cfg: Config) -> dict:
    """Those of a config's ``default_hooks`` that make sense without data."""
    return {name: hook for name, hook in (cfg.get('default_hooks') or {}).items() if name in KEPT_HOOKS}


def data_free_config(cfg: Config,
                     quantization: QuantizationConfig,
                     checkpoint: str,
                     meta: dict,
                     amp: bool = False,
                     resume_from: str | None = None,
                     folder: str | None = None) -> Config:
    """The config of the data-free run itself.

    Args:
        cfg (Config): The user's, with ``work_dir`` set.
        quantization (QuantizationConfig): Its stanza, parsed.
        checkpoint (str): Full-precision weights, a local file.
        meta (dict): Classes and palette.
        amp (bool): bfloat16 features. Defaults to False.
        resume_from (str, optional): Checkpoint of an interrupted run.
        folder (str, optional): Where the Runner keeps its own files. Default: with the results, in ``work_dir``.

    Raises:
        UserError: If method 'real' has no ``calib_dataloader`` to take images from.
    """
    stanza, synthesis = quantization.to_dict(), quantization.synthesis
    seed = (cfg.get('randomness') or {}).get('seed')
    seed = 0 if seed is None else seed
    run = copy.deepcopy(cfg)
    run.work_dir = folder or cfg.work_dir
    for key in (*OWN_KEYS, *TRAINING_KEYS, *(f'{s}_{k}' for s in ('val', 'test')
                                             for k in ('dataloader', 'cfg', 'evaluator'))):
        run.pop(key, None)
    without_pretrained(run.model)
    world = get_world_size()
    shard = -(-synthesis.num_images // world)  # images of each process
    batch = min(synthesis.batch_size, shard)
    if synthesis.method == 'real':
        gap = calibration_gap(cfg)
        if gap:
            raise UserError(gap)
        run.train_dataloader = copy.deepcopy(cfg.calib_dataloader)
    else:
        run.train_dataloader = dict(
            batch_size=batch, num_workers=0, persistent_workers=False, drop_last=False,
            sampler=dict(type='DefaultSampler', shuffle=False), collate_fn=dict(type='default_collate'),
            dataset=dict(type='psaq_mm.StartDataset', num_images=shard * world, batch_size=batch, world_size=world,
                         sizes=synthesis.size or (DEFAULT_SIZE, ), seed=seed, metainfo=meta,
                         start=synthesis.start))
    run.train_cfg = dict(type='psaq_mm.DataFreeLoop', quantization=stanza, checkpoint=checkpoint, amp=amp)
    run.optim_wrapper = dict(type='OptimWrapper', optimizer=dict(
        type='Adam', lr=quantization.student_lr, fused=True))
    hooks = kept_hooks(cfg)
    hooks.setdefault('logger', dict(type='LoggerHook', interval=50))
    hooks['logger'] = dict(hooks['logger'], interval=min(hooks['logger'].get('interval', 50), 50))
    saved = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    interval = saved.get('interval', 100) if saved.get('by_epoch') is False else 100  # an epoch means nothing here
    hooks['checkpoint'] = dict(type='psaq_mm.ResumableCheckpointHook', interval=min(interval, 100))
    run.default_hooks = hooks
    run.custom_hooks = [
        dict(type='psaq_mm.QuantizationHook', quantization=stanza),
        dict(type='psaq_mm.SyntheticImageHook', folder=cfg.work_dir),
        dict(type='psaq_mm.QuantizedCheckpointHook', dataset_meta=meta, folder=cfg.work_dir)
    ]
    run.model_wrapper_cfg = MODEL_WRAPPER
    run.log_processor = dict(type='LogProcessor', window_size=20, by_epoch=False)
    run.randomness = dict(cfg.get('randomness') or {}, seed=seed)
    run.load_from, run.resume = resume_from or checkpoint, resume_from is not None
    return run


def default_scope(cfg: Config) -> None:
    """Make the config's scope the current one, as the ecosystem's tools do."""
    from mmengine.registry import init_default_scope
    current, wanted = DefaultScope.get_current_instance(), cfg.get('default_scope') or 'mmdet'
    if current is None or current.scope_name != wanted:
        init_default_scope(wanted)
