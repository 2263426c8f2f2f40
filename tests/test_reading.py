"""Files as people have them: what our reader takes, every reader in a run gets; what it refuses, it names."""
import argparse
import collections
import copy
import datetime
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tarfile
import types
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.registry import MODELS
from mmengine.runner import load_checkpoint
from torch import nn

from psaq_mm.engine.checkpoint import (
    CheckpointError,
    convert_file,
    float_checkpoint,
    in_own_layout,
    load_float,
    read_checkpoint,
)
from psaq_mm.engine.config import dataset_meta
from psaq_mm.engine.reading import CONTAINERS, load_safely, local_path
from psaq_mm.errors import UserError
from psaq_mm.files import OwnedFolder
from psaq_mm.models import class_counts

from .conftest import DEMO_CONFIG
from .test_converters import detector, old_layout, spread


@pytest.fixture(scope='module')
def plain():
    return spread(detector()).state_dict()


@pytest.fixture(scope='module')
def average(plain):
    return {key: value + 1 if value.is_floating_point() else value for key, value in plain.items()}


def under(prefix, state):
    return {f'{prefix}{key}': value for key, value in state.items()}


def loaded(path, folder, weights=None):
    """What teacher, student, and a float model in an evaluation get from a file, and whether the file itself serves."""
    content = float_checkpoint(detector(), str(path), weights)
    own = in_own_layout(content, OwnedFolder(folder))
    models = [detector() for _ in range(3)]
    load_float(models[0], content)
    load_checkpoint(models[1], own, map_location='cpu', revise_keys=[(r'^module.', '')])  # as the Runner does
    load_float(models[2], read_checkpoint(own))
    states = [model.state_dict() for model in models]
    assert all(torch.equal(states[0][key], state[key]) for state in states[1:] for key in state)
    return states[0], own == str(path)


def same(state, other):
    return all(torch.equal(state[key], value) for key, value in other.items())


PLACES = {
    'state_dict': (lambda s: dict(state_dict=s, meta={}), True),
    'bare': (lambda s: s, True),
    'model': (lambda s: dict(model=s), False),
    'any key, deep': (lambda s: dict(run=dict(network=s), epoch=3), False),
    'DDP': (lambda s: dict(state_dict=under('module.', s)), False),
    'DDP twice': (lambda s: under('module.module.', s), False),
    'compiled': (lambda s: dict(state_dict=under('_orig_mod.', s)), False),
    'a stack': (lambda s: dict(model=under('model._orig_mod.module.', s)), False),
    'nothing that we know': (lambda s: under('my_wrapper.inner.', s), False),
    'a compiled backbone': (lambda s: dict(state_dict={
        key.replace('backbone.', 'backbone._orig_mod.'): value for key, value in s.items()}), False),
    'wrappers in the middle': (lambda s: dict(state_dict={
        f'net.{key}'.replace('.stages.', '.x._fsdp_wrapped_module.stages.'): value
        for key, value in s.items()}), False),
    'a file of each part': (lambda s: {part: {key.removeprefix(f'{part}.'): value for key, value in s.items()
                                              if key.startswith(f'{part}.')}
                                       for part in {key.partition('.')[0] for key in s}}, False),
    'an average of torch': (lambda s: {**under('module.', s), 'n_averaged': torch.tensor(3)}, False),
    'a loss beside it': (lambda s: dict(state_dict={**under('model.', s), 'criterion.weight': torch.ones(2)}), False),
}


@pytest.mark.parametrize('place', PLACES)
def test_wherever_the_weights_are_every_model_gets_them(place, plain, tmp_path):
    wrap, literal = PLACES[place]
    torch.save(wrap(plain), tmp_path / 'c.pth')
    state, served = loaded(tmp_path / 'c.pth', tmp_path / 'work')
    assert same(state, plain) and served == literal == (not (tmp_path / 'work').exists())


def test_what_others_wrote_at_full_precision_pth_is_not_replaced(plain, tmp_path):
    torch.save(dict(model=plain), tmp_path / 'c.pth')
    theirs = tmp_path / 'full_precision.pth'
    torch.save(dict(model=plain), theirs)
    for source in ('c.pth', 'full_precision.pth'):
        with pytest.raises(UserError, match='full_precision.pth was not written by psaq_mm'):
            in_own_layout(float_checkpoint(detector(), str(tmp_path / source)), OwnedFolder(tmp_path))
    assert 'model' in load_safely(theirs)
    theirs.unlink()
    for _ in range(2):  # ours is replaced
        own = in_own_layout(float_checkpoint(detector(), str(tmp_path / 'c.pth')), OwnedFolder(tmp_path))
    assert load_safely(own)['meta']['full_precision']['why'] == "holds the weights at 'model'"


def exchanged(plain, average):
    """As mmengine's own hook saves the two sets."""
    from mmengine.model import ExponentialMovingAverage
    hook = EMAHook()
    hook.ema_model = ExponentialMovingAverage(detector())
    hook.ema_model.module.load_state_dict(average, strict=False)
    model = detector()
    model.load_state_dict(plain, strict=False)
    checkpoint = dict(state_dict=model.state_dict(), meta={})
    hook.before_save_checkpoint(None, checkpoint)
    return checkpoint


PAIRS = {  # what the ecosystem's own test tool would evaluate
    'timm': (lambda s, e: dict(state_dict=s, state_dict_ema=e, args=argparse.Namespace(lr=1)), 'plain'),
    'DeiT': (lambda s, e: dict(model=s, model_ema=e, optimizer=dict(state={0: dict(step=torch.ones(1))})), 'plain'),
    'mmengine': (exchanged, 'ema'),
    'mmdet 2': (lambda s, e: dict(state_dict={
        **e, **{f"ema_{key.replace('.', '_')}": value for key, value in s.items()}}), 'ema'),
    'a module': (lambda s, e: dict(ema=dict(module=e, updates=4), model=s), 'plain'),
    'SoftTeacher': (lambda s, e: dict(state_dict={**under('student.', s), **under('teacher.', e)}), 'ema'),
    'Lightning': (lambda s, e: dict(state_dict={**under('ema_model.module.', e), **under('model.', s)}), 'plain'),
}


@pytest.mark.parametrize('pair', PAIRS)
def test_of_two_sets_one_is_named_and_the_other_can_be_had(pair, plain, average, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr('psaq_mm.engine.checkpoint.print_log', lambda text, *_: said.append(text))
    make, default = PAIRS[pair]
    torch.save(make(plain, average), tmp_path / 'c.pth')
    for weights in (None, 'ema', 'plain'):
        state, _ = loaded(tmp_path / 'c.pth', tmp_path / 'work', weights)
        assert same(state, average if (weights or default) == 'ema' else plain), weights
    assert all('holds 2 sets of weights' in text for text in said) and len(said) == 3
    assert '--weights ema or plain chooses' in said[0]


def test_a_single_set_is_what_it_is(plain, average, tmp_path):
    path = tmp_path / 'c.pth'
    torch.save(dict(state_dict_ema=average, epoch=1), path)
    for weights in (None, 'ema'):
        assert same(loaded(path, tmp_path / 'work', weights)[0], average)
    with pytest.raises(CheckpointError, match="load_weights = 'plain' .*c.pth holds no such .*'state_dict_ema'"):
        float_checkpoint(detector(), str(path), 'plain')
    own = str(tmp_path / 'work' / 'full_precision.pth')  # knows what it is a copy of, for runs that start from it
    assert float_checkpoint(detector(), own, 'ema')['why'] is None
    torch.save(dict(state_dict=plain), path)
    assert same(loaded(path, tmp_path / 'other', 'plain')[0], plain)
    with pytest.raises(CheckpointError, match="load_weights = 'ema' .*holds no such weights"):
        float_checkpoint(detector(), str(path), 'ema')


def test_plain_data_of_every_kind_loads(plain, tmp_path):
    """What training tools put beside the weights, in both formats of torch, and by the safetensors library."""
    beside = dict(
        args=argparse.Namespace(out=pathlib.Path('/x/y'), lr=0.1, also=collections.defaultdict(list, a=[1])),
        time=datetime.datetime(2024, 1, 2), version=torch.__version__, loss=np.float64(3), names=np.array(['a', 'b']),
        device=torch.device('cpu'), space=types.SimpleNamespace(a=1), config=Config(dict(a=dict(b=1)))._cfg_dict)
    for new in (True, False):
        path = tmp_path / f'{new}.pth'
        torch.save(dict(model=plain, **beside), path, _use_new_zipfile_serialization=new)
        assert same(loaded(path, tmp_path / 'work')[0], plain)
    assert load_safely(path)['args'].out == pathlib.PurePosixPath('/x/y')
    torch.save(dict(state_dict=plain, args=argparse.Namespace()), path)  # mmengine's reader would refuse it
    assert loaded(path, tmp_path / 'work')[1] is False
    for name in ('model.safetensors', 'model.bin'):
        safetensors.torch.save_file(plain, tmp_path / name)
        state, served = loaded(tmp_path / name, tmp_path / 'work')
        assert same(state, plain) and not served


def test_what_may_be_made_from_a_file_can_do_nothing():
    for entry in CONTAINERS:
        kind = entry[0] if isinstance(entry, tuple) else entry
        assert isinstance(kind, type) and not issubclass(kind, pathlib.Path)
    assert not set(CONTAINERS) & set(torch.serialization.get_safe_globals())  # only while we read


def run_line(text, folder):
    """Runs the line that an error gives, as a shell would, and returns the file that it wrote."""
    command = shlex.split(text[text.index('python -c'):])
    subprocess.run([sys.executable, *command[1:]], check=True, cwd=folder, capture_output=True, env=dict(
        os.environ, PYTHONPATH=os.pathsep.join(sys.path)))
    return re.search(r'"([^"]+_weights.pth)"', command[2])[1]


@pytest.mark.parametrize('kind', ['whole', 'whole, old format', 'in a dict', 'TorchScript'])
def test_other_formats_are_named_with_the_line_that_converts_them(kind, tmp_path):
    path = tmp_path / "it's a file.pth"
    model = nn.Sequential(nn.Linear(2, 3))
    if kind == 'TorchScript':
        torch.jit.save(torch.jit.trace(model, torch.ones(1, 2)), str(path))
    else:
        torch.save(dict(model=model, epoch=1) if kind == 'in a dict' else model, path,
                   _use_new_zipfile_serialization=kind != 'whole, old format')
    with pytest.raises(CheckpointError, match='only if you trust it') as caught:
        read_checkpoint(str(path))
    text = str(caught.value)
    assert ('TorchScript' in text) == (kind == 'TorchScript') and '\x1b' not in text and '\n' not in text
    state = read_checkpoint(run_line(text, tmp_path))['state_dict']
    assert same(state, model.state_dict())


@pytest.mark.parametrize('content, words', [
    (b'', 'is empty'), (b'\x1f\x8b\x08000', r'compressed \(gzip\)'), (b'<!DOCTYPE html><html>', 'a web page'),
    (b'version https://git-lfs.github.com/spec/v1\noid', 'git lfs pull'), (b'\x89HDF\r\n', 'HDF5'),
    (b'{"weight_map": {}}', 'a JSON file'), (b'hello', 'no readable checkpoint'),
    (b'\x40\x00\x00\x00\x00\x00\x00\x00{"a', 'no readable checkpoint .*truncated'),
])
def test_what_is_no_checkpoint_is_named(content, words, tmp_path):
    (tmp_path / 'c.pth').write_bytes(content)
    with pytest.raises(CheckpointError, match=f'c.pth .*{words}|c.pth is {words}'):
        read_checkpoint(str(tmp_path / 'c.pth'))


def test_archives_of_other_files_are_named(tmp_path):
    (tmp_path / 'a.txt').write_text('a')
    with zipfile.ZipFile(tmp_path / 'z.pth', 'w') as archive:
        archive.writestr('model.pth', b'abc')
    with tarfile.open(tmp_path / 't.pth', 'w') as archive:
        archive.add(tmp_path / 'a.txt', 'a.txt')
    np.savez(tmp_path / 'n.npz', **{'conv.weight': np.ones(2)})
    for name, words in (('z.pth', r'zip archive of other files \(model.pth\): unpack'), ('t.pth', 'tar archive'),
                        ('n.npz', 'NumPy arrays')):
        with pytest.raises(CheckpointError, match=words) as caught:
            read_checkpoint(str(tmp_path / name))
    assert list(read_checkpoint(run_line(str(caught.value), tmp_path))['state_dict']) == ['conv.weight']
    with pytest.raises(CheckpointError, match='is a folder: name the file'):
        local_path(str(tmp_path))


def test_an_older_version_of_the_model_is_read_by_its_own_rules(plain, tmp_path):
    """FCOS of mmdet 1 named its layers otherwise."""
    fcos = dict(_scope_='mmdet', type='FCOSHead', num_classes=3, in_channels=8, feat_channels=32, stacked_convs=1)

    class Model(nn.Module):

        def __init__(self):
            super().__init__()
            self.bbox_head = MODELS.build(copy.deepcopy(fcos))

    model, source = Model(), spread(Model())
    old = {key.replace('bbox_head.conv_cls', 'bbox_head.fcos_cls').replace('bbox_head.conv_reg', 'bbox_head.fcos_reg')
           : value for key, value in source.state_dict().items()}
    assert old.keys() != source.state_dict().keys()
    torch.save(old, tmp_path / 'old.pth')
    content = float_checkpoint(model, str(tmp_path / 'old.pth'))
    load_float(model, content)
    assert content['layout'] == 'an older version of the model' and same(model.state_dict(), source.state_dict())


def test_the_converter_spares_its_source_and_reads_what_we_read(tmp_path):
    old = old_layout(spread(detector()).state_dict())
    other = {key: value + 1 for key, value in old.items()}
    torch.save(dict(model=under('_orig_mod.module.', old), model_ema=under('module.', other)), tmp_path / 'old.pth')
    os.link(tmp_path / 'old.pth', tmp_path / 'link.pth')
    for target in ('old.pth', 'link.pth'):
        with pytest.raises(CheckpointError, match='is the file to convert'):
            convert_file(str(tmp_path / 'old.pth'), str(tmp_path / target))
    key = 'neck.fpn_convs.0.conv.weight'
    for weights, expected in ((None, old), ('ema', other), ('plain', old)):
        convert_file(str(tmp_path / 'old.pth'), str(tmp_path / 'new.pth'), weights)
        state = read_checkpoint(str(tmp_path / 'new.pth'))['state_dict']
        assert torch.equal(state[key], expected[key]) and 'backbone.stages.0.blocks.0.attn.w_msa.qkv.weight' in state


def with_classes(config, count):
    """A model config with another number of classes, in place."""
    if isinstance(config, dict):
        for key, value in config.items():
            if key in ('num_classes', 'num_things_classes'):
                config[key] = count
            elif key == 'num_stuff_classes':
                config[key] = 0
            elif key == 'class_weight' and isinstance(value, (list, tuple)) and len(value) > 3:
                config[key] = [1.0] * (count + 1)
            else:
                with_classes(value, count)
    elif isinstance(config, (list, tuple)):
        for value in config:
            with_classes(value, count)
    return config


HEADS = {  # one of each way to hold a number of classes, and the keys that set it
    'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py': 'model.bbox_head.num_classes',
    'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py': 'model.bbox_head.num_classes',
    'mmdet::ssd/ssd300_coco.py': 'model.bbox_head.num_classes',
    'mmdet::yolo/yolov3_mobilenetv2_8xb24-320-300e_coco.py': 'model.bbox_head.num_classes',
    'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py': 'model.bbox_head.num_classes',
    'mmdet::solov2/solov2-light_r18_fpn_ms-3x_coco.py': 'model.mask_head.num_classes',
    'mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py':
        r'model.roi_head.bbox_head\[0-2\].num_classes, model.roi_head.mask_head.num_classes',
    'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py':
        'model.panoptic_head.num_things_classes, model.panoptic_fusion_head.num_things_classes',
    'mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py': 'model.decode_head.num_classes',
    'mmseg::point_rend/pointrend_r50_4xb2-80k_cityscapes-512x1024.py': r'model.decode_head\[0-1\].num_classes',
    'mmseg::ocrnet/ocrnet_hr18s_4xb2-40k_cityscapes-512x1024.py': r'model.decode_head\[0-1\].num_classes',
}


@pytest.mark.parametrize('name', HEADS)
def test_another_number_of_classes_is_told_from_shapes(name):
    from importlib.util import find_spec

    from psaq_mm.engine.config import default_scope, without_pretrained
    from psaq_mm.zoo.check import shrink
    zoo, _, config = name.partition('::')
    cfg = Config.fromfile(pathlib.Path(find_spec(zoo).origin).parent / '.mim' / 'configs' / config)
    default_scope(cfg)
    try:
        models = {}
        for count in (3, 20):
            model = with_classes(without_pretrained(shrink(copy.deepcopy(cfg.model))), count)
            models[count] = model, MODELS.build(copy.deepcopy(model))
            assert class_counts(models[count][1], model) == {count}
        for ours, theirs in ((3, 20), (20, 3)):
            model, built = models[ours]
            with pytest.raises(CheckpointError, match=f'classes differs: {theirs} in the checkpoint, {ours} in the '
                               f'model. If the checkpoint is the right one, set {HEADS[name]} to {theirs}$'):
                load_float(built, dict(state_dict=models[theirs][1].state_dict(), path='c.pth'), config=model)
    finally:
        default_scope(Config(dict(default_scope='mmdet')))


def test_names_travel_only_where_they_fit():
    cfg = Config.fromfile(DEMO_CONFIG)
    six = ('disk', 'square', 'triangle', 'star', 'ring', 'cross')
    coco = dict(dataset_meta=dict(classes=tuple('abc'), palette=[(0, 0, 0)]))
    assert dataset_meta(cfg, coco, {3})['classes'] == tuple('abc')
    assert dataset_meta(cfg, dict(CLASSES=list('ab'), PALETTE=None), {2}) == dict(classes=list('ab'))
    assert dataset_meta(cfg, coco, {6})['classes'] == six  # the data set's
    assert dataset_meta(cfg, {}, ())['classes'] == six
    assert dataset_meta(cfg, coco, {4}) == {}
    cfg.pop('metainfo', None)
    cfg.test_dataloader.dataset.pop('metainfo')  # a CocoDataset has 80 of its own
    assert len(dataset_meta(cfg, {}, {80})['classes']) == 80 and dataset_meta(cfg, {}, {6}) == {}
    model = MODELS.build(dict(type='psaq_mm.TimmClassifier', model='deit_tiny_patch16_224', img_size=32, embed_dim=32,
                              depth=1, num_heads=2, num_classes=5))
    assert class_counts(model) == {5}
