"""Latency of the exported int8 graph beside eager float, float graphs, and the int8 models of other people's tools.

    python benchmarks/int8_speed.py                                   # needs pip install 'psaq_mm[deploy]'
    python benchmarks/int8_speed.py --cases swin_t_fpn_512 --json FILE

All models take turns in one process; times are medians, ratios are to eager float. Weights are random and images noise:
latency does not depend on them. ONNX Runtime's own static quantization and, where nncf is installed, NNCF's are applied
to the same float graph. They calibrate on one image of noise: what they calibrate on decides how accurate a graph is,
not which kernels run. tradeoff.py measures accuracy, too, and gives them the synthetic images of the run.

Whole-detector and whole-segmentor rows (--predict) time mm*'s ``predict`` with the graph inside, and with graphs of the
quantized heads, too. --complete compares whole models as one graph each, from pixels to answers, with the library's own
test_step in eager float. It makes some classes likely, so that the second stage of a detector has as much to do as in a
trained one. The library's step pastes masks into the image, the graphs leave that to predict.py. Peak memory (--peak,
Linux) is what a process of its own needs beyond its imports to load a model and to run it three times.
"""
import argparse
import copy
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from runtimes import SESSIONS, by_others, peak_here, peak_of, take_turns

ROOT = Path(__file__).resolve().parents[1]
PREDICT = 'predict'
PRESET = ', preset onnxruntime'
LIKELY = 30.0  # how much more the classes of random weights are made to differ
CASES = {
    'swin_t_fpn_512': ('Mask R-CNN Swin-T + FPN, 512 x 512', 'mask_rcnn_swin_t_w8a8.py', (512, 512)),
    'swin_t_fpn_800': ('Mask R-CNN Swin-T + FPN, 800 x 1344', 'mask_rcnn_swin_t_w8a8.py', (800, 1344)),
    'upernet_swin_t': ('UperNet Swin-T, 512 x 512', 'upernet_swin_t_w8a8.py', (512, 512)),
    'deit_s': ('DeiT-S, 224 x 224', 'deit_s_w8a8.py', (224, 224)),
}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--cases', nargs='+', choices=CASES, default=list(CASES), metavar='CASE',
                        help=f'of {", ".join(CASES)}')
    parser.add_argument('--repeats', type=int, default=7)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--predict', action='store_true', help='also time predict of the whole model')
    parser.add_argument('--complete', action='store_true', help='only whole models, each as one graph')
    parser.add_argument('--dynamic', action='store_true', help='also our graph for every image size')
    parser.add_argument('--peak', action='store_true', help='also measure peak memory')
    parser.add_argument('--alone', action='store_true', help=argparse.SUPPRESS)  # what --peak starts
    parser.add_argument('--json', metavar='FILE')
    return parser.parse_args()


def float_model(path):
    """A float model with random weights, in evaluation mode."""
    import torch
    from mmengine.config import Config
    from mmengine.registry import MODELS

    from psaq_mm.engine.config import default_scope, without_pretrained
    cfg = Config.fromfile(ROOT / 'configs' / path)
    default_scope(cfg)
    torch.manual_seed(0)
    return MODELS.build(without_pretrained(cfg.model)).eval()


def alone(args):
    """Print the peak memory of eager float in this process, MB."""
    import torch

    from psaq_mm.deploy.graph import Features
    _, path, size = CASES[args.cases[0]]
    with torch.no_grad():
        if args.complete:
            model, images = float_model(path), pixels_of(size)
            print(peak_here(lambda: partial(library_step, model, data_of(model, images))))
        else:
            print(peak_here(lambda: partial(Features(float_model(path)).eval(), torch.randn(1, 3, *size))))


def peak_of_eager(case, args):
    """Return MB that eager float needs in a process of its own."""
    done = subprocess.run([sys.executable, __file__, '--cases', case, '--threads', str(args.threads), '--alone',
                           *['--complete'] * args.complete], check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def deployed(model, features, heads):
    """A copy of a model with graphs in place of backbone and neck, and of heads by name."""
    model = copy.deepcopy(model)
    model.extract_feat = features.forward  # shadows the method, which a module would not
    for name, graph in heads.items():
        model.get_submodule(name).forward = graph.__call__
    return model


def samples_for(model, image):
    """Data samples that the model's predict takes."""
    from psaq_mm.models.features import data_samples
    if hasattr(model, 'decode_head'):
        from mmseg.structures import SegDataSample as Sample
    else:
        from mmdet.structures import DetDataSample as Sample
    return [Sample(metainfo=sample.metainfo) for sample in data_samples(image)]


def contestants(path, size, folder, args):
    """All ways to compute one model: callables by name, and the files they need."""
    import torch

    from psaq_mm.classification import Classifier
    from psaq_mm.deploy import (
        ExportedFeatures,
        Form,
        Graph,
        HeadGraph,
        export_graph,
        export_head,
        head_inputs,
        head_names,
    )
    from psaq_mm.deploy.graph import Features
    from psaq_mm.models import extract_features, quantize_model
    from psaq_mm.quantization import calibrate
    model = float_model(path)
    plain_model = copy.deepcopy(model)
    classifier = isinstance(model, Classifier)
    features = Features(plain_model).eval()
    image = torch.randn(1, 3, *size)
    array = image.numpy()
    plain, own, for_ort = folder / 'float.onnx', folder / 'int8.onnx', folder / 'int8_preset.onnx'
    export_graph(model, plain, size, integers=False)
    heads = [name for name in ('head', 'rpn_head', 'roi_head', 'decode_head') if hasattr(model, name)]
    quantize_model(model, dict(targets=['backbone', *heads] if classifier else ['backbone', 'neck', *heads]))
    calibrate(model, lambda: extract_features(model, image, True))
    export_graph(model, own, size)
    export_graph(model, for_ort, size, form=Form('onnxruntime', images=(image, )))
    if args.dynamic and not classifier:
        export_graph(model, folder / 'any_size.onnx', size, dynamic=True)

    def ours(path, runtime):
        graph = Graph(path, runtime, args.threads)
        return lambda: graph.run(image)

    runs = {'eager float': (lambda: features(image), plain)}
    for kind, session in SESSIONS.items():
        runs[f'{kind} float'] = partial(session(plain, args.threads), array), plain
    for title, run, file in by_others(plain, [array], folder, args.threads):
        runs[title] = partial(run, array), file
    runs['ONNX Runtime int8, psaq_mm'] = ours(own, 'onnxruntime'), own
    runs[f'ONNX Runtime int8, psaq_mm{PRESET}'] = ours(for_ort, 'onnxruntime'), for_ort
    runs['OpenVINO int8, psaq_mm'] = ours(own, 'openvino'), own
    if args.dynamic and not classifier:
        runs['OpenVINO int8, psaq_mm, any size'] = ours(folder / 'any_size.onnx', 'openvino'), folder / 'any_size.onnx'
    if args.predict and not classifier:
        samples = samples_for(plain_model, image)
        backbone, graphs = ExportedFeatures(str(own), 'openvino', args.threads), {}
        for name, inputs in head_inputs(model, head_names(model), image).items():
            export_head(model, name, inputs, folder / f'{name}.onnx')
            graphs[name] = HeadGraph(str(folder / f'{name}.onnx'), 'openvino', args.threads)
        for title, contestant in (
                (f'{PREDICT}, eager float', plain_model),
                (f'{PREDICT}, OpenVINO int8, psaq_mm', deployed(plain_model, backbone, {})),
                (f'{PREDICT}, OpenVINO int8, psaq_mm, heads too', deployed(plain_model, backbone, graphs))):
            runs[title] = partial(contestant.predict, image, samples), None
    return runs, array


def complete_contestants(path, size, folder, args):
    """All ways to compute a whole model, from pixels to answers: callables by name, and the files they need."""
    import onnx
    from mmengine.config import Config

    from psaq_mm.classification import Classifier
    from psaq_mm.deploy import Form
    from psaq_mm.deploy.predictor import predictor_of
    from psaq_mm.deploy.whole import complete, write_graph
    from psaq_mm.engine.config import without_pretrained
    from psaq_mm.models import extract_features, quantize_model
    from psaq_mm.quantization import calibrate
    from psaq_mm.zoo.check import without_resizing
    cfg = Config.fromfile(ROOT / 'configs' / path)
    cfg.model = without_pretrained(cfg.model)
    cfg.test_dataloader.dataset.pipeline = without_resizing(cfg.test_dataloader.dataset.pipeline)
    model = float_model(path)
    if hasattr(model, 'roi_head'):
        model.roi_head.bbox_head.fc_cls.weight.mul_(LIKELY)
    plain_model, classifier = copy.deepcopy(model), isinstance(model, Classifier)
    images = pixels_of(size)
    array = images.numpy()
    normalised = predictor_of(model, cfg).pixels(images)[0]
    heads = [name for name in ('head', 'rpn_head', 'roi_head', 'decode_head') if hasattr(model, name)]
    parts = ['backbone', *heads] if classifier else ['backbone', 'neck']
    data, files = data_of(plain_model, images), {}
    for name, targets in (('ours', parts), ) + (('heads too', parts + heads), ) * (not classifier):
        quantized = copy.deepcopy(plain_model)
        quantize_model(quantized, dict(targets=targets))
        calibrate(quantized, partial(library_step, quantized, data) if targets != parts else partial(
            extract_features, quantized, normalised, True))
        predictor = predictor_of(quantized, cfg).eval()
        forms = {'float': Form(), 'int8': Form(), PRESET: Form('onnxruntime', images=(images, ))}
        for kind, form in list(forms.items())[bool(files):]:
            key = kind if kind == 'float' else name + (kind if kind == PRESET else '')
            files[key] = file = folder / f'{key.replace(" ", "_")}.onnx'
            write_graph(predictor, file, images, False, form, kind != 'float')
            if kind == 'float':  # for others' quantizers: with the names that torch gave
                model = onnx.load(file)
                del model.graph.output[len(predictor.names):]
                onnx.save(model, folder / 'source.onnx')
            complete(file, predictor, form)
    runs = {'eager float': (partial(library_step, plain_model, data), files['float'])}
    for kind, session in SESSIONS.items():
        runs[f'{kind} float'] = partial(session(files['float'], args.threads), array), files['float']
    for title, run, file in by_others(folder / 'source.onnx', [array], folder, args.threads):
        runs[title] = partial(run, array), file
    for name in [name for name in files if name != 'float']:
        for kind, session in SESSIONS.items():
            if kind == 'ONNX Runtime' or PRESET not in name:
                title = f'{kind} int8, psaq_mm, {name}'.replace(', ours', '')
                runs[title] = partial(session(files[name], args.threads), array), files[name]
    counts = [value.shape for value in SESSIONS['OpenVINO'](files['float'], args.threads)(array)]
    print(f'answers of the float graph: {[tuple(shape) for shape in counts]}')
    return runs, array


def pixels_of(size):
    """Return noise as an image that a complete graph takes, (1, H, W, 3) uint8."""
    import torch
    return torch.randint(0, 256, (1, *size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def library_step(model, data):
    """Return what the library computes for an image."""
    from psaq_mm.classification import Classifier
    if isinstance(model, Classifier):
        return model.logits(model.data_preprocessor(data)['inputs']).softmax(-1)
    return model.test_step(data)


def data_of(model, images):
    """Images (1, H, W, 3) as an evaluation hands them to ``test_step``."""
    image = images[0].permute(2, 0, 1).flip(0).contiguous()  # BGR, as they are read
    return dict(inputs=[image], data_samples=samples_for(model, image[None]))


def main():
    args = parse_args()
    import logging
    import warnings
    warnings.simplefilter('ignore')
    logging.disable(logging.WARNING)
    import torch
    from rich.console import Console
    from rich.table import Table

    from psaq_mm.engine import write_json
    torch.set_num_threads(args.threads)
    if args.alone:
        return alone(args)
    results = {}
    for case in args.cases:
        title, path, size = CASES[case]
        columns = ['', 'seconds', 'speed-up', 'size, MB', *['peak, MB'] * args.peak]
        table = Table(*columns, title=f'{title}, {args.threads} threads')
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            make = complete_contestants if args.complete else contestants
            runs, array = make(path, size, Path(folder), args)
            times = take_turns({name: run for name, (run, _) in runs.items()}, args.repeats)
            for name, seconds in times.items():
                base = times[f'{PREDICT}, eager float' if name.startswith(PREDICT) else 'eager float']
                size_mb = runs[name][1] and runs[name][1].stat().st_size / 1e6
                found = dict(seconds=seconds, speedup=base / seconds, size_mb=size_mb)
                results.setdefault(case, {})[name] = found
                if args.peak and size_mb:
                    found['peak_mb'] = peak_of_eager(case, args) if name == 'eager float' else peak_of(
                        name, runs[name][1], array, args.threads)
                table.add_row(name, f'{seconds:.3f}', f'{base / seconds:.2f}', f'{size_mb:.1f}' if size_mb else '',
                              *[str(found.get('peak_mb', ''))] * args.peak)
        Console(width=120).print(table)
    if args.json:
        write_json(results, args.json)
    return 0


if __name__ == '__main__':
    sys.exit(main())
