"""Gaussian noise as a data set: where synthesis starts, and what lets a train loop run without data."""
from __future__ import annotations

import torch
from torch.utils.data import Dataset

from ..registry import DATASETS


def noise(seed: int, number: int, size: tuple[int, int], channels: int = 3) -> torch.Tensor:
    """The standard normal noise of one image, (channels, height, width), by the run's seed and the image's number."""
    return torch.randn(channels, *size, generator=torch.Generator().manual_seed(seed * 1_000_003 + number))


@DATASETS.register_module()
class NoiseDataset(Dataset):
    """Standard normal noise in the model's input space, the same for a seed however it is sharded.

    mmengine's sampler deals images to the processes one by one; here they are numbered so that each process gets whole
    batches of those that a single one would make, in turn (where their number can be divided so).

    Args:
        num_images (int): Length.
        sizes (list[tuple[int, int]]): (height, width) in pixels; batches take turns.
        batch_size (int): Images in a row that share a size.
        world_size (int): Number of processes. Defaults to 1.
        seed (int): Defaults to 0.
        metainfo (dict, optional): Of the data set the model was trained on (classes, palette).
        channels (int): Of an image. Defaults to 3; the loop sets the model's own.

    Each item is ``dict(inputs=Tensor (channels, height, width))``.
    """

    def __init__(self, num_images, sizes, batch_size, world_size=1, seed=0, metainfo=None, channels=3):
        self.num_images, self.sizes, self.seed = num_images, sizes, seed
        self.batch_size, self.world_size = batch_size, world_size
        self.metainfo, self.channels = dict(metainfo or {}), channels

    def __len__(self):
        return self.num_images

    def __getitem__(self, index):
        if not 0 <= index < self.num_images:
            raise IndexError(index)
        image, batch = self.place(index)
        return dict(inputs=noise(self.seed, image, self.sizes[batch % len(self.sizes)], self.channels))

    def place(self, index: int) -> tuple[int, int]:
        """The image that the sampler's index stands for, and the batch that it is in."""
        group = self.batch_size * self.world_size  # what the processes hold at a time; the last time maybe fewer each
        turn, place = divmod(index, group)
        position, rank = divmod(place, self.world_size)
        each = min(group, self.num_images - turn * group) // self.world_size
        return turn * group + rank * each + position, turn * self.world_size + rank
