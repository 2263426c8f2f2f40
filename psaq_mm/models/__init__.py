"""What differs between model families, and building a quantized model from its config."""
from .adapters import adapt, adapts
from .attention import attention_blocks, backbone_of, checkpoint_blocks, similarity_taps
from .build import build_quantized_model, copy_model, quantize_model, quantize_model_config, scope
from .converters import PATCH_BIAS, convert_state, convert_swin, is_original_swin
from .features import beyond_features, extract_features, extract_inner

__all__ = [
    'PATCH_BIAS', 'adapt', 'adapts', 'attention_blocks', 'backbone_of', 'beyond_features', 'build_quantized_model',
    'checkpoint_blocks', 'convert_state', 'convert_swin', 'copy_model', 'extract_features', 'extract_inner',
    'is_original_swin', 'quantize_model', 'quantize_model_config', 'scope', 'similarity_taps'
]
