"""Settings of the reconstruction."""
from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from ..quantization.config import FrozenConfig

VIEWS = 128  # of all images together, or more, unless the stanza says otherwise; our choice


class ReconstructionConfig(FrozenConfig):
    """Block by block reconstruction: each block learns to put out what its full-precision original does."""
    steps: int = Field(0, ge=0, description='updates of each block; 0: no reconstruction')
    lr: float | None = Field(
        None, gt=0, description="peak learning rate of Adam for biases and norms, and for weights that are 'free'; "
        'None: 3e-5 at 8-bit weights, twice that for each bit less, as the step between two integers is')
    rounding_lr: float = Field(
        0.02, gt=0, description='peak learning rate of Adam for weights that learn their rounding, in steps between '
        'two integers')
    range_lr: float = Field(
        0.01, ge=0, description='peak learning rate of Adam for the logarithms of the ends of the ranges of what goes '
        'into products and convolutions; 0: ranges stay as they were calibrated, without a search')
    search: bool = Field(
        True, description='before a block learns, look for the share of each of these ranges with the least error of '
        "the block's output; needs a `range_lr`")
    weights: Literal['rounding', 'free'] = Field(
        'rounding', description="'rounding': a weight stays between the two integers around it, learns which is "
        "better, and settles there; 'free': it goes where the error leads")
    weight_ranges: Literal['mse', 'calibrated'] = Field(
        'mse', description="'mse': min-max ranges of a block's weights give way, before it learns, to those of least "
        "squared error, unless its output is worse with them; 'calibrated': they stay")
    mix: float = Field(
        0.5, ge=0, le=1, description='share of the elements of a block\'s input that are those of the full-precision '
        'model, drawn anew for each update; the others are those of the quantized model')
    views: int | None = Field(
        None, ge=1, description="random views of each image that the blocks learn from, made as the game's "
        '(`game.crop`, `color`, `mix`); None: so many that there are 128 or more in all, the images that a later game '
        'holds back counted')
    final: float = Field(
        0.5, ge=0, description="weight of what an error of the block does to the final features, by their gradient, "
        "beside the error of the block's own output; 0: none")
    probes: int = Field(4, ge=1, description='batches that this gradient is measured on, each in one random direction '
                        'of the final features')

    def views_of_each(self, images: int) -> int:
        """Return how many views of each image there are.

        Args:
            images (int): How many images there are in all processes together, those that a later game holds back among
                them: a recipe has as many views of each with the game as without it.
        """
        return self.views or math.ceil(VIEWS / images)
