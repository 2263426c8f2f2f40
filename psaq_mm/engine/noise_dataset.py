"""Gaussian noise as a data set: where synthesis starts, and what lets a train loop run without data."""
from __future__ import annotations

import torch
from torch.utils.data import Dataset

from ..registry import DATASETS


@DATASETS.register_module()
class NoiseDataset(Dataset):
    """Standard normal noise in the model's input space, the same for a seed however it is sharded.

    Args:
        num_images (int): Length.
        sizes (list[tuple[int, int]]): (height, width) in pixels; groups of images take turns.
        group (int): Images in a row that share a size: the batch size times the number of processes.
        seed (int): Defaults to 0.
        metainfo (dict, optional): Of the data set the model was trained on (classes, palette).

    Each item is ``dict(inputs=Tensor (3, height, width))``.
    """

    def __init__(self, num_images, sizes, group, seed=0, metainfo=None):
        self.num_images, self.sizes, self.group, self.seed = num_images, sizes, group, seed
        self.metainfo = dict(metainfo or {})

    def __len__(self):
        return self.num_images

    def __getitem__(self, index):
        if not 0 <= index < self.num_images:
            raise IndexError(index)
        height, width = self.sizes[index // self.group % len(self.sizes)]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        return dict(inputs=torch.randn(3, height, width, generator=generator))
