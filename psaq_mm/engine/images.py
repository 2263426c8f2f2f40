"""Where the images of a run come from: starts to synthesise from, an earlier run, or a data loader of real ones."""
from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from mmengine import dist
from torch import Tensor, nn

from ..errors import UserError
from ..stanza import ROOT
from .checkpoint import load_safely

REUSE = f'{ROOT}.synthesis.reuse'


def read_images(path: str, key: str = REUSE, name: str = 'synthetic.pt') -> list[Tensor]:
    """Image batches of an earlier run, (B, 3, H, W) each.

    Args:
        path (str): The file.
        key, name (str): For errors: where the path was given, and what such a file is called.

    Raises:
        UserError: If the file is not there or is none of ours.
    """
    try:
        images = load_safely(Path(path))['images']
        if all(torch.is_tensor(b) and b.dim() == 4 and torch.isfinite(b).all() for b in images) and images:
            return images
    except Exception as error:
        raise UserError(f'{key} = {path!r} cannot be read ({type(error).__name__}: {error}): it must be the '
                        f'{name!r} of an earlier run') from None
    raise UserError(f"{key} = {path!r} holds no images: it must be an earlier run's {name!r}")


def reused_images(path: str, channels: int) -> list[Tensor]:
    """Return the share of this process in the image batches of an earlier run, (B, C, H, W) each.

    Args:
        path (str): The file.
        channels (int): C, that the model takes.

    Raises:
        UserError: If the file cannot be read, holds too few batches, or those of another model.
    """
    shard = read_images(path)[dist.get_rank()::dist.get_world_size()]
    if not shard:
        raise UserError(f'{REUSE} holds fewer batches than there are processes ({dist.get_world_size()}): start fewer')
    wrong = {batch.shape[1] for batch in shard} - {channels}
    if wrong:
        raise UserError(f'{REUSE} holds images of {wrong.pop()} channels, the model takes {channels}: give the '
                        'synthetic.pt of a run on the same model')
    return shard


def real_images(dataloader: Iterable, model: nn.Module, count: int) -> list[Tensor]:
    """Return the first images of a data loader as the model's preprocessor makes them, batches (B, C, H, W).

    Args:
        dataloader (Iterable): Of samples for the preprocessor.
        model (nn.Module): Has it.
        count (int): Of images, at most.

    Raises:
        UserError: If some pixels are not finite.
    """
    images = []
    for data in dataloader:
        left = count - sum(map(len, images))
        if left <= 0:
            break
        images.append(model.data_preprocessor(data, False)['inputs'][:left])
        if not torch.isfinite(images[-1]).all():
            raise UserError(f'batch {len(images)} of calib_dataloader holds pixels that are no finite numbers: check '
                            'its images and pipeline')
    return images
