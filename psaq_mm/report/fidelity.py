"""Data-free fidelity: how well the quantized model does on images nobody has seen what full precision does.

The images are synthesised for this alone. What the full-precision model predicts on them takes the place of the labels,
so the numbers are AP, mIoU or agreement *with full precision*: 100 for a perfect copy, whatever its accuracy. Source:
ours.
"""
from __future__ import annotations

import contextlib
import io

import numpy as np
import torch
from torch import Tensor, nn

from ..classification import Classifier
from ..models import extract_features
from ..models.features import data_samples
from ..quantization import sqnr

SCORE = 0.3  # of a detection of the full-precision model that counts as an object; our choice
DOUBT = 0.5  # times that: detections between the two are neither objects nor mistakes; our choice
OTHERS = dict(pred_panoptic_seg='panoptic maps', pred_track_instances='tracks', pred_depth_map='depth maps')
FEWEST = 3  # objects an image: so many of the highest scores count if fewer reach SCORE; our choice


def samples_of(model: nn.Module, images: Tensor) -> list:
    """What the model's own ``predict`` wants to know about images without files, by the kind of the model.

    Args:
        model (nn.Module): Of mmdet or mmseg.
        images (Tensor): (B, C, H, W).
    """
    from mmseg.models.segmentors.base import BaseSegmentor
    if isinstance(model, BaseSegmentor):
        from mmseg.structures import SegDataSample as Sample
    else:
        from mmdet.structures import DetDataSample as Sample
    return data_samples(images, Sample)


@torch.no_grad()
def predictions(model: nn.Module, batches: list[Tensor]) -> list:
    """A model's predictions on images in its input space: logits (classes,), or data samples."""
    if isinstance(model, Classifier):
        return [logits for batch in batches for logits in model.logits(batch).float().cpu()]
    return [sample.cpu() for batch in batches for sample in model(batch, samples_of(model, batch), mode='predict')]


def of_logits(teacher: list[Tensor], student: list[Tensor]) -> dict[str, float]:
    """Agreement of the first choice, in %, and mean divergence KL(teacher, student), in nats."""
    teacher, student = torch.stack(teacher), torch.stack(student)
    divergence = nn.functional.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction='batchmean',
                                      log_target=True)
    return {'top-1 agreement': 100 * (teacher.argmax(1) == student.argmax(1)).float().mean().item(),
            'KL divergence, nats': divergence.item()}


def of_maps(teacher: list, student: list, classes: int) -> dict[str, float]:
    """mIoU over the classes that occur, and share of pixels with the same class, in %."""
    from mmseg.evaluation import IoUMetric
    areas = [IoUMetric.intersect_and_union(found.pred_sem_seg.data.squeeze(0), aim.pred_sem_seg.data.squeeze(0),
                                           classes, 255) for aim, found in zip(teacher, student)]
    intersection, union, _, labels = (torch.stack(parts).sum(0) for parts in zip(*areas))
    occurs = labels > 0
    return {'mIoU': 100 * (intersection[occurs] / union[occurs]).mean().item(),
            'pixel agreement': 100 * (intersection.sum() / labels.sum()).item()}


def objects(scores: Tensor) -> Tensor:
    """Which detections of full precision count as objects, from their scores."""
    enough = scores >= SCORE
    return enough if enough.sum() >= FEWEST else enough.index_fill(
        0, scores.argsort(descending=True)[:FEWEST], True)


def _entries(samples: list, kind: str, doubt: float, truth: bool = False) -> list[dict]:
    """Return predictions in COCO's words, one dict an object; as truth, those in doubt are what COCO calls a crowd.

    Args:
        samples (list): Data samples with ``pred_instances``.
        kind (str): 'bbox' or 'segm'. What has no area of that kind is left out: it overlaps with nothing.
        doubt (float): Score below which a detection is no object for sure.
        truth (bool): Whether they are full precision's. Defaults to False.
    """
    import pycocotools.mask as codec
    entries = []
    for image, sample in enumerate(samples, 1):
        instances = sample.pred_instances
        counts = objects(instances.scores)
        crowd = ~counts & (instances.scores >= doubt)
        for index, (box, score, label) in enumerate(zip(instances.bboxes.tolist(), instances.scores.tolist(),
                                                        instances.labels.tolist())):
            if truth and not counts[index] and not crowd[index]:
                continue
            width, height = box[2] - box[0], box[3] - box[1]
            entry = dict(id=len(entries) + 1, image_id=image, category_id=label, score=score,
                         iscrowd=int(truth and crowd[index]), bbox=[box[0], box[1], width, height],
                         area=width * height if min(width, height) > 0 else 0)
            if kind == 'segm':
                mask = instances.masks[index]
                entry['segmentation'] = mask if isinstance(mask, dict) else codec.encode(
                    np.asfortranarray(np.asarray(mask, dtype=np.uint8)))
                entry['area'] = float(codec.area(entry['segmentation']))
            if entry['area'] > 0:
                entries.append(entry)
    return entries


def have_boxes(samples: list) -> bool:
    """Return whether any detection has a box with an area: SOLO's boxes, which mean nothing, have none."""
    return any((sample.pred_instances.bboxes[:, 2:] > sample.pred_instances.bboxes[:, :2]).all(1).any()
               for sample in samples)


def average_precision(aims: list[dict], found: list[dict], sizes: list[tuple[int, int]], kind: str) -> float:
    """Return COCO's AP of predictions, in %.

    Args:
        aims, found (list[dict]): From :func:`_entries`.
        sizes (list[tuple[int, int]]): Height and width of each image.
        kind (str): 'bbox' or 'segm'.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    images = [dict(id=number, height=height, width=width) for number, (height, width) in enumerate(sizes, 1)]
    labels = {entry['category_id'] for entry in aims + found}
    truth, answers = COCO(), COCO()
    truth.dataset = dict(images=images, annotations=aims, categories=[dict(id=label) for label in sorted(labels)])
    answers.dataset = dict(truth.dataset, annotations=found)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools' own tables
        truth.createIndex()
        answers.createIndex()
        evaluation = COCOeval(truth, answers, kind)
        evaluation.params.maxDets = [max(100, len(found))]  # all, whatever the model puts out
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, float('inf')]], ['all']
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval['precision']
    return 100 * float(precision[precision > -1].mean())


def of_instances(teacher: list, student: list) -> dict[str, float]:
    """COCO's AP, in %, of boxes and masks, where there are any; the objects are full precision's best predictions."""
    both = teacher + student
    kinds = ['bbox'] * have_boxes(both) + ['segm'] * all('masks' in sample.pred_instances for sample in both)
    kept = [scores[objects(scores)] for scores in (sample.pred_instances.scores for sample in teacher)]
    # What scores less than the least object anywhere cannot outrank one: a perfect copy has 100.
    doubt = DOUBT * min([SCORE, *(scores.min().item() for scores in kept if len(scores))])
    result = {}
    for kind in kinds:
        aims = _entries(teacher, kind, doubt, True)
        if any(not aim['iscrowd'] for aim in aims):
            result['box AP' if kind == 'bbox' else 'mask AP'] = average_precision(
                aims, _entries(student, kind, doubt), [sample.ori_shape[:2] for sample in teacher], kind)
    return result


def compared(teacher: nn.Module, teachers: list, students: list) -> tuple[dict[str, float], str | None]:
    """Compare two models' predictions by their kind.

    Args:
        teacher (nn.Module): Full precision.
        teachers, students (list): Of :func:`predictions`.

    Returns:
        tuple[dict[str, float], str | None]: Agreement by name, and where there is none, why.
    """
    if isinstance(teacher, Classifier):
        return of_logits(teachers, students), None
    both = teachers + students
    other = next((name for name in OTHERS if any(name in sample for sample in both)), None)
    if other:
        return {}, f'{OTHERS[other]} are not compared, only features'
    if all('pred_instances' in sample and {'bboxes', 'scores', 'labels'} <= set(sample.pred_instances.keys())
           for sample in both):
        found = of_instances(teachers, students)
        empty = not any(len(sample.pred_instances) for sample in teachers)
        why = f'full precision predicts nothing {"" if empty else "that has an area "}on these images'
        return found, None if found else why
    if all('pred_sem_seg' in sample for sample in both):
        classes = getattr(teacher, 'num_classes', None) or teacher.decode_head.num_classes
        return of_maps(teachers, students, max(classes, 2)), None
    return {}, 'predictions of this kind of model are not compared, only its features'


@torch.no_grad()
def feature_similarity(teacher: nn.Module, student: nn.Module, batches: list[Tensor],
                       heads: bool = False) -> list[dict]:
    """For each feature map: cosine similarity, mean over images, and SQNR in dB, over all.

    Args:
        teacher, student (nn.Module): Full precision and quantized.
        batches (list[Tensor]): (B, C, H, W) each.
        heads (bool): Raw outputs of the heads besides. Defaults to False.
    """
    sums = []
    for batch in batches:
        for index, (p, q) in enumerate(zip(extract_features(teacher, batch, heads),
                                           extract_features(student, batch, heads))):
            p, q = p.float().flatten(1), q.float().flatten(1)
            if index == len(sums):
                sums.append(dict(cosine=0.0, rows=0, power=0.0, noise=0.0))
            entry = sums[index]
            entry['cosine'] += nn.functional.cosine_similarity(p, q).sum().item()
            entry['rows'] += len(p)
            entry['power'] += p.square().sum(dtype=torch.float64).item()
            entry['noise'] += (p - q).square().sum(dtype=torch.float64).item()
    return [dict(cosine=entry['cosine'] / entry['rows'], sqnr=round(sqnr(entry['power'], entry['noise']), 2))
            for entry in sums]


def fidelity(teacher: nn.Module, student: nn.Module, batches: list[Tensor], heads: bool = False) -> dict:
    """Data-free fidelity of a quantized model.

    Args:
        teacher, student (nn.Module): Full precision and quantized, in eval mode.
        batches (list[Tensor]): Images of the model's input space that neither has seen, (B, C, H, W) each.
        heads (bool): Whether the heads are quantized, too.

    Returns:
        dict: ``views``, how many images; ``predictions``, agreement by name, in % unless the name says otherwise;
        ``objects``, of a detector, how many of full precision's detections were taken for truth; ``features``, one
        dict a map; ``cosine``, mean over the maps; ``problem`` where predictions could not be compared.
    """
    features = feature_similarity(teacher, student, batches, heads)
    result = dict(views=sum(map(len, batches)), features=features,
                  cosine=sum(f['cosine'] for f in features) / len(features))
    try:
        teachers, students = predictions(teacher, batches), predictions(student, batches)
        result['predictions'], why = compared(teacher, teachers, students)
        if {'box AP', 'mask AP'} & result['predictions'].keys():
            result['objects'] = sum(int(objects(sample.pred_instances.scores).sum()) for sample in teachers)
        if why:
            result['problem'] = why
    except Exception as error:  # of models that want to know more than an image
        result['predictions'] = {}
        result['problem'] = f'predictions cannot be compared ({type(error).__name__}: {error})'
    return result
