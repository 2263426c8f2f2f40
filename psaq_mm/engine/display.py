"""What a run shows while it works: a live bar in a terminal, mmengine's lines elsewhere, or nothing."""
from __future__ import annotations

import logging
import math
import os
import sys
from contextlib import ExitStack, redirect_stdout

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINES = ('Iter(', 'Exp name:')  # log lines that the bar stands in for; the log file has them


def without_lines(record: logging.LogRecord) -> bool:
    """A filter for loggers' handlers."""
    return not record.getMessage().startswith(LINES)


class Display:
    """Use as a context: whatever happens inside, the terminal is left as it was.

    Args:
        quiet (bool): Show warnings and errors only, on stderr. Defaults to False.
        console (Console, optional): Where the bar goes. Default: stdout; in it a bar only if that is a terminal.
    """

    def __init__(self, quiet: bool = False, console: Console | None = None):
        self.quiet, self.progress = quiet, None
        self.tasks = {}  # bars by name
        self.stack = ExitStack()
        console = console or Console()
        if not quiet and console.is_terminal and is_main_process():
            self.progress = Progress(
                TextColumn('{task.description:<14}'), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn(),
                TextColumn('eta'), TimeRemainingColumn(), TextColumn('{task.fields[numbers]}'), console=console,
                speed_estimate_period=math.inf)  # what lies between updates, as recording, is part of their speed

    def __enter__(self):
        if self.quiet:
            self.stack.enter_context(redirect_stdout(self.stack.enter_context(open(os.devnull, 'w'))))
        elif self.progress is not None:
            self.stack.enter_context(self.progress)
        return self

    def __exit__(self, *error):
        self.stack.close()

    def attach(self, runner) -> None:
        """Follows a runner from now on."""
        for handler in runner.logger.handlers:
            if type(handler) is not logging.StreamHandler:  # files keep everything
                continue
            if self.quiet:
                self.stack.callback(handler.setLevel, handler.level)
                self.stack.callback(handler.setStream, sys.__stdout__)
                handler.setStream(sys.stderr)
                handler.setLevel(max(handler.level, logging.WARNING))
            elif self.progress is not None:
                before = handler.setStream(sys.stdout)  # what prints above the bar
                handler.addFilter(without_lines)
                self.stack.callback(handler.removeFilter, without_lines)
                self.stack.callback(handler.setStream, before)
        if self.progress is not None:
            runner.register_hook(DisplayHook(self), 'VERY_LOW')

    def show(self, name: str, done: int, total: int, numbers: dict | None = None) -> None:
        """Move the bar of a name, which has one of its own; one that begins again is filled anew.

        Args:
            name (str): What stands before the bar.
            done, total (int): Steps.
            numbers (dict[str, float], optional): What stands beside the bar. Default: what stood there before.
        """
        if self.progress is None:
            return
        task = self.tasks.get(name)
        if task is None:
            task = self.tasks[name] = self.progress.add_task(name, total=total, completed=done - 1, numbers='')
        elif done < self.progress.tasks[task].completed:
            self.progress.reset(task, total=total)
        text = '  '.join(f'{key} {value:.4g}' for key, value in (numbers or {}).items())
        self.progress.update(task, completed=done, total=total, **(dict(numbers=text) if text else {}))

    def another(self, name: str) -> None:
        """Leave the bar of a name as it is: what comes next by this name gets a bar of its own."""
        self.tasks.pop(name, None)


class DisplayHook(Hook):
    """Tells a :class:`Display` how far a runner is."""

    def __init__(self, display: Display):
        self.display = display

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        stage = runner.train_loop.stage
        self.display.show(stage.name, stage.index + 1, stage.updates,
                          {name: outputs[name] for name in stage.shown if name in outputs})

    def after_test_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.display.show('evaluation', batch_idx + 1, len(runner.test_dataloader))

    def after_test_epoch(self, runner, metrics=None):
        self.display.another('evaluation')

    def after_stage_step(self, runner, stage, done, total):
        """See :meth:`psaq_mm.engine.DataFreeLoop.progress`."""
        self.display.show(stage, done, total)
