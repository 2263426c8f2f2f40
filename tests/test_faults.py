"""Kills, damaged files, full disks, numbers that are none, too little memory, processes that die."""
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from mmengine.config import Config

from psaq_mm import files
from psaq_mm.engine import CheckpointError
from psaq_mm.engine import checkpoint as checkpoint_module
from psaq_mm.engine.checkpoint import interrupted_run
from psaq_mm.engine.pipeline import RUN, explained_failures
from psaq_mm.engine.stages import CalibrationStage
from psaq_mm.errors import UserError
from psaq_mm.stanza import QuantizationConfig

from .conftest import DEMO_CHECKPOINT, ROOT, run_tool
from .test_engine import config, killed_at, run, same, torchrun, uninterrupted, weights  # noqa: F401, fixtures

TOOL = ROOT / 'tools' / 'dfq.py'
EVERY = ['default_hooks.checkpoint.by_epoch=False', 'default_hooks.checkpoint.interval=1']


def saved(work_dir):
    return sorted((work_dir / RUN).glob('iter_*.pth'), key=lambda path: path.stat().st_mtime_ns)


# -- kills -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_killed_again_and_again_the_run_ends_in_the_same_checkpoint(small_config, quantized_run, tmp_path, seed):
    """SIGKILL at random times, a checkpoint being written after every update."""
    rng, kills, killed = random.Random(seed), 3 + 2 * (seed > 0), 0
    command = [sys.executable, ROOT / 'tools/dfq.py', small_config, '--work-dir', tmp_path, '--no-eval', '--resume',
               '--cfg-options', *EVERY]
    environment = dict(os.environ, OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore')
    for _ in range(kills):
        before = saved(tmp_path)
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 300
        while process.poll() is None and saved(tmp_path)[-1:] == before[-1:] and time.monotonic() < deadline:
            time.sleep(0.01)  # until it has got further
        time.sleep(rng.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed >= 2  # the last ones may come when the run is over
    for path in tmp_path.rglob('*.pth'):
        torch.load(path, weights_only=True)  # none is half written
    run_tool(*command[1:])
    assert same(weights(tmp_path), weights(quantized_run[0]))
    assert len(saved(tmp_path)) == 2 and not list(tmp_path.rglob('*.tmp'))


DAMAGES = dict(half=lambda content: content[:len(content) // 2], empty=lambda content: b'',
               overwritten=lambda content: content[:1000] + b'#' * (len(content) - 1000))


@pytest.mark.parametrize('damage', [pytest.param(damage, id=name, marks=[pytest.mark.slow] * (name != 'half'))
                                    for name, damage in DAMAGES.items()])
def test_a_damaged_checkpoint_is_passed_over(small_config, tmp_path, killed_at, uninterrupted, damage, capfd):  # noqa: F811
    killed_at(5)
    with pytest.raises(KeyboardInterrupt):
        run(config(small_config, tmp_path))
    killed_at(None)
    folder = tmp_path / RUN
    bad = folder / 'iter_7.pth'
    bad.write_bytes(damage((folder / 'iter_5.pth').read_bytes()))
    assert interrupted_run(folder) == str(folder / 'iter_5.pth')
    printed = ''.join(capfd.readouterr())
    assert 'iter_7.pth' in printed and 'Looking for an earlier one' in printed
    run(config(small_config, tmp_path), resume=True)
    assert same(weights(tmp_path), uninterrupted)
    for path in saved(tmp_path):
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match='none of the .* can be read: start afresh'):
        run(config(small_config, tmp_path), resume=True)


def test_files_of_others_are_no_checkpoints_to_resume(tmp_path):
    torch.save(dict(state_dict=dict(a=torch.ones(1)), meta={}), tmp_path / 'iter_9.pth')
    with pytest.raises(CheckpointError, match='none of the 1'):
        interrupted_run(tmp_path)
    (tmp_path / 'iter_9.pth').unlink()
    assert interrupted_run(tmp_path) is None


@pytest.mark.slow
def test_a_run_may_go_on_with_checkpointed_activations(small_config, tmp_path, killed_at, uninterrupted):  # noqa: F811
    """What an error about memory recommends."""
    killed_at(5)
    with pytest.raises(KeyboardInterrupt):
        run(config(small_config, tmp_path))
    killed_at(None)
    run(config(small_config, tmp_path, **{'synthesis.checkpointing': True}), resume=True)
    assert weights(tmp_path).keys() == uninterrupted.keys()


# -- disks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('step', ['fsync', 'replace'])
def test_a_file_is_whole_or_the_old_one(tmp_path, monkeypatch, step):
    path = tmp_path / 'a.pth'
    files.write_atomically(dict(a=torch.ones(1)), path)
    files.write_atomically(dict(a=torch.zeros(1)), path)
    with monkeypatch.context() as patch:
        patch.setattr(os, step, lambda *args: (_ for _ in ()).throw(OSError(errno.ENOSPC, 'No space left on device')))
        with pytest.raises(OSError, match='No space'):
            files.write_atomically(dict(a=torch.ones(1)), path)
    assert torch.load(path, weights_only=True)['a'] == 0 and os.listdir(tmp_path) == ['a.pth']


def full_for(monkeypatch, name):
    """Lets the disk be full when a file of this name is written."""
    original = files.write_atomically

    def write(content, path):
        if re.fullmatch(name, os.path.basename(path)):
            raise OSError(errno.ENOSPC, 'No space left on device', str(path))
        original(content, path)

    monkeypatch.setattr(files, 'write_atomically', write)
    monkeypatch.setattr(checkpoint_module, 'write_atomically', write)


@pytest.mark.slow
def test_a_disk_too_full_for_checkpoints_does_not_end_the_run(small_config, tmp_path, uninterrupted, monkeypatch,  # noqa: F811
                                                              capfd):
    cfg = config(small_config, tmp_path)
    cfg.default_hooks.checkpoint = dict(by_epoch=False, interval=2)
    full_for(monkeypatch, 'iter_([68]|1.).pth')
    run(cfg)
    assert same(weights(tmp_path), uninterrupted)
    assert [path.name for path in saved(tmp_path)] == ['iter_2.pth', 'iter_4.pth']
    assert 'iter_6.pth cannot be written' in ''.join(capfd.readouterr())


def test_a_disk_too_full_for_the_result_loses_nothing(small_config, tmp_path, uninterrupted, monkeypatch):  # noqa: F811
    cfg = config(small_config, tmp_path)
    cfg.default_hooks.checkpoint = dict(by_epoch=False, interval=2)
    with monkeypatch.context() as patch:
        full_for(patch, 'quantized.pth')
        with pytest.raises(UserError, match='No space left.*quantized.pth.*--resume goes on'):
            run(cfg)
    assert saved(tmp_path)[-1].name == 'iter_16.pth'
    run(cfg, resume=True)
    assert same(weights(tmp_path), uninterrupted)


LIMITED = 'import resource, runpy, sys; resource.setrlimit(resource.{0}, ({1}, {1})); sys.argv = sys.argv[1:]; ' \
          'sys.path.insert(0, "tools"); runpy.run_path(sys.argv[0], run_name="__main__")'


def test_a_real_limit_on_files_is_one_clear_error(small_config, tmp_path):
    done = run_tool('-c', LIMITED.format('RLIMIT_FSIZE', 500_000), 'tools/dfq.py', small_config, '--work-dir', tmp_path,
                    '--no-eval', '--cfg-options', 'default_hooks.checkpoint.by_epoch=False',
                    'default_hooks.checkpoint.interval=10', check=False)
    assert done.returncode == 2 and 'Traceback' not in done.stderr, done.stderr
    assert re.search(r'error: a file cannot be read or written.*File too large', done.stderr)
    assert 'iter_10.pth cannot be written' in done.stdout + done.stderr
    assert not list(tmp_path.rglob('*.pth')) and not list(tmp_path.rglob('*.tmp'))


def test_where_nothing_can_be_written_no_work_begins(small_config, tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='cannot write to .*--work-dir'):
        run(config(small_config, tmp_path / 'file' / 'out'))
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(UserError, match='has 0 MB left, [1-9].* MB are needed'):
        run(config(small_config, tmp_path / 'out'))


# -- numbers ---------------------------------------------------------------------------------------------------------


def test_a_teacher_that_overflows_is_named(small_config, tmp_path):
    content = torch.load(DEMO_CHECKPOINT, weights_only=True)
    content['state_dict']['backbone.patch_embed.projection.weight'] *= 1e38
    torch.save(content, tmp_path / 'c.pth')
    with pytest.raises(UserError, match='finite'):
        run(config(small_config, tmp_path / 'out'), checkpoint=str(tmp_path / 'c.pth'))


def test_a_block_without_finite_numbers_ends_the_reconstruction(small_config, tmp_path, monkeypatch):
    original = CalibrationStage.start

    def broken(stage):
        original(stage)
        stage.loop.student.get_submodule('backbone.stages.0.blocks.1.norm1').bias.data[0] = float('nan')

    monkeypatch.setattr(CalibrationStage, 'start', broken)
    with pytest.raises(UserError, match="'backbone.stages.0.blocks.1' puts out numbers that are not finite.*--amp"):
        run(config(small_config, tmp_path, **{
            'synthesis.method': 'noise', 'synthesis.num_images': 2, 'reconstruction.steps': 1,
            'reconstruction.views': 1}))
    assert not (tmp_path / 'quantized.pth').exists()


@pytest.mark.parametrize('at', [1, 6])
def test_a_game_that_breaks_keeps_the_best_student(small_config, tmp_path, monkeypatch, at, capfd):
    from psaq_mm.synthesis import Game
    original = Game.student_update

    def broken(self, rng):
        if self.student_updates + 1 >= at:
            next(iter(self.parameters.values())).data.fill_(float('nan'))
        return original(self, rng)

    monkeypatch.setattr(Game, 'student_update', broken)
    run(config(small_config, tmp_path, **{'game.evaluate_every': 1, 'game.student_patience': 99}))
    state = weights(tmp_path)
    assert all(torch.isfinite(value.float()).all() for value in state.values())
    assert f'The game ends early, at update {at}' in ''.join(capfd.readouterr())
    meta = torch.load(tmp_path / 'quantized.pth', weights_only=True)['meta']['game']
    assert meta['best'] <= meta['initial']


def test_real_images_that_are_none(small_config, tmp_path, monkeypatch):
    from mmdet.models import DetDataPreprocessor
    original = DetDataPreprocessor.forward

    def spoiled(self, *args):
        data = original(self, *args)
        data['inputs'][0, 0, 0, 0] = float('nan')
        return data

    monkeypatch.setattr(DetDataPreprocessor, 'forward', spoiled)
    with pytest.raises(UserError, match='batch 1 of calib_dataloader'):
        run(config(small_config, tmp_path, **{'synthesis.method': 'real'}))


# -- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('error', [torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB'), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory")], ids=lambda e: str(e))
def test_too_little_memory_says_what_to_do(small_config, error):
    with pytest.raises(UserError, match='out of memory with 3 images of 64 x 96.*checkpointing=True.*batch_size'):
        with explained_failures(config(small_config, 'out'), stanza_of(small_config)):
            raise error


def test_other_errors_are_not_taken_for_it(small_config):
    with pytest.raises(RuntimeError, match='a mistake of ours'):
        with explained_failures(config(small_config, 'out'), stanza_of(small_config)):
            raise RuntimeError('a mistake of ours')


def stanza_of(path):
    return QuantizationConfig.parse(Config.fromfile(path).quantization)


def test_a_real_limit_on_memory_is_one_clear_error(small_config, tmp_path):
    done = run_tool('-c', LIMITED.format('RLIMIT_AS', 12 << 30), 'tools/dfq.py', small_config, '--work-dir', tmp_path,
                    '--no-eval', '--cfg-options', 'quantization.synthesis.size=(40000,40000)', check=False)
    assert done.returncode == 2 and 'Traceback' not in done.stderr, done.stderr
    assert 'error: out of memory with 3 images of 40000 x 40000' in done.stderr


# -- the evaluation --------------------------------------------------------------------------------------------------


def test_an_evaluation_that_fails_loses_nothing(small_config, tmp_path, scenes):
    annotations = json.loads((scenes / 'val.json').read_text())
    annotations['images'][-1]['file_name'] = 'gone.png'  # the first one is tried before the work
    (tmp_path / 'val.json').write_text(json.dumps(annotations))
    done = run_tool('tools/dfq.py', small_config, '--work-dir', tmp_path / 'out', '--cfg-options',
                    f'test_dataloader.dataset.ann_file={tmp_path}/val.json', 'quantization.synthesis.method=noise',
                    check=False)
    assert done.returncode == 2
    assert re.search(r'error: .*quantized.pth is written, but the evaluation failed', done.stderr)
    assert weights(tmp_path / 'out') and (tmp_path / 'out' / 'metrics.json').exists()


# -- several processes -----------------------------------------------------------------------------------------------

DYING = """
import os, runpy, sys
from psaq_mm.engine.pipeline import RUN, explained_failures
from psaq_mm.engine.stages import CalibrationStage
from psaq_mm.errors import UserError
from psaq_mm.engine.stages import {stage}
from psaq_mm.stanza import QuantizationConfig
original = {stage}.step

def dies(self, rng):
    if os.environ['RANK'] == '1' and self.loop.iter >= {at}:
        {death}
    return original(self, rng)

{stage}.step = dies
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@pytest.mark.parametrize('stage, at, death, words', [
    ('GameStage', 6, "raise UserError('rank 1 has had enough')", 'error: rank 1 has had enough'),
    ('SynthesisStage', 2, 'os.kill(os.getpid(), 9)', r'exitcode\s*: -9')])
def test_a_process_that_dies_ends_the_job_with_its_error(small_config, tmp_path, stage, at, death, words):
    script = tmp_path / 'dying.py'
    script.write_text(DYING.format(stage=stage, at=at, death=death))
    started = time.monotonic()
    done = torchrun(small_config, tmp_path / 'out', '--no-eval', script=(script, TOOL), check=False)
    assert done.returncode and re.search(words, done.stderr), done.stderr
    assert time.monotonic() - started < 300  # nobody waits for the dead


@pytest.mark.slow
def test_two_processes_resume(small_config, tmp_path):
    """As with one: the same checkpoint in the end. With another number of them it is refused."""
    options = ['--no-eval', '--cfg-options', *EVERY[:1], 'default_hooks.checkpoint.interval=3']
    torchrun(small_config, tmp_path / 'whole', *options)
    script = tmp_path / 'dying.py'
    script.write_text(DYING.format(stage='GameStage', at=8, death="raise UserError('enough')"))
    done = torchrun(small_config, tmp_path / 'killed', *options, script=(script, TOOL), check=False)
    assert done.returncode and 'error: enough' in done.stderr
    assert not (tmp_path / 'killed' / 'quantized.pth').exists() and saved(tmp_path / 'killed')
    refused = run_tool('tools/dfq.py', small_config, '--work-dir', tmp_path / 'killed', '--no-eval', '--resume',
                       check=False)
    assert 'error: --resume: the interrupted run had 2 processes, this one has 1' in refused.stderr
    torchrun(small_config, tmp_path / 'killed', '--resume', *options)
    assert same(weights(tmp_path / 'killed'), weights(tmp_path / 'whole'))


ODD = """
import os
from psaq_mm.engine.stages import reconstruction
from psaq_mm.reconstruction.nested import floats
unrelated = reconstruction.unrelated
if os.environ['RANK'] == '1':
    reconstruction.unrelated = lambda exact, found: floats(exact)[0].shape[-1] == 64 or unrelated(exact, found)
"""


@pytest.mark.slow
def test_two_processes_resume_within_a_block(small_config, tmp_path):
    """The same checkpoint in the end. What one of them finds of the inputs of a block is so for both."""
    script = tmp_path / 'dying.py'

    def started(folder, at, *options, **kwargs):
        script.write_text(ODD + DYING.format(stage='ReconstructionStage', at=at, death="raise UserError('enough')"))
        return torchrun(
            small_config, folder, *options, '--no-eval', '--cfg-options', *EVERY[:1],
            'default_hooks.checkpoint.interval=3', 'quantization.recipe=low_bit', 'quantization.weight.bits=4',
            'quantization.activation.bits=4', 'quantization.reconstruction.steps=3',
            'quantization.reconstruction.views=1', 'quantization.game.steps=0', 'quantization.report.images=0',
            'quantization.keep_float=[backbone.stages.2.*,backbone.stages.3.*]',
            script=(script, TOOL), **kwargs)

    started(tmp_path / 'whole', 10**9)
    killed = tmp_path / 'killed'
    done = started(killed, 11, check=False)
    assert done.returncode and 'error: enough' in done.stderr and not (killed / 'quantized.pth').exists()
    states = torch.load(saved(killed)[-1], weights_only=True)['data_free']
    assert [state['stage'] for state in states] == ['reconstruction'] * 2
    assert all(state['state']['current'] is not None for state in states)
    started(killed, 10**9, '--resume')
    assert same(weights(killed), weights(tmp_path / 'whole'))
    log = ''.join(path.read_text() for path in (tmp_path / 'whole').rglob('*.log'))
    assert 'backbone.stages.1.blocks.0 learns from full-precision inputs alone' in log
    assert 'backbone.stages.0.blocks.0 learns from full-precision inputs alone' not in log
