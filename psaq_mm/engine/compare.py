"""Several ways to calibrate, side by side: the same model, quantizer and test data."""
from __future__ import annotations

import functools
import hashlib
import statistics
import sys
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path

from mmengine.config import Config
from mmengine.logging import print_log

from ..errors import UserError
from ..files import OwnedFolder, as_data, read_json
from ..report import WRITTEN
from ..stanza import QuantizationConfig
from .checkpoint import in_own_layout, versions
from .config import calibration_gap, evaluation_gap, float_config
from .display import Display
from .pipeline import RESULTS, RUN, check, evaluate, quantize, was_interrupted, with_stanza

LIBRARIES = ('mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'timm', 'torch', 'torchvision', 'psaq_mm')


def _digest(paths: Iterable[Path]) -> str:
    """Return a fingerprint of the content of files, in order of their names."""
    code = hashlib.sha256()
    for path in sorted(set(paths)):
        code.update(path.read_bytes())
    return code.hexdigest()


def own_modules(cfg: Config) -> list[Path]:
    """Return the files of the modules that the config brought in, and of what these import of the user's.

    Args:
        cfg (Config): Its modules are imported and its model has been built, so that late imports have happened.
    """
    named = {name.partition('.')[0] for name in (cfg.get('custom_imports') or {}).get('imports') or []}
    named -= {*LIBRARIES, *sys.stdlib_module_names}
    installed = [str(Path(folder).resolve()) for folder in sysconfig.get_paths().values()]
    files = []
    for name, module in list(sys.modules.items()):
        file = getattr(module, '__file__', None)
        top = name.partition('.')[0]
        if not isinstance(file, str) or top in (*LIBRARIES, '__main__') or not Path(file).is_file():
            continue
        if top in named or not str(Path(file).resolve()).startswith(tuple(installed)):
            files.append(Path(file).resolve())
    return files


def _software(cfg: Config) -> dict:
    """Return everything that results depend on besides the config's values: versions, digests of this package's code
    and kernels, and of the user's modules.
    """
    package = Path(__file__).parents[1]
    files = (path for kind in ('py', 'cpp', 'so') for path in package.rglob(f'*.{kind}'))
    return dict(versions(), psaq_mm=_digest(files), own_modules=_digest(own_modules(cfg)))


def _done(folder: OwnedFolder, inputs: dict, work: Callable[[bool], dict], files: Iterable[str] = ()) -> dict:
    """The result of some work, from an earlier run if all of its inputs are the same.

    Args:
        folder (OwnedFolder): Where the work leaves its files.
        inputs (dict): Everything the result depends on.
        work (Callable): ``work(resume) -> result``; resume is whether an interrupted run had the same inputs.
        files (Iterable[str]): What it must have left there.
    """
    inputs = as_data(inputs)
    saved = read_json(folder.path / 'compared.json')
    if saved.get('inputs') == inputs and 'result' in saved and all((folder.path / name).exists() for name in files):
        return saved['result']
    folder.write_json('compared.json', dict(inputs=inputs))
    result = work(saved.get('inputs') == inputs and was_interrupted(folder.path))
    folder.write_json('compared.json', dict(inputs=inputs, result=result))
    return result


def _evaluate(cfg, weights, folder, quiet):
    with Display(quiet) as display:
        return evaluate(float_config(cfg), weights, str(folder.own(RUN)), 'full_precision', display)


def _quantize(cfg, weights, quiet, resume):
    return quantize(cfg, weights, resume=resume, eval_float=False, quiet=quiet)


def compare(cfg: Config, methods: Iterable[str], bits: Iterable[tuple[int, int]], work_dir: str,
            checkpoint: str | None = None, quiet: bool = False, recipes: Iterable[str] = (), seeds: Iterable[int] = ()
            ) -> dict:
    """Quantize by every method and recipe at every bit-width and evaluate each.

    Finished parts are skipped, unless what they depend on has changed: config, checkpoint, seed, or installed software.
    All are compared with full precision on the same fresh synthetic images. V1 and V2 start from the same synthesised
    images, as V2's first stage is V1: they are made once for each recipe, and their time counts for both.

    Args:
        cfg (Config): With a stanza, test data, and for method 'real' a ``calib_dataloader``.
        methods (Iterable[str]): Of ``quantization.synthesis.method``.
        bits (Iterable[tuple[int, int]]): (weight, activation).
        work_dir (str): A folder for each run goes there.
        checkpoint (str, optional): Instead of the config's ``load_from``.
        quiet (bool): Show warnings and errors only. Defaults to False.
        recipes (Iterable[str]): Of ``quantization.recipe``. Without any, the config's own or what the bits stand for.
        seeds (Iterable[int]): Every run is made with each of them. Without any, the config's own.

    Returns:
        dict: ``full_precision`` metrics; ``runs``, by 'W8A8 method' or 'W8A8 method recipe', each what
        :func:`quantize` returns, of several seeds what :func:`over_seeds` does.

    Raises:
        UserError: If the config cannot be evaluated here.
    """
    gap = evaluation_gap(cfg)
    if gap:
        raise UserError(f'nothing to compare on: {gap}')
    methods, recipes = list(methods), list(recipes) or [None]
    seeds = list(dict.fromkeys(seeds)) or [None]
    ways = [(*pair, method, recipe) for pair in bits for recipe in recipes for method in methods]
    gap = calibration_gap(cfg) if 'real' in methods else None
    if gap:
        raise UserError(gap)
    root = OwnedFolder(work_dir)
    with root.lock():
        root.claim(WRITTEN)
        _claim_parts(root, ['full_precision', *(_folder(*way, seed) for seed in seeds for way in ways)])
        return _compare(cfg, ways, seeds, root, checkpoint, quiet)


def _name(weight: int, activation: int, method: str, recipe: str | None) -> str:
    """Return what a run is called."""
    return f'W{weight}A{activation} {method}' + (f' {recipe}' if recipe else '')


def _folder(weight: int, activation: int, method: str, recipe: str | None, seed: int | None) -> str:
    """Return the name of a run's folder."""
    return _name(weight, activation, method, recipe).replace(' ', '_') + ('' if seed is None else f'_seed_{seed}')


def over_seeds(results: dict[int, dict]) -> dict:
    """Return the results of one run with several seeds as one.

    Args:
        results (dict[int, dict]): By seed, what :func:`quantize` returns.

    Returns:
        dict: That of the first seed, with the means of ``quantized``, ``minutes``, ``synthesis_minutes`` and of the
        predictions' ``fidelity``; ``deviation``, the standard deviation of each metric; ``seeds``, all results.
    """
    def means(dicts):
        return {key: statistics.fmean(d[key] for d in dicts) for key in dicts[0] if all(
            isinstance(d.get(key), (int, float)) for d in dicts)}

    found = list(results.values())
    metrics = [result['quantized'] for result in found]
    merged = dict(found[0], **means([{key: result[key] for key in ('minutes', 'synthesis_minutes')}
                                     for result in found]), quantized=means(metrics), seeds=results)
    merged['deviation'] = {key: statistics.stdev(m[key] for m in metrics) for key in merged['quantized']}
    predictions = [(result.get('fidelity') or {}).get('predictions') for result in found]
    if all(predictions):
        merged['fidelity'] = dict(found[0]['fidelity'], predictions=means(predictions))
    for name in ('checkpoint', 'test_config', 'report', 'seed'):  # of one of them
        merged.pop(name, None)
    return merged


def _claim_parts(root: OwnedFolder, names: Iterable[str]) -> None:
    """Refuse before the first part what would replace a file of the user's in the last one.

    Args:
        root (OwnedFolder): Holds the parts.
        names (Iterable[str]): Folders of the parts. Finished ones may hold anything: nothing is written there.
    """
    for name in names:
        folder = OwnedFolder(root.path / name)
        if 'result' not in read_json(folder.path / 'compared.json'):
            folder.claim(('compared.json', f'{RUN}/') if name == 'full_precision' else ('compared.json', *RESULTS))


def _compare(cfg, ways, seeds, root, checkpoint, quiet):
    _, content, *_, gap = check(cfg, checkpoint)
    if gap:
        raise UserError(f'nothing to compare on: {gap}')
    weights = in_own_layout(content, root)
    source = Path(content['path'])  # or the name of timm's weights
    stat = [source.stat().st_size, source.stat().st_mtime_ns] if source.exists() else []
    common = dict(software=_software(cfg), checkpoint=[str(source.absolute()), *stat], weights=content.get('weights'),
                  model=cfg.model, test=cfg.test_dataloader, evaluator=cfg.test_evaluator,
                  seed=(cfg.get('randomness') or {}).get('seed'))
    folder = OwnedFolder(root.path / 'full_precision')
    full = _done(folder, common, lambda _: _evaluate(cfg, weights, folder, quiet))
    found: dict[str, dict] = {}
    for seed in seeds:
        seeded = cfg if seed is None else cfg.copy()
        if seed is not None:
            seeded.randomness = dict(cfg.get('randomness') or {}, seed=seed)
            common = dict(common, seed=seed)
        for name, result in _runs(seeded, ways, seed, common, root, weights, quiet).items():
            found.setdefault(name, {})[seed] = result
    runs = {name: over_seeds(results) if len(results) > 1 else next(iter(results.values()))
            for name, results in found.items()}
    return dict(full_precision=full, runs=runs)


def _runs(cfg, ways, seed, common, root, weights, quiet):
    """Return the results of all ways with one seed, by name."""
    runs, images, fresh = {}, {}, None
    for way in ways:
        weight, activation, method, recipe = way
        name, drawn = _name(*way), method.startswith('psaq')
        folder = OwnedFolder(root.path / _folder(*way, seed))
        changed = with_stanza(cfg, weight=dict(bits=weight), activation=dict(bits=activation),
                              synthesis=dict(method=method), report=dict(reuse=fresh) if fresh else {},
                              **(dict(recipe=recipe) if recipe else {}))
        parsed = QuantizationConfig.parse(changed.quantization)
        if method == 'psaq_v2' and not parsed.game.steps and (weight, activation, 'psaq_v1', recipe) in ways:
            print_log(f'{name} is left out: without a game (quantization.game.steps = 0) it is the same as psaq_v1',
                      'current')
            continue
        recipe = parsed.recipe
        reused = images.get(recipe) if drawn else None
        if reused:
            changed = with_stanza(changed, synthesis=dict(reuse=reused['path']))
        changed.work_dir = str(folder.path)
        stanza = QuantizationConfig.parse(changed.quantization).to_dict()
        del stanza['report']  # judges the model and does not change it
        if method != 'psaq_v2' and not stanza['reconstruction']['steps']:
            del stanza['game']  # not played, and no views as in the game
        inputs = dict(common, stanza=stanza, calib=method == 'real' and cfg.get('calib_dataloader'),
                      images=reused and reused['made'])
        files = ['quantized.pth', 'test_config.py'] + ['synthetic.pt'] * (method != 'real')
        result = runs[name] = _done(folder, inputs, functools.partial(_quantize, changed, weights, quiet), files)
        if reused:  # V2's first stage counts, though it was done once for all
            runs[name] = dict(result, minutes=round(result['minutes'] + reused['minutes'], 2))
        if fresh is None and (folder.path / 'fresh.pt').exists():  # all are judged by the same
            fresh = str(folder.path / 'fresh.pt')
        if drawn and not reused:
            path = folder.path / 'synthetic.pt'
            images[recipe] = dict(path=str(path), made=path.stat().st_mtime_ns, minutes=result['synthesis_minutes'])
    return runs
