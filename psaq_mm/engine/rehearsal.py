"""A rehearsal of what a config says about data, before hours of work: one sample goes the whole way.

Data, packages and classes that this machine lacks are no mistake: an evaluation is skipped then, for a reason that is
said. Whatever is here and does not work is a mistake, which ends the command.
"""
from __future__ import annotations

import copy
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.error import URLError

import numpy as np
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.evaluator import Evaluator
from mmengine.registry import EVALUATOR
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..errors import UserError
from .config import described

LACKING = (FileNotFoundError, NotADirectoryError, PermissionError, ConnectionError, URLError, ImportError)
UNREGISTERED = re.compile(r'is not in the \S+ registry')  # mmengine's words
WORKERS = ('num_workers', 'persistent_workers', 'prefetch_factor', 'timeout', 'multiprocessing_context')
NO_EVALUATION = 'Correct it, or pass --no-eval'


class LackingError(Exception):
    """Something is needed that this machine does not have."""


def is_lacking(error: BaseException | None) -> bool:
    """Return whether an error says that a file, an address, a package or a registered class is not here."""
    while error is not None:
        if isinstance(error, LACKING) or isinstance(error, KeyError) and UNREGISTERED.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def step(what: str, advice: str) -> Iterator[None]:
    """Explain what the user's classes raise.

    Args:
        what (str): What cannot be done if something is raised.
        advice (str): What to do about it.

    Raises:
        LackingError: If something is not here.
        UserError: For everything else.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = f'{what} ({reason_of(error)})'
        if is_lacking(error):
            raise LackingError(reason) from error
        raise UserError(f'{reason}. {advice}') from error


def reason_of(error: Exception) -> str:
    """Return what an error says, in a line."""
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip()
    if UNREGISTERED.search(text):
        text = f"{text.partition('. ')[0]}: custom_imports has to name the module that registers it"
    first = (text.splitlines() or ['no reason given'])[0].removesuffix('.')
    return f'{type(error).__name__}: {first}'


@contextmanager
def undisturbed_randomness() -> Iterator[None]:
    """Restore the state of all random number generators afterwards."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def build_loader(config: dict) -> DataLoader:
    """Build a data loader as a Runner does, without processes of its own."""
    config = {key: value for key, value in copy.deepcopy(config).items() if key not in WORKERS}
    return Runner.build_dataloader(dict(config, num_workers=0), seed=0)


def first_batch(loader: DataLoader):
    """Return the first sample of a data loader, collated.

    Raises:
        ValueError: If there is none.
        TypeError: If the data set has no length.
    """
    if not len(loader.dataset):  # mmengine's own loop asks for the length, too
        raise ValueError('the data set is empty')
    if isinstance(loader.dataset, IterableDataset):
        return next(iter(loader))
    return loader.collate_fn([loader.dataset[next(iter(loader.batch_sampler))[0]]])


def leaves(dataset: Dataset) -> Iterator[Dataset]:
    """Yield the data sets inside wrappers."""
    inner = getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]
    if all(isinstance(part, Dataset) for part in inner):
        for part in inner:
            yield from leaves(part)
    else:
        yield dataset


def size_of(batch) -> str:
    """Return the size of the first input of a batch, in words, as far as it is known."""
    inputs = batch.get('inputs') if isinstance(batch, dict) else None
    if isinstance(inputs, (list, tuple)) and inputs:
        inputs = inputs[0]
    return ' of ' + ' x '.join(map(str, inputs.shape)) if isinstance(inputs, torch.Tensor) else ''


def build_evaluator(config) -> Evaluator:
    """Build an evaluator as a Runner does."""
    config = copy.deepcopy(config)
    if isinstance(config, dict) and 'metrics' in config:
        return EVALUATOR.build(dict(dict(type='Evaluator'), **config))
    return Evaluator(config)


def writes_files(metric) -> bool:
    """Return whether a metric may write files as soon as it sees a prediction."""
    return any(getattr(metric, name, None) for name in ('format_only', 'output_dir', 'outfile_prefix'))


def rehearse_evaluation(cfg: Config, model: nn.Module) -> str | None:
    """Build everything that an evaluation needs, and take one sample from the files to the metric.

    Args:
        cfg (Config): With test data. Its scope is the current one.
        model (nn.Module): Float, or converted with all quantizers off; in the end it may be on another device.

    Returns:
        str: What this machine lacks, or None if all is well.

    Raises:
        UserError: If the config is wrong, naming the key.
    """
    key = 'test_dataloader'
    try:
        with undisturbed_randomness(), torch.no_grad():
            name = f"{key}.dataset ({described(cfg[key].get('dataset'))})"
            with step(f'{name} cannot be built', NO_EVALUATION):
                loader = build_loader(cfg[key])
            check_labels(loader.dataset, model)
            with step('test_evaluator cannot be built', NO_EVALUATION):
                evaluator = build_evaluator(cfg.test_evaluator)
                if hasattr(loader.dataset, 'metainfo'):
                    evaluator.dataset_meta = loader.dataset.metainfo
            with step(f'the first sample of {name} cannot be loaded', NO_EVALUATION):
                batch = first_batch(loader)
            size = size_of(batch)
            with step(f'the model cannot predict the first sample{size} of {name}',
                      'Make its pipeline give what the model takes, or pass --no-eval'):
                predicted = model.to(get_device()).eval().test_step(copy.deepcopy(batch))
            if not any(writes_files(metric) for metric in evaluator.metrics):
                with step(f'test_evaluator cannot take the prediction of the first sample of {name}', NO_EVALUATION):
                    evaluator.process(data_samples=predicted, data_batch=batch)
    except LackingError as error:
        return str(error)
    return None


def check_labels(dataset: Dataset, model: nn.Module) -> None:
    """Find out whether a data set's labels can be a classifier's.

    Raises:
        UserError: From a data set that can check that (``check(num_classes)``).
    """
    classes = getattr(getattr(model, 'head', None), 'out_features', None)
    for part in leaves(dataset):
        if classes and hasattr(part, 'check'):
            part.check(classes)


def rehearse_calibration(cfg: Config, model: nn.Module) -> None:
    """Take one sample of ``calib_dataloader`` from the files to the model's input space.

    Raises:
        UserError: If that does not work, naming the key.
    """
    key, advice = 'calib_dataloader', "Correct it: method 'real' needs its images"
    try:
        with undisturbed_randomness(), torch.no_grad():
            name = f"{key}.dataset ({described(cfg[key].get('dataset'))})"
            with step(f'{name} cannot be built', advice):
                loader = build_loader(cfg[key])
            with step(f'the first sample of {name} cannot be loaded', advice):
                batch = first_batch(loader)
            with step(f'the data preprocessor cannot take the first sample{size_of(batch)} of {name}', advice):
                images = model.data_preprocessor(batch, False)['inputs']
                if not torch.is_tensor(images) or images.dim() != 4:
                    raise TypeError('it gives no images (B, C, H, W)')
    except LackingError as error:
        raise UserError(f'{error}. {advice}') from error
