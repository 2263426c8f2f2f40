"""Runs the model beside this file on images: python predict.py model.onnx street.jpg [more.jpg ...] [--out street.png]

Needs session.py, NumPy, Pillow, and onnxruntime or openvino. model.json says what goes in and what comes out.
"""
import argparse
import colorsys
import hashlib
import json
import os
import sys
from pathlib import Path

try:
    import numpy as np
    from PIL import Image, ImageDraw, ImageOps
    from session import ending, runner  # beside this file
except ImportError as error:
    sys.exit(f'{error}: pip install Pillow numpy, and copy session.py from where predict.py comes from')


def read_card(model):
    with ending(f'{model} cannot be read', 'give the .onnx file of an export, with its model.json in the same folder'):
        card = json.loads(model.with_name('model.json').read_text(encoding='utf-8'))
        digest, right = hashlib.sha256(model.read_bytes()).hexdigest(), card['sha256']
    if digest != right:
        sys.exit(f'{model} is not the file that its model.json describes: copy both from the same export')
    return card


def read_image(path, card):
    """(1, H, W, C) in 0..255, as an evaluation reads it."""
    (_, height, width, channels), order = card['input']['shape'], card['input']['channels'] or ''
    with ending(f'{path} cannot be read as an image', 'convert or reduce it first'):
        image = Image.open(path)
        if image.mode == 'F' or image.mode == 'I' and image.format not in ('PNG', 'PPM'):
            raise ValueError('its numbers have 32 bits')
        image = ImageOps.exif_transpose(image) if card['upright'] else image
        if image.mode.startswith('I'):  # 16 bits
            if card['unchanged']:
                raise ValueError('its numbers have 16 bits, an evaluation would leave them')
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        image = image.convert(order) if order in ('L', 'RGB') else image
        pixels = np.array(image).reshape(1, image.height, image.width, -1)
    if set(image.mode) != set(order) or isinstance(height, int) and image.size != (width, height):
        sys.exit(f'{path} has {image.width} x {image.height} pixels in {image.mode}, the model takes {width} x '
                 f'{height} in {order or f"{channels} channels"} only: convert the image first')
    if min(image.size) < card['sizes']['at_least']:
        sys.exit(f"{path} has {image.width} x {image.height} pixels, the model was measured with sides of "
                 f"{card['sizes']['at_least']} and more only: enlarge or pad the image first")
    return pixels[..., [image.mode.index(channel) for channel in order]]


def paste(mask, box, size, card):
    """Where an object is, (H, W): mask_meaning in model.json says how."""
    if card['mask_form'] == 'image':
        return mask >= card['mask_threshold']
    found, area, shares = np.zeros(size, bool), [], []
    for low, high, side, count in zip(box[1::-1], box[:1:-1], size, mask.shape):
        area.append(slice(*np.clip((int(low) - 1, int(high) + 2), 0, side)))
        places = (np.arange(side)[area[-1]] + 0.5 - low) / max(high - low, 1e-6) * count - 0.5
        shares.append((1 - abs(places[:, None] - np.arange(count))).clip(0))  # of each value, linear between two
    found[tuple(area)] = shares[0] @ mask @ shares[1].T >= card['mask_threshold']
    return found


def named(card, index):
    """A class for JSON, and its colour."""
    index, names, colours = int(index), card['classes'] or (), card['palette'] or ()
    name = names[index] if index < len(names) else 'nothing' if index == card.get('nothing') else f'class {index}'
    own = [255 * part for part in colorsys.hsv_to_rgb(index * 0.618 % 1, 0.8, 0.9)]
    return dict(category_id=index, category=name), tuple(map(int, colours[index] if index < len(colours) else own))


def understand(answers, pixels, card, score):
    """What the answers say, for JSON; the same in words; and as a picture."""
    answers = {name: value[0] for name, value in answers.items()}
    found, words = dict(objects=[]) if 'boxes' in answers else {}, []
    canvas = pixels[0][..., [card['input']['channels'].find(channel) for channel in 'RGB']]  # or thrice grey
    areas = answers.get('label_map', answers.get('panoptic_map'))  # a panoptic map counts instances in thousands
    if areas is not None:
        kinds = areas % 1000 if 'panoptic_map' in answers else areas
        found['areas'] = [dict(named(card, i)[0], share=float((kinds == i).mean())) for i in np.unique(kinds)]
        words += ['{category}: {share:.1%} of the pixels'.format(**item) for item in found['areas']]
        for i in np.unique(kinds):
            canvas[kinds == i] = canvas[kinds == i] * 0.5 + np.array(named(card, i)[1]) * 0.5
    if 'depth' in answers:
        near, far = found['depth'] = [float(answers['depth'].min()), float(answers['depth'].max())]
        words.append(f'{near:.2f} to {far:.2f} m away')
        canvas[:] = (255 * answers['depth'] / max(far, 1e-6))[..., None]
    chosen = np.flatnonzero((answers['scores'] >= score) & (answers['labels'] >= 0)) if 'boxes' in answers else ()
    for i in chosen if 'masks' in answers else ():
        inside = paste(answers['masks'][i].astype(np.float32), answers['boxes'][i].tolist(), pixels.shape[1:3], card)
        canvas[inside] = canvas[inside] * 0.5 + np.array(named(card, answers['labels'][i])[1]) * 0.5
    draw = ImageDraw.Draw(picture := Image.fromarray(canvas))
    if 'probabilities' in answers:
        found['classes'] = [dict(named(card, i)[0], score=float(answers['probabilities'][i]))
                            for i in np.argsort(-answers['probabilities'])[:5]]
        words += ['{category}: {score:.3f}'.format(**item) for item in found['classes']]
        draw.text((4, 4), '\n'.join(words), fill=(255, 255, 0))
    for i in chosen:
        (x1, y1, x2, y2), (item, colour) = answers['boxes'][i].tolist(), named(card, answers['labels'][i])
        item.update(score=float(answers['scores'][i]), bbox=[x1, y1, x2 - x1, y2 - y1])
        found['objects'].append(item)
        words.append('{category} {score:.2f}, x {:.0f}, y {:.0f}, {:.0f} x {:.0f}'.format(*item['bbox'], **item))
        draw.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=colour, width=2)
        draw.text((x1 + 3, y1 + 1), '{category} {score:.2f}'.format(**item), fill=(255, 255, 255))
    return found, words or [f'nothing with a score of {score} or more'], picture


def check_targets(out, answers):
    for path in filter(None, (out, answers)):
        if not os.access(path if path.exists() else path.parent, os.W_OK) or path.is_dir():
            sys.exit(f'{path} cannot be written: name a file in a folder that exists')
    if out and Image.registered_extensions().get(out.suffix.lower()) not in Image.SAVE:
        sys.exit(f'{out} is no picture that Pillow writes: let its name end in .png or .jpg')


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('model', type=Path, help='the .onnx file, with model.json beside it')
    parser.add_argument('images', nargs='*', type=Path)
    parser.add_argument('--out', type=Path, help='a picture of the answers; of several images, names are added')
    parser.add_argument('--json', type=Path, help='the answers; bbox is x, y, width, height, as COCO has it')
    parser.add_argument('--runtime', choices=('onnxruntime', 'openvino'), help='default: one that is right')
    parser.add_argument('--score', type=float, default=0.3, help='leave out objects below; default 0.3')
    parser.add_argument('--check', action='store_true', help='hold the runtime against the check in model.json')
    args = parser.parse_args()
    if not args.images and not args.check:
        parser.error('give an image, or --check')
    check_targets(args.out, args.json)
    card, results = read_card(args.model), []
    run, stems = runner(args.model, args.runtime, card, args.check), [f'_{path.stem}' for path in args.images]
    if len(set(stems)) < len(stems):  # of images in several folders
        stems = [f'_{i}{stem}' for i, stem in enumerate(stems, 1)]
    for path, stem in zip(args.images, stems):
        pixels = read_image(path, card)
        with ending(f'{path} could not be computed', "give one of a size that model.json has under 'measured'"):
            found, words, picture = understand(run(pixels), pixels, card, args.score)
        results.append(dict(file=str(path), height=pixels.shape[1], width=pixels.shape[2], **found))
        print(path, *words, sep='\n  ')
        with ending(f'the answers to {path} cannot be written', 'make room for them, or name other files'):
            if args.out:
                picture.save(args.out.with_stem(args.out.stem + stem) if len(stems) > 1 else args.out)
            if args.json:  # again after each image, so that one that fails costs no answers
                args.json.write_text(json.dumps(results, indent=2) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
