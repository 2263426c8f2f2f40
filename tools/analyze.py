"""Measures what rounding each layer costs, and suggests bits for each under a budget.

    python tools/analyze.py configs/mask_rcnn_swin_s_w8a8.py --size-mb 40
    python tools/dfq.py work_dirs/mask_rcnn_swin_s_w8a8/mixed_precision.py

No real image is needed: it takes the synthetic ones of an earlier run in the work dir, or makes some. Writes
mixed_precision.py, sensitivity.json and sensitivity.png. What was measured is kept: an interrupted analysis goes on,
and another budget takes seconds.
"""
import argparse
import math
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

# By path: as a module of this name it would hide one of the user's.
common = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name('common.py'))))


def positive(text):
    """A finite number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError
    return value


def parse_args():
    parser = argparse.ArgumentParser(description='Layer sensitivity and mixed precision, without data.')
    common.config_arguments(parser)
    parser.add_argument('--bits', nargs='+', type=int, choices=range(2, 9), default=[4, 6, 8], metavar='BITS',
                        help='to measure and choose from (default: 4 6 8)')
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument('--size-mb', type=positive, metavar='MB', help='the model may have so many megabytes (default: '
                        'what the median of --bits everywhere gives)')
    budget.add_argument('--bops', type=positive, metavar='SHARE', help='or so large a share of the bit operations with '
                        '8 bits everywhere, e.g. 0.5: activations get bits of their own, too')
    return parser.parse_args()


def no_better(compared, own_bits, bops):
    """What to tell whose mixture is not closer to full precision than the stanza's own bits everywhere, else None."""
    if own_bits not in compared or compared['mixed']['sqnr'] > compared[own_bits]['sqnr']:
        return None
    limit = ': activations limit this model. --bops gives these more bits, too' if bops is None else ''
    return f'The mixture is no better than {own_bits}{limit}.'


def analyze(args):
    """Measure, suggest, compare, write."""
    from psaq_mm.engine.analysis import WRITTEN
    from psaq_mm.files import OwnedFolder
    cfg = common.load_config(args, f'work_dirs/{Path(args.config).stem}')
    own = OwnedFolder(cfg.work_dir)
    with own.lock():
        own.claim(WRITTEN)
        write(args, cfg, own)


def write(args, cfg, own):
    """Do the work in a folder that is locked."""
    from rich.console import Console
    from rich.table import Table

    from psaq_mm.engine import write_json
    from psaq_mm.engine.analysis import Analysis, calibration_images, sensitivity_table, suggestion, with_recipe
    from psaq_mm.engine.config_file import config_text
    from psaq_mm.engine.display import Display
    from psaq_mm.report.figures import sensitivity_bars
    folder, bits = own.path, sorted(set(args.bits))
    measured = with_recipe(cfg, bits)
    images, path = calibration_images(measured, args.checkpoint, args.quiet)
    analysis = Analysis(measured, images, args.checkpoint)
    stanza = analysis.quantization
    analysis.inspect(bits)
    analysis.check_budget(bits, args.size_mb, args.bops)
    with Display(args.quiet) as display:
        analysis.measure(bits, display, own)
    middle = bits[len(bits) // 2]
    uniform = {f'W{w}A{stanza.activation.bits if args.bops is None else w}':
               analysis.at(w, stanza.activation.bits if args.bops is None else w) for w in bits}
    compared = {name: analysis.overall(settings) for name, settings in uniform.items()}
    size = args.size_mb
    if args.bops is None and size is None:
        size = compared[f'W{middle}A{stanza.activation.bits}']['size_mb']
    overrides = analysis.mixed(bits, size, args.bops)
    compared['mixed'] = analysis.overall(analysis.at(stanza.weight.bits, stanza.activation.bits, overrides))
    rows = analysis.rows(bits)
    result = dict(images=path, bits=bits, size_mb=size, bops=args.bops, layers=rows, compared=compared,
                  overrides=overrides, suggestion=str(folder / 'mixed_precision.py'))
    own.write('mixed_precision.py', config_text(suggestion(cfg, args.checkpoint, overrides)).encode())
    with own.writing('sensitivity.png') as path:
        sensitivity_bars(rows, bits).savefig(path, dpi=120)
    own.write_json('sensitivity.json', result)
    if args.json:
        write_json(result, args.json)
    if args.quiet:
        return
    console = Console()
    console.print(sensitivity_table(rows, bits))
    table = Table(title='The whole model, as calibrated', caption=f'run it: python tools/dfq.py '
                  f'{folder}/mixed_precision.py\n{folder}/sensitivity.png', caption_justify='left')
    for name in ('', 'size, MB', 'SQNR of the outputs, dB', 'weights alone rounded, dB'):
        table.add_column(name, justify='right' if name else 'left')
    for name, numbers in compared.items():
        table.add_row(name, f"{numbers['size_mb']:.2f}", f"{numbers['sqnr']:.1f}", f"{numbers['sqnr_weights']:.1f}")
    console.print(table)
    verdict = no_better(compared, f'W{stanza.weight.bits}A{stanza.activation.bits}', args.bops)
    if verdict:
        console.print(verdict)


if __name__ == '__main__':
    sys.exit(common.run(parse_args(), analyze))
