"""What teacher and student are compared by, and what has to run so that every quantized layer sees data."""
from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from ..quantization import CONTEXT, hooked
from ..synthesis import is_grid
from .attention import attention_blocks, prefix_tokens
from .backbones import FEATURE_PARTS, backbone_of, predictor_of

EVERY = 2  # attention blocks from one whose output the student learns to the next; our choice


def beyond_features(targets: Iterable[str]) -> bool:
    """Whether any target lies outside what ``extract_feat`` runs."""
    return any(not set(target.split('.')) & set(FEATURE_PARTS) for target in targets)


def image_features(model: nn.Module, images: Tensor):
    """What ``extract_feat`` of mm* models puts out; of those that have none, as video models, backbone and neck."""
    model = predictor_of(model)
    if hasattr(model, 'extract_feat'):
        return model.extract_feat(images)
    features = backbone_of(model)(images)
    return model.neck(features) if isinstance(getattr(model, 'neck', None), nn.Module) else features


def extract_features(model: nn.Module, images: Tensor, heads: bool = False) -> list[Tensor]:
    """Output of backbone and neck, by the ecosystem's own ``extract_feat``; with heads, theirs behind it.

    The outputs of two-stage heads are left out: they belong to proposals, which differ between teacher and student.

    Args:
        model (nn.Module): A detector, segmentor or classifier.
        images (Tensor): In the model's input space, (B, C, H, W).
        heads (bool): Run the whole model, as for prediction. Defaults to False.

    Returns:
        list[Tensor]: Feature maps (B, C_i, H_i, W_i), then the heads' raw outputs, (B, ...) each.
    """
    if not heads:
        return list(tensors(image_features(model, images)))
    model = predictor_of(model)
    features = []

    def extract_feat(*args, **kwargs):
        features.append(type(model).extract_feat(model, *args, **kwargs))
        return features[-1]

    samples = data_samples(images)
    shadows = [(model, 'extract_feat', extract_feat)]  # of methods
    head = getattr(model, 'decode_head', None)
    if isinstance(head, nn.Module) and 'batch_data_samples' in inspect.signature(head.forward).parameters:
        # Mask2Former's; mmseg's tensor mode has none for it
        shadows.append((head, 'forward', functools.partial(head.forward, batch_data_samples=samples)))
    for owner, name, shadow in shadows:
        setattr(owner, name, shadow)
    try:
        outputs = model(images, samples, mode='tensor')
    finally:
        for owner, name, _ in shadows:
            delattr(owner, name)
    dense = [] if hasattr(model, 'roi_head') else tensors(outputs)
    return [*tensors(features), *dense]


def extract_inner(model: nn.Module, images: Tensor, heads: bool = False, visit: Callable[[Tensor], None] | None = None,
                  visit_heads: Callable[[Tensor], None] | None = None) -> list[Tensor]:
    """:func:`extract_features` that shows what attention blocks put out, as soon as they do.

    Args:
        model (nn.Module): Converted; otherwise as there.
        visit (Callable, optional): Called with the output of every second attention block, counted from the last one.
            Nothing else keeps them. All of them would cost more memory in training.
        visit_heads (Callable, optional): Called with what the heads of the attentions in these blocks put out,
            (..., heads, N, d) or (B * heads, N, d).
    """
    if visit is None and visit_heads is None:
        return extract_features(model, images, heads)

    def show(block, inputs, output):
        for value in tensors(output):
            visit(value)

    blocks, handles = attention_blocks(backbone_of(model))[::-EVERY], []
    if visit is not None:
        handles += [block.register_forward_hook(show) for block in blocks]
    if visit_heads is not None:
        handles += [getattr(module, CONTEXT).output.register_forward_hook(lambda _, inputs, output: visit_heads(output))
                    for block in blocks for module in block.modules() if hasattr(module, CONTEXT)]
    with hooked(handles):
        return extract_features(model, images, heads)


@contextmanager
def telling(model: nn.Module, images: Tensor) -> Iterator[Callable[[list[Tensor]], list[Tensor]]]:
    """Watch a pass of a model for what tells images apart: the feature maps of backbone and neck.

    A classifier puts out vectors behind its last norm, which say less. Instead of them come the class tokens that its
    last attention block puts out, or the means of the block's tokens.

    Source: ours. Images made different by normed vectors and logits calibrated a DeiT-Tiny at W4A4 worse.

    Args:
        model (nn.Module): A detector, segmentor or classifier.
        images (Tensor): That it will run on, (B, C, H, W).

    Yields:
        Callable: From the features of the pass, as :func:`extract_features` returns them, to maps (B, C_i, H_i, W_i) or
        vectors (B, C_i).
    """
    backbone, found = backbone_of(model), []
    names = {module: name for name, module in backbone.named_modules()}
    last = attention_blocks(backbone)[-1:]

    def choose(features):
        maps = [feature for feature in features if feature.dim() == 4]
        if maps or not found or len(found[0]) != len(images) or found[0].dim() not in (3, 4):
            return maps or features
        tokens = found[0]
        if tokens.dim() == 4:
            channels_first = is_grid(images.shape[2:], tokens.shape[2:])
            return [tokens.flatten(2).mean(2) if channels_first else tokens.flatten(1, 2).mean(1)]
        return [tokens[:, 0] if prefix_tokens(backbone, f'{names[last[0]]}.') else tokens.mean(1)]

    with hooked([block.register_forward_hook(lambda block, inputs, output: found.extend(tensors(output)))
                 for block in last]):
        yield choose


def telling_features(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Return what tells images apart, see :func:`telling`.

    Args:
        model (nn.Module): A detector, segmentor or classifier.
        images (Tensor): In the model's input space, (B, C, H, W).

    Returns:
        list[Tensor]: Maps (B, C_i, H_i, W_i) or vectors (B, C_i).
    """
    with telling(model, images) as of:
        return of(extract_features(model, images))


def tensors(nested) -> Iterator[Tensor]:
    """All tensors in nested tuples and lists, in order."""
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, (tuple, list)):
        for item in nested:
            yield from tensors(item)


def data_samples(images: Tensor, kind: type[BaseDataElement] = BaseDataElement) -> list[BaseDataElement]:
    """What mm* heads want to know about images that no file and no pipeline stands behind, as samples of a kind."""
    size = tuple(images.shape[-2:])
    return [kind(metainfo=dict(
        img_shape=size, ori_shape=size, pad_shape=size, batch_input_shape=size, scale_factor=(1.0, 1.0), flip=False,
        flip_direction=None)) for _ in images]
