"""Scale reparameterisation behind norms: exact in float in every family, only where nothing else reads the norm."""
import copy

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

from psaq_mm.engine import read_checkpoint
from psaq_mm.engine.checkpoint import load_float
from psaq_mm.models import extract_features, quantize_model
from psaq_mm.quantization import (
    ActivationConfig,
    LayerConfig,
    Mode,
    QuantizedLinear,
    WeightConfig,
    quantizer_mode,
    reparameterize,
)
from psaq_mm.quantization.reparameterization import apply, find_sites

from .conftest import ROOT
from .test_families import FAMILIES, images_for, mmdet_swin, timm_vit

# Norms of each family that its blocks read: two a block; the mergings of Swin; those before the neck's 1 x 1
# convolutions, and the last one of a classifier, which only its head reads.
SITES = dict(mmdet_swin=16 + 3 + 4, mmseg_swin=16 + 3 + 4, mmseg_vit=8, mmseg_vit_pyramid=8, timm_swin=12 + 2,
             timm_swin_fused=12 + 2, timm_vit=6, timm_vit_unfused=6)


def outliers(model):
    """Norms whose channels differ by orders of magnitude, as those of trained models do."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.mul_(torch.exp(1.5 * torch.randn(module.weight.shape, generator=generator)))
                module.bias.add_(torch.randn(module.bias.shape, generator=generator))
    return model


@pytest.fixture(params=FAMILIES, ids=lambda family: family.__name__)
def family(request):
    torch.manual_seed(0)
    return request.param.__name__, outliers(request.param().eval())


def test_exact_in_float_at_sizes_that_need_padding_too_and_better_at_four_bits(family):
    name, model = family
    images = images_for(model)
    student = quantize_model(copy.deepcopy(model), dict(weight=dict(bits=4), activation=dict(bits=4)))
    found = reparameterize(student, lambda: extract_features(student, images),
                           lambda: extract_features(student, images[:1]))
    assert len(found['changed']) + sum('as good' in why for why in found['left'].values()) == SITES[name]
    assert len(found['changed']) > SITES[name] / 2
    for site in found['changed'].values():
        assert site['after'] < site['before']
    with torch.no_grad(), quantizer_mode(student, Mode.FLOAT):
        for a, b in zip(extract_features(model, images), extract_features(student, images)):
            assert (a - b).abs().max() < 1e-4 * a.abs().max()


def test_any_ratio_and_offset_is_exact(family):
    _, model = family
    images = images_for(model)
    student = quantize_model(copy.deepcopy(model), {})
    with torch.no_grad(), quantizer_mode(student, Mode.FLOAT):
        expected = extract_features(student, images)
        sites, _ = find_sites(student, lambda: extract_features(student, images[:1]))
        for site in sites:
            count = len(site.norm.weight)
            apply(site, torch.rand(count) + 0.5, torch.randn(count) * site.shifts)
        found = extract_features(student, images)
    for a, b in zip(expected, found):
        assert (a - b).abs().max() < 1e-4 * a.abs().max()


def test_what_zeros_are_padded_to_is_scaled_only():
    for build, padded in ((mmdet_swin, ['norm1']), (timm_vit, [])):
        student = quantize_model(build().eval(), {})
        sites, _ = find_sites(student, lambda m=student: extract_features(m, images_for(m)[:1]))
        for site in sites:
            kind = site.name.rpartition('.')[2]
            if kind in ('norm1', 'norm2') and '.blocks.' in site.name:
                assert site.shifts != (kind in padded), site.name


def one_layer(forward, shared=False):

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(6)
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
            if shared:
                self.second.weight = self.first.weight

    Model.forward = forward
    model, config = Model(), LayerConfig(weight=WeightConfig(bits=4), activation=ActivationConfig(bits=4))
    model.first, model.second = (QuantizedLinear.from_float(layer, config) for layer in (model.first, model.second))
    return model


@pytest.mark.parametrize('forward, why', [
    (lambda self, x: self.first(self.norm(x)), None),
    (lambda self, x: self.first(self.norm(x).transpose(0, 1).reshape(-1, 6)), None),
    (lambda self, x: self.first(self.norm(x)) + self.second(self.norm(x)), None),
    (lambda self, x: self.first(self.norm(x)) + self.norm(x), 'something else'),
    (lambda self, x: (self.first(y := self.norm(x)), y), 'something else'),
    (lambda self, x: self.first(self.norm(x).relu()), 'nothing'),
    (lambda self, x: self.first(self.norm(x)) + self.first(x), 'reads more'),
])
def test_what_feeds_what_decides(forward, why):
    model = one_layer(forward)
    sites, left = find_sites(model, lambda: model(torch.randn(2, 3, 6)))
    if why is None:
        assert len(sites) == 1 and not left
    else:
        assert not sites and (why == 'nothing' and not left or why in left['norm'])


def test_a_shared_weight_is_left_alone():
    model = one_layer(lambda self, x: self.first(self.norm(x)) + self.second(x), shared=True)
    assert find_sites(model, lambda: model(torch.randn(2, 6)))[1] == {
        'norm': 'it shares parameters with other layers'}


def test_channels_that_are_read_rearranged_are_put_back():
    model = one_layer(lambda self, x: self.first(self.norm(x).flip(-1)))
    outliers(model)
    expected = copy.deepcopy(model.state_dict())
    x = torch.randn(8, 6)
    found = reparameterize(model, lambda: model(x), lambda: [model(x)])
    assert found['left'] == {'norm': 'the model computes something else with changed channels'}
    for key in ('norm.weight', 'norm.bias', 'first.weight', 'first.bias'):
        assert torch.equal(model.state_dict()[key], expected[key])


def test_the_baseline_quantizes_as_its_paper_says(monkeypatch):
    """RepQ-ViT beside us: powers of the square root of 2, and with many bits what full precision says."""
    monkeypatch.syspath_prepend(str(ROOT / 'benchmarks'))
    import repq_vit
    powers = 0.8 * 2**-torch.tensor([0.0, 0.5, 1.0, 1.5])
    near = torch.tensor([0.9, 0.6, 0.41, 0.28, 0.2, 0.0])  # the last but one is nearest to the fifth power, which is 0
    torch.testing.assert_close(repq_vit.LogSqrt2(2, 0.8)(near), torch.cat([powers, torch.zeros(2)]))
    cfg = Config.fromfile(ROOT / 'demo' / 'vit_mini_objects.py')
    images, errors = torch.randn(4, 3, 96, 96, generator=torch.Generator().manual_seed(0)), {}
    for bits in (4, 8):
        model = MODELS.build(dict(cfg.model, _scope_='psaq_mm')).eval()
        quantize_model(model, dict(
            targets=['backbone', 'head'], recipe='paper', weight=dict(bits=bits, symmetric=False),
            activation=dict(bits=bits, symmetric_products=False)))
        load_float(model, read_checkpoint(str(ROOT / 'demo' / 'vit_mini_objects.pth')), ('backbone', 'head'))
        with torch.no_grad(), quantizer_mode(model, Mode.FLOAT):
            exact = model.logits(images)
        repq_vit.quantize_as_repq(model, images)
        with torch.no_grad():
            errors[bits] = ((model.logits(images) - exact).square().mean() / exact.square().mean()).item()
    assert errors[8] < 0.01 < errors[4] < 1
