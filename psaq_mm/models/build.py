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
    ActivationConfig,
    QuantizedLayer,
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
from .attention import attention_blocks, attention_types, layer_types


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
    targets = [t for t in quantization.targets if t != 'neck' or getattr(model, 'with_neck', True)]
    kinds = layer_types()
    attentions = attention_types()
    layers = quantizable(model, targets, attentions, kinds)
    convert(model, layers, quantization.layer_configs(layers), kinds)
    for module in list(model.backbone.modules()):  # attention left in float still shows its products to synthesis
        if attention_parts(module, attentions) and not hasattr(module, CONTEXT):
            convert_attention(module, {})
    if quantization.placement == 'all':
        quantize_outputs(model, targets, quantization.activation)
    model.register_load_state_dict_pre_hook(_refuse_other_quantizers)
    return model


def quantize_outputs(model: nn.Module, targets: list[str], config: ActivationConfig) -> None:
    """Quantizes what lies between the layers inside the targets, in place: residual sums of the backbone's attention
    blocks, and the output of a target that is a single layer.

    Raises:
        UserError: If there is neither.
    """
    names = {module: f'{name}.' for name, module in model.named_modules()}
    blocks = [block for block in attention_blocks(model.backbone)
              if names[block].startswith(tuple(f'{target}.' for target in targets))]
    singles = [layer for layer in map(model.get_submodule, targets) if isinstance(layer, QuantizedLayer)]
    if not blocks and not singles:
        raise UserError(f"{ROOT}.placement = 'all': the targets ({', '.join(targets)}) hold no attention block of the "
                        'backbone and are no single layer')
    for block in blocks:
        quantize_residual(block, config)
    for layer in singles:
        quantize_output(layer, config)
    settle(model)


def _refuse_other_quantizers(model, state_dict, prefix, *unused):
    """Scales for layers that this model keeps in float would be dropped without a word: not here."""
    own = {f'{prefix}{name}.scale' for name in quantizers(model)}
    extra = [key for key in state_dict if key.endswith('_quantizer.scale') and key not in own]
    if extra:
        raise QuantizerMismatchError(
            f"the checkpoint quantizes '{extra[0].removesuffix('.scale')}' (and {len(extra) - 1} more), the config "
            'keeps that layer in float: use the test config written beside the checkpoint, or correct quantization.')


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
