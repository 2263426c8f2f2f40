"""Data-free calibration for other people's quantizers: NNCF and ONNX Runtime on noise, synthetic and real images.

    python benchmarks/deit_tiny.py --bench ../shared/bench --out work_dirs/deit_tiny --bits W8A8
    python benchmarks/calibration_sets.py --grid work_dirs/deit_tiny [--runs W8A8_psaq_v1]

Each quantizes the same float graph of DeiT-Tiny to int8 on the arrays of a run's calibration_set/, on as much Gaussian
noise, and on 32 real photographs of other classes; top-1 on the 500 photographs, agreement with full precision, and the
divergence of probabilities. Needs pip install 'psaq_mm[deploy]' and nncf; without nncf its rows are left out.
"""
import argparse
import sys
import tempfile
from pathlib import Path

from agreement import closeness
from int8_speed import nncf_static, ort_static


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--grid', type=Path, default=Path('work_dirs/deit_tiny'), help="deit_tiny.py's --out")
    parser.add_argument('--runs', nargs='+', default=['W8A8_psaq_v1'], help='folders in there with a calibration_set/')
    args = parser.parse_args()
    sets = {name: args.grid / name / 'calibration_set' / 'images_224x224.npy' for name in args.runs}
    for path in (args.grid / 'full_precision.pth', *sets.values()):
        if not path.is_file():
            print(f'error: {path} does not exist: run benchmarks/deit_tiny.py first, --grid names its --out',
                  file=sys.stderr)
            return 2
    import logging
    import warnings
    warnings.simplefilter('ignore')
    logging.disable(logging.WARNING)
    import numpy as np
    import onnxruntime
    import openvino
    import torch
    from mmengine.config import Config
    from mmengine.registry import MODELS
    from mmengine.runner import Runner, load_checkpoint

    from psaq_mm.deploy import export_graph
    from psaq_mm.engine import markdown, write_json
    from psaq_mm.engine.config import default_scope, float_config
    cfg = Config.fromfile(args.grid / 'deit_tiny.py')
    default_scope(cfg)
    model = MODELS.build(float_config(cfg).model).eval()
    load_checkpoint(model, str(args.grid / 'full_precision.pth'), map_location='cpu', strict=True)

    def inputs(loader):
        batches = Runner.build_dataloader(loader)
        return np.concatenate([model.data_preprocessor(data)['inputs'].numpy() for data in batches])

    photographs = inputs(cfg.test_dataloader)
    labels = torch.tensor([int(line.split()[1]) for line in (args.grid / 'val.txt').read_text().splitlines()])
    arrays = {name: np.load(path) for name, path in sets.items()}
    count = len(next(iter(arrays.values())))
    noise = np.random.default_rng(0).standard_normal((count, 3, 224, 224), np.float32)
    arrays = {'noise': noise, **arrays, 'real': inputs(cfg.calib_dataloader)[:count]}
    rows, results = [], {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        plain = Path(folder) / 'float.onnx'
        export_graph(model, plain, (224, 224), integers=False)

        def probabilities(run):
            return torch.from_numpy(np.concatenate([run(image[None]) for image in photographs])).log_softmax(1)

        def session(path):
            found = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
            return lambda images: found.run(None, {'images': images})[0]

        full = probabilities(session(plain))
        for name, images in arrays.items():
            images = [image[None] for image in images]
            quantized = Path(folder) / f'{name}.onnx'
            ort_static(plain, quantized, images)
            runs = {'ONNX Runtime': session(quantized)}
            network = nncf_static(plain, images)
            if network is not None:
                compiled = openvino.Core().compile_model(network, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
                runs['NNCF'] = lambda images, compiled=compiled: compiled({'images': images})[0]
            for tool, run in runs.items():
                found = probabilities(run)
                close, top1 = closeness(found, full), 100 * (found.argmax(1) == labels).float().mean().item()
                results[f'{tool}, {name}'] = dict(close, top1=top1)
                rows.append([f'{tool}, {name}', f'{top1:.1f}', f"{close['agreement']:.1f}", f"{close['kl']:.4f}"])
                print(*rows[-1], flush=True)
    top1 = 100 * (full.argmax(1) == labels).float().mean().item()
    rows.insert(0, ['full precision', f'{top1:.1f}', '', ''])
    text = markdown(['quantizer, calibrated on', 'top-1', 'agreement, %', 'KL divergence, nats'], rows)
    (args.grid / 'calibration_sets.md').write_text(text)
    write_json(results, args.grid / 'calibration_sets.json')
    print(text)
    return 0


if __name__ == '__main__':
    sys.exit(main())
