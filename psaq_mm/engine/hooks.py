"""What happens around the loop: conversion, pictures, the quantized checkpoint."""
from __future__ import annotations

from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from mmengine import dist
from mmengine.dist import master_only
from mmengine.hooks import CheckpointHook, Hook
from mmengine.model import is_model_wrapper
from PIL import Image

from ..errors import UserError
from ..files import OwnedFolder, write_json
from ..models import BACKBONES, pixel_statistics, quantize_model, scope, swaps_channels
from ..quantization import quantized_layers
from ..registry import HOOKS
from ..stanza import QuantizationConfig
from .checkpoint import resumable_checkpoints, save_quantized


def results_of(runner, folder: str | None) -> OwnedFolder:
    """Return the folder that results go to: the given one, or the runner's work dir."""
    return OwnedFolder(folder or runner.work_dir)


def bare(model):
    """The model inside a distributed wrapper, or the model."""
    return model.module if is_model_wrapper(model) else model


def wrapped(model, quantization):
    """Return the model that has the targets: inside any wrapper, as for test-time augmentation, or the model itself.

    A wrapper has no submodule named like a target, and one child that leads to a model that has.
    """
    names = {target.partition('.')[0] for target in quantization.targets or BACKBONES}

    def inside(module):
        if any(hasattr(module, name) for name in names):
            return module
        found = [part for part in map(inside, module.children()) if part is not None]
        return found[0] if len(found) == 1 else None

    return inside(model) or model


@HOOKS.register_module()
class QuantizationHook(Hook):
    """Converts the runner's model before the run, so that checkpoints load into quantized layers.

    Args:
        quantization (dict, optional): The stanza. Default: the one in the runner's config.
    """
    priority = 'VERY_HIGH'

    def __init__(self, quantization=None):
        self.quantization = None if quantization is None else QuantizationConfig.parse(quantization)

    def before_run(self, runner):
        if self.quantization is None:
            self.quantization = QuantizationConfig.parse(runner.cfg['quantization'])
        model = quantize_model(wrapped(bare(runner.model), self.quantization), self.quantization)
        # A checkpoint follows: initialising weights would cost time and print that training starts from scratch.
        model._is_init = True
        config = self.quantization
        departures = f", but for {', '.join(config.departures)}" if config.departures else ''
        runner.logger.info(f'{len(quantized_layers(model))} layers of {", ".join(scope(model, config))} are quantized: '
                           f"W{config.weight.bits}A{config.activation.bits}, placement '{config.placement}', "
                           f"recipe '{config.recipe}'{departures}")


@HOOKS.register_module()
class ResumableCheckpointHook(CheckpointHook):
    """Writes everything that an interrupted run needs to go on, ``iter_N.pth``, the state of all processes in it.

    A file is whole or not there. Where one cannot be written, as on a full disk, the run goes on and older ones stay.

    Args:
        interval (int): Iterations from one to the next. Defaults to 100.
        max_keep_ckpts (int): The newest so many are kept. Defaults to 2.
    """

    def __init__(self, interval=100, max_keep_ckpts=2):
        super().__init__(interval, by_epoch=False, save_last=False, backend_args=dict(backend='psaq_mm.atomic'))
        self.kept = max_keep_ckpts
        self.states = None

    def _save_checkpoint(self, runner):
        self.states = dist.all_gather_object(runner.train_loop.state_dict())
        try:
            super()._save_checkpoint(runner)
        except OSError as error:
            runner.logger.warning(f'iter_{runner.iter + 1}.pth cannot be written to {self.out_dir} ({error}). The run '
                                  'goes on; interrupted, it would resume from the last one that was written')
        else:
            self.remove_old()

    @master_only
    def remove_old(self):
        """Leaves the newest."""
        for path in resumable_checkpoints(self.out_dir)[self.kept:]:
            path.unlink()

    def before_save_checkpoint(self, runner, checkpoint):
        checkpoint['data_free'] = self.states

    def after_load_checkpoint(self, runner, checkpoint):
        states = checkpoint.get('data_free')
        if states is None:
            return
        if len(states) != dist.get_world_size():
            raise UserError(f'--resume: the interrupted run had {len(states)} processes, this one has '
                            f'{dist.get_world_size()}. Start as many, or afresh without --resume')
        runner.train_loop.load_state_dict(states[dist.get_rank()])


def to_pixels(images: torch.Tensor, low: torch.Tensor, high: torch.Tensor, bgr: bool) -> np.ndarray:
    """Images in the model's input space as RGB, (B, H, W, 3) uint8 from (B, C, H, W).

    One channel is grey, of two or more than three the first three are shown.
    """
    pixels = ((images - low) / (high - low) * 255).round().clamp(0, 255).to(torch.uint8)
    channels = pixels.shape[1]
    if channels == 1:
        pixels = pixels.expand(-1, 3, -1, -1)
    elif channels == 2:
        pixels = torch.cat([pixels, torch.zeros_like(pixels[:, :1])], 1)
    pixels = pixels[:, :3]
    if bgr and channels == 3:
        pixels = pixels.flip(1)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def grid(pictures: list[np.ndarray], columns: int = 8, gap: int = 4) -> np.ndarray:
    """Pictures side by side on white, (H, W, 3) uint8."""
    columns = min(columns, len(pictures))
    height, width = max(p.shape[0] for p in pictures) + gap, max(p.shape[1] for p in pictures) + gap
    rows = -(-len(pictures) // columns)
    canvas = np.full((rows * height + gap, columns * width + gap, 3), 255, np.uint8)
    for index, picture in enumerate(pictures):
        y, x = index // columns * height + gap, index % columns * width + gap
        canvas[y:y + picture.shape[0], x:x + picture.shape[1]] = picture
    return canvas


@HOOKS.register_module()
class SyntheticImageHook(Hook):
    """Shows the images as they evolve, through the Visualizer, and writes them out at the end.

    Writes ``synthetic.png`` (a grid, what they started from in a second grid below), ``synthetic/*.png``, and
    ``synthetic.pt``, the images before the game as tensors (see ``quantization.synthesis.reuse``).

    Args:
        interval (int): Iterations between pictures. Defaults to 100.
        folder (str, optional): Where to. Default: the runner's work dir.
    """
    priority = 'LOW'

    def __init__(self, interval=100, folder=None):
        self.interval, self.folder = interval, folder

    @staticmethod
    def pictures(runner, batches):
        loop = runner.train_loop
        # The data preprocessor turns the files' BGR into the model's order: without that, the model's order is BGR.
        bgr = not swaps_channels(loop.student)
        low, high = loop.low.cpu(), loop.high.cpu()
        return [picture for batch in batches for picture in to_pixels(batch.cpu(), low, high, bgr)]

    @master_only
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if self.every_n_train_iters(runner, self.interval):
            pictures = self.pictures(runner, runner.train_loop.stage.images())
            runner.visualizer.add_image('synthetic', grid(pictures), step=runner.iter + 1)

    def after_train(self, runner):
        loop = runner.train_loop
        if loop.quantization.synthesis.method == 'real':
            return
        shards = dist.all_gather_object([[b.cpu() for b in batches]
                                         for batches in (loop.stage.images(), loop.starts, loop.images)])
        # Processes took turns in taking batches: so that as many of them take them in the same order again.
        self.write(runner, *([batch for turn in zip_longest(*(shard[kind] for shard in shards)) for batch in turn
                              if batch is not None] for kind in range(3)))

    @master_only
    def write(self, runner, final, starts, before_game):
        """Write the pictures and tensors of all processes."""
        loop, out = runner.train_loop, results_of(runner, self.folder)
        pictures = self.pictures(runner, final)
        out.write('synthetic.pt', dict(images=before_game))
        with out.writing('synthetic') as folder:
            save_pictures(pictures, folder)
        with out.writing('calibration_set') as folder:
            self.write_calibration_set(runner, before_game, folder)
        both = grid(pictures)
        if starts and loop.synthesized:
            both = np.concatenate([both, grid(self.pictures(runner, starts))])
        with out.writing('synthetic.png') as path:
            Image.fromarray(both).save(path)
        runner.logger.info(f'{len(pictures)} images are in {out.path / "synthetic"}, all at a glance in '
                           f'{out.path / "synthetic.png"}')
        runner.visualizer.add_image('synthetic', grid(pictures), step=runner.iter)

    def write_calibration_set(self, runner, batches, folder):
        """Write the images that scales were calibrated on for quantizers of other tools: as files that are still to be
        preprocessed, and as arrays that are.

        Args:
            runner (Runner): The runner.
            batches (list[Tensor]): (B, C, H, W) each, in the model's input space.
            folder (Path): To make.
        """
        save_pictures(self.pictures(runner, batches), folder)
        student = runner.train_loop.student
        sizes = {}
        for batch in batches:
            sizes.setdefault(tuple(batch.shape[2:]), []).append(batch)
        for (height, width), parts in sizes.items():
            np.save(folder / f'images_{height}x{width}.npy', torch.cat(parts).numpy())
        mean, std = (values.tolist() for values in pixel_statistics(student))
        channels = len(mean)
        files, order = 'RGB, uint8', 'RGB' if swaps_channels(student) else 'BGR'
        if channels != 3:
            files = 'grey, uint8' if channels == 1 else f'the first 3 of {channels} channels, uint8: use the arrays'
            order = f'as the model reads its {channels}'
        write_json(dict(
            arrays=[f'images_{h}x{w}.npy' for h, w in sizes], layout='NCHW, float32, normalised: the network input',
            files=files, channel_order=order,
            normalisation='(pixel - mean) / std, pixels from 0 to 255', mean=mean, std=std),
            folder / 'preprocessing.json')


def save_pictures(pictures: list[np.ndarray], folder: Path) -> None:
    """Write 0000.png, 0001.png, ... to a new folder."""
    folder.mkdir()
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f'{index:04d}.png')


@HOOKS.register_module()
class QuantizedCheckpointHook(Hook):
    """Writes ``quantized.pth`` when the loop is done: weights, scales, zero points, stanza, versions.

    Args:
        dataset_meta (dict): Classes and palette for the tools that load it.
        folder (str, optional): Where to. Default: the runner's work dir.
    """
    priority = 'NORMAL'  # before anything that only looks nice

    def __init__(self, dataset_meta, folder=None):
        self.dataset_meta, self.folder = dataset_meta, folder

    @master_only
    def after_train(self, runner):
        loop = runner.train_loop
        path = save_quantized(bare(runner.model), results_of(runner, self.folder), loop.quantization,
                              self.dataset_meta, seed=runner.seed, **loop.summaries)
        runner.logger.info(f'The quantized checkpoint is {path}')
