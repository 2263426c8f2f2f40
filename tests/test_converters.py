"""Checkpoints in other layouts: what comes out computes what the original computes."""
import copy
import re

import pytest
import torch
from mmengine.registry import MODELS

from psaq_mm.engine.checkpoint import CheckpointError, convert_file, float_checkpoint, load_float
from psaq_mm.models.converters import convert_state, convert_swin, merging_order

from .conftest import run_tool

SWIN = dict(out_indices=(0, 1, 2, 3), depths=[2, 2, 2, 2], num_heads=[1, 2, 4, 8])


def detector(window=4, scope='mmdet'):
    backbone = dict(type=f'{scope}.SwinTransformer', embed_dims=16, window_size=window, **SWIN)
    if scope == 'mmseg':
        return MODELS.build(dict(
            _scope_='mmseg', type='EncoderDecoder', backbone=backbone,
            data_preprocessor=dict(type='SegDataPreProcessor'),
            decode_head=dict(type='UPerHead', in_channels=[16, 32, 64, 128], in_index=[0, 1, 2, 3], channels=16,
                             num_classes=3, norm_cfg=dict(type='BN')), test_cfg=dict(mode='whole'))).eval()
    return MODELS.build(dict(
        _scope_='mmdet', type='RPN', train_cfg=None, backbone=backbone,
        neck=dict(type='FPN', in_channels=[16, 32, 64, 128], out_channels=16, num_outs=5),
        rpn_head=dict(type='RPNHead', in_channels=16, feat_channels=16, anchor_generator=dict(
            type='AnchorGenerator', scales=[8], ratios=[1.0], strides=[4, 8, 16, 32, 64])),
        data_preprocessor=dict(type='DetDataPreprocessor'), test_cfg=dict(rpn=dict(
            nms_pre=10, max_per_img=10, nms=dict(type='nms', iou_threshold=0.7), min_bbox_size=0)))).eval()


def spread(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model


def old_merging(value):
    """OpenMMLab's channel-by-channel order to the original's pixel-by-pixel one, spelled out."""
    channels = value.shape[-1] // 4
    old = torch.empty_like(value)
    for channel in range(channels):
        for row in range(2):
            for column in range(2):
                # the original concatenates x[0::2, 0::2], x[1::2, 0::2], x[0::2, 1::2], x[1::2, 1::2]
                pixel = {(0, 0): 0, (1, 0): 1, (0, 1): 2, (1, 1): 3}[row, column]
                old[..., pixel * channels + channel] = value[..., channel * 4 + row * 2 + column]
    return old


def old_layout(state):
    """The keys of Swin-Transformer-Object-Detection for a model's own weights, with the buffers it stores."""
    old = {}
    for key, value in state.items():
        if key.startswith('backbone.'):
            key = key.replace('patch_embed.projection', 'patch_embed.proj').replace('.stages.', '.layers.')
            key = key.replace('.w_msa.', '.').replace('.ffn.layers.0.0.', '.mlp.fc1.').replace(
                '.ffn.layers.1.', '.mlp.fc2.')
            if '.downsample.' in key:
                value = old_merging(value)
        old[key] = value
    old['backbone.layers.0.blocks.1.attn_mask'] = torch.zeros(4, 16, 16)
    return old


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg'])
def test_old_layout_of_a_new_models_weights_gives_equal_outputs(scope, tmp_path):
    model = spread(detector(scope=scope))
    path = tmp_path / 'old.pth'
    torch.save(dict(state_dict=old_layout(model.state_dict()), meta=dict(mmdet_version='2.11.0', epoch=36)), path)
    other = detector(scope=scope)
    content = float_checkpoint(other, str(path))
    assert content['layout'] == 'Swin-Transformer-Object-Detection'
    load_float(other, content)
    images = torch.randn(2, 3, 72, 104)
    with torch.no_grad():
        for a, b in zip(model(images, mode='tensor')[0], other(images, mode='tensor')[0]):
            for x, y in zip(a, b):
                assert torch.equal(x, y)


def test_converted_weights_compute_what_the_original_swin_does():
    """timm's Swin keeps the original's order of everything: an independent judge of windows, shifts and merging."""
    import timm
    original = timm.create_model('swin_tiny_patch4_window7_224', img_size=(256, 320), window_size=4, embed_dim=16,
                                 depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), features_only=True,
                                 out_indices=(0, 1, 2, 3)).eval()
    spread(original)
    old = {}
    for key, value in original.state_dict().items():
        key = key.replace('layers_', 'layers.')
        moved = re.match(r'layers\.(\d)\.downsample\.(.*)', key)  # timm merges before a stage, the original after it
        old['backbone.' + (f'layers.{int(moved[1]) - 1}.downsample.{moved[2]}' if moved else key)] = value
    model = detector()
    for index in range(4):  # norms on each output, which timm's feature extractor does not have
        old[f'backbone.norm{index}.weight'] = torch.ones(16 << index)
        old[f'backbone.norm{index}.bias'] = torch.zeros(16 << index)
    converted, layout = convert_state(old, model)
    assert layout
    missing, unexpected = model.backbone.load_state_dict(
        {k.removeprefix('backbone.'): v for k, v in converted.items()}, strict=False)
    assert not unexpected and all(k.endswith('relative_position_index') for k in missing)
    images = torch.randn(2, 3, 256, 320)
    with torch.no_grad():
        for index, (a, b) in enumerate(zip(original(images), model.backbone(images))):
            a = torch.nn.functional.layer_norm(a, a.shape[-1:])
            torch.testing.assert_close(a.permute(0, 3, 1, 2), b, rtol=1e-4, atol=1e-4, msg=f'stage {index}')


def test_merging_order_is_a_permutation_that_matters():
    order = merging_order(24)
    assert sorted(order.tolist()) == list(range(24)) and order.tolist() != list(range(24))
    value = torch.randn(5, 24)
    assert torch.equal(old_merging(value)[..., order], value)


def test_other_window_size_and_other_models_are_refused_by_name(tmp_path):
    path = tmp_path / 'old.pth'
    torch.save(old_layout(detector(window=2).state_dict()), path)
    model = detector(window=4)
    with pytest.raises(CheckpointError, match=r'relative_position_bias_table is \(9, 1\) in the checkpoint, \(49, 1\)'):
        load_float(model, float_checkpoint(model, str(path)))
    torch.save({'layer1.0.conv1.weight': torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match='another architecture; its keys are like layer1'):
        load_float(model, float_checkpoint(model, str(path)))


def test_malformed_files_of_a_known_layout_are_named(tmp_path):
    path = tmp_path / 'old.pth'
    key = 'backbone.layers.0.blocks.0.attn.qkv.weight'
    torch.save({key: torch.ones(3), 'backbone.layers.0.downsample.norm.weight': torch.zeros(7)}, path)
    with pytest.raises(CheckpointError, match='old.pth has the keys of a layout .* not its shapes'):
        float_checkpoint(detector(), str(path))
    with pytest.raises(CheckpointError, match='old.pth has the keys of a layout .* not its shapes'):
        convert_file(str(path), str(tmp_path / 'new.pth'))
    torch.save(old_layout(detector().state_dict()), path)
    for target in (tmp_path, '/dev/null/new.pth'):
        with pytest.raises(CheckpointError, match=f'cannot write {target}'):
            convert_file(str(path), str(target))


def vit(**options):
    return MODELS.build(dict(
        _scope_='mmseg', type='EncoderDecoder', data_preprocessor=dict(type='SegDataPreProcessor'),
        backbone=dict(type='VisionTransformer', img_size=(64, 64), embed_dims=32, num_layers=1, num_heads=2,
                      out_indices=-1, **options),
        decode_head=dict(type='FCNHead', in_channels=32, in_index=0, channels=8, num_classes=3, num_convs=1),
        test_cfg=dict(mode='whole'))).eval()


def test_the_bias_of_mmsegs_patch_embedding(tmp_path):
    """mmseg 0 has it, mmseg 1 only where asked: neither is dropped without a word, and none is a bias of zero."""
    path, images = tmp_path / 'vit.pth', torch.randn(1, 3, 64, 64)
    torch.save(spread(vit(patch_bias=True)).state_dict(), path)
    plain = vit()
    with pytest.raises(CheckpointError, match='patch_embed.projection.bias, which the model lacks. Set model.backbone'):
        load_float(plain, float_checkpoint(plain, str(path)))
    torch.save(spread(plain).state_dict(), path)
    model = spread(vit(patch_bias=True))
    load_float(model, float_checkpoint(model, str(path)))
    with torch.no_grad():
        torch.testing.assert_close(model(images, mode='tensor'), plain(images, mode='tensor'))


@pytest.mark.parametrize('name, small, other', [
    ('deit_tiny_patch16_224', dict(img_size=64, embed_dim=32, depth=1, num_heads=2), dict(img_size=128)),
    ('swin_tiny_patch4_window7_224', dict(img_size=64, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 2)),
     dict(window_size=2)),
])
def test_what_timm_would_resample_is_refused(name, small, other, tmp_path):
    import timm
    torch.save(timm.create_model(name, num_classes=5, **dict(small, **other)).state_dict(), tmp_path / 'timm.pth')
    model = MODELS.build(dict(type='psaq_mm.TimmClassifier', model=name, num_classes=5, **small))
    with pytest.raises(CheckpointError, match='(pos_embed|relative_position_bias_table) is .* in the model'):
        load_float(model, float_checkpoint(model, str(tmp_path / 'timm.pth')), ('backbone', 'head'))
    model = MODELS.build(dict(type='psaq_mm.TimmClassifier', model=name, num_classes=7, **dict(small, **other)))
    with pytest.raises(CheckpointError, match='number of classes differs'):
        load_float(model, float_checkpoint(model, str(tmp_path / 'timm.pth')), ('backbone', 'head'))


def test_the_tool_converts_and_refuses(tmp_path):
    model = spread(detector())
    torch.save(dict(state_dict=old_layout(model.state_dict())), tmp_path / 'old.pth')
    done = run_tool('tools/convert_checkpoint.py', tmp_path / 'old.pth', tmp_path / 'new.pth')
    assert 'tensors in the layout of mmdet 3' in done.stdout
    state = torch.load(tmp_path / 'new.pth', weights_only=True)['state_dict']
    own = {k: v for k, v in model.state_dict().items() if not k.endswith('relative_position_index')}
    assert state.keys() == own.keys() and all(torch.equal(state[k], own[k]) for k in own)
    again = run_tool('tools/convert_checkpoint.py', tmp_path / 'new.pth', tmp_path / 'newer.pth', check=False)
    assert again.returncode == 2 and 'is in the layout of mmdet 3 and mmseg 1 already' in again.stderr
    assert 'Traceback' not in again.stderr and not (tmp_path / 'newer.pth').exists()
    over = run_tool('tools/convert_checkpoint.py', tmp_path / 'old.pth', tmp_path / 'new.pth', check=False)
    assert over.returncode == 2 and '--overwrite' in over.stderr
    torch.save({'conv.weight': torch.zeros(1)}, tmp_path / 'other.pth')
    other = run_tool('tools/convert_checkpoint.py', tmp_path / 'other.pth', tmp_path / 'x.pth', check=False)
    assert other.returncode == 2 and "keys like conv.weight; what can be converted" in other.stderr


def test_timms_and_older_layouts_of_classifiers():
    """Files of timm, and of Swin's authors, whose merging belongs to the stage before."""
    import timm
    swin = dict(img_size=64, window_size=4, embed_dim=16, depths=(2, 2, 2), num_heads=(2, 2, 2), num_classes=5)
    source = spread(timm.create_model('swin_tiny_patch4_window7_224', **swin)).eval()
    state = source.state_dict()
    old = {}
    for key, value in state.items():
        key = re.sub(r'layers\.(\d)\.downsample', lambda m: f'layers.{int(m[1]) - 1}.downsample', key)
        key = key.replace('head.fc.', 'head.')
        old[key] = value
    images = torch.randn(2, 3, 64, 64)
    for layout in (state, old):
        model = MODELS.build(dict(type='psaq_mm.TimmClassifier', model='swin_tiny_patch4_window7_224', **swin)).eval()
        converted, name = convert_state(copy.deepcopy(layout), model)
        assert name == 'timm'
        load_float(model, dict(state_dict=converted, path='file'), ('backbone', 'head'))
        with torch.no_grad():
            torch.testing.assert_close(model(images), source(images))
    own, name = convert_state(model.state_dict(), model)
    assert name is None and own.keys() == model.state_dict().keys()
    assert convert_swin({'neck.weight': torch.ones(1)}) == {'neck.weight': torch.ones(1)}


def test_errors_show_a_classifiers_file_as_it_is(tmp_path):
    torch.save({'layer1.conv.weight': torch.ones(3)}, tmp_path / 'resnet.pth')
    model = MODELS.build(dict(type='psaq_mm.TimmClassifier', model='deit_tiny_patch16_224', img_size=64, embed_dim=32,
                              depth=1, num_heads=2))
    with pytest.raises(CheckpointError, match='its keys are like layer1.conv.weight'):
        load_float(model, float_checkpoint(model, str(tmp_path / 'resnet.pth')), ('backbone', 'head'))
