"""What the stages that train the student share: what may be trained, learned ranges, means over processes."""
from __future__ import annotations

import math

import torch
from mmengine import dist
from torch import Tensor, nn

from ...quantization import FakeQuantizer, quantizers
from ...stanza import reads_pixels

OPERANDS = ('input_quantizer', 'a_quantizer', 'b_quantizer')  # whose ranges may be learned


def annealing(done: float) -> float:
    """Return the share of the peak learning rate when a share of the updates is done: half a cosine down to 0.01."""
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))


def reduce_range(low, high, merge):
    """Join the ranges that the processes observed: their extremes or their mean."""
    if dist.get_world_size() == 1:
        return low, high
    low, high = low.clone(), high.clone()
    dist.all_reduce(low, 'min' if merge == 'extreme' else 'mean')
    dist.all_reduce(high, 'max' if merge == 'extreme' else 'mean')
    return low, high


def mean_over_processes(value: float) -> float:
    """Return the mean of a number over all processes."""
    if dist.get_world_size() == 1:
        return value
    value = torch.tensor(value, device=dist.get_comm_device())
    dist.all_reduce(value, 'mean')
    return value.item()


def average_gradients(parameters: list[Tensor]) -> None:
    """Average the gradients of parameters over processes, in place."""
    dist.all_reduce_params([p.grad for p in parameters if p.grad is not None], op='mean')


def trainable(student: nn.Module, targets: list[str]) -> dict[str, Tensor]:
    """Return the parameters of the targets that may change, by name; nothing else requires a gradient afterwards.

    A frozen stage stays as it is. Where all is frozen, as in the teacher of a semi-supervised model, nothing is.
    """
    names = tuple(f'{target}.' for target in targets)
    inside = {n: p for n, p in student.named_parameters() if n.startswith(names)}
    parameters = {n: p for n, p in inside.items() if p.requires_grad} or inside
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in parameters)
    return parameters


def learnable_ranges(student: nn.Module, inside: tuple[str, ...]) -> dict[str, FakeQuantizer]:
    """Return the quantizers whose ranges may be learned, by name.

    Only those of operands of products: residual sums and logits carry outliers that synthetic images may lack. Not that
    of the pixels, which is known.

    Args:
        student (nn.Module): The model.
        inside (tuple[str]): Beginnings of names.
    """
    return {name: quantizer for name, quantizer in quantizers(student).items()
            if name.startswith(inside) and name.rpartition('.')[2] in OPERANDS
            and not reads_pixels(student.get_submodule(name.rpartition('.')[0]))}


def split(images: list[Tensor], holdout: float) -> tuple[list[Tensor], list[Tensor]]:
    """Divide image batches into those that the student learns from and those that choose the best student.

    Args:
        images (list[Tensor]): Batches (B, C, H, W), of two images or more in all.
        holdout (float): Share of the images that is held back: the last ones, at least one and never all.

    Returns:
        tuple[list[Tensor], list[Tensor]]: Batches of both.
    """
    total = sum(map(len, images))
    hold = min(max(1, round(holdout * total)), total - 1)
    learned, held = [], []
    for batch in reversed(images):
        take = min(hold, len(batch))
        hold -= take
        if take:
            held.insert(0, batch[len(batch) - take:])
        if take < len(batch):
            learned.insert(0, batch[:len(batch) - take])
    return learned, held
