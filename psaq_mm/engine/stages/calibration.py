"""Calibration: all scales at once, from the images as the float student sees them."""
from __future__ import annotations

from ...models import extract_features
from ...quantization import calibrate, quantizers, reparameterize
from .base import Stage, counted, listed
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
        self.tell_merged()

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
            log(f'{counted(len(names), "norm")} left alone ({listed(names)}): {reason}')

    def tell_merged(self):
        """Say where heads share one range, though the settings ask for one each."""
        names = [name.rpartition('.')[0] for name, quantizer in quantizers(self.loop.student).items()
                 if quantizer.merged]
        if names:
            self.loop.runner.logger.info(
                f'{counted(len(names), "attention")} with one range for the weights of all heads, as there is one head '
                f'or no axis for heads alone: {listed(names)}')

    def summary(self):
        """Return which norms that feed quantized layers were reparameterised, and why the others were left alone."""
        return self.norms and dict(norms=self.norms)
