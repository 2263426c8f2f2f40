"""benchmarks/strangers.py fails where nothing was compared, and matches detections one by one."""
import importlib.util
import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image

from psaq_mm.deploy.card import reduces_zero_label

from .conftest import ROOT, run_tool


@pytest.fixture(scope='module')
def strangers():
    spec = importlib.util.spec_from_file_location('strangers', ROOT / 'benchmarks' / 'strangers.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BOXES = np.float32([[0, 0, 10, 10], [20, 20, 40, 40], [5, 5, 30, 12]])
KINDS = dict(
    boxes=dict(boxes=BOXES[None], scores=np.float32([[0.9, 0.5, 0.2]]), labels=np.int64([[0, 1, 1]])),
    label_map=dict(label_map=np.uint8([[[0, 1], [1, 1]]])),
    probabilities=dict(probabilities=np.float32([[0.1, 0.9]])), depth=dict(depth=np.ones((1, 2, 2), np.float32)))


@pytest.fixture()
def run(strangers, monkeypatch, tmp_path, capsys):
    """Run the benchmark on answers that are given; returns its exit status or line, and what it printed."""
    def run(kind, *options, other=None, **card):
        outputs = [dict(name=name) for name in KINDS[kind]]
        card = dict(dict(classes=['a', 'b'], reduce_zero_label=False, outputs=outputs), **card)
        answers = dict(onnxruntime=KINDS[kind], openvino=other or KINDS[kind])
        monkeypatch.setattr(strangers, 'ABSENT', ())
        monkeypatch.setattr(strangers, 'script_of', lambda model: SimpleNamespace(
            read_card=lambda model: card, runner=lambda model, name, card: lambda pixels: answers[name],
            read_image=lambda path, card: np.asarray(Image.open(path))[None]))
        monkeypatch.setattr(sys, 'argv', ['strangers.py', 'model.onnx', *map(str, options)])
        try:
            status = strangers.main()
        except SystemExit as error:
            status = error.code
        assert not isinstance(status, str) or len(status.splitlines()) == 1
        return status, capsys.readouterr().out
    return run


@pytest.fixture()
def data(tmp_path):
    """Images, label maps and annotations that the answers above agree with."""
    for name in ('images', 'maps', 'empty', 'objects/a', 'objects/b'):
        (tmp_path / name).mkdir(parents=True)
    for path in ('images/1.png', 'objects/b/1.png'):
        Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(tmp_path / path)
    Image.fromarray(KINDS['label_map']['label_map'][0]).save(tmp_path / 'maps' / '1.png')
    objects = [dict(id=i + 1, image_id=1, category_id=int(label), iscrowd=0, area=float(w * h), bbox=[x, y, w, h])
               for i, ((x, y, w, h), label) in enumerate(zip([[0, 0, 10, 10], [20, 20, 20, 20]], [7, 9]))]
    (tmp_path / 'coco.json').write_text(json.dumps(dict(
        images=[dict(id=1, file_name='1.png', width=50, height=50)], annotations=objects,
        categories=[dict(id=7, name='a'), dict(id=9, name='b')])))
    return tmp_path


def expect(folder, **values):
    path = folder / 'metrics.json'
    path.write_text(json.dumps(dict(quantized=values)))
    return '--expect', path


def test_numbers_are_compared(run, data):
    maps = '--images', data / 'images', '--maps', data / 'maps'
    assert run('label_map', *maps, *expect(data, mIoU=100))[0] == 0
    status, text = run('label_map', *maps, *expect(data, mIoU=99.8))
    assert status == 1 and 'onnxruntime miou: 100.00, the library 99.80  TOO FAR' in text
    assert run('probabilities', '--images', data / 'objects', *expect(data, **{'accuracy/top1': 100}))[0] == 0
    coco = '--images', data / 'images', '--coco', data / 'coco.json'
    status, text = run('boxes', *coco, *expect(data, **{'coco/bbox_mAP': 1.0}))
    assert status == 0 and 'openvino box: 100.00, the library 100.00' in text
    assert 'score of 0.0 and more, matched one by one: 3 of 3 in onnxruntime and of 3 in openvino' in text
    other = dict(KINDS['boxes'], boxes=BOXES[None] + np.float32([0, 0, 0, 5]) * np.float32([[[0], [0], [1]]]))
    status, text = run('boxes', *coco, other=other)
    assert 'score of 0.0 and more, matched one by one: 2 of 3' in text and 'score of 0.3 and more, matched' in text
    assert '2 of 2 in onnxruntime and of 2 in openvino' in text


def test_a_graph_that_finds_nothing_is_an_error(run, data):
    empty = {name: value[:, :0] for name, value in KINDS['boxes'].items()}
    status, text = run('boxes', '--images', data / 'images', '--coco', data / 'coco.json', other=empty)
    assert 'onnxruntime box: 100.00' in text and 'the graph finds nothing in the 1 images of' in status


@pytest.mark.parametrize('kind, options, words', [
    ('label_map', dict(images='images', maps='empty'), 'no image in .*images has a label map in .*empty'),
    ('label_map', dict(images='empty', maps='maps'), 'no image in .*empty has a label map'),
    ('label_map', dict(images='images', maps='nowhere'), 'nowhere: there is no such folder'),
    ('label_map', dict(images='nowhere', maps='maps'), 'nowhere: there is no such folder'),
    ('label_map', dict(images='images'), '--maps is needed'),
    ('boxes', dict(images='images', maps='maps'), '--coco is needed'),
    ('probabilities', dict(images='objects', maps='maps'), '--maps is of no use'),
    ('depth', dict(images='images'), 'the model answers with depth'),
    ('probabilities', dict(images='empty'), 'has 0 folders with 0 images'),
    ('probabilities', dict(images='.'), 'has 4 folders'),
    ('boxes', dict(images='images', coco='nowhere.json'), 'nowhere.json cannot be read as annotations of COCO'),
    ('boxes', dict(images='images', coco='bad.json'), 'bad.json cannot be read as annotations of COCO'),
    ('boxes', dict(images='images', coco='other.json'), 'other.json has no category a'),
    ('boxes', dict(images='images', coco='none.json'), 'none.json has no objects'),
    ('label_map', dict(images='images', maps='maps', expect='none.json'), "does not say under 'quantized'"),
    ('label_map', dict(images='images', maps='maps', expect='lacking.json'), 'mIoU'),
    ('label_map', dict(images='images', maps='maps', expect='nowhere.json'), 'nowhere.json does not say')])
def test_it_fails_where_there_is_nothing_to_compare(run, data, kind, options, words):
    coco = json.loads((data / 'coco.json').read_text())
    for name, content in (('bad', {}), ('none', dict(coco, annotations=[])),
                          ('other', dict(coco, categories=[dict(id=1, name='c')])),
                          ('lacking', dict(quantized={'coco/bbox_mAP': 0.5}))):
        (data / f'{name}.json').write_text(json.dumps(content))
    given = [item for name, path in options.items() for item in (f'--{name}', data / path)]
    status, _ = run(kind, *given)
    assert isinstance(status, str) and re.search(words, status), status


def test_labels_that_begin_at_1(run, data):
    """Are those of the model where an evaluation ignores label 0, and are told of where they cannot be."""
    maps = '--images', data / 'images', '--maps', data / 'maps'
    Image.fromarray(np.uint8([[1, 2], [0, 255]])).save(data / 'maps' / '1.png')
    status, _ = run('label_map', *maps)
    assert '1.png has label 2, and the model 2 classes: give the label maps that an evaluation reads' in status
    status, text = run('label_map', *maps, reduce_zero_label=True)
    assert status == 0 and 'onnxruntime miou: 100.00' in text
    Image.fromarray(np.full((3, 2), 255, np.uint8)).save(data / 'maps' / '1.png')
    assert 'is no label map of 2 x 2 pixels' in run('label_map', *maps)[0]
    Image.fromarray(np.full((2, 2), 255, np.uint8)).save(data / 'maps' / '1.png')
    assert 'no pixel that is not ignored' in run('label_map', *maps)[0]


@pytest.mark.parametrize('dataset, expected', [
    (dict(type='mmseg.ADE20KDataset'), True), (dict(type='mmseg.ADE20KDataset', reduce_zero_label=False), False),
    (dict(type='mmseg.CityscapesDataset'), False), (dict(type='mmseg.CityscapesDataset', reduce_zero_label=True), True),
    (dict(type='Unknown'), False), (dict(), False),
    (dict(type='mmseg.BaseSegDataset', pipeline=[dict(type='LoadAnnotations', reduce_zero_label=True)]), True)])
def test_a_card_knows_whether_labels_begin_at_1(dataset, expected):
    import mmseg.datasets  # noqa: F401
    assert reduces_zero_label(Config(dict(test_dataloader=dict(dataset=dataset)))) == expected


def test_detections_serve_once(strangers):
    one = [BOXES[:1], np.float32([0.9]), np.int64([0])]
    twice = [np.repeat(value, 2, 0) for value in one]
    assert strangers.pairs_of(twice, one) == [(0, 0)] and strangers.pairs_of(one, [v[:0] for v in one]) == []
    assert strangers.matched(dict(a=twice), dict(a=one)) == (1, 2, 1)
    for other in ([BOXES[:1], np.float32([0.85]), one[2]], [BOXES[:1], one[1], np.int64([1])],
                  [BOXES[:1] + 2, one[1], one[2]]):
        assert strangers.pairs_of(one, other) == []


def test_a_folder_without_a_script_is_named(strangers, tmp_path):
    with pytest.raises(SystemExit, match='predict.py does not exist: give the model.onnx of a folder'):
        strangers.script_of(tmp_path / 'model.onnx')


def test_it_runs_as_a_process(tmp_path):
    (tmp_path / 'predict.py').write_text('''import json
import numpy as np
def read_card(model):
    return json.loads(model.with_name('model.json').read_text())
def runner(model, name, card):
    return lambda pixels: dict(probabilities=np.array([[0.9, 0.1]]))
def read_image(path, card):
    return np.zeros((1, 8, 8, 3), np.uint8)
''')
    card = dict(classes=['car', 'tree'], outputs=[dict(name='probabilities')])
    (tmp_path / 'model.json').write_text(json.dumps(card))
    for name in ('car', 'tree'):
        (tmp_path / 'val' / name).mkdir(parents=True)
        (tmp_path / 'val' / name / '1.png').write_bytes(b'')
    for top1, status, words in ((50.0, 0, 'the library 50.00'), (50.2, 1, 'TOO FAR')):
        done = run_tool(ROOT / 'benchmarks' / 'strangers.py', tmp_path / 'model.onnx', '--images', tmp_path / 'val',
                        *expect(tmp_path, **{'accuracy/top1': top1}), check=False)
        assert done.returncode == status and words in done.stdout, done.stderr
    done = run_tool(ROOT / 'benchmarks' / 'strangers.py', tmp_path / 'model.onnx', '--images', tmp_path / 'none',
                    check=False)
    assert done.returncode == 1 and 'there is no such folder' in done.stderr and 'Traceback' not in done.stderr
