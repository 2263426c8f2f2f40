"""Real data: nuclei in microscopy images, a trained Mask R-CNN + Swin; methods x bit-widths against full precision.

    python benchmarks/nuclei.py --bench ../shared/bench --out work_dirs/nuclei --bits W8A8 W4A8

Writes a Markdown table, a plot and JSON. The command skips finished parts. Calibration never sees the 64
evaluation images: 'real' uses 32 training images, everything else uses none.
"""
import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """
_base_ = ['{bench}/mask_rcnn_swin_mini_nuclei.py', '{root}/configs/_base_/dfq.py']
# The model's own test size; everything else at its default.
quantization = dict(synthesis=dict(size=(288, 288)))
"""


def write_config(bench, out):
    """Write the config of the benchmark into a folder, and return its path; None where the material is missing."""
    bench, out = (bench / 'nuclei').resolve(), out.resolve()
    if not (bench / 'mask_rcnn_swin_mini_nuclei.py').is_file():
        print(f'error: {bench} does not exist: --bench names the folder that holds nuclei/', file=sys.stderr)
        return None
    out.mkdir(parents=True, exist_ok=True)
    config = out / 'nuclei.py'
    config.write_text(CONFIG.format(root=ROOT, bench=bench))
    return config


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--bench', type=Path, required=True, help='folder with nuclei/')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/nuclei'))
    parser.epilog = 'everything else goes to tools/grid.py, e.g. --bits W4A8 --methods psaq_v2'
    args, rest = parser.parse_known_args()
    config = write_config(args.bench, args.out)
    if config is None:
        return 2
    title = 'Mask R-CNN + Swin, 64 images of nuclei'
    command = [sys.executable, ROOT / 'tools' / 'grid.py', config, '--work-dir', args.out, '--title', title, *rest]
    return subprocess.run(command).returncode


if __name__ == '__main__':
    sys.exit(main())
