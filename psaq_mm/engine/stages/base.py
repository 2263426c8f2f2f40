"""What the loop, the hooks, the report and ``--resume`` know of a stage."""
from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from mmengine import dist
from torch import Tensor

from ...report import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..loop import DataFreeLoop


def counted(number: int, what: str) -> str:
    """Return '1 turn' or '2 turns'."""
    return f'{number} {what}' + 's' * (number != 1)


def listed(names: Sequence[str], count: int = 5) -> str:
    """Return the first few names in words."""
    return ', '.join(names[:count]) + ', ...' * (len(names) > count)


class Plot(NamedTuple):
    """What the report shows of a stage.

    Attributes:
        name (str): Of the figure, for the Visualizer; no other plot has it.
        text (str): What it says, in plain text; `names` of settings stand between backticks.
        figure (Figure | None): None: there is nothing to draw.
    """
    name: str
    text: str
    figure: Figure | None


class Stage:
    """One part of a data-free run: its updates, its numbers for the log, its state for resume.

    The loop makes the stages that are :meth:`wanted`, calls :meth:`prepare` of all before the work, and then, one stage
    after the other, :meth:`start`, :meth:`step` as often as ``updates`` says, and :meth:`finish`. A stage without
    updates does its work in :meth:`start`; an interrupted run does it again.

    Attributes:
        name (str): In the log, the history, the bar and ``stages`` of ``metrics.json``.
        title (str): In the report.
        shown (tuple[str]): Which numbers of an update stand beside the bar.
        curve (str): The number that the report draws over the updates, unless :meth:`plots` says otherwise; '': none.
        updates (int): How many mmengine iterations the stage takes at most. :meth:`start` may lower it.
        restored (dict | None): What :meth:`state_dict` gave in the run that was interrupted within this stage.

    Args:
        loop (DataFreeLoop): Holds what stages share: settings, teacher, student, images.
    """
    name = title = curve = ''
    shown: tuple[str, ...] = ()

    def __init__(self, loop: DataFreeLoop):
        self.loop, self.quantization = loop, loop.quantization
        self.updates = 0
        self.restored = None
        self.said = set()

    @classmethod
    def wanted(cls, loop: DataFreeLoop) -> bool:
        """Return whether the settings ask for this stage."""
        return True

    @property
    def index(self) -> int:
        """The number of the present update within the stage, from 0."""
        return self.loop.iter - self.loop.updates_before(self)

    def prepare(self) -> None:
        """Check what the stage needs, before any work.

        Raises:
            UserError: Where the stage cannot run with these settings.
        """

    def start(self) -> None:
        """Set the stage up; after an interruption, put ``restored`` in place."""

    def step(self, rng: random.Random) -> dict:
        """Make one update.

        Args:
            rng (random.Random): Seeded for this update alone: an interrupted run draws the same numbers.

        Returns:
            dict[str, float]: Numbers for the log.
        """
        raise NotImplementedError

    def finish(self) -> None:
        """Leave the result in the loop's images and student."""

    def place(self) -> tuple[int, int]:
        """Return the rank and the number that seed an update; the history counts by the latter."""
        return dist.get_rank(), self.index

    def tags(self) -> dict:
        """Return what the history keeps of the coming update besides its numbers."""
        return {}

    def images(self) -> list[Tensor]:
        """Return the image batches as they are at this moment, (B, C, H, W) each."""
        return list(self.loop.images)

    def summary(self) -> dict | None:
        """Return what ``metrics.json``, checkpoint and report say of the finished stage; None: nothing."""
        return None

    def plots(self) -> list[Plot]:
        """Return what the report shows of the finished stage; the loop's history and summaries have all sessions of
        the run.
        """
        return [Plot(self.name, '', figures.stage_curve(self.loop.history, self.name, self.curve))]

    def state_dict(self) -> dict:
        """Return what an interrupted run needs to go on within this stage."""
        return {}

    def announce(self, what: str) -> None:
        """Tell the log that the stage begins."""
        stages = self.loop.stages
        self.loop.runner.logger.info(f'Stage {stages.index(self) + 1}/{len(stages)}: {what}')

    def say_once(self, what: str) -> None:
        """Tell the log something that may come up again and again, the first time alone."""
        if what not in self.said:
            self.said.add(what)
            self.loop.runner.logger.info(what)
