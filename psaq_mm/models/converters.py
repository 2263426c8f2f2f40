"""Checkpoints in the layouts that others wrote them in: recognised by their keys, brought to the model's layout."""
from __future__ import annotations

import re
import sys

import torch
from torch import Tensor, nn

State = dict[str, Tensor]

SWIN_RENAMES = (
    (r'^backbone\.patch_embed\.proj\.', 'backbone.patch_embed.projection.'),
    (r'^backbone\.layers\.', 'backbone.stages.'),
    (r'\.attn\.(qkv|proj|relative_position)', r'.attn.w_msa.\1'),
    (r'\.mlp\.fc1\.', '.ffn.layers.0.0.'),
    (r'\.mlp\.fc2\.', '.ffn.layers.1.'),
)


def is_original_swin(state: State) -> bool:
    """Whether the keys are those of Swin-Transformer-Object-Detection or -Semantic-Segmentation (mmdet 2, mmseg 0)."""
    return 'backbone.layers.0.blocks.0.attn.qkv.weight' in state


def merging_order(channels: int) -> Tensor:
    """Where OpenMMLab's patch merging finds its input channels in the original's, a permutation (channels, ).

    Both read 2 x 2 neighbours of C = channels / 4 each. The original concatenates the four pixels in the order
    (row 0, column 0), (1, 0), (0, 1), (1, 1), pixel by pixel; OpenMMLab unfolds channel by channel, pixels in the order
    (0, 0), (0, 1), (1, 0), (1, 1) within each.
    """
    original = torch.arange(channels).view(2, 2, channels // 4)  # column, row, channel
    return original.permute(2, 1, 0).flatten()  # channel, row, column


def convert_swin(state: State) -> State:
    """The original Swin detectors' and segmentors' keys, as mmdet 3 and mmseg 1 name and order them.

    Relative position tables are indexed alike in both and stay as they are; buffers that follow from the architecture
    are dropped.
    """
    converted = {}
    for key, value in state.items():
        if key.startswith('backbone.'):
            if key.endswith(('relative_position_index', 'attn_mask')):
                continue
            for pattern, new in SWIN_RENAMES:
                key = re.sub(pattern, new, key)
            if '.downsample.' in key:
                value = value[..., merging_order(value.shape[-1])]
        converted[key] = value
    return converted


def is_timm(state: State) -> bool:
    """Whether the keys are a bare classifier's, without 'backbone.'."""
    return not any(key.startswith('backbone.') for key in state)


PATCH_BIAS = 'backbone.patch_embed.projection.bias'


def convert_timm(state: State, model: nn.Module) -> State:
    """A bare classifier's weights, in timm's or an older layout that timm reads, as TimmClassifier has them.

    timm also resamples tables and patches of another size; here they stay as they are, so that loading refuses them.
    """
    # timm keeps what it knows of older layouts beside each model.
    module = sys.modules[type(model.backbone).__module__]
    if hasattr(module, 'checkpoint_filter_fn'):
        filtered = module.checkpoint_filter_fn(dict(state), model.backbone)
        own = {id(value) for value in state.values()}
        state = {key: state[key] if id(value) not in own and key in state and state[key].dim() == value.dim() else value
                 for key, value in filtered.items()}
    return {re.sub(r'^head\.(fc\.)?', 'head.', key) if key.startswith('head.') else f'backbone.{key}': value
            for key, value in state.items()}


def convert_state(state: State, model: nn.Module) -> tuple[State, str | None]:
    """Weights in the model's layout, and the name of the layout they came in, or None where nothing was to do.

    Args:
        state (dict[str, Tensor]): From a checkpoint.
        model (nn.Module): The model they are meant for.
    """
    own = model.state_dict()
    if is_original_swin(state) and any(key.startswith('backbone.stages.') for key in own):
        return convert_swin(state), 'Swin-Transformer-Object-Detection'
    if hasattr(getattr(model, 'backbone', None), 'get_classifier') and is_timm(state):
        return convert_timm(state, model), 'timm'
    if PATCH_BIAS in own and PATCH_BIAS not in state and f'{PATCH_BIAS[:-4]}weight' in state:
        return {**state, PATCH_BIAS: torch.zeros_like(own[PATCH_BIAS])}, 'mmseg 1 without a bias of the patch embedding'
    return state, None
