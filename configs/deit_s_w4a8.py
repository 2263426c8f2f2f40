_base_ = ['./_base_/imagenet.py', './_base_/dfq_timm.py']
# pretrained=True fetches timm's weights; for a local file set load_from, or pass --checkpoint FILE.
model = dict(type='TimmClassifier', model='deit_small_patch16_224', pretrained=True)
quantization = dict(weight=dict(bits=4), activation=dict(bits=8), targets=['backbone', 'head'])
