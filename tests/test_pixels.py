"""Pixels in the graph: what the libraries' test pipelines and data preprocessors make of an image."""
import io
import warnings

import numpy as np
import pytest
import torch
from mmcv.transforms import Compose
from mmengine.config import Config
from mmengine.registry import DefaultScope
from PIL import Image
from torch import nn

from psaq_mm.classification.classifier import ChannelPreprocessor
from psaq_mm.deploy.pixels import LARGEST, Pixels, by_shortest_edge, missing_pipeline, within, within_cut
from psaq_mm.errors import UserError

MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
SIZES = (96, 128), (61, 47), (47, 90), (33, 33)
LOAD = dict(type='LoadImageFromNDArray')


def preprocessor(kind='det', **settings):
    from mmdet.models import DetDataPreprocessor
    from mmengine.model import ImgDataPreprocessor
    from mmseg.models import SegDataPreProcessor
    kinds = dict(det=DetDataPreprocessor, seg=SegDataPreProcessor, img=ImgDataPreprocessor)
    return kinds[kind](**dict(dict(mean=MEAN, std=STD, bgr_to_rgb=True), **settings))


def pixels(steps, made=None, channels=3, scope='mmdet'):
    cfg = Config(dict(default_scope=scope, test_dataloader=dict(dataset=dict(pipeline=[LOAD, *steps]))))
    return Pixels(cfg, made or preprocessor(), channels)


def image(size, channels=3, seed=0):
    """Smooth, with noise on it, RGB."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, channels, 5, 7, generator=generator)
    fine = nn.functional.interpolate(coarse, size, mode='bicubic') * 200 + 40 * torch.rand(
        1, channels, *size, generator=generator)
    return fine.clamp(0, 255).round().to(torch.uint8)[0].permute(1, 2, 0).contiguous()


def by_library(steps, made, rgb, scope='mmdet'):
    """What the library makes of an image: the tensor that a model reads, and the pipeline's results."""
    from mmdet.structures import DetDataSample
    from mmdet.utils import register_all_modules
    from mmseg.structures import SegDataSample
    register_all_modules(init_default_scope=False)
    import mmseg.datasets  # noqa: F401
    array = rgb.numpy()
    with DefaultScope.overwrite_default_scope(scope):
        results = Compose([dict(step) for step in (LOAD, *steps)])(dict(
            img=np.ascontiguousarray(array[..., ::-1]) if array.shape[2] == 3 else array))
    sample = (SegDataSample if scope == 'mmseg' else DetDataSample)(metainfo=dict(img_shape=results['img_shape']))
    tensor = torch.from_numpy(np.ascontiguousarray(results['img'].reshape(*results['img'].shape[:2], -1).transpose(
        2, 0, 1)))
    data = made(dict(inputs=[tensor], data_samples=[sample]), False)
    return data['inputs'], results, data['data_samples'][0]


def traced(network, example):
    """Run a traced graph in ONNX Runtime and in OpenVINO: a list of two functions."""
    ort, ov = pytest.importorskip('onnxruntime'), pytest.importorskip('openvino')
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.onnx.export(network, (example, ), stream, dynamo=False, opset_version=17, input_names=['images'],
                          output_names=['x', 'meta'], dynamic_axes=dict(
                              images={0: 'b', 1: 'h', 2: 'w'}, x={0: 'b', 2: 'xh', 3: 'xw'}))
    session = ort.InferenceSession(stream.getvalue(), providers=['CPUExecutionProvider'])
    core = ov.Core()
    model = core.compile_model(core.read_model(io.BytesIO(stream.getvalue())), 'CPU',
                               {'INFERENCE_PRECISION_HINT': 'f32'})
    return [lambda x: session.run(None, dict(images=x)), lambda x: list(model(dict(images=x)).values())]


class Flat(nn.Module):
    """Pixels with what they say of an image as one tensor."""

    def __init__(self, made):
        super().__init__()
        self.made = made

    def forward(self, images):
        x, meta = self.made(images)
        numbers = [*meta['ori_shape'], *meta['img_shape'], *meta['pad_shape'], *meta['scale_factor']]
        return x, torch.stack([torch.as_tensor(number).to(torch.float32) for number in numbers])


PIPELINES = dict(
    as_it_is=([], dict()),
    ratio=([dict(type='Resize', scale=(80, 50), keep_ratio=True)], dict(pad_size_divisor=32)),
    enlarged=([dict(type='Resize', scale=(300, 200), keep_ratio=True)], dict()),
    exact=([dict(type='Resize', scale=(70, 45))], dict(pad_value=1.5, pad_size_divisor=32)),
    number=([dict(type='Resize', scale=64)], dict(bgr_to_rgb=False)),
    factor=([dict(type='Resize', scale_factor=0.7)], dict()),
    factors=([dict(type='Resize', scale_factor=(1.5, 0.75), keep_ratio=True)], dict()),
    cut=([dict(type='FixScaleResize', scale=(50, 80), keep_ratio=True)], dict()),
    pillow=([dict(type='FixScaleResize', scale=(50, 80), keep_ratio=True, backend='pillow')], dict(bgr_to_rgb=False)),
    pillow_enlarged=([dict(type='Resize', scale=(210, 151), keep_ratio=True, backend='pillow')], dict()),
    bicubic=([dict(type='Resize', scale=(57, 41), keep_ratio=True, backend='pillow', interpolation='bicubic')], dict()),
    shortest=([dict(type='ResizeShortestEdge', scale=40, max_size=70)], dict()),
    shortest_ratio=([dict(type='ResizeShortestEdge', scale=40, max_size=70, keep_ratio=True)], dict()),
    shortest_only=([dict(type='ResizeShortestEdge', scale=(40, 50))], dict()),
    yolox=([dict(type='Resize', scale=(80, 80), keep_ratio=True),
            dict(type='Pad', pad_to_square=True, pad_val=dict(img=(114.0, 114.0, 114.0)))], dict()),
    padded=([dict(type='Resize', scale=(80, 80), keep_ratio=True),
             dict(type='Pad', size=(100, 80), pad_val=dict(img=(10, 20, 30)))], dict()),
    too_small=([dict(type='Pad', size=(60, 60))], dict()),
    multiple=([dict(type='Pad', size_divisor=32, pad_val=7)], dict(bgr_to_rgb=False)),
    crop=([dict(type='CenterCrop', crop_size=(40, 37))], dict()),
    imagenet=([dict(type='psaq_mm.ResizeEdge', scale=40), dict(type='CenterCrop', crop_size=36)], dict()),
)


@pytest.mark.parametrize('name', PIPELINES)
def test_a_pipeline_is_the_librarys(name):
    steps, settings = PIPELINES[name]
    made = preprocessor(**settings)
    ours = Flat(pixels(steps, made))
    runs = [lambda x: ours(torch.from_numpy(x)), *traced(ours, image(SIZES[0])[None])]
    for seed, size in enumerate(SIZES):
        rgb = image(size, seed=seed)
        expected, results, sample = by_library(steps, made, rgb)
        factors = results.get('scale_factor')
        for run in runs:
            x, meta = (np.asarray(value) for value in run(rgb[None].numpy()))
            assert x.shape == tuple(expected.shape)
            levels = np.abs(x - expected.numpy()) * made.std.numpy()[None]
            assert levels.max() < 1.01 and (levels > 0.01).mean() < (0.3 if 'pillow' in str(steps) else 0.002)
            assert meta[:6].astype(int).tolist() == [*size, *results['img_shape'], *x.shape[2:]]
            assert sample.pad_shape == x.shape[2:] and (
                    factors is None or np.allclose(meta[6:], factors, rtol=1e-6))


@pytest.mark.parametrize('kind', ('bilinear', 'bicubic'))
def test_pillow_columns_first(kind):
    for size, wanted in (((61, 47), (41, 57)), ((90, 120), (40, 171)), ((33, 50), (77, 31))):
        rgb = image(size)
        expected = Image.fromarray(rgb.numpy())
        for target in ((wanted[1], size[0]), wanted[::-1]):  # Pillow's own order depends on its version
            expected = expected.resize(target, Image.Resampling[kind.upper()])
        made = pixels([dict(type='Resize', scale=wanted[::-1], backend='pillow', interpolation=kind)],
                      preprocessor(mean=[0.0] * 3, std=[1.0] * 3))
        levels = (made(rgb[None])[0][0].permute(1, 2, 0) - torch.tensor(np.array(expected))).abs()
        assert levels.max() <= 1 and (levels > 0).float().mean() < 0.02


def test_mmseg_pads_as_its_test_cfg_says():
    steps = [dict(type='ResizeShortestEdge', scale=40, max_size=90)]
    for settings in (None, dict(size_divisor=32), dict(size=(64, 96)), dict(size=(16, 16))):
        made = preprocessor('seg', test_cfg=settings, size=(20, 20), pad_val=3)
        ours = Flat(pixels(steps, made, scope='mmseg'))
        runs = [lambda x, ours=ours: ours(torch.from_numpy(x)), *traced(ours, image(SIZES[0])[None])]
        for size in SIZES:
            expected, results, _ = by_library(steps, made, image(size), 'mmseg')
            for run in runs:
                x, meta = (np.asarray(value) for value in run(image(size)[None].numpy()))
                assert x.shape == tuple(expected.shape) and np.abs(x - expected.numpy()).max() < 1.01 / 57
                assert meta[2:4].astype(int).tolist() == list(results['img_shape'])


@pytest.mark.parametrize('channels', (1, 4, 6))
def test_other_channels_stay_in_their_order(channels):
    made = ChannelPreprocessor(list(range(channels)), [2.0] * channels)
    steps = [dict(type='Resize', scale=(50, 40))]
    expected = by_library(steps, made, image(SIZES[0], channels))[0]
    x, _ = pixels(steps, made, channels)(image(SIZES[0], channels)[None])
    assert x.shape == expected.shape and (x - expected).abs().max() < 0.51


def test_a_config_without_test_data_is_told_of():
    for cfg, key in ((dict(), 'test_dataloader'), (dict(test_dataloader=None), 'test_dataloader'),
                     (dict(test_dataloader=dict(dataset=dict())), 'test_dataloader.dataset.pipeline')):
        assert f'the config has no {key}: model.onnx takes images as they are' in missing_pipeline(Config(cfg))
    assert missing_pipeline(Config(dict(test_dataloader=dict(dataset=dict(pipeline=[LOAD]))))) is None


def test_images_of_more_than_8_bits_are_refused():
    deep = ChannelPreprocessor([9000.0], [3000.0])
    for settings, made in ((dict(color_type='unchanged'), deep), (dict(color_type='unchanged'), preprocessor()),
                           (dict(color_type='grayscale'), deep)):
        cfg = Config(dict(test_dataloader=dict(dataset=dict(pipeline=[dict(type='LoadImageFromFile', **settings)]))))
        if settings['color_type'] == 'unchanged' and made is deep:
            with pytest.raises(UserError, match="LoadImageFromFile: color_type='unchanged' with a mean of 9000"):
                Pixels(cfg, made, 1)
        else:
            Pixels(cfg, made, len(made.mean))


def test_tifffile_leaves_the_order_of_channels():
    for backend, reversed_ in (('cv2', False), ('pillow', False), ('tifffile', True)):
        step = dict(type='LoadImageFromFile', imdecode_backend=backend)
        cfg = Config(dict(test_dataloader=dict(dataset=dict(pipeline=[step]))))
        for swapped in (True, False):
            assert Pixels(cfg, preprocessor(bgr_to_rgb=swapped)).reverse == (swapped == reversed_)


def test_one_mean_for_three_channels():
    for swapped in (False, True):
        made = preprocessor('img', mean=[100.0], std=[50.0], bgr_to_rgb=swapped)
        expected = by_library([], made, image(SIZES[0]))[0]
        assert torch.equal(pixels([], made)(image(SIZES[0])[None])[0], expected)


@pytest.mark.parametrize('padding', [dict(), dict(pad_size_divisor=32)], ids=['none', 'padded'])
def test_what_the_model_sees_is_contiguous(padding):
    """As mmcv's deformable convolution demands."""
    x, meta = pixels([], preprocessor(**padding))(image(SIZES[0])[None])
    assert x.is_contiguous() and tuple(x.shape[2:]) == meta['pad_shape']


def test_images_in_float_are_not_rounded():
    steps = [dict(type='Resize', scale=(80, 50), keep_ratio=True)]
    for loader, integers in ((LOAD, True), (dict(LOAD, to_float32=True), False)):
        cfg = Config(dict(test_dataloader=dict(dataset=dict(pipeline=[loader, *steps]))))
        x = Pixels(cfg, preprocessor(mean=[0.0] * 3, std=[1.0] * 3))(image(SIZES[0])[None])[0]
        assert torch.equal(x, x.round()) == integers


def test_sizes_are_the_librarys_traced_and_not():
    from mmcv.image import rescale_size
    from mmdet.datasets.transforms.transforms import rescale_size as cut
    numbers = np.random.default_rng(0).integers(50, 3000, (60, 2)).tolist() + [[427, 640], [49, 49], [480, 640]]
    for scale in ((1333, 800), (2048, 512), (640, 640)):
        differing = [0, 0]
        for height, width in numbers:
            pair = torch.tensor(height), torch.tensor(width)
            for index, (ours, theirs) in enumerate(((within, rescale_size), (within_cut, cut))):
                expected = theirs((width, height), scale)[::-1]
                for sides in ((height, width), pair):
                    differing[index] += tuple(map(int, ours(*sides, max(scale), min(scale)))) != expected
        assert max(differing) <= 1
    assert within_cut(torch.tensor(LARGEST + 5), torch.tensor(9), 1333, 800)[0] == 1333


def test_the_shortest_edge_is_rounded_once_or_twice():
    from mmcv.image import rescale_size
    from mmdet.datasets.transforms import ResizeShortestEdge
    made = ResizeShortestEdge(640, 2560)
    for height, width in np.random.default_rng(1).integers(50, 3000, (300, 2)).tolist():
        size = made._get_output_shape(np.empty((height, width), bool), 640)
        assert by_shortest_edge(height, width, 640, 2560, False) == size[::-1]
        assert by_shortest_edge(height, width, 640, 2560, True) == rescale_size((width, height), size)[::-1]


@pytest.mark.parametrize('step, words', [
    (dict(type='TransformBroadcaster', transforms=[]), 'TransformBroadcaster'),
    (dict(type='TestTimeAug', transforms=[]), 'TestTimeAug'),
    (dict(type='mmdet.LoadMultiChannelImageFromFiles'), 'LoadMultiChannelImageFromFiles'),
    (dict(type='Normalize', mean=MEAN, std=STD), 'Normalize'),
    (dict(type='Resize', scale=(5, 5), interpolation='area'), "interpolation='area' by OpenCV"),
    (dict(type='Resize', scale=(5, 5), interpolation='lanczos', backend='pillow'), 'by Pillow'),
    (dict(type='Pad', size=(5, 5), padding_mode='reflect'), "padding_mode='reflect'"),
    (dict(type='CenterCrop', crop_size=5, auto_pad=True), 'auto_pad'),
    (dict(type='ResizeShortestEdge', scale=5, resize_type='FixShapeResize'), 'resize_type'),
    (dict(type='PackTrackInputs'), 'PackTrackInputs'),
])
def test_what_cannot_be_a_graph_is_refused_by_name(step, words):
    with pytest.raises(UserError, match='test_dataloader.dataset.pipeline') as refused:
        pixels([step])
    assert words in str(refused.value) and '\n' not in str(refused.value)


def test_what_a_graph_does_not_need_is_passed_over():
    made = pixels([dict(type='LoadAnnotations', with_bbox=True), dict(type='Resize', scale=(5, 5)),
                   dict(type='LoadPanopticAnnotations'), dict(type='PackDetInputs', meta_keys=())])
    assert len(made.steps) == 1 and made.done == ['Resize(scale=(5, 5))']


def test_an_unknown_preprocessor_is_refused():
    from mmdet.models import TrackDataPreprocessor
    with pytest.raises(UserError, match='TrackDataPreprocessor'):
        pixels([], TrackDataPreprocessor(mean=MEAN, std=STD))
