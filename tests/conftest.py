"""Small models every test can afford, and the names of the files tests share."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
DEMO_CONFIG = ROOT / 'demo' / 'mask_rcnn_swin_mini_scenes.py'
DEMO_CHECKPOINT = ROOT / 'demo' / 'mask_rcnn_swin_mini_scenes.pth'


def pytest_collection_modifyitems(items):
    """Begin with the longest tests, those with a time limit of their own: at the end they would run on one core."""
    items.sort(key=lambda item: item.get_closest_marker('timeout') is None)


def pytest_sessionfinish(session, exitstatus):
    """Leave no folders of tests behind where all passed: they take 20 GB. Workers leave that to their controller."""
    if exitstatus == 0 and not hasattr(session.config, 'workerinput'):
        shutil.rmtree(session.config._tmp_path_factory.getbasetemp(), ignore_errors=True)


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)


@pytest.fixture(scope='session', autouse=True)
def _scope():
    from mmengine.registry import init_default_scope

    from psaq_mm import registry  # noqa: F401
    init_default_scope('mmdet')


@pytest.fixture(autouse=True)
def _same_scope():
    yield
    from mmengine.config import Config

    from psaq_mm.engine.config import default_scope
    default_scope(Config(dict(default_scope='mmdet')))  # a segmentor sets its own


@pytest.fixture(scope='session')
def scenes(tmp_path_factory):
    """A few rendered scenes in the demo's layout: (folder, its val.json)."""
    sys.path.insert(0, str(ROOT / 'demo'))
    try:
        import scenes as renderer
    finally:
        sys.path.pop(0)
    folder = tmp_path_factory.mktemp('scenes')
    renderer.write_split(folder, 'val', 6, 2)
    renderer.write_split(folder, 'calib', 4, 3)
    renderer.write_objects(folder, 'val', 30, 5)
    renderer.write_objects(folder, 'calib', 8, 6)
    return folder


@pytest.fixture(scope='session')
def small_config(scenes, tmp_path_factory):
    """A config file on top of the demo's: few small images, few steps, the scenes above, the paper's recipe."""
    path = tmp_path_factory.mktemp('config') / 'small.py'
    path.write_text(f"""
_base_ = ['{DEMO_CONFIG}', '{ROOT}/configs/_base_/dfq.py']
load_from = '{DEMO_CHECKPOINT}'
quantization = dict(
    recipe='paper', synthesis=dict(num_images=6, batch_size=3, size=(64, 96), steps=4),
    game=dict(steps=8, evaluate_every=2, student_patience=3, image_patience=2), report=dict(images=2))
default_hooks = dict(logger=dict(interval=2))
val_dataloader = dict(dataset=dict(data_root='{scenes}/'))
test_dataloader = dict(dataset=dict(data_root='{scenes}/'))
calib_dataloader = dict(dataset=dict(data_root='{scenes}/'))
val_evaluator = dict(ann_file='{scenes}/val.json')
test_evaluator = dict(ann_file='{scenes}/val.json')
""")
    return path


def run_tool(*command, check=True, cwd=ROOT, timeout=900, threads=1):
    """Runs a Python script as a user would, one thread, output captured."""
    env = dict(os.environ, OMP_NUM_THREADS=str(threads), PYTHONWARNINGS='ignore')
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, cwd=cwd, env=env,
                          timeout=timeout)
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope='session')
def quantized_run(small_config, tmp_path_factory):
    """The work dir of one complete run of tools/dfq.py, and what it printed."""
    work_dir = tmp_path_factory.mktemp('run')
    done = run_tool('tools/dfq.py', small_config, '--work-dir', work_dir)
    return work_dir, done.stdout


def small_task(folder, scenes, task, **stanza):
    """A config file on top of one of the other demos': few images, few steps, on rendered images of this test run."""
    path = folder / f'small_{task}.py'
    stanza = dict(recipe='paper', synthesis=dict(num_images=6, batch_size=3, size=(96, 96), steps=4),
                  game=dict(steps=8, evaluate_every=2, student_patience=3, image_patience=2),
                  report=dict(images=2), **stanza)
    root = f'{scenes}/objects/' if task == 'classification' else f'{scenes}/'
    path.write_text(f"""
_base_ = ['{ROOT}/demo/dfq_{task}_w8a8.py']
quantization = {stanza}
default_hooks = dict(logger=dict(interval=2))
val_dataloader = dict(dataset=dict(data_root='{root}'))
test_dataloader = dict(dataset=dict(data_root='{root}'))
calib_dataloader = dict(dataset=dict(data_root='{root}'))
""")
    return path


@pytest.fixture(scope='session')
def segmentation_config(scenes, tmp_path_factory):
    return small_task(tmp_path_factory.mktemp('config'), scenes, 'segmentation')


@pytest.fixture(scope='session')
def classification_config(scenes, tmp_path_factory):
    return small_task(tmp_path_factory.mktemp('config'), scenes, 'classification')


@pytest.fixture(scope='session')
def segmentation_run(segmentation_config, tmp_path_factory):
    """As :func:`quantized_run`, of the segmentor."""
    work_dir = tmp_path_factory.mktemp('segmentation')
    done = run_tool('tools/dfq.py', segmentation_config, '--work-dir', work_dir)
    return work_dir, done.stdout
