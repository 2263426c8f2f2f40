"""What differs between model families, and building a quantized model from its config."""
from .adapters import adapt, adapts
from .attention import attention_blocks, backbone_of, checkpoint_blocks, similarity_taps
from .build import build_quantized_model, copy_model, quantize_model, quantize_model_config, scope
from .classes import class_counts, explain_classes
from .features import beyond_features, extract_features, extract_inner

__all__ = [
    'adapt', 'adapts', 'attention_blocks', 'backbone_of', 'beyond_features', 'build_quantized_model',
    'checkpoint_blocks', 'class_counts', 'copy_model', 'explain_classes', 'extract_features', 'extract_inner',
    'quantize_model', 'quantize_model_config', 'scope', 'similarity_taps'
]
