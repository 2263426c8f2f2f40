"""A whole model as one function of tensors: images in, answers out, by the library's own code."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.config import Config
from torch import Tensor, nn

from ..classification import Classifier
from ..errors import UserError
from ..models import image_channels
from .library import Traced, refuse
from .pixels import Pixels, test_dataset
from .windows import slide

# What a segmentor does with what it computes for each pixel; the predictors of this module do the same.
OWN = ('predict', 'inference', 'whole_inference', 'slide_inference', 'postprocess_result')


class Predictor(nn.Module):
    """Computes what a model predicts for images, as tensors. ``names`` says which; see the subclasses.

    Args:
        model (nn.Module): In float or quantized.
        cfg (Config): Its config, with the test pipeline.
    """
    names: tuple[str, ...] = ()
    pack = 'mmdet.PackDetInputs'  # the last transform of its library's pipelines
    prompt: dict = {}  # what data samples tell a model besides sizes
    mask_form: str | None = None
    one_by_one = False  # whether the library answers for one image at a time
    unlike_the_library: tuple[str, ...] = ()  # answers that the library gives in another form

    def __init__(self, model: nn.Module, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.model, self.pixels = model, Pixels(cfg, model.data_preprocessor, image_channels(model))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute the answers.

        Args:
            images (Tensor): (B, H, W, C) uint8, three channels as RGB.

        Returns:
            tuple[Tensor]: As ``names`` says.
        """
        inputs, meta = self.pixels(images)
        return self.answers(inputs, {key: Traced(value) for key, value in meta.items()})

    def answers(self, inputs, meta):
        raise NotImplementedError

    def of_sample(self, sample) -> tuple[Tensor, ...]:
        """Return the answers that are in a data sample of the library's, for one image."""
        raise NotImplementedError

    def limit(self) -> int:
        """Return how many objects an image can have at most.

        Raises:
            UserError: If there is no limit.
        """
        limit = limits(self.model).get('max_per_img') or getattr(self.model, 'num_queries', None) or -1
        if limit < 1:
            raise UserError('model.test_cfg sets no max_per_img, so that rows of a batch have no common length: set it')
        return limit

    def axes(self, name: str) -> dict[int, str]:
        """Return which axes of an answer have no fixed length, by number. The first one counts images."""
        if name == 'panoptic_map':
            return {1: 'height', 2: 'width'}
        image = name == 'masks' and self.mask_form == 'image'
        return {1: 'detections', **({2: 'height', 3: 'width'} if image else {})}


class DetectionPredictor(Predictor):
    """Of a detector: boxes (1, N, 4) as x1, y1, x2, y2 in pixels of the image, scores (1, N), labels (1, N), and masks
    of the kind that ``mask_form`` says.

    A detector that reads text gets the names of its classes, as in an evaluation. What it makes of them is a constant.

    Attributes:
        mask_form (str | None): 'box': probabilities within each box, (1, N, h, w). 'image': bool, in pixels of the
            image, (1, N, H, W). None: there are no masks.
    """
    one_by_one = True

    def __init__(self, model, cfg):
        super().__init__(model, cfg)
        refuse(model)
        dense = hasattr(getattr(model, 'bbox_head', None), '_bbox_mask_post_process')  # RTMDet-Ins, without a mask_head
        self.mask_form = None
        if getattr(model, 'with_mask', False) or dense:
            self.mask_form = 'box' if hasattr(model, 'roi_head') else 'image'
            threshold = (model.test_cfg.get('rcnn') or model.test_cfg).get('mask_thr_binary', 0)
            if threshold < 0:
                raise UserError(f'model.test_cfg: mask_thr_binary={threshold} makes grey masks, which cannot be '
                                'exported. Set it to a number from 0 to 1, as an evaluation needs it')
        self.prompt = prompt_of(cfg) if hasattr(model, 'language_model') else {}

    @property
    def names(self):
        return ('boxes', 'scores', 'labels') + ('masks', ) * (self.mask_form is not None)

    @property
    def unlike_the_library(self):
        return ('masks', ) * (self.mask_form == 'box')

    def answers(self, inputs, meta):
        from mmdet.structures import DetDataSample
        sample = DetDataSample(metainfo=dict(meta, **self.prompt))
        with untraced(getattr(self.model, 'language_model', None)):
            found, = self.model.predict(inputs, [sample], rescale=True)
        return self.of_sample(found)

    def of_sample(self, sample):
        keys = dict(boxes='bboxes', scores='scores', labels='labels', masks='masks')
        return tuple(sample.pred_instances[keys[name]][None] for name in self.names)


class MaskClassificationPredictor(Predictor):
    """Of MaskFormer and its kind, as ``model.test_cfg`` has it: a map (1, H, W) of class + instance * INSTANCE_OFFSET
    (``panoptic_on``); boxes (1, N, 4), scores (1, N), labels (1, N) and masks (1, N, H, W) of instances
    (``instance_on``).
    """
    one_by_one = True

    def __init__(self, model, cfg):
        super().__init__(model, cfg)
        settings = model.panoptic_fusion_head.test_cfg
        if settings.get('semantic_on', False):
            raise UserError('model.test_cfg.semantic_on: mmdet has no semantic map of this model. Set it to False')
        self.panoptic, self.instances = settings.get('panoptic_on', True), settings.get('instance_on', False)
        if not self.panoptic and not self.instances:
            raise UserError('model.test_cfg: neither panoptic_on nor instance_on is set, so the model answers nothing')
        self.mask_form = 'image' if self.instances else None

    @property
    def names(self):
        return ('panoptic_map', ) * self.panoptic + ('boxes', 'scores', 'labels', 'masks') * self.instances

    def answers(self, inputs, meta):
        from mmdet.structures import DetDataSample
        found, = self.model.predict(inputs, [DetDataSample(metainfo=meta)], rescale=True)
        return self.of_sample(found)

    def of_sample(self, sample):
        answers = (sample.pred_panoptic_seg.sem_seg, ) if self.panoptic else ()
        if self.instances:
            answers += tuple(sample.pred_instances[key][None] for key in ('bboxes', 'scores', 'labels', 'masks'))
        return answers


class DensePredictor(Predictor):
    """Of a model that says something of each pixel, for any number of images of one size."""
    pack = 'mmseg.PackSegInputs'
    modes = 'whole', 'slide'

    def axes(self, name):
        return {1: 'height', 2: 'width'}

    def __init__(self, model, cfg):
        super().__init__(model, cfg)
        for name in OWN:
            owner = next((kind for kind in type(model).__mro__ if name in vars(kind)), None)
            if owner is not None and not owner.__module__.startswith('mmseg.'):
                raise UserError(f'{type(model).__name__}: {owner.__name__} has a {name} of its own, which cannot be a '
                                "part of the graph; mmseg's can")
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

    def of_sample(self, sample):
        found = sample.pred_sem_seg.data
        return (found.to(torch.uint8 if sample.seg_logits.data.shape[0] <= 256 else torch.int32), )


class DepthPredictor(DensePredictor):
    """Of a depth estimator: metres from the camera for each pixel of the image, (B, H, W)."""
    names = ('depth', )
    modes = 'whole', 'slide_flip'

    def answers(self, inputs, meta):
        return (self.values(inputs, meta)[:, 0], )

    def of_sample(self, sample):
        return (sample.pred_depth_map.data, )


class ClassificationPredictor(Predictor):
    """Of a classifier: probabilities (B, classes), for any number of images of one size."""
    names = ('probabilities', )
    pack = 'psaq_mm.PackClassificationInputs'

    def axes(self, name):
        return {}

    def answers(self, inputs, meta):
        return (self.model.logits(inputs).softmax(-1), )

    def of_sample(self, sample):
        return (sample.pred_score[None], )


def limits(model: nn.Module) -> dict:
    """Return what a test config says of the answers: ``score_thr``, ``max_per_img``, ``mask_threshold``."""
    settings = dict(getattr(model, 'test_cfg', None) or {})
    settings = dict(settings.get('rcnn') or settings)
    names = dict(score_thr='score_thr', max_per_img='max_per_img', max_per_image='max_per_img',
                 mask_thr_binary='mask_threshold', mask_thr='mask_threshold')
    return {new: settings[old] for old, new in names.items() if settings.get(old) is not None}


def prompt_of(cfg: Config) -> dict:
    """Return what data samples of an evaluation tell a model that reads text: the names of the classes.

    Raises:
        UserError: If there are no names.
    """
    from ..engine.config import dataset_meta
    names = dataset_meta(cfg, {}).get('classes')
    if not names:
        raise UserError('the model reads the names of its classes, and the config has none. Give them as '
                        'test_dataloader.dataset.metainfo = dict(classes=(...))')
    prompt = dict(text=tuple(names), custom_entities=True)
    dataset = test_dataset(cfg)
    if dataset.get('caption_prompt') and any('caption_prompt' in step.get('meta_keys', ())
                                             for step in dataset['pipeline']):
        prompt['caption_prompt'] = dataset['caption_prompt']
    return prompt


@contextmanager
def untraced(module: nn.Module | None) -> Iterator[None]:
    """Within it, what a module computes is a constant of a trace."""
    if module is None:
        yield
        return
    forward = module.forward

    def constant(*args, **named):
        state = torch._C._get_tracing_state()
        torch._C._set_tracing_state(None)
        try:
            with torch.no_grad():
                return forward(*args, **named)
        finally:
            torch._C._set_tracing_state(state)

    module.forward = constant
    try:
        yield
    finally:
        del module.forward


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
    from mmdet.models.detectors import BaseDetector, MaskFormer, TwoStagePanopticSegmentor
    from mmdet.models.mot import BaseMOTModel
    if isinstance(model, BaseMOTModel):
        raise UserError(f'{type(model).__name__}: videos cannot be exported, a graph takes single images')
    if isinstance(model, TwoStagePanopticSegmentor):
        raise UserError(f'{type(model).__name__}: its panoptic maps cannot be exported, they are laid out instance by '
                        'instance')
    if isinstance(model, MaskFormer):
        return MaskClassificationPredictor(model, cfg)
    if isinstance(model, BaseDetector):
        return DetectionPredictor(model, cfg)
    raise UserError(f'{type(model).__name__}: only detectors, segmentors and classifiers can be exported whole')
