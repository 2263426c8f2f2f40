"""Calibration: all scales at once, from the images as the float student sees them."""
from __future__ import annotations

from ...models import extract_features
from ...quantization import calibrate, reparameterize
from .base import Stage, counted
from .learning import mean_over_processes, reduce_range


class CalibrationStage(Stage):
    """Brings the channels behind norms to one range where the recipe wants it, then chooses all scales. No updates."""
    name = 'calibration'

    def __init__(self, loop):
        super().__init__(loop)
        self.norms = None

    def start(self):
        loop = self.loop
        self.announce(f'calibration on {sum(map(len, loop.images))} images')
        passes = 1 + self.quantization.reparameterize
        step = loop.progress(self.name, passes * len(loop.images))

        def run():
            for batch in loop.images:
                extract_features(loop.student, batch, loop.heads)  # in float32 even with amp, as inference will be
                step()

        if self.quantization.reparameterize:
            self.reparameterize(run)
        calibrate(loop.student, run, reduce_range)

    def reparameterize(self, run):
        """Change the student's norms and the layers that read them; say what was left alone."""
        found = reparameterize(self.loop.student, run, self.loop.first_features, reduce_range, mean_over_processes)
        self.norms = dict(reparameterized=list(found['changed']), left_alone=found['left'])
        changed, left, log = found['changed'], found['left'], self.loop.runner.logger.info
        if changed:
            log(f'{counted(len(changed), "norm")} reparameterised: squared error of the layers behind, over the power '
                'of their outputs, on average '
                + ' -> '.join(f'{sum(site[key] for site in changed.values()) / len(changed):.2e}'
                              for key in ('before', 'after')))
        for reason in dict.fromkeys(left.values()):
            names = [name for name, why in left.items() if why == reason]
            shown = ', '.join(names[:3]) + ', ...' * (len(names) > 3)
            log(f'{counted(len(names), "norm")} left alone ({shown}): {reason}')

    def summary(self):
        """Return which norms that feed quantized layers were reparameterised, and why the others were left alone."""
        return self.norms and dict(norms=self.norms)
