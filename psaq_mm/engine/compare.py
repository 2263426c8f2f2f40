"""Several ways to calibrate, side by side: the same model, quantizer and test data."""
from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from mmengine.config import Config

from ..stanza import QuantizationConfig
from .checkpoint import read_checkpoint
from .config import default_scope, evaluation_gap, float_config
from .pipeline import evaluate, quantize, with_stanza, write_json

LABELS = dict(noise='Gaussian noise', psaq_v1='PSAQ-ViT V1', psaq_v2='PSAQ-ViT V2', real='real images')


def _finished(path: Path, stanza: dict):
    """What an earlier run with the same stanza left, or None."""
    try:
        saved = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return saved['result'] if saved.get('stanza') == json.loads(json.dumps(stanza)) else None


def compare(cfg: Config, methods: Iterable[str], bits: Iterable[tuple[int, int]], work_dir: str,
            checkpoint: str | None = None) -> dict:
    """Quantizes by every method at every bit-width and evaluates each; finished parts are not done again.

    V1 and V2 start from the same synthesised images, as V2's first stage is V1: they are made once, and their time
    counts for both.

    Args:
        cfg (Config): With a stanza, test data, and for method 'real' a ``calib_dataloader``.
        methods (Iterable[str]): Of ``quantization.synthesis.method``.
        bits (Iterable[tuple[int, int]]): (weight, activation).
        work_dir (str): A folder for each run goes there.
        checkpoint (str, optional): Instead of the config's ``load_from``.

    Returns:
        dict: ``full_precision`` metrics; ``runs``, by 'W8A8 method', each what :func:`quantize` returns.

    Raises:
        UserError: If the config cannot be evaluated here.
    """
    from ..errors import UserError
    gap = evaluation_gap(cfg)
    if gap:
        raise UserError(f'nothing to compare on: {gap}')
    default_scope(cfg)
    root = Path(work_dir)
    weights = read_checkpoint(checkpoint or cfg.load_from)['path']
    path = root / 'full_precision.json'
    full = _finished(path, {})
    if full is None:
        full = evaluate(float_config(cfg), weights, str(root), 'full_precision')
        write_json(dict(stanza={}, result=full), path)
    runs, images = {}, None
    for weight, activation in bits:
        for method in methods:
            name = f'W{weight}A{activation} {method}'
            synthesis = dict(method=method)
            if method.startswith('psaq') and images is not None:
                synthesis['reuse'] = images['path']
            changed = with_stanza(cfg, weight=dict(bits=weight), activation=dict(bits=activation), synthesis=synthesis)
            stanza = QuantizationConfig.parse(changed.quantization).to_dict()
            changed.work_dir = str(root / name.replace(' ', '_'))
            path = Path(changed.work_dir) / 'compared.json'
            result = _finished(path, stanza)
            if result is None:
                result = quantize(changed, weights, resume=True, eval_float=False)
                if 'reuse' in synthesis:
                    result['minutes'] = round(result['minutes'] + images['minutes'], 2)
                write_json(dict(stanza=stanza, result=result), path)
            if method.startswith('psaq') and images is None:
                images = dict(path=str(Path(changed.work_dir) / 'synthetic.pt'),
                              minutes=result['synthesis_minutes'])
            runs[name] = result
    return dict(full_precision=full, runs=runs)
