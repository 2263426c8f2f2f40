"""From noise to images: the objective of one update, and all updates of one batch."""
from __future__ import annotations

import random
from collections.abc import Callable

from torch import Tensor

from .config import SynthesisConfig
from .entropy import PatchSimilarityTap
from .images import ImageOptimizer, augment, learning_rate, prior_loss


def objective(images: Tensor, run: Callable[[Tensor], None], tap: PatchSimilarityTap, config: SynthesisConfig,
              rng: random.Random) -> tuple[Tensor, dict[str, float]]:
    """What synthesis lowers: the priors less the entropy of patch similarities, on a view of the images.

    Args:
        images (Tensor): (B, C, H, W).
        run (Callable): Runs the teacher on images as far as the tap listens.
        tap (PatchSimilarityTap): On the teacher.
        config (SynthesisConfig): Priors, augmentation, density.
        rng (random.Random): Chooses the view.

    Returns:
        tuple[Tensor, dict[str, float]]: A scalar; for the log ``entropy``, in nats, mean of a set of tokens, and
        ``prior``.
    """
    view = augment(images, config, rng)
    run(view)
    entropy, prior = tap.entropy(len(view), config.bandwidth, config.density), prior_loss(view, config)
    log = dict(entropy=entropy.mean().item() / tap.count, prior=prior.mean().item())
    return (prior - entropy).mean(), log


def synthesize(noise: Tensor, run: Callable[[Tensor], None], tap: PatchSimilarityTap, config: SynthesisConfig,
               low: Tensor, high: Tensor, seed: str, progress: Callable[[], None] = lambda: None) -> Tensor:
    """Takes one batch all the way from noise, ``config.steps`` updates.

    Args:
        noise (Tensor): (B, C, H, W).
        run, tap, config: See :func:`objective`.
        low, high (Tensor): Valid pixel range, (1, C, 1, 1).
        seed (str): Of the views.
        progress (Callable): Called after each update.

    Returns:
        Tensor: The images.
    """
    optimizer = ImageOptimizer(noise, low, high, config.lr)
    for step in range(config.steps):
        rng = random.Random(f'{seed}-{step}')
        optimizer.step(lambda images, rng=rng: objective(images, run, tap, config, rng)[0], learning_rate(step, config))
        progress()
    return optimizer.images.detach()
