"""Attention heads that agree: the measure, what the tap hears in every family, and images made by it."""
import copy
import re

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

from psaq_mm.engine import quantize, read_checkpoint
from psaq_mm.engine.checkpoint import load_float
from psaq_mm.errors import UserError
from psaq_mm.models import extract_features, head_tap, quantize_model, similarity_taps
from psaq_mm.quantization import CONTEXT, hooked
from psaq_mm.stanza import QuantizationConfig, StanzaError
from psaq_mm.synthesis import (
    HeadTap,
    PatchSimilarityTap,
    SynthesisConfig,
    head_agreement,
    synthesize,
    valid_range,
)

from .conftest import ROOT
from .test_engine import config
from .test_families import family, images_for  # noqa: F401  (a fixture)


def ssim(one, other):
    """SSIM of two maps whose mean is taken to be the same, by its definition; c as a share of uniform attention."""
    c = (0.03 / one.numel())**2
    covariance = ((one - one.mean()) * (other - other.mean())).mean()
    return (2 * covariance + c) / (one.var(unbiased=False) + other.var(unbiased=False) + c)


def test_agreement_is_the_mean_square_of_ssim_over_pairs_of_heads():
    torch.manual_seed(0)
    weights = torch.randn(2, 3, 5, 7).mul(2).softmax(-1)
    expected = torch.stack([torch.stack([ssim(group[i, q], group[j, q])**2 for q in range(5)
                                         for i, j in ((0, 1), (0, 2), (1, 2))]).mean() for group in weights])
    torch.testing.assert_close(head_agreement(weights), expected, rtol=1e-4, atol=1e-6)
    same = weights[:, :1].expand(-1, 3, -1, -1)
    torch.testing.assert_close(head_agreement(same), torch.ones(2))
    apart = torch.eye(6)[None, :, None, :].expand(1, 6, 4, 6)  # each head looks at another key
    assert head_agreement(apart).item() < 0.1


def test_windows_of_an_image_count_together():
    torch.manual_seed(0)
    product = nn.Identity()
    product.forward = lambda weights, values: weights @ values
    weights = torch.randn(2 * 3, 4, 5, 5).softmax(-1)  # two images of three windows, four heads
    values = torch.randn(6, 4, 5, 2)
    tap = HeadTap([product], [4])
    expected = head_agreement(weights).view(2, 3).mean(1)
    for shown in (weights, weights.view(2, 3, 4, 5, 5), weights.view(24, 5, 5)):
        with tap:
            product(shown, values.view(*shown.shape[:-1], 2))
        torch.testing.assert_close(tap.agreement(2), expected)
    product(weights, values)
    assert not tap.found and not product._forward_pre_hooks  # nobody asked


def test_every_family_shows_its_heads_and_changes_nothing_by_it(family):  # noqa: F811
    model, blocks, *_ = family
    converted = quantize_model(copy.deepcopy(model), dict(keep_float=['*']))
    images = images_for(model)
    sources, *_ = similarity_taps(converted.backbone, images[:1])
    tap, sums = head_tap(converted.backbone, sources), []
    with torch.no_grad():
        expected = extract_features(converted, images)
        handles = [getattr(module, CONTEXT).register_forward_pre_hook(
            lambda _, inputs: sums.append(inputs[0].sum(-1))) for module in converted.backbone.modules()
            if hasattr(module, CONTEXT)]
        with hooked(handles), tap:
            found = extract_features(converted, images)
    assert len(sums) == len(tap.found) == blocks
    assert all(torch.allclose(one, torch.ones_like(one), atol=1e-5) for one in sums)  # softmax, and nothing else
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    images.requires_grad_()
    with tap:
        extract_features(converted, images)
    agreement = tap.agreement(len(images))
    assert agreement.shape == (2, ) and ((agreement > 0) & (agreement < 1)).all()
    gradient, = torch.autograd.grad(agreement.sum(), images)
    assert gradient.abs().amax((1, 2, 3)).min() > 0


@pytest.mark.parametrize('entropy, weight', [(0.0, 1.0), (1.0, 50.0)])
def test_images_are_made_by_it(entropy, weight):
    cfg = Config.fromfile(ROOT / 'demo' / 'vit_mini_objects.py')
    model = MODELS.build(dict(cfg.model, _scope_='psaq_mm')).eval()
    load_float(model, read_checkpoint(str(ROOT / 'demo' / 'vit_mini_objects.pth')), ('backbone', 'head'))
    backbone = quantize_model(model, dict(keep_float=['*'])).backbone.requires_grad_(False)
    low, high = valid_range([127.5] * 3, [60.0] * 3)
    torch.manual_seed(0)
    start = torch.randn(2, 3, 96, 96)
    tap = PatchSimilarityTap(*(taps := similarity_taps(backbone, start)), head_tap(backbone, taps[0]))

    def made(agreement):
        config = SynthesisConfig(agreement=agreement, entropy=entropy, steps=30)
        images = synthesize(start, lambda view: tap.run(backbone, view), tap, config, low, high, '0')
        with torch.no_grad(), tap:
            backbone(images)
        return tap.heads.agreement(2).mean()

    assert made(weight) > made(1e-6) + 0.01


def test_a_run_by_it_logs_it(small_config, tmp_path):
    stanza = {'synthesis.method': 'psaq_v1', 'synthesis.agreement': 1.0, 'synthesis.steps': 2, 'report.images': 0}
    result = quantize(config(small_config, tmp_path, **stanza), eval_float=False, eval_quantized=False, quiet=True)
    assert 0 < result['stages']['synthesis']['agreement'] < 1
    assert ' agreement: ' in ''.join(path.read_text() for path in tmp_path.rglob('*.log'))
    text = (tmp_path / 'report.html').read_text()
    assert 'Synthesis raises the entropy of the similarities between patches, and the agreement of attention' in text
    assert 'Drawn is the entropy' in text


def test_a_report_of_agreement_alone_draws_it(small_config, tmp_path):
    stanza = {'synthesis.method': 'psaq_v1', 'synthesis.agreement': 1.0, 'synthesis.entropy': 0.0,
              'synthesis.steps': 2, 'report.images': 0}
    quantize(config(small_config, tmp_path, **stanza), eval_float=False, eval_quantized=False, quiet=True)
    text = (tmp_path / 'report.html').read_text()
    assert 'Synthesis raises the agreement of attention heads' in text and '>agreement</text>' in text
    assert 'diversity of the images' not in text and 'Drawn is' not in text


@pytest.mark.parametrize('key, what', [('synthesis.agreement', 'no attention of several heads'),
                                       ('game.heads', 'no attention')])
def test_what_has_no_heads_says_so_before_the_work(small_config, tmp_path, key, what):
    cfg = config(small_config, tmp_path, **{key: 1.0})
    cfg.merge_from_dict(dict(model=dict(
        backbone=dict(_delete_=True, _scope_='mmdet', type='ResNet', depth=18, norm_eval=True),
        neck=dict(in_channels=[64, 128, 256, 512]))))
    cfg.load_from = str(tmp_path / 'resnet.pth')
    torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict()), cfg.load_from)
    with pytest.raises(UserError, match=rf'{re.escape(key)} .*{what}: leave it out'):
        quantize(cfg, quiet=True)


def test_blocks_that_are_computed_again_show_no_heads():
    with pytest.raises(StanzaError, match=r'synthesis\.agreement = 1.0 and .*checkpointing'):
        QuantizationConfig.parse(dict(synthesis=dict(agreement=1.0, checkpointing=True)))
    with pytest.raises(StanzaError, match=r'game\.heads = 1.0 and .*checkpointing'):
        QuantizationConfig.parse(dict(synthesis=dict(checkpointing=True), game=dict(heads=1.0)))
    QuantizationConfig.parse(dict(synthesis=dict(checkpointing=True), game=dict(heads=1.0, steps=0)))
