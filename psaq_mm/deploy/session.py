"""Loads the graph beside this file in ONNX Runtime or OpenVINO, and checks it; for predict.py and for services."""
import base64
import importlib.util
import io
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np

EXTENSIONS = 'amx', 'asimd', 'avx', 'bf16', 'dot', 'fma', 'i8mm', 'neon', 'sme', 'sse', 'sve'  # of processors
OVERLAP, MASK_OVERLAP, SCORE = 0.8, 0.7, 0.05  # of two objects that are the same: at least, at least, at most apart


@contextmanager
def ending(problem, remedy):
    """Within it, an error ends the process with one line."""
    try:
        yield
    except Exception as error:  # runtimes and Pillow raise many kinds
        sys.exit(f'{problem} ({" ".join(str(error).split())[:200] or type(error).__name__}): {remedy}')


def host(module):
    """What decides how a runtime computes here: its version, and what the processor can do."""
    info = Path('/proc/cpuinfo')
    words = info.read_text().split() if info.exists() else [sys.platform]
    flags = sorted({word for word in words if word.startswith(EXTENSIONS)})
    return ' '.join([module.__name__, module.__version__, *flags, os.environ.get('ONEDNN_MAX_CPU_ISA', '')]).strip()


def runner(model, name, card, check=False):
    """A function from an array to a dict of arrays, checked where the export did not measure it, or if that is wanted.

    Args:
        model (Path): The graph.
        name (str, optional): Of the runtime. Default: the first right one that is installed.
        card (dict): What model.json says.
        check (bool): Whether to check it anyway, and to say so.
    """
    right, known = card['runtimes'], card['check']
    name = name or next((known for known in right if importlib.util.find_spec(known)), right[0])
    if name not in right:
        sys.exit(f'{name} was not found to compute this graph rightly: take {" or ".join(right)}')
    with ending(f'{name} cannot be imported', f'pip install {name}'):
        module = importlib.import_module(name)
    title = f'{name} {module.__version__}'
    with ending(f'{title} cannot load {model}', f'pip install --upgrade {name}'):
        if name == 'onnxruntime':
            options = module.SessionOptions()
            options.log_severity_level = 4  # errors are raised, so that nobody needs to print them as well
            session = module.InferenceSession(model.read_bytes(), options, providers=['CPUExecutionProvider'])
            names = [output.name for output in session.get_outputs()]
            run = lambda images: dict(zip(names, session.run(None, dict(images=images))))
        else:
            network = module.Core().compile_model(str(model), 'CPU', dict(INFERENCE_PRECISION_HINT='f32'))
            run = lambda images: {key.any_name: value for key, value in network(dict(images=images)).items()}
    if check and not known:
        sys.exit(f'{model} cannot be checked: its model.json holds no check, the export says why')
    if known and (check or known['measured'].get(name, {}).get('host') != host(module)):
        other = ''.join(f', or --runtime {other}' for other in right if other != name)
        with ending(f'{title} cannot compute the check of {model}', f'take another version{other}'):
            aims, images = unpacked(known)
            found = agreement(aims, run(images), card)
        if not found >= known['at_least']:
            sys.exit(f'{title} computes {model} wrongly on this machine: its answers to the check agree with those of '
                     f'the export by {found:.2f}, and must by {known["at_least"]:.2f}. Take another version{other}')
        if check:
            print(f'{title} computes {model} rightly on this machine: its answers to the check agree with those of the '
                  f'export by {found:.2f}, and must by {known["at_least"]:.2f}')
    return run


def nearest(array, size):
    """An array (h, w, ...) in another size, by repeating or leaving out rows and columns."""
    rows, columns = (np.arange(new) * old // new for new, old in zip(size, array.shape))
    return array[rows][:, columns]


def unpacked(check):
    """The answers of a check by name, without the axis of images, and the image (1, H, W, C) that they are to."""
    arrays = dict(np.load(io.BytesIO(base64.b64decode(check['content']))))
    return arrays, nearest(arrays.pop('image'), check['size'])[None]


def agreement(aims, answers, card):
    """How far answers to one image are those of a check, 0 to 1, by the worst: objects, maps, numbers.

    Each object of the check counts by its score if it has a counterpart of its class, nearly its score, box and mask.
    Of maps the share of pixels counts. Probabilities and depths: 1 minus the sum of all differences in the sum of all.
    """
    found, parts = {name: value[0] for name, value in answers.items()}, []
    for name, aim in aims.items():
        if name in ('label_map', 'panoptic_map'):  # instances have any number, in thousands
            value, modulus = nearest(found[name], aim.shape), 1000 if name == 'panoptic_map' else 2**31
            parts.append((value % modulus == aim % modulus).mean())
        elif name in ('probabilities', 'depth'):
            value = nearest(found[name], aim.shape) if aim.ndim > 1 else found[name]
            parts.append(1 - np.abs(value - aim).sum() / np.abs(aim).sum())
    if 'boxes' in aims:
        parts.append(matched(aims, found, card))
    return max(float(np.min(parts)), 0.0)


def matched(aims, found, card):
    """The share of objects, weighed by scores, that have a counterpart; each one serves once."""
    a, b = aims['boxes'][:, None], found['boxes'][None]
    common = (np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])).clip(0).prod(2)
    areas = [(box[..., 2:] - box[..., :2]).clip(0).prod(2) for box in (a, b)]
    near = common / np.maximum(areas[0] + areas[1] - common, 1e-9)
    near[aims['labels'][:, None] != found['labels']] = 0
    near[np.abs(aims['scores'][:, None] - found['scores']) > SCORE] = 0
    total = 0.0
    for i in np.argsort(-aims['scores']) if len(found['scores']) else ():
        j = near[i].argmax()
        same = near[i, j] >= OVERLAP
        if same and 'masks' in aims:
            mask, aim = nearest(found['masks'][j], aims['masks'][i].shape) >= card['mask_threshold'], aims['masks'][i]
            same = (mask & aim).sum() >= MASK_OVERLAP * (mask | aim).sum()
        if same:
            total += aims['scores'][i]
            near[:, j] = 0
    return total / aims['scores'].sum()
