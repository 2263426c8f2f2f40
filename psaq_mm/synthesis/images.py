"""Images as something to optimise: priors, augmentation, and Adam on pixels."""
from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from .config import GameConfig, SynthesisConfig

BETAS = (0.5, 0.9)  # V1 code


def valid_range(mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """What black and white become in the model's input space.

    Args:
        mean, std (Sequence[float]): Of the data preprocessor, in 0..255, one a channel.

    Returns:
        tuple[Tensor, Tensor]: low and high, each (1, channels, 1, 1).
    """
    mean, std = (torch.as_tensor(v, dtype=torch.float32).view(1, -1, 1, 1) for v in (mean, std))
    return -mean / std, (255 - mean) / std


class _TotalVariation(torch.autograd.Function):
    """Written out, since on a small model autograd of four differences costs as much as a tenth of a teacher pass."""

    @staticmethod
    def forward(ctx, images):
        gradient, values = torch.zeros_like(images), []
        height, width = images.shape[-2:]
        for down, right in ((0, 1), (1, 0), (1, -1), (1, 1)):
            # Each pixel that has a neighbour in this direction, and the neighbours.
            columns, others = (slice(max(0, -right * s), width - max(0, right * s)) for s in (1, -1))
            here, there = (..., slice(0, height - down), columns), (..., slice(down, height), others)
            difference = images[here] - images[there]
            count = difference[0].numel()
            value = torch.linalg.vector_norm(difference, dim=(1, 2, 3), keepdim=True) / count**0.5
            difference *= 1 / (4 * count * value.clamp(min=1e-6))
            gradient[here] += difference
            gradient[there] -= difference
            values.append(value.flatten())
        ctx.save_for_backward(gradient)
        return torch.stack(values).mean(0)

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0] * grad[:, None, None, None]


def total_variation(images: Tensor) -> Tensor:
    """Root-mean-square difference between neighbours, mean over the four directions that V1 uses.

    Args:
        images (Tensor): (B, C, H, W).

    Returns:
        Tensor: (B,), in the unit of the pixels: independent of image size and batch, unlike V1's norm over the batch.
    """
    return _TotalVariation.apply(images)


def prior_loss(images: Tensor, config: SynthesisConfig) -> Tensor:
    """Weighted distance of the total variation from its target, (B,) from (B, C, H, W)."""
    return config.tv_weight * (total_variation(images) - config.tv_target).abs()


def augment(images: Tensor, config: SynthesisConfig, rng: random.Random) -> Tensor:
    """Rolls by a random offset and mirrors every other time: (B, C, H, W) to the same."""
    offsets = [rng.randint(-config.jitter, config.jitter) for _ in range(2)]
    images = torch.roll(images, offsets, (2, 3))
    if config.flip and rng.random() < 0.5:
        images = images.flip(3)
    return images


def lesson_view(images: Tensor, others: Sequence[Tensor], synthesis: SynthesisConfig, game: GameConfig, low: Tensor,
                high: Tensor, rng: random.Random) -> Tensor:
    """What the student is trained on: images varied far more than synthesis varies them, so that few go a long way.

    A rectangle of each is replaced by that of another image, all are rolled and mirrored (:func:`augment`), cropped and
    enlarged again, and change contrast, colour and brightness. Our choice.

    Args:
        images (Tensor): (B, C, H, W).
        others (Sequence[Tensor]): Images that rectangles are taken from, (C, H, W) each.
        synthesis (SynthesisConfig): For :func:`augment`.
        game (GameConfig): ``crop``, ``color``, ``mix``.
        low, high (Tensor): Valid range, (1, C, 1, 1).
        rng (random.Random): Decides everything.

    Returns:
        Tensor: (B, C, H, W), inside the valid range.
    """
    batch, channels, height, width = images.shape

    def window(share_y, share_x):
        size = round(height * share_y), round(width * share_x)
        top, left = (rng.randint(0, whole - part) for whole, part in zip((height, width), size))
        return (..., slice(top, top + size[0]), slice(left, left + size[1]))

    def some(spread):
        """Random numbers between -spread and spread: one an image, plus one a channel that is less than half of it."""
        numbers = [rng.uniform(-1, 1) for _ in range(batch * (1 + channels))]
        numbers = spread * images.new_tensor(numbers).view(batch, 1 + channels, 1, 1)
        return numbers[:, :1] + 0.4 * numbers[:, 1:]

    if game.mix:
        place = window(rng.uniform(0.2, 0.8), rng.uniform(0.2, 0.8))
        images = images.clone()
        for image in images:
            image[place] = rng.choice(others)[place]
    images = augment(images, synthesis, rng)
    if game.crop < 1:
        side = rng.uniform(game.crop, 1)**0.5
        images = F.interpolate(images[window(side, side)], (height, width), mode='bilinear', align_corners=False)
    if game.color:
        images = images * (1 + some(game.color)) + some(game.color)
    return images.maximum(low).minimum(high)


def learning_rate(step: int, config: SynthesisConfig) -> float:
    """Linear warm-up, then half a cosine down to zero (V1's schedule, of which V1 runs two)."""
    warmup = int(config.warmup * config.steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (config.steps - warmup)))


class ImageOptimizer:
    """Adam on one batch of images, kept inside the valid pixel range.

    Args:
        images (Tensor): Where to start, (B, C, H, W), in the model's input space.
        low, high (Tensor): Valid range, (1, C, 1, 1).
        lr (float): Learning rate.
    """

    def __init__(self, images: Tensor, low: Tensor, high: Tensor, lr: float):
        self.images = images.detach().clone().requires_grad_()
        self.low, self.high = low.to(images.device), high.to(images.device)
        self.adam = torch.optim.Adam([self.images], lr=lr, betas=BETAS, fused=True)
        self._clip()

    @torch.no_grad()
    def _clip(self):
        self.images.copy_(self.images.maximum(self.low).minimum(self.high))

    def step(self, objective: Callable[[Tensor], Tensor], lr: float | None = None) -> float:
        """One update that lowers ``objective(images)``, a scalar.

        Raises:
            UserError: If the objective is not finite.
        """
        if lr is not None:
            self.adam.param_groups[0]['lr'] = lr
        loss = objective(self.images)
        value = loss.item()
        if not math.isfinite(value):
            raise UserError(f'the synthesis objective became {value}: the full-precision model gives features that are '
                            'no finite numbers on these images. Check the checkpoint, try without --amp, or lower '
                            'quantization.synthesis.lr')
        self.adam.zero_grad()
        self.images.grad, = torch.autograd.grad(loss, self.images)
        self.adam.step()
        self._clip()
        return value

    def state_dict(self):
        return dict(images=self.images.detach(), adam=self.adam.state_dict())

    def load_state_dict(self, state):
        with torch.no_grad():
            self.images.copy_(state['images'])
        self.adam.load_state_dict(state['adam'])
