"""Latency of the exported int8 graph beside eager float, float graphs, and the int8 models of other people's tools.

    python benchmarks/int8_speed.py                                   # needs pip install 'psaq_mm[deploy]'
    python benchmarks/int8_speed.py --cases swin_t_fpn_512 --json FILE

All models take turns in one process; times are medians, ratios are to eager float. Weights are random and images noise:
latency does not depend on them. ONNX Runtime's own static quantization and, where nncf is installed, NNCF's are applied
to the same float graph. Whole-detector and whole-segmentor rows time mm*'s ``predict`` with the graph inside.
"""
import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
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
    parser.add_argument('--dynamic', action='store_true', help='also our graph for every image size')
    parser.add_argument('--json', metavar='FILE')
    return parser.parse_args()


def ort_static(source, target, images):
    """ONNX Runtime's own quantization of a float graph."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        rest = iter([{'images': image} for image in images])

        def get_next(self):
            return next(self.rest, None)

    prepared = target.with_suffix('.prepared.onnx')
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    quantize_static(str(prepared), str(target), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
                    activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)


def nncf_static(source, images):
    """NNCF's quantization of a float graph, compiled; None where nncf is not installed."""
    try:
        import nncf
    except ImportError:
        return None
    import openvino
    return nncf.quantize(openvino.Core().read_model(str(source)), nncf.Dataset([{'images': i} for i in images]),
                         model_type=nncf.ModelType.TRANSFORMER, preset=nncf.QuantizationPreset.MIXED)


def take_turns(runs, repeats):
    """Median seconds of each callable."""
    times = {name: [] for name in runs}
    for turn in range(repeats + 1):  # the first warms up
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if turn:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(taken) for name, taken in times.items()}


def main():
    args = parse_args()
    import logging
    import warnings
    warnings.simplefilter('ignore')
    logging.disable(logging.WARNING)
    import openvino
    import torch
    from mmengine.config import Config
    from mmengine.registry import MODELS
    from rich.console import Console
    from rich.table import Table

    from psaq_mm.classification import Classifier
    from psaq_mm.deploy import ExportedFeatures, Graph, export_graph
    from psaq_mm.deploy.graph import Features
    from psaq_mm.engine import write_json
    from psaq_mm.engine.config import default_scope, without_pretrained
    from psaq_mm.models import extract_features, quantize_model
    from psaq_mm.models.features import data_samples
    from psaq_mm.quantization import Mode, calibrate, set_mode
    torch.set_num_threads(args.threads)
    options = {'INFERENCE_PRECISION_HINT': 'f32', 'PERFORMANCE_HINT': 'LATENCY', 'INFERENCE_NUM_THREADS': args.threads}
    results = {}
    for case in args.cases:
        title, path, size = CASES[case]
        cfg = Config.fromfile(ROOT / 'configs' / path)
        default_scope(cfg)
        torch.manual_seed(0)
        model = MODELS.build(without_pretrained(cfg.model)).eval()
        classifier = isinstance(model, Classifier)
        features = Features(model).eval()
        image = torch.randn(1, 3, *size)
        array = image.numpy()
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            folder = Path(folder)
            plain, own, theirs = folder / 'float.onnx', folder / 'int8.onnx', folder / 'ort_int8.onnx'
            export_graph(model, plain, size, integers=False)
            stanza = dict(targets=['backbone', 'head']) if classifier else {}
            quantize_model(model, stanza)
            calibrate(model, lambda: extract_features(model, image, classifier))
            export_graph(model, own, size)
            ours = {runtime: Graph(own, runtime, args.threads) for runtime in ('openvino', 'onnxruntime')}
            set_mode(model, Mode.FLOAT)
            import onnxruntime
            choice = onnxruntime.SessionOptions()
            choice.intra_op_num_threads, choice.log_severity_level = args.threads, 3

            def session(path, choice=choice):
                found = onnxruntime.InferenceSession(str(path), choice, providers=['CPUExecutionProvider'])
                return lambda: found.run(None, {'images': array})

            def compiled(network):
                request = openvino.Core().compile_model(network, 'CPU', options).create_infer_request()
                return lambda: request.infer({'images': array})

            runs = {'eager float': lambda: features(image), 'ONNX Runtime float': session(plain),
                    'OpenVINO float': compiled(str(plain))}
            ort_static(plain, theirs, [array])
            runs['ONNX Runtime int8, its own PTQ'] = session(theirs)
            network = nncf_static(plain, [array])
            sizes = {'eager float': plain, 'ONNX Runtime float': plain, 'OpenVINO float': plain,
                     'ONNX Runtime int8, its own PTQ': theirs}
            if network is not None:
                openvino.save_model(network, folder / 'nncf.xml', compress_to_fp16=False)
                sizes['OpenVINO int8, NNCF PTQ'] = folder / 'nncf.bin'
                runs['OpenVINO int8, NNCF PTQ'] = compiled(network)
            for runtime, title_of in (('onnxruntime', 'ONNX Runtime'), ('openvino', 'OpenVINO')):
                name = f'{title_of} int8, psaq_mm'
                runs[name] = lambda graph=ours[runtime]: graph.run(image)
                sizes[name] = own
            if args.dynamic and not classifier:
                export_graph_dynamic = folder / 'dynamic.onnx'
                set_mode(model, Mode.QUANTIZE)
                export_graph(model, export_graph_dynamic, size, dynamic=True)
                set_mode(model, Mode.FLOAT)
                graph = Graph(export_graph_dynamic, 'openvino', args.threads)
                runs['OpenVINO int8, psaq_mm, any size'] = lambda: graph.run(image)
                sizes['OpenVINO int8, psaq_mm, any size'] = export_graph_dynamic
            if args.predict and not classifier:
                class Inside(torch.nn.Module):
                    pass
                samples = data_samples(image)
                if hasattr(model, 'decode_head'):
                    from mmseg.structures import SegDataSample as Sample
                else:
                    from mmdet.structures import DetDataSample as Sample
                samples = [Sample(metainfo=sample.metainfo) for sample in samples]
                runs['predict, eager float'] = lambda: model.predict(image, samples)
                exported = ExportedFeatures(str(own), 'openvino', args.threads)

                def predict():
                    own_forward = model.extract_feat
                    model.extract_feat = exported
                    try:
                        return model.predict(image, samples)
                    finally:
                        del own_forward, model.extract_feat

                runs['predict, OpenVINO int8, psaq_mm'] = predict
            times = take_turns(runs, args.repeats)
            table = Table('', 'seconds', 'speed-up', 'size, MB', title=f'{title}, {args.threads} threads')
            for name, seconds in times.items():
                base = times['predict, eager float' if name.startswith('predict') else 'eager float']
                mega = sizes[name].stat().st_size / 1e6 if name in sizes else None
                results.setdefault(case, {})[name] = dict(seconds=seconds, speedup=base / seconds, size_mb=mega)
                table.add_row(name, f'{seconds:.3f}', f'{base / seconds:.2f}', f'{mega:.1f}' if mega else '')
            Console(width=120).print(table)
    if args.json:
        write_json(results, args.json)
    return 0


if __name__ == '__main__':
    sys.exit(main())
