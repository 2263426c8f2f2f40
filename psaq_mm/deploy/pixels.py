"""From an image as people have it to what a backbone reads, inside the graph: what the test pipeline and the data
preprocessor of a config do.

Sizes are counted in integers of 32 bits, which is what OpenVINO counts in, traced or not.
"""
from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import partial

import torch
import torch.nn.functional as F
from mmengine.config import Config
from torch import Tensor, nn

from ..errors import UserError
from .adapters import pad_to
from .agreement import first_line

LOADERS = 'LoadImageFromFile', 'LoadImageFromNDArray', 'InferencerLoader'
FILTERS = 'bilinear', 'bicubic'  # of Pillow
LARGEST = 16384  # pixels of a side up to which sizes are exactly the library's


def test_dataset(cfg: Config) -> dict:
    """Return the config of the test data set that has a pipeline, within wrappers, or what there is."""
    dataset = (cfg.get('test_dataloader') or {}).get('dataset') or {}
    while isinstance(dataset, (list, tuple)) or 'pipeline' not in dataset and dataset.get('dataset') is not None:
        dataset = dataset[0] if isinstance(dataset, (list, tuple)) else dataset['dataset']
    return dataset


def pipeline_of(cfg: Config) -> list[dict]:
    """Return the transforms of a config's test data, or none where it has no test data."""
    return [dict(step) for step in test_dataset(cfg).get('pipeline') or ()]


def missing_pipeline(cfg: Config) -> str | None:
    """Say that a config has no test pipeline, and what follows; None where it has one."""
    if pipeline_of(cfg):
        return None
    key = 'test_dataloader.dataset.pipeline' if cfg.get('test_dataloader') else 'test_dataloader'
    return (f'the config has no {key}: model.onnx takes images as they are and does not resize them. If evaluations '
            f'resize, give a config with {key} and export again')


def kind_of(step: dict) -> str:
    """Return the name of a transform's class, without scope."""
    kind = step['type'] if isinstance(step['type'], str) else step['type'].__name__
    return kind.rpartition('.')[2]


def is_for_annotations(step: dict) -> bool:
    """Whether a transform loads what is known of an image, not the image."""
    return kind_of(step).startswith('Load') and 'Annotation' in kind_of(step)


def loader_of(cfg: Config) -> dict:
    """Return the transform that loads an image, without ``type``; empty where there is none."""
    found = [step for step in pipeline_of(cfg) if kind_of(step) in LOADERS]
    return {key: value for key, value in found[0].items() if key != 'type'} if found else {}


# -- sizes -------------------------------------------------------------------------------------------------------------


def choose(condition, one, other):
    """Return one of two numbers; any of the three may be traced."""
    return torch.where(condition, one, other) if isinstance(condition, Tensor) else one if condition else other


def larger(one, other):
    """Return the larger of two numbers, traced or not."""
    return choose(one > other, one, other)


def smaller(one, other):
    """Return the smaller of two numbers, traced or not."""
    return choose(one < other, one, other)


def times(side, numerator, denominator):
    """Return a side times a fraction, a half rounded up."""
    return (2 * side * numerator + denominator) // (2 * denominator)


def within(height, width, longest, shortest):
    """Return the largest height and width of the same ratio whose longer and shorter side do not exceed two limits."""
    long, short = larger(height, width), smaller(height, width)
    first = longest * short <= shortest * long
    fraction = choose(first, longest, shortest), choose(first, long, short)
    return times(height, *fraction), times(width, *fraction)


def within_cut(height, width, longest, shortest):
    """Do as :func:`within`, decimals cut off, as ``FixScaleResize`` has it.

    That product of doubles may lie below the integer that it is meant to be: 800 / 427 * 427 does not reach 800.
    Whether it does is looked up.
    """
    long, short = larger(height, width), smaller(height, width)
    first = longest * short <= shortest * long
    limit, side = choose(first, longest, shortest), choose(first, long, short)
    if isinstance(side, Tensor):
        missed = [[limit / i * i < limit for i in range(1, LARGEST + 1)] for limit in (longest, shortest)]
        missed = torch.tensor(missed, dtype=torch.int32).flatten()
        missed = missed[smaller(side, LARGEST) - 1 + choose(first, 0, LARGEST)].to(torch.int64)
    else:
        missed = int(limit / side * side < limit)
    found = []
    for length in (height, width):
        exact = length * limit % side == 0
        found.append(length * limit // side - choose(exact, missed, 0))
    return tuple(found)


def by_shortest_edge(height, width, shortest, longest, keep_ratio):
    """Return height and width whose shorter side has a length, and the longer one at most another, if any."""
    size = within(height, width, longest, shortest) if longest else tuple(
        times(side, shortest, smaller(height, width)) for side in (height, width))
    return within(height, width, larger(*size), smaller(*size)) if keep_ratio else size


def by_edge(height, width, length):
    """Return height and width whose shorter side has a length, as ``ResizeEdge`` does."""
    short = smaller(height, width)
    return length * height // short, length * width // short


def by_factors(height, width, factors, keep_ratio):
    """Return height and width times factors, given for width and height."""
    size = tuple(times(side, factor.numerator, factor.denominator)
                 for side, factor in zip((height, width), factors[::-1]))
    return within(height, width, larger(*size), smaller(*size)) if keep_ratio else size


# -- steps: each takes images (B, C, H, W) and returns the new ones ----------------------------------------------------


def nearest_integer(x: Tensor) -> Tensor:
    """Round as image libraries do, a half up."""
    return (x + 0.5).floor()


def resampling(length, wanted, kind: str) -> Tensor:
    """Return the share of each pixel of a row in each pixel of the resized one, (wanted, length), as Pillow has it.

    Args:
        length, wanted (int): Of the row, now and then, traced or not.
        kind (str): 'bilinear' or 'bicubic'.
    """
    now, then = torch.arange(length)[None], torch.arange(wanted)[:, None]
    distance = ((2 * now + 1) * wanted - (2 * then + 1) * length).abs().to(torch.float32)
    unit = 2 * larger(length, wanted)
    distance = distance / (unit.to(torch.float32) if isinstance(unit, Tensor) else unit)
    if kind == 'bilinear':
        shares = (1 - distance).clamp(min=0)
    else:
        near = (1.5 * distance - 2.5) * distance * distance + 1
        far = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
        shares = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    return shares / shares.sum(1, keepdim=True)


def neighbours(length, wanted) -> tuple[Tensor, Tensor, Tensor]:
    """Return between which two pixels of a row each of the resized one lies, and how near to the second, in 1 / 2048,
    as OpenCV counts.

    Args:
        length, wanted (int): Of the row, now and then, traced or not.
    """
    place = ((2 * torch.arange(wanted) + 1) * length - wanted).to(torch.float32) / (2 * torch.arange(
        wanted, wanted + 1)).to(torch.float32)
    first = place.floor()
    share, first = ((place - first) * 2048).round() / 2048, first.to(torch.int64)
    return smaller(larger(first, 0), length - 1), smaller(first + 1, length - 1), share


def bilinear(images: Tensor, height, width) -> Tensor:
    """Resize 8-bit images (B, C, H, W) as OpenCV does, which cuts off below 1 / 128, and each row's part below 1 / 4.
    """
    left, right, share = neighbours(images.shape[3], width)
    images = ((images[:, :, :, left] * (1 - share) + images[:, :, :, right] * share) * 128).floor()
    upper, lower, share = neighbours(images.shape[2], height)
    share = share[:, None] / 32
    quarters = (images[:, :, upper] * (1 / 32 - share)).floor() + (images[:, :, lower] * share).floor()
    return (quarters / 4 + 0.5).floor()


class Resize(nn.Module):
    """Resizing, by OpenCV or Pillow. Only Pillow smooths what it makes smaller.

    Pillow rounds between columns and rows. Up to Pillow 12 columns come first, as here; Pillow 13 begins with rows
    where it expects to gain by it: one grey level in some pixels.

    Args:
        target (Callable): Height and width to those to come.
        filter (str, optional): Of Pillow; None: bilinear by OpenCV.
        integers (bool): Whether images are of 8 bits and stay so.
    """

    def __init__(self, target: Callable, filter: str | None, integers: bool):
        super().__init__()
        self.target, self.filter, self.integers = target, filter, integers

    def forward(self, images):
        height, width = images.shape[2:]
        size = self.target(height, width)
        if self.filter is None:
            return bilinear(images, *size) if self.integers else F.interpolate(images, size=size, mode='bilinear')
        images = nearest_integer(images @ resampling(width, size[1], self.filter).T).clamp(0, 255)
        return nearest_integer(resampling(height, size[0], self.filter) @ images).clamp(0, 255)


class Pad(nn.Module):
    """Padding at the lower and right end.

    Args:
        size (tuple[int, int], optional): (H, W) at least.
        divisor (int, optional): What sides become multiples of.
        square (bool): Whether both sides become equal.
        value (list[float]): One for all channels or one a channel.
    """

    def __init__(self, size, divisor, square, value):
        super().__init__()
        self.size, self.divisor, self.square = size, divisor, square
        self.register_buffer('value', torch.tensor(value, dtype=torch.float32).reshape(-1, 1, 1), False)

    def forward(self, images):
        height, width = target = images.shape[2:]
        if self.square:
            target = (larger(height, width), ) * 2
        if self.divisor:
            target = [side + -side % self.divisor for side in target]
        elif self.size:
            target = [larger(side, least) for side, least in zip((height, width), self.size)]
        return F.pad(images - self.value, (0, target[1] - width, 0, target[0] - height)) + self.value


class CenterCrop(nn.Module):
    """The middle of an image, or all of it where it is smaller.

    Args:
        size (tuple[int, int]): (H, W).
    """

    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, images):
        (top, height), (left, width) = map(self.part, images.shape[2:], self.size)
        return images[:, :, top:top + height, left:left + width]

    @staticmethod
    def part(side, length):
        """Where it begins and how long it is; Python rounds halves to even numbers."""
        rest = larger(side - length, 0)
        begin = rest // 2
        return begin + rest % 2 * (begin % 2), smaller(side, length)


# -- the whole ---------------------------------------------------------------------------------------------------------


class Pixels(nn.Module):
    """Images (B, H, W, C) in 0..255, three channels as RGB, to normalised ones (B, C, H', W'), and what data samples
    say of them.

    Args:
        cfg (Config): With the test pipeline.
        preprocessor (nn.Module): The model's.
        channels (int): Of an image.

    Raises:
        UserError: If the graph cannot do what one of them does.
    """

    def __init__(self, cfg: Config, preprocessor: nn.Module, channels: int = 3):
        super().__init__()
        check_preprocessor(preprocessor)
        swapped = getattr(preprocessor, '_channel_conversion', getattr(preprocessor, 'channel_conversion', False))
        check_loader(cfg, preprocessor)
        stored = loader_of(cfg).get('imdecode_backend') == 'tifffile'  # leaves the order of channels as it is
        self.reverse = channels == 3 and swapped == stored  # all others load BGR
        self.integers, self.colour_last = True, channels == 3 and swapped
        self.scope = cfg.get('default_scope') or 'mmdet'
        self.steps, self.done = nn.ModuleList(), []  # and these in words
        for step in pipeline_of(cfg):
            self.add(step)
        self.mean = self.std = None
        if getattr(preprocessor, '_enable_normalize', False):
            self.mean, self.std = preprocessor.mean.clone(), preprocessor.std.clone()
        rule = dict(size_divisor=getattr(preprocessor, 'pad_size_divisor', None))
        rule = rule if hasattr(preprocessor, 'pad_size_divisor') else getattr(preprocessor, 'test_cfg', None) or {}
        self.size, self.size_divisor = rule.get('size'), rule.get('size_divisor') or 1
        self.pad_value = getattr(preprocessor, 'pad_value', getattr(preprocessor, 'pad_val', 0))

    def add(self, step: dict) -> None:
        """Take up one transform of a pipeline.

        Raises:
            UserError: If the graph cannot do what it does.
        """
        kind = kind_of(step)
        if kind in LOADERS:
            self.integers = not step.get('to_float32', False)
        elif is_for_annotations(step) or kind.startswith('Pack') and 'Track' not in kind or \
                kind == 'RandomFlip' and not step.get('prob'):
            return
        elif kind in MAKERS:
            try:
                made = MAKERS[kind](step, self)
            except UserError:
                raise
            except Exception as error:  # it may be a user's own of the same name
                refuse(kind, f'its settings are not those that a graph knows ({first_line(error)})')
            self.done.append(f'{kind}({", ".join(f"{k}={v!r}" for k, v in step.items() if k != "type")})')
            self.steps.append(made)
        else:
            refuse(kind, f'only {", ".join(MAKERS)} can be a part of the graph')

    def forward(self, images):
        height, width = images.shape[1:3]
        # In this order: TensorRT casts 8-bit inputs, and does nothing else with them.
        x = images.to(torch.float32).permute(0, 3, 1, 2)
        if self.reverse:
            x = x.flip(1)
        factors = 1.0, 1.0
        for step in self.steps:
            before, x = x.shape, step(x)
            if isinstance(step, Resize):
                factors = [new.to(torch.float64) / old if isinstance(new, Tensor) else new / old
                           for new, old in zip(x.shape[:1:-1], before[:1:-1])]
        size = tuple(x.shape[2:])
        if self.mean is not None:
            x = (x - self.mean) / self.std
        if self.size:
            pads = [larger(least - side, 0) for side, least in zip(size, self.size)]
            x = F.pad(x, (0, pads[1], 0, pads[0]), value=self.pad_value)
        elif self.size_divisor > 1:
            x = pad_to(x.permute(0, 2, 3, 1), *size, (self.size_divisor, ) * 2, self.pad_value).permute(0, 3, 1, 2)
        padded = tuple(x.shape[2:]) if self.size or self.size_divisor > 1 else size
        # Some of mmcv's operators take contiguous maps for granted.
        return x.contiguous(), dict(ori_shape=(height, width), img_shape=size, scale_factor=factors, pad_shape=padded,
                                    batch_input_shape=padded)


def refuse(kind: str, why: str):
    """Raise a UserError about a transform."""
    raise UserError(f'test_dataloader.dataset.pipeline: {kind}: {why}. Give a config with another test pipeline and '
                    'evaluate that, too')


def check_preprocessor(preprocessor: nn.Module) -> None:
    """Raise a UserError if a data preprocessor does what is not known here."""
    from mmdet.models import DetDataPreprocessor
    from mmengine.model import ImgDataPreprocessor
    from mmseg.models import SegDataPreProcessor
    known = DetDataPreprocessor, ImgDataPreprocessor, SegDataPreProcessor
    if type(preprocessor).forward not in [kind.forward for kind in known]:
        raise UserError(f'model.data_preprocessor of type {type(preprocessor).__name__} cannot be a part of the graph: '
                        f'only {", ".join(kind.__name__ for kind in known)} and classes with their forward can')


def check_loader(cfg: Config, preprocessor: nn.Module) -> None:
    """Raise a UserError if images have more than 8 bits a channel where the model reads them."""
    mean = getattr(preprocessor, 'mean', None)
    if loader_of(cfg).get('color_type') == 'unchanged' and mean is not None and mean.max() > 255:
        refuse('LoadImageFromFile', f"color_type='unchanged' with a mean of {mean.max():g}: images of more than 8 bits "
               'a channel cannot be a part of the graph')


def make_resize(step: dict, pixels: Pixels) -> Resize:
    """Make ``Resize`` or ``FixScaleResize``."""
    scale, keep_ratio = step.get('scale'), step.get('keep_ratio', False)
    if scale:
        scale = (scale, scale) if isinstance(scale, int) else tuple(scale)
        rule = within_cut if kind_of(step) == 'FixScaleResize' else within
        target = partial(rule, longest=max(scale), shortest=min(scale)) if keep_ratio else lambda *unused: scale[::-1]
    else:
        factors = step.get('scale_factor')
        factors = [Fraction(factor).limit_denominator(1000)
                   for factor in (factors if isinstance(factors, (tuple, list)) else (factors, factors))]
        target = partial(by_factors, factors=factors, keep_ratio=keep_ratio)
    return resize_of(step, target, pixels)


def resize_of(step: dict, target: Callable, pixels: Pixels) -> Resize:
    """Make what resizes by the library that a transform names."""
    interpolation, pillow = step.get('interpolation', 'bilinear'), step.get('backend', 'cv2') == 'pillow'
    if interpolation not in (FILTERS if pillow else FILTERS[:1]):
        refuse(kind_of(step), f"interpolation='{interpolation}' by {'Pillow' if pillow else 'OpenCV'} cannot be a part "
                              "of the graph, 'bilinear' can")
    return Resize(target, interpolation if pillow else None, pixels.integers)


def make_shortest_edge(step: dict, pixels: Pixels) -> Resize:
    """Make ``ResizeShortestEdge``. What it resizes with keeps the ratio in mmseg; in mmdet, if it is told to."""
    scale, scope = step['scale'], step['type'].rpartition('.')[0] if isinstance(step['type'], str) else ''
    if step.get('resize_type', 'Resize') != 'Resize':
        refuse(kind_of(step), f"resize_type='{step['resize_type']}' cannot be a part of the graph, 'Resize' can")
    keep_ratio = step.get('keep_ratio', 'mmseg' in (scope or pixels.scope))
    return resize_of(step, partial(by_shortest_edge, shortest=scale if isinstance(scale, int) else min(scale),
                                   longest=step.get('max_size'), keep_ratio=keep_ratio), pixels)


def make_edge(step: dict, pixels: Pixels) -> Resize:
    """Make our ``ResizeEdge``."""
    return Resize(partial(by_edge, length=step['scale']), 'bicubic', pixels.integers)


def make_pad(step: dict, pixels: Pixels) -> Pad:
    """Make ``Pad``."""
    if step.get('padding_mode', 'constant') != 'constant':
        refuse('Pad', f"padding_mode='{step['padding_mode']}' cannot be a part of the graph, 'constant' can")
    value, size = step.get('pad_val', 0), step.get('size')
    value = value.get('img', 0) if isinstance(value, dict) else value
    value = list(value) if isinstance(value, (tuple, list)) else [value]
    return Pad(size and tuple(size)[::-1], step.get('size_divisor'), step.get('pad_to_square', False),
               value[::-1] if pixels.colour_last else value)


def make_crop(step: dict, pixels: Pixels) -> CenterCrop:
    """Make ``CenterCrop``."""
    if step.get('auto_pad'):
        refuse('CenterCrop', 'auto_pad=True cannot be a part of the graph; put a Pad before it')
    size = step['crop_size']
    return CenterCrop((size, size) if isinstance(size, int) else tuple(size)[::-1])


MAKERS = dict(Resize=make_resize, FixScaleResize=make_resize, ResizeShortestEdge=make_shortest_edge,
              ResizeEdge=make_edge, Pad=make_pad, CenterCrop=make_crop)
