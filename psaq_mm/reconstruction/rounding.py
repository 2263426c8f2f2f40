"""Learned rounding: each weight of a layer learns which of the two integers around it is better, and settles there."""
from __future__ import annotations

import torch
from torch import Tensor, nn

WAIT, SETTLED = 0.2, 0.95  # shares of the updates when the first weights settle and when all have; our choice


@torch.no_grad()
def neighbours(weight: Tensor, quantizer) -> tuple[Tensor, Tensor]:
    """Return the values of the two integers around each weight.

    Args:
        weight (Tensor): Any shape.
        quantizer (FakeQuantizer): Of the weight, calibrated.

    Returns:
        tuple[Tensor, Tensor]: Lowest and highest value, of the weight's shape.
    """
    scale, zero_point = quantizer.affine()
    if quantizer.per_channel:
        shape = [-1 if axis == quantizer.axis else 1 for axis in range(weight.dim())]
        scale, zero_point = scale.view(shape), zero_point.view(shape)
    below = (weight / scale + zero_point).floor().clamp(quantizer.quant_min, quantizer.quant_max - 1)
    return (below - zero_point) * scale, (below + 1 - zero_point) * scale


class LearnedRounding:
    """The weight of one layer: every element lies between two integers, and ends on one of them.

    The model computes with rounded weights all the time; gradients pass straight through. Weights that only follow
    them come to hover in the middle between their integers, where each update turns many of them round. So the weights
    settle, those farthest from the middle first, and the others make up for what that does.

    Source: AdaRound (ICML 2020) for the choice between two integers, incremental quantization (INQ, ICLR 2017) for
    weights that settle a share at a time. Ours: both together, by the straight-through estimator.

    Args:
        layer (nn.Module): Quantized, its weight calibrated.
        start (Tensor): Where the weight starts, of its shape.

    Attributes:
        place (Tensor): Of each element between its integers, 0 to 1: what the optimiser changes.
        settled (Tensor): Whether an element is on its integer for good; bool.
    """

    def __init__(self, layer: nn.Module, start: Tensor):
        self.layer = layer
        self.low, high = neighbours(start, layer.weight_quantizer)
        self.width = high - self.low
        self.place = ((start - self.low) / self.width).clamp(0, 1)
        self.settled = torch.zeros_like(start, dtype=torch.bool)

    def gradient(self, of_weight: Tensor) -> Tensor:
        """Return the gradient of ``place`` from that of the weight."""
        return (of_weight * self.width).masked_fill_(self.settled, 0)

    @torch.no_grad()
    def apply(self, share: float) -> None:
        """Take over what an update did to ``place``, and let so large a share of the weight be settled."""
        on_integer = (self.layer.weight > self.low + self.width / 2).to(self.place.dtype)
        self.place.clamp_(0, 1)
        torch.where(self.settled, on_integer, self.place, out=self.place)  # momentum moves them still
        missing = round(share * self.settled.numel()) - int(self.settled.sum())
        if missing > 0:
            distance = (self.place - 0.5).abs().masked_fill_(self.settled, -1)
            chosen = distance.flatten().topk(missing).indices
            self.settled.view(-1)[chosen] = True
            self.place.view(-1)[chosen] = self.place.view(-1)[chosen].round()
        self.layer.weight.copy_(self.low + self.width * self.place)

    def state_dict(self) -> dict:
        """Return what an interrupted reconstruction needs."""
        return dict(place=self.place.clone(), settled=self.settled.clone())

    def load_state_dict(self, state: dict) -> None:
        """Go on where another left off."""
        self.place.copy_(state['place'])
        self.settled.copy_(state['settled'])


def settled_share(done: float) -> float:
    """Return the share of the weights that has settled when a share of the updates is done."""
    return min(max((done - WAIT) / (SETTLED - WAIT), 0.0), 1.0)
