"""What differs between model families, and building a quantized model from its config."""
from .attention import ATTENTIONS, attention_blocks, attention_taps, attention_types, checkpoint_blocks
from .build import build_quantized_model, quantize_model, quantize_model_config, scope
from .converters import PATCH_BIAS, convert_state, convert_swin, is_original_swin
from .features import beyond_features, extract_features, extract_inner

__all__ = [
    'ATTENTIONS', 'PATCH_BIAS', 'attention_blocks', 'attention_taps', 'attention_types', 'beyond_features',
    'build_quantized_model', 'checkpoint_blocks', 'convert_state', 'convert_swin', 'extract_features',
    'extract_inner', 'is_original_swin', 'quantize_model', 'quantize_model_config', 'scope'
]
