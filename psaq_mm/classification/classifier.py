"""A timm classifier as an mmengine model."""
from __future__ import annotations

import torch
from mmengine.model import BaseModel, ImgDataPreprocessor
from torch import Tensor, nn

from ..errors import UserError
from ..registry import MODELS


class Classifier(BaseModel):
    """mmengine's three modes for whatever computes logits."""

    def logits(self, inputs: Tensor) -> Tensor:
        """(B, classes) from normalised images (B, channels, H, W)."""
        raise NotImplementedError

    def forward(self, inputs: Tensor, data_samples: list | None = None, mode: str = 'tensor'):
        """mmengine's three modes.

        Args:
            inputs (Tensor): Normalised images, (B, 3, H, W).
            data_samples (list[BaseDataElement], optional): With ``gt_label`` for mode 'loss'.
            mode (str): 'tensor' returns logits (B, classes); 'predict' the samples with ``pred_score`` (classes, ) and
                ``pred_label``; 'loss' a dict with the cross entropy.
        """
        logits = self.logits(inputs)
        if mode == 'tensor':
            return logits
        if mode == 'predict':
            for sample, scores in zip(data_samples, logits.float().softmax(-1)):
                sample.set_field(scores, 'pred_score')
                sample.set_field(int(scores.argmax()), 'pred_label')
            return data_samples
        labels = torch.tensor([sample.gt_label for sample in data_samples], device=logits.device)
        return dict(loss=nn.functional.cross_entropy(logits, labels))


@MODELS.register_module()
class TimmClassifier(Classifier):
    """Any classifier of timm, split into ``backbone`` and ``head`` where its classifier is one Linear layer.

    Where it is not, as in distilled models, which have two, the backbone holds all of it and puts out the logits.

    Args:
        model (str): timm's name, e.g. 'deit_tiny_patch16_224'.
        num_classes (int, optional): Default: as timm's pretrained weights have.
        pretrained (bool): Fetch timm's weights, as timm does. Defaults to False.
        data_preprocessor (dict, optional): Default: mmengine's ImgDataPreprocessor with the mean and standard deviation
            that timm's pretrained weights want: their mean for one channel, repeated for more than three, as timm makes
            the weights of a stem for other channels.
        init_cfg (dict, optional): See mmengine's BaseModule.
        **kwargs: For ``timm.create_model``, e.g. ``img_size``, ``in_chans``.

    Raises:
        UserError: If timm does not know the model or cannot fetch its weights.
    """
    with_neck = False

    def __init__(self, model, num_classes=None, pretrained=False, data_preprocessor=None, init_cfg=None, **kwargs):
        if not isinstance(pretrained, bool):
            raise UserError(f'model.pretrained = {pretrained!r}: must be True or False; for a file set load_from')
        backbone = create(model, num_classes, pretrained, kwargs)
        super().__init__(data_preprocessor or default_preprocessor(backbone, kwargs.get('in_chans')), init_cfg)
        self.backbone = backbone
        self.image_size = image_size(backbone, kwargs.get('img_size'))
        head = self.backbone.get_classifier()
        if isinstance(head, nn.Identity) or num_classes == 0:
            raise UserError(f'model.num_classes = {num_classes!r}: a classifier needs at least one class')
        self.num_classes = backbone.num_classes
        if isinstance(head, nn.Linear):
            self.head = head
            self.backbone.reset_classifier(0)
        else:
            self.head = nn.Identity()

    def extract_feat(self, inputs: Tensor) -> tuple[Tensor]:
        """The pooled features that the head reads, ((B, C), ), from images (B, channels, H, W)."""
        return (self.backbone(inputs), )

    def logits(self, inputs: Tensor) -> Tensor:
        """(B, classes) from normalised images (B, 3, H, W)."""
        return self.head(self.extract_feat(inputs)[0])


def default_preprocessor(backbone: nn.Module, channels: int | None = None) -> dict:
    """Config of a preprocessor that normalises images as timm's pretrained weights want.

    Args:
        backbone (nn.Module): timm's model.
        channels (int, optional): Of an image. Default: as of timm's own weights.
    """
    known = backbone.pretrained_cfg
    mean, std = ([255 * value for value in known[key]] for key in ('mean', 'std'))
    channels = channels or known['input_size'][0]
    if channels == 1 < len(mean):
        mean, std = ([sum(values) / len(values)] for values in (mean, std))
    elif channels != len(mean):
        mean, std = ([values[i % len(values)] for i in range(channels)] for values in (mean, std))
    kind = 'mmengine.ImgDataPreprocessor' if channels in (1, 3) else 'psaq_mm.ChannelPreprocessor'
    return dict(type=kind, mean=mean, std=std, bgr_to_rgb=channels == 3)


def image_size(backbone: nn.Module, size: int | tuple[int, int] | None = None) -> tuple[int, int]:
    """The size, (H, W), of the images that timm's model was built for, or else that its weights were trained on."""
    size = size or getattr(getattr(backbone, 'patch_embed', None), 'img_size', None)
    if isinstance(size, int):
        size = size, size
    return tuple(size or backbone.pretrained_cfg['input_size'][-2:])


@MODELS.register_module()
class ChannelPreprocessor(ImgDataPreprocessor):
    """mmengine's ImgDataPreprocessor for any number of channels.

    Args:
        mean, std (Sequence[float]): One a channel, in 0..255.
        **kwargs: See there.
    """

    def __init__(self, mean, std, **kwargs):
        super().__init__(**kwargs)
        self._enable_normalize = True
        for name, values in (('mean', mean), ('std', std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), False)


def create(model, num_classes, pretrained, kwargs) -> nn.Module:
    """``timm.create_model`` with its complaints made ours."""
    import timm
    if num_classes is not None:
        kwargs = dict(kwargs, num_classes=num_classes)
    if not isinstance(model, str) or not timm.is_model(model):
        close = timm.list_models(f'*{str(model).split("_")[0]}*')[:5]
        raise UserError(f"model.model = '{model}' is no model of timm {timm.__version__}" +
                        (f' (e.g. {", ".join(close)})' if close else ''))
    try:
        return timm.create_model(model, pretrained=pretrained, **kwargs)
    except Exception as error:
        if not pretrained:
            raise UserError(f"timm cannot build '{model}' with {kwargs} ({type(error).__name__}: {error})") from None
        raise UserError(f"model.pretrained = True: timm cannot fetch the weights of '{model}' ({type(error).__name__}: "
                        f'{error}). Download them elsewhere and pass the file with --checkpoint, or set load_from'
                        ) from None
