"""Agreement of attention heads: an objective on the structure of attention.

Facts (MimiQ, AAAI 2025): in real images the heads of an attention look at the same places, in noise they do not; images
are made by lowering, for each query, the mean over pairs of heads of 1 - SSIM^2 of their attention maps.

Ours: the closed form. The attention of a query sums to 1 over the keys, so all heads have the same mean, and SSIM has
its contrast and structure terms left, (2 cov + c) / (var + var' + c). Windows are attentions like any other.
"""
from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

STEADY = 0.03  # SSIM's constant c is its square; the dynamic range is what a key gets of attention that looks nowhere


def head_agreement(weights: Tensor) -> Tensor:
    """Return how alike the attention maps of different heads are.

    Args:
        weights (Tensor): Softmax of the scores, (groups, heads, queries, keys), of two heads or more.

    Returns:
        Tensor: (groups,), from 0 to 1: SSIM^2, mean over queries and pairs of heads.
    """
    heads, keys = weights.shape[1], weights.shape[3]
    maps = (weights.float() * keys - 1).transpose(1, 2)  # deviations from attention that looks nowhere
    products = maps @ maps.mT / keys
    power = products.diagonal(dim1=-2, dim2=-1)
    similar = (2 * products + STEADY**2) / (power[..., None] + power[..., None, :] + STEADY**2)
    first, second = torch.triu_indices(heads, heads, 1, device=weights.device)
    return similar[..., first, second].square().mean((1, 2))


class HeadTap:
    """Hears the weights of attentions while a model runs inside ``with tap:``, and only then.

    Args:
        products (Sequence[nn.Module]): The second products of attentions: called with weights and values.
        heads (Sequence[int]): Of each, where the weights are (B * heads, queries, keys).
    """

    def __init__(self, products: Sequence[nn.Module], heads: Sequence[int]):
        self.products = list(zip(products, heads))
        self.found: list[Tensor] = []

    def __enter__(self):
        self.found = []
        # Fused attentions compute their weights where somebody listens.
        self.handles = [product.register_forward_pre_hook(functools.partial(self._hear, heads))
                        for product, heads in self.products]
        return self

    def __exit__(self, *unused):
        for handle in self.handles:
            handle.remove()

    def _hear(self, heads, product, inputs):
        weights = inputs[0]
        if weights.dim() == 3:
            weights = weights.unflatten(0, (-1, heads))
        if weights.shape[-3] > 1:
            self.found.append(head_agreement(weights.flatten(0, -4)))

    def agreement(self, images: int) -> Tensor:
        """Return the agreement of heads in the last pass, mean over attentions, and forget it.

        Args:
            images (int): In the pass; the windows of an image follow each other.

        Returns:
            Tensor: (images,), from 0 to 1; 0 without any attention of two heads.
        """
        found, self.found = self.found, []
        return torch.stack([part.view(images, -1).mean(1) for part in found]).mean(0) if found else torch.zeros(images)
