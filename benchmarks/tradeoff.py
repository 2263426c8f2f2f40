"""Latency, accuracy, file size and peak memory of delivered graphs, beside float and other people's int8 models.

    python tools/grid.py CONFIG --work-dir work_dirs/NAME --bits W8A8 W4A8 W4A4 --methods psaq_v2
    for run in work_dirs/NAME/W*; do python tools/export.py $run; done
    python benchmarks/tradeoff.py work_dirs/NAME/W* --config CONFIG --images val/ --coco val.json --out work_dirs/NAME

Accuracy is counted as strangers.py counts it, on images and annotations of the same kinds. The other
quantizers quantize the float graph, on the synthetic images of the first run. All graphs take turns in one process, on
the first image; times are medians. Writes tradeoff.md, tradeoff.json and a figure, tradeoff.png.
"""
import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path

import strangers
from runtimes import SESSIONS, by_others, peak_of, take_turns

NAMES = dict(box='box AP', mask='mask AP', miou='mIoU', top1='top-1')
ENDINGS = '.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp'
COLOURS = {'ONNX Runtime': '#c2571a', 'OpenVINO': '#1f6fb4'}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('runs', nargs='+', type=Path, metavar='RUN', help='work dir of a run, exported')
    parser.add_argument('--config', required=True, help='that the runs were made with; for the float model')
    parser.add_argument('--images', type=Path, required=True, metavar='FOLDER')
    parser.add_argument('--coco', type=Path, metavar='FILE', help='annotations as COCO has them')
    parser.add_argument('--maps', type=Path, metavar='FOLDER', help='label maps (.png)')
    parser.add_argument('--title', default='')
    parser.add_argument('--repeats', type=int, default=7)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--out', type=Path, required=True, metavar='FOLDER')
    args = parser.parse_args()
    for run in args.runs:
        for name in ('metrics.json', 'quantized.pth', 'int8/model.onnx'):
            if not (run / name).is_file():
                parser.error(f'{run / name} does not exist: give work dirs that tools/export.py has exported')
    return args


def float_graph(config, run, folder):
    """Write the graph of the float model that runs began with: as torch wrote it, and made small.

    Args:
        config (str): With a stanza, as tools/dfq.py takes it.
        run (Path): A run, for its synthetic images.
        folder (Path): Where to.

    Returns:
        tuple: Both files, names of the answers, and the images as the graph takes them.
    """
    import onnx
    from mmengine.config import Config

    from psaq_mm.deploy.export import synthetic_images
    from psaq_mm.deploy.graph import Form
    from psaq_mm.deploy.parts import resized
    from psaq_mm.deploy.predictor import predictor_of
    from psaq_mm.deploy.whole import complete, in_pixels, write_graph
    from psaq_mm.engine.pipeline import build_float, check
    from psaq_mm.models import image_channels
    cfg = Config.fromfile(config)
    content = check(cfg, evaluated=False)[1]
    model = build_float(cfg)
    model.load_state_dict(content['state_dict'], strict=False)
    predictor = predictor_of(model.eval(), cfg).eval()
    shape = json.loads((run / 'int8' / 'model.json').read_text())['input']['shape']
    dynamic = not isinstance(shape[1], int)
    images = synthetic_images(run, image_channels(model))
    images = [in_pixels(predictor, image if dynamic else resized(image, shape[1:3])) for image in images]
    source, small = folder / 'source.onnx', folder / 'float.onnx'
    write_graph(predictor, source, images[0], dynamic, Form(), False)
    small.write_bytes(source.read_bytes())
    graph = onnx.load(source)
    del graph.graph.output[len(predictor.names):]
    onnx.save(graph, source)
    complete(small, predictor)
    return source, small, list(predictor.names), [image.numpy() for image in images]


def label_of(run):
    """Return the bit-width of a run, 'W4A8'."""
    bits = json.loads((run / 'metrics.json').read_text())['bits']
    return f"W{bits['weight']}A{bits['activation']}"


def accuracy_of(run, names, script, card, args):
    """Return accuracy by name, points."""
    def answer(path):
        pixels = script.read_image(path, card)
        return dict(zip(names, run(pixels))), pixels.shape[1:3]

    if args.coco:
        return strangers.average_precision(answer, script, card, args.images, args.coco)
    if args.maps:
        return strangers.mean_iou(answer, card, args.images, args.maps)
    return strangers.top_1(answer, card, args.images)


def draw(results, title, path):
    """Draw milliseconds against the first accuracy."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(7.5, 4.5))
    metric = next(name for name in NAMES if name in next(iter(results.values())))
    for name, found in results.items():
        runtime = next(runtime for runtime in SESSIONS if name.startswith(runtime))
        own, plain = 'psaq_mm' in name, name.endswith('float')
        place = found['seconds'] * 1e3, found[metric]
        axes.scatter(*place, s=60, marker='o' if plain else 's' if own else '^', color=COLOURS[runtime],
                     facecolors='none' if plain else None, zorder=3)
        text = name.split(', ')[-1] if own else 'float' if plain else 'NNCF' if 'NNCF' in name else 'its own int8'
        axes.annotate(text, place, xytext=(6, 5), textcoords='offset points', fontsize=8)
    for runtime, colour in COLOURS.items():
        axes.scatter([], [], marker='s', color=colour, label=f'psaq_mm, {runtime}')
    for marker, text in (('o', 'float'), ('^', 'other quantizers, on the same synthetic images')):
        axes.scatter([], [], marker=marker, color='grey', label=text)
    axes.set(xscale='log', xlabel='milliseconds an image, from pixels to answers', ylabel=NAMES[metric], title=title)
    axes.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter('%g'))
    axes.xaxis.set_minor_formatter(matplotlib.ticker.FormatStrFormatter('%g'))
    axes.tick_params(axis='x', which='both', labelsize=8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main():
    args = parse_args()
    import logging
    import warnings
    warnings.simplefilter('ignore')
    logging.disable(logging.WARNING)
    from psaq_mm.engine import markdown, write_json
    args.out.mkdir(parents=True, exist_ok=True)
    first = args.runs[0] / 'int8' / 'model.onnx'
    script = strangers.script_of(first)
    card, results = script.read_card(first), {}
    with tempfile.TemporaryDirectory() as folder:
        source, plain, names, images = float_graph(args.config, args.runs[0], Path(folder))
        runs = {f'{runtime} float': (session(plain, args.threads), plain) for runtime, session in SESSIONS.items()}
        runs.update({title: (run, file) for title, run, file in by_others(source, images, Path(folder), args.threads)})
        for run in args.runs:
            file = run / 'int8' / 'model.onnx'
            for runtime, session in SESSIONS.items():
                if runtime.replace(' ', '').lower() in script.read_card(file)['runtimes']:
                    runs[f'{runtime}, psaq_mm, {label_of(run)}'] = session(file, args.threads), file
        example = script.read_image(next(path for path in sorted(args.images.rglob('*'))
                                         if path.suffix.lower() in ENDINGS), card)
        times = take_turns({name: partial(run, example) for name, (run, _) in runs.items()}, args.repeats)
        for name, (run, file) in runs.items():
            results[name] = dict(
                seconds=times[name], ratio=times[name] / times['OpenVINO float'], size_mb=file.stat().st_size / 1e6,
                peak_mb=peak_of(name, file, example, args.threads), **accuracy_of(run, names, script, card, args))
            print(name, {key: round(value, 3) for key, value in results[name].items()}, flush=True)
    metrics = [name for name in NAMES if name in next(iter(results.values()))]
    rows = [[name, *(f'{found[key]:.1f}' for key in metrics), f"{found['seconds'] * 1e3:.1f}", f"{found['ratio']:.2f}",
             f"{found['size_mb']:.1f}", str(found['peak_mb'])] for name, found in results.items()]
    (args.out / 'tradeoff.md').write_text(markdown(
        [args.title, *(NAMES[name] for name in metrics), 'ms', 'time / OpenVINO float', 'file, MB', 'peak, MB'], rows))
    write_json(results, args.out / 'tradeoff.json')
    draw(results, args.title, args.out / 'tradeoff.png')
    return 0


if __name__ == '__main__':
    sys.exit(main())
