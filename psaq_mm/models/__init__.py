"""What differs between model families, and building a quantized model from its config."""
from .adapters import adapt, adapts
from .attention import attention_blocks, checkpoint_blocks, head_tap, similarity_taps
from .backbones import BACKBONES, FEATURE_PARTS, backbone_name, backbone_of, default_targets, predictor_of
from .build import build_quantized_model, copy_model, quantize_model, quantize_model_config, resolved, scope
from .classes import class_counts, explain_classes
from .features import beyond_features, extract_features, extract_inner, telling, telling_features
from .fetching import nothing_fetched, without_pretrained
from .images import DEFAULT_SIZE, default_size, image_channels, own_size, pixel_statistics, swaps_channels

__all__ = [
    'BACKBONES', 'DEFAULT_SIZE', 'FEATURE_PARTS', 'adapt', 'adapts', 'attention_blocks', 'backbone_name',
    'backbone_of', 'beyond_features', 'build_quantized_model', 'checkpoint_blocks', 'class_counts', 'copy_model',
    'default_size', 'default_targets', 'explain_classes', 'extract_features', 'extract_inner', 'head_tap',
    'image_channels', 'nothing_fetched', 'own_size', 'pixel_statistics', 'predictor_of', 'quantize_model',
    'quantize_model_config', 'resolved', 'scope', 'similarity_taps', 'swaps_channels', 'telling', 'telling_features',
    'without_pretrained'
]
