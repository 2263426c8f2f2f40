"""How well answers agree: what is the same agrees, and what is wrong shows, whichever answer it is in."""
import numpy as np
import pytest

from psaq_mm.deploy.answers import agreement, overlaps, same_areas

NAMES = 'boxes', 'scores', 'labels', 'masks'


def objects(count=6, size=(28, 28), kind=float):
    random = np.random.default_rng(0)
    corners = np.sort(random.random((1, count, 2, 2)) * 90, 2)
    masks = random.random((1, count, *size))
    return [corners.reshape(1, count, 4), random.random((1, count)) * 0.5 + 0.5, random.integers(0, 3, (1, count)),
            masks if kind is float else masks > 0.5]


@pytest.mark.parametrize('kind, size', [(float, (28, 28)), (bool, (90, 110))])
def test_masks_are_compared(kind, size):
    ours = objects(size=size, kind=kind)
    assert agreement(NAMES, ours, ours) == 1
    none, other = ours[3] * 0, ours[3].copy()
    other[:, 0] = other[:, 0] < 0.5
    assert agreement(NAMES, ours, [*ours[:3], none]) == 0
    assert 0.7 < agreement(NAMES, ours, [*ours[:3], other]) < 0.9
    assert agreement(NAMES, [*ours[:3], none], [*ours[:3], none]) == 1, 'empty masks'
    order = np.random.default_rng(1).permutation(6)
    assert agreement(NAMES, ours, [value[:, order] for value in ours]) == 1, 'the masks of a pair'
    assert agreement(NAMES, ours, [*ours[:3], ours[3][..., :14]]) == 0, 'of another size'


def test_a_map_beside_boxes_is_compared():
    ours = objects()
    areas = np.random.default_rng(0).integers(0, 4, (1, 20, 20))
    names = 'panoptic_map', *NAMES
    assert agreement(names, [areas, *ours], [areas, *ours]) == 1
    assert agreement(names, [areas, *ours], [areas * 0, *ours]) < 0.5
    assert agreement(names, [areas, *ours], [areas, *(value[:, :2] for value in ours)]) < 0.8


def test_numbers_of_instances_may_differ():
    areas = np.zeros((8, 10), np.int64)
    areas[2:4, 2:8], areas[6:, 4:8] = 1001, 2001
    other = np.where(areas == 1001, 3001, areas)
    assert same_areas(areas, other) == 1
    assert same_areas(areas, np.where(areas == 1001, 2001, areas)) < 1, 'two instances as one'
    assert same_areas(areas, np.where(areas == 1001, 1002, areas)) == pytest.approx(1 - 12 / 80), 'another class'


def test_boxes_without_an_area_agree_with_themselves():
    boxes = np.array([[5., 5, 5, 5], [3, 2, 3, 9], [0, 0, 4, 4]])
    assert (overlaps(boxes, boxes).diagonal() == 1).all()
    assert overlaps(boxes[:1], boxes[1:]).max() == 0
    ours = [boxes[None], np.array([[0.9, 0.8, 0.7]]), np.array([[0, 0, 1]])]
    assert agreement(NAMES[:3], ours, ours) == 1
    assert agreement(NAMES[:3], ours, [ours[0] + 1, *ours[1:]]) == 0


def test_equal_boxes_are_told_apart_by_their_scores():
    boxes, masks = np.float64([[[0, 0, 9, 9]] * 3]), np.eye(3).reshape(1, 3, 1, 3) > 0
    ours = [boxes, np.array([[0.9, 0.895, 0.89]]), np.zeros((1, 3)), masks]
    theirs = [boxes, np.array([[0.89, 0.9, 0.895]]), np.zeros((1, 3)), masks[:, [2, 0, 1]]]
    assert agreement(NAMES, ours, theirs) == 1


def test_detections_weigh_as_much_as_their_scores():
    ours = objects()
    fewer = [value[:, 1:] for value in ours]
    scores = ours[1][0]
    assert agreement(NAMES, ours, fewer) == pytest.approx(2 * scores[1:].sum() / (scores.sum() + scores[1:].sum()))
    none = [value[:, :0] for value in ours]
    assert agreement(NAMES, none, none) == 1 and agreement(NAMES, ours, none) == agreement(NAMES, none, ours) == 0


def test_values_and_labels():
    depth = np.random.default_rng(0).random((1, 9, 9)).astype(np.float32)
    assert agreement(['depth'], [depth], [depth]) == 1 and agreement(['depth'], [depth], [depth * 0.9]) < 0.91
    labels = (depth * 5).astype(np.uint8)
    assert agreement(['label_map'], [labels], [labels]) == 1 and agreement(['label_map'], [labels], [labels + 1]) == 0
    assert agreement(['label_map'], [labels], [labels[:, 1:]]) == 0
