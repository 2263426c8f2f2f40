"""The features that teacher and student are compared by."""
from __future__ import annotations

from torch import Tensor, nn


def extract_features(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Output of backbone and neck, by the ecosystem's own ``extract_feat``.

    Args:
        model (nn.Module): A detector.
        images (Tensor): In the model's input space, (B, C, H, W).

    Returns:
        list[Tensor]: Feature maps (B, C_i, H_i, W_i).
    """
    features = model.extract_feat(images)
    return [features] if isinstance(features, Tensor) else list(features)
