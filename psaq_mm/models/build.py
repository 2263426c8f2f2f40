"""The two doors to conversion share one function: :func:`quantize_model`.

Door one is a hook (:class:`psaq_mm.engine.QuantizationHook`), for whatever a Runner drives. Door two is a type in the
model registry, for ``init_detector``, the Inferencers and every other tool that only builds ``cfg.model``.
"""
from __future__ import annotations

import copy

from mmengine.registry import MODELS as ROOT_MODELS
from torch import nn

from ..errors import UserError
from ..quantization import (
    CONTEXT,
    OUTPUT,
    SUMS,
    LayerConfig,
    QuantizerMismatchError,
    attention_parts,
    convert,
    convert_attention,
    quantizable,
    quantize_output,
    quantize_residual,
    quantizers,
    settle,
)
from ..registry import MODELS
from ..stanza import ROOT, QuantizationConfig
from .adapters import adapt
from .attention import attention_blocks, backbone_of, layer_types


def quantize_model(model: nn.Module, quantization) -> nn.Module:
    """Converts backbone and neck (or whatever the stanza targets) in place; a converted model is left as it is.

    Args:
        model (nn.Module): With float weights, loaded or not.
        quantization (dict | QuantizationConfig): The stanza.

    Raises:
        StanzaError: If the stanza is wrong.
        PatternError: If a target or a pattern matches nothing.
    """
    if quantizers(model):
        return model
    quantization = QuantizationConfig.parse(quantization)
    adapt(model)
    targets = scope(model, quantization)
    kinds = layer_types()
    layers = quantizable(model, targets, kinds)
    outputs = between_layers(model, targets, kinds) if quantization.placement == 'all' else {}
    configs = quantization.layer_configs({**layers, **outputs})
    convert(model, layers, configs, kinds)
    for module in list(backbone_of(model).modules()):  # attention left in float still shows its products to synthesis
        if attention_parts(module) and not hasattr(module, CONTEXT):
            convert_attention(module, {})
    quantize_outputs(model, [name for name in outputs if name in configs], configs)
    model.register_load_state_dict_pre_hook(_refuse_other_quantizers)
    return model


def scope(model: nn.Module, quantization: QuantizationConfig) -> list[str]:
    """Names of the submodules that are quantized: the targets, less a neck that this model has not."""
    return [t for t in quantization.targets if t != 'neck' or getattr(model, 'with_neck', True)]


def between_layers(model: nn.Module, targets: list[str], layers: dict) -> dict[str, nn.Module]:
    """What placement 'all' quantizes besides the layers, by name: ``attention_sum`` and ``mlp_sum`` of the backbone's
    attention blocks inside the targets, and ``output`` of a target that is a single layer.

    Args:
        model (nn.Module): Not converted yet.
        targets (list[str]): Names of submodules.
        layers (dict): Float layers that can be quantized, by their forward function.

    Raises:
        UserError: If there is nothing.
    """
    names = {module: name for name, module in model.named_modules()}
    found = {f'{names[block]}.{part}': block for block in attention_blocks(backbone_of(model)) for part in SUMS
             if f'{names[block]}.'.startswith(tuple(f'{target}.' for target in targets))}
    for target in targets:
        if type(model.get_submodule(target)).forward in layers:
            found[f'{target}.{OUTPUT}'] = model.get_submodule(target)
    if not found:
        raise UserError(f"{ROOT}.placement = 'all': the targets ({', '.join(targets)}) hold no attention block of the "
                        'backbone and are no single layer')
    return found


def quantize_outputs(model: nn.Module, names: list[str], configs: dict[str, LayerConfig]) -> None:
    """Adds the quantizers between layers to a converted model, in place.

    Args:
        model (nn.Module): The model to change.
        names (list[str]): Of :func:`between_layers`.
        configs (dict[str, LayerConfig]): What each gets.
    """
    blocks = {}
    for name in names:
        owner, _, part = name.rpartition('.')
        if part == OUTPUT:
            quantize_output(model.get_submodule(owner), configs[name].activation)
        else:
            blocks.setdefault(owner, {})[part] = configs[name].activation
    for name, parts in blocks.items():
        quantize_residual(model.get_submodule(name), parts)
    settle(model)


def _refuse_other_quantizers(model, state_dict, prefix, *unused):
    """Scales for what this model keeps in float would be dropped without a word, and others stay unknown: not here."""
    own = {f'{prefix}{name}.scale' for name in quantizers(model, every_name=True)}
    theirs = {key for key in state_dict if key.startswith(prefix) and key.endswith('_quantizer.scale')}
    for keys, saved, wanted in ((theirs - own, 'quantizes', 'keeps it in float'),
                                (own - theirs if theirs else (), 'keeps in float', 'quantizes it')):
        if keys:
            name = min(keys).removesuffix('.scale').removesuffix('_quantizer')
            raise QuantizerMismatchError(
                f"the checkpoint {saved} '{name}' (and {len(keys) - 1} more), the config {wanted}: use the test config "
                'written beside the checkpoint, or correct quantization (targets, placement, keep_float).')


@MODELS.register_module('QuantizedModel')
def build_quantized_model(float_type: str, quantization: dict, **model) -> nn.Module:
    """Builds the float model and converts it; what comes out is an instance of the float type.

    Args:
        float_type (str): Registered name of the float model, e.g. 'MaskRCNN'.
        quantization (dict): The stanza.
        **model: The float model's own config.
    """
    return quantize_model(ROOT_MODELS.build(dict(type=float_type, **model)), quantization)


def quantize_model_config(model: dict, quantization: QuantizationConfig) -> dict:
    """The config from which any tool builds the quantized model: the float one with another type and the stanza."""
    model = copy.deepcopy(model)
    model['float_type'] = model['type']
    model['type'] = 'psaq_mm.QuantizedModel'
    model['quantization'] = quantization.to_dict()
    return model


def copy_model(model: nn.Module) -> nn.Module:
    """Copy a model with its weights; both share what cannot be copied, as a runtime's session or an open file.

    Args:
        model (nn.Module): Left as it is.

    Raises:
        UserError: If that does not help, either.
    """
    try:
        return copy.deepcopy(model)
    except Exception:  # of what modules hold besides weights, which may be the user's own
        shared = {}
    modules, torch_own = {id(module): module for module in model.modules()}, vars(nn.Module()).keys()
    for module in model.modules():
        for name, value in vars(module).items():
            if name not in torch_own and id(value) not in modules:
                try:
                    copy.deepcopy(value, dict(modules))  # a bound method is no obstacle, and is not shared
                except Exception:
                    shared[id(value)] = value
    try:
        return copy.deepcopy(model, shared)
    except Exception as error:
        raise UserError(f'{type(model).__name__} cannot be copied ({type(error).__name__}: {error}), and the student '
                        'needs a teacher beside it: give what it holds a __deepcopy__') from error
