"""Runs the model beside this file on images: python predict.py model.onnx street.jpg [more.jpg ...] [--out street.png]
Needs NumPy, Pillow, and onnxruntime or openvino. model.json says what goes in, what comes out and what it means."""
import argparse
import contextlib
import hashlib
import importlib.util
import json
import sys
from pathlib import Path


@contextlib.contextmanager
def told(what):
    try:
        yield
    except Exception as error:
        sys.exit(f'{what} ({" ".join(str(error).split())[:200] or type(error).__name__})')


def package(name):
    with told(f'{name} cannot be imported: pip install {"Pillow" if name.startswith("PIL") else name}'):
        return importlib.import_module(name)


def read_card(model):
    with told(f'{model} cannot be taken: give the .onnx file, with its model.json in the same folder'):
        card, content = json.loads(model.with_name('model.json').read_text(encoding='utf-8')), model.read_bytes()
        assert hashlib.sha256(content).hexdigest() == card['sha256'], 'they differ: copy both from the same export'
        return card


def runner(model, name, right):
    """A function from an array to a dict of arrays."""
    name = name or next((known for known in right if importlib.util.find_spec(known)), right[0])
    if name not in right:
        sys.exit(f'{name} was not found to compute this graph rightly: take {" or ".join(right)}')
    module = package(name)
    with told(f'{name} {module.__version__} cannot load {model}, is it too old?'):
        if name == 'openvino':
            network = module.Core().compile_model(str(model), 'CPU', dict(INFERENCE_PRECISION_HINT='f32'))
            return lambda images: {key.any_name: value for key, value in network(dict(images=images)).items()}
        module.set_default_logger_severity(4)  # its errors come as exceptions
        session = module.InferenceSession(model.read_bytes(), providers=['CPUExecutionProvider'])
        return lambda images: dict(zip([o.name for o in session.get_outputs()], session.run(None, dict(images=images))))


def read_image(path, card):
    """(1, H, W, C) in 0..255, as an evaluation reads it."""
    _, height, width, channels = card['input']['shape']
    with told(f'{path} cannot be read as an image'):
        image = (ImageOps.exif_transpose if card['upright'] else Image.Image.copy)(Image.open(path))
        assert image.mode != 'F' and (image.mode != 'I' or np.max(image) < 2**16), 'convert its 32 bits to 8 first'
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)) if image.mode.startswith('I') else image
        pixels = np.array(image.convert({1: 'L', 3: 'RGB'}.get(channels))).reshape(1, image.height, image.width, -1)
    if pixels.shape[3] != channels or isinstance(height, int) and pixels.shape[1:3] != (height, width):
        sys.exit(f'{path} has {pixels.shape[3]} channels of {image.width} x {image.height}: the model takes '
                 f'{channels} of {width} x {height} only, convert the image first')
    return pixels


def paste(mask, box, size, card):
    """Where an object is, (H, W): mask_meaning in model.json says how."""
    if card['mask_form'] == 'image':
        return mask >= card['mask_threshold']
    found, values, area = np.zeros(size, bool), np.pad(mask, 1), []
    for low, high, side, count in zip(box[1::-1], box[:1:-1], size, mask.shape):
        area.append(slice(*np.clip((int(low) - 1, int(high) + 2), 0, side)))
        centres = np.arange(area[-1].start, area[-1].stop) + 0.5
        places = ((centres - low) / max(high - low, 1e-6) * count + 0.5).clip(0, count + 1)
        first = np.minimum(places.astype(int), count)
        share = (places - first)[:, None]
        values = (values[first] * (1 - share) + values[first + 1] * share).T  # the columns come next
    found[tuple(area)] = values >= card['mask_threshold']
    return found


def named(card, index):
    """A class for JSON, and its colour."""
    names, colours = [*(card['classes'] or ()), *['nothing'] * ('panoptic' in card['kind'])], card['palette']
    name = names[index] if index < len(names) else f'class {index}'
    return dict(category_id=int(index), category=name), tuple(colours[index % len(colours)])


def understand(answers, pixels, card, score):
    """What the answers say, for JSON; the same in words; and as a picture."""
    answers = {name: value[0] for name, value in answers.items()}
    found, words = dict(objects=[]) if 'boxes' in answers else {}, []
    canvas = np.repeat(pixels[0], 3, 2) if pixels.shape[3] == 1 else pixels[0, :, :, :3].copy()
    areas = answers.get('label_map', answers.get('panoptic_map'))  # a panoptic map counts instances in thousands
    if areas is not None:
        kinds = areas % 1000 if 'panoptic_map' in answers else areas
        found['areas'] = [dict(named(card, i)[0], share=float((kinds == i).mean())) for i in np.unique(kinds)]
        words += ['{category}: {share:.1%} of the pixels'.format(**item) for item in found['areas']]
        canvas[:] = canvas * 0.5 + np.array([named(card, i)[1] for i in range(kinds.max() + 1)])[kinds] * 0.5
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('model', type=Path, help='the .onnx file, with model.json beside it')
    parser.add_argument('images', nargs='+', type=Path)
    parser.add_argument('--out', type=Path, help='a picture of the answers; of several images, names are added')
    parser.add_argument('--json', type=Path, help='the answers; bbox is x, y, width, height, as COCO has it')
    parser.add_argument('--runtime', choices=('onnxruntime', 'openvino'), help='default: one that is right')
    parser.add_argument('--score', type=float, default=0.3, help='leave out objects below; default 0.3')
    args = parser.parse_args()
    with told('--out and --json want a folder that is there, and --out an ending such as .png'):
        [target.parent.resolve(strict=True) for target in (args.out, args.json) if target]
        args.out and Image.registered_extensions()[args.out.suffix.lower()]
    card, results, stems = read_card(args.model), [], [path.stem for path in args.images]
    run = runner(args.model, args.runtime, card['runtimes'])
    for number, path in enumerate(args.images):
        pixels = read_image(path, card)
        with told(f'{path} cannot be computed, has it a size that the model does not take?'):
            answers = run(pixels)
        found, words, picture = understand(answers, pixels, card, args.score)
        results.append(dict(file=str(path), height=pixels.shape[1], width=pixels.shape[2], **found))
        print(path, *words, sep='\n  ')
        if args.out:
            own = f'_{path.stem}' * (len(stems) > 1) + f'_{number}' * (stems.count(path.stem) > 1)
            picture.save(args.out.with_stem(args.out.stem + own))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + '\n', encoding='utf-8')


np, Image, ImageDraw, ImageOps = map(package, ('numpy', 'PIL.Image', 'PIL.ImageDraw', 'PIL.ImageOps'))
if __name__ == '__main__':
    main()
