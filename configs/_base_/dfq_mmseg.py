# dfq.py for mmseg configs: mmseg's own tools/test.py builds its Runner without asking for runner_type, so the hook that
# converts the model is named here. (No zoo config of mmseg defines custom_hooks; many of mmdet do.)
quantization = dict()
custom_hooks = [dict(type='psaq_mm.QuantizationHook')]
