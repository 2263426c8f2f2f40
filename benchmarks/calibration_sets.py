"""Data-free calibration for other people's quantizers: NNCF and ONNX Runtime on noise, synthetic and real images.

    python benchmarks/deit_tiny.py --bench ../shared/bench --out work_dirs/deit_tiny --bits W8A8
    python benchmarks/calibration_sets.py --grid work_dirs/deit_tiny [--runs W8A8_psaq_v1]

Each quantizes the same float graph of DeiT-Tiny to int8 on the arrays of a run's calibration_set/, on as much Gaussian
noise, and on 32 real photographs of other classes. Beside them full precision and our own int8 model (W8A8_psaq_v2).
Writes calibration_sets.md: top-1 on the 500 photographs, agreement with full precision, divergence of probabilities,
latency of one image (all take turns in one process); and a plot of latency against agreement, calibration_sets.png.
Needs pip install 'psaq_mm[deploy]' and nncf; without nncf its rows are left out.
"""
import argparse
import sys
import tempfile
from pathlib import Path

from agreement import closeness
from runtimes import SESSIONS, by_others, take_turns

OURS = 'W8A8_psaq_v2'


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--grid', type=Path, default=Path('work_dirs/deit_tiny'), help="deit_tiny.py's --out")
    parser.add_argument('--runs', nargs='+', default=['W8A8_psaq_v1'], help='folders in there with a calibration_set/')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--repeats', type=int, default=51)
    return parser.parse_args()


def plot(results, path):
    """Latency against agreement: a colour for each calibration set, a marker for each runtime."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(9, 4.5), layout='constrained')
    axes = figure.subplots()
    ways = list(dict.fromkeys(r['calibrated'] for r in results.values()))
    for name, r in results.items():
        label = f'{name} ({r["runtime"]})' if r['runtime'] not in name else name
        axes.scatter(r['ms'], r['agreement'], s=60, alpha=0.8, color=f"C{ways.index(r['calibrated'])}", label=label,
                     marker=dict(PyTorch='s', OpenVINO='o').get(r['runtime'], '^'))
    axes.set(xlabel='latency of one image, ms', ylabel='agreement with full precision, %',
             title='DeiT-Tiny, 500 photographs')
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    figure.legend(loc='outside right center', fontsize='small')
    figure.savefig(path, dpi=130)


def main():
    args = parse_args()
    sets = {name: args.grid / name / 'calibration_set' / 'images_224x224.npy' for name in args.runs}
    for path in (args.grid / 'full_precision.pth', args.grid / OURS / 'quantized.pth', *sets.values()):
        if not path.is_file():
            print(f'error: {path} does not exist: run benchmarks/deit_tiny.py first, --grid names its --out',
                  file=sys.stderr)
            return 2
    import logging
    import warnings
    warnings.simplefilter('ignore')
    logging.disable(logging.WARNING)
    import numpy as np
    import torch
    from mmengine.config import Config
    from mmengine.registry import MODELS
    from mmengine.runner import Runner, load_checkpoint

    from psaq_mm.deploy import export, export_graph
    from psaq_mm.engine import markdown, write_json
    from psaq_mm.engine.config import default_scope, float_config
    torch.set_num_threads(args.threads)
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
    runs = {}  # (quantizer, runtime, calibrated on): a function of an array
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        folder = Path(folder)
        plain, ours = folder / 'float.onnx', folder / 'ours'
        export_graph(model, plain, (224, 224), integers=False)
        export(Config.fromfile(args.grid / OURS / 'test_config.py'), str(args.grid / OURS / 'quantized.pth'), str(ours),
               whole=False)
        runs['full precision', 'PyTorch', ''] = lambda array: [model.logits(torch.from_numpy(array)).numpy()]
        for runtime, session in SESSIONS.items():
            runs['full precision', runtime, ''] = session(plain, args.threads)
            runs['psaq_mm', runtime, OURS] = session(ours / 'features.onnx', args.threads)
        for name, images in arrays.items():
            (folder / name).mkdir()
            for title, run, _ in by_others(plain, [image[None] for image in images], folder / name, args.threads):
                tool, runtime = ('NNCF', 'OpenVINO') if 'NNCF' in title else ('ONNX Runtime PTQ', 'ONNX Runtime')
                runs[tool, runtime, name] = run
        first = photographs[:1]
        times = take_turns({key: lambda run=run: run(first) for key, run in runs.items()}, args.repeats)
        full, results, rows = None, {}, []
        for (tool, runtime, calibrated), run in runs.items():
            found = torch.from_numpy(np.concatenate([run(image[None])[0] for image in photographs])).log_softmax(1)
            full = found if full is None else full
            top1 = 100 * (found.argmax(1) == labels).float().mean().item()
            name = ', '.join(filter(None, (tool, runtime if tool in ('full precision', 'psaq_mm') else '', calibrated)))
            close = closeness(found, full)
            results[name] = dict(close, top1=top1, ms=1e3 * times[tool, runtime, calibrated], runtime=runtime,
                                 calibrated=calibrated)
            rows.append([tool, runtime, calibrated, f'{top1:.1f}', f"{close['agreement']:.1f}", f"{close['kl']:.4f}",
                         f"{results[name]['ms']:.1f}"])
            print(*rows[-1], flush=True)
    text = markdown(['quantizer', 'runtime', 'calibrated on', 'top-1', 'agreement, %', 'KL divergence, nats',
                     'latency, ms'], rows)
    (args.grid / 'calibration_sets.md').write_text(text)
    write_json(results, args.grid / 'calibration_sets.json')
    plot(results, args.grid / 'calibration_sets.png')
    print(text)
    return 0


if __name__ == '__main__':
    sys.exit(main())
