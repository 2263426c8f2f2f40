"""Writes the int8 model of a quantized checkpoint: an ONNX graph, and a config that runs it in the ecosystem's tools.

    python tools/export.py work_dirs/NAME
"""
import argparse
import runpy
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

# By path: as a module of this name it would hide one of the user's.
common = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name('common.py'))))


def parse_args():
    parser = argparse.ArgumentParser(description='Exports backbone, neck and heads of a quantized model as int8 ONNX.')
    parser.add_argument('config', help='work dir of tools/dfq.py; or a config, the test_config.py that it wrote or the '
                        'one with the stanza')
    parser.add_argument('checkpoint', nargs='?', help='quantized.pth (default: the one in the work dir, or beside '
                        'test_config.py)')
    parser.add_argument('--work-dir', metavar='DIR', help='where results go (default: int8/ beside the checkpoint)')
    parser.add_argument('--size', nargs=2, type=int, metavar=('H', 'W'),
                        help='a graph for images of this size only, faster (default: for every size where that is '
                        'right; of classifiers: their own)')
    parser.add_argument('--runtime', choices=['openvino', 'onnxruntime'],
                        help='what the written config runs the graph with, and must compute it rightly (default: '
                        "openvino, or what the preset is for); the other one is measured as well where it is installed")
    parser.add_argument('--preset', choices=['asymmetric', 'symmetric', 'onnxruntime'],
                        default='asymmetric', help="'asymmetric': unsigned activations with a zero point (OpenVINO, "
                        "ONNX Runtime); 'symmetric': signed without (TensorRT), of a model quantized like that; "
                        "'onnxruntime': convolutions and attention scores in int8 there, too, faster; it measures "
                        'what convolutions put out on the synthetic images of the run')
    parser.add_argument('--parts-only', action='store_true', help="write only the graphs that the ecosystem's tools "
                        'run, not the whole model as one')
    parser.add_argument('--batch', action='store_true', help='graphs that take any number of images of one size at '
                        'once')
    parser.add_argument('--cfg-options', nargs='+', metavar='KEY=VALUE', help='override settings of the config')
    parser.add_argument('--json', metavar='FILE', help='also write the numbers to this file')
    common.debug_argument(parser)
    parser.set_defaults(device='cpu', seed=None)
    return parser.parse_args()


def find_run(args):
    """Put the files of a work dir in place of the arguments that leave them out.

    Raises:
        UserError: If it holds no quantized model.
    """
    from psaq_mm.errors import UserError
    config = Path(args.config)
    folder = config if config.is_dir() else config.parent
    if config.is_dir():
        args.config = str(folder / 'test_config.py')
    if args.checkpoint is None:
        args.checkpoint = str(folder / 'quantized.pth')
    for path in (args.config, args.checkpoint):
        if (config.is_dir() or path == args.checkpoint) and not Path(path).is_file():
            raise UserError(f'{path} does not exist: give the work dir of a run of tools/dfq.py that is done, or a '
                            'config and a checkpoint')


def export(args):
    """Export, and print what came out."""
    from rich.console import Console
    from rich.table import Table

    from psaq_mm.deploy import export
    from psaq_mm.engine import write_json
    from psaq_mm.errors import doing
    find_run(args)
    args.work_dir = args.work_dir or str(Path(args.checkpoint).parent / 'int8')
    cfg = common.load_config(args, args.work_dir)
    with doing(f'exporting {args.checkpoint}'):
        result = export(cfg, args.checkpoint, args.work_dir, args.size and tuple(args.size), args.runtime, args.preset,
                        not args.parts_only, args.batch)
    table = Table('exported', '', show_header=False)
    sizes = result['size_mb']
    heads = ' and of heads' if result['heads'] else ''
    table.add_row('graph', f"{result['graph']}{heads}, {sizes['graph']} MB (weights in float32: {sizes['float']} MB)")
    if result['heads']:
        table.add_row('heads', ', '.join(result['heads']))
    unit = f", multiples of {result['multiple_of']}" if result['multiple_of'] > 1 else ''
    table.add_row('image sizes', ' x '.join(map(str, result['size'])) if result['size'] else
                  f"any from {result['at_least']} pixels a side{unit}")
    for runtime in dict.fromkeys(item['runtime'] for item in result['measured']):
        found = [item for item in result['measured'] if item['runtime'] == runtime and item['graph'] == 'int8']
        rows = [item for item in found if ',' not in item['place']]  # of heads the closest call is enough
        rows += [min((item for item in found if item['place'].startswith(f'{name},')),
                     key=lambda item: item['sqnr'] - item['required']) for name in result['heads']]
        lines = [f"{item['place']}: {item['error'] or str(item['sqnr']) + ' dB'}, needs {item['required']}"
                 f"{'' if item['passed'] else '  WRONG'}" for item in rows]
        chosen = ' (chosen)' if runtime == result['runtime'] else ''
        table.add_row(f'SQNR to the quantized model,\n{runtime}{chosen}', '\n'.join(lines))
    table.add_row(f"products in int8, {result['runtime']}",
                  f"{result['int8']} of {result['int8'] + len(result['float'])}")
    if result['heads_not_exported']:
        table.add_row('heads that stay fake-quantized', '\n'.join(
            f'{name}: {why}' for name, why in result['heads_not_exported'].items()))
    for title, names in (('in float at run time', result['float']), ('kept in float by the stanza',
                                                                     result['kept_float'])):
        if names:
            more = f' and {len(names) - 5} more, see export.json' if len(names) > 5 else ''
            table.add_row(title, '\n'.join(names[:5]) + more)
    whole = result.get('whole')
    if whole:
        sizes = f"images of {' x '.join(map(str, whole['size']))}" if whole.get('size') else (
            f"images of any size from {whole.get('at_least')} pixels a side")
        table.add_row('whole model', f"none: {whole['refused']}" if 'refused' in whole else
                      f"model.onnx, {whole['size_mb']} MB, for {sizes}; try python predict.py model.onnx IMAGE there")
    Console().print(table)
    for warning in result['warnings']:
        print(f'WARNING: {warning}', file=sys.stderr)
    print(f"test it with tools/test.py {shlex.quote(result['config'])} {shlex.quote(result['checkpoint'])}")
    if args.json:
        write_json(result, args.json)


if __name__ == '__main__':
    sys.exit(common.run(parse_args(), export))
