"""Segmentors as one graph: what the library counts in Python, for every size and any number of images."""
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import ConfigDict
from torch import nn

from psaq_mm.deploy.library import traceable_library
from psaq_mm.deploy.library.segmentors import adaptive_max
from psaq_mm.deploy.predictor import DensePredictor, SegmentationPredictor, predictor_of
from psaq_mm.deploy.windows import slide
from psaq_mm.engine import read_config
from psaq_mm.engine.config import default_scope
from psaq_mm.engine.pipeline import build_float
from psaq_mm.errors import UserError

from .conftest import ROOT
from .graphs import runs


def traced(function, examples, axes):
    """Return what runs a function's graph, in both runtimes: from tensors to its only output."""
    return [lambda *inputs, run=run: run(*inputs)[0] for run in runs(function, examples, axes)]


@pytest.mark.parametrize('factor', (2, 4.0, 1.5))
def test_upsample_follows_the_image(factor):
    from mmseg.models.utils import Upsample
    module = Upsample(scale_factor=factor, mode='bilinear')
    for run in traced(module, (torch.rand(1, 3, 8, 10), ), [{0: 'b', 2: 'h', 3: 'w'}]):
        for shape in ((1, 3, 8, 10), (2, 3, 7, 9), (1, 3, 11, 5)):
            x = torch.rand(shape)
            assert torch.allclose(torch.from_numpy(run(x)), module(x), atol=1e-5)
    fixed = Upsample(size=(5, 6), mode='nearest')
    with traceable_library():
        assert fixed(torch.rand(1, 3, 8, 10)).shape == (1, 3, 5, 6)


def test_adaptive_maximum_of_every_size():
    def pooled(x, y):
        return adaptive_max(x, *y.shape[2:])

    runs = [pooled, *traced(pooled, (torch.rand(1, 2, 9, 12), torch.rand(1, 1, 4, 6)),
                            [{0: 'b', 2: 'h', 3: 'w'}, {2: 'i', 3: 'j'}])]
    for size, target in (((9, 12), (4, 6)), ((10, 7), (3, 7)), ((5, 5), (7, 11)), ((6, 13), (1, 1))):
        x, y = torch.randn(3, 2, *size), torch.rand(1, 1, *target)
        expected = F.adaptive_max_pool2d(x, target)
        for run in runs:
            assert torch.equal(torch.as_tensor(run(x, y)), expected)


@pytest.mark.parametrize('cross', (False, True))
@pytest.mark.parametrize('heads', (1, 4))
def test_attention_of_queries_to_their_masks(cross, heads):
    from mmseg.models.decode_heads.san_head import RecWithAttnbias
    settings = SimpleNamespace(num_heads=4, num_layers=2, cross_attn=cross)

    def biases(x, y):
        return RecWithAttnbias._build_attn_biases(settings, [x], y.shape[2:])[1]

    for run in traced(biases, (torch.randn(1, heads, 5, 8, 9), torch.rand(1, 1, 4, 3)),
                      [{0: 'b', 3: 'h', 4: 'w'}, {2: 'i', 3: 'j'}]):
        for batch, size, target in ((1, (8, 9), (4, 3)), (3, (7, 10), (5, 4))):
            x, y = torch.randn(batch, heads, 5, *size), torch.rand(1, 1, *target)
            assert torch.equal(torch.from_numpy(run(x, y)), biases(x, y))


def test_masks_of_queries():
    from mmseg.models.decode_heads.san_head import MLPMaskDecoder
    module = MLPMaskDecoder(in_channels=6, total_heads=2, total_layers=3, embed_channels=4, mlp_channels=5,
                            rescale_attn_bias=True).requires_grad_(False)

    def flat(query, x):
        masks, found = module(query, x)
        return torch.cat([masks[:, None], *found], 1)

    for run in traced(flat, (torch.randn(1, 7, 6), torch.randn(1, 6, 3, 5)), [{0: 'b'}, {0: 'b', 2: 'h', 3: 'w'}]):
        for batch, size in ((1, (3, 5)), (2, (6, 4))):
            query, x = torch.randn(batch, 7, 6), torch.randn(batch, 6, *size)
            assert torch.allclose(torch.from_numpy(run(query, x)), flat(query, x), atol=1e-5)


@pytest.mark.parametrize('crop, stride', [((12, 12), (8, 8)), ((12, 10), (12, 3)), ((9, 16), (5, 16))])
def test_windows_slide_as_the_library_slides_them(crop, stride):
    from mmseg.models import EncoderDecoder

    def values(windows, size):  # depend on where in its window a pixel lies
        return torch.cat([windows, windows.cumsum(3), windows.cumsum(2)], 1)[:, :5]

    library = SimpleNamespace(test_cfg=SimpleNamespace(crop_size=crop, stride=stride), out_channels=5,
                              encode_decode=lambda crop, metas: values(crop, None))
    runs = [lambda x: slide(x, crop, stride, values),
            *traced(lambda x: slide(x, crop, stride, values), (torch.rand(1, 2, 30, 25), ), [{0: 'b', 2: 'h', 3: 'w'}])]
    for shape in ((1, 2, 30, 25), (2, 2, 12, 41), (1, 2, 29, 12), (3, 2, 13, 17), (1, 2, 7, 9), (1, 2, 36, 28)):
        x = torch.rand(shape)
        expected = EncoderDecoder.slide_inference(library, x, [{}])
        for run in runs:
            assert torch.allclose(torch.as_tensor(run(x)), expected, atol=1e-5)


def test_windows_of_a_normalised_image_in_a_quantized_graph():
    layer = nn.Conv2d(3, 4, 3, padding=1).requires_grad_(False)
    mean, std = torch.tensor([90.0, 100, 110])[:, None, None], torch.tensor([50.0, 60, 70])[:, None, None]

    def quantized(windows, size):
        return layer(torch.fake_quantize_per_tensor_affine(windows, 0.03, 128, 0, 255))

    def network(images):
        return slide((images.permute(0, 3, 1, 2).to(torch.float32) - mean) / std, (12, 12), (8, 8), quantized)

    images = torch.randint(0, 256, (1, 30, 25, 3), dtype=torch.uint8)
    for run in traced(network, (images, ), [{0: 'b', 1: 'h', 2: 'w'}]):
        assert torch.allclose(torch.from_numpy(run(images)), network(images), atol=0.1)


def test_windows_and_their_mirror_images():
    from mmseg.models import DepthEstimator

    def values(windows, metas):
        assert tuple(metas[0]['img_shape']) == tuple(windows.shape[2:])
        return windows.cumsum(3)[:, :1]

    settings = ConfigDict(mode='slide_flip', crop_size=(12, 10), stride=(8, 6))
    library = SimpleNamespace(test_cfg=settings, out_channels=1, encode_decode=values)
    x = torch.rand(2, 3, 25, 23)
    expected = DepthEstimator.slide_flip_inference(library, x, [{}])
    found = DensePredictor.encode_decode(SimpleNamespace(mode='slide_flip', model=library), x, {})
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize('classes, kind', [(1, torch.uint8), (256, torch.uint8), (257, torch.int32)])
def test_labels_are_small_integers(classes, kind):
    values = torch.randn(2, classes, 4, 5)
    stub = SimpleNamespace(values=lambda inputs, meta: values,
                           model=SimpleNamespace(decode_head=SimpleNamespace(threshold=0.3)))
    labels, = SegmentationPredictor.answers(stub, None, None)
    assert labels.dtype == kind and labels.shape == (2, 4, 5)
    assert torch.equal(labels.long(), values.argmax(1) if classes > 1 else (values[:, 0].sigmoid() > 0.3).long())


def test_a_mode_that_the_library_does_not_know_is_refused():
    cfg = read_config(ROOT / 'demo' / 'upernet_swin_mini_scenes.py', {'model.test_cfg.mode': 'slide_flip'})
    default_scope(cfg)
    with pytest.raises(UserError, match="model.test_cfg.mode = 'slide_flip' of EncoderDecoder: only whole and slide"):
        predictor_of(build_float(cfg), cfg)


@pytest.mark.parametrize('side', (2, 3))
def test_a_side_adapter_traced_at_its_own_size_takes_others(side):
    """Where position embeddings fit the example, the library leaves them as they are."""
    from mmseg.models.decode_heads.san_head import SideAdapterNetwork
    module = SideAdapterNetwork(
        clip_channels=4, embed_dims=8, num_queries=3, fusion_index=[0],
        cfg_encoder=ConfigDict(num_encode_layer=1, mlp_ratio=2, num_heads=2),
        cfg_decoder=ConfigDict(num_heads=2, num_layers=1, embed_channels=4, mlp_channels=4, num_mlp=2,
                               rescale=False)).requires_grad_(False).eval()
    module.patch_embed.init_out_size = 2, 2
    module.pos_embed = nn.Parameter(torch.randn(1, 4, 8), False)

    def encoded(image, clip):
        found = module.encode_feature(image, [[clip]], [])[-1]
        return torch.cat([found['query'].transpose(1, 2), found['x'].flatten(2)], 2)

    kept = module.pos_embed
    runs = traced(encoded, (torch.randn(1, 3, 16 * side, 16 * side), torch.randn(1, 4, 2, 2)),
                  [{0: 'b', 2: 'h', 3: 'w'}, {0: 'b', 2: 'i', 3: 'j'}])
    assert module.pos_embed is kept
    for run in runs:
        for size in ((32, 32), (48, 64)):
            image, clip = torch.randn(1, 3, *size), torch.randn(1, 4, 2, 3)
            assert torch.allclose(torch.from_numpy(run(image, clip)), encoded(image, clip), atol=1e-4)
