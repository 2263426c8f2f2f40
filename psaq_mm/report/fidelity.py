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


def _entries(samples, masks, truth=False):
    """Predictions in COCO's words, one dict an object; as truth, those in doubt are what COCO calls a crowd."""
    import pycocotools.mask as codec
    entries = []
    for image, sample in enumerate(samples, 1):
        instances = sample.pred_instances
        counts = objects(instances.scores)
        crowd = ~counts & (instances.scores >= DOUBT * SCORE)
        for index, (box, score, label) in enumerate(zip(instances.bboxes.tolist(), instances.scores.tolist(),
                                                        instances.labels.tolist())):
            if truth and not counts[index] and not crowd[index]:
                continue
            width, height = box[2] - box[0], box[3] - box[1]
            entry = dict(id=len(entries) + 1, image_id=image, category_id=label, score=score,
                         iscrowd=int(truth and crowd[index]), bbox=[box[0], box[1], width, height],
                         area=width * height)
            if masks:
                mask = np.asfortranarray(np.asarray(instances.masks[index], dtype=np.uint8))
                entry['segmentation'] = codec.encode(mask)
                entry['area'] = float(codec.area(entry['segmentation']))
            entries.append(entry)
    return entries


def of_instances(teacher: list, student: list) -> dict[str, float]:
    """COCO's AP, in %, of boxes and, where there are any, masks; the objects are full precision's best predictions."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    masks = all('masks' in sample.pred_instances for sample in teacher + student)
    aims, found = _entries(teacher, masks, True), _entries(student, masks)
    if not aims:
        return {}
    images = [dict(id=number, height=sample.ori_shape[0], width=sample.ori_shape[1])
              for number, sample in enumerate(teacher, 1)]
    labels = {entry['category_id'] for entry in aims + found}
    result = {}
    for kind in ['bbox', *['segm'] * masks]:
        truth = COCO()
        truth.dataset = dict(images=images, annotations=aims,
                             categories=[dict(id=label) for label in sorted(labels)])
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools' own tables
            truth.createIndex()
            answers = COCO()
            answers.dataset = dict(truth.dataset, annotations=found)
            answers.createIndex()
            evaluation = COCOeval(truth, answers, kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        result['box AP' if kind == 'bbox' else 'mask AP'] = 100 * float(evaluation.stats[0])
    return result


def compared(teacher: nn.Module, teachers: list, students: list) -> dict[str, float]:
    """Agreement of two models' predictions, by the kind of the predictions; nothing for other kinds."""
    if isinstance(teacher, Classifier):
        return of_logits(teachers, students)
    if all('pred_instances' in sample and 'bboxes' in sample.pred_instances for sample in teachers + students):
        return of_instances(teachers, students)
    if all('pred_sem_seg' in sample for sample in teachers + students):
        classes = getattr(teacher, 'num_classes', None) or teacher.decode_head.num_classes
        return of_maps(teachers, students, max(classes, 2))
    return {}


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
        result['predictions'] = compared(teacher, teachers, students)
        if 'box AP' in result['predictions']:
            result['objects'] = sum(int(objects(sample.pred_instances.scores).sum()) for sample in teachers)
        if not result['predictions']:
            result['problem'] = ('full precision predicts nothing on these images' if teachers and all(
                'pred_instances' in sample for sample in teachers) else
                                 'predictions of this kind of model are not compared, only its features')
    except Exception as error:  # of models that want to know more than an image
        result['predictions'] = {}
        result['problem'] = f'predictions cannot be compared ({type(error).__name__}: {error})'
    return result
