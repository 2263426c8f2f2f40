"""Takes every transformer config of the installed mmdet and mmseg zoos, made small, through the whole job.

    python tools/coverage.py --markdown docs/coverage.md
    python tools/coverage.py --match segformer swin
    python tools/coverage.py my_configs/my_model.py
"""
import argparse
import importlib.util
import json
import re
import runpy
import sys
import tempfile
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

# By path: as a module of this name it would hide one of the user's.
common = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name('common.py'))))

# What the names of configs that cannot be read say, as those of mmpretrain's models.
NAMES = re.compile('swin|vit|former|beit|mae|twins|pvt|detr|dino')


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('configs', nargs='*', type=Path, help='config files (default: those of the zoos)')
    parser.add_argument('--match', nargs='+', default=[], metavar='TEXT', help='only configs with one of these in the '
                        'name; * stands for anything')
    parser.add_argument('--all', action='store_true', help='convolutional configs, too')
    parser.add_argument('--timeout', type=float, default=300, help='seconds for one config (default: 300)')
    parser.add_argument('--recipe', choices=common.RECIPES, default='paper', help='of the quantization (default: '
                        'paper); low_bit reparameterises norms and reconstructs each block before the game')
    parser.add_argument('--export', action='store_true', help='go on to one graph of the whole model, held against '
                        'it in OpenVINO and ONNX Runtime')
    parser.add_argument('--logs', type=Path, help='folder for what each config prints (default: a temporary one)')
    parser.add_argument('--markdown', type=Path, metavar='FILE', help='write the table here')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the results here; those of configs that are '
                        'not checked this time stay')
    common.debug_argument(parser)
    return parser.parse_args()


def wanted(args):
    """Names and files of the configs to check, and of those that cannot be read, with the reason."""
    from psaq_mm.engine import read_config
    from psaq_mm.errors import UserError
    from psaq_mm.zoo import is_transformer, zoo_configs
    for name, path in [(str(path), path) for path in args.configs] or zoo_configs():
        if args.match and not any(fnmatch(name, f'*{text}*') for text in args.match):
            continue
        try:
            model = read_config(path).get('model') or {}
        except UserError as error:
            if args.configs or args.all or NAMES.search(name):
                yield name, path, str(error).splitlines()[0]
            continue
        if args.configs or args.all or is_transformer(model):
            yield name, path, None


def earlier(path):
    """Results that are in a file already.

    Raises:
        UserError: If it holds anything else.
    """
    from psaq_mm.errors import UserError
    try:
        results = json.loads(path.read_text(encoding='utf-8'))
        if all('result' in result for result in results.values()):
            return results
    except (ValueError, AttributeError, TypeError):
        pass
    raise UserError(f'--json {path}: the file is there and holds no results of this tool, give another')


# What of the job follows the recipe.
WORK = dict(paper='calibration, two updates of the game',
            low_bit='reparameterisation of norms, calibration, '
                    'two updates of each block by reconstruction, two updates of the game')


def cell(reason):
    """A reason as what follows in a cell of a table."""
    return f': {reason}'.replace('|', '\\|').replace('\n', ' ')[:300] if reason else ''


def exported(graphs):
    """What the page says of the graphs of whole models: nothing where there are none."""
    if not graphs:
        return []
    good = sum(r['export'] in ('any size', 'one size') for r in graphs)
    refused = sum(r['export'] == 'refused' for r in graphs)
    return [f'The last two columns: {good} of these {len(graphs)} are one graph of the whole model, {refused} are '
            'refused by name. Each graph computes the feature maps and the answers of the fake-quantized model in '
            'OpenVINO and in ONNX Runtime, without the resizing of the test pipeline. Detectors are made to find '
            'objects: logits of classes are spread, or thresholds are 0. '
            "'any size' is one graph, measured at 128 x 128 and 128 x 192 pixels; 'one size' is a graph for 64 x 64 "
            'or 64 x 96, and the cell says why. SQNR is that of the feature maps, the lowest of all.', '']


def write_markdown(results, path, recipe):
    """The table, families together."""
    from psaq_mm.engine import versions
    passed = sum(r['result'] == 'pass' for r in results.values())
    graphs = [r for r in results.values() if 'export' in r]
    chosen = ('' if recipe == 'paper' else f' --recipe {recipe}') + ' --export' * bool(graphs)
    lines = ['# Coverage', '',
             f'Written by `python tools/coverage.py{chosen} --markdown docs/{path.name}`. Every config that the '
             'metafiles of the installed zoos name, with a transformer for backbone, neck or encoder, made shallow and '
             f"given images of 64 x 64 pixels: stanza (recipe '{recipe}'), conversion, synthesis, {WORK[recipe]}, "
             'prediction, '
             'saving, reloading, and the same prediction again. Weights are random: this says that the job runs, not '
             'how accurate its result is. The language models of GLIP and GroundingDINO, which are not quantized, are '
             'replaced by small ones (`psaq_mm/zoo/standins.py`), and their encoders, which read text as well, stay '
             'in float. Deformable attention samples instead of multiplying: its layers are quantized, and it is not '
             'counted among the attentions.', '',
             f'{passed} of {len(results)} pass ('
             + ', '.join(f'{name} {version}' for name, version in versions().items()
                         if name in ('torch', 'mmcv', 'mmdet', 'mmsegmentation')) + ').', '',
             *exported(graphs),
             '| config | result | quantized | layers and products | attentions | graph of the whole model | SQNR, dB |',
             '| --- | --- | --- | ---: | ---: | --- | ---: |']
    for name, result in results.items():
        cells = (name, result['result'] + cell(result.get('reason')), ', '.join(result.get('scope', [])),
                 result.get('layers', ''), result.get('attentions', ''),
                 result.get('export', '') + cell(result.get('export_reason')), result.get('sqnr', ''))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('\n'.join(lines) + '\n', encoding='utf-8')


def without_folders(reason):
    """A reason without where on this machine the zoos are installed."""
    for zoo in ('mmdet', 'mmseg'):
        reason = reason.replace(f'{Path(importlib.util.find_spec(zoo).origin).parents[1]}/', '')
    return reason


def coverage(args):
    """Check each config, write and print what came out. Return 1 if one does not pass."""
    import warnings
    warnings.simplefilter('ignore')
    import logging

    from rich.progress import track

    from psaq_mm.engine import write_json
    from psaq_mm.zoo import check_apart
    results = earlier(args.json) if args.json and args.json.exists() else {}
    configs = list(wanted(args))
    logging.disable(logging.WARNING)
    logs = args.logs = args.logs or Path(tempfile.mkdtemp(prefix='coverage_'))
    logs.mkdir(parents=True, exist_ok=True)
    print(f'logs: {logs}', flush=True)
    for name, path, reason in track(configs, 'checking'):
        log = logs / f"{name.replace('::', '_').replace('/', '_')}.log"
        if reason:
            results[name] = dict(result='refused', reason=reason)
        else:
            with tempfile.TemporaryDirectory() as work_dir:
                results[name] = check_apart(path, work_dir, log, args.timeout, dict(recipe=args.recipe),
                                            args.export)
        for key in ('reason', 'export_reason'):
            if results[name].get(key):
                results[name][key] = without_folders(results[name][key])
        print(name, results[name]['result'], results[name].get('reason', ''), flush=True)
        results = dict(sorted(results.items()))
        if args.json:
            write_json(results, args.json)
        if args.markdown:
            write_markdown(results, args.markdown, args.recipe)
    passed = sum(r['result'] == 'pass' for r in results.values())
    print(f'{passed} of {len(results)} pass')
    return int(passed < len(results))


if __name__ == '__main__':
    sys.exit(common.run(parse_args(), coverage))
