"""Windows that slide over an image, for every size of it: cut out as one batch, and put together again."""
from __future__ import annotations

import torch
from torch import Tensor

from .pixels import larger, smaller


class Windows:
    """Windows along one side of an image; the last one ends where the image does, and so none is outside it.

    Args:
        length (int): Of the side, traced or not.
        crop (int): Of a window, at most.
        stride (int): From one to the next.
    """

    def __init__(self, length, crop: int, stride: int):
        self.length, self.stride, self.most = length, stride, -(-crop // stride)
        self.size = smaller(length, crop)
        self.count = larger(length - crop + stride - 1, 0) // stride + 1
        self.last = larger(length - crop, 0)

    def places(self) -> Tensor:
        """Which pixels the windows see, one window behind the other.

        In one row: in a quantized graph OpenVINO 2026.4.1 takes a normalised image for integers with a scale, and moves
        the scale wrongly through a gathering that adds a dimension.
        """
        starts = (torch.arange(self.count) * self.stride).clamp(max=self.last)
        return (starts[:, None] + torch.arange(self.size)[None]).flatten()

    def joined(self, x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Sum what windows say of each pixel.

        Args:
            x (Tensor): With all windows, one behind the other, along a dimension.
            dim (int): That dimension.

        Returns:
            tuple[Tensor, Tensor]: The sum, and how many windows see each pixel, (length, ).
        """
        place = torch.arange(self.length)
        offsets, seen = [place - self.last + (self.count - 1) * self.size], [place >= self.last]
        for back in range(self.most):  # regular ones that see a pixel begin at most a window before it
            window = torch.div(place, self.stride, rounding_mode='floor') - back
            offset = place - window * self.stride
            seen.append((window >= 0) & (window < self.count - 1) & (offset < self.size))
            offsets.append(window * self.size + offset)
        shape = [-1] + [1] * (x.dim() - 1 - dim)
        found = [x.index_select(dim, torch.where(inside, offset, 0)) * inside.to(x.dtype).reshape(shape)
                 for offset, inside in zip(offsets, seen)]
        return sum(found[1:], found[0]), sum(inside.to(x.dtype) for inside in seen)


def slide(images: Tensor, crop, stride, compute) -> Tensor:
    """Compute something of an image in windows, and average where these overlap.

    Args:
        images (Tensor): (B, C, H, W).
        crop, stride (tuple[int, int]): Of the windows, (H, W).
        compute (Callable): Maps windows (N, C, h, w) and their size to values (N, K, h, w).
    """
    batch, channels = images.shape[:2]
    rows, columns = (Windows(*numbers) for numbers in zip(images.shape[2:], crop, stride))
    x = images.index_select(2, rows.places()).index_select(3, columns.places())
    x = x.reshape(batch, channels, rows.count, rows.size, columns.count, columns.size).permute(0, 2, 4, 1, 3, 5)
    x = compute(x.reshape(-1, channels, rows.size, columns.size), (rows.size, columns.size))
    x = x.reshape(batch, rows.count, columns.count, x.shape[1], rows.size, columns.size).permute(0, 3, 1, 4, 2, 5)
    x = x.reshape(batch, x.shape[1], rows.count * rows.size, columns.count * columns.size)
    x, seen_above = rows.joined(x, 2)
    x, seen_beside = columns.joined(x, 3)
    return x / (seen_above[:, None] * seen_beside)
