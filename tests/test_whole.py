"""Whole graphs are held against models that find something, and whoever was measured on nothing is told so."""
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config

from psaq_mm.deploy.answers import anything
from psaq_mm.deploy.export import TRIED, check_images, deliver_whole, whole_predictor
from psaq_mm.deploy.graph import ASYMMETRIC
from psaq_mm.deploy.predictor import predictor_of
from psaq_mm.deploy.whole import Whole, check_answers_repeat, with_objects
from psaq_mm.engine.config import default_scope
from psaq_mm.errors import UserError
from psaq_mm.zoo import check

from .small_models import pictures, small_model

NAMES = 'boxes', 'scores', 'labels'


@torch.no_grad()
def scores_of(predictor, image):
    return predictor(image)[1][0]


def test_what_tells_of_an_object():
    none = [np.zeros((1, 0, 4)), np.zeros((1, 0)), np.zeros((1, 0), np.int64)]
    filled = [np.zeros((1, 2, 4)), np.zeros((1, 2)), np.full((1, 2), -1)]
    one = [np.zeros((1, 2, 4)), np.zeros((1, 2)), np.array([[3, -1]])]
    assert [anything(NAMES, values) for values in (none, filled, one)] == [False, False, True]
    empty, areas = np.full((1, 4, 4), 80), np.arange(16).reshape(1, 4, 4)
    assert [anything(['panoptic_map', *NAMES], [value, *none]) for value in (empty, areas)] == [False, True]
    assert anything(['label_map'], [empty])


def test_the_first_image_with_an_object_is_taken():
    def predictor(image):
        count = int(image.max() > 100)
        return torch.zeros(1, count, 4), torch.zeros(1, count), torch.zeros(1, count, dtype=torch.int64)

    predictor.names = NAMES
    images = torch.zeros(4, 8, 8, 3, dtype=torch.uint8)
    images[2:] = torch.tensor([150, 200])[:, None, None, None]
    assert torch.equal(with_objects(predictor, images), images[2:3])
    assert torch.equal(with_objects(predictor, images[:2]), images[:1])


@pytest.mark.parametrize('random', [True, False])
def test_a_model_that_draws_random_numbers_is_refused(random):
    """As SegNeXt's decode head does."""
    from mmseg.registry import MODELS
    head = dict(type='LightHamHead', in_channels=[8, 16], in_index=[0, 1], channels=16, ham_channels=16, num_classes=19,
                norm_cfg=dict(type='GN', num_groups=4), ham_kwargs=dict(MD_R=4, rand_init=random))
    cfg = Config(dict(default_scope='mmseg', model=dict(type='EncoderDecoder', backbone=dict(
        type='MSCAN', embed_dims=[8, 16], depths=[1, 1], num_stages=2, mlp_ratios=[2, 2], norm_cfg=dict(type='BN')),
        decode_head=head, train_cfg=dict(), test_cfg=dict(mode='whole'))))
    default_scope(cfg)
    model = MODELS.build(cfg.model).eval()
    model.data_preprocessor = MODELS.build(dict(type='SegDataPreProcessor'))
    predictor = predictor_of(model, cfg)
    if not random:
        return check_answers_repeat(predictor, pictures(1, 64, 96))
    with pytest.raises(UserError, match='answers the same image differently .* draws random'):
        check_answers_repeat(predictor, pictures(1, 64, 96))


def test_check_images_are_small_and_of_8_bits():
    images = check_images([torch.randn(1, 3, 300, 512), torch.randn(1, 3, 20, 30)] * 20, 3, (64, 64))
    assert [tuple(image.shape[2:]) for image in images[:2]] == [(150, 256), (20, 30)] and len(images) == TRIED
    assert all(len(image.unique()) <= 256 for image in images)
    assert check_images([], 4, (40, 50))[0].shape == (1, 4, 40, 50)


@pytest.mark.parametrize('found', [False, True])
def test_an_export_that_was_measured_on_nothing_says_so(found, tmp_path, monkeypatch):
    cfg, model = small_model('FCOS')
    given, predictor = [], whole_predictor(model, cfg, False)

    def export_whole(predictor, folder, images, fixed, runtimes, form):
        given.append(images)
        (folder / 'model.onnx').write_bytes(b'graph')
        return Whole(folder / 'model.onnx', None, [], [], [], images[1:2], found, None)

    module = sys.modules[deliver_whole.__module__]
    monkeypatch.setattr(module, 'export_whole', export_whole)
    described = []

    def describe(*args):
        described.append(args[-1])
        return dict(check={}, sizes=dict(at_least=1))

    monkeypatch.setattr(module, 'describe', describe)
    monkeypatch.setattr(module, 'deliver', lambda *args: None)
    result = deliver_whole(predictor, cfg, {}, tmp_path, [torch.randn(1, 3, 32, 32) for _ in range(3)], (64, 96), False,
                           ['openvino'], ASYMMETRIC)
    assert [text for text in result['warnings'] if 'finds no object' in text] == result['warnings'][1:]
    assert len(result['warnings']) == 1 + (not found), 'the first is of the test pipeline that the config lacks'
    assert given[0].shape == (3, 64, 96, 3) and torch.equal(described[0], given[0][1:2])


def test_random_weights_find_objects_in_a_check():
    from mmdet.registry import MODELS
    cfg, _ = small_model('FCOS')
    model, image = MODELS.build(cfg.model).eval(), pictures(1, 96, 128)
    model.init_weights()
    predictor = predictor_of(model, cfg)
    assert not len(scores_of(predictor, image)), 'of weights as they are initialised'
    check.find_objects(predictor, image)
    scores = scores_of(predictor, image)
    assert len(scores) == 10 and scores[0] > 1.2 * scores[-1] and model.test_cfg.score_thr == 0.05
    torch.nn.init.zeros_(model.bbox_head.conv_cls.weight)
    assert not len(scores_of(predictor, image)), 'and where classes cannot be told apart'
    check.find_objects(predictor, image)
    assert len(scores_of(predictor, image)) == 10 and model.bbox_head.test_cfg.score_thr == 0


@pytest.mark.parametrize('found', [False, True])
def test_a_config_that_finds_nothing_is_no_success(found, tmp_path, monkeypatch):
    from psaq_mm.deploy import whole
    cfg, model = small_model('FCOS')

    class Trial:
        def __init__(self, *args):
            pass

        def run(self, path):
            assert path == Path(tmp_path) / 'model.onnx'
            return SimpleNamespace(failures=lambda runtime: [], anything=found,
                                   findings=[SimpleNamespace(graph='int8', sqnr=30.0)])

    cfg.test_dataloader = dict(dataset=dict(pipeline=[dict(type='LoadImageFromFile')]))
    monkeypatch.setattr(whole, 'Trial', Trial)
    result = check.check_export(model, cfg, tmp_path)
    assert result['export'] == ('any size' if found else 'failed')
    assert found or 'no object was found' in result['export_reason']


@pytest.mark.parametrize('pipeline, test_cfg, words', [
    ([dict(type='Mosaic')], {}, 'Mosaic: only Resize'),
    ([dict(type='Resize', scale=object(), keep_ratio=True)], {}, "Resize: its settings are not .* object is not iter"),
    ([lambda results: results], {}, "settings that a graph does not know .TypeError: 'function' object"),
    ([], dict(nms=dict(type='soft_nms')), "nms of type 'soft_nms' has no ONNX operator"),
    ([], dict(max_per_img=-1), 'model.test_cfg sets no max_per_img')])
def test_a_whole_graph_is_refused_with_its_reason_and_the_log_says_it(pipeline, test_cfg, words, monkeypatch):
    cfg, model = small_model('FCOS')
    model.test_cfg.update(test_cfg)
    cfg._cfg_dict.test_dataloader = dict(dataset=dict(pipeline=pipeline))
    said = []
    monkeypatch.setattr(sys.modules[whole_predictor.__module__], 'print_log', lambda text, *args: said.append(text))
    why = whole_predictor(model, cfg, True)
    assert isinstance(why, str) and re.search(words, why) and '\n' not in why
    assert said == [f'there will be no model.onnx, only the parts: {why}']
