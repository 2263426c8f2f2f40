"""Accuracy of the exported int8 model beside that of the fake-quantized one, by mm*'s own evaluation.

    make demo
    python benchmarks/int8_accuracy.py work_dirs/demo/*/W8A8_psaq_v2     # needs pip install 'psaq_mm[deploy]'

Each argument is a work dir of tools/dfq.py whose test data is there. Exports it, evaluates the graph in each runtime
inside the detector, segmentor or classifier, and writes a Markdown table.
"""
import argparse
import json
import sys
from pathlib import Path


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('runs', nargs='+', type=Path, metavar='DIR', help='with test_config.py and quantized.pth')
    parser.add_argument('--runtimes', nargs='+', choices=['openvino', 'onnxruntime'], metavar='RUNTIME',
                        default=['openvino', 'onnxruntime'])
    parser.add_argument('--out', type=Path, default=Path('work_dirs/int8_accuracy'))
    return parser.parse_args()


def main():
    args = parse_args()
    for run in args.runs:
        for name in ('test_config.py', 'quantized.pth', 'metrics.json'):
            if not (run / name).is_file():
                print(f'error: {run / name} does not exist: give a work dir of tools/dfq.py', file=sys.stderr)
                return 2
    from mmengine.config import Config

    from psaq_mm.deploy import export
    from psaq_mm.engine import evaluate, markdown, write_json
    from psaq_mm.report.tables import metric_names, percent, shown, title_of
    rows, results = [], {}
    for index, run in enumerate(args.runs):
        label = '/'.join(run.parts[-2:])
        quantized = json.loads((run / 'metrics.json').read_text())['quantized']
        folder = args.out / f'{index}_{run.name}'
        found = {'fake-quantized': dict(metrics=quantized or evaluate(
            Config.fromfile(run / 'test_config.py'), str(run / 'quantized.pth'), str(folder), 'quantized'))}
        for runtime in args.runtimes:
            done = export(Config.fromfile(run / 'test_config.py'), str(run / 'quantized.pth'), str(folder / runtime),
                          runtime=runtime, whole=False)
            metrics = evaluate(Config.fromfile(done['config']), done['checkpoint'], str(folder), runtime)
            found[runtime] = dict(metrics=metrics, sqnr_db=done['sqnr_db'], size_mb=done['size_mb'],
                                  int8=done['int8'], products=done['int8'] + len(done['float']))
        results[label] = found
        reference = found['fake-quantized']['metrics']
        for kind, item in found.items():
            for name in metric_names([reference]):
                change = percent(item['metrics'], name) - percent(reference, name)
                rows.append([label, kind, title_of(name), shown(item['metrics'], name), f'{change:+.2f}',
                             ', '.join(f'{v} at {k}' for k, v in item.get('sqnr_db', {}).items())])
    args.out.mkdir(parents=True, exist_ok=True)
    text = markdown(['run', 'model', 'metric', 'value', '- fake-quantized', 'SQNR of features, dB'], rows)
    (args.out / 'int8_accuracy.md').write_text(text)
    write_json(results, args.out / 'int8_accuracy.json')
    print(text)
    return 0


if __name__ == '__main__':
    sys.exit(main())
