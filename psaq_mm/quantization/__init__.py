"""Quantizers, observers, quantized layers and the conversion that swaps them in. Knows only torch."""
from .config import ActivationConfig, FrozenConfig, LayerConfig, WeightConfig
from .conversion import (
    LAYERS,
    PatternError,
    calibrate,
    convert,
    match,
    model_bits,
    quantizable,
    quantized_layers,
    quantizer_mode,
    quantizers,
    set_mode,
    unused_quantizers,
)
from .layers import CONTEXT, SCORES, QuantizedConv2d, QuantizedLinear, QuantizedMatMul, quantize_attention
from .quantizer import FakeQuantizer, Mode, QuantizerMismatchError, UncalibratedError

__all__ = [
    'ActivationConfig', 'CONTEXT', 'FakeQuantizer', 'FrozenConfig', 'LAYERS', 'LayerConfig', 'Mode', 'PatternError',
    'QuantizedConv2d', 'QuantizedLinear', 'QuantizedMatMul', 'QuantizerMismatchError', 'SCORES', 'UncalibratedError',
    'WeightConfig', 'calibrate', 'convert', 'match', 'model_bits', 'quantizable', 'quantize_attention',
    'quantized_layers', 'quantizer_mode', 'quantizers', 'set_mode', 'unused_quantizers'
]
