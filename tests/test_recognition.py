"""Attention is recognised by what a forward computes; what the documentation says of one's own backbone is run."""
import copy
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from torch import nn

from psaq_mm.models import BACKBONES, quantize_model
from psaq_mm.quantization import (
    Mode,
    attention_parts,
    calibrate,
    quantized_layers,
    quantizer_mode,
    set_mode,
    unused_quantizers,
)
from psaq_mm.quantization.recognition import is_attention
from psaq_mm.zoo import check_config, is_transformer, shrink, zoo_configs

ROOT = Path(__file__).resolve().parents[1]


class Operators(nn.Module):

    def forward(self, q, k, v):
        return (q @ k.mT).softmax(-1) @ v


class Module(nn.Module):

    def __init__(self):
        super().__init__()
        self.normalise = nn.Softmax(-1)

    def forward(self, q, k, v):
        return torch.bmm(self.normalise(torch.bmm(q, k.mT)), v)


def weights_of(q, k):
    return F.softmax(torch.matmul(q, k.mT), -1)


class Helpers(nn.Module):

    def context(self, weights, v):
        return weights.matmul(v)

    def forward(self, q, k, v):
        return self.context(weights_of(q, k), v)


class Fused(nn.Module):

    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


class Either(nn.Module):
    fused = False

    def forward(self, q, k, v, mask=None):
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v, mask)
        if mask is None:
            scores = q @ k.mT
        else:
            scores = q @ k.mT + mask
        return scores.softmax(-1) @ v


class Inherits(Operators):

    def forward(self, *args):
        return super().forward(*args) + 1


class Linear(nn.Module):

    def forward(self, q, k, v):
        return q @ (k.mT @ v)


class Three(nn.Module):

    def forward(self, q, k, v):
        weights = (q @ k.mT).softmax(-1)
        return weights @ v, weights.mT @ q


class Einsum(nn.Module):

    def forward(self, q, k, v):
        return torch.einsum('bij,bjd->bid', torch.einsum('bid,bjd->bij', q, k).softmax(-1), v)


class Loop(nn.Module):

    def forward(self, q, k, v):
        for _ in range(2):
            v = (q @ k.mT).softmax(-1) @ v
        return v


class Container(nn.Module):

    def __init__(self):
        super().__init__()
        self.attention = Operators()

    def forward(self, q, k, v):
        return self.attention(q, k, v)


@pytest.mark.parametrize('kind, expected', [
    (Operators, True), (Module, True), (Helpers, True), (Fused, True), (Either, True), (Inherits, True),
    (Linear, False), (Three, False), (Einsum, False), (Loop, False), (Container, False)], ids=lambda x: str(x))
def test_attention_is_two_products_around_a_softmax(kind, expected):
    module = kind()
    assert is_attention(module) is expected
    assert bool(attention_parts(module)) is expected


def test_layers_and_multihead_attention_are_no_such_modules():
    for module in (nn.Linear(2, 2), nn.Conv2d(2, 2, 1), nn.MultiheadAttention(4, 2), nn.TransformerEncoderLayer(4, 2)):
        assert not is_attention(module)


def test_every_attention_of_the_libraries_is_recognised():
    """Those that were once listed by name, and others; not the containers and heads beside them."""
    from mmseg.models.backbones import beit, swin, twins
    from mmseg.models.utils import SelfAttentionBlock
    from timm.layers.attention import Attention
    from timm.models import swin_transformer

    kinds = [swin.WindowMSA(8, 2, (2, 2)), beit.BEiTAttention(8, 2, (2, 2)), twins.LocallyGroupedSelfAttention(8, 2),
             SelfAttentionBlock(8, 8, 8, 8, False, None, None, 1, 1, False, False, True, True, None, None, None),
             Attention(8, 2), swin_transformer.WindowAttention(8, 2, 2)]
    for module in kinds:
        assert is_attention(module), type(module)
    for module in (swin.ShiftWindowMSA(8, 2, 2), swin.SwinBlock(8, 2, 16, 2), twins.LSAEncoderLayer(8, 2, 16)):
        assert not is_attention(module), type(module)


class Applies(nn.Module):
    """Layers whose weights a forward applies, each in another way."""

    def __init__(self, way):
        super().__init__()
        self.way, self.layer, self.conv = way, nn.Linear(6, 6, bias=False), nn.Conv2d(6, 6, 1)
        self.other, self.bias = nn.Linear(6, 6), nn.Parameter(torch.randn(6))

    def forward(self, x):
        way, weight = self.way, self.layer.weight
        if way == 'linear':
            return F.linear(x, self.layer.weight, self.bias)
        if way == 'named':
            return F.linear(x, weight=weight, bias=self.bias)
        if way == 'other bias':
            return F.linear(x, self.other.weight, self.bias)
        if way == 'matmul':
            return x @ self.layer.weight.T
        if way == 'method':
            return x.matmul(weight.t())
        if way == 'einsum':
            return torch.einsum('bnc,oc->bno', x, weight)
        if way == 'scaled':
            return F.linear(x, self.layer.weight * 2)
        if way == 'sliced':
            return F.linear(x, self.layer.weight[:4])
        if way == 'helper':
            return applied(x, self.layer)
        if way == 'joined':
            return F.linear(x, torch.cat([self.layer.weight, self.other.weight]))
        return F.conv2d(x.mT[..., None], self.conv.weight, self.bias).squeeze(-1).mT


def applied(x, layer):
    return F.linear(x, layer.weight)


class Standardised(nn.Conv2d):

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


def in_model(backbone):
    model = nn.Module()
    model.backbone = backbone
    return model.eval()


def rounded(model, x):
    """A quantized copy's output, and by name what its quantizers saw."""
    run = lambda: model.backbone(x)  # noqa: E731
    calibrate(model, run)
    return run()


WAYS = dict(linear=['layer'], named=['layer'], matmul=['layer'], method=['layer'], einsum=['layer'], scaled=['layer'],
            sliced=['layer'], helper=['layer'], joined=['layer', 'other'], conv=['conv'])
WAYS['other bias'] = ['other']


@pytest.mark.parametrize('way', WAYS)
def test_a_layer_whose_weight_is_applied_by_another_is_quantized(way):
    x, model = torch.randn(2, 5, 6), in_model(Applies(way))
    names = WAYS[way]
    idle = [f'backbone.{name}' for name in ('layer', 'other', 'conv') if name not in names]
    expected = model.backbone(x)
    quantize_model(model, dict(targets=['backbone'], keep_float=idle, weight=dict(bits=3), activation=dict(bits=4),
                               patch_embed_bits=3))
    assert not unused_quantizers(model, lambda: model.backbone(x))
    for copied in (model, copy.deepcopy(model)):
        set_mode(copied, Mode.FLOAT)
        torch.testing.assert_close(copied.backbone(x), expected)
        set_mode(copied, Mode.QUANTIZE)
        found = rounded(copied, x)
        grads = torch.autograd.grad(found.square().sum(), [getattr(copied.backbone, name).weight for name in names])
        assert all(grad.abs().sum() > 0 for grad in grads)
        # the same as with what the integers stand for
        layer = getattr(copied.backbone, names[0])
        plain = Applies(way)
        plain.load_state_dict({k: v for k, v in copied.backbone.state_dict().items() if 'quantizer' not in k})
        with torch.no_grad():
            for name in names:
                getattr(plain, name).weight.copy_(getattr(copied.backbone, name).weight_quantizer(
                    getattr(copied.backbone, name).weight))
            rounded_x = x if way == 'conv' else layer.input_quantizer(x)
            torch.testing.assert_close(found, plain(rounded_x) if way != 'conv' else plain(
                layer.input_quantizer(x.mT[..., None]).squeeze(-1).mT), rtol=1e-4, atol=1e-5)
        assert (found - expected).abs().max() > 0.01


def test_a_layer_with_a_forward_of_its_own_is_quantized():
    x, model = torch.randn(2, 3, 8, 8), in_model(nn.Sequential(Standardised(3, 4, 3), nn.ReLU()))
    expected = model.backbone(x)
    quantize_model(model, dict(targets=['backbone'], patch_embed_bits=3))
    assert list(quantized_layers(model)) == ['backbone.0'] and model.backbone[0].reads_pixels
    with quantizer_mode(model, Mode.FLOAT):
        torch.testing.assert_close(model.backbone(x), expected)
    calibrate(model, lambda: model.backbone(x))
    found = model.backbone(x)
    weight = model.backbone[0].weight_quantizer(model.backbone[0].weight)
    weight = weight - weight.mean((1, 2, 3), keepdim=True)
    same = F.conv2d(model.backbone[0].input_quantizer(x), weight, model.backbone[0].bias).relu()
    torch.testing.assert_close(found, same)
    assert (found - expected).abs().max() > 0.01 and isinstance(model.backbone[0], nn.Conv2d)


def test_mmsegs_beit_applies_its_projection_by_the_rule():
    from mmseg.models.backbones.beit import BEiTAttention
    model, x, called = in_model(BEiTAttention(8, 2, (2, 2))), torch.randn(3, 5, 8), []
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    expected = model.backbone(x)
    quantize_model(model, dict(targets=['backbone']))
    model.backbone.qkv.register_forward_hook(lambda *_: called.append(True))
    with quantizer_mode(model, Mode.FLOAT):
        torch.testing.assert_close(model.backbone(x), expected)
    assert called == [True] and hasattr(model.backbone, 'matmul_context')


SLOW = pytest.mark.slow
SHRUNK = [
    ('mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py', 4),
    ('mmdet::pvt/retinanet_pvt-t_fpn_1x_coco.py', 4),
    pytest.param('mmseg::twins/twins_svt-s_fpn_fpnhead_8xb4-80k_ade20k-512x512.py', 5, marks=SLOW),
    ('mmdet::detr/detr_r50_8xb2-150e_coco.py', 2),
    ('mmseg::beit/beit-base_upernet_8xb2-160k_ade20k-640x640.py', 4),
    pytest.param('mmdet::glip/glip_atss_swin-t_a_fpn_dyhead_pretrain_obj365.py', 5, marks=SLOW),
    pytest.param('mmseg::mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py', 0, marks=SLOW),
    pytest.param('mmdet::grounding_dino/grounding_dino_swin-t_pretrain_obj365_goldg_cap4m.py', 5, marks=SLOW),
    pytest.param('mmseg::san/san-vit-b16_coco-stuff164k-640x640.py', 3, marks=SLOW),
    pytest.param('mmdet::mask2former_vis/mask2former_r50_8xb2-8e_youtubevis2021.py', 0, marks=SLOW)]


@pytest.mark.parametrize('name, attentions', SHRUNK, ids=lambda x: str(x).partition('/')[0])
def test_configs_of_the_zoos_go_through_the_whole_job(name, attentions, tmp_path):
    videos = 'mask2former_vis' in name
    found = check_config(dict(zoo_configs())[name], tmp_path, export=videos)
    assert not videos or found['export'] == 'refused' and 'videos cannot be exported' in found['export_reason']
    assert found['attentions'] == attentions and found['layers'] > 4 * attentions
    assert found['scope'][0] in BACKBONES


def test_a_convolutional_model_gets_its_images_from_feature_maps(tmp_path):
    name = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'
    path = dict(zoo_configs())[name]
    assert not is_transformer(Config.fromfile(path).model)
    found = check_config(path, tmp_path)
    assert found['attentions'] == 0 and found['layers'] == 20 + 8
    assert torch.load(tmp_path / 'synthetic.pt', weights_only=True)


def test_shrinking_keeps_widths():
    model = dict(backbone=dict(type='VisionTransformer', img_size=(512, 512), num_layers=12, out_indices=(2, 5, 8, 11),
                               embed_dims=768), encoder=dict(num_layers=6), test_cfg=dict(mode='slide', stride=3))
    assert shrink(model) == dict(
        backbone=dict(type='VisionTransformer', img_size=(64, 64), num_layers=4, out_indices=(0, 1, 2, 3),
                      embed_dims=768), encoder=dict(num_layers=2), test_cfg=dict(mode='whole'))


@pytest.fixture
def my_package(tmp_path, monkeypatch):
    """The files that docs/extend.md shows, and an attention whose products einsum hides."""
    for name, code in re.findall(r'```python\n# (\S+)\n(.*?)```', (ROOT / 'docs/extend.md').read_text(), re.S):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(code)
    (tmp_path / 'my_package/attention.py').write_text(
        'import torch\nfrom torch import nn\n\n\nclass EinsumAttention(nn.Module):\n\n'
        '    def __init__(self):\n        super().__init__()\n        self.qkv = nn.Linear(8, 24)\n\n'
        '    def attend(self, q, k, v):\n        weights = torch.einsum("bid,bjd->bij", q, k).softmax(-1)\n'
        '        return torch.einsum("bij,bjd->bid", weights, v)\n\n'
        '    def forward(self, x):\n        return self.attend(*self.qkv(x).chunk(3, -1))\n')
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition('.')[0] == 'my_package']:
        del sys.modules[name]


def test_a_backbone_of_ones_own_package(my_package):
    """In a process of its own, as a user would: tools/dfq.py on the documentation's config."""
    code = ('import psaq_mm; import torch; from mmengine.config import Config; '
            'from mmengine.registry import MODELS, init_default_scope; '
            'init_default_scope("mmseg"); model = MODELS.build(Config.fromfile("my_config.py").model);'
            'torch.save(dict(state_dict=model.state_dict()), "my_checkpoint.pth")')
    environment = dict(PYTHONPATH=f'{my_package}:{ROOT}', PATH='', OMP_NUM_THREADS='1')
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code], cwd=my_package, env=environment, check=True,
                   capture_output=True)
    done = subprocess.run(
        [sys.executable, ROOT / 'tools/dfq.py', 'my_config.py', '--work-dir', 'out', '--cfg-options',
         'quantization.synthesis.steps=2', 'quantization.synthesis.num_images=2', 'quantization.game.steps=2'],
        cwd=my_package, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    state = torch.load(my_package / 'out/quantized.pth', weights_only=True)['state_dict']
    products = [key for key in state if key.endswith('a_quantizer.scale')]
    assert len(products) == 8 and all('.attention.matmul_' in key for key in products)


def test_an_adapter_of_ones_own_package(my_package):
    attention = importlib.import_module('my_package.attention').EinsumAttention()
    model = nn.ModuleDict(dict(backbone=attention))
    model.backbone = attention
    x = torch.randn(2, 5, 8)
    expected = attention(x)
    assert not attention_parts(attention)
    importlib.import_module('my_package.adapters')
    quantize_model(model, dict(targets=['backbone'], keep_float=['backbone.*']))
    torch.testing.assert_close(attention(x), expected)
    assert attention.matmul_context is not None and not quantized_layers(model)
