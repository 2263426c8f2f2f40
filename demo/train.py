"""Trains the demos' full-precision checkpoints with stock mmdet, mmseg and mmengine, and packs them in half precision.

    python demo/train.py detection segmentation classification

Renders the data, trains, writes demo/NAME.pth. The detector took about an hour on one core of the machine it was made
on, the others a third of that; segmentation starts from the detector's backbone. Goes on where it was interrupted.
"""
import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
NAMES = dict(detection='mask_rcnn_swin_mini_scenes', segmentation='upernet_swin_mini_scenes',
             classification='vit_mini_objects')
TRAIN = """
import sys
from mmengine.config import Config
from mmengine.runner import Runner
import psaq_mm
cfg = Config.fromfile(sys.argv[1])
cfg.work_dir, cfg.resume = sys.argv[2], True
Runner.from_cfg(cfg).train()
"""


def train(name):
    """Trains one config and packs the last checkpoint's weights."""
    import torch

    import psaq_mm  # noqa: F401  (lets torch read mmengine's checkpoint)
    from psaq_mm.engine.checkpoint import plain
    work_dir = HERE.parent / 'work_dirs' / name
    subprocess.run([sys.executable, '-c', TRAIN, HERE / f'{name}.py', work_dir], check=True)
    last = Path((work_dir / 'last_checkpoint').read_text().strip())
    checkpoint = torch.load(last, map_location='cpu', weights_only=True)
    state = {k: v.half() if v.is_floating_point() else v for k, v in checkpoint['state_dict'].items()}
    out = HERE / f'{name}.pth'
    torch.save(dict(meta=plain(dict(dataset_meta=checkpoint['meta']['dataset_meta'])), state_dict=state), out)
    print(f'{out}: {out.stat().st_size / 1e6:.1f} MB')


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('tasks', nargs='*', choices=[*NAMES, []], help='default: all')
    args = parser.parse_args()
    sys.path.insert(0, str(HERE))
    import scenes
    scenes.write(HERE / 'data', scenes.SPLITS)
    for task in args.tasks or NAMES:
        train(NAMES[task])


if __name__ == '__main__':
    main()
