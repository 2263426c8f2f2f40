"""Every family of the paper: conversion is held against the library's own forward and a trace of what really runs."""
import copy

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

from psaq_mm.errors import UserError
from psaq_mm.models import (
    attention_blocks,
    backbone_of,
    checkpoint_blocks,
    extract_features,
    extract_inner,
    quantize_model,
    similarity_taps,
    telling_features,
)
from psaq_mm.quantization import (
    CONTEXT,
    SUMS,
    ActivationConfig,
    Mode,
    QuantizedMultiheadAttention,
    calibrate,
    convert,
    layer_errors,
    multiplications,
    quantizable,
    quantize_residual,
    quantized_layers,
    quantizers,
    set_mode,
)
from psaq_mm.stanza import QuantizationConfig
from psaq_mm.synthesis import PatchSimilarityTap

from .trace import Trace

SEG_HEAD = dict(type='FCNHead', channels=8, num_classes=3, num_convs=1)
SWIN = dict(embed_dims=16, depths=[2, 2, 2, 2], num_heads=[2, 2, 2, 2], window_size=4, out_indices=(0, 1, 2, 3))


def mmdet_swin():
    return MODELS.build(dict(
        _scope_='mmdet', type='RPN', train_cfg=None, backbone=dict(type='SwinTransformer', **SWIN),
        neck=dict(type='FPN', in_channels=[16, 32, 64, 128], out_channels=16, num_outs=5),
        rpn_head=dict(type='RPNHead', in_channels=16, feat_channels=16, anchor_generator=dict(
            type='AnchorGenerator', scales=[8], ratios=[1.0], strides=[4, 8, 16, 32, 64])),
        data_preprocessor=dict(type='DetDataPreprocessor'), test_cfg=dict(rpn=dict(
            nms_pre=10, max_per_img=10, nms=dict(type='nms', iou_threshold=0.7), min_bbox_size=0))))


def mmseg_swin():
    return MODELS.build(dict(
        _scope_='mmseg', type='EncoderDecoder', backbone=dict(type='SwinTransformer', **SWIN),
        neck=dict(type='FPN', in_channels=[16, 32, 64, 128], out_channels=16, num_outs=4),
        decode_head=dict(SEG_HEAD, in_channels=16, in_index=0), data_preprocessor=dict(type='SegDataPreProcessor'),
        test_cfg=dict(mode='whole')))


MULTI_LEVEL = dict(type='MultiLevelNeck', in_channels=[32] * 4, out_channels=16, scales=[4, 2, 1, 0.5])


def mmseg_vit(neck=MULTI_LEVEL):
    return MODELS.build(dict(
        _scope_='mmseg', type='EncoderDecoder',
        backbone=dict(type='VisionTransformer', img_size=(64, 64), patch_size=16, embed_dims=32, num_layers=4,
                      num_heads=4, out_indices=(0, 1, 2, 3), with_cls_token=True),
        neck=neck, decode_head=dict(SEG_HEAD, in_channels=neck.get('out_channels', 32), in_index=0),
        data_preprocessor=dict(type='SegDataPreProcessor'), test_cfg=dict(mode='whole')))


def mmseg_vit_pyramid():
    return mmseg_vit(dict(type='Feature2Pyramid', embed_dim=32, norm_cfg=dict(type='BN')))


def timm_swin():
    return MODELS.build(dict(
        type='psaq_mm.TimmClassifier', model='swin_tiny_patch4_window7_224', num_classes=5, img_size=(64, 96),
        window_size=4, embed_dim=16, depths=(2, 2, 2), num_heads=(2, 2, 2)))


def timm_swin_fused():
    model = timm_swin()
    for module in model.backbone.modules():
        if hasattr(module, 'fused_attn'):
            module.fused_attn = True
    return model


def timm_vit(fused=True):
    model = MODELS.build(dict(
        type='psaq_mm.TimmClassifier', model='deit_tiny_patch16_224', num_classes=5, img_size=(64, 96), embed_dim=32,
        depth=3, num_heads=2))
    for block in model.backbone.blocks:
        block.attn.fused_attn = fused
    return model


def timm_vit_unfused():
    return timm_vit(False)


# Blocks with 4 linear layers and 2 products each; other linear layers and convolutions of backbone and neck; attention
# class tokens.
FAMILIES = {
    mmdet_swin: (8, 1 + 3 + 8, 0),
    mmseg_swin: (8, 1 + 3 + 8, 0),
    mmseg_vit: (4, 1 + 4 + 4, 1),
    mmseg_vit_pyramid: (4, 1 + 3, 1),
    timm_swin: (6, 1 + 2, 0),
    timm_swin_fused: (6, 1 + 2, 0),
    timm_vit: (3, 1, 1),
    timm_vit_unfused: (3, 1, 1),
}


@pytest.fixture(scope='module', params=FAMILIES, ids=lambda f: f.__name__)
def family(request):
    torch.manual_seed(0)
    model = request.param().eval()
    with torch.no_grad():  # position tables and class tokens start at zero, which would hide mistakes in them
        for name, parameter in model.named_parameters():
            if any(word in name for word in ('relative_position', 'cls_token', 'pos_embed', 'bias')):
                parameter.normal_(std=0.2)
    return model, *FAMILIES[request.param]


SIZES = {'timm': (64, 96), 'mm': (72, 104)}  # the latter is no multiple of patch, window or shift


def images_for(model, count=2):
    kind = 'timm' if hasattr(model, 'head') else 'mm'
    return torch.randn(count, 3, *SIZES[kind], generator=torch.Generator().manual_seed(1))


def calibrated(model, stanza, images, heads=False):
    model = quantize_model(copy.deepcopy(model), stanza)
    calibrate(model, lambda: extract_features(model, images, heads))
    return model


def test_what_tells_images_apart(family):
    """Maps of backbone and neck; of a classifier what its last block puts out, not what its last norm does."""
    model, images = family[0], images_for(family[0])
    with torch.no_grad():
        found, features = telling_features(model, images), extract_features(model, images)
    maps = [feature for feature in features if feature.dim() == 4]
    if maps:
        assert all(map(torch.equal, found, maps)) and len(found) == len(maps)
    else:
        vectors, = found
        assert vectors.shape == (len(images), backbone_of(model).num_features)
        assert not torch.allclose(vectors, features[0]) and vectors.var(0).sum() > 0
    assert not any(module._forward_hooks for module in attention_blocks(backbone_of(model)))


def test_with_quantizers_off_nothing_changes(family):
    model, images = family[0], images_for(family[0])
    with torch.no_grad():
        expected = extract_features(model, images)
        converted = quantize_model(copy.deepcopy(model), {})
        set_mode(converted, Mode.FLOAT)
        found = extract_features(converted, images)
    assert len(found) == len(expected)
    for a, b in zip(expected, found):
        assert torch.allclose(a, b, rtol=1e-5, atol=2e-5), (a - b).abs().max()


def test_every_product_that_runs_is_quantized(family, monkeypatch):
    model, blocks, others, _ = family
    images = images_for(model, 1)
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operation for everything, which a trace cannot look into
    try:
        with torch.no_grad(), Trace() as plain:
            extract_features(model, images)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    converted = calibrated(model, {}, images)
    with torch.no_grad(), Trace() as trace:
        extract_features(converted, images)
    # Not the number of products: mmseg's ViT projects query, key and value one by one, which are one tensor.
    assert trace.multiplications == plain.multiplications > 0
    assert len(trace.products) == blocks * 6 + others
    assert all(len(operands) == 2 and all(operands) for _, operands in trace.products), trace.products
    assert len(quantized_layers(converted)) == len(trace.products)
    assert all(name.startswith(('backbone.', 'neck.')) for name in quantizers(converted))


def test_every_product_of_a_head_that_is_named_is_quantized(family):
    model, images = family[0], images_for(family[0], 1)
    head = next(name for name in ('bbox_head', 'decode_head', 'head') if hasattr(model, name))

    def products(stanza, heads):
        converted = calibrated(model, stanza, images, heads)
        with torch.no_grad(), Trace() as trace:
            extract_features(converted, images, heads)
        return trace.products

    without = products({}, False)
    found = products(dict(targets=['backbone', *['neck'] * hasattr(model, 'neck'), head]), True)
    assert len(found) > len(without)
    assert all(len(operands) == 2 and all(operands) for _, operands in found), found


def test_the_error_and_the_cost_of_every_layer_are_measured(family):
    model, images = family[0], images_for(family[0], 1)
    quantized = calibrated(model, {}, images)
    layers = quantized_layers(quantized)
    errors = layer_errors(quantized, lambda: extract_features(quantized, images, False))
    costs = multiplications(quantized, lambda: extract_features(quantized, images, False))
    assert {error.name for error in errors} == layers.keys() == costs.keys()
    assert all(10 < error.sqnr < 100 for error in errors) and all(cost > 0 for cost in costs.values())


def test_parameters_keep_their_names_and_a_state_dict_brings_the_scales(family):
    model, images = family[0], images_for(family[0])
    converted = calibrated(model, dict(weight=dict(bits=4)), images)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in converted.named_parameters()]
    other = quantize_model(copy.deepcopy(model), dict(weight=dict(bits=4)))
    other.load_state_dict(converted.state_dict())
    with torch.no_grad():
        for a, b in zip(extract_features(converted, images), extract_features(other, images)):
            assert torch.equal(a, b)


def test_taps_see_the_patches_of_every_block(family):
    model, blocks, _, class_tokens = family
    converted = quantize_model(copy.deepcopy(model), dict(keep_float=['*']))  # float attention shows its products, too
    products, readers, _ = taps = similarity_taps(converted.backbone, images_for(model)[:1])
    assert len(products) == blocks and {reader.keywords['skip'] for reader in readers} == {class_tokens}
    tap = PatchSimilarityTap(*taps)
    images = images_for(model).requires_grad_()
    with tap:
        converted.backbone(images)
    if class_tokens:  # 16 x 16 patches, those at the border padded to be whole
        height, width = SIZES['timm' if hasattr(model, 'head') else 'mm']
        assert {t.shape[1] for t in tap.tokens} == {-(-height // 16) * -(-width // 16)}
    entropy = tap.entropy(len(images))
    assert entropy.shape == (2, ) and torch.isfinite(entropy).all()
    gradient, = torch.autograd.grad(entropy.sum(), images)
    assert gradient.abs().max() > 0


def test_tokens_are_what_attention_puts_out(family):
    """Weights times values, which the output projection reads: its input, less the heads."""
    model, blocks, _, class_tokens = family
    converted = quantize_model(copy.deepcopy(model), dict(keep_float=['*']))
    expected, taps = [], similarity_taps(converted.backbone, images_for(model)[:1])
    for module in converted.backbone.modules():
        projection = getattr(module, 'proj', getattr(module, 'out_proj', None))
        if hasattr(module, 'num_heads') and isinstance(projection, nn.Linear):
            projection.register_forward_pre_hook(lambda _, args, heads=module.num_heads: expected.append(
                args[0].unflatten(-1, (heads, -1)).mean(-2)[:, class_tokens:]))
    tap = PatchSimilarityTap(*taps)
    with torch.no_grad(), tap:
        converted.backbone(images_for(model))
    assert len(tap.tokens) == len(expected) == blocks
    for ours, theirs in zip(tap.tokens, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_patch_embedding_keeps_8_bits(family):
    model = quantize_model(copy.deepcopy(family[0]), dict(weight=dict(bits=4)))
    bits = {name.removeprefix('backbone.').partition('.')[0]: layer.weight_quantizer.config.bits
            for name, layer in quantized_layers(model).items() if hasattr(layer, 'weight_quantizer')}
    assert bits.pop('patch_embed') == 8 and set(bits.values()) == {4}


@pytest.mark.parametrize('stanza, symmetric', [
    (dict(), True), (dict(bits=6), False), (dict(bits=6, symmetric_products=True), True),
    (dict(symmetric_products=False), False)])
def test_queries_keys_and_values_are_symmetric_at_8_bits(stanza, symmetric):
    for model in (mmdet_swin(), mmseg_vit(), timm_vit()):
        found = quantizers(quantize_model(model, dict(targets=['backbone'], activation=stanza)))
        operands = {name: quantizer.config.symmetric for name, quantizer in found.items()
                    if name.endswith(('.a_quantizer', '.b_quantizer'))}
        for name, ours in operands.items():  # attention weights are not negative
            assert ours == (symmetric and not name.endswith('matmul_context.a_quantizer')), name
        assert len(operands) >= 12
        assert not any(q.config.symmetric for name, q in found.items() if name.endswith('input_quantizer'))


def test_targets_may_name_heads(family):
    model, images = family[0], images_for(family[0])
    head = next(name for name in ('bbox_head', 'decode_head', 'head') if hasattr(model, name))
    converted = calibrated(model, dict(targets=['backbone', head]), images, heads=True)
    inside = [name for name in quantized_layers(converted) if name.startswith(f'{head}')]
    linear = (nn.Linear, nn.Conv2d)
    expected = sum(isinstance(m, linear) for m in getattr(model, head).modules())
    assert len(inside) == expected > 0
    assert not any(name.startswith('neck') for name in quantized_layers(converted))
    with torch.no_grad():
        features = extract_features(converted, images, heads=True)
        assert len(features) > len(extract_features(converted, images))  # the head's outputs are compared, too
        torch.testing.assert_close(features[0], extract_features(converted, images)[0])


def test_inner_maps_are_those_of_every_second_block_and_the_last(family):
    model, blocks = family[:2]
    images, seen, expected = images_for(model), [], []
    converted = calibrated(model, {}, images)
    for block in attention_blocks(converted.backbone)[::-2]:
        block.register_forward_hook(lambda block, inputs, output: expected.append(output))
    with torch.no_grad():
        features = extract_inner(converted, images, visit=seen.append)
        assert len(seen) == len(expected) == -(-blocks // 2) and all(a is b for a, b in zip(seen, expected))
        heads, attentions = [], [m for block in attention_blocks(converted.backbone)[::-2] for m in block.modules()
                                 if hasattr(m, CONTEXT)]
        found = extract_inner(converted, images, visit_heads=heads.append)
        again = extract_inner(converted, images)
    assert len(heads) == len(attentions) and all(torch.equal(a, b) for a, b in zip(features, found))
    assert all(out.dim() > 2 and out.shape[-2] > 1 for out in heads)
    assert len(seen) * 3 == len(expected) and all(torch.equal(a, b) for a, b in zip(features, again))


def test_residual_stream_is_quantized_where_asked(family):
    """Both sums of every block, seen from outside: what a block puts out has no more values than the grid."""
    model, blocks = family[:2]
    images = images_for(model)
    with torch.no_grad():
        expected = extract_features(model, images)
    converted = calibrated(model, dict(placement='all', activation=dict(bits=4)), images)
    assert sum(name.endswith('_sum_quantizer') for name in quantizers(converted)) == 2 * blocks
    seen = []
    for block in attention_blocks(converted.backbone):
        block.register_forward_hook(lambda block, inputs, output: seen.append(len(output.unique())))
    with torch.no_grad():
        extract_features(converted, images)
        assert len(seen) == blocks and all(4 < values <= 16 for values in seen), seen
        set_mode(converted, Mode.FLOAT)
        for a, b in zip(expected, extract_features(converted, images)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_placement_all_without_blocks_takes_single_layers_or_is_an_error(family):
    head = next(name for name in ('bbox_head', 'decode_head', 'head', 'rpn_head') if hasattr(family[0], name))
    model, settings = copy.deepcopy(family[0]), dict(placement='all', activation=dict(bits=4), targets=[head])
    if not isinstance(model.head if head == 'head' else None, nn.Linear):
        with pytest.raises(UserError, match="placement = 'all': .*no attention block"):
            quantize_model(model, settings)
        return
    images = images_for(model)
    converted = calibrated(model, settings, images, heads=True)  # a single layer: its output is quantized instead
    with torch.no_grad():
        integers = converted(images) / converted.head.output_quantizer.scale
    torch.testing.assert_close(integers, integers.round(), rtol=0, atol=1e-4)


def test_a_block_without_residual_sums_is_an_error():
    class Block(nn.Module):
        def forward(self, x):
            return x + x.mean(0)
    block = quantize_residual(Block(), {part: ActivationConfig() for part in SUMS})
    with pytest.raises(UserError, match='Block.forward makes 0 visible residual additions.*quantization.placement'):
        block(torch.rand(2, 3, 4))


def test_checkpointed_blocks_give_the_same_gradient(family):
    """Activation checkpointing: fewer activations are kept, no number changes."""
    model, blocks = family[:2]
    images = images_for(model).requires_grad_()
    results = []
    for checkpointed in (False, True):
        converted = quantize_model(copy.deepcopy(model), {})
        set_mode(converted, Mode.FLOAT)
        assert len(attention_blocks(converted.backbone)) == blocks
        if checkpointed:
            checkpoint_blocks(converted.backbone)
        tap = PatchSimilarityTap(*similarity_taps(converted.backbone, images_for(model)[:1]))
        for _ in range(2):  # the second pass ends at the last tap
            tap.run(converted.backbone, images)
            entropy = tap.entropy(len(images)).sum()
            results.append((entropy.detach(), *torch.autograd.grad(entropy, images)))
    for other in results[1:]:
        for a, b in zip(results[0], other):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('learned', [False, True], ids=['fixed ranges', 'learned ranges'])
def test_gradients_of_the_fused_functions_are_those_of_their_parts(family, monkeypatch, learned):
    model, images = family[0], images_for(family[0])
    converted = calibrated(model, dict(activation=dict(observer='percentile', percentile=95.0)), images)  # some clipped
    trained = [p for p in converted.parameters() if p.requires_grad]
    if learned:
        trained.extend(q.learn_range() for q in quantizers(converted).values())
    gradients = []
    for plain in (False, True):
        if plain:
            monkeypatch.setattr('psaq_mm.quantization.layers._trains', lambda *tensors: False)
        loss = sum(f.square().mean() for f in extract_features(converted, images))
        gradients.append(torch.autograd.grad(loss, trained, allow_unused=True))
    assert sum(g is not None for g in gradients[0]) > 10
    for a, b in zip(*gradients):  # another order of summation moves a few values over the edge between two integers
        assert (a is None) == (b is None) and (a is None or (a - b).norm() <= 1e-3 * b.norm() + 1e-7), (a - b).norm()


# -- nn.MultiheadAttention, in every way it can be called --------------------------------------------------------------

ATTENTIONS = {
    'packed': dict(),
    'batch first': dict(batch_first=True),
    'no bias': dict(bias=False),
    'other widths': dict(kdim=12, vdim=20),
    'extra keys': dict(add_bias_kv=True, add_zero_attn=True),
}


@pytest.mark.parametrize('options', ATTENTIONS.values(), ids=ATTENTIONS)
@pytest.mark.parametrize('masks', ['none', 'boolean', 'float', 'per head'])
def test_multihead_attention_computes_what_torch_does(options, masks):
    torch.manual_seed(0)
    model = nn.Module()
    model.backbone = nn.MultiheadAttention(16, 4, **options).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    batch, length, keys = 2, 5, 7
    query = torch.randn(batch, length, 16)
    key = torch.randn(batch, keys, options.get('kdim', 16))
    value = torch.randn(batch, keys, options.get('vdim', 16))
    if not options.get('batch_first'):
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    mask = {
        'none': dict(),
        'boolean': dict(attn_mask=torch.rand(length, keys) > 0.7,
                        key_padding_mask=torch.tensor([[False] * 6 + [True]] * 2)),
        'float': dict(attn_mask=torch.randn(length, keys), key_padding_mask=torch.randn(batch, keys)),
        'per head': dict(attn_mask=torch.randn(batch * 4, length, keys)),
    }[masks]
    expected, weights = model.backbone(query, key, value, **mask)
    layers = quantizable(model, ['backbone'])
    convert(model, layers, QuantizationConfig.parse({}).layer_configs(layers))
    assert type(model.backbone) is QuantizedMultiheadAttention
    assert len(layers) == (6 if 'kdim' in options else 4)
    calibrate(model, lambda: model.backbone(query, key, value, **mask))
    error = (model.backbone(query, key, value, **mask)[0] - expected).abs().max()
    assert 0 < error < 0.1 * expected.abs().max()
    set_mode(model, Mode.FLOAT)
    found, found_weights = model.backbone(query, key, value, **mask)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found_weights, weights)
    per_head = model.backbone(query, key, value, average_attn_weights=False, **mask)[1]
    torch.testing.assert_close(per_head.mean(1), weights)
    assert model.backbone(query, key, value, need_weights=False, **mask)[1] is None
    if masks == 'none':
        single = [x[0] if options.get('batch_first') else x[:, 0] for x in (query, key, value)]
        torch.testing.assert_close(model.backbone(*single)[0],
                                   expected[0] if options.get('batch_first') else expected[:, 0])


def test_layers_of_a_multihead_attention_are_measured():
    model = calibrated(mmseg_vit(), {}, torch.randn(1, 3, 64, 64))
    run = lambda: extract_features(model, torch.randn(1, 3, 64, 64))  # noqa: E731
    errors = {error.name: error for error in layer_errors(model, run)}
    assert errors.keys() == quantized_layers(model).keys() == multiplications(model, run).keys()
    assert all(20 < error.sqnr < 80 for error in errors.values())
    tokens = 1 + 4 * 4
    assert multiplications(model, run)['backbone.layers.0.attn.attn.in_proj'] == 3 * 32 * 32 * tokens
