# dfq.py and dfq_mmseg.py together: a classifier's config is for the test tool of either library.
quantization = dict()
runner_type = 'psaq_mm.QuantizationRunner'
custom_hooks = [dict(type='psaq_mm.QuantizationHook')]
