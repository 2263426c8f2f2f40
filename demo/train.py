"""Trains the demo's full-precision checkpoint with stock mmdet, and packs it in half precision.

    python demo/train.py           # renders the data, trains, writes demo/mask_rcnn_swin_mini_scenes.pth

Took about an hour on one core of the machine it was made on. Goes on where it was interrupted.
"""
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
NAME = 'mask_rcnn_swin_mini_scenes'


def main():
    import mmdet
    import torch

    import psaq_mm.engine  # noqa: F401  (lets torch read mmengine's checkpoint)
    from psaq_mm.engine.checkpoint import plain
    work_dir = HERE.parent / 'work_dirs' / NAME
    subprocess.run([sys.executable, HERE / 'scenes.py', '--out', HERE / 'data', '--splits', 'train', 'val', 'calib'],
                   check=True)
    tool = Path(mmdet.__file__).parent / '.mim' / 'tools' / 'train.py'
    subprocess.run([sys.executable, tool, HERE / f'{NAME}.py', '--work-dir', work_dir, '--resume', 'auto'], check=True)
    last = Path((work_dir / 'last_checkpoint').read_text().strip())
    checkpoint = torch.load(last, map_location='cpu', weights_only=True)
    state = {k: v.half() if v.is_floating_point() else v for k, v in checkpoint['state_dict'].items()}
    out = HERE / f'{NAME}.pth'
    torch.save(dict(meta=plain(dict(dataset_meta=checkpoint['meta']['dataset_meta'])), state_dict=state), out)
    print(f'{out}: {out.stat().st_size / 1e6:.1f} MB')


if __name__ == '__main__':
    main()
