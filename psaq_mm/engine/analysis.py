"""Which layers cost the model most, and bits for each under a budget: what ``tools/analyze.py`` does."""
from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from mmengine.config import Config
from rich.table import Table
from torch import Tensor, nn

from ..errors import UserError
from ..files import OwnedFolder, as_data, read_json
from ..models import beyond_features, extract_features, quantize_model
from ..quantization import (
    ACTIVATION,
    WEIGHT,
    Choice,
    Mode,
    allocate,
    calibrate,
    model_bits,
    multiplications,
    output_error,
    parts_of,
    quantized_layers,
    reparameterize,
    search_weight_ranges,
    sensitivities,
    sqnr,
)
from ..stanza import QuantizationConfig, reads_pixels
from .checkpoint import load_float
from .display import Display
from .images import read_images
from .pipeline import MEGABYTE, build_float, check, quantize, was_interrupted, with_stanza

IMAGES = 8  # that sensitivities are measured on, at most: each part of each layer is a pass of all. Our choice
MEASURED = 'sensitivity_measured.json'
WRITTEN = (MEASURED, 'mixed_precision.py', 'sensitivity.json', 'sensitivity.png')
KEEP = 20  # seconds from one writing of what is measured to the next


def calibration_images(cfg: Config, checkpoint: str | None, quiet: bool = False) -> tuple[list[Tensor], str]:
    """Synthetic images of an earlier run in the work dir or of ``synthesis.reuse``, else of one made for this.

    Returns:
        tuple[list[Tensor], str]: Batches, (B, C, H, W) each, and the file they are in.
    """
    stanza = QuantizationConfig.parse(cfg.quantization)
    known = [stanza.synthesis.reuse, Path(cfg.work_dir) / 'synthetic.pt', Path(cfg.work_dir) / 'images/synthetic.pt']
    for path in filter(None, known):
        if path == stanza.synthesis.reuse or Path(path).exists() and synthesised(Path(path), stanza):
            return read_images(str(path)), str(path)
    made = with_stanza(cfg, synthesis=dict(method='psaq_v1'), reconstruction=dict(steps=0), report=dict(images=0))
    made.work_dir = str(Path(cfg.work_dir) / 'images')
    quantize(made, checkpoint, resume=was_interrupted(made.work_dir), eval_float=False, eval_quantized=False,
             quiet=quiet)
    path = Path(made.work_dir) / 'synthetic.pt'
    return read_images(str(path)), str(path)


def synthesised(path: Path, stanza: QuantizationConfig) -> bool:
    """Whether a ``synthetic.pt`` was made as the stanza wants it: by its recipe, at its sizes."""
    made, sizes = read_json(path.parent / 'metrics.json'), stanza.synthesis.size
    wanted = str(made.get('method')).startswith('psaq') and made.get('recipe') == stanza.recipe
    return wanted and all(sizes is None or tuple(batch.shape[2:]) in sizes for batch in read_images(str(path)))


def digest(tensors: Iterable[Tensor]) -> str:
    """A fingerprint of tensors' values."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().view(-1).numpy().tobytes())
    return found.hexdigest()


def without_bits(overrides: list[dict]) -> list[dict]:
    """Overrides less what they say of bits; those that say nothing else are left out."""
    kept = [{side: {key: value for key, value in settings.items() if key != 'bits'} if isinstance(settings, dict)
             else settings for side, settings in entry.items()} for entry in overrides]
    return [entry for entry in kept if entry.get('weight') or entry.get('activation')]


class Analysis:
    """A model, images, and what rounding each of its layers costs.

    Args:
        cfg (Config): With a stanza and ``work_dir``.
        batches (list[Tensor]): Synthetic images; calibration sees all, sensitivities the first eight.
        checkpoint (str, optional): Instead of the config's ``load_from``.

    Raises:
        UserError: As :func:`psaq_mm.engine.quantize`, before any work.
    """

    def __init__(self, cfg: Config, batches: list[Tensor], checkpoint: str | None = None):
        self.cfg = cfg
        self.quantization, self.content, *_ = check(cfg, checkpoint, False)
        self.device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
        self.batches, self.few, left = [batch.to(self.device) for batch in batches], [], IMAGES
        for batch in self.batches:
            if left > 0:
                self.few.append(batch[:left])
                left -= len(batch)
        self.heads = beyond_features(self.quantization.targets)
        self.kept = without_bits(self.quantization.to_dict()['overrides'])
        self.errors: dict[tuple[str, str, int], float] = {}  # by layer, side and bits

    def outputs(self, model: nn.Module):
        """The maps that count, as a function of images."""
        return lambda images: extract_features(model, images, self.heads)

    def converted(self, quantization: QuantizationConfig) -> nn.Module:
        """With the checkpoint's weights, not calibrated."""
        model = build_float(self.cfg).eval()
        load_float(model, self.content, quantization.targets)
        return quantize_model(model, quantization).to(self.device)

    def model(self, quantization: QuantizationConfig) -> nn.Module:
        """Converted and calibrated as a run would do it before its reconstruction or game."""
        model = self.converted(quantization)

        def run():
            for batch in self.batches:
                extract_features(model, batch, self.heads)

        if quantization.reparameterize:
            reparameterize(model, run, lambda: extract_features(model, self.few[0][:1], self.heads))
        calibrate(model, run)
        if quantization.searches_weight_ranges:
            search_weight_ranges(model, [layer.weight for layer in quantized_layers(model).values()
                                         if hasattr(layer, 'weight')])
        return model

    def at(self, weight: int, activation: int, overrides=()) -> QuantizationConfig:
        """The stanza with other bits: everywhere but where pixels are read and in what ``overrides`` name.

        Of the stanza's own overrides all but their bits are kept.
        """
        stanza = self.quantization.to_dict()
        stanza['weight']['bits'], stanza['activation']['bits'] = weight, activation
        stanza['overrides'] = [*self.kept, *overrides]
        return QuantizationConfig.parse(stanza)

    def inspect(self, bits: list[int]) -> None:
        """Finds out what the layers are, before anything is measured."""
        model = self.model(self.at(min(bits), min(bits)))
        layers = quantized_layers(model)
        self.fixed = {name for name, layer in layers.items() if reads_pixels(layer)}
        self.weights = {name: layer.weight.numel() for name, layer in layers.items()
                        if getattr(layer, 'weight_quantizer', None) is not None}
        self.names = list(layers)
        self.parts = len(parts_of(model))
        self.macs = multiplications(model, lambda: self.outputs(model)(self.few[0][:1]))
        self.least_mb = model_bits(model) / MEGABYTE

    def check_budget(self, bits: list[int], size_mb: float | None, bops: float | None) -> None:
        """Refuses what cannot be, before hours of measuring.

        Raises:
            UserError: Saying what the least is.
        """
        if size_mb is not None and size_mb < self.least_mb - 1e-6:
            raise UserError(f'--size-mb {size_mb:g}: with {min(bits)} bits everywhere the model still has '
                            f'{self.least_mb:.2f} MB. Allow more, or fewer bits with --bits')
        share = min(bits)**2 / 64
        if bops is not None and bops < share:
            raise UserError(f'--bops {bops:g}: with {min(bits)} bits everywhere {share:.3f} of the bit operations with '
                            '8 remain. Allow more, or fewer bits with --bits')

    def measure(self, bits: list[int], display: Display, folder: OwnedFolder) -> None:
        """Fills ``errors``.

        Args:
            bits (list[int]): To measure at, each for weights and activations.
            display (Display): Shows how far it is.
            folder (OwnedFolder): Keeps what is measured, so that an interrupted analysis goes on and another budget is
                quick.
        """
        stanza = self.quantization.to_dict()
        inputs = as_data(dict(
            stanza={key: value for key, value in stanza.items() if key not in ('overrides', 'report')},
            model=self.cfg.model, weights=digest(self.content['state_dict'].values()), images=digest(self.batches)))
        saved = read_json(folder.path / MEASURED)
        known = saved['errors'] if saved.get('inputs') == inputs else []
        self.errors = {(name, side, width): error for name, side, width, error in known}
        written = time.monotonic()

        def keep():
            folder.write_json(MEASURED, dict(
                inputs=inputs, errors=[[*key, error] for key, error in self.errors.items()]))

        for number, width in enumerate(bits):
            model = self.model(self.at(width, width))
            skip = {(name, side) for name, side, at in self.errors if at == width}
            done = number * self.parts + len(skip)
            for (name, side), error in sensitivities(model, self.outputs(model), self.few, skip):
                self.errors[name, side, width] = error
                done += 1
                display.show('layers', done, len(bits) * self.parts)
                if time.monotonic() > written + KEEP:
                    keep()
                    written = time.monotonic()
            keep()

    def overall(self, quantization: QuantizationConfig) -> dict:
        """The whole model under a stanza: size in MB, SQNR of outputs in dB, and that with weights alone rounded."""
        model = self.model(quantization)
        found = dict(size_mb=model_bits(model) / MEGABYTE,
                     sqnr=round(sqnr(1, output_error(model, self.outputs(model), self.few)), 2))
        for (_, side), own in parts_of(model).items():
            for quantizer in own if side == ACTIVATION else ():
                quantizer.mode = Mode.FLOAT
        return dict(found, sqnr_weights=round(sqnr(1, output_error(model, self.outputs(model), self.few)), 2))

    def overrides(self, chosen: dict[str, tuple[int, int]], weight: int, activation: int) -> list[dict]:
        """Entries for ``quantization.overrides``: of each layer that is to have other bits than the rest."""
        entries = []
        for name, (w, a) in chosen.items():
            changes = {}
            if w != weight and name in self.weights:
                changes[WEIGHT] = dict(bits=w)
            if a != activation:
                changes[ACTIVATION] = dict(bits=a)
            if changes:
                entries.append(dict(pattern=name, **changes))
        return entries

    def mixed(self, bits: list[int], size_mb: float | None = None, bops: float | None = None) -> list[dict]:
        """Bits for each layer with the least sum of errors under a budget.

        Args:
            bits (list[int]): To choose from, measured before.
            size_mb (float, optional): Megabytes of the model; activations keep the stanza's bits.
            bops (float, optional): Bit operations, as a share of those with 8 bits everywhere.

        Returns:
            list[dict]: Entries for ``quantization.overrides``.

        Raises:
            InfeasibleError: If the budget cannot be kept, see :meth:`check_budget`.
        """
        base = self.quantization
        weight, activation = base.weight.bits, base.activation.bits
        # Layers whose rounding shows in no output, as those of two-stage heads, keep the stanza's bits.
        fixed = self.fixed | {name for name in self.names if not any(
            error for (owner, _, _), error in self.errors.items() if owner == name)}
        layers = {}
        if bops is None:
            free = {name: count for name, count in self.weights.items() if name not in fixed}
            rest = model_bits(self.converted(self.at(weight, activation))) - sum(weight * n for n in free.values())
            for name, count in free.items():
                layers[name] = [Choice((width, activation), width * count, self.errors[name, WEIGHT, width])
                                for width in bits]
            budget = size_mb * MEGABYTE - rest
        else:
            for name, count in self.macs.items():
                if name in fixed:
                    continue
                layers[name] = [
                    Choice((w, a), count * w * a, self.errors[name, ACTIVATION, a]
                           + (self.errors[name, WEIGHT, w] if name in self.weights else 0))
                    for a in bits for w in (bits if name in self.weights else [a])]
            budget = bops * sum(64 * self.macs[name] for name in layers)
        if not layers:
            return []
        chosen = {name: choice.value for name, choice in allocate(layers, budget).items()}
        return self.overrides(chosen, weight, activation)

    def rows(self, bits: list[int]) -> list[dict]:
        """A row a layer, the most sensitive at the fewest bits first."""
        few = min(bits)

        def worst(name):
            return sum(self.errors.get((name, side, few), 0.0) for side in (WEIGHT, ACTIVATION))

        return [dict(name=name, weights=self.weights.get(name, 0), macs=self.macs.get(name, 0), errors={
            str(width): {side: self.errors[name, side, width] for side in (WEIGHT, ACTIVATION)
                         if (name, side, width) in self.errors} for width in bits})
            for name in sorted(self.names, key=worst, reverse=True)]


def sensitivity_table(rows: list[dict], bits: list[int], limit: int = 20) -> Table:
    """For the terminal: SQNR of the model's outputs when one side of one layer rounds."""
    table = Table(title='SQNR of the outputs, dB, when one layer alone rounds: the most sensitive first',
                  caption=f'{min(limit, len(rows))} of {len(rows)}', caption_justify='left')
    table.add_column('layer', overflow='fold')
    for width in bits:
        for side in (WEIGHT, ACTIVATION):
            table.add_column(f'{side[0].upper()}{width}', justify='right')
    for row in rows[:limit]:
        cells = [row['errors'][str(width)].get(side) for width in bits for side in (WEIGHT, ACTIVATION)]
        table.add_row(row['name'], *('-' if error is None else f'{sqnr(1, error):.1f}' for error in cells))
    return table


def with_recipe(cfg: Config, bits: Iterable[int]) -> Config:
    """The config whose stanza names the recipe that a mixture of these bits will be quantized by."""
    stanza = QuantizationConfig.parse(cfg.quantization)
    fewest = with_stanza(cfg, weight=dict(bits=min(*bits, stanza.weight.bits)))
    return with_stanza(cfg, recipe=QuantizationConfig.parse(fewest.quantization).recipe)


def suggestion(cfg: Config, checkpoint: str | None, overrides: list[dict]) -> Config:
    """The config with overrides in its stanza, complete: what ``tools/dfq.py`` runs."""
    made = copy.deepcopy(cfg)
    kept = without_bits(QuantizationConfig.parse(cfg.quantization).to_dict()['overrides'])
    made.quantization = with_stanza(cfg, overrides=kept + overrides).quantization
    if checkpoint:
        made.load_from = checkpoint
    return made

