"""Starts of images as a data set: what lets a train loop run without data."""
from __future__ import annotations

from torch.utils.data import Dataset

from ..registry import DATASETS
from ..synthesis import start_image, valid_range


@DATASETS.register_module()
class StartDataset(Dataset):
    """Noise or dead leaves in the model's input space, the same for a seed however it is sharded.

    mmengine's sampler deals images to the processes one by one; here they are numbered so that each process gets whole
    batches of those that a single one would make, in turn (where their number can be divided so).

    Args:
        num_images (int): Length.
        sizes (list[tuple[int, int]]): (height, width) in pixels; batches take turns.
        batch_size (int): Images in a row that share a size.
        world_size (int): Number of processes. Defaults to 1.
        seed (int): Defaults to 0.
        metainfo (dict, optional): Of the data set the model was trained on (classes, palette).
        start (str): What an image is, see :func:`psaq_mm.synthesis.start_image`. Defaults to 'noise'.

    Attributes:
        valid_range (tuple[Tensor, Tensor]): Lowest and highest pixel, (1, channels, 1, 1) each; the loop sets the
            model's own.

    Each item is ``dict(inputs=Tensor (channels, height, width))``.
    """

    def __init__(self, num_images, sizes, batch_size, world_size=1, seed=0, metainfo=None, start='noise'):
        self.num_images, self.sizes, self.seed, self.start = num_images, sizes, seed, start
        self.batch_size, self.world_size = batch_size, world_size
        self.metainfo = dict(metainfo or {})
        self.valid_range = valid_range([127.5] * 3, [127.5] * 3)

    def __len__(self):
        return self.num_images

    def __getitem__(self, index):
        if not 0 <= index < self.num_images:
            raise IndexError(index)
        image, batch = self.place(index)
        size = self.sizes[batch % len(self.sizes)]
        return dict(inputs=start_image(self.start, self.seed, image, size, *self.valid_range))

    def place(self, index: int) -> tuple[int, int]:
        """Return the image that the sampler's index stands for, and the batch that it is in."""
        group = self.batch_size * self.world_size  # what the processes hold at a time; the last time maybe fewer each
        turn, place = divmod(index, group)
        position, rank = divmod(place, self.world_size)
        each = min(group, self.num_images - turn * group) // self.world_size
        return turn * group + rank * each + position, turn * self.world_size + rank
