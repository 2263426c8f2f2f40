"""Real ImageNet weights: timm's DeiT-Tiny on 500 photographs; methods x bit-widths against full precision.

    python benchmarks/deit_tiny.py --bench ../shared/bench --out work_dirs/deit_tiny

Writes a Markdown table, a plot and JSON. The command skips finished parts. Calibration never sees the 500
evaluation images: 'real' uses 32 photographs of other classes, everything else uses none.
"""
import sys

from common import ROOT, material, run_grid

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
    """Write the config of the benchmark into a folder, and return its path and a title."""
    bench, out = material(bench, 'deit_tiny', 'val'), out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for split in ('val', 'calib'):  # the file name is the class index
        names = sorted(p.name for p in (bench / split).iterdir())
        (out / f'{split}.txt').write_text(''.join(f'{name} {int(name.split(".")[0])}\n' for name in names))
    config = out / 'deit_tiny.py'
    config.write_text(CONFIG.format(root=ROOT, bench=bench, out=out))
    return config, f'DeiT-Tiny, {len(list((bench / "val").iterdir()))} photographs'


if __name__ == '__main__':
    sys.exit(run_grid(__doc__, 'deit_tiny', write_config))
