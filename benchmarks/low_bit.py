"""What each part of recipe 'low_bit' brings: alone beside the paper's recipe, and left out of the whole.

    python benchmarks/low_bit.py --bench PATH --bits W4A4 W4A8 --out work_dirs/low_bit
    python benchmarks/low_bit.py --bench PATH --tasks nuclei --cfg-options quantization.reconstruction.steps=100

The game comes last and takes long, so the rows that leave a part out have no game: compare them with the row 'low_bit
without the game'. The command writes a Markdown table and JSON, and skips finished parts. Variants whose images are
made in the same way share them, and the time of making them counts for each. Calibration sees synthetic images alone,
but for the row 'on real images', which takes the 32 images that the benchmark has for that. Options of --cfg-options
hold in each row, as for an ablation that takes less time, and the table says them.
"""
import argparse
import runpy
import shutil
import sys
from pathlib import Path

import deit_tiny
import nuclei
from common import ROOT, cfg_options

bits = runpy.run_path(str(ROOT / 'tools' / 'grid.py'))['bits']
TASKS = dict(deit_tiny=deit_tiny, nuclei=nuclei)
PARTS = dict(images=('synthesis', ), norms=('reparameterize', ), ranges=('activation', 'observer'),
             heads=('activation', 'softmax'), blocks=('reconstruction', ))  # where the stanza says each
SMALLER = {  # what is left out of recipe 'low_bit' besides whole parts
    'dead leaves': dict(synthesis=dict(start='noise')),
    'diversity': dict(synthesis=dict(diversity=0.0)),
    'error of the final features': dict(reconstruction=dict(final=0.0)),
    'full-precision inputs': dict(reconstruction=dict(mix=0.0)),
    'rounding (weights are free)': dict(reconstruction=dict(weights='free')),
    'search of ranges': dict(reconstruction=dict(search=False)),
    'ranges of weights': dict(reconstruction=dict(weight_ranges='calibrated')),
    'ranges that learn': dict(reconstruction=dict(range_lr=0.0)),
}


def common_defaults(ours, everyone):
    """Return what keys that recipe 'low_bit' sets are without it, dicts in dicts."""
    return {key: common_defaults(value, everyone[key]) if isinstance(value, dict) else everyone[key]
            for key, value in ours.items()}


def only(settings, path):
    """Return what nested settings say at a path, in as many dicts: ``only(dict(a=dict(b=1, c=2)), ('a', 'b'))`` is
    ``dict(a=dict(b=1))``.
    """
    return {path[0]: only(settings[path[0]], path[1:])} if path else settings


def variants():
    """Yield label, method, and changes of the stanza."""
    from psaq_mm.recipes import RECIPES
    from psaq_mm.stanza import QuantizationConfig
    ours = RECIPES['low_bit']
    others = common_defaults(ours, QuantizationConfig().to_dict())
    yield 'paper, psaq_v2', 'psaq_v2', dict(recipe='paper')
    yield 'paper, psaq_v1', 'psaq_v1', dict(recipe='paper')
    for part, path in PARTS.items():
        yield f'paper, psaq_v1, with {part} of ours', 'psaq_v1', dict(recipe='paper', **only(ours, path))
    yield 'low_bit without the game', 'psaq_v1', dict(recipe='low_bit')
    left_out = {part: only(others, path) for part, path in PARTS.items()}
    for part, changes in {**left_out, **SMALLER}.items():
        yield f'low_bit without the game and {part}', 'psaq_v1', dict(recipe='low_bit', **changes)
    yield 'low_bit', 'psaq_v2', dict(recipe='low_bit')
    yield 'low_bit without the game, on real images', 'real', dict(recipe='low_bit')


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--bench', type=Path, required=True, help='folder with deit_tiny/ and nuclei/')
    parser.add_argument('--tasks', nargs='+', choices=list(TASKS), default=list(TASKS), metavar='TASK')
    parser.add_argument('--bits', nargs='+', type=bits, default=[(4, 4), (4, 8)], metavar='WxAy')
    parser.add_argument('--only', nargs='+', metavar='WORD', default=[''], help='rows whose label has one of the words')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--cfg-options', nargs='+', metavar='KEY=VALUE', default=[],
                        help='as of tools/dfq.py, in each row')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/low_bit'))
    args = parser.parse_args()
    labels = [label for label, *_ in variants()]
    for word in args.only:
        if not any(word in label for label in labels):
            parser.error(f"--only {word}: no row has it in its label; these are {'; '.join(labels)}")
    options = cfg_options(parser, args.cfg_options)
    from mmengine.config import Config

    from psaq_mm.engine import compare, markdown, with_stanza, write_json
    from psaq_mm.engine.config import calibration_gap
    from psaq_mm.report.tables import metric_names, percent, title_of
    from psaq_mm.stanza import QuantizationConfig
    results = {}
    said = ''.join(f', {word}' for word in args.cfg_options)
    for task in args.tasks:
        cfg = Config.fromfile(TASKS[task].write_config(args.bench, args.out / task)[0])
        cfg.randomness = dict(seed=args.seed)
        images = {}  # path and minutes, by the settings that they were made with
        for pair in args.bits:
            title, rows, full = f'{task}, W{pair[0]}A{pair[1]}{said}', [], None
            for label, method, changes in variants():
                if not any(word in label for word in args.only) or method == 'real' and calibration_gap(cfg):
                    continue
                name = ''.join(c if c.isalnum() else '_' for c in label)
                folder = args.out / task / f'seed_{args.seed}' / name
                full = full or folder / 'full_precision'
                if full.exists() and not (folder / 'full_precision').exists():  # it is the same for all
                    shutil.copytree(full, folder / 'full_precision')
                changed = with_stanza(cfg, **dict(changes, report=dict(images=0)))
                changed.merge_from_dict(options)
                made = str(QuantizationConfig.parse(with_stanza(changed, weight=dict(bits=pair[0]), activation=dict(
                    bits=pair[1])).quantization).synthesis)
                reused = images.get(made) if method != 'real' else None
                if reused:
                    changed = with_stanza(changed, synthesis=dict(reuse=reused[0]))
                found = compare(changed, [method], [pair], folder)
                (run, ), names = found['runs'].values(), metric_names([found['full_precision']])
                if reused:
                    run = dict(run, minutes=round(run['minutes'] + reused[1], 2))
                elif method != 'real':
                    images[made] = str(Path(run['checkpoint']).parent / 'synthetic.pt'), run['synthesis_minutes']
                drops = {n: percent(run['quantized'], n) - percent(found['full_precision'], n) for n in names}
                results.setdefault(title, {})[label] = dict(drops=drops, minutes=run['minutes'])
                rows.append([label, *(f'{drop:+.1f}' for drop in drops.values()), f"{run['minutes']:.1f}"])
                print(title, *rows[-1], sep=' | ', flush=True)
                text = f'{title}\n\n' + markdown(
                    [f'drop against full precision, seed {args.seed}', *map(title_of, names), 'minutes'], rows)
                (args.out / f'{task}_W{pair[0]}A{pair[1]}_seed_{args.seed}.md').write_text(text)
                write_json(results, args.out / f'results_seed_{args.seed}.json')
    return 0


if __name__ == '__main__':
    sys.exit(main())
