"""Patch similarity and the differential entropy of its distribution: what makes noise become an image.

Facts (PSAQ-ViT): tokens are the output of attention x V averaged over heads; Gamma is their pairwise cosine
similarity; its entries get a Gaussian kernel density with bandwidth 0.01, whose differential entropy is maximised.

Ours: the density. V1's code evaluates the kernel at 10 points between minimum and maximum, spaced ten or more
bandwidths apart, through a (10, N x N) intermediate. Here the entries are spread linearly onto a grid a quarter
bandwidth apart over all of [-1, 1] and the grid is convolved with the kernel: one pass over the entries whatever the
number of points, nothing larger than Gamma is stored, and the estimate sees every entry.
"""
from __future__ import annotations

import functools

import torch
from torch import Tensor

BANDWIDTH = 0.01  # V1 code
POINTS_PER_BANDWIDTH = 4  # linear spreading widens the kernel's variance by 1/(6 * 4^2): 1 %; our choice
MARGIN = 5  # bandwidths of grid beyond [-1, 1]: the kernel is below 4e-6 of its peak there
FLOOR = 1e-8  # density below which log() is not followed; moves the entropy by less than 1e-6


@functools.lru_cache(maxsize=8)
def _grid(bandwidth: float, device: torch.device):
    """Grid start, spacing, the kernel (points, points) and its derivative by the second point, in float32."""
    spacing = bandwidth / POINTS_PER_BANDWIDTH
    start = -1 - MARGIN * bandwidth
    count = int(round((2 + 2 * MARGIN * bandwidth) / spacing)) + 1
    at = torch.arange(count, dtype=torch.float64) * spacing
    offset = (at[:, None] - at[None, :]) / bandwidth
    kernel = torch.exp(-0.5 * offset**2) / (bandwidth * (2 * torch.pi)**0.5)
    derivative = kernel * offset / bandwidth
    return start, spacing, kernel.float().to(device), derivative.float().to(device)


def _place(values: Tensor, start: float, spacing: float, points: int):
    """Each value's grid cell (int64) and how far into it the value lies (0..1)."""
    position = (values - start) / spacing
    # Clamp: rounding may leave [-1, 1] by an ulp. NaN goes to cell 0 and stays NaN in the share, so in the entropy.
    index = position.floor().clamp_(0, points - 2).nan_to_num_(0)
    return index.long(), position.sub_(index)


class _DensityEntropy(torch.autograd.Function):

    @staticmethod
    def forward(ctx, values, bandwidth):
        values = values.detach()
        start, spacing, kernel, derivative = _grid(bandwidth, values.device)
        images, entries = values.shape
        points = kernel.shape[0]
        index, share = _place(values, start, spacing, points)
        flat = index.add_(torch.arange(images, device=values.device)[:, None] * points).flatten()
        whole = torch.bincount(flat, minlength=images * points).view(images, points).to(values.dtype)
        right = torch.bincount(flat, share.flatten(), minlength=images * points).view(images, points).to(values.dtype)
        mass = whole - right
        mass[:, 1:] += right[:, :-1]
        density = mass @ kernel / entries
        log_density = density.clamp(min=FLOOR).log()
        # The density vanishes at both ends, so the trapezoid rule is the plain sum.
        entropy = -(density * log_density).sum(1) * spacing
        # What moving one entry at each grid point changes; between points it is interpolated.
        slope = -((log_density + 1) @ derivative) * spacing / entries
        ctx.save_for_backward(values, slope)
        ctx.grid = start, spacing, points
        return entropy

    @staticmethod
    def backward(ctx, grad):
        values, slope = ctx.saved_tensors
        index, share = _place(values, *ctx.grid)
        left = slope.gather(1, index)
        right = slope.gather(1, index.add_(1))
        return left.lerp_(right, share).mul_(grad[:, None]), None


def density_entropy(values: Tensor, bandwidth: float = BANDWIDTH) -> Tensor:
    """Differential entropy of the kernel density of values in [-1, 1].

    Args:
        values (Tensor): (images, entries), float32.
        bandwidth (float): Standard deviation of the Gaussian kernel. Defaults to 0.01 (V1 code).

    Returns:
        Tensor: (images,), in nats. At most log(2), the entropy of the uniform density on [-1, 1], up to the kernel's
        width; about log(bandwidth) + 1.42 when all values are equal.
    """
    return _DensityEntropy.apply(values, bandwidth)


def patch_similarity(tokens: Tensor) -> Tensor:
    """Pairwise cosine similarity of the tokens of each group.

    Args:
        tokens (Tensor): (groups, N, d).

    Returns:
        Tensor: Gamma, (groups, N, N), in [-1, 1].
    """
    tokens = torch.nn.functional.normalize(tokens.float(), dim=-1)
    return tokens @ tokens.transpose(1, 2)


def patch_similarity_entropy(tokens: Tensor, images: int, bandwidth: float = BANDWIDTH) -> Tensor:
    """Entropy of the patch similarities of one block.

    Args:
        tokens (Tensor): (groups, N, d): one group an image, or with window attention one a window; the windows of an
            image follow each other and are pooled into one density.
        images (int): Number of images; divides the number of groups.
        bandwidth (float): See :func:`density_entropy`.

    Returns:
        Tensor: (images,), in nats.
    """
    return density_entropy(patch_similarity(tokens).reshape(images, -1), bandwidth)


class PatchSimilarityTap:
    """Collects the tokens of attention blocks while a model runs.

    Args:
        products (list[nn.Module]): The modules that compute ``softmax(scores) @ v``, output (groups, heads, N, d).
        class_tokens (list[int]): How many leading tokens of each are no patches, and are left out.
    """

    def __init__(self, products, class_tokens):
        self.tokens = []
        self.handles = [
            product.register_forward_hook(functools.partial(self._collect, skip))
            for product, skip in zip(products, class_tokens)
        ]

    def _collect(self, skip, module, inputs, output):
        self.tokens.append(output.mean(1)[:, skip:])

    def entropy(self, images: int, bandwidth: float = BANDWIDTH) -> Tensor:
        """Sum over blocks of the entropy since the last call, (images,), in nats; forgets the tokens."""
        tokens, self.tokens = self.tokens, []
        return torch.stack([patch_similarity_entropy(t, images, bandwidth) for t in tokens]).sum(0)

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self.handles:
            handle.remove()
