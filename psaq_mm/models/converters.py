"""Checkpoints in the layouts that others wrote them in: recognised by their keys, brought to the model's layout."""
from __future__ import annotations

import copy
import re
import sys
from collections import OrderedDict
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

State = dict[str, Tensor]

# What wraps a module under a name of its own. Other wrappers are found by what fits the model.
WRAPPERS = ('module', '_orig_mod', '_fsdp_wrapped_module', '_checkpoint_wrapped_module', '_forward_module')
SHARE = 0.5  # of the names that the best set in a file has: another set needs as many to count as the model's, too


@dataclass
class WeightSet:
    """Weights for one model out of a file: ``name`` says where they are in it, ``ema`` what they are, if that is known.
    """
    name: str
    state: State = field(default_factory=dict)  # by the model's names, as far as it has them
    keys: list[str] = field(default_factory=list)  # as the file has them
    ema: bool | None = None
    fitting: int = 0


def flatten(content: dict, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], dict[str, Tensor]]:
    """All tensors in nested dicts, by the keys that lead to the dict that holds them."""
    found = {}
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if tensors:
        found[path] = tensors
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, dict) and len(path) < 4:
            found.update(flatten(value, (*path, key)))
    return found


def weight_sets(content: dict, model: nn.Module) -> list[WeightSet]:
    """Find the weights in a file that are meant for a model, under whatever keys and prefixes they are.

    A prefix is what has to be left out in front of a name to make it one of the model's; the names inside a set, too,
    lose the components that the model doesn't know, where they fit without. Names that fit with no change are one set,
    those that lack the prefix 'teacher.' another.

    Args:
        content (dict): What the file holds.
        model (nn.Module): Float.

    Returns:
        list[WeightSet]: The one to use by default first: what the library's own test tool would load. Empty where
        nothing fits.
    """
    names = set(model.state_dict())
    if hasattr(getattr(model, 'backbone', None), 'get_classifier'):  # timm's files have a bare classifier's names
        names |= {name.removeprefix('backbone.') for name in names}
    if any(name.startswith('backbone.stages.') for name in names):
        names.add(ORIGINAL_SWIN)
    return sets_for(content, names)


def sets_for(content: dict, names: set[str]) -> list[WeightSet]:
    """:func:`weight_sets` for a model with these names."""
    known = {part for name in names for part in name.split('.')}
    wrappers = set(WRAPPERS) - known
    places = []  # (components in the file, value, prefix, name in the model or None)
    for path, tensors in flatten(content).items():
        for key, value in tensors.items():
            parts = (*path, *key.split('.'))
            depth, name = _fit(parts, names, known)
            if name:
                wrappers.update(part for part in parts[depth:] if part not in known)
            places.append((parts, path, value, depth, name))
    counts = {}
    for parts, _, _, depth, name in places:
        if name:
            counts[parts[:depth]] = counts.get(parts[:depth], 0) + 1
    if not counts:
        return []
    sets = {prefix: WeightSet('.'.join(prefix), fitting=count) for prefix, count in counts.items()
            if count >= SHARE * max(counts.values())}
    homes = {prefix: {path for parts, path, _, depth, name in places if name and parts[:depth] == prefix}
             for prefix in sets}
    exact = sorted(places, key=lambda place: len(place[0]), reverse=True)  # where two have one name, the shortest wins
    for parts, path, value, depth, name in exact:
        prefix = parts[:depth] if name else max(
            (p for p in sets if parts[:len(p)] == p and path in homes[p]), key=len, default=None)
        if prefix in sets:
            found = sets[prefix]
            found.state[name or '.'.join(part for part in parts[len(prefix):] if part not in wrappers)] = value
            found.keys.append('.'.join(parts))
    for found in list(sets.values()):
        found.state = {key: found.state[key] for key in sorted(found.state)}
    exchanged = 'steps' in (content.get('ema_state_dict') or {})  # as mmengine's EMAHook leaves it
    return _ranked(sets, names, exchanged)


def _fit(parts, names, known):
    """How many components in front have to go to make a name of the model's, and that name; (0, None) if none can."""
    for depth in range(len(parts)):
        if parts[depth] in known:
            name = '.'.join(parts[depth:])
            if name in names:
                return depth, name
            shorter = '.'.join(part for part in parts[depth:] if part in known)
            if shorter in names:
                return depth, shorter
    return 0, None


def _ranked(sets: dict[tuple[str, ...], WeightSet], names: set[str], exchanged: bool) -> list[WeightSet]:
    """Tell which sets are averages over training, and put in front what the ecosystem's own tools would evaluate."""
    def averaged(prefix):
        return bool(re.search(r'(^|[._])(ema|averaged?|swa|avg)([._]|$)', '.'.join(prefix)))

    def last(prefix):
        return next((part for part in reversed(prefix) if part not in WRAPPERS), '')

    students = {prefix for prefix in sets if last(prefix) == 'student'}
    for prefix, found in sets.items():
        if last(prefix) == 'teacher' and students:
            found.ema = True
        elif prefix in students and len(sets) > 1:
            found.ema = False
        else:
            found.ema = True if averaged(prefix) else None
    main = next((found for prefix, found in sets.items()
                 if [part for part in prefix if part not in WRAPPERS] == ['state_dict']), None)
    if main and exchanged:  # mmengine's EMAHook exchanges the two when it saves, so that test tools load the average
        main.ema = True
        for prefix, found in sets.items():
            if prefix[0] == 'ema_state_dict':
                found.ema = False
    if main:  # mmdet 2's and mmseg 0's keep the others in buffers of the model, exchanged likewise
        buffers = {f"ema_{name.replace('.', '_')}": name for name in names}
        others = {buffers[key]: value for key, value in main.state.items() if key in buffers}
        if len(others) > SHARE * len(buffers):
            main.ema = True
            rest = {key: value for key, value in main.state.items() if key not in buffers}
            main.state = dict(rest)
            sets['buffers', ] = WeightSet(f'{main.name}.ema_*', {**rest, **others}, main.keys, False, len(others))
    if any(found.ema for found in sets.values()):
        for found in sets.values():
            found.ema = bool(found.ema)

    def rank(item):
        prefix, found = item
        order = ('state_dict', 'model', 'model_state_dict', 'module', 'net')
        return (prefix in students, found is not main and found.ema is True and last(prefix) != 'teacher',
                min((order.index(part) for part in prefix if part in order), default=len(order)), -found.fitting)

    return [found for _, found in sorted(sets.items(), key=rank)]


def as_the_model_reads(state: State, model: nn.Module) -> State:
    """What a model makes of weights by rules of its own (``_load_from_state_dict``), as for its older versions.

    Returns:
        dict[str, Tensor]: By the model's present names; fewer where the weights fit no better so, or the model fails.
    """
    try:
        memo = {id(value): nn.Parameter(value.detach().to('meta'), value.requires_grad) for value in model.parameters()}
        memo.update((id(value), value.detach().to('meta')) for value in model.buffers())
        probe = copy.deepcopy(model, memo)
    except Exception:  # what a model holds need not bear copying
        return {}
    try:
        probe.load_state_dict(OrderedDict(state), strict=False, assign=True)
    except Exception:  # other shapes; what fits is loaded all the same
        pass
    return {key: value.detach() for key, value in probe.state_dict().items() if not value.is_meta}

ORIGINAL_SWIN = 'backbone.layers.0.blocks.0.attn.qkv.weight'
SWIN_RENAMES = (
    (r'^backbone\.patch_embed\.proj\.', 'backbone.patch_embed.projection.'),
    (r'^backbone\.layers\.', 'backbone.stages.'),
    (r'\.attn\.(qkv|proj|relative_position)', r'.attn.w_msa.\1'),
    (r'\.mlp\.fc1\.', '.ffn.layers.0.0.'),
    (r'\.mlp\.fc2\.', '.ffn.layers.1.'),
)


def is_original_swin(state: State) -> bool:
    """Whether the keys are those of Swin-Transformer-Object-Detection or -Semantic-Segmentation (mmdet 2, mmseg 0)."""
    return ORIGINAL_SWIN in state


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


# Buffers that follow from the architecture; some versions store them, some don't.
DERIVED = ('num_batches_tracked', 'relative_position_index', 'attn_mask')
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
    if any(key not in state and not key.endswith(DERIVED) for key in own):
        read = as_the_model_reads(state, model)
        if sum(key in read for key in own) > sum(key in state for key in own):
            used = {value.data_ptr() for value in read.values()}
            rest = {key: value for key, value in state.items() if value.data_ptr() not in used}
            return {**rest, **read}, 'an older version of the model'
    return state, None
