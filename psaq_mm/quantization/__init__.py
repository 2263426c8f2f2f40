"""Quantizers, observers, quantized layers and the conversion that swaps them in. Knows only torch."""
from .allocation import Choice, InfeasibleError, allocate
from .analysis import (
    ACTIVATION,
    WEIGHT,
    LayerError,
    layer_errors,
    multiplications,
    output_error,
    parts_of,
    sensitivities,
    sqnr,
)
from .config import ActivationConfig, FrozenConfig, LayerConfig, WeightConfig
from .conversion import (
    LAYERS,
    PatternError,
    attention_parts,
    calibrate,
    convert,
    convert_attention,
    match,
    model_bits,
    quantizable,
    quantized_layers,
    quantizer_mode,
    quantizers,
    search_weight_ranges,
    set_mode,
    settle,
    show_applied_weights,
    unused_quantizers,
)
from .hooks import hooked
from .layers import (
    CONTEXT,
    SCORES,
    QuantizedConv2d,
    QuantizedConvTranspose2d,
    QuantizedLinear,
    QuantizedMatMul,
    QuantizedMultiheadAttention,
    head_count,
)
from .outputs import OUTPUT, SUMS, quantize_output, quantize_residual
from .quantizer import FakeQuantizer, Mode, QuantizerMismatchError, UncalibratedError
from .reparameterization import reparameterize

__all__ = [
    'ACTIVATION', 'ActivationConfig', 'CONTEXT', 'Choice', 'FakeQuantizer', 'FrozenConfig', 'InfeasibleError',
    'LAYERS', 'LayerConfig', 'LayerError', 'Mode', 'OUTPUT', 'PatternError', 'QuantizedConv2d',
    'QuantizedConvTranspose2d', 'QuantizedLinear', 'QuantizedMatMul', 'QuantizedMultiheadAttention',
    'QuantizerMismatchError', 'SCORES', 'SUMS', 'UncalibratedError', 'WEIGHT', 'WeightConfig', 'allocate',
    'attention_parts', 'calibrate', 'convert', 'convert_attention', 'head_count', 'hooked', 'layer_errors', 'match',
    'model_bits', 'multiplications', 'output_error', 'parts_of', 'quantizable', 'quantize_output',
    'quantize_residual', 'quantized_layers', 'quantizer_mode', 'quantizers', 'reparameterize',
    'search_weight_ranges', 'sensitivities', 'set_mode', 'settle', 'show_applied_weights', 'sqnr',
    'unused_quantizers'
]
