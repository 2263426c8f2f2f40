"""Accuracy of a delivered model.onnx, by a process that imports neither PyTorch nor any mm* library.

    python benchmarks/strangers.py work_dirs/NAME/int8/model.onnx --images val/ --coco val.json
    python benchmarks/strangers.py work_dirs/NAME/int8/model.onnx --images val/ --maps val_maps/
    python benchmarks/strangers.py work_dirs/NAME/int8/model.onnx --images val/            # a folder for each class

Reads images and pastes masks as the predict.py beside the graph does; pycocotools gives AP, all else is counted here.
With --expect work_dirs/NAME/metrics.json it fails where a number is further than 0.1 points from what the library found
for the fake-quantized model, or where the process has imported what a stranger does not have. Detections of the two
runtimes are matched one by one: of the same class, in boxes that overlap by 0.9 or more, by falling scores.
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
OVERLAP = 0.9  # of boxes of one object in two runtimes
ROUNDED = dict(box=0.05, mask=0.05, miou=0.005, top1=0.005)  # by how much the library rounds what it writes there
NAMES = dict(box='coco/bbox_mAP', mask='coco/segm_mAP', miou='mIoU', top1='accuracy/top1')  # in metrics.json


def script_of(model):
    """Return predict.py beside a graph, as a module."""
    sys.path.insert(0, str(model.parent))  # it imports what lies there
    spec = importlib.util.spec_from_file_location('delivered', model.with_name('predict.py'))
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(model.parent))  # session.py lies there, too
    spec.loader.exec_module(module)
    return module


def average_precision(answer, script, card, images, annotations):
    """Return box and mask AP of COCO, points, and the detections as COCO has them."""
    from pycocotools import mask as masks
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
    ids = {item['name']: item['id'] for item in truth.dataset['categories']}
    results = []
    for image in truth.dataset['images']:
        answers, size = answer(images / image['file_name'])
        chosen = np.flatnonzero(answers['labels'][0] >= 0)
        for i in chosen:
            box = answers['boxes'][0][i].tolist()
            x1, y1, x2, y2 = box
            found = dict(image_id=image['id'], category_id=ids[card['classes'][int(answers['labels'][0][i])]],
                         bbox=[x1, y1, x2 - x1, y2 - y1], score=float(answers['scores'][0][i]))
            if 'masks' in answers:
                inside = script.paste(answers['masks'][0][i].astype(np.float32), box, size, card)
                code = masks.encode(np.asfortranarray(inside.astype(np.uint8)))
                found['segmentation'] = dict(code, counts=code['counts'].decode())
            results.append(found)
    if not results:
        raise SystemExit(f'error: the graph finds nothing in {len(truth.dataset["images"])} images')
    values, detections = {}, results
    for name, kind in (('box', 'bbox'), ('mask', 'segm')):
        if kind == 'segm' and not any('segmentation' in item for item in results):
            continue
        with contextlib.redirect_stdout(io.StringIO()):
            if kind == 'segm':  # areas of masks, not of boxes
                results = [{key: value for key, value in item.items() if key != 'bbox'} for item in results]
            evaluation = COCOeval(truth, truth.loadRes(results), kind)
            evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
        values[name] = 100 * evaluation.stats[0]
    return values, detections


def matched(ours, theirs):
    """Return the share of detections that have a partner among others: see the top of the file."""
    from pycocotools import mask as masks
    pairs, groups = 0, {}
    for i, side in enumerate((ours, theirs)):
        for item in sorted(side, key=lambda item: -item['score']):
            groups.setdefault((item['image_id'], item['category_id']), ([], []))[i].append(item['bbox'])
    for first, second in groups.values():
        overlaps = masks.iou(np.array(first), np.array(second), [0] * len(second)) if first and second else []
        for row in overlaps:
            best = int(row.argmax())
            if row[best] >= OVERLAP:
                pairs, overlaps[:, best] = pairs + 1, 0
    return pairs / max(len(ours), len(theirs), 1)


def mean_iou(answer, card, images, maps):
    """Mean intersection over union, points; 255 is ignored."""
    count = len(card['classes'])
    common, ours, theirs = np.zeros((3, count))
    paths = sorted(path for path in images.iterdir() if (maps / f'{path.stem}.png').is_file())
    if not paths:
        raise SystemExit(f'error: {maps} has no label map (.png) with the name of an image in {images}')
    for path in paths:
        answers, _ = answer(path)
        truth = np.array(Image.open(maps / f'{path.stem}.png'))
        if truth[truth != 255].max(initial=0) >= count:
            raise SystemExit(f'error: {maps / path.stem}.png has class {truth[truth != 255].max()}, and the model has '
                             f'{count}: give maps whose values are indices into its classes, 255 for none')
        found, truth = answers['label_map'][0][truth != 255], truth[truth != 255]
        common += np.bincount(truth[found == truth], minlength=count)[:count]
        ours += np.bincount(found, minlength=count)[:count]
        theirs += np.bincount(truth, minlength=count)[:count]
    union = ours + theirs - common
    return dict(miou=100 * float(np.mean(common[union > 0] / union[union > 0])))


def top_1(answer, card, images):
    """Share of images whose likeliest class is that of their folder, points.

    Folders have the names of the model's classes, or stand for them in alphabetical order.
    """
    folders = sorted(path for path in images.iterdir() if path.is_dir())
    if not folders:
        raise SystemExit(f'error: {images} has no folders: give one with a folder of images for each class')
    names = card['classes'] or []
    named = all(folder.name in names for folder in folders)
    hits = [int(answer(path)[0]['probabilities'][0].argmax()) == (names.index(folder.name) if named else number)
            for number, folder in enumerate(folders) for path in sorted(folder.iterdir())]
    return dict(top1=100 * float(np.mean(hits)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('model', type=Path, help='model.onnx, with model.json and predict.py beside it')
    parser.add_argument('--images', type=Path, required=True, metavar='FOLDER')
    parser.add_argument('--coco', type=Path, metavar='FILE', help='annotations as COCO has them')
    parser.add_argument('--maps', type=Path, metavar='FOLDER', help='label maps (.png)')
    parser.add_argument('--runtimes', nargs='+', default=['onnxruntime', 'openvino'])
    parser.add_argument('--expect', type=Path, metavar='FILE', help='metrics.json of the run')
    parser.add_argument('--json', type=Path, metavar='FILE')
    args = parser.parse_args()
    for path in filter(None, (args.model.with_name('predict.py'), args.images, args.coco, args.maps, args.expect)):
        if not path.exists():
            parser.error(f'{path} does not exist')
    script = script_of(args.model)
    card, found, failed, detections = script.read_card(args.model), {}, [], {}
    expected = json.loads(args.expect.read_text())['quantized'] if args.expect else {}
    for runtime in args.runtimes:
        run, started = script.runner(args.model, runtime, card), time.time()

        def answer(path, run=run):
            pixels = script.read_image(path, card)
            return run(pixels), pixels.shape[1:3]

        if args.coco:
            values, detections[runtime] = average_precision(answer, script, card, args.images, args.coco)
        elif args.maps:
            values = mean_iou(answer, card, args.images, args.maps)
        else:
            values = top_1(answer, card, args.images)
        for name, value in values.items():
            if args.expect and NAMES[name] not in expected:
                parser.error(f'{args.expect} has no {NAMES[name]} of the quantized model to compare with')
            aim = expected.get(NAMES[name])
            aim = None if aim is None else aim * (100 if name in ('box', 'mask') else 1)
            far = aim is not None and bool(abs(aim - value) > 0.1 + ROUNDED[name])
            failed += [name] if far else []
            print(f'{runtime} {name}: {value:.2f}' + (f', the library {aim:.2f}{"  TOO FAR" * far}' if aim else ''))
        found[runtime] = dict(values, seconds=round(time.time() - started, 1))
    if len(detections) == 2:
        found['matched'] = matched(*detections.values())
        print(f'{found["matched"]:.2%} of the detections have a partner in the other runtime')
    heavy = sorted({name.split('.')[0] for name in sys.modules} & set(ABSENT))
    if heavy:
        print(f'imported what a stranger does not have: {", ".join(heavy)}')
    if args.json:
        args.json.write_text(json.dumps(dict(found, expected=expected), indent=2) + '\n')
    return bool(failed or heavy)


if __name__ == '__main__':
    sys.exit(main())
