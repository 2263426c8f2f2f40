"""Images from noise by patch-similarity entropy, and the teacher-student game. Knows only torch."""
from .config import GameConfig, SynthesisConfig
from .entropy import (
    PatchSimilarityTap,
    attention_tokens,
    is_grid,
    last_axis_tokens,
    map_tokens,
    patch_similarity,
    patch_similarity_entropy,
    similarity_density,
)
from .game import Game, discrepancy, distillation
from .images import ImageOptimizer, augment, learning_rate, lesson_view, prior_loss, total_variation, valid_range
from .synthesize import objective, synthesize

__all__ = [
    'Game', 'GameConfig', 'ImageOptimizer', 'PatchSimilarityTap', 'SynthesisConfig', 'attention_tokens', 'augment',
    'discrepancy', 'distillation', 'is_grid', 'last_axis_tokens', 'learning_rate', 'lesson_view', 'map_tokens',
    'objective', 'patch_similarity', 'patch_similarity_entropy', 'prior_loss', 'similarity_density', 'synthesize',
    'total_variation', 'valid_range'
]
