"""Real data: nuclei in microscopy images, a trained Mask R-CNN + Swin; methods x bit-widths against full precision.

    python benchmarks/nuclei.py --bench ../shared/bench --out work_dirs/nuclei --bits W8A8 W4A8

Writes a Markdown table, a plot and JSON. The command skips finished parts. Calibration never sees the 64
evaluation images: 'real' uses 32 training images, everything else uses none.
"""
import sys

from common import ROOT, material, run_grid

CONFIG = """
_base_ = ['{bench}/mask_rcnn_swin_mini_nuclei.py', '{root}/configs/_base_/dfq.py']
# The model's own test size; everything else at its default.
quantization = dict(synthesis=dict(size=(288, 288)))
"""


def write_config(bench, out):
    """Write the config of the benchmark into a folder, and return its path and a title."""
    bench, out = material(bench, 'nuclei', 'mask_rcnn_swin_mini_nuclei.py'), out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    config = out / 'nuclei.py'
    config.write_text(CONFIG.format(root=ROOT, bench=bench))
    return config, 'Mask R-CNN + Swin, 64 images of nuclei'


if __name__ == '__main__':
    sys.exit(run_grid(__doc__, 'nuclei', write_config))
