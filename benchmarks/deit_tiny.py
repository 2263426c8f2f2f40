"""Real ImageNet weights: timm's DeiT-Tiny on 500 photographs; methods x bit-widths against full precision.

    python benchmarks/deit_tiny.py --bench ../shared/bench --out work_dirs/deit_tiny

Writes a Markdown table, a plot and JSON. The command skips finished parts. Calibration never sees the 500
evaluation images: 'real' uses 32 photographs of other classes, everything else uses none.
"""
import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """
_base_ = ['{root}/configs/deit_t_w8a8.py']
load_from = '{bench}/deit_tiny_patch16_224.pth'
# The photographs are resized already: their shorter side has 256 pixels.
test_pipeline = [
    dict(type='LoadImageFromFile', imdecode_backend='pillow'),
    dict(type='mmcv.CenterCrop', crop_size=224),
    dict(type='PackClassificationInputs')
]
test_dataloader = dict(num_workers=0, dataset=dict(
    data_root='{bench}', data_prefix=dict(img_path='val'), ann_file='{out}/val.txt', pipeline=test_pipeline))
calib_dataloader = dict(
    batch_size=8, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='ImageFolder', data_root='{bench}', data_prefix=dict(img_path='calib'),
                 ann_file='{out}/calib.txt', test_mode=True, pipeline=test_pipeline))
"""


def write_config(bench, out):
    """Write the config of the benchmark into a folder, and return its path; None where the material is missing."""
    bench, out = (bench / 'deit_tiny').resolve(), out.resolve()
    if not (bench / 'val').is_dir():
        print(f'error: {bench} does not exist: --bench names the folder that holds deit_tiny/', file=sys.stderr)
        return None
    out.mkdir(parents=True, exist_ok=True)
    for split in ('val', 'calib'):  # the file name is the class index
        names = sorted(p.name for p in (bench / split).iterdir())
        (out / f'{split}.txt').write_text(''.join(f'{name} {int(name.split(".")[0])}\n' for name in names))
    config = out / 'deit_tiny.py'
    config.write_text(CONFIG.format(root=ROOT, bench=bench, out=out))
    return config


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--bench', type=Path, required=True, help='folder with deit_tiny/')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/deit_tiny'))
    parser.epilog = 'everything else goes to tools/grid.py, e.g. --bits W4A8 --methods psaq_v2'
    args, rest = parser.parse_known_args()
    config = write_config(args.bench, args.out)
    if config is None:
        return 2
    title = f'DeiT-Tiny, {len((args.out / "val.txt").read_text().splitlines())} photographs'
    command = [sys.executable, ROOT / 'tools' / 'grid.py', config, '--work-dir', args.out, '--title', title, *rest]
    return subprocess.run(command).returncode


if __name__ == '__main__':
    sys.exit(main())
