"""How well two sets of answers agree: detections matched one by one, label maps pixel by pixel."""
from __future__ import annotations

import numpy as np


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
    """Return the share of detections with a counterpart: the same label, nearly the same box and score.

    Each counterpart serves once; both sides count: 2 * matches / (N + M); of two empty sets 1.

    Args:
        boxes, scores, labels (np.ndarray): (N, 4), (N, ), (N, ).
        other_boxes, other_scores, other_labels (np.ndarray): (M, 4), (M, ), (M, ).
        overlap (float): Least intersection over union. Defaults to 0.9.
        score (float): Largest difference of scores. Defaults to 0.02.
    """
    if not len(boxes) + len(other_boxes):
        return 1.0
    if not len(boxes) * len(other_boxes):
        return 0.0
    pairs = overlaps(np.asarray(boxes, np.float64), np.asarray(other_boxes, np.float64))
    pairs[(labels[:, None] != other_labels[None]) | (np.abs(scores[:, None] - other_scores[None]) > score)] = 0
    count = 0
    for row in np.argsort(-scores):
        column = pairs[row].argmax()
        if pairs[row, column] >= overlap:
            count += 1
            pairs[:, column] = 0
    return 2 * count / (len(boxes) + len(other_boxes))
