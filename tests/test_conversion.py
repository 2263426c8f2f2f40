"""Conversion, held against a trace of the operations that really run."""
import copy
from collections import Counter

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

from psaq_mm.errors import UserError
from psaq_mm.models import extract_features, quantize_model
from psaq_mm.quantization import (
    Mode,
    QuantizerMismatchError,
    UncalibratedError,
    calibrate,
    convert,
    model_bits,
    quantizable,
    quantized_layers,
    quantizers,
    set_mode,
)
from psaq_mm.stanza import QuantizationConfig

from .conftest import DEMO_CONFIG
from .trace import Trace


@pytest.fixture(scope='module')
def detector():
    return MODELS.build(Config.fromfile(DEMO_CONFIG).model).eval()


def calibrated(model, images):
    calibrate(model, lambda: extract_features(model, images))
    return model


def test_every_product_of_backbone_and_neck_is_quantized_and_nothing_else(detector):
    """The trace of executed operations is the judge, not our own list of layers."""
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad(), Trace() as plain:
        extract_features(detector, images)
    model = calibrated(quantize_model(copy.deepcopy(detector), {}), images)
    with torch.no_grad(), Trace() as trace:
        extract_features(model, images)
    assert Counter(n for n, _ in trace.products) == Counter(n for n, _ in plain.products)
    # 10 blocks of 4 linear layers and 2 attention products, patch embedding, 3 mergings, 8 convolutions of the FPN
    assert len(trace.products) == 10 * 6 + 1 + 3 + 8
    assert all(len(operands) == 2 and all(operands) for _, operands in trace.products), trace.products
    assert len(quantized_layers(model)) == len(trace.products)
    outside = [n for n in quantizers(model) if not n.startswith(('backbone.', 'neck.'))]
    assert not outside
    heads = dict(model.rpn_head.named_modules(), **dict(model.roi_head.named_modules()))
    assert all(type(m).__module__.split('.')[0] != 'psaq_mm' for m in heads.values())


def test_parameters_stay_the_same_objects_under_the_same_names(detector):
    model = copy.deepcopy(detector)
    before = dict(model.named_parameters())
    quantize_model(model, {})
    after = dict(model.named_parameters())
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)
    assert set(before) <= set(model.state_dict())


def test_with_quantizers_off_the_model_is_bit_equal(detector):
    images = torch.randn(2, 3, 70, 100)  # no multiple of patch, window or shift
    with torch.no_grad():
        expected = extract_features(detector, images)
        model = quantize_model(copy.deepcopy(detector), {})
        set_mode(model, Mode.FLOAT)
        for a, b in zip(expected, extract_features(model, images)):
            assert torch.equal(a, b)


def test_an_unconverted_copy_predicts_an_uncalibrated_model_refuses(detector):
    model = quantize_model(copy.deepcopy(detector), {})
    with pytest.raises(UncalibratedError, match='tools/dfq.py'):
        extract_features(model, torch.randn(1, 3, 64, 64))


def test_bits_order_the_error(detector):
    images, errors = torch.randn(2, 3, 64, 64), []
    with torch.no_grad():
        expected = extract_features(detector, images)[0]
        for bits in (8, 6, 4, 2):
            model = quantize_model(copy.deepcopy(detector), dict(weight=dict(bits=bits), activation=dict(bits=bits)))
            errors.append((extract_features(calibrated(model, images), images)[0] - expected).abs().mean().item())
    assert 0 < errors[0] < errors[1] < errors[2] < errors[3]


def test_patch_embedding_keeps_8_bits_and_overrides_win(detector):
    model = quantize_model(copy.deepcopy(detector), dict(
        weight=dict(bits=4), keep_float=['neck.*', '*.matmul_scores'],
        overrides=[dict(pattern='*.qkv', weight=dict(bits=3), activation=dict(bits=5))]))
    layers = quantized_layers(model)
    embed = layers['backbone.patch_embed.projection']
    assert (embed.weight_quantizer.config.bits, embed.input_quantizer.config.bits) == (8, 8)
    attention = 'backbone.stages.1.blocks.1.attn.w_msa'
    assert layers[f'{attention}.qkv'].weight_quantizer.config.bits == 3
    assert layers[f'{attention}.qkv'].input_quantizer.config.bits == 5
    assert layers[f'{attention}.proj'].weight_quantizer.config.bits == 4
    assert f'{attention}.matmul_scores' not in layers
    assert layers[f'{attention}.matmul_context'].a_quantizer.config.bits == 8
    assert not any(name.startswith('neck') for name in layers)


def test_state_dict_round_trip_gives_the_same_features(detector):
    images = torch.randn(1, 3, 64, 64)
    stanza = dict(weight=dict(bits=4), activation=dict(granularity='per_channel'))
    model = calibrated(quantize_model(copy.deepcopy(detector), stanza), images)
    other = quantize_model(MODELS.build(Config.fromfile(DEMO_CONFIG).model).eval(), stanza)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for a, b in zip(extract_features(model, images), extract_features(other, images)):
            assert torch.equal(a, b)


def test_scales_for_layers_that_stay_in_float_are_refused(detector):
    model = calibrated(quantize_model(copy.deepcopy(detector), {}), torch.randn(1, 3, 64, 64))
    other = quantize_model(copy.deepcopy(detector), dict(keep_float=['neck.*']))
    with pytest.raises(QuantizerMismatchError, match='quantizes .neck.*keeps it in float'):
        other.load_state_dict(model.state_dict(), strict=False)


def test_a_layer_used_twice_is_converted_once():
    shared = torch.nn.Linear(4, 4)
    net = torch.nn.Module()
    net.backbone = torch.nn.ModuleList([shared, shared])
    layers = quantizable(net, ['backbone'])
    convert(net, layers, QuantizationConfig.parse({}).layer_configs(layers))
    assert net.backbone[0] is net.backbone[1]
    assert net.backbone[0].weight_quantizer is net.backbone[1].weight_quantizer


def test_layers_that_never_run_are_named(detector):
    model = quantize_model(copy.deepcopy(detector), dict(targets=['backbone', 'neck', 'rpn_head']))
    with pytest.raises(UserError, match=r"'rpn_head\..*keep_float"):
        calibrated(model, torch.randn(1, 3, 64, 64))


def test_model_bits_counts_integers(detector):
    net = torch.nn.Module()
    net.backbone = torch.nn.Linear(10, 6)
    assert model_bits(net) == 32 * 66
    layers = quantizable(net, ['backbone'])
    config = QuantizationConfig.parse(dict(weight=dict(bits=4)))
    convert(net, layers, config.layer_configs(layers))
    assert model_bits(net) == 60 * 4 + 6 * 32 + 2 * 32 * (6 + 1)


@pytest.mark.parametrize('layer, shape', [(nn.Linear(4, 6), (2, 5, 4)), (nn.Linear(4, 6), (5, 4)),
                                          (nn.Conv2d(4, 6, 1), (2, 4, 3, 3))], ids=str)
def test_what_a_layer_puts_out_may_be_changed_in_place(layer, shape):
    """As ReLU(inplace=True) does, with gradients on."""
    model = nn.ModuleDict(dict(backbone=nn.Sequential(layer, nn.ReLU(inplace=True))))
    model.backbone = model['backbone']
    quantize_model(model, dict(targets=['backbone']))
    x = torch.randn(shape, requires_grad=True)
    calibrate(model, lambda: model.backbone(x))
    set_mode(model, Mode.QUANTIZE)
    model.backbone(x).sum().backward()
    assert x.grad.abs().sum() > 0
