"""What a predictor computes is what the library's own test step answers, behind the config's own pipeline."""
import pytest
import torch
from mmengine.config import Config

from psaq_mm.deploy.answers import agreements
from psaq_mm.deploy.by_library import library_answers
from psaq_mm.deploy.graph import Form
from psaq_mm.deploy.predictor import predictor_of
from psaq_mm.deploy.whole import Trial, expected
from psaq_mm.errors import UserError

from .small_models import MODELS, pictures, small_model
from .test_card import model_of
from .test_deploy import calibrated

PIPELINE = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(160, 128), keep_ratio=True),
            dict(type='LoadAnnotations', with_bbox=True), dict(type='PackDetInputs')]


def same(predictor, image):
    ours = expected(predictor, image).answers
    theirs = library_answers(predictor, image)
    assert [value.dtype for value in ours] == [value.dtype for value in theirs]
    return agreements(predictor.names, ours, theirs)


@pytest.mark.parametrize('task', ['detection', 'segmentation', 'classification'])
def test_demos(task):
    cfg, model = model_of(task)
    image = pictures(1, 96, 96) if task == 'classification' else pictures(1, 90, 130)
    assert min(same(predictor_of(model, cfg).eval(), image).values()) > 0.999


@pytest.mark.parametrize('pipeline', [[], PIPELINE], ids=['none', 'resizing'])
@pytest.mark.parametrize('name', MODELS)
def test_detectors_with_a_pipeline_and_without(name, pipeline):
    cfg, model = small_model(name)
    cfg.test_dataloader = dict(dataset=dict(pipeline=pipeline))
    predictor = predictor_of(model, cfg).eval()
    image = pictures(1, 100, 125)
    assert expected(predictor, image).answers[0].shape[1] > 3
    assert min(same(predictor, image).values()) > 0.99


def trial(predictor, image):
    model = calibrated(predictor.model, {}, torch.randn(1, 3, 96, 96), True)
    predictor.model = model
    return Trial(predictor, {'96 x 96': image}, False, Form(), [])


def test_a_difference_names_the_answer():
    cfg, model = model_of('classification')
    predictor, image = predictor_of(model, cfg).eval(), pictures(1, 96, 96)
    found, *_ = trial(predictor, image).replaced()
    assert found.graph == 'library' and found.passed and found.agreement > 0.999
    predictor.pixels.reverse = not predictor.pixels.reverse
    found, replaced = trial(predictor, image).replaced()
    assert not found.passed and 'gives other probabilities' in str(found) and replaced.passed


def test_a_library_that_does_not_run_is_told(monkeypatch):
    cfg, model = model_of('classification')
    predictor = predictor_of(model, cfg).eval()

    def test_step(data):
        raise RuntimeError('no such thing')

    monkeypatch.setattr(type(model), 'test_step', lambda self, data: test_step(data))
    found, *_ = trial(predictor, pictures(1, 96, 96)).replaced()
    assert not found.passed and str(found) == (
        "the library's own test step does not run for 96 x 96 (RuntimeError: no such thing)")


@pytest.mark.parametrize('name', ['predict', 'postprocess_result'])
def test_a_segmentor_with_code_of_its_own_behind_the_map_is_refused(name):
    from mmseg.models import EncoderDecoder
    cfg, model = model_of('segmentation')
    predictor_of(model, cfg)
    model.__class__ = type('Own', (EncoderDecoder, ), {name: lambda self, *args: None})
    with pytest.raises(UserError, match=f'Own has a {name} of its own'):
        predictor_of(model, Config({}))
