"""What images are before their first update."""
from __future__ import annotations

import torch
from torch import Tensor

from .dead_leaves import dead_leaves


def start_image(kind: str, seed: int, number: int, size: tuple[int, int], low: Tensor, high: Tensor) -> Tensor:
    """Make the start of one image, always the same for a seed and a number.

    Args:
        kind (str): 'noise', standard normal and clipped to the range, or 'dead_leaves', see :func:`dead_leaves`.
        seed (int): Of the run.
        number (int): Of the image.
        size (tuple[int, int]): Height and width in pixels.
        low, high (Tensor): Valid range in the model's input space, (1, C, 1, 1), on the CPU.

    Returns:
        Tensor: (C, height, width), in the model's input space.
    """
    generator, channels = torch.Generator().manual_seed(seed * 1_000_003 + number), low.shape[1]
    if kind == 'noise':
        return torch.randn(channels, *size, generator=generator).maximum(low[0]).minimum(high[0])
    return low[0] + (high - low)[0] * dead_leaves(size, channels, generator)
