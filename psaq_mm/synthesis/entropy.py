"""Patch similarity and the differential entropy of its distribution: what makes noise become an image.

Facts (PSAQ-ViT): tokens are the output of attention x V averaged over heads; Gamma is their pairwise cosine
similarity; its entries get a Gaussian kernel density with bandwidth 0.01, whose differential entropy is maximised.

Ours: how. V1's code evaluates the kernel at 10 points between minimum and maximum, spaced ten or more bandwidths apart,
through a (10, N x N) intermediate, so that it sees few of the entries. Here the density is known everywhere, at grid
points a quarter bandwidth apart over all of [-1, 1], by one of two estimators:

- ``binned`` (default): entries are counted in bins of 1/32 bandwidth, the counts are convolved with the kernel by
  Fourier transforms. One pass over the entries whatever the number of points.
- ``exact``: every entry adds its kernel to the grid points within MARGIN bandwidths, in chunks. Tens of times slower;
  what ``binned`` is measured against (benchmarks/density.py).

Both use that Gamma is symmetric with a constant diagonal, visit it in strips, and are one autograd function from
normalised tokens to entropy: nothing larger than Gamma exists, and what is kept for the gradient is two bytes an entry.
"""
from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError

BANDWIDTH = 0.01  # V1 code
POINTS = 4  # grid points a bandwidth: the trapezoid rule of the entropy is then exact to 1e-4 nats; our choice
BINS = 8  # bins a grid point: counting widens the kernel's variance by 1/(12 * 32^2), 0.01 %; our choice
MARGIN = 5  # bandwidths where the kernel ends, below 4e-6 of its peak
FLOOR = 1e-8  # density below which log() is not followed; moves the entropy by less than 1e-6
STRIPS = 4  # of Gamma, above WHOLE tokens: 5/8 of it are visited, the upper triangle and some
WHOLE = 512  # up to so many tokens a group (a window, mostly) Gamma is one strip; measured to be faster
CHUNK = 1 << 14  # entries at a time whose kernels the exact estimator evaluates


@dataclass(frozen=True)
class _Grid:
    """Grid points and bins that cover [-1, 1] and the kernel's tails; the middle of a point's bins is the point."""
    bin: float  # width of a bin
    step: float  # between grid points
    start: float  # lower edge of the first bin
    points: int
    length: int  # of the Fourier transforms; the margins keep what wraps around apart
    kernel: Tensor  # spectrum of the kernel of an entry by its distance, in bins, from the first bin of a point
    slope: Tensor  # spectrum of the derivative of that by the entry

    @property
    def bins(self) -> int:
        return self.points * BINS

    def density(self, mass: Tensor) -> Tensor:
        """Density at the points (images, points), float64, of a mass in each bin (images, bins)."""
        spectrum = torch.fft.rfft(mass.double(), self.length) * self.kernel.conj()
        return torch.fft.irfft(spectrum, self.length)[:, :self.bins:BINS]

    def gradient(self, by_density: Tensor) -> Tensor:
        """Derivative by an entry in each bin (images, bins) from that by the density at each point, float64."""
        comb = by_density.new_zeros(len(by_density), self.length)
        comb[:, :self.bins:BINS] = by_density
        return torch.fft.irfft(torch.fft.rfft(comb) * self.slope, self.length)[:, :self.bins]


@functools.lru_cache(maxsize=8)
def _grid(bandwidth: float, device: torch.device) -> _Grid:
    step = bandwidth / POINTS
    points = math.ceil(2 / step) + 2 * MARGIN * POINTS + 3
    length = 1 << (points * BINS - 1).bit_length()
    bins = torch.fft.fftfreq(length, 1 / length, dtype=torch.float64)  # 0, 1, ..., -2, -1: distances around the circle
    offset = (bins - (BINS - 1) / 2) / (POINTS * BINS)  # in bandwidths
    kernel = torch.exp(-0.5 * offset**2) / (bandwidth * (2 * torch.pi)**0.5)
    kernel, slope = (torch.fft.rfft(k).to(device) for k in (kernel, -kernel * offset / bandwidth))
    return _Grid(step / BINS, step, -1 - MARGIN * bandwidth - step, points, length, kernel, slope)


def _strips(tokens: int):
    """Row ranges of Gamma; each strip holds the columns from its first row on."""
    height = tokens if tokens <= WHOLE else -(-tokens // STRIPS)
    return [(first, min(first + height, tokens)) for first in range(0, tokens, height)]


def _entropy(density: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """Entropy (images,) and its derivative by the density at each point (images, points), trapezoid rule.

    The density vanishes at both ends, so the rule is the plain sum.
    """
    log_density = density.clamp(min=FLOOR).log()
    return -(density * log_density).sum(1) * step, -(log_density + 1) * step


class _BinnedEntropy(torch.autograd.Function):
    """Normalised tokens (groups, N, d) to entropy (images,); the groups of an image follow each other."""

    @staticmethod
    def forward(ctx, tokens, images, bandwidth):
        grid, (groups, count, _) = _grid(bandwidth, tokens.device), tokens.shape
        counts = torch.zeros(images, grid.bins, dtype=torch.int64, device=tokens.device)
        indices = []
        for first, last in _strips(count):
            similarity = tokens[:, first:last] @ tokens[:, first:].transpose(1, 2)
            # To the number of the bin. NaN would become any number: it goes to the first bin, and to the entropy below.
            index = similarity.sub_(grid.start).div_(grid.bin).nan_to_num_(0).to(torch.int16)
            index = index.view(images, groups // images, last - first, count - first)
            for image, part in enumerate(index):
                counts[image] += torch.bincount(part.flatten(), minlength=grid.bins)
                beside = part[..., last - first:]  # the square on the diagonal: these stand for two entries each
                if beside.numel():
                    counts[image] += torch.bincount(beside.flatten(), minlength=grid.bins)
            indices.append(index)
        entries = groups // images * count * count
        entropy, slope = _entropy(grid.density(counts) / entries, grid.step)
        slope = (grid.gradient(slope) / entries).to(tokens.dtype)
        ctx.save_for_backward(tokens, slope, *indices)
        entropy = entropy.to(tokens.dtype)
        return entropy + 0 * tokens.view(images, -1).sum(1)  # NaN where a token is

    @staticmethod
    def backward(ctx, grad):
        tokens, slope, *indices = ctx.saved_tensors
        slope = slope * grad[:, None]
        images, count = len(slope), tokens.shape[1]
        total = torch.zeros_like(tokens)
        for (first, last), index in zip(_strips(count), indices):
            part = torch.empty(index.shape, dtype=tokens.dtype, device=tokens.device)
            for image in range(images):
                torch.index_select(slope[image], 0, index[image].flatten().int(), out=part[image].view(-1))
            _spread(total, part.view(-1, last - first, count - first), tokens, first, last)
        return total, None, None


def _spread(total: Tensor, part: Tensor, tokens: Tensor, first: int, last: int) -> None:
    """Adds to the tokens' gradient what a strip of Gamma's gradient, (groups, rows, columns), makes of it.

    Every entry counts twice: (i, j) and (j, i). In the square on the diagonal both are there, beside it one.
    """
    total[:, first:last].baddbmm_(part, tokens[:, first:], alpha=2)
    total[:, last:].baddbmm_(part[..., last - first:].transpose(1, 2), tokens[:, first:last], alpha=2)


class _ExactEntropy(torch.autograd.Function):
    """The same, each entry's kernel evaluated at the grid points around it."""

    @staticmethod
    def kernels(similarity, grid):
        """Nearest grid points of a chunk of entries, and the distances to them in bandwidths, (entries, taps) each."""
        reach = torch.arange(-MARGIN * POINTS, MARGIN * POINTS + 1, device=similarity.device)
        # Grid point i lies half a step behind the lower edge of its first bin.
        place = (similarity - grid.start) / grid.step - 0.5
        nearest = place.nan_to_num(MARGIN * POINTS).round()
        return nearest.long()[:, None] + reach, (place[:, None] - nearest[:, None] - reach) / POINTS

    @staticmethod
    def forward(ctx, tokens, images, bandwidth):
        grid, (groups, count, _) = _grid(bandwidth, tokens.device), tokens.shape
        density = torch.zeros(images, grid.points, dtype=torch.float64, device=tokens.device)
        peak = 1 / (bandwidth * (2 * torch.pi)**0.5)
        for image, windows in enumerate(tokens.view(images, -1, *tokens.shape[1:])):
            for _, _, similarity, weight in _ExactEntropy.chunks(windows):
                points, offset = _ExactEntropy.kernels(similarity, grid)
                values = torch.exp(-0.5 * offset.double()**2) * (peak * weight[:, None])
                density[image].index_add_(0, points.flatten(), values.flatten())
        entries = groups // images * count * count
        entropy, slope = _entropy(density / entries, grid.step)
        ctx.save_for_backward(tokens, (slope / entries).to(tokens.dtype))
        ctx.bandwidth = bandwidth
        return entropy.to(tokens.dtype) + 0 * tokens.view(images, -1).sum(1)

    @staticmethod
    def chunks(windows):
        """Window, rows, entries and weights of the upper triangle of Gamma, some rows at a time."""
        count = windows.shape[1]
        rows = max(1, CHUNK // count)
        column = torch.arange(count, device=windows.device)
        for window, tokens in enumerate(windows):
            for first in range(0, count, rows):
                similarity = tokens[first:first + rows] @ tokens.T
                row = column[first:first + rows, None]
                weight = (column > row) * 2.0 + (column == row)
                yield window, first, similarity.flatten(), weight.flatten()

    @staticmethod
    def backward(ctx, grad):
        tokens, slope = ctx.saved_tensors
        images, grid = len(slope), _grid(ctx.bandwidth, tokens.device)
        total = torch.zeros_like(tokens)
        peak = 1 / (ctx.bandwidth**2 * (2 * torch.pi)**0.5)
        for image, (windows, out) in enumerate(zip(*(t.view(images, -1, *t.shape[1:]) for t in (tokens, total)))):
            for window, first, similarity, weight in _ExactEntropy.chunks(windows):
                points, offset = _ExactEntropy.kernels(similarity, grid)
                change = (slope[image][points] * torch.exp(-0.5 * offset**2) * -offset).sum(1) * (peak * weight)
                change = change.view(-1, tokens.shape[1]) * grad[image]
                out[window, first:first + len(change)] += change @ windows[window]
                out[window] += change.T @ windows[window, first:first + len(change)]
        return total, None, None


ESTIMATORS = dict(binned=_BinnedEntropy, exact=_ExactEntropy)


def patch_similarity(tokens: Tensor) -> Tensor:
    """Pairwise cosine similarity of the tokens of each group.

    Args:
        tokens (Tensor): (groups, N, d).

    Returns:
        Tensor: Gamma, (groups, N, N), in [-1, 1].
    """
    tokens = F.normalize(tokens.float(), dim=-1)
    return tokens @ tokens.transpose(1, 2)


@torch.no_grad()
def similarity_density(tokens: Tensor, bandwidth: float = BANDWIDTH) -> tuple[Tensor, Tensor]:
    """The density whose entropy synthesis raises, to look at: of the patch similarities of all groups together.

    Args:
        tokens (Tensor): (groups, N, d).
        bandwidth (float): As there.

    Returns:
        tuple[Tensor, Tensor]: Points between -1 and 1, and the density at each, on the CPU.
    """
    grid = _grid(bandwidth, torch.device('cpu'))
    counts = torch.zeros(grid.bins, dtype=torch.int64)
    for group in tokens:
        index = patch_similarity(group[None]).sub(grid.start).div(grid.bin).long().clamp(0, grid.bins - 1)
        counts += torch.bincount(index.flatten(), minlength=grid.bins).cpu()
    density = grid.density(counts[None])[0] / counts.sum()
    points = grid.start + grid.bin * BINS / 2 + grid.step * torch.arange(grid.points, dtype=torch.float64)
    inside = points.abs() <= 1
    return points[inside], density[inside]


def patch_similarity_entropy(tokens: Tensor, images: int, bandwidth: float = BANDWIDTH,
                             density: str = 'binned') -> Tensor:
    """Differential entropy of the kernel density of one block's patch similarities.

    Args:
        tokens (Tensor): (groups, N, d): one group an image, or with window attention one a window; the windows of an
            image follow each other and are pooled into one density.
        images (int): Number of images; divides the number of groups.
        bandwidth (float): Standard deviation of the Gaussian kernel. Defaults to 0.01 (V1 code).
        density (str): 'binned' or 'exact', see above. Defaults to 'binned'.

    Returns:
        Tensor: (images,), in nats. At most log(2), the entropy of the uniform density on [-1, 1], up to the kernel's
        width; about log(bandwidth) + 1.42 when all similarities are equal.
    """
    return ESTIMATORS[density].apply(F.normalize(tokens.float(), dim=-1).contiguous(), images, bandwidth)


class Enough(Exception):
    """Ends a forward pass whose last tokens have been seen; never leaves :meth:`PatchSimilarityTap.run`."""


MAP = 28  # positions of a feature map along each side, at most; our choice


def is_grid(size: tuple[int, int], shape: Sequence[int]) -> bool:
    """Whether a map of a shape, (h, w), may be one over an image of a size, (H, W): with one stride for both axes."""
    low = max(side / (places + 0.5) for side, places in zip(size, shape))
    high = min(side / (places - 0.5) for side, places in zip(size, shape)) if min(shape) > 0 else 0
    return low <= high


def is_grid_of(size: tuple[int, int], positions: int) -> bool:
    """Whether so many positions may be one for each square of an image of a size, (H, W)."""
    for stride in range(1, max(size) + 1):
        for rows, columns in zip(*((side // stride, -(-side // stride)) for side in size)):  # rounded down, then up
            if rows * columns == positions:
                return True
    return False


def attention_tokens(output: Tensor, size: tuple[int, int] | None = None, skip: int = 0, heads: int = 1,
                     unless: Callable[[Tensor], bool] = lambda output: False) -> list[Tensor]:
    """Tokens of an attention: what it puts out, its heads averaged.

    Args:
        output (Tensor): ``softmax(scores) @ v``: (B, heads, N, d); with windows (B * windows, heads, N, d), those of an
            image following each other, or (B, windows, heads, N, d); or (B * heads, N, d).
        size (tuple[int, int], optional): Of the image, (H, W). An attention whose tokens are a grid over it as they
            are has none of the leading tokens.
        skip (int): How many leading tokens of the backbone are no patches. Defaults to 0.
        heads (int): Of an output with three dimensions. Defaults to 1.
        unless (Callable): Tells outputs whose tokens are no positions.

    Returns:
        list[Tensor]: One, (groups, N - skip, d), or none where fewer than two tokens are left.
    """
    if unless(output):
        return []
    if output.dim() == 3:
        output = output.unflatten(0, (-1, heads))
    count = output.shape[-2]
    if size is not None and is_grid_of(size, count) and not is_grid_of(size, count - skip):
        skip = 0
    tokens = output.flatten(0, -4).mean(1)[:, skip:]
    return [tokens] if tokens.shape[1] > 1 else []


def map_tokens(output, size: tuple[int, int] | None = None) -> list[Tensor]:
    """Tokens of feature maps: their positions, those of larger maps averaged to at most 28 x 28.

    Args:
        output (Tensor | Sequence | dict): Maps (B, C, H, W), nested in any way; other tensors and single positions are
            left out.
        size (tuple[int, int], optional): Of the image; unused.

    Returns:
        list[Tensor]: (B, positions, C) for each.
    """
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, (tuple, list)):
        return [tokens for item in output for tokens in map_tokens(item)]
    if not isinstance(output, Tensor) or output.dim() != 4 or output.shape[2] * output.shape[3] < 2:
        return []
    sides = [min(side, MAP) for side in output.shape[2:]]
    return [F.adaptive_avg_pool2d(output, sides).flatten(2).mT]


def last_axis_tokens(output: Tensor, size: tuple[int, int] | None = None) -> list[Tensor]:
    """Tokens of a map whose channels come last, (B, H, W, C) or (B, N, C); ``size`` is unused.

    Returns:
        list[Tensor]: One, (B, positions, C).
    """
    if output.dim() == 4:
        return map_tokens(output.permute(0, 3, 1, 2))
    return [output]


class PatchSimilarityTap:
    """Collects the tokens that modules put out while a model runs inside ``with tap:``, and only then.

    Args:
        sources (list[nn.Module]): The modules.
        readers (list[Callable]): ``reader(output, size) -> list[Tensor]`` finds the tokens of each, (groups, N, d);
            size is (H, W) of the images.
        model (nn.Module, optional): Gets the images first; without it readers are told no size.
        heads (HeadTap, optional): Listens when this does.
    """

    def __init__(self, sources, readers, model=None, heads=None):
        self.size, self.heads = None, heads
        self.tokens = []
        self.last = None  # how many outputs a whole pass gives, once one has shown it
        self.count = 0  # how many sets of tokens the last pass gave
        self.seen = 0
        self.listens = self.stops = False
        self.handles = [source.register_forward_hook(functools.partial(self._collect, reader))
                        for source, reader in zip(sources, readers)]
        if model is not None:
            self.handles.append(model.register_forward_pre_hook(self._see_images))

    def _see_images(self, module, inputs):
        if inputs and isinstance(inputs[0], Tensor):
            self.size = tuple(inputs[0].shape[-2:])

    def _collect(self, reader, module, inputs, output):
        if not self.listens:
            return
        self.tokens.extend(reader(output, self.size))
        self.seen += 1
        if self.stops and self.seen == self.last:
            raise Enough

    def __enter__(self):
        self.tokens, self.seen, self.listens = [], 0, True
        if self.heads is not None:
            self.heads.__enter__()
        return self

    def __exit__(self, *unused):
        self.listens = self.stops = False
        if self.heads is not None:
            self.heads.__exit__()

    def run(self, model, images: Tensor) -> None:
        """Runs a model no deeper than to its last tapped block; what lies behind it has no part in the entropy."""
        with self:
            self.stops = True
            try:
                model(images)
                self.last = self.seen
            except Enough:
                pass

    def entropy(self, images: int, bandwidth: float = BANDWIDTH, density: str = 'binned') -> Tensor:
        """Sum over sets of tokens of their entropy, (images,), in nats; forgets the tokens.

        Raises:
            UserError: If there are none.
        """
        tokens, self.tokens = self.tokens, []
        self.count = len(tokens)
        if not tokens:
            raise UserError('the backbone shows no attention between patches and no feature map of two or more '
                            'positions, so there are no patch similarities to make images by: use '
                            "quantization.synthesis.method = 'noise' or 'real'")
        return torch.stack([patch_similarity_entropy(t, images, bandwidth, density) for t in tokens]).sum(0)

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self.handles:
            handle.remove()
