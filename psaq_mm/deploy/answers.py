"""How well two sets of answers agree: detections matched one by one, label maps pixel by pixel."""
from __future__ import annotations

import numpy as np

OBJECTS = 'boxes', 'scores', 'labels', 'masks'  # answers that have a row for each object of an image


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


def overlaps(boxes, others):
    """Return the intersection over union of each pair of boxes, (N, M).

    Args:
        boxes, others (np.ndarray): (N, 4) and (M, 4), x1, y1, x2, y2.
    """
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    common = (high - low).clip(0).prod(-1)
    area, other = (np.prod((b[:, 2:] - b[:, :2]).clip(0), -1) for b in (boxes, others))
    return common / np.maximum(area[:, None] + other[None] - common, 1e-9)


def matched(boxes, scores, labels, other_boxes, other_scores, other_labels, overlap=0.9, score=0.02) -> float:
    """Return the share of detections that have a counterpart: the same label, nearly the same box and score.

    Each counterpart serves once, both sides count, and each detection by its score: 1 if all match or there are none.

    Args:
        boxes, scores, labels (np.ndarray): (N, 4), (N, ), (N, ).
        other_boxes, other_scores, other_labels (np.ndarray): (M, 4), (M, ), (M, ).
        overlap (float): Least intersection over union. Defaults to 0.9.
        score (float): Largest difference of scores. Defaults to 0.02.
    """
    total = scores.sum() + other_scores.sum()
    if not len(boxes) * len(other_boxes) or total <= 0:
        return float(len(boxes) == len(other_boxes))
    pairs = overlaps(np.asarray(boxes, np.float64), np.asarray(other_boxes, np.float64))
    pairs[(labels[:, None] != other_labels[None]) | (np.abs(scores[:, None] - other_scores[None]) > score)] = 0
    common = 0.0
    for row in np.argsort(-scores):
        column = pairs[row].argmax()
        if pairs[row, column] >= overlap:
            common += scores[row] + other_scores[column]
            pairs[:, column] = 0
    return float(common / total)


def agreement(names, answers, others) -> float:
    """Return how well two sets of answers to one image agree, from 0 to 1.

    Detections count by their scores: one at the threshold that comes or goes weighs little.

    Args:
        names (Sequence[str]): What the answers are, as a predictor names them.
        answers, others (Sequence[np.ndarray]): With an axis of images first.
    """
    ours, theirs = (dict(zip(names, (np.asarray(value) for value in values))) for values in (answers, others))
    if 'boxes' in ours:
        return min(matched(*(side[key][i] for side in (ours, theirs) for key in ('boxes', 'scores', 'labels')))
                   for i in range(len(ours['boxes'])))
    found = []
    for name, value in ours.items():
        other = theirs[name]
        if value.shape != other.shape:
            return 0.0
        if value.dtype.kind in 'iub':
            found.append(float((value == other).mean()))
        else:
            found.append(1 - float(np.abs(value - other).sum() / max(np.abs(value).sum(), 1e-12)))
    return max(min(found), 0.0)
