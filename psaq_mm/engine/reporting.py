"""What a finished run knows about itself, measured and gathered for the report."""
from __future__ import annotations

import functools
import os
import random
import shlex
import sys
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.dist import get_world_size
from torch import Tensor

from ..errors import UserError
from ..files import OwnedFolder
from ..models import extract_features
from ..quantization import layer_errors
from ..report import figures, page
from ..report.fidelity import fidelity
from ..stanza import ROOT
from ..synthesis import GameConfig, lesson_view, synthesize
from .hooks import SyntheticImageHook
from .images import read_images
from .loop import DataFreeLoop
from .start_dataset import start_image

FRESH = 500_000  # number of the first fresh image: no run synthesises so many before
SHOWN = 8  # pairs of start and image in the gallery
MEASURED = 8  # images of the calibration that layers are measured on where there are no fresh ones. Our choice
VIEWS = 4  # of each fresh image; our choice


def fresh_images(loop: DataFreeLoop, folder: OwnedFolder) -> list[Tensor]:
    """Images that nothing was calibrated on, synthesised whatever the method; also in ``fresh.pt``.

    Settings as those of the run, each from its own start and for all steps.

    Args:
        loop (DataFreeLoop): Done.
        folder (OwnedFolder): For ``fresh.pt``.

    Returns:
        list[Tensor]: Batches (B, C, H, W) on the model's device.
    """
    report, config = loop.quantization.report, loop.quantization.synthesis
    if report.reuse:
        return [batch.to(loop.device) for batch in read_images(report.reuse, f'{ROOT}.report.reuse', 'fresh.pt')]
    seed, batches = loop.runner.seed or 0, []
    for number, first in enumerate(range(0, report.images, config.batch_size)):
        size = config.size[number % len(config.size)]
        batches.append(torch.stack([
            start_image(config.start, seed, FRESH + index, size, loop.low.cpu(), loop.high.cpu())
            for index in range(first, min(first + config.batch_size, report.images))]).to(loop.device))
    tap = loop.tap or loop.new_tap()
    run = functools.partial(loop.listen, tap=tap)
    progress, images = loop.progress('report', len(batches) * config.steps), []
    for number, batch in enumerate(batches):
        images.append(synthesize(batch, run, tap, config, loop.low, loop.high, f'{seed}-fresh-{number}', progress))
    if loop.tap is None:
        tap.remove()
    folder.write('fresh.pt', dict(images=[batch.cpu() for batch in images]))
    return images


def views_of(loop: DataFreeLoop, images: list[Tensor]) -> list[Tensor]:
    """Random views of fresh images, varied as the game varies what the student sees.

    Synthetic images are much alike: on them alone a damaged model may agree with full precision by luck.
    """
    synthesis, rng = loop.quantization.synthesis, random.Random(f'{loop.runner.seed}-views')
    views = []
    for batch in images * VIEWS:
        others = [image for other in images if other.shape[1:] == batch.shape[1:] for image in other]
        views.append(lesson_view(batch, others, synthesis, GameConfig(), loop.low, loop.high, rng))
    return views


def measure(runner, folder: OwnedFolder) -> dict:
    """Everything the report says that takes computing: on fresh images, or without those on the run's own.

    Args:
        runner (Runner): Its loop is done.
        folder (OwnedFolder): The work dir.

    Returns:
        dict: ``fidelity`` (see :func:`psaq_mm.report.fidelity.fidelity`, and ``images``, how many were synthesised for
        it; with ``problem`` alone where there is none), ``layers`` (see :meth:`LayerError.to_dict`), ``stages`` (of
        each in turn, title and plots for which there is something to draw, see :meth:`Stage.plots`).
    """
    loop = runner.train_loop
    problem = None
    try:
        images = fresh_images(loop, folder) if loop.quantization.report.images or loop.quantization.report.reuse else []
    except UserError as error:  # a backbone without patches
        images, problem = [], str(error)
    found = dict(problem=problem or f'{ROOT}.report.images = 0')
    if images:
        found = dict(fidelity(loop.teacher, loop.student, views_of(loop, images), loop.heads),
                     images=sum(map(len, images)))
    batches, left = images, MEASURED
    for batch in () if images else loop.images:
        batches, left = batches + [batch[:left]] * (left > 0), left - len(batch)

    def run():
        for batch in batches:
            extract_features(loop.student, batch, loop.heads)

    stages = {stage.title or stage.name.capitalize(): [plot for plot in stage.plots() if plot.figure]
              for stage in loop.stages}
    return dict(fidelity=found, layers=[error.to_dict() for error in layer_errors(loop.student, run)],
                stages={title: plots for title, plots in stages.items() if plots})


def command() -> str:
    """What was typed, as far as a process can know."""
    launcher = ['python']
    if 'LOCAL_WORLD_SIZE' in os.environ:  # torchrun's
        processes = int(os.environ['LOCAL_WORLD_SIZE'])
        launcher = ['torchrun', f'--nnodes={get_world_size() // processes}', f'--nproc_per_node={processes}']
    return shlex.join([*launcher, *sys.argv])


def gallery(runner) -> list[dict]:
    """Pairs of start and image, (H, W, 3) uint8 each; the start is None where images were not synthesised here."""
    loop = runner.train_loop
    if loop.quantization.synthesis.method == 'real':  # not ours to pass on
        return []
    images = SyntheticImageHook.pictures(runner, loop.stage.images())
    starts = [None] * len(images)
    if loop.starts and loop.synthesized:
        starts = SyntheticImageHook.pictures(runner, loop.starts)
    return [dict(start=before, image=after) for before, after in zip(starts, images)][:SHOWN]


def draw_figures(measured: dict) -> dict:
    """Draw what the report shows besides pictures.

    Args:
        measured (dict): From :func:`measure`.

    Returns:
        dict[str, Figure]: By name; without those for which there is nothing to draw.
    """
    drawn = dict(
        {plot.name: plot.figure for plots in measured['stages'].values() for plot in plots},
        layers=figures.layer_bars(measured['layers']),
        weights=figures.range_bars(measured['layers'], 'weight'),
        activations=figures.range_bars(measured['layers'], 'activation'))
    return {name: figure for name, figure in drawn.items() if figure is not None}


def write_report(runner, cfg: Config, folder: OwnedFolder, result: dict, measured: dict, drawn: dict) -> Path:
    """Write ``report.html``.

    Args:
        runner (Runner): Its loop is done.
        cfg (Config): The user's.
        folder (OwnedFolder): The work dir.
        result (dict): What ``metrics.json`` holds.
        measured (dict): From :func:`measure`.
        drawn (dict): From :func:`draw_figures`.

    Returns:
        Path: The file.
    """
    loop = runner.train_loop
    content = dict(result=result, layers=measured['layers'], gallery=gallery(runner), figures={
        name: figures.svg(figure) for name, figure in drawn.items()}, stanza=loop.quantization.to_dict(),
        stages=measured['stages'],
        command=command(), config=str(cfg.filename or ''), title=Path(
            cfg.filename or folder.path).stem)
    return folder.write('report.html', page.render(content).encode())


def show_report(runner, result: dict, drawn: dict) -> None:
    """Show the report's figures and numbers to the Visualizer's backends.

    Args:
        runner (Runner): Its loop is done.
        result (dict): What ``metrics.json`` holds.
        drawn (dict): From :func:`draw_figures`.
    """
    for name, figure in drawn.items():
        runner.visualizer.add_image(f'report/{name}', figures.pixels(figure), step=runner.iter)
    numbers = page.scalars(result)
    if numbers:
        runner.visualizer.add_scalars(numbers, step=runner.iter)
