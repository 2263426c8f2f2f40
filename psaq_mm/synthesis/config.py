"""Settings of image synthesis and of the game."""
from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from ..quantization.config import FrozenConfig

Start = Literal['noise', 'dead_leaves']
Method = Literal['noise', 'psaq_v1', 'psaq_v2', 'real']


class SynthesisConfig(FrozenConfig):
    """Where calibration images come from."""
    method: Method = Field(
        'psaq_v2', description="'noise': Gaussian noise; 'psaq_v1': synthesised images; 'psaq_v2': the same, then the "
        "game, if `game.steps` is not 0; 'real': the config's calib_dataloader, a baseline")
    reuse: str | None = Field(
        None, description="'synthetic.pt' of an earlier run on the same model: take its images, as they were before "
        'the game, instead of synthesising again (for another bit-width, say)')
    start: Start = Field(
        'noise', description="what images are before their first update: 'noise', Gaussian; 'dead_leaves', random "
        'shapes that hide each other, of which every backbone sees more than of noise')
    num_images: int = Field(32, ge=1, description='images in all; 32 as in V1')
    batch_size: int = Field(8, ge=1, description='images optimised at a time, on each process')
    size: tuple[tuple[int, int], ...] | None = Field(
        None, description="(height, width) in pixels, or several: batches take turns; None: the model's own, or 224 x "
        '224')
    steps: int = Field(100, ge=1, description='optimisation steps for each batch; V1 takes 1000')
    lr: float = Field(0.25, gt=0, description="Adam's peak learning rate, in units of normalised pixels; V1 uses "
                      '0.20 to 0.25')
    warmup: float = Field(0.2, ge=0, lt=1, description='share of the steps with a rising learning rate; V1: 100 of 500')
    patience: int | None = Field(
        None, ge=1, description='a batch is done early when its entropy has not risen by 0.01 nats a block (without an '
        'entropy, its diversity by 0.01) for so many steps; None: never')
    warm_start: float = Field(
        0.0, ge=0, lt=1, description='share of the previous batch in where a batch starts; the rest is what `start` '
        'says')
    checkpointing: bool = Field(
        False, description='compute attention blocks again in the backward pass instead of keeping their activations: '
        'for images too large for the memory; slower')
    entropy: float = Field(1.0, ge=0, description='weight of the entropy of patch similarities; 0: not computed')
    diversity: float = Field(
        0.0, ge=0, description='weight of the diversity of the images of a batch: how little the final features of '
        'one tell of those of the others; 0: images know nothing of each other')
    agreement: float = Field(
        0.0, ge=0, description='weight of the agreement of attention heads: for each query, how alike the maps of '
        'different heads are (1 where all are the same); 0: not computed. Needs a backbone with attention of several '
        'heads')
    bandwidth: float = Field(0.01, ge=0.002, le=0.5, description='of the similarity density; 0.01 as in V1')
    density: Literal['binned', 'exact'] = Field(
        'binned', description="how the density is estimated: 'exact' is the same to 1e-4 nats and tens of times slower")
    tv_weight: float = Field(1.0, ge=0, description='weight of the total-variation prior')
    tv_target: float = Field(
        0.31, ge=0, description='root-mean-square difference of neighbouring normalised pixels the prior pulls '
        'towards; V1 draws its total from 2500 to 3000 for 32 images of 224 x 224, which is 0.28 to 0.34')
    jitter: int = Field(30, ge=0, description='images are rolled by up to so many pixels; V1: 15, then 30')
    flip: bool = Field(True, description='images are mirrored in half of the steps, at random')

    @field_validator('size', mode='before')
    @classmethod
    def _sizes(cls, value):
        if value is None:
            return None
        pairs = [value] if isinstance(value, (list, tuple)) and value and isinstance(value[0], int) else value
        if not isinstance(pairs, (list, tuple)) or not pairs or not all(
                isinstance(p, (list, tuple)) and len(p) == 2 and all(type(v) is int and v >= 32 for v in p)
                for p in pairs):
            raise ValueError('must be (height, width) or a list of such pairs, each number a whole one of at least 32')
        return tuple(tuple(p) for p in pairs)


class GameConfig(FrozenConfig):
    """The teacher-student game of V2. All values are our choice: the paper's text was not available to us."""
    steps: int = Field(200, ge=0, description='updates in all, of images and student together')
    student_lr: float | None = Field(
        None, gt=0, description="peak learning rate of the student's Adam; None: 6e-6 at 8-bit weights, twice that "
        'for each bit less, as the step between two integers is')
    range_lr: float = Field(
        0.02, ge=0, description='peak learning rate of Adam for the logarithms of the ends of the ranges of what goes '
        'into products and convolutions; 0: ranges stay as they were calibrated')
    weight_ranges: Literal['mse', 'calibrated'] = Field(
        'mse', description="'mse': min-max ranges of weights give way, before the game, to those of least squared "
        "error; 'calibrated': they stay. Where a reconstruction goes before, its `weight_ranges` counts alone")
    image_lr: float = Field(0.05, gt=0, description="learning rate of the images' Adam, normalised pixels")
    weight: float = Field(1.0, ge=0, description='weight of the discrepancy in what images lower, beside '
                          'the objective of synthesis')
    heads: float = Field(
        0.0, ge=0, description="weight of the structural dissimilarity between what the teacher's and the student's "
        'attention heads put out, in what the student lowers; 0: not computed. Needs a backbone with attention')
    bound: float = Field(
        2.0, gt=1, description='images gain nothing by a discrepancy above so many times that of the student before '
        'the game')
    lower: float = Field(
        0.8, gt=0, lt=1, description="the student's turn ends when the discrepancy has fallen to so many times what "
        'it was when the turn began')
    upper: float = Field(1.25, gt=1, description="the images' turn ends when it has risen to so many times that")
    student_patience: int = Field(20, ge=1, description="the student's turn ends after so many updates at the latest")
    image_patience: int = Field(5, ge=1, description="the images' turn ends after so many updates at the latest")
    view_updates: int = Field(
        4, ge=1, description="updates that a random view of a batch, and the teacher's features of it, serve: with "
        'views as varied as these, as good as a new one for each, and faster')
    crop: float = Field(0.35, gt=0, le=1, description="the student sees crops of at least this share of an image's "
                        'area, enlarged to its size; 1: whole images')
    color: float = Field(0.5, ge=0, lt=1, description='contrast of what the student sees varies by up to this share, '
                         'brightness by up to so many standard deviations, colours by less than half as much')
    mix: bool = Field(True, description='a rectangle of what the student sees comes from another image')
    holdout: float = Field(0.25, gt=0, lt=1, description='share of the images held back to choose the best student')
    gain: float = Field(
        0.0, ge=0, lt=1, description='the best student of the game takes the place of the one before it only where its '
        'discrepancy on the held-back images is lower by this share')
    evaluate_every: int = Field(20, ge=1, description='student updates between looks at the held-back images')
    patience: int | None = Field(
        None, ge=1, description='the game is over when so many looks in a row have found no better student; None: it '
        'takes all its steps')


