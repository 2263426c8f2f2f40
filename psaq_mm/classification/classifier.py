"""A timm classifier as an mmengine model."""
from __future__ import annotations

import torch
from mmengine.model import BaseModel
from torch import Tensor, nn

from ..errors import UserError
from ..registry import MODELS


class Classifier(BaseModel):
    """mmengine's three modes for whatever computes logits."""

    def logits(self, inputs: Tensor) -> Tensor:
        """(B, classes) from normalised images (B, 3, H, W)."""
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
    """Any classifier of timm whose head ends in one Linear layer, split into ``backbone`` and ``head``.

    Args:
        model (str): timm's name, e.g. 'deit_tiny_patch16_224'.
        num_classes (int, optional): Default: as timm's pretrained weights have.
        pretrained (bool): Fetch timm's weights, as timm does. Defaults to False.
        data_preprocessor (dict, optional): Default: mmengine's ImgDataPreprocessor with the mean and standard deviation
            that timm's pretrained weights want.
        init_cfg (dict, optional): See mmengine's BaseModule.
        **kwargs: For ``timm.create_model``, e.g. ``img_size``.

    Raises:
        UserError: If timm does not know the model, cannot fetch its weights, or the head is none that this class knows.
    """
    with_neck = False

    def __init__(self, model, num_classes=None, pretrained=False, data_preprocessor=None, init_cfg=None, **kwargs):
        if not isinstance(pretrained, bool):
            raise UserError(f'model.pretrained = {pretrained!r}: must be True or False; for a file set load_from')
        backbone = create(model, num_classes, pretrained, kwargs)
        mean, std = ([255 * v for v in backbone.pretrained_cfg[key]] for key in ('mean', 'std'))
        super().__init__(data_preprocessor or dict(
            type='mmengine.ImgDataPreprocessor', mean=mean, std=std, bgr_to_rgb=True), init_cfg)
        self.backbone = backbone
        self.head = self.backbone.get_classifier()
        if isinstance(self.head, nn.Identity):
            raise UserError(f'model.num_classes = {num_classes!r}: a classifier needs at least one class')
        if not isinstance(self.head, nn.Linear):
            raise UserError(f"model.model = '{model}': its classifier is a {type(self.head).__name__}, only a single "
                            'Linear layer is supported (distilled models have two heads)')
        self.num_classes = self.head.out_features
        self.backbone.reset_classifier(0)

    def extract_feat(self, inputs: Tensor) -> tuple[Tensor]:
        """The pooled features that the head reads, ((B, C), ), from images (B, 3, H, W)."""
        return (self.backbone(inputs), )

    def logits(self, inputs: Tensor) -> Tensor:
        """(B, classes) from normalised images (B, 3, H, W)."""
        return self.head(self.extract_feat(inputs)[0])


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
