"""From an image as people have it to what a backbone reads, inside the graph: what the test pipeline and the data
preprocessor of a config do.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from mmengine.config import Config
from torch import Tensor, nn

from ..errors import UserError
from .adapters import pad_to

IGNORED = ('LoadAnnotations', 'LoadPanopticAnnotations')  # what only an evaluation needs


def test_dataset(cfg: Config) -> dict:
    """Return the config of the test data set that has a pipeline, within wrappers, or what there is."""
    dataset = (cfg.get('test_dataloader') or {}).get('dataset') or {}
    while isinstance(dataset, (list, tuple)) or 'pipeline' not in dataset and dataset.get('dataset') is not None:
        dataset = dataset[0] if isinstance(dataset, (list, tuple)) else dataset['dataset']
    return dataset


def pipeline_of(cfg: Config) -> list[dict]:
    """Return the transforms of a config's test data, or none where it has no test data."""
    return list(test_dataset(cfg).get('pipeline') or ())


class Resize(nn.Module):
    """mmcv's ``Resize`` by a scale: bilinear, without antialiasing, rounded as 8-bit images are.

    Args:
        scale (tuple[int, int]): What the longer and the shorter side must not exceed; with ``keep_ratio=False`` width
            and height.
        keep_ratio (bool): Whether width and height have one factor.
    """

    def __init__(self, scale, keep_ratio):
        super().__init__()
        self.scale, self.keep_ratio = tuple(scale), keep_ratio

    def target(self, height, width):
        """Return height and width to come, of numbers or traced ones."""
        if not self.keep_ratio:
            return self.scale[1], self.scale[0]
        longest, shortest = max(self.scale), min(self.scale)
        if isinstance(height, int) and isinstance(width, int):
            factor = min(longest / max(height, width), shortest / min(height, width))
            return int(height * factor + 0.5), int(width * factor + 0.5)
        sides = torch.stack([side.to(torch.float32) if isinstance(side, Tensor) else torch.tensor(float(side))
                             for side in (height, width)])
        factor = torch.minimum(longest / sides.max(), shortest / sides.min())
        return (sides * factor + 0.5).floor().to(torch.int64).unbind()

    def forward(self, images, height, width):
        """Resize (B, C, H, W)."""
        if isinstance(height, int) and (height, width) == tuple(images.shape[2:]):
            return images
        return F.interpolate(images, size=(height, width), mode='bilinear', align_corners=False).round()


class Pixels(nn.Module):
    """Images (B, H, W, C) in 0..255, RGB, to normalised ones (B, C, H', W'), and what data samples say of them.

    Args:
        steps (list[nn.Module | tuple]): Of the pipeline.
    """

    def __init__(self, cfg: Config, preprocessor: nn.Module, batch: int = 1):
        super().__init__()
        self.resize = self.padding = None
        for step in pipeline_of(cfg):
            self.add(dict(step))
        channels = len(preprocessor.mean) if getattr(preprocessor, '_enable_normalize', False) else 3
        swapped = getattr(preprocessor, '_channel_conversion', None)
        if swapped is None:
            swapped = getattr(preprocessor, 'channel_conversion', False)
        self.reverse = channels == 3 and not swapped  # the pipeline loads BGR
        self.mean = preprocessor.mean.reshape(-1, 1, 1).clone() if hasattr(preprocessor, 'mean') else None
        self.std = preprocessor.std.reshape(-1, 1, 1).clone() if hasattr(preprocessor, 'std') else None
        self.size_divisor, self.pad_value = 1, 0
        if hasattr(preprocessor, 'pad_size_divisor'):
            self.size_divisor, self.pad_value = preprocessor.pad_size_divisor, preprocessor.pad_value
        elif getattr(preprocessor, 'test_cfg', None):
            self.size_divisor = preprocessor.test_cfg.get('size_divisor') or 1
            self.pad_value = preprocessor.pad_val

    def add(self, step):
        """Take up one transform of a pipeline.

        Raises:
            UserError: If the graph cannot do what it does.
        """
        kind = step.pop('type')
        kind = kind if isinstance(kind, str) else kind.__name__
        kind = kind.rpartition('.')[2]
        if kind.startswith('Load') or kind.startswith('Pack') or kind in IGNORED:
            return
        if kind == 'Resize' and step.get('scale') and step.get('interpolation', 'bilinear') == 'bilinear' \
                and self.resize is None and self.padding is None:
            scale = step['scale']
            self.resize = Resize((scale, scale) if isinstance(scale, int) else scale, step.get('keep_ratio', False))
        elif kind == 'Pad' and step.get('padding_mode', 'constant') == 'constant' and self.padding is None:
            value = step.get('pad_val', 0)
            value = value.get('img', 0) if isinstance(value, dict) else value
            value = value[0] if isinstance(value, (tuple, list)) and len(set(value)) == 1 else value
            size = step.get('size')
            self.padding = dict(size=size and tuple(size)[::-1], divisor=step.get('size_divisor'),
                                square=step.get('pad_to_square', False), value=value)
        else:
            raise UserError(f'test_dataloader.dataset.pipeline: {kind} with {step} cannot be a part of the graph, only '
                            'Resize (bilinear) and Pad behind it can. Do it to images yourself and leave it out '
                            'with --cfg-options')

    def forward(self, images):
        height, width = images.shape[1:3]
        x = images.permute(0, 3, 1, 2).to(torch.float32)
        if self.reverse:
            x = x.flip(1)
        size = height, width
        if self.resize is not None:
            size = self.resize.target(height, width)
            x = self.resize(x, *size)
        factors = size[1] / width, size[0] / height
        if self.padding is not None:
            x = self.padded(x)
            size = tuple(x.shape[2:])
        if self.mean is not None:
            x = (x - self.mean) / self.std
        if self.size_divisor > 1:
            x = pad_to(x.permute(0, 2, 3, 1), *size, (self.size_divisor, ) * 2, self.pad_value).permute(0, 3, 1, 2)
        padded = tuple(x.shape[2:]) if self.size_divisor > 1 else size
        return x, dict(ori_shape=(height, width), img_shape=size, scale_factor=factors, pad_shape=padded,
                       batch_input_shape=padded)

    def padded(self, x):
        """Pad at the lower and right end, as ``Pad`` of the pipeline does."""
        height, width = x.shape[2:]
        rule = self.padding
        if rule['square']:
            height = width = torch.maximum(height, width) if isinstance(height, Tensor) else max(height, width)
        if rule['size']:
            height, width = rule['size']
        if rule['divisor']:
            height, width = (side + -side % rule['divisor'] for side in (height, width))
        return F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2]), value=rule['value'])
