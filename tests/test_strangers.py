"""benchmarks/strangers.py: what it refuses to compare, and how it matches detections."""
import json
import runpy
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from .conftest import ROOT

SCRIPT = ROOT / 'benchmarks' / 'strangers.py'
matched = runpy.run_path(str(SCRIPT))['matched']


def box(left, score, image=1, kind=2):
    return dict(image_id=image, category_id=kind, bbox=[left, 5.0, 20.0, 20.0], score=score)


@pytest.mark.parametrize('theirs, share', [
    ([box(0, 0.9), box(50, 0.8)], 1), ([box(50, 0.9), box(0, 0.8)], 1), ([box(0.5, 0.9), box(50, 0.8)], 1),
    ([box(4, 0.9), box(50, 0.8)], 0.5), ([box(0, 0.9)], 0.5), ([box(0, 0.9), box(0, 0.8)], 0.5),
    ([box(0, 0.9, kind=3), box(50, 0.8, image=2)], 0), ([box(0, 0.9), box(50, 0.8), box(90, 0.1), box(95, 0.1)], 0.5)])
def test_detections_are_matched_one_by_one(theirs, share):
    assert matched([box(0, 0.9), box(50, 0.8)], theirs) == matched(theirs, [box(0, 0.9), box(50, 0.8)]) == share


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A model that never finds anything, and images."""
    folder = tmp_path_factory.mktemp('strangers')
    (folder / 'predict.py').write_text('''import json
import numpy as np
def read_card(model):
    return json.loads(model.with_name('model.json').read_text())
def runner(model, name, right):
    return lambda pixels: dict(boxes=np.zeros((1, 0, 4)), scores=np.zeros((1, 0)), labels=np.zeros((1, 0), int),
                               label_map=np.zeros((1, 8, 8), int), probabilities=np.array([[0.9, 0.1]]))
def read_image(path, card):
    return np.zeros((1, 8, 8, 3), np.uint8)
''')
    (folder / 'model.json').write_text(json.dumps(dict(classes=['car', 'tree'], runtimes=['onnxruntime', 'openvino'])))
    for name in ('images', 'images/car', 'images/tree', 'maps', 'wrong', 'raw'):
        (folder / name).mkdir()
    for name in ('images/a.png', 'images/car/1.png', 'images/tree/1.png', 'maps/a.png', 'wrong/b.png'):
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / name)
    Image.fromarray(np.full((8, 8), 2, np.uint8)).save(folder / 'raw' / 'a.png')
    (folder / 'val.json').write_text(json.dumps(dict(
        images=[dict(id=1, file_name='a.png', width=8, height=8)], annotations=[],
        categories=[dict(id=1, name='car'), dict(id=2, name='tree')])))
    (folder / 'metrics.json').write_text(json.dumps(dict(quantized={'accuracy/top1': 50.0})))
    return folder


def run(folder, *options):
    return subprocess.run([sys.executable, SCRIPT, folder / 'model.onnx', *map(str, options)], capture_output=True,
                          text=True)


@pytest.mark.parametrize('options, words', [
    (('--images', 'images', '--coco', 'val.json'), 'finds nothing in 1 images'),
    (('--images', 'images', '--maps', 'wrong'), 'has no label map (.png) with the name of an image'),
    (('--images', 'images', '--maps', 'raw'), 'a.png has class 2, and the model has 2'),
    (('--images', 'maps'), 'has no folders'), (('--images', 'none'), 'none does not exist'),
    (('--images', 'images', '--maps', 'maps', '--expect', 'metrics.json'), 'metrics.json has no mIoU')])
def test_what_cannot_be_compared_is_an_error(folder, options, words):
    done = run(folder, *(option if option.startswith('--') else folder / option for option in options))
    assert done.returncode and words in done.stderr and 'Traceback' not in done.stderr, done.stderr


def test_what_is_as_expected_passes_and_what_is_far_fails(folder):
    options = '--images', folder / 'images', '--expect', folder / 'metrics.json'
    done = run(folder, *options)
    assert done.returncode == 0 and 'onnxruntime top1: 50.00, the library 50.00' in done.stdout
    (folder / 'metrics.json').write_text(json.dumps(dict(quantized={'accuracy/top1': 50.2})))
    done = run(folder, *options)
    assert done.returncode == 1 and 'TOO FAR' in done.stdout
