# What a config inherits beside its zoo config to be quantized. Only keys that no zoo config defines.
# Every setting has a default: quantization = dict() is W8A8 by PSAQ-ViT V2, backbone and neck.
quantization = dict()
# Lets mmdet's own tools/test.py build the quantized model from this config.
runner_type = 'psaq_mm.QuantizationRunner'
