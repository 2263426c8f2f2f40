"""Folders that belong to the user: psaq_mm replaces and removes only its own files, one command at a time."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from psaq_mm.engine import compare
from psaq_mm.engine.checkpoint import resumable_checkpoints
from psaq_mm.engine.pipeline import RUN
from psaq_mm.errors import UserError
from psaq_mm.files import OwnedFolder, as_data, temporary_beside

from .conftest import DEMO_CHECKPOINT, ROOT, run_tool
from .test_engine import config, killed_at, run, same, uninterrupted, weights  # noqa: F401, fixtures


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def test_what_psaq_mm_wrote_it_replaces(tmp_path):
    folder = OwnedFolder(tmp_path / 'new')
    folder.write('a.bin', b'1')
    folder.write('a.bin', b'2')
    assert (tmp_path / 'new' / 'a.bin').read_bytes() == b'2' and folder.is_ours('a.bin')
    assert OwnedFolder(tmp_path / 'new').foreign(['a.bin', 'b.bin']) == []


@pytest.mark.parametrize('spoil, words', [
    (lambda path: path.write_bytes(b'mine'), 'was changed after psaq_mm wrote it'),
    (lambda path: (path.unlink(), path.symlink_to('nowhere')), 'was changed')])
def test_what_was_changed_since_is_the_users(tmp_path, spoil, words):
    folder = OwnedFolder(tmp_path, '--there')
    spoil(folder.write('a.bin', b'1'))
    before = contents(tmp_path)
    for attempt in (lambda: folder.claim(['a.bin']), lambda: folder.write('a.bin', b'2')):
        with pytest.raises(UserError, match=f'a.bin {words}.*move it away, or choose another folder with --there'):
            attempt()
    assert contents(tmp_path) == before


def test_a_file_of_that_name_is_the_users(tmp_path):
    (tmp_path / 'a.bin').write_bytes(b'mine')
    with pytest.raises(UserError, match='a.bin was not written by psaq_mm'):
        OwnedFolder(tmp_path).claim(['b.bin', 'a.bin'])


def fill(folder, names, content='ours'):
    folder.mkdir()
    for name in names:
        (folder / name).write_text(content)


def test_a_folder_is_replaced_and_the_users_files_in_it_stay(tmp_path):
    own = OwnedFolder(tmp_path)
    for names in (['0.png', '1.png', '2.png'], ['0.png', '1.png']):
        with own.writing('images') as folder:
            fill(folder, names)
    assert sorted(os.listdir(tmp_path / 'images')) == ['0.png', '1.png']
    (tmp_path / 'images' / '1.png').write_text('mine')
    (tmp_path / 'images' / '.DS_Store').write_text('hidden files of file managers disturb nobody')
    assert own.foreign(['images']) == ['images/1.png']
    with pytest.raises(UserError, match='images/1.png was changed'), own.writing('images') as folder:
        fill(folder, ['0.png', '1.png'], 'new')
    assert (tmp_path / 'images' / '1.png').read_text() == 'mine'
    assert (tmp_path / 'images' / '0.png').read_text() == 'ours'
    with own.writing('images') as folder:
        fill(folder, ['0.png'], 'new')
    assert (tmp_path / 'images' / '1.png').read_text() == 'mine'  # and not removed either


def test_a_body_that_fails_leaves_what_was_there(tmp_path):
    own = OwnedFolder(tmp_path)
    own.write('a.bin', b'1')
    with pytest.raises(RuntimeError), own.writing('a.bin') as path:
        path.write_bytes(b'half')
        raise RuntimeError
    assert (tmp_path / 'a.bin').read_bytes() == b'1' and own.is_ours('a.bin')
    assert not list((tmp_path / OwnedFolder.STATE / 'tmp').iterdir())


@pytest.mark.parametrize('at', [0, 1])
def test_killed_between_manifest_and_file_it_still_knows_its_own(tmp_path, monkeypatch, at):
    own, calls, replace = OwnedFolder(tmp_path), [], os.replace
    own.write('a.bin', b'1')

    def killed(source, target):
        if target == tmp_path / 'a.bin':
            if at:
                replace(source, target)
            raise KeyboardInterrupt
        calls.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', killed)
        with pytest.raises(KeyboardInterrupt):
            own.write('a.bin', b'2')
    assert (tmp_path / 'a.bin').read_bytes() == [b'1', b'2'][at] and calls
    assert OwnedFolder(tmp_path).is_ours('a.bin')


def test_a_sub_folder_of_ones_own(tmp_path):
    own = OwnedFolder(tmp_path)
    assert own.own('logs') == tmp_path / 'logs'
    (tmp_path / 'logs' / 'a.log').write_text('')
    half = temporary_beside(tmp_path / 'logs/iter_4.pth')
    half.write_text('of a process that was killed')
    own.own('logs')
    assert not half.exists()
    (tmp_path / 'mine').mkdir()
    own.own('mine')  # empty
    fill(tmp_path / 'other', ['a'])
    with pytest.raises(UserError, match='other/? was not written by psaq_mm'):
        own.own('other')


HOLD = """
import sys
from psaq_mm.files import OwnedFolder
with OwnedFolder(sys.argv[1]).lock():
    print('held', flush=True)
    sys.stdin.read()
"""


def test_one_command_at_a_time_and_a_dead_one_holds_nothing(tmp_path):
    holder = subprocess.Popen([sys.executable, '-c', HOLD, str(tmp_path)], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert holder.stdout.readline() == 'held\n'
        with pytest.raises(UserError, match=f'at work in .*process {holder.pid} on .*since 2.*--work-dir'):
            with OwnedFolder(tmp_path).lock():
                pass
    finally:
        holder.kill()
        holder.wait()
    with OwnedFolder(tmp_path).lock():
        pass


def test_a_name_that_the_locale_cannot_read_is_refused(tmp_path):
    with pytest.raises(UserError, match='PYTHONUTF8=1.*--work-dir'), OwnedFolder(tmp_path / 'Gr\udcc3\udcbc').lock():
        pytest.fail('it has begun')
    assert not list(tmp_path.iterdir())


def test_classes_and_paths_among_inputs_are_text():
    assert as_data(dict(a=(1, Path('b')), kind=dict)) == dict(a=[1, 'b'], kind="<class 'dict'>")


def test_a_folder_in_which_nothing_was_written_goes_away(tmp_path):
    for name, content, stays in (('new/inner', None, False), ('new', 'a.bin', True), ('old', None, True)):
        (tmp_path / 'old').mkdir(exist_ok=True)
        own = OwnedFolder(tmp_path / name)
        with own.lock():
            if content:
                own.write(content, b'1')
        assert own.path.exists() == stays and (stays or not (tmp_path / 'new').exists())


# -- the whole run ---------------------------------------------------------------------------------------------------


def training_run(folder):
    """What an iteration-based training run of mmdet or mmseg leaves, and files that are named as ours are."""
    folder.mkdir()
    content = torch.load(DEMO_CHECKPOINT, weights_only=True)
    for name in ('iter_2.pth', 'iter_80000.pth', 'epoch_3.pth', 'best_coco_bbox_mAP_epoch_3.pth'):
        torch.save(content, folder / name)
    (folder / 'last_checkpoint').write_text(str(folder / 'iter_80000.pth'))
    (folder / 'small.py').write_text('mine = 1')
    (folder / '20260101_000000').mkdir()
    (folder / '20260101_000000' / '20260101_000000.log').write_text('mine')
    return folder


def test_the_work_dir_of_a_training_run_keeps_everything(small_config, tmp_path, uninterrupted, killed_at):  # noqa: F811
    folder = training_run(tmp_path / 'work')
    before = contents(folder)
    source = str(folder / 'iter_80000.pth')
    killed_at(3)
    with pytest.raises(KeyboardInterrupt):
        run(config(small_config, folder), checkpoint=source)
    killed_at(None)
    run(config(small_config, folder), checkpoint=source, resume=True)
    after = contents(folder)
    assert {path: after.get(path) for path in before} == before
    assert same(weights(folder), uninterrupted)
    assert [path.name for path in resumable_checkpoints(folder / RUN)] == ['iter_3.pth']
    assert not (set(path for path in after if path.parent == folder) - set(before) - {
        folder / name for name in ('quantized.pth', 'test_config.py', 'metrics.json', 'report.html', 'fresh.pt',
                                   'synthetic.png', 'synthetic.pt')})
    torch.save(dict(mine=1), folder / 'quantized.pth')
    mine = (folder / 'quantized.pth').read_bytes()
    with pytest.raises(UserError, match='quantized.pth was changed after psaq_mm wrote it'):
        run(config(small_config, folder), checkpoint=source)
    assert (folder / 'quantized.pth').read_bytes() == mine


@pytest.mark.parametrize('name', ['quantized.pth', 'test_config.py', 'synthetic/0000.png', 'calibration_set/notes.txt',
                                  'data_free/iter_1.pth', 'metrics.json'])
def test_files_of_the_user_that_are_named_as_ours_end_the_run_early(small_config, tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('mine')
    with pytest.raises(UserError, match=f'{name.partition("/")[0]}.* was not written by psaq_mm'):
        run(config(small_config, tmp_path))
    assert (tmp_path / name).read_text() == 'mine'


@pytest.mark.parametrize('name', ['W4A8_psaq_v1/quantized.pth', 'full_precision/compared.json'])
def test_a_comparison_finds_a_file_of_the_users_before_its_first_part(small_config, tmp_path, name):
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_text('mine')
    with pytest.raises(UserError, match=f'{name} was not written by psaq_mm'):
        compare(config(small_config, tmp_path), ['noise', 'psaq_v1'], [(8, 8), (4, 8)], tmp_path)
    assert (tmp_path / name).read_text() == 'mine' and not (tmp_path / 'W8A8_noise').exists()


def test_a_checkpoint_named_as_ours_is_read_and_stays(small_config, tmp_path):
    from psaq_mm.engine.checkpoint import in_own_layout
    path = tmp_path / 'full_precision.pth'
    torch.save(torch.load(DEMO_CHECKPOINT, weights_only=True), path)
    before = path.read_bytes()
    run(config(small_config, tmp_path, **{'synthesis.method': 'noise'}), checkpoint=str(path))
    with pytest.raises(UserError, match='full_precision.pth was not written by psaq_mm'):
        in_own_layout(dict(why='has other keys', path=str(path), meta={}, state_dict={}), OwnedFolder(tmp_path))
    assert path.read_bytes() == before


def test_a_second_run_in_the_same_work_dir_is_refused(small_config, tmp_path):
    with OwnedFolder(tmp_path).lock():
        done = run_tool('tools/dfq.py', small_config, '--work-dir', tmp_path, '--no-eval', check=False)
    assert done.returncode == 2 and f'process {os.getpid()} on' in done.stderr
    assert not (tmp_path / 'test_config.py').exists()


def test_resume_says_when_there_is_nothing_to_resume(small_config, quantized_run, tmp_path, capfd):
    import shutil
    run(config(small_config, tmp_path / 'new', **{'synthesis.method': 'noise'}), resume=True)
    assert 'holds no interrupted run, this one starts afresh' in ''.join(capfd.readouterr())
    shutil.copytree(quantized_run[0], tmp_path / 'done')
    before = contents(tmp_path / 'done')
    for stanza in ({}, {'weight.bits': 4}):  # at other bits, too
        with pytest.raises(UserError, match='quantized.pth is finished, nothing is left to resume'):
            run(config(small_config, tmp_path / 'done', **stanza), resume=True)
    assert {path: content for path, content in contents(tmp_path / 'done').items()} == before


@pytest.mark.slow
def test_a_fresh_start_beside_an_interrupted_run_is_said(small_config, tmp_path, killed_at, capfd):  # noqa: F811
    killed_at(2)
    with pytest.raises(KeyboardInterrupt):
        run(config(small_config, tmp_path))
    with pytest.raises(KeyboardInterrupt):
        run(config(small_config, tmp_path))
    assert 'holds an interrupted run, and this one starts afresh' in ''.join(capfd.readouterr())


def test_an_earlier_result_stays_whole_until_the_next_one_is(small_config, quantized_run, tmp_path, killed_at):  # noqa: F811
    import shutil
    folder = tmp_path / 'done'
    shutil.copytree(quantized_run[0], folder)
    before = contents(folder)
    killed_at(3)
    with pytest.raises(KeyboardInterrupt):
        run(config(small_config, folder, **{'weight.bits': 4}))
    after = contents(folder)
    names = ('quantized.pth', 'test_config.py', 'metrics.json', 'report.html')
    assert all(after[folder / name] == before[folder / name] for name in names)


def test_weights_that_do_not_reach_the_student_end_the_run(small_config, tmp_path, monkeypatch):
    from psaq_mm.engine import pipeline
    content = torch.load(DEMO_CHECKPOINT, weights_only=True)
    content['state_dict']['neck.lateral_convs.0.conv.weight'] += 1
    torch.save(content, tmp_path / 'other.pth')
    original = pipeline.data_free_config

    def other(*args, **kwargs):
        made = original(*args, **kwargs)
        made.load_from = str(tmp_path / 'other.pth')
        return made

    monkeypatch.setattr(pipeline, 'data_free_config', other)
    with pytest.raises(UserError, match='did not get its weights .neck.lateral_convs.0.conv.weight and 0 more'):
        run(config(small_config, tmp_path / 'out'))


def test_the_librarys_test_tool_leaves_the_results_alone(quantized_run):
    """It writes its copy of the config into the config's work dir."""
    cfg = Config.fromfile(quantized_run[0] / 'test_config.py')
    assert cfg.work_dir == str(quantized_run[0] / RUN)
    manifest = json.loads((quantized_run[0] / OwnedFolder.STATE / 'manifest.json').read_text())['files']
    assert {'quantized.pth', 'test_config.py', 'report.html', f'{RUN}/', 'synthetic/0000.png'} <= manifest.keys()
    assert OwnedFolder(quantized_run[0]).foreign(name for name in manifest) == []


def test_an_export_leaves_the_users_files_alone(quantized_run, tmp_path):
    from psaq_mm.deploy import export
    (tmp_path / 'int8.pth').write_text('mine')
    with pytest.raises(UserError, match='int8.pth was not written by psaq_mm'):
        export(Config.fromfile(quantized_run[0] / 'test_config.py'), str(quantized_run[0] / 'quantized.pth'),
               str(tmp_path))
    assert (tmp_path / 'int8.pth').read_text() == 'mine' and not (tmp_path / 'features.onnx').exists()
