"""From where images start to what they become: the objective of one update, and all updates of one batch."""
from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import SynthesisConfig
from .entropy import PatchSimilarityTap
from .images import ImageOptimizer, augment, learning_rate, prior_loss

RIDGE = 1e-3  # added to the diagonal of similarities: what equal images lack in diversity stays finite; our choice


def image_diversity(features: Sequence[Tensor], images: int) -> Tensor:
    """Return how little the final features of one image tell of those of the others.

    The logarithm of the determinant of the matrix of cosine similarities, over its size: 0 where all features are
    orthogonal, the less the more alike they are. Feature maps count as four, one for each quarter. Maps that do not
    begin with the images, such as the outputs of all decoder layers of a DETR, do not count.

    Source: ours. A determinantal point process (Kulesza and Taskar, 2012) measures the diversity of a set so.

    Args:
        features (Sequence[Tensor]): Maps (B, C, H, W), tokens (B, N, C) or vectors (B, C).
        images (int): B.

    Returns:
        Tensor: Scalar, the mean over maps, at most about 0; 0 without any.
    """
    found = []
    for map_ in features:
        if len(map_) != images or map_.dim() < 2:
            continue
        if map_.dim() == 4:
            size = [min(2, side) for side in map_.shape[2:]]
            vectors = F.adaptive_avg_pool2d(map_.float(), size).flatten(2).transpose(1, 2).flatten(0, 1)
        else:
            vectors = map_.float().flatten(1, -2).mean(1) if map_.dim() > 2 else map_.float()
        vectors = F.normalize(vectors, dim=1)
        similarity = vectors @ vectors.T
        ridge = RIDGE * torch.eye(len(similarity), device=similarity.device)
        found.append(torch.linalg.slogdet(similarity + ridge).logabsdet / len(similarity))
    return torch.stack(found).mean() if found else torch.zeros(())


def listening(tap: PatchSimilarityTap, config: SynthesisConfig):
    """Return the context of a pass of the teacher: the tap listens where what it hears has a weight."""
    return tap if config.entropy or config.agreement else nullcontext()


def image_loss(view: Tensor, features: Sequence[Tensor], tap: PatchSimilarityTap, config: SynthesisConfig
               ) -> tuple[Tensor, dict[str, float]]:
    """Return what images lower, after a pass of the teacher on a view of them.

    Args:
        view (Tensor): (B, C, H, W).
        features (Sequence[Tensor]): Final features of it, where ``config.diversity``.
        tap (PatchSimilarityTap): Has heard the pass, where ``config.entropy`` or ``config.agreement``.
        config (SynthesisConfig): Weights of the parts.

    Returns:
        tuple[Tensor, dict[str, float]]: Of each image, (B,); for the log ``prior``, and where they have a weight
        ``entropy``, in nats, mean of a set of tokens, ``agreement`` and ``diversity``.
    """
    loss = prior_loss(view, config)
    log = dict(prior=loss.mean().item())
    if config.entropy:
        entropy = tap.entropy(len(view), config.bandwidth, config.density)
        loss = loss - config.entropy * entropy
        log['entropy'] = entropy.mean().item() / tap.count
    if config.agreement:
        agreement = tap.heads.agreement(len(view))
        loss = loss - config.agreement * agreement
        log['agreement'] = agreement.mean().item()
        tap.tokens = []  # without an entropy nobody else forgets them
    if config.diversity:
        diversity = image_diversity(features, len(view))
        loss = loss - config.diversity * diversity
        log['diversity'] = diversity.item()
    return loss, log


def objective(images: Tensor, run: Callable[[Tensor], Sequence[Tensor]], tap: PatchSimilarityTap,
              config: SynthesisConfig, rng: random.Random) -> tuple[Tensor, dict[str, float]]:
    """Return what synthesis lowers, on a view of the images.

    Args:
        images (Tensor): (B, C, H, W).
        run (Callable): Runs the teacher on images, as far as the tap listens or to the final features it returns.
        tap (PatchSimilarityTap): On the teacher.
        config (SynthesisConfig): Priors, augmentation, density.
        rng (random.Random): Chooses the view.

    Returns:
        tuple[Tensor, dict[str, float]]: A scalar; what :func:`image_loss` gives for the log.
    """
    view = augment(images, config, rng)
    loss, log = image_loss(view, run(view), tap, config)
    return loss.mean(), log


def synthesize(start: Tensor, run: Callable[[Tensor], Sequence[Tensor]], tap: PatchSimilarityTap,
               config: SynthesisConfig, low: Tensor, high: Tensor, seed: str,
               progress: Callable[[], None] = lambda: None) -> Tensor:
    """Take one batch all the way from where it starts, ``config.steps`` updates.

    Args:
        start (Tensor): (B, C, H, W).
        run, tap, config: See :func:`objective`.
        low, high (Tensor): Valid pixel range, (1, C, 1, 1).
        seed (str): Of the views.
        progress (Callable): Called after each update.

    Returns:
        Tensor: The images.
    """
    optimizer = ImageOptimizer(start, low, high, config.lr)
    for step in range(config.steps):
        rng = random.Random(f'{seed}-{step}')
        optimizer.step(lambda images, rng=rng: objective(images, run, tap, config, rng)[0], learning_rate(step, config))
        progress()
    return optimizer.images.detach()
