"""How well two sets of answers agree: detections and their masks matched one by one, maps pixel by
pixel."""
from __future__ import annotations

import numpy as np

OBJECTS = 'boxes', 'scores', 'labels', 'masks'  # answers that have a row for each object of an image
SAME_PLACE = 0.01  # pixels between corners of two boxes that lie in one place
INSTANCES = 1000  # what numbers of instances are multiplied with in a panoptic map


def single(names, answers) -> list[list[np.ndarray]]:
    """Return the answers to each image of a batch, (1, ...) each, without what fills up rows of objects (label -1).

    Args:
        names (Sequence[str]): What the answers are.
        answers (Sequence[np.ndarray]): (B, ...) each.
    """
    found = []
    for i in range(len(answers[0])):
        row = {name: value[i:i + 1] for name, value in zip(names, answers)}
        if 'labels' in row:
            real = row['labels'][0] >= 0
            row.update({name: row[name][:, real] for name in OBJECTS if name in row})
        found.append(list(row.values()))
    return found


def anything(names, answers) -> bool:
    """Whether answers to images tell of any object; in a panoptic map, of more than one area. Other answers always do.

    Args:
        names (Sequence[str]): What the answers are.
        answers (Sequence[np.ndarray]): (B, ...) each.
    """
    values = dict(zip(names, answers))
    found = [(values['labels'] >= 0).any()] if 'labels' in values else []
    if 'panoptic_map' in values:
        found.append(values['panoptic_map'].min() < values['panoptic_map'].max())
    return bool(np.any(found)) if found else True


def overlaps(boxes, others):
    """Return the intersection over union of each pair of boxes, (N, M); 1 where they lie in one place, area or not.

    Args:
        boxes, others (np.ndarray): (N, 4) and (M, 4), x1, y1, x2, y2.
    """
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    common = (high - low).clip(0).prod(-1)
    area, other = (np.prod((b[:, 2:] - b[:, :2]).clip(0), -1) for b in (boxes, others))
    one_place = (np.abs(boxes[:, None] - others[None]) < SAME_PLACE).all(-1)
    return np.where(one_place, 1.0, common / np.maximum(area[:, None] + other[None] - common, 1e-9))


def matches(boxes, scores, labels, other_boxes, other_scores, other_labels, overlap=0.9, score=0.02) -> np.ndarray:
    """Return which detections are counterparts, (K, 2): the same label, nearly the same box and score; each once.

    Args:
        boxes, scores, labels (np.ndarray): (N, 4), (N, ), (N, ).
        other_boxes, other_scores, other_labels (np.ndarray): (M, 4), (M, ), (M, ).
        overlap (float): Least intersection over union. Defaults to 0.9.
        score (float): Largest difference of scores. Defaults to 0.02.
    """
    pairs = overlaps(np.asarray(boxes, np.float64), np.asarray(other_boxes, np.float64))
    apart = np.abs(scores[:, None] - other_scores[None])
    good = (pairs >= overlap) & (labels[:, None] == other_labels[None]) & (apart <= score)
    nearness = np.where(good, pairs - apart, -1.0)  # queries may have equal boxes
    found = []
    for row in np.argsort(-scores) if len(other_boxes) else ():
        column = nearness[row].argmax()
        if nearness[row, column] >= 0:
            found.append((row, column))
            nearness[:, column] = -1
    return np.array(found, np.int64).reshape(-1, 2)


def same_masks(masks, others, weights) -> float:
    """Return the mean intersection over union of masks, 1 of two empty ones.

    Args:
        masks, others (np.ndarray): (K, h, w), bool, or probabilities: within a mask from one half on.
        weights (np.ndarray): (K, ).
    """
    if masks.shape[1:] != others.shape[1:]:
        return 0.0
    if not weights.sum() > 0:
        return 1.0
    inside, other = ((value if value.dtype == bool else value >= 0.5).reshape(len(value), -1)
                     for value in (masks, others))
    common, all_ = (inside & other).sum(1), (inside | other).sum(1)
    return float(np.average(np.where(all_ > 0, common / np.maximum(all_, 1), 1.0), weights=weights))


def same_objects(ours: dict, theirs: dict) -> dict[str, float]:
    """Return how well the objects of one image agree, from 0 to 1: the share that has counterparts, and their masks.

    Both sides count, and each object by its score. Nothing agrees with nothing.

    Args:
        ours, theirs (dict[str, np.ndarray]): ``boxes`` (N, 4), ``scores`` (N, ), ``labels`` (N, ), maybe ``masks``.
    """
    scores, others = ours['scores'], theirs['scores']
    total = scores.sum() + others.sum()
    if not len(scores) * len(others) or total <= 0:
        return dict(boxes=float(len(scores) == len(others)))
    rows, columns = matches(*(side[key] for side in (ours, theirs) for key in ('boxes', 'scores', 'labels'))).T
    weights = scores[rows] + others[columns]
    found = dict(boxes=float(weights.sum() / total))
    if 'masks' in ours:
        found['masks'] = same_masks(ours['masks'][rows], theirs['masks'][columns], weights)
    return found


def same_areas(panoptic, other) -> float:
    """Return the share of pixels in areas that are counterparts: the same class, the most pixels in common; each once.

    Args:
        panoptic, other (np.ndarray): Class + 1000 * number of the instance, (H, W).
    """
    size = max(int(panoptic.max()), int(other.max())) + 1
    codes, counts = np.unique(panoptic.astype(np.int64) * size + other, return_counts=True)
    common, used = 0, (set(), set())
    for place in np.argsort(-counts):
        pair = divmod(int(codes[place]), size)
        if pair[0] % INSTANCES == pair[1] % INSTANCES and pair[0] not in used[0] and pair[1] not in used[1]:
            common += int(counts[place])
            used[0].add(pair[0])
            used[1].add(pair[1])
    return common / panoptic.size


def same_values(values, others) -> float:
    """Return the share of integers that are equal; of floats, what their differences leave of them."""
    if values.dtype.kind in 'iub':
        return float((values == others).mean())
    return max(1 - float(np.abs(values - others).sum() / max(np.abs(values).sum(), 1e-12)), 0.0)


def agreements(names, answers, others) -> dict[str, float]:
    """Return how well two sets of answers agree, each from 0 to 1 and for the image that agrees worst.

    Detections count by their scores: one at the threshold that comes or goes weighs little.

    Args:
        names (Sequence[str]): What the answers are, as a predictor names them.
        answers, others (Sequence[np.ndarray]): With an axis of images first.

    Returns:
        dict[str, float]: By name; 'boxes' stands for boxes, scores and labels.
    """
    ours, theirs = (dict(zip(names, (np.asarray(value) for value in values))) for values in (answers, others))
    objects, found = [name for name in OBJECTS if name in ours and 'boxes' in ours], {}

    def add(values):
        found.update({name: min(value, found.get(name, 1.0)) for name, value in values.items()})

    for i in range(len(ours['boxes']) if objects else 0):
        add(same_objects(*({name: side[name][i] for name in objects} for side in (ours, theirs))))
    for name, value in ours.items():
        other = theirs[name]
        if name in objects:
            continue
        if value.shape != other.shape:
            add({name: 0.0})
        elif name == 'panoptic_map':
            add({name: min(map(same_areas, value, other))})
        else:
            add({name: same_values(value, other)})
    return found


def agreement(names, answers, others) -> float:
    """Return how well two sets of answers agree: the lowest of :func:`agreements`."""
    return min(agreements(names, answers, others).values())
