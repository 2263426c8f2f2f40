"""Small models every test can afford, and the names of the files tests share."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
DEMO_CONFIG = ROOT / 'demo' / 'mask_rcnn_swin_mini_scenes.py'
DEMO_CHECKPOINT = ROOT / 'demo' / 'mask_rcnn_swin_mini_scenes.pth'


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)


@pytest.fixture(scope='session', autouse=True)
def _scope():
    from mmengine.registry import init_default_scope

    from psaq_mm import registry  # noqa: F401
    init_default_scope('mmdet')


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
    return folder


@pytest.fixture(scope='session')
def small_config(scenes, tmp_path_factory):
    """A config file on top of the demo's: few small images, few steps, the scenes above."""
    path = tmp_path_factory.mktemp('config') / 'small.py'
    path.write_text(f"""
_base_ = ['{DEMO_CONFIG}', '{ROOT}/configs/_base_/dfq.py']
load_from = '{DEMO_CHECKPOINT}'
quantization = dict(
    synthesis=dict(num_images=6, batch_size=3, size=(64, 96), steps=4),
    game=dict(steps=8, evaluate_every=2, student_patience=3, image_patience=2))
default_hooks = dict(logger=dict(interval=2))
val_dataloader = dict(dataset=dict(data_root='{scenes}/'))
test_dataloader = dict(dataset=dict(data_root='{scenes}/'))
calib_dataloader = dict(dataset=dict(data_root='{scenes}/'))
val_evaluator = dict(ann_file='{scenes}/val.json')
test_evaluator = dict(ann_file='{scenes}/val.json')
""")
    return path


def run_tool(*command, check=True, cwd=ROOT, timeout=900):
    """Runs a Python script as a user would, one thread, output captured."""
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore')
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
