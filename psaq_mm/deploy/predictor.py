"""A whole model as one function of tensors: images in, answers out, by the library's own code."""
from __future__ import annotations

import torch
from mmengine.config import Config
from torch import Tensor, nn

from ..classification import Classifier
from ..errors import UserError
from ..models import image_channels
from .library import Traced, refuse
from .pixels import Pixels
from .windows import slide


class Predictor(nn.Module):
    """Computes what a model predicts for images, as tensors. ``names`` says which; see the subclasses.

    Args:
        model (nn.Module): In float or quantized.
        cfg (Config): Its config, with the test pipeline.
    """
    names: tuple[str, ...] = ()
    unlike_the_library: tuple[str, ...] = ()  # answers that the library gives in another form

    def __init__(self, model: nn.Module, cfg: Config):
        super().__init__()
        self.model, self.pixels = model, Pixels(cfg, model.data_preprocessor, image_channels(model))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute the answers.

        Args:
            images (Tensor): (B, H, W, C) in 0..255, uint8 or float32, RGB.

        Returns:
            tuple[Tensor]: As ``names`` says.
        """
        inputs, meta = self.pixels(images)
        return self.answers(inputs, {key: Traced(value) for key, value in meta.items()})

    def answers(self, inputs, meta):
        raise NotImplementedError

    def axes(self, name: str) -> dict[int, str]:
        """Return which axes of an answer have no fixed length, by number."""
        return {1: 'detections'}


class DetectionPredictor(Predictor):
    """Of a detector: boxes (1, N, 4) as x1, y1, x2, y2 in pixels of the image, scores (1, N), labels (1, N), and masks
    of the kind that ``mask_form`` says.

    Attributes:
        mask_form (str | None): 'box': probabilities within each box, (1, N, h, w). 'image': bool, in pixels of the
            image, (1, N, H, W). None: there are no masks.
    """

    def __init__(self, model, cfg):
        super().__init__(model, cfg)
        refuse(model)
        dense = hasattr(getattr(model, 'bbox_head', None), '_bbox_mask_post_process')  # RTMDet-Ins, without a mask_head
        self.mask_form = None
        if getattr(model, 'with_mask', False) or dense:
            self.mask_form = 'box' if hasattr(model, 'roi_head') else 'image'

    @property
    def names(self):
        return ('boxes', 'scores', 'labels') + ('masks', ) * (self.mask_form is not None)

    unlike_the_library = ('masks', )

    def answers(self, inputs, meta):
        from mmdet.structures import DetDataSample
        sample = DetDataSample(metainfo=meta)
        found, = self.model.predict(inputs, [sample], rescale=True)
        found = found.pred_instances
        keys = dict(boxes='bboxes', scores='scores', labels='labels', masks='masks')
        return tuple(found[keys[name]][None] for name in self.names)


class DensePredictor(Predictor):
    """Of a model that says something of each pixel, for any number of images of one size."""
    modes = 'whole', 'slide'

    def axes(self, name):
        return {1: 'height', 2: 'width'}

    def __init__(self, model, cfg):
        super().__init__(model, cfg)
        self.mode = model.test_cfg.get('mode', 'whole')
        if self.mode not in self.modes:
            raise UserError(f"model.test_cfg.mode = '{self.mode}' of {type(model).__name__}: only "
                            f'{" and ".join(self.modes)} can be one graph')

    def encode_decode(self, inputs, meta):
        """What the model computes for each pixel of its input, (B, C, H, W)."""
        if self.mode == 'whole':
            return self.model.encode_decode(inputs, [meta])

        def compute(windows, size):
            of_window = dict(meta, img_shape=Traced(size), pad_shape=Traced(size))
            values = self.model.encode_decode(windows, [of_window])
            if self.mode == 'slide':
                return values
            return (values + self.model.encode_decode(windows.flip(3), [of_window]).flip(3)) / 2

        return slide(inputs, self.model.test_cfg.crop_size, self.model.test_cfg.stride, compute)

    def values(self, inputs, meta):
        """What the model computes for each pixel of the image, (B, C, H, W)."""
        from mmseg.models.utils import resize
        values = self.encode_decode(inputs, meta)
        height, width = meta['img_shape']
        return resize(values[:, :, :height, :width], size=meta['ori_shape'], mode='bilinear',
                      align_corners=self.model.align_corners, warning=False)


class SegmentationPredictor(DensePredictor):
    """Of a segmentor: a label for each pixel of the image, (B, H, W), uint8 where that is enough."""
    names = ('label_map', )

    def answers(self, inputs, meta):
        logits = self.values(inputs, meta)
        if logits.shape[1] > 1:
            return (logits.argmax(1).to(torch.uint8 if logits.shape[1] <= 256 else torch.int32), )
        return ((logits[:, 0].sigmoid() > self.model.decode_head.threshold).to(torch.uint8), )


class DepthPredictor(DensePredictor):
    """Of a depth estimator: metres from the camera for each pixel of the image, (B, H, W)."""
    names = ('depth', )
    modes = 'whole', 'slide_flip'

    def answers(self, inputs, meta):
        return (self.values(inputs, meta)[:, 0], )


class ClassificationPredictor(Predictor):
    """Of a classifier: probabilities (B, classes), for any number of images of one size."""
    names = ('probabilities', )

    def axes(self, name):
        return {}

    def answers(self, inputs, meta):
        return (self.model.logits(inputs).softmax(-1), )


def predictor_of(model: nn.Module, cfg: Config) -> Predictor:
    """Return the predictor of a model's kind.

    Raises:
        UserError: If there is none.
    """
    if isinstance(model, Classifier):
        return ClassificationPredictor(model, cfg)
    if hasattr(model, 'decode_head') and hasattr(model, 'encode_decode'):
        from mmseg.models.segmentors import DepthEstimator
        return (DepthPredictor if isinstance(model, DepthEstimator) else SegmentationPredictor)(model, cfg)
    from mmdet.models.detectors import BaseDetector
    if isinstance(model, BaseDetector):
        return DetectionPredictor(model, cfg)
    raise UserError(f'{type(model).__name__}: only detectors, segmentors and classifiers can be exported whole')
