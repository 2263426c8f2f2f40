"""What images a model takes, where its backbone lives, which tokens are patches; building fetches nothing."""
import copy

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

from psaq_mm.engine.hooks import to_pixels
from psaq_mm.errors import UserError
from psaq_mm.models import (
    backbone_name,
    beyond_features,
    default_size,
    default_targets,
    extract_features,
    image_channels,
    nothing_fetched,
    own_size,
    pixel_statistics,
    predictor_of,
    quantize_model,
    resolved,
    similarity_taps,
    without_pretrained,
)
from psaq_mm.quantization import quantized_layers, quantizers
from psaq_mm.stanza import QuantizationConfig
from psaq_mm.synthesis import PatchSimilarityTap

TINY = dict(img_size=64, embed_dim=32, depth=2, num_heads=2)


def timm_model(name, **kwargs):
    return MODELS.build(dict(type='psaq_mm.TimmClassifier', model=name, num_classes=4, **kwargs)).eval()


def in_model(backbone, **parts):
    model = nn.Module()
    model.backbone = backbone
    for name, part in parts.items():
        setattr(model, name, part)
    return model.eval()


def conv(channels, out=8):
    return nn.Sequential(nn.Conv2d(channels, out, 4, 4), nn.Conv2d(out, 3, 1), nn.Conv2d(3, out, 1))


class Folds(nn.Module):
    """A stem that folds 2 x 2 pixels into channels before its first convolution."""

    def __init__(self, channels):
        super().__init__()
        self.fold, self.conv = nn.PixelUnshuffle(2), nn.Conv2d(4 * channels, 8, 1)

    def forward(self, x):
        return self.conv(self.fold(x))


@pytest.mark.parametrize('model, channels', [
    (lambda: in_model(conv(4)), 4), (lambda: in_model(conv(1)), 1), (lambda: in_model(Folds(3)), 3),
    (lambda: in_model(Folds(4)), 4), (lambda: timm_model('vit_tiny_patch16_224', in_chans=5, **TINY), 5),
    (lambda: timm_model('resnet10t', in_chans=1), 1),
    (lambda: in_model(MODELS.build(dict(_scope_='mmdet', type='CSPDarknet', widen_factor=0.125))), 3)],
    ids=['4', '1', 'folded 3', 'folded 4', 'timm 5', 'timm 1', 'Focus'])
def test_channels_are_those_that_the_first_layer_reads(model, channels):
    assert image_channels(model()) == channels


@pytest.mark.parametrize('channels', [3, 4])
def test_pixels_are_read_by_the_stem_alone(channels):
    for backbone, stem in ((conv(channels), 'backbone.0'), (Folds(channels), 'backbone.conv')):
        model = quantize_model(in_model(backbone), dict(weight=dict(bits=4)))
        bits = {name: layer.weight_quantizer.config.bits for name, layer in quantized_layers(model).items()}
        assert bits.pop(stem) == 8 and set(bits.values()) <= {4}, bits


@pytest.mark.parametrize('values, expected', [
    ([10.0, 20.0, 30.0, 40.0], [10.0, 20.0, 30.0, 40.0]), ([10.0], [10.0] * 4), ([10.0, 20.0, 30.0], None)])
def test_normalisation_has_one_value_a_channel(values, expected):
    preprocessor = MODELS.build(dict(_scope_='mmseg', type='SegDataPreProcessor', mean=values, std=values))
    model = in_model(conv(4), data_preprocessor=preprocessor)
    if expected is None:
        with pytest.raises(UserError, match=r'model.data_preprocessor.mean has 3 values.*4 channels'):
            pixel_statistics(model)
    else:
        assert pixel_statistics(model)[0].tolist() == expected


def test_normalisation_is_found_inside_a_wrapper():
    preprocessor = MODELS.build(dict(_scope_='mmdet', type='MultiBranchDataPreprocessor', data_preprocessor=dict(
        type='DetDataPreprocessor', mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0])))
    mean, std = pixel_statistics(in_model(conv(3), data_preprocessor=preprocessor))
    assert mean.tolist() == [1, 2, 3] and std.tolist() == [4, 5, 6]


@pytest.mark.parametrize('channels', [1, 2, 3, 5])
def test_pictures_of_any_number_of_channels(channels):
    images = torch.rand(2, channels, 4, 6)
    low, high = torch.zeros(1, channels, 1, 1), torch.ones(1, channels, 1, 1)
    found = to_pixels(images, low, high, False)
    assert found.shape == (2, 4, 6, 3) and found.dtype == np.uint8
    expected = (images * 255).round().numpy()
    for place in range(3):
        shown = 0 if channels == 1 else place
        assert np.array_equal(found[..., place], expected[:, shown] if shown < channels else np.zeros((2, 4, 6)))


@pytest.mark.parametrize('channels, mean', [(1, [(123.675 + 116.28 + 103.53) / 3]), (3, [123.675, 116.28, 103.53]),
                                            (4, [123.675, 116.28, 103.53, 123.675])])
def test_a_classifier_prepares_images_of_its_channels(channels, mean):
    model = timm_model('resnet10t', in_chans=channels)
    image = torch.randint(0, 256, (channels, 64, 64), dtype=torch.uint8)
    found = model.data_preprocessor(dict(inputs=[image]))['inputs']
    assert pixel_statistics(model)[0].tolist() == pytest.approx(mean, abs=1e-3)
    first = image.flip(0)[0] if channels == 3 else image[0]  # files are BGR
    std = pixel_statistics(model)[1][0]
    torch.testing.assert_close(found[0, 0], (first.float() - mean[0]) / std, rtol=1e-4, atol=1e-4)
    assert model(found).shape == (1, 4)


class Remembers(nn.Module):
    """Keeps what it computed of a parameter for as long as it does not train."""

    def __init__(self):
        super().__init__()
        self.conv, self.table, self.kept = nn.Conv2d(3, 4, 4, 4), nn.Parameter(torch.zeros(4)), None

    def forward(self, x):
        if self.kept is None:
            self.kept = self.table * 2
        return self.conv(x) + self.kept[:, None, None]


def test_asking_leaves_no_trace():
    model = in_model(Remembers())
    before = copy.deepcopy(model.state_dict())
    quantize_model(model, dict(targets=['backbone']))
    assert (image_channels(model), own_size(model)) == (3, None)
    assert model.backbone.kept is None and not model.backbone.training
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


@pytest.mark.parametrize('name, options, own, default', [
    ('vit_tiny_patch16_224', TINY, (64, 64), (64, 64)),
    ('vit_tiny_patch16_224', dict(TINY, dynamic_img_size=True), None, (64, 64)),
    ('beit_base_patch16_224', dict(TINY, img_size=(64, 96)), (64, 96), (64, 96)),
    ('maxvit_rmlp_pico_rw_256', dict(img_size=64), (64, 64), (64, 64)),
    ('resnet10t', {}, None, (176, 176)),
    ('hiera_tiny_224', dict(embed_dim=16, stages=(1, 1, 1, 1)), (224, 224), (224, 224))],
    ids=['vit', 'dynamic', 'beit', 'maxvit', 'resnet', 'hiera'])
def test_sizes_of_timms_models(name, options, own, default):
    model = timm_model(name, **options)
    assert own_size(model) == own and default_size(model) == default
    stanza = resolved(QuantizationConfig.parse({}), model)
    assert stanza.synthesis.size == (default, ) and stanza.targets == ('backbone', )
    assert QuantizationConfig.parse(stanza.to_dict()) == stanza
    chosen = QuantizationConfig.parse(dict(synthesis=dict(size=(96, 96)), targets=['head']))
    assert resolved(chosen, model) == chosen


def wrapped(**options):
    return dict(_scope_='mmseg', type='EncoderDecoder', backbone=dict(
        type='TIMMBackbone', model_name='vit_tiny_patch16_224', out_indices=(0, 1), **TINY, **options),
        decode_head=dict(type='FCNHead', in_channels=32, in_index=1, channels=8, num_classes=3, num_convs=1),
        test_cfg=dict(mode='whole'))


def test_a_wrapper_fetches_nothing_and_its_class_token_is_no_patch(monkeypatch):
    from timm.models import _builder
    fetched = []
    monkeypatch.setattr(_builder, 'load_pretrained', lambda *args, **kwargs: fetched.append(args))
    assert without_pretrained(wrapped())['backbone']['pretrained'] is False
    with nothing_fetched():  # a class of one's own hides the argument
        model = MODELS.build(wrapped()).eval()
    assert not fetched
    MODELS.build(wrapped())
    assert fetched  # asked for, and not by us
    assert own_size(model) == (64, 64) and image_channels(model) == 3
    image = torch.randn(1, 3, 64, 64)
    model = quantize_model(model, dict(keep_float=['*']))
    tap = PatchSimilarityTap(*similarity_taps(model.backbone, image))
    with torch.no_grad(), tap:
        model.backbone(image)
    assert [tuple(tokens.shape) for tokens in tap.tokens] == [(1, 16, 16)] * 2


def test_a_download_while_building_is_refused_at_once(tmp_path):
    with nothing_fetched(), pytest.raises(UserError, match='wants to download https://nowhere.invalid/a.pth'):
        torch.hub.load_state_dict_from_url('https://nowhere.invalid/a.pth', tmp_path)
    assert torch.hub.download_url_to_file.__name__ == 'download_url_to_file'


class Pair(nn.Module):
    """Two models, as of a semi-supervised detector; features are the second's."""

    def __init__(self, second=True):
        super().__init__()
        self.student = in_model(conv(3), neck=nn.Conv2d(8, 8, 1))
        self.teacher = in_model(conv(3), neck=nn.Conv2d(8, 8, 1))
        self.used = self.teacher if second else self.student
        for part in (self.student, self.teacher):
            part.extract_feat = lambda images, part=part: (part.neck(part.backbone(images)), )
        self.teacher.requires_grad_(False)

    def extract_feat(self, images):
        return self.used.extract_feat(images)


@pytest.mark.parametrize('second, name', [(True, 'teacher'), (False, 'student')])
def test_the_inner_model_that_gives_the_features_is_quantized(second, name):
    model = Pair(second)
    assert backbone_name(model) == f'{name}.backbone'
    assert default_targets(model) == (f'{name}.backbone', f'{name}.neck')
    assert predictor_of(model) is getattr(model, name) and not beyond_features(default_targets(model))
    quantize_model(model, {})
    assert quantizers(model) and all(key.startswith(f'{name}.') for key in quantizers(model))
    assert extract_features(Pair(second), torch.randn(1, 3, 16, 16))[0].shape == (1, 8, 4, 4)


def test_targets_are_what_the_model_has():
    assert default_targets(in_model(conv(3))) == ('backbone', )
    model = nn.Module()
    model.image_encoder, model.neck = conv(3), nn.Identity()
    assert default_targets(model) == ('image_encoder', 'neck')
    with pytest.raises(UserError, match='holds no backbone or image_encoder.*top level: layer'):
        default_targets(nn.ModuleDict(dict(layer=nn.Linear(2, 2))))


FAMILIES = dict(
    cait=('cait_xxs24_224', TINY, {16}),
    xcit=('xcit_nano_12_p16_224', dict(img_size=64, embed_dim=32, depth=2, num_heads=4), {784, 256, 64, 16}),
    convnext=('convnext_atto', dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)), {256, 64, 16, 4}),
    mixer=('mixer_s32_224', dict(img_size=64), {4}),
    distilled=('deit_tiny_distilled_patch16_224', TINY, {16}),
    registers=('vit_medium_patch16_rope_reg1_gap_256', dict(TINY, embed_dim=64), {16}),
    halo=('halonet26t', dict(), None), coat=('coat_tiny', dict(img_size=64), {256, 64, 16, 4}))


@pytest.mark.parametrize('family', FAMILIES)
def test_tokens_are_patches_whatever_the_family(family):
    name, options, positions = FAMILIES[family]
    model = quantize_model(timm_model(name, **options), dict(keep_float=['*']))
    side = 256 if family == 'halo' else 64  # its blocks have a size
    images = torch.randn(2, 3, side, side, requires_grad=True)
    tap = PatchSimilarityTap(*similarity_taps(model.backbone, images[:1].detach()))
    for _ in range(2):  # the second pass ends at the last tap
        tap.run(model.backbone, images)
        found = {tokens.shape[1] for tokens in tap.tokens}
        entropy = tap.entropy(2)
    assert positions is None or found == positions, found
    gradient, = torch.autograd.grad(entropy.sum(), images)
    assert torch.isfinite(entropy).all() and gradient.abs().max() > 0


def test_both_heads_of_a_distilled_classifier_count():
    import timm
    model = timm_model('deit_tiny_distilled_patch16_224', **TINY)
    source = timm.create_model('deit_tiny_distilled_patch16_224', num_classes=4, **TINY).eval()
    model.backbone.load_state_dict(source.state_dict())
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(images), source(images))
