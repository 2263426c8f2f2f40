"""What a config says about data is tried before the work: data sets, loaders, evaluators, pipelines of any shape."""
import copy
import random
import re

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, init_default_scope
from torch.utils.data import Dataset, IterableDataset

from psaq_mm.engine import evaluation_gap, quantize
from psaq_mm.engine.config import calibration_gap, metainfo_of
from psaq_mm.engine.rehearsal import rehearse_calibration, rehearse_evaluation
from psaq_mm.errors import UserError
from psaq_mm.models import copy_model

CLASSES = ('disk', 'square', 'triangle', 'star', 'ring', 'cross')


@DATASETS.register_module(force=True)
class PlainDataset(Dataset):
    """As a user writes it first: images from an array, no mmengine in it."""

    def __init__(self, size=96, label=0, length=2, fails=None):
        self.size, self.label, self.length = size, label, length
        if fails:
            raise dict(files=FileNotFoundError('/nowhere/list.csv'), package=ImportError('no module of mine'),
                       mistake=ZeroDivisionError('division by zero'))[fails]

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        from mmengine.structures import BaseDataElement
        if index >= self.length:
            raise IndexError
        random.random(), np.random.rand(), torch.rand(3)
        sample = BaseDataElement()
        sample.set_field(self.label, 'gt_label')
        return dict(inputs=torch.zeros(3, self.size, self.size, dtype=torch.uint8), data_samples=sample)


@DATASETS.register_module(force=True)
class PlainStream(IterableDataset):

    def __len__(self):
        return 2

    def __iter__(self):
        yield from (PlainDataset()[0] for _ in range(2))


@pytest.fixture(scope='module')
def classifier(classification_config):
    """A classifier's config and model."""
    cfg = Config.fromfile(classification_config)
    init_default_scope('psaq_mm')
    try:
        yield cfg, MODELS.build(cfg.model).eval()
    finally:
        init_default_scope('mmdet')


@pytest.fixture(scope='module')
def detector(small_config):
    init_default_scope('mmdet')
    cfg = Config.fromfile(small_config)
    return cfg, MODELS.build(cfg.model).eval()


def tried(subject, **changes):
    """The gap that a rehearsal finds in a config with some changes."""
    cfg, model = subject
    cfg = copy.deepcopy(cfg)
    cfg.merge_from_dict({key.replace('__', '.'): value for key, value in changes.items()})
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    try:
        return evaluation_gap(cfg) or rehearse_evaluation(cfg, model)
    finally:
        init_default_scope('mmdet')


def with_dataset(subject, dataset, **loader):
    cfg = copy.deepcopy(subject[0])
    cfg.test_dataloader = dict({key: cfg.test_dataloader[key] for key in ('batch_size', 'num_workers', 'sampler')},
                               dataset=dataset, **loader)
    return cfg, subject[1]


PLAIN = dict(type='mmengine.PlainDataset')


@pytest.mark.parametrize('wrap', [
    lambda dataset: dataset, lambda dataset: dict(type='RepeatDataset', times=2, dataset=dataset),
    lambda dataset: dict(type='ConcatDataset', datasets=[dataset, dataset]),
    lambda dataset: dict(type='RepeatDataset', times=2, dataset=dict(type='ConcatDataset', datasets=[dataset]))],
    ids=['plain', 'repeated', 'concatenated', 'both'])
def test_what_is_absent_is_named_in_data_sets_of_any_shape(detector, wrap):
    dataset = detector[0].test_dataloader.dataset
    assert tried(with_dataset(detector, wrap(dataset))) is None
    for change, words in ((dict(ann_file='none.json'), 'ann_file: .*none.json does not exist'),
                          (dict(data_prefix=dict(img='none/')), 'data_prefix.img: .*none/? does not exist'),
                          (dict(data_root='/nowhere/'), 'ann_file: /nowhere/val.json does not exist'),
                          (dict(type='Nowhere'), 'Nowhere is not in the .* registry')):
        gap = tried(with_dataset(detector, wrap(dict(dataset, **change))))
        assert gap and gap.startswith('test_dataloader') and re.search(words, gap), gap


@pytest.mark.parametrize('changes, words', [
    (dict(test_evaluator__ann_file='/nowhere/val.json'), 'test_evaluator.ann_file: /nowhere/val.json does not exist'),
    (dict(test_evaluator=[dict(type='CocoMetric', ann_file='/nowhere/val.json')]),
     r'test_evaluator\[0\].ann_file: /nowhere/val.json does not exist'),
    (dict(test_evaluator=dict(metrics=[dict(type='CocoMetric', ann_file='/nowhere/val.json')], type='Evaluator')),
     r'test_evaluator.metrics\[0\].ann_file: /nowhere/val.json does not exist'),
    (dict(test_evaluator=dict(type='NoMetric')), r'test_evaluator cannot be built \(KeyError: NoMetric is not in'),
    (dict(test_dataloader__dataset__pipeline=[dict(type='NoTransform')]), 'NoTransform is not in'),
    (dict(test_cfg=None), 'no test_dataloader, test_cfg and test_evaluator'),
    (dict(test_dataloader=None), 'no test_dataloader'),
])
def test_what_is_absent_from_an_evaluation(detector, changes, words):

    assert re.search(words, tried(detector, **changes))


@pytest.mark.parametrize('changes, words', [
    (dict(test_dataloader__sampler=7), r'the first sample of test_dataloader.* cannot be loaded'),
    (dict(test_dataloader__dataset=7), r'test_dataloader.dataset \(.*\) cannot be built \('),
    (dict(test_dataloader__dataset__data_prefix=7), r'test_dataloader.dataset \(.*\) cannot be built \('),
    (dict(test_dataloader__dataset__nonsense=7), "test_dataloader.dataset .* cannot be built .*'nonsense'"),
    (dict(test_dataloader__dataset__pipeline=[dict(type='LoadImageFromFile'), dict(type='Resize', scale='big')]),
     r'test_dataloader|the first sample of test_dataloader.dataset \(CocoDataset, val.json\) cannot be loaded'),
    (dict(test_dataloader__dataset__pipeline=[dict(type='LoadImageFromFile')]),
     r'the model cannot predict the first sample.* of test_dataloader.dataset \(CocoDataset, val.json\)'),
    (dict(test_evaluator__metric='mood'), "test_evaluator cannot be built .*mood"),
    (dict(test_evaluator=dict(type='psaq_mm.Accuracy')), 'test_evaluator'),
])
def test_what_is_here_and_wrong_ends_the_command(detector, changes, words):
    with pytest.raises(UserError, match=f'(?s)^({words}).*--no-eval'):
        found = tried(detector, **changes)
        pytest.fail(f'found {found}')


def test_plain_data_sets(classifier):
    assert tried(with_dataset(classifier, PLAIN, collate_fn=dict(type='pseudo_collate'))) is None
    assert 'list.csv' in tried(with_dataset(classifier, dict(PLAIN, fails='files')))
    assert 'no module of mine' in tried(with_dataset(classifier, dict(PLAIN, fails='package')))
    for change, words in ((dict(fails='mistake'), 'cannot be built.*division by zero'),
                          (dict(length=0), r'PlainDataset\) cannot be loaded .*empty'),
                          (dict(size=224), 'cannot predict the first sample of 3 x 224 x 224.*--no-eval'),
                          (dict(label=9), 'test_evaluator cannot take the prediction')):
        with pytest.raises(UserError, match=words):
            tried(with_dataset(classifier, dict(PLAIN, **change)))


def test_a_stream_of_samples(classifier, monkeypatch):
    cfg, model = with_dataset(classifier, dict(type='mmengine.PlainStream'), collate_fn=dict(type='pseudo_collate'))
    cfg.test_dataloader.sampler = None
    assert tried((cfg, model)) is None
    monkeypatch.delattr(PlainStream, '__len__')  # which mmengine's test loop needs
    with pytest.raises(UserError, match='no len'):
        tried((cfg, model))


def test_a_rehearsal_moves_no_random_number(classifier):
    def drawn():
        return random.random(), np.random.rand(), torch.rand(1).item()

    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    expected = drawn()
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    assert tried(with_dataset(classifier, PLAIN)) is None
    assert drawn() == expected


def test_settings_for_processes_are_no_obstacle(detector):
    assert tried(detector, test_dataloader__num_workers=2, test_dataloader__persistent_workers=True,
                 test_dataloader__prefetch_factor=4, test_dataloader__timeout=9) is None


def test_addresses_are_not_looked_for_on_the_disk(detector):
    dataset = detector[0].test_dataloader.dataset
    for change in (dict(data_root='s3://bucket/'), dict(data_root='/remote/', backend_args=dict(backend='petrel'))):
        cfg, _ = with_dataset(detector, dict(dataset, **change))
        assert evaluation_gap(cfg) is None


def test_names_of_classes_cost_nothing():
    """Neither wrappers nor absent files nor a class that knows nothing of mmengine stand in the way."""
    coco = dict(type='CocoDataset', ann_file='/nowhere.json', metainfo=dict(classes=('a', 'b')),
                pipeline=[dict(type='NoTransform')])
    for dataset in (coco, dict(type='RepeatDataset', times=1, dataset=coco),
                    dict(type='ConcatDataset', datasets=[coco])):
        assert metainfo_of(dataset)['classes'] == ('a', 'b')
    assert len(metainfo_of(dict(type='CocoDataset'))['classes']) == 80
    assert metainfo_of(PLAIN) == metainfo_of(dict(PLAIN, fails='mistake')) == metainfo_of({}) == {}
    assert metainfo_of(dict(type='Nowhere', metainfo=dict(classes=['a']))) == dict(classes=['a'])


def test_a_wrong_calibration_loader_is_named(detector):
    cfg, model = detector
    rehearse_calibration(cfg, model)
    loader = cfg.calib_dataloader
    for dataset, words in ((dict(type='Nowhere'), 'calib_dataloader.dataset .* cannot be built.*Nowhere'),
                           (dict(loader.dataset, pipeline=[]), 'preprocessor cannot take .* of calib_dataloader'),
                           (dict(loader.dataset, pipeline=[dict(type='LoadImageFromFile', to_float32='?'),
                                                           dict(type='Resize')]), 'calib_dataloader')):
        wrong = copy.deepcopy(cfg)
        wrong.calib_dataloader = dict(loader, dataset=dataset)
        assert calibration_gap(wrong) is None
        with pytest.raises(UserError, match=f"{words}.*method 'real' needs its images"):
            rehearse_calibration(wrong, model)


@pytest.mark.parametrize('dataset', [PLAIN, dict(type='Nowhere'), dict(PLAIN, fails='files')],
                         ids=['plain', 'unregistered', 'absent'])
def test_without_an_evaluation_test_data_is_not_touched(classification_config, tmp_path, dataset, monkeypatch):
    monkeypatch.setattr(PlainDataset, '__init__', lambda self, **unused: pytest.fail('touched'))
    cfg = Config.fromfile(classification_config)
    cfg.work_dir = str(tmp_path)
    cfg.quantization.merge(dict(synthesis=dict(method='noise', num_images=2), report=dict(images=0)))
    cfg.test_dataloader.dataset = dataset
    quantize(cfg, eval_float=False, eval_quantized=False)
    assert (tmp_path / 'quantized.pth').exists()


class Session:
    """As a runtime's: of it there is one."""

    def __deepcopy__(self, memo):
        raise TypeError('cannot pickle a session')

    __reduce_ex__ = None


def test_a_model_that_holds_what_cannot_be_copied():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    model[1].runtime = dict(session=Session())
    model[0].called = model[1].forward  # a method of a module that holds a session
    other = copy_model(model)
    assert other[1].runtime is model[1].runtime and other[0].called.__self__ is other[1]
    with torch.no_grad():
        other[0].weight.zero_()
    assert model[0].weight.abs().sum() > 0 and other[0].bias is not model[0].bias
