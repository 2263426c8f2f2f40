"""Observers: see batches of a tensor, then say which range the integers should cover.

All of them take values laid out as (channels, values), one row a scale, and return the two ends of the range, each of
shape (channels,).
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

# The search and the quantiles look at no more than so many values of a batch, drawn at random (steps of a fixed length
# would see only some of the channels), but at least at so many of each row.
MAX_SAMPLES = 1 << 16
MIN_SAMPLES = 1 << 12
BATCHES = 8  # so many times as many values, of all batches, are kept for the mean-square-error search; our choice
# Candidate ranges tried by the mean-square-error search: 1/80 steps from the full range down to a fifth of it.
# Below a fifth nothing was ever chosen at 2 to 8 bits for Gaussian and Laplacian data; our choice.
MSE_CANDIDATES = 80
MSE_SMALLEST = 0.2


def quantization_grid(bits: int, symmetric: bool):
    """Ends of the integer grid: signed for symmetric quantization, unsigned otherwise.

    Returns:
        tuple[int, int]: quant_min, quant_max.
    """
    if symmetric:
        return -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    return 0, (1 << bits) - 1


def affine_parameters(low: Tensor, high: Tensor, bits: int, symmetric: bool):
    """Scale and zero point that make the integers cover [low, high] and represent 0 exactly.

    Args:
        low, high (Tensor): Ends of the range, (channels,).
        bits (int): Bit-width.
        symmetric (bool): Whether the zero point is 0.

    Returns:
        tuple[Tensor, Tensor]: scale, float32, and zero_point, int32, each (channels,). A row whose range is a single
        point at zero gets scale 1.
    """
    quant_min, quant_max = quantization_grid(bits, symmetric)
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    if symmetric:
        scale = torch.maximum(-low, high) / quant_max
    else:
        scale = (high - low) / (quant_max - quant_min)
    # Below the smallest normal number 1/scale overflows inside the fused kernels.
    scale = torch.where(scale > torch.finfo(torch.float32).tiny * 4, scale, torch.ones_like(scale))
    if symmetric:
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
    else:
        zero_point = (quant_min - torch.round(low / scale)).clamp(quant_min, quant_max).to(torch.int32)
    return scale, zero_point


def _thin(rows: Tensor, share: float = 1.0) -> Tensor:
    """Return a sample of the values of a batch, (channels, values), or a share of it."""
    limit = _limit(rows.shape[0])
    if rows.shape[1] <= limit and share == 1:
        return rows
    count = math.ceil(min(limit, rows.shape[1]) * share)
    chosen = torch.randint(rows.shape[1], (count, ), generator=torch.Generator().manual_seed(0))
    return rows[:, chosen.to(rows.device)]


def _limit(rows: int, batches: int = 1) -> int:
    """Return how many values of each of so many rows count, of so many batches."""
    return max(batches * MAX_SAMPLES // rows, MIN_SAMPLES)


class MinMaxObserver:
    """The extremes over all batches. Over processes: the extremes of theirs."""
    merge = 'extreme'

    def __init__(self, config):
        self.config = config
        self.low = self.high = None

    def update(self, rows: Tensor) -> None:
        """Takes one batch, (channels, values)."""
        low, high = self.batch_range(rows)
        if self.low is None:
            self.low, self.high = low, high
        else:
            self.low, self.high = self.combine(self.low, low, torch.minimum), self.combine(
                self.high, high, torch.maximum)

    def batch_range(self, rows):
        low, high = torch.aminmax(rows, dim=1)
        return low, high

    def combine(self, old, new, extreme):
        return extreme(old, new)

    def range(self):
        """Ends of the range, two tensors (channels,), or None before the first batch."""
        return None if self.low is None else (self.low, self.high)


class MovingAverageMinMaxObserver(MinMaxObserver):
    """Exponential moving average of each batch's extremes. Over processes: the mean of theirs."""
    merge = 'mean'

    def combine(self, old, new, extreme):
        return old + self.config.momentum * (new - old)


class PercentileObserver(MinMaxObserver):
    """Mean over batches of the two quantiles that leave (100 - percentile) % of the values outside, half each side."""
    merge = 'mean'

    def __init__(self, config):
        super().__init__(config)
        self.batches = 0

    def batch_range(self, rows):
        self.batches += 1
        tail = (1 - self.config.percentile / 100) / 2
        rows = _thin(rows).float()
        ends = torch.quantile(rows, torch.tensor([tail, 1 - tail], device=rows.device), dim=1)
        return ends[0], ends[1]

    def combine(self, old, new, extreme):
        return old + (new - old) / self.batches


class MSEObserver(MinMaxObserver):
    """The part of the full range, shrunk towards zero, with the least mean squared quantization error.

    Keeps a thinned sample of every batch, the thinner the more batches there are, and searches when the range is asked
    for. Over processes: the mean of theirs.
    """
    merge = 'mean'

    def __init__(self, config):
        super().__init__(config)
        self.samples, self.share = [], 1.0  # share: of what counts of a batch

    def update(self, rows):
        super().update(rows)
        self.samples.append(_thin(rows, self.share).float())
        if sum(sample.shape[1] for sample in self.samples) > _limit(rows.shape[0], BATCHES):
            self.share /= 2
            self.samples = [_thin(sample, 0.5) for sample in self.samples]

    def range(self):
        if not self.samples:
            return None
        rows = torch.cat(self.samples, 1)
        bits, symmetric = self.config.bits, self.config.symmetric
        quant_min, quant_max = quantization_grid(bits, symmetric)
        low, high = self.low.float(), self.high.float()
        best = torch.full_like(low, float('inf'))
        best_low, best_high = low, high
        for share in torch.linspace(1, MSE_SMALLEST, MSE_CANDIDATES).tolist():
            scale, zero_point = affine_parameters(low * share, high * share, bits, symmetric)
            rounded = torch.fake_quantize_per_channel_affine(rows, scale, zero_point, 0, quant_min, quant_max)
            error = (rounded - rows).square().mean(1)
            better = error < best
            best = torch.where(better, error, best)
            best_low = torch.where(better, low * share, best_low)
            best_high = torch.where(better, high * share, best_high)
        return best_low, best_high


OBSERVERS = dict(
    minmax=MinMaxObserver,
    moving_average_minmax=MovingAverageMinMaxObserver,
    percentile=PercentileObserver,
    mse=MSEObserver)


def build_observer(config, name=None):
    """The observer a :class:`WeightConfig` or :class:`ActivationConfig` names, or another by name."""
    return OBSERVERS[name or config.observer](config)
