"""Accuracy of a delivered model.onnx, by a process that imports neither PyTorch nor any mm* library.

    python benchmarks/strangers.py work_dirs/NAME/int8/model.onnx --images val/ --coco val.json
    python benchmarks/strangers.py work_dirs/NAME/int8/model.onnx --images val/ --maps val_maps/
    python benchmarks/strangers.py work_dirs/NAME/int8/model.onnx --images val/            # a folder for each class

Reads images and pastes masks as the predict.py beside the graph does; pycocotools gives AP, all else is counted here.
Detections of two runtimes are matched one by one, and what agrees is printed. With --expect work_dirs/NAME/metrics.json
it fails where a number is further than 0.1 points from what the library found for the fake-quantized model, or where
the process has imported what a stranger does not have. It also fails, with one line, where there is nothing to compare.
"""
import argparse
import contextlib
import importlib.util
import io
import json
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

ABSENT = 'torch', 'torchvision', 'cv2', 'psaq_mm', 'timm', 'mmengine', 'mmcv', 'mmdet', 'mmseg'
ROUNDED = dict(box=0.05, mask=0.05, miou=0.005, top1=0.005)  # by how much the library rounds what it writes there
NAMES = dict(box='coco/bbox_mAP', mask='coco/segm_mAP', miou='mIoU', top1='accuracy/top1')  # in metrics.json
OVERLAP, SCORE = 0.9, 0.02  # of boxes at least, of scores at most apart, for two detections to be the same
IGNORED = 255  # in label maps


def script_of(model):
    """predict.py beside a graph, as a module."""
    path = model.with_name('predict.py')
    if not path.is_file():
        sys.exit(f'{path} does not exist: give the model.onnx of a folder that tools/export.py wrote')
    spec = importlib.util.spec_from_file_location('delivered', path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(model.parent))  # session.py lies there, too
    spec.loader.exec_module(module)
    return module


def average_precision(answer, script, card, images, annotations):
    """Box and mask AP of COCO, points."""
    from pycocotools import mask as masks
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO(str(annotations))
        listed, ids = truth.dataset['images'], {item['name']: item['id'] for item in truth.dataset['categories']}
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f'{annotations} cannot be read as annotations of COCO ({type(error).__name__}: {error})')
    unknown = sorted(set(card['classes'] or ['classes without names']) - set(ids))
    if unknown or not truth.anns:
        sys.exit(f"{annotations} has no {'category ' + unknown[0] if unknown else 'objects'}: give the annotations of "
                 'the data set that the model was trained for')
    results, with_masks = [], False
    for image in listed:
        answers, size = answer(images / image['file_name'])
        with_masks = 'masks' in answers
        for i in np.flatnonzero(answers['labels'][0] >= 0):
            box = answers['boxes'][0][i].tolist()
            x1, y1, x2, y2 = box
            found = dict(image_id=image['id'], category_id=ids[card['classes'][int(answers['labels'][0][i])]],
                         bbox=[x1, y1, x2 - x1, y2 - y1], score=float(answers['scores'][0][i]))
            if with_masks:
                inside = script.paste(answers['masks'][0][i].astype(np.float32), box, size, card)
                code = masks.encode(np.asfortranarray(inside.astype(np.uint8)))
                found['segmentation'] = dict(code, counts=code['counts'].decode())
            results.append(found)
    if not results:
        sys.exit(f'the graph finds nothing in the {len(listed)} images of {annotations}')
    values = {}
    for name, kind in (('box', 'bbox'), ('mask', 'segm'))[:1 + with_masks]:
        with contextlib.redirect_stdout(io.StringIO()):
            if kind == 'segm':  # areas of masks, not of boxes
                results = [{key: value for key, value in item.items() if key != 'bbox'} for item in results]
            evaluation = COCOeval(truth, truth.loadRes(results), kind)
            evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
        values[name] = 100 * evaluation.stats[0]
    return values


def label_map(path, card, size):
    """A stored label map (H, W) as the data set of an evaluation has it."""
    truth = np.array(Image.open(path))
    if truth.shape != size:
        sys.exit(f'{path} is no label map of {size[1]} x {size[0]} pixels: its shape is {truth.shape}')
    if card['reduce_zero_label']:  # 0 is ignored, classes begin at 1
        truth = np.where((truth == 0) | (truth == IGNORED), IGNORED, truth - 1)
    if truth[truth != IGNORED].max(initial=0) >= len(card['classes']):
        sys.exit(f"{path} has label {truth[truth != IGNORED].max()}, and the model {len(card['classes'])} classes: "
                 'give the label maps that an evaluation reads')
    return truth


def mean_iou(answer, card, images, maps):
    """Mean intersection over union, points; 255 is ignored."""
    count = len(card['classes'] or ())
    common, ours, theirs = np.zeros((3, count))
    pairs = [(path, maps / f'{path.stem}.png') for path in sorted(images.iterdir())]
    pairs = [(path, truth) for path, truth in pairs if path.is_file() and truth.is_file()]
    if not pairs or not count:
        sys.exit(f'no image in {images} has a label map in {maps} (NAME.png): give the folders of both' if count else
                 'model.json names no classes: name them in test_dataloader.dataset.metainfo and export again')
    for path, truth in pairs:
        answers, size = answer(path)
        truth = label_map(truth, card, size)
        found, truth = answers['label_map'][0][truth != IGNORED], truth[truth != IGNORED]
        common += np.bincount(truth[found == truth], minlength=count)[:count]
        ours += np.bincount(found, minlength=count)[:count]
        theirs += np.bincount(truth, minlength=count)[:count]
    union = ours + theirs - common
    if not theirs.any():
        sys.exit(f'{maps} has no pixel that is not ignored')
    return dict(miou=100 * float(np.mean(common[union > 0] / union[union > 0])))


def top_1(answer, card, images):
    """Share of images whose likeliest class is that of their folder, points.

    Folders have the names of the model's classes, or stand for them in alphabetical order.
    """
    folders = sorted(path for path in images.iterdir() if path.is_dir())
    names = card['classes'] or []
    named = all(folder.name in names for folder in folders)
    paths = [(path, names.index(folder.name) if named else number) for number, folder in enumerate(folders)
             for path in sorted(folder.iterdir())]
    if not paths or not named and names and len(folders) != len(names):
        sys.exit(f'{images} has {len(folders)} folders with {len(paths)} images, and the model {len(names)} classes: '
                 'give a folder that has one for each class, with images')
    return dict(top1=100 * float(np.mean([int(answer(path)[0]['probabilities'][0].argmax()) == index
                                          for path, index in paths])))


def detections(answers):
    """Boxes (N, 4), scores (N, ) and labels (N, ) of one image, without what fills up rows."""
    real = answers['labels'][0] >= 0
    return [answers[name][0][real] for name in ('boxes', 'scores', 'labels')]


def pairs_of(ours, theirs):
    """Match detections of one image one by one, the surest first.

    Args:
        ours, theirs (list[np.ndarray]): As of :func:`detections`.

    Returns:
        list[tuple[int, int]]: Indices of those that have the same label, nearly the same box and score.
    """
    (a, scores, labels), (b, others, other_labels) = ours, theirs
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    common = (high - low).clip(0).prod(2)
    areas = [(box[:, 2:] - box[:, :2]).clip(0).prod(1) for box in (a, b)]
    overlap = common / np.maximum(areas[0][:, None] + areas[1] - common, 1e-9)
    overlap[(labels[:, None] != other_labels) | (np.abs(scores[:, None] - others) > SCORE)] = 0
    found = []
    for row in np.argsort(-scores, kind='stable') if len(others) else ():
        column = overlap[row].argmax()
        if overlap[row, column] >= OVERLAP:
            found.append((int(row), int(column)))
            overlap[:, column] = 0
    return found


def matched(ours, theirs, least=0.0):
    """Count detections in all images, and those that have a counterpart.

    Args:
        ours, theirs (dict[Path, list]): By image, as of :func:`detections`.
        least (float): Score of those that count, or of their counterparts. Defaults to 0.

    Returns:
        tuple[int, int, int]: Pairs, all of ours, all of theirs.
    """
    total = np.zeros(3, int)
    for path, found in ours.items():
        sure, others = found[1] >= least, theirs[path][1] >= least
        for i, j in pairs_of(found, theirs[path]):
            sure[i] = others[j] = sure[i] or others[j]
            total[0] += sure[i]
        total[1:] += sure.sum(), others.sum()
    return tuple(total.tolist())


def values_of(card):
    """Names of what is measured of a model, and the option that it takes."""
    names = {port['name'] for port in card['outputs']}
    kinds = dict(boxes=(['box'] + ['mask'] * ('masks' in names), 'coco'), label_map=(['miou'], 'maps'),
                 probabilities=(['top1'], None))
    for name, values in kinds.items():
        if name in names:
            return values
    sys.exit(f'the model answers with {", ".join(sorted(names))}: only {", ".join(kinds)} can be measured here')


def expected_of(path, names):
    """What the library found for the fake-quantized model: by our names, points, and all of it by its own."""
    try:
        found = json.loads(path.read_text())['quantized']
        return {name: found[NAMES[name]] * (100 if name in ('box', 'mask') else 1) for name in names}, found
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"{path} does not say under 'quantized' what the model reached ({type(error).__name__}: {error}): "
                 'give the metrics.json of its run, which must have evaluated it')


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('model', type=Path, help='model.onnx, with model.json, predict.py and session.py beside it')
    parser.add_argument('--images', type=Path, required=True, metavar='FOLDER')
    parser.add_argument('--coco', type=Path, metavar='FILE', help='annotations as COCO has them')
    parser.add_argument('--maps', type=Path, metavar='FOLDER', help='label maps (.png)')
    parser.add_argument('--runtimes', nargs='+', default=['onnxruntime', 'openvino'])
    parser.add_argument('--expect', type=Path, metavar='FILE', help='metrics.json of the run')
    parser.add_argument('--json', type=Path, metavar='FILE')
    args = parser.parse_args()
    for option, path in (('--images', args.images), ('--maps', args.maps)):
        if path and not path.is_dir():
            sys.exit(f'{option} {path}: there is no such folder')
    return args


def main():
    args = parse_args()
    script = script_of(args.model)
    card, found, failed, seen = script.read_card(args.model), {}, [], {}
    names, option = values_of(card)
    for other in ('coco', 'maps'):
        if (other == option) != bool(getattr(args, other)):
            sys.exit(f"--{other} is {'needed' if other == option else 'of no use'} for a model of this kind")
    aims, expected = expected_of(args.expect, names) if args.expect else ({}, {})
    for runtime in args.runtimes:
        run, started = script.runner(args.model, runtime, card), time.time()
        seen[runtime] = {}

        def answer(path, run=run, runtime=runtime):
            pixels = script.read_image(path, card)
            answers = run(pixels)
            if 'boxes' in answers:
                seen[runtime][path] = detections(answers)
            return answers, pixels.shape[1:3]

        if args.coco:
            values = average_precision(answer, script, card, args.images, args.coco)
        else:
            values = mean_iou(answer, card, args.images, args.maps) if args.maps else top_1(answer, card, args.images)
        for name, value in values.items():
            if not value >= 0:
                sys.exit(f'{runtime} {name} is {value}: there was nothing to compare with')
            far = name in aims and bool(abs(aims[name] - value) > 0.1 + ROUNDED[name])
            failed += [name] if far else []
            print(f'{runtime} {name}: {value:.2f}' + (
                f', the library {aims[name]:.2f}{"  TOO FAR" * far}' if name in aims else ''))
        found[runtime] = dict(values, seconds=round(time.time() - started, 1))
    for one, other in zip(args.runtimes, args.runtimes[1:]):
        for least in (0.0, 0.3) if seen[one] else ():
            both, ours, theirs = matched(seen[one], seen[other], least)
            found.setdefault('matched', both / max(ours, theirs))  # of all
            print(f'detections with a score of {least} and more, matched one by one: {both} of {ours} in {one} and of '
                  f'{theirs} in {other}')
    heavy = sorted({name.split('.')[0] for name in sys.modules} & set(ABSENT))
    if heavy:
        print(f'imported what a stranger does not have: {", ".join(heavy)}')
    if args.json:
        args.json.write_text(json.dumps(dict(found, expected=expected), indent=2) + '\n')
    return bool(failed or heavy)


if __name__ == '__main__':
    sys.exit(main())
