"""A new stage is one file and one line: everything else takes its name, numbers and state from it."""
import io
import json

import pytest
import torch
from rich.console import Console

from psaq_mm.engine.display import Display
from psaq_mm.engine.hooks import QuantizedCheckpointHook
from psaq_mm.engine.pipeline import RUN
from psaq_mm.engine.stages import STAGES, Stage

from .test_engine import config, killed_at, run  # noqa: F401


class Waves(Stage):
    """Counts its updates."""
    name, shown, curve = 'waves', ('height', ), 'height'

    def __init__(self, loop):
        super().__init__(loop)
        self.updates, self.count = 6, 0

    def start(self):
        self.announce('waves')
        if self.restored is not None:
            self.count = self.restored['count']

    def step(self, rng):
        self.count += 1
        return dict(height=self.count / 8, hidden=rng.random())

    def summary(self):
        return dict(count=self.count)

    def state_dict(self):
        return dict(count=self.count)


def test_a_stage_needs_nothing_else(small_config, tmp_path, monkeypatch, killed_at):  # noqa: F811
    """Interrupted and resumed, its numbers are in history, log, bar, report and results."""
    displays, histories = [], []

    def display(quiet):
        displays.append(Display(console=Console(force_terminal=True, file=io.StringIO())))
        return displays[-1]

    monkeypatch.setattr('psaq_mm.engine.loop.STAGES', (*STAGES, Waves))
    monkeypatch.setattr('psaq_mm.engine.pipeline.Display', display)
    monkeypatch.setattr(QuantizedCheckpointHook, 'before_train', lambda hook, runner: histories.append(
        runner.train_loop.history))
    stanza = {'synthesis.method': 'noise', 'synthesis.num_images': 2, 'report.images': 0}
    killed_at(3)
    with pytest.raises(KeyboardInterrupt):
        run(config(small_config, tmp_path, **stanza))
    saved, = torch.load(tmp_path / RUN / 'iter_3.pth', weights_only=True)['data_free']
    assert saved['stage'] == 'waves' and saved['state'] == dict(count=3)
    killed_at(None)
    result = run(config(small_config, tmp_path, **stanza), resume=True)

    assert [(update['stage'], update['index'], update['height']) for update in histories[-1]] == [
        ('waves', index, (index + 1) / 8) for index in range(6)]
    for shown, numbers in zip(displays, (['height 0.375'], ['height 0.75'])):
        assert [task.fields['numbers'] for task in shown.progress.tasks if task.description == 'waves'] == numbers
    logs = ''.join(path.read_text() for path in tmp_path.rglob('*.log'))
    assert 'Stage 2/2: waves' in logs and ' height: ' in logs and ' hidden: ' in logs
    waves = json.loads((tmp_path / 'metrics.json').read_text())['stages']['waves']
    assert waves == result['stages']['waves'] and waves['count'] == 6 and waves['minutes'] >= 0
    assert 'count' not in result['stages']['calibration'] and 'minutes' in result['stages']['calibration']
    assert torch.load(tmp_path / 'quantized.pth', weights_only=True)['meta']['waves'] == dict(count=6)
    report = (tmp_path / 'report.html').read_text()
    assert '<h2>Waves</h2>' in report and '>update of waves</text>' in report and ' waves 0.' in report
