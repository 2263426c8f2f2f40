"""The ``quantization = dict(...)`` stanza of a config, parsed once into a frozen object."""
from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator
from typing import Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from .errors import UserError
from .quantization import ActivationConfig, FrozenConfig, LayerConfig, WeightConfig
from .quantization.conversion import match
from .recipes import RECIPES
from .reconstruction import ReconstructionConfig
from .synthesis import GameConfig, SynthesisConfig

ROOT = 'quantization'
# What a recipe answers for: settings of the method, less bits, files, and what goes by the model or the memory at hand.
METHOD = dict(include={'reparameterize', 'weight', 'activation', 'synthesis', 'reconstruction', 'game'},
              exclude=dict(weight={'bits'}, activation={'bits'},
                           synthesis={'reuse', 'size', 'batch_size', 'checkpointing'}))


class StanzaError(UserError):
    """The stanza has an unknown key, a wrong type or an impossible value; the message names it and what is allowed."""


class LayerOverride(FrozenConfig):
    """Other settings for the layers whose name matches a shell-style pattern."""
    pattern: str = Field(description="e.g. 'backbone.stages.0.*', '*.ffn.layers.1'")
    weight: dict | None = Field(None, description='keys of quantization.weight to change')
    activation: dict | None = Field(None, description='keys of quantization.activation to change')


class ReportConfig(FrozenConfig):
    """What ``report.html`` measures without data."""
    images: int = Field(
        16, ge=0, description='images synthesised after everything else, to compare the quantized model with full '
        'precision on: neither has seen them; 0: no such comparison')
    reuse: str | None = Field(
        None, description="'fresh.pt' of an earlier run on the same model: take its images instead")


class QuantizationConfig(FrozenConfig):
    """The whole stanza. ``quantization = dict()`` is W8A8, PSAQ-ViT V2, backbone and neck."""
    weight: WeightConfig = WeightConfig()
    activation: ActivationConfig = ActivationConfig()
    targets: tuple[str, ...] | None = Field(
        None, strict=False, min_length=1,
        description="submodules, heads too: 'decode_head', 'roi_head.mask_head'; None: backbone and neck, wherever the "
        'model holds them')
    patch_embed_bits: int = Field(8, ge=2, le=8, description='of layers that read the pixels, weight and input')
    placement: Literal['operands', 'all'] = Field(
        'operands', description="which activations are quantized: 'operands' of products and convolutions; 'all': "
        "besides, both residual sums of each attention block, and what a target that is a single layer puts out (a "
        "classifier's logits): two more of the places where V1's code quantizes")
    keep_float: tuple[str, ...] = Field((), strict=False, description='name patterns of layers left in float')
    overrides: tuple[LayerOverride, ...] = Field((), strict=False, description='later ones win')
    load_weights: Literal['ema', 'plain'] | None = Field(
        None, description="of a checkpoint that holds two sets: 'ema', averaged over training, or 'plain'. None: what "
        "the library's own test tool loads")
    recipe: Literal[tuple(RECIPES)] | None = Field(
        None, description="defaults that belong together: 'paper', those of PSAQ-ViT V2; 'low_bit', ours for fewer "
        "than 8 bits: images from dead leaves, norms reparameterised, a range for each attention head, every block "
        "reconstructed, then the game. What you set yourself wins. None: 'paper' where all weights and activations "
        "have 8 bits, else 'low_bit'")
    reparameterize: bool = Field(
        False, description='bring the channels behind LayerNorms to one range, exact in float and free at inference')
    synthesis: SynthesisConfig = SynthesisConfig()
    reconstruction: ReconstructionConfig = ReconstructionConfig()
    game: GameConfig = GameConfig()
    report: ReportConfig = ReportConfig()

    @model_validator(mode='after')
    def _check_overrides(self):
        for index, override in enumerate(self.overrides):
            for side, base in (('weight', self.weight), ('activation', self.activation)):
                try:
                    _changed(base, getattr(override, side))
                except ValidationError as error:
                    raise StanzaError(_explain(error, type(base), f'{ROOT}.overrides.{index}.{side}')) from None
        return self

    @model_validator(mode='after')
    def _check_reuse(self):
        if self.synthesis.reuse and not self.synthesis.method.startswith('psaq'):
            raise StanzaError(f'{ROOT}.synthesis.reuse = {self.synthesis.reuse!r}: only for psaq_v1 and psaq_v2, '
                              f"not for '{self.synthesis.method}'")
        return self

    @classmethod
    def parse(cls, raw) -> QuantizationConfig:
        """Checks the raw stanza.

        Args:
            raw (dict | ConfigDict | QuantizationConfig): From the config file.

        Raises:
            StanzaError: Naming key, value and what is allowed, one line for each mistake.
        """
        if isinstance(raw, cls):
            return raw.settled()
        if not isinstance(raw, dict):
            raise StanzaError(f'{ROOT} = {raw!r}: must be a dict, e.g. quantization = dict(weight=dict(bits=4))')
        try:
            return cls.model_validate(_plain(raw)).settled()
        except ValidationError as error:
            raise StanzaError(_explain(error, cls, ROOT)) from None

    def settled(self) -> QuantizationConfig:
        """Return the stanza with the defaults of its recipe, and the recipe named.

        Raises:
            StanzaError: Where there are too few images for the game, or settings exclude each other.
        """
        recipe = self.recipe or ('low_bit' if self.least_bits < 8 else 'paper')
        defaults = dict(RECIPES[recipe])
        if self.synthesis.method == 'noise':  # stays what it says
            defaults.pop('synthesis', None)
        found = _with_defaults(self.model_copy(update=dict(recipe=recipe)), defaults)
        if found.synthesis.method == 'psaq_v2' and found.game.steps and found.synthesis.num_images < 2:
            raise StanzaError(f'{ROOT}.synthesis.num_images = {found.synthesis.num_images}: at least 2 for the game, '
                              f'one evolves and one is held back. Or leave the game out: {ROOT}.game.steps=0')
        played = found.synthesis.method == 'psaq_v2' and found.game.steps
        heard = {'synthesis.agreement': found.synthesis.agreement, 'game.heads': found.game.heads * bool(played)}
        for key, weight in heard.items():
            if weight and found.synthesis.checkpointing:
                raise StanzaError(f'{ROOT}.{key} = {weight} and {ROOT}.synthesis.checkpointing = True: one of the two, '
                                  'as blocks that are computed again show no heads')
        return found

    @property
    def departures(self) -> list[str]:
        """What the stanza says otherwise than its recipe does by itself, as 'synthesis.num_images=24'.

        A method that is not the recipe's, as 'noise', is named, and with it what is set otherwise than it has alone.
        """
        settled = self.settled()
        bare = {side: dict(bits=getattr(self, side).bits) for side in ('weight', 'activation')}
        bare.update(recipe=settled.recipe, synthesis=dict(method=settled.synthesis.method))
        usual = dict(flat(QuantizationConfig.parse(bare).model_dump(**METHOD)))
        usual['synthesis.method'] = SynthesisConfig().method
        return [f'{name}={value!r}' for name, value in flat(settled.model_dump(**METHOD)) if value != usual[name]]

    @property
    def least_bits(self) -> int:
        """The fewest bits of any weight or activation that the stanza names."""
        return min([self.weight.bits, self.activation.bits, self.patch_embed_bits] + [
            side['bits'] for override in self.overrides for side in (override.weight, override.activation)
            if side and 'bits' in side])

    def layer_configs(self, layers) -> dict[str, LayerConfig]:
        """What each quantizable layer gets.

        Args:
            layers (dict[str, nn.Module]): From :func:`psaq_mm.quantization.quantizable`.

        Returns:
            dict[str, LayerConfig]: Layers kept in float are left out.

        Raises:
            PatternError: If a pattern matches no layer.
        """
        configs = {}
        for name, module in layers.items():
            weight, activation = self.weight, self.activation
            if reads_pixels(module):
                weight = _changed(weight, dict(bits=self.patch_embed_bits))
                activation = _changed(activation, dict(bits=self.patch_embed_bits))
            configs[name] = LayerConfig(weight=weight, activation=activation)
        for override in self.overrides:
            for name in match(override.pattern, layers):
                old = configs[name]
                configs[name] = LayerConfig(
                    weight=_changed(old.weight, override.weight),
                    activation=_changed(old.activation, override.activation))
        for pattern in self.keep_float:
            for name in match(pattern, layers):
                configs.pop(name, None)
        return configs

    @property
    def searches_weight_ranges(self) -> bool:
        """Whether a run gives weights the ranges of least squared error, before its reconstruction or its game."""
        if self.reconstruction.steps:
            return self.reconstruction.weight_ranges == 'mse'
        return bool(self.synthesis.method == 'psaq_v2' and self.game.steps and self.game.weight_ranges == 'mse')

    @property
    def student_lr(self) -> float:
        """The game's learning rate for the student, by default in proportion to the weights' quantization step.

        Our choice, by trials on DeiT-Tiny.
        """
        return self.game.student_lr or 6e-6 * 2**(8 - self.weight.bits)

    @property
    def reconstruction_lr(self) -> float:
        """The reconstruction's learning rate for weights, in proportion to their quantization step."""
        return self.reconstruction.lr or 3e-5 * 2**(8 - self.weight.bits)

    def to_dict(self) -> dict:
        """The complete stanza, defaults spelled out, as plain lists and dicts that a config file can hold."""
        return self.model_dump(mode='json')


def reads_pixels(layer) -> bool:
    """Whether a layer reads the image itself, as the patch embedding or a stem does; the conversion finds out."""
    return getattr(layer, 'reads_pixels', False)


def flat(nested: dict, before: str = '') -> Iterator[tuple[str, object]]:
    """Yield the values in nested dicts with their dotted names."""
    for name, value in nested.items():
        if isinstance(value, dict):
            yield from flat(value, f'{before}{name}.')
        else:
            yield before + name, value


def _with_defaults(config: FrozenConfig, defaults: dict) -> FrozenConfig:
    """Return settings where other defaults stand for what nobody set; nested dicts for nested settings."""
    changes = {}
    for name, value in defaults.items():
        inner = getattr(config, name)
        if isinstance(value, dict):
            changes[name] = _with_defaults(inner, value)
        elif name not in config.model_fields_set:
            changes[name] = value
    return config.model_copy(update=changes)


def _changed(config, changes):
    return type(config).model_validate({**config.model_dump(), **changes}) if changes else config


def _plain(value):
    """Dicts and lists of plain Python types, whatever subclass of them the config file gave."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value) if type(value) in (list, tuple) else list(value)
    return value


def _model_at(cls, location):
    """The settings class that a pydantic error location leads into, or None."""
    for part in location:
        if isinstance(part, int):
            continue
        field = cls.model_fields.get(part)
        kinds = [field.annotation, *typing.get_args(field.annotation)] if field else []
        cls = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
        if cls is None:
            return None
    return cls


def _explain(error: ValidationError, cls, root: str) -> str:
    lines = []
    for item in error.errors(include_url=False):
        location = item['loc']
        path = '.'.join([root, *(key if (key := str(part)).isprintable() else repr(key) for part in location)])
        if item['type'] == 'extra_forbidden':
            owner = _model_at(cls, location[:-1])
            allowed = sorted(owner.model_fields)
            hint = difflib.get_close_matches(str(location[-1]), allowed, 1, 0.5)
            lines.append(f"{path} = {item['input']!r}: unknown key" + (f", did you mean '{hint[0]}'?" if hint else '') +
                         f" (allowed: {', '.join(allowed)})")
            continue
        text = item['msg'].removeprefix('Value error, ')
        if text.startswith(f'{ROOT}.'):  # explained already, by a nested check
            lines.append(text)
            continue
        text = text[0].lower() + text[1:]
        if item['type'] == 'literal_error':
            expected = item['ctx']['expected']
            words = expected.replace("'", '').replace(' or ', ', ').split(', ')
            hint = difflib.get_close_matches(str(item['input']), words, 1, 0.5)
            text = (f"did you mean '{hint[0]}'? " if hint else '') + f'(allowed: {expected})'
        lines.append(f"{path} = {item['input']!r}: {text}")
    return '\n'.join(dict.fromkeys(lines))
