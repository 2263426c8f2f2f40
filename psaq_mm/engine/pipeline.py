"""The whole job, for scripts: check everything, quantize, write, evaluate."""
from __future__ import annotations

import copy
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict
from mmengine.dist import barrier, init_dist, is_distributed, is_main_process
from mmengine.registry import MODELS
from mmengine.runner import Runner

from ..errors import UserError, doing, is_out_of_memory
from ..files import OwnedFolder
from ..models import (
    class_counts,
    nothing_fetched,
    pixel_statistics,
    quantize_model,
    resolved,
    scope,
    without_pretrained,
)
from ..quantization import Mode, model_bits, quantizer_mode, quantizers
from ..stanza import ROOT, QuantizationConfig
from .checkpoint import (
    QUANTIZED,
    CheckpointError,
    float_checkpoint,
    in_own_layout,
    interrupted_run,
    load_float,
    resumable_checkpoints,
    versions,
)
from .config import (
    calibration_gap,
    data_free_config,
    dataset_meta,
    default_scope,
    evaluation_config,
    evaluation_gap,
    float_config,
    name_visualizer,
    test_config,
)
from .config_file import config_text, one_line
from .display import Display
from .images import read_images
from .rehearsal import rehearse_calibration, rehearse_evaluation
from .reporting import draw_figures, measure, show_report, write_report
from .runner import DataFreeRunner

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


@doing("evaluating on the config's test data (test_dataloader, test_evaluator)")
def evaluate(cfg: Config, checkpoint: str, work_dir: str, name: str,
             display: Display | None = None) -> dict[str, float]:
    """Metrics of a model on the config's test data, by mmengine's own test loop.

    Args:
        cfg (Config): A float or test config.
        checkpoint (str): Weights.
        work_dir (str): For the log.
        name (str): Tells this evaluation's log from others.
        display (Display, optional): Shows how far it is.

    Returns:
        dict[str, float]: As the evaluator names them, e.g. 'coco/bbox_mAP'.
    """
    cfg = evaluation_config(cfg, f'{name}_{time.time_ns()}')
    cfg.load_from, cfg.work_dir = checkpoint, work_dir
    with nothing_fetched():
        runner = Runner.from_cfg(cfg)
    if display is not None:
        display.attach(runner)
    return {key: float(value) for key, value in runner.test().items()}


def build_float(cfg: Config, fetched: bool = False):
    """The config's model in float.

    Args:
        cfg (Config): Its scope is the current one.
        fetched (bool): Let it fetch the weights that it names. Defaults to False.

    Raises:
        UserError: Instead of whatever the library raises.
    """
    model = copy.deepcopy(cfg.model)
    try:
        with nullcontext() if fetched else nothing_fetched():
            return MODELS.build(model if fetched else without_pretrained(model))
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # of classes that may be the user's own
        raise UserError(f"the model of {cfg.filename or 'the config'} cannot be built ({one_line(error)})") from error


@doing('checking the config and its checkpoint (model, load_from)')
def check(cfg: Config, checkpoint: str | None = None, evaluated: bool = True):
    """Everything that can be wrong with a config and its checkpoint, found before any work.

    Args:
        cfg (Config): With a ``quantization`` stanza.
        checkpoint (str, optional): Instead of the config's ``load_from``.
        evaluated (bool): Whether the test data will be needed. Defaults to True.

    Returns:
        tuple: The parsed stanza, the checkpoint's content, size of the float and of the quantized model in MB, and
        why the config cannot be evaluated here, or None.

    Raises:
        StanzaError, PatternError, CheckpointError: Each naming what to change.
    """
    if not cfg.get('model'):
        raise UserError(f"{cfg.filename} has no model: add model = dict(type=...), or inherit a config that has one")
    if 'quantization' not in cfg:
        raise UserError(f"{cfg.filename} has no 'quantization' stanza: add quantization = dict() for W8A8, or inherit "
                         'from configs/_base_/dfq.py')
    quantization = QuantizationConfig.parse(cfg.quantization)
    if quantization.report.reuse:
        read_images(quantization.report.reuse, f'{ROOT}.report.reuse', 'fresh.pt')
    source = checkpoint or cfg.get('load_from')
    fetched = not source and cfg.model.get('pretrained') is True  # timm's own weights, which the user asked for
    if not source and not fetched:
        raise CheckpointError('no full-precision checkpoint: set load_from in the config, or pass --checkpoint FILE')
    default_scope(cfg)
    model = build_float(cfg, fetched)
    quantization = resolved(quantization, model)
    pixel_statistics(model)  # one value a channel
    float_size = model_bits(model) / MEGABYTE
    if fetched:
        content = dict(state_dict={k: v.clone() for k, v in model.state_dict().items()}, meta={}, layout='timm',
                       path=f'timm {cfg.model.model}', why='are no file of mmengine')
    else:
        content = float_checkpoint(model, source, quantization.load_weights)
    content['class_counts'] = class_counts(model, cfg.model)
    quantize_model(model, quantization)
    if not quantizers(model):
        raise UserError(f"nothing to quantize: targets {', '.join(quantization.targets)} hold no linear layer, "
                        'convolution or attention, less what keep_float names')
    load_float(model, content, quantization.targets, cfg.model)
    gap = evaluation_gap(cfg) if evaluated else None
    real = quantization.synthesis.method == 'real'
    if real and calibration_gap(cfg):
        raise UserError(calibration_gap(cfg))
    with quantizer_mode(model, Mode.FLOAT):
        if real:
            rehearse_calibration(cfg, model)
        if evaluated and not gap:
            gap = rehearse_evaluation(cfg, model)
    return quantization, content, float_size, model_bits(model) / MEGABYTE, gap


def check_space(folder: Path, megabytes: float) -> None:
    """Find out whether results have room in a folder.

    Args:
        folder (Path): Where to.
        megabytes (float): What will be written at least.

    Raises:
        UserError: If not.
    """
    free = shutil.disk_usage(folder).free / 1e6
    if free < megabytes:
        raise UserError(f'the work dir {folder} has {free:.0f} MB left, {megabytes:.0f} MB are needed: make room, or '
                        'choose another with --work-dir')


@doing('setting up the run (default_hooks, visualizer, env_cfg)')
def build_runner(cfg: Config) -> DataFreeRunner:
    """Build the Runner of the data-free run; its experiment loggers have started then.

    Raises:
        UserError: Where it cannot be built, as with a visualizer or hook that is set wrongly.
    """
    try:
        with nothing_fetched():
            return DataFreeRunner.from_cfg(cfg)
    except UserError:
        raise
    except Exception as error:  # of hooks and loggers, which may be the user's own
        raise UserError(f'no run can be set up from the config ({type(error).__name__}: {error}): check its '
                        'default_hooks, env_cfg and log settings') from error


RUN = 'data_free'  # sub-folder for mmengine's Runner: logs, its copy of the config, iter_*.pth
# All that a run writes to the work dir at its end; the folder may be that of a training run as well.
RESULTS = (QUANTIZED, 'test_config.py', 'metrics.json', 'report.html', 'fresh.pt', 'synthetic.png',
           'synthetic.pt', 'synthetic', 'calibration_set', f'{RUN}/')


def was_interrupted(work_dir: str | Path) -> bool:
    """Return whether a run in a work dir has left what it needs to go on."""
    return bool(resumable_checkpoints(Path(work_dir) / RUN))


def to_resume(folder: OwnedFolder) -> str | None:
    """Return the checkpoint of the interrupted run in a work dir, or None if no run has left anything.

    Raises:
        UserError: If the run there is finished, and what it needed to go on is gone.
    """
    found = interrupted_run(folder.path / RUN)
    if found is None and folder.is_ours(QUANTIZED):
        raise UserError(f'--resume: {folder.path / QUANTIZED} is finished, nothing is left to resume. Without '
                        '--resume the command makes it anew; another --work-dir keeps it')
    return found


def about_resumption(runner: Runner, folder: OwnedFolder, resume: bool, resume_from: str | None) -> None:
    """Say what a user may not expect: a fresh start with --resume, or one without it beside an interrupted run."""
    if resume and not resume_from:
        runner.logger.warning(f'--resume: {folder.path} holds no interrupted run, this one starts afresh')
    left, finished = resumable_checkpoints(folder.path / RUN), folder.path / QUANTIZED
    if not resume and left and not (finished.exists() and finished.stat().st_mtime >= left[0].stat().st_mtime):
        runner.logger.warning(f'{folder.path} holds an interrupted run, and this one starts afresh: with --resume the '
                              f'command goes on from {left[0].name}')


PROCESS_LOST = ('closed by peer', 'reset by peer', 'broken pipe', 'remote process exited')


@contextmanager
def explained_failures(cfg: Config, quantization: QuantizationConfig) -> Iterator[None]:
    """Says what to do where memory or disk end; everything finished is in the work dir by then.

    Raises:
        UserError: Instead of what torch or the system raise.
    """
    resume = f'What is finished is in {cfg.work_dir}: --resume goes on from the last checkpoint there'
    try:
        yield
    except OSError as error:
        raise UserError(f'a file cannot be read or written ({error}). {resume}, if there is one') from error
    except (MemoryError, RuntimeError) as error:
        if is_distributed() and any(words in str(error).lower() for words in PROCESS_LOST):
            raise UserError(f'another process of the job has ended, look for its error ({error}). {resume}') from error
        if not is_out_of_memory(error):
            raise
        synthesis = quantization.synthesis
        sizes = ', '.join(f'{height} x {width}' for height, width in synthesis.size)
        raise UserError(
            f'out of memory with {synthesis.batch_size} images of {sizes} at a time '
            f'({type(error).__name__}: {(str(error) or "no more is known").splitlines()[0]}). '
            + ('' if synthesis.checkpointing else f'{resume}, with less memory if {ROOT}.synthesis.checkpointing=True '
               'is set. Or ') + f'set a smaller {ROOT}.synthesis.batch_size or {ROOT}.synthesis.size and start afresh'
            + (f'. In the reconstruction, fewer {ROOT}.reconstruction.views help, too'
               if quantization.reconstruction.steps else '')
        ) from error


def quantize(cfg: Config,
             checkpoint: str | None = None,
             resume: bool = False,
             amp: bool = False,
             eval_float: bool = True,
             eval_quantized: bool = True,
             quiet: bool = False) -> dict:
    """Quantizes the model of a config without data and evaluates it if its test data is there.

    Writes to ``cfg.work_dir``: ``quantized.pth``, ``test_config.py``, ``synthetic.png``, ``synthetic/``,
    ``metrics.json``, ``report.html`` and mmengine's log.

    Args:
        cfg (Config): With a stanza and ``work_dir``.
        checkpoint (str, optional): Full-precision weights instead of ``load_from``.
        resume (bool): Go on where an interrupted run stopped. Defaults to False.
        amp (bool): bfloat16 features. Defaults to False.
        eval_float, eval_quantized (bool): What to evaluate. Both default to True.
        quiet (bool): Show warnings and errors only. Defaults to False.

    Returns:
        dict: What ``metrics.json`` holds: ``full_precision`` and ``quantized`` metrics, ``size_mb``, ``minutes``,
        ``recipe`` and ``departures`` (what the stanza says otherwise than its recipe), ``stages`` (``minutes`` of each,
        and what it says of itself), ``scope``, ``versions``, paths, and ``not_evaluated`` with the reason where
        evaluation was impossible.

    Raises:
        StanzaError, PatternError, CheckpointError: Before any work.
        UserError: Where something fails on the way, saying what is finished and how to go on.
    """
    init_distributed(cfg)
    folder = OwnedFolder(cfg.work_dir)
    with folder.lock() if is_main_process() else nullcontext(), Display(quiet) as display:
        return _quantize(cfg, folder, checkpoint, resume, amp, eval_float, eval_quantized, display)


@doing('quantizing')
def _quantize(cfg, folder, checkpoint, resume, amp, eval_float, eval_quantized, display):
    if is_main_process():
        folder.claim(RESULTS)
    quantization, content, float_size, quantized_size, gap = check(
        cfg, checkpoint, eval_float or eval_quantized)
    meta = dataset_meta(cfg, content['meta'], content['class_counts'])
    check_space(folder.path, 1.1 * float_size)  # quantized.pth simulates integers in float
    if is_main_process():
        folder.own(RUN)
    barrier()
    run_dir = folder.path / RUN
    resume_from = to_resume(folder) if resume else None
    weights = in_own_layout(content, folder)
    run = data_free_config(cfg, quantization, weights, meta, amp, resume_from, str(run_dir))
    test_path = folder.path / 'test_config.py'
    tested = test_config(cfg, quantization)
    tested.work_dir = str(run_dir)  # the library's test tool writes its copy of the config there
    tested = config_text(tested)  # it comes back: known before the work

    name_visualizer(run, f'data_free_{time.time_ns()}')
    with explained_failures(cfg, quantization):
        runner = build_runner(run)
        display.stack.callback(runner.close_visualizer)  # the report is shown to it first
        display.attach(runner)
        if content['why']:
            runner.logger.info(f"{content['path']} {content['why']}: all models of the run load the copy {weights}")
        if gap:
            runner.logger.warning(f'Not evaluated: {gap}. The quantized checkpoint will be written all the same')
        about_resumption(runner, folder, resume, resume_from)
        runner.train()
    minutes = runner.train_loop.minutes  # over all sessions of a run that was interrupted
    logger = runner.logger

    result = dict(
        full_precision={}, quantized={}, size_mb=dict(full_precision=round(float_size, 2),
                                                      quantized=round(quantized_size, 2)),
        minutes=round(sum(minutes.values()), 2), synthesis_minutes=round(minutes.get('synthesis', 0.0), 2),
        scope=scope(runner.train_loop.student, quantization), placement=quantization.placement,
        bits=dict(weight=quantization.weight.bits, activation=quantization.activation.bits),
        mixed=any('bits' in (side or {}) for o in quantization.overrides for side in (o.weight, o.activation)),
        method=quantization.synthesis.method, recipe=quantization.recipe, departures=quantization.departures,
        seed=runner.seed,
        stages={stage.name: dict(runner.train_loop.summaries.get(stage.name, {}), minutes=round(minutes[stage.name], 2))
                for stage in runner.train_loop.stages},
        checkpoint=str(folder.path / QUANTIZED), test_config=str(test_path), versions=versions())
    if is_main_process():  # an earlier result stays whole until this one is; nothing of both is mixed from here on
        with explained_failures(cfg, quantization):
            folder.remove('report.html')
            folder.write(test_path.name, tested.encode())
            folder.write_json('metrics.json', result)
    barrier()
    failure = None
    if gap:
        result['not_evaluated'] = gap
    else:
        try:
            if eval_float:
                result['full_precision'] = evaluate(float_config(cfg), weights, str(run_dir), 'full_precision',
                                                    display)
            if eval_quantized:
                result['quantized'] = evaluate(Config.fromfile(test_path), result['checkpoint'], str(run_dir),
                                               'quantized', display)
        except Exception as error:  # of data sets and metrics, which may be the user's own
            failure = error
            result['not_evaluated'] = f'the evaluation failed ({type(error).__name__}: {error})'
            logger.warning('The evaluation failed:', exc_info=True)
    if is_main_process():
        with explained_failures(cfg, quantization):
            report(runner, cfg, folder, result)
    if failure:
        raise UserError(f"{result['checkpoint']} is written, but {result['not_evaluated']}. Mend the config's test "
                        "data and evaluate with the library's tools/test.py") from failure
    return result


def report(runner: Runner, cfg: Config, folder: OwnedFolder, result: dict) -> None:
    """Measure what can be measured without data, add it to the result, and write ``metrics.json`` and ``report.html``.

    A report that fails is one warning: the model is finished by then.
    """
    folder.write_json('metrics.json', result)
    started = time.perf_counter()
    try:
        measured = measure(runner, folder)
        result['fidelity'] = measured['fidelity']
        result['report_minutes'] = round((time.perf_counter() - started) / 60, 2)
        figures = draw_figures(measured)
        result['report'] = str(write_report(runner, cfg, folder, result, measured, figures))
    except Exception:
        runner.logger.warning('The report could not be made:', exc_info=True)
    else:
        runner.logger.info(f"The report is {result['report']}")
        try:
            show_report(runner, result, figures)
        except Exception:  # of a Visualizer, which may be the user's own
            runner.logger.warning('The report could not be shown to the visualizer:', exc_info=True)
    folder.write_json('metrics.json', result)


def with_stanza(cfg: Config, **changes) -> Config:
    """A copy of a config whose stanza is merged with some changes (nested dicts merge, as in mmengine)."""
    cfg = copy.deepcopy(cfg)
    stanza = ConfigDict(cfg.get('quantization') or {})
    cfg.quantization = Config._merge_a_into_b(changes, stanza)
    return cfg
