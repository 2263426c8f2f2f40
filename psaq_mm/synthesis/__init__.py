"""Images without data, and the teacher-student game. Knows only torch."""
from .agreement import HeadTap, head_agreement
from .config import GameConfig, SynthesisConfig
from .dead_leaves import dead_leaves
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
from .game import Game, discrepancy, distillation, head_dissimilarity
from .images import ImageOptimizer, augment, learning_rate, lesson_view, prior_loss, total_variation, valid_range
from .starts import start_image
from .synthesize import image_diversity, listening, objective, synthesize

__all__ = [
    'Game', 'GameConfig', 'HeadTap', 'ImageOptimizer', 'PatchSimilarityTap', 'SynthesisConfig', 'attention_tokens',
    'augment', 'dead_leaves', 'discrepancy', 'distillation', 'head_agreement', 'head_dissimilarity',
    'image_diversity', 'is_grid', 'last_axis_tokens', 'learning_rate', 'lesson_view', 'listening', 'map_tokens',
    'objective', 'patch_similarity', 'patch_similarity_entropy', 'prior_loss', 'similarity_density', 'start_image',
    'synthesize', 'total_variation', 'valid_range'
]
