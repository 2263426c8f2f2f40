"""Calibration: all scales at once, from the images as the float student sees them."""
from __future__ import annotations

from mmengine import dist

from ...models import extract_features
from ...quantization import calibrate
from .base import Stage


def reduce_range(low, high, merge):
    """Join the ranges that the processes observed: their extremes or their mean."""
    if dist.get_world_size() == 1:
        return low, high
    low, high = low.clone(), high.clone()
    dist.all_reduce(low, 'min' if merge == 'extreme' else 'mean')
    dist.all_reduce(high, 'max' if merge == 'extreme' else 'mean')
    return low, high


class CalibrationStage(Stage):
    """Chooses all scales. It has no updates."""
    name = 'calibration'

    def start(self):
        loop = self.loop
        self.announce(f'calibration on {sum(map(len, loop.images))} images')
        step = loop.progress(self.name, len(loop.images))

        def run():
            for batch in loop.images:
                extract_features(loop.student, batch, loop.heads)  # in float32 even with amp, as inference will be
                step()

        calibrate(loop.student, run, reduce_range)
