"""What differs between model families, and building a quantized model from its config."""
from .attention import ATTENTIONS, AttentionSpec, attention_taps, attention_types
from .build import build_quantized_model, quantize_model, quantize_model_config
from .features import extract_features

__all__ = [
    'ATTENTIONS', 'AttentionSpec', 'attention_taps', 'attention_types', 'build_quantized_model', 'extract_features',
    'quantize_model', 'quantize_model_config'
]
