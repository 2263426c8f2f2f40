"""How many classes a model has, which keys of its config say so, and whether a checkpoint has another number."""
from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

CLASSES = re.compile(r'num_(\w+_)?classes')
Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
BESIDES = (0, 1, 5)  # for each anchor besides classes: nothing, a background, a box and objectness (YOLO)


def class_keys(config, path: str = 'model') -> Iterator[tuple[str, int]]:
    """All keys in a model config that say how many classes it has, e.g. ``('model.bbox_head.num_classes', 80)``."""
    if isinstance(config, dict):
        for key, value in config.items():
            if isinstance(key, str) and CLASSES.fullmatch(key) and isinstance(value, int) and value > 0:
                yield f'{path}.{key}', value
            else:
                yield from class_keys(value, f'{path}.{key}')
    elif isinstance(config, (list, tuple)):
        for index, value in enumerate(config):
            yield from class_keys(value, f'{path}[{index}]')


def _owners(model: nn.Module, config) -> dict[str, dict[str, int]]:
    """The keys that set numbers of classes, and these, by the name of the module that has them.

    Modules count, too, whose number is the default of their class; but a number of 1 only where the config sets it, as
    heads that propose objects have one class of their own.
    """
    found = {}
    for key, value in class_keys(config or {}):
        owner = re.sub(r'\[(\d+)\]', r'.\1', key.removeprefix('model').removeprefix('.').rpartition('.')[0])
        found.setdefault(owner, {})[key] = value
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if CLASSES.fullmatch(attribute) and type(value) is int and value > 1 and name not in found:
                place = re.sub(r'\.(\d+)(?=\.|$)', r'[\1]', f'model.{name}' if name else 'model')
                found.setdefault(name, {})[f'{place}.{attribute}'] = value
    return found


def class_counts(model: nn.Module, config=None) -> set[int]:
    """Numbers of classes that a model's predictions may have; empty where nothing says.

    Args:
        model (nn.Module): Detector, segmentor or classifier.
        config (dict, optional): The model's. What it sets counts alone, where it sets anything.
    """
    keys = dict(class_keys(config or {}))
    owners = [keys] if keys else _owners(model, config).values()
    return {count for numbers in owners for count in _counts(numbers)}


def _counts(numbers: dict[str, int]) -> set[int]:
    """The numbers, and the sum of things and stuff, which panoptic heads take apart."""
    parts = {}
    for key, value in numbers.items():
        place, _, name = key.rpartition('.')
        if name in ('num_things_classes', 'num_stuff_classes'):
            parts.setdefault(place, []).append(value)
    return {*numbers.values(), *(sum(values) for values in parts.values())} - {0}


def explain_classes(shapes: Shapes, model: nn.Module, config=None, targets=('backbone', 'neck')) -> str | None:
    """Say what differs where a checkpoint has all that a model has, some of it in other sizes.

    Args:
        shapes (dict): Sizes in the checkpoint and in the model of what differs, by name.
        model (nn.Module): The model.
        config (dict, optional): The model's, to name the keys that set the number of classes.
        targets (Sequence[str]): What is no head.

    Returns:
        str: That the number of classes differs, theirs, ours, and the keys; or that the heads differ in more. None
        where what differs is in the body.
    """
    owners = _owners(model, config)
    groups = {}
    for name, sizes in shapes.items():
        ancestors = [owner for owner in owners if owner == '' or name.startswith(f'{owner}.')]
        nearest = max(ancestors, key=len, default=None)
        numbers = [owners[nearest]] if nearest is not None else owners.values()
        counts = frozenset(count for own in numbers for count in _counts(own))
        groups.setdefault((counts, _besides(model, nearest)), {})[name] = sizes
    found = {}
    for (counts, besides), group in groups.items():
        match = _other_count(group, sorted(counts), besides)
        if match is None:
            body = any(name.startswith(tuple(f'{target}.' for target in targets)) for name in shapes)
            if body or any(len(theirs) != len(ours) for theirs, ours in shapes.values()):
                return None
            keys = ', '.join(_ranges([key for numbers in owners.values() for key in numbers]))
            return ('All else fits, so its heads are set otherwise: compare the number of classes'
                    f"{f' ({keys})' if keys else ''}, anchors and channels of the heads with the config it was trained "
                    'with')
        found.setdefault(match, set()).update(counts)
    return '. '.join(f'The number of classes differs: {theirs} in the checkpoint, {ours} in the model. '
                     + _advice(theirs, ours, owners, config) for theirs, ours in sorted(found))


def _besides(model, owner):
    """What a head has besides classes, where it says so; otherwise all that is possible."""
    head = vars(model.get_submodule(owner)) if owner else {}
    count, outputs = head.get('num_classes'), head.get('cls_out_channels')
    if isinstance(count, int) and isinstance(outputs, int) and outputs - count in BESIDES:
        return outputs - count,
    return BESIDES


def _advice(theirs, ours, owners, config):
    """Which keys to set, of those that have the number or add up to it."""
    numbers = dict(class_keys(config or {}))
    if ours not in _counts(numbers):  # it is the default of the head's class
        numbers = {key: value for own in owners.values() for key, value in own.items()}
    keys = [key for key, value in numbers.items() if value == ours]
    if keys:
        return f"If the checkpoint is the right one, set {', '.join(_ranges(keys))} to {theirs}"
    parts = [key for key in numbers if key.endswith(('num_things_classes', 'num_stuff_classes'))]
    return (f"If the checkpoint is the right one, set {', '.join(_ranges(parts))}: things and stuff are {theirs} "
            'together')


def _ranges(keys: list[str]) -> list[str]:
    """Keys that differ in one index are one: ``model.roi_head.bbox_head[0-2].num_classes``."""
    groups = {}
    for key in keys:
        groups.setdefault(re.sub(r'\[\d+\]', '[]', key, count=1), []).append(key)
    joined = []
    for pattern, group in groups.items():
        indices = [int(re.search(r'\[(\d+)\]', key)[1]) for key in group] if len(group) > 1 else []
        joined.append(pattern.replace('[]', f'[{min(indices)}-{max(indices)}]', 1) if indices else group[0])
    return joined


def _other_count(shapes: Shapes, counts: list[int], besides: tuple[int, ...]) -> tuple[int, int] | None:
    """(theirs, ours): numbers of classes that explain all differences, or None.

    Sizes that depend on the number of classes N are a N + b: a, which both have, is the number of anchors, or of
    numbers in a box; b what there is besides classes. Where several numbers explain all, the fewest anchors win.
    """
    pairs = set()
    for theirs, ours in shapes.values():
        if len(theirs) != len(ours):
            return None
        pairs |= {pair for pair in zip(theirs, ours) if pair[0] != pair[1]}
    best = None
    for count in counts:
        options = {}
        for theirs, ours in pairs:
            for more in besides:
                times, rest = divmod(ours, count + more)
                if not rest and times and theirs % times == 0 and theirs // times > more:
                    options.setdefault(theirs // times - more, []).append(times)
        for other, times in options.items():
            if other == count or any((ours - theirs) % (count - other) or not 0 < (ours - theirs) // (
                    count - other) <= ours // count for theirs, ours in pairs):
                continue
            score = -len(times), sum(times)
            if best is None or score < best[0]:
                best = score, (other, count)
    return best and best[1]
