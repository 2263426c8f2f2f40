"""The whole job, for scripts: check everything, quantize, write, evaluate."""
from __future__ import annotations

import copy
import os
import time
from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict
from mmengine.dist import get_world_size, init_dist, is_distributed, is_main_process
from mmengine.registry import DATASETS, MODELS
from mmengine.runner import Runner, find_latest_checkpoint

from ..errors import UserError
from ..models import quantize_model, scope
from ..quantization import model_bits, quantizers
from ..stanza import QuantizationConfig
from .checkpoint import CheckpointError, float_checkpoint, in_own_layout, load_float, versions
from .config import (
    data_free_config,
    dataset_meta,
    default_scope,
    evaluation_gap,
    float_config,
    name_visualizer,
    test_config,
    without_pretrained,
)
from .report import write_json

MEGABYTE = 8e6  # bits


def init_distributed(cfg: Config) -> None:
    """Joins the other processes, with gloo where there is no GPU (mmengine's own set-up needs one).

    Raises:
        UserError: If the launcher cannot work here.
    """
    launcher = cfg.get('launcher', 'none')
    if launcher == 'none' or is_distributed():
        return
    if torch.cuda.is_available():
        init_dist(launcher, **(cfg.get('env_cfg') or {}).get('dist_cfg', dict(backend='nccl')))
    elif launcher == 'pytorch' and 'RANK' in os.environ:
        torch.distributed.init_process_group('gloo')
    else:
        raise UserError(f'--launcher {launcher}: without a GPU only torchrun works, torchrun --nproc_per_node=N '
                        'tools/dfq.py CONFIG --launcher pytorch')


def evaluate(cfg: Config, checkpoint: str, work_dir: str, name: str) -> dict[str, float]:
    """Metrics of a model on the config's test data, by mmengine's own test loop.

    Args:
        cfg (Config): A float or test config.
        checkpoint (str): Weights.
        work_dir (str): For the log.
        name (str): Tells this evaluation's log from others.

    Returns:
        dict[str, float]: As the evaluator names them, e.g. 'coco/bbox_mAP'.
    """
    cfg = copy.deepcopy(cfg)
    cfg.load_from, cfg.work_dir, cfg.experiment_name = checkpoint, work_dir, f'{name}_{time.time_ns()}'
    name_visualizer(cfg, cfg.experiment_name)
    runner = Runner.from_cfg(cfg)
    return {key: float(value) for key, value in runner.test().items()}


def check_labels(cfg: Config, model) -> None:
    """Finds out before any work whether the test data set's labels can be the model's.

    Raises:
        UserError: From a data set that can check that (``check(num_classes)``).
    """
    classes = getattr(getattr(model, 'head', None), 'out_features', None)
    dataset = copy.deepcopy(cfg.test_dataloader['dataset'])
    with DATASETS.switch_scope_and_registry(None) as registry:
        checks = hasattr(registry.get(dataset['type']), 'check')
    if classes and checks:
        DATASETS.build(dataset).check(classes)


def check(cfg: Config, checkpoint: str | None = None, evaluated: bool = True):
    """Everything that can be wrong with a config and its checkpoint, found before any work.

    Args:
        cfg (Config): With a ``quantization`` stanza.
        checkpoint (str, optional): Instead of the config's ``load_from``.
        evaluated (bool): Whether the test data will be needed. Defaults to True.

    Returns:
        tuple: The parsed stanza, the checkpoint's content, size of the float and of the quantized model in MB.

    Raises:
        StanzaError, PatternError, CheckpointError: Each naming what to change.
    """
    if 'quantization' not in cfg:
        raise UserError(f"{cfg.filename} has no 'quantization' stanza: add quantization = dict() for W8A8, or inherit "
                         'from configs/_base_/dfq.py')
    quantization = QuantizationConfig.parse(cfg.quantization)
    source = checkpoint or cfg.get('load_from')
    fetched = not source and cfg.model.get('pretrained') is True  # timm's own weights, which the user asked for
    if not source and not fetched:
        raise CheckpointError('no full-precision checkpoint: set load_from in the config, or pass --checkpoint FILE')
    default_scope(cfg)
    model = MODELS.build(copy.deepcopy(cfg.model) if fetched else without_pretrained(copy.deepcopy(cfg.model)))
    if evaluated and not evaluation_gap(cfg):
        check_labels(cfg, model)
    float_size = model_bits(model) / MEGABYTE
    if fetched:
        content = dict(state_dict={k: v.clone() for k, v in model.state_dict().items()}, meta={}, layout='timm',
                       path=f'timm {cfg.model.model}')
    else:
        content = float_checkpoint(model, source)
    quantize_model(model, quantization)
    if not quantizers(model):
        raise UserError(f"nothing to quantize: targets {', '.join(quantization.targets)} hold no linear layer, "
                        'convolution or attention, less what keep_float names')
    load_float(model, content, quantization.targets)
    return quantization, content, float_size, model_bits(model) / MEGABYTE


def quantize(cfg: Config,
             checkpoint: str | None = None,
             resume: bool = False,
             amp: bool = False,
             eval_float: bool = True,
             eval_quantized: bool = True) -> dict:
    """Quantizes the model of a config without data and evaluates it if its test data is there.

    Writes to ``cfg.work_dir``: ``quantized.pth``, ``test_config.py``, ``synthetic.png``, ``synthetic/``,
    ``metrics.json`` and mmengine's log.

    Args:
        cfg (Config): With a stanza and ``work_dir``.
        checkpoint (str, optional): Full-precision weights instead of ``load_from``.
        resume (bool): Go on where an interrupted run stopped. Defaults to False.
        amp (bool): bfloat16 features. Defaults to False.
        eval_float, eval_quantized (bool): What to evaluate. Both default to True.

    Returns:
        dict: What ``metrics.json`` holds: ``full_precision`` and ``quantized`` metrics, ``size_mb``, ``minutes``,
        ``scope``, ``versions``, paths, and ``not_evaluated`` with the reason where evaluation was impossible.

    Raises:
        StanzaError, PatternError, CheckpointError: Before any work.
    """
    work_dir = Path(cfg.work_dir)
    init_distributed(cfg)
    quantization, content, float_size, quantized_size = check(cfg, checkpoint, eval_float or eval_quantized)
    meta = dataset_meta(cfg, content['meta'])
    resume_from = find_latest_checkpoint(str(work_dir)) if resume else None
    if resume_from and get_world_size() > 1:
        raise UserError('--resume works with a single process only: images of the other processes are not stored. '
                        'Start afresh without --resume')
    work_dir.mkdir(parents=True, exist_ok=True)
    weights = in_own_layout(content, work_dir)
    run = data_free_config(cfg, quantization, weights, meta, amp, resume_from)
    test_path = work_dir / 'test_config.py'
    tested = test_config(cfg, quantization)

    name_visualizer(run, f'data_free_{time.time_ns()}')
    runner = Runner.from_cfg(run)
    if content['layout']:
        runner.logger.info(f"{content['path']} has the layout of {content['layout']}: converted to {weights}")
    if is_main_process():
        tested.dump(test_path)
    runner.train()
    minutes = runner.train_loop.minutes  # over all sessions of a run that was interrupted
    logger = runner.logger

    result = dict(
        full_precision={}, quantized={}, size_mb=dict(full_precision=round(float_size, 2),
                                                      quantized=round(quantized_size, 2)),
        minutes=round(sum(minutes.values()), 2), synthesis_minutes=round(minutes['synthesis'], 2),
        scope=scope(runner.train_loop.student, quantization), placement=quantization.placement,
        bits=dict(weight=quantization.weight.bits, activation=quantization.activation.bits),
        method=quantization.synthesis.method, seed=runner.seed, checkpoint=str(work_dir / 'quantized.pth'),
        test_config=str(test_path), versions=versions())
    gap = evaluation_gap(cfg)
    if gap and (eval_float or eval_quantized):
        result['not_evaluated'] = gap
        logger.warning(f'Not evaluated: {gap}. The quantized checkpoint is written all the same.')
    else:
        if eval_float:
            result['full_precision'] = evaluate(float_config(cfg), weights, str(work_dir), 'full_precision')
        if eval_quantized:
            result['quantized'] = evaluate(Config.fromfile(test_path), result['checkpoint'], str(work_dir), 'quantized')
    if is_main_process():
        write_json(result, work_dir / 'metrics.json')
    return result


def with_stanza(cfg: Config, **changes) -> Config:
    """A copy of a config whose stanza is merged with some changes (nested dicts merge, as in mmengine)."""
    cfg = copy.deepcopy(cfg)
    stanza = ConfigDict(cfg.get('quantization') or {})
    cfg.quantization = Config._merge_a_into_b(changes, stanza)
    return cfg
