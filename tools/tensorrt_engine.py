"""Builds a TensorRT engine from an exported graph, on a machine with an NVIDIA GPU, and compares the two.

    python tools/export.py work_dirs/NAME --preset symmetric --size 800 1344
    python tools/tensorrt_engine.py work_dirs/NAME/int8/model.onnx
"""
import argparse
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

# By path: as a module of this name it would hide one of the user's.
common = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name('common.py'))))


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('graph', type=Path, help='model.onnx or features.onnx, which tools/export.py wrote')
    parser.add_argument('--out', type=Path, metavar='FILE', help='the engine (default: beside the graph, as .engine)')
    common.debug_argument(parser)
    return parser.parse_args()


def build(args):
    """Build, compare and write."""
    from psaq_mm.deploy.engine import build_engine
    target = args.out or args.graph.with_suffix('.engine')
    common.check_file('--out', target)
    print(build_engine(args.graph, target))
    print(f'wrote {target}')


if __name__ == '__main__':
    sys.exit(common.run(parse_args(), build))
