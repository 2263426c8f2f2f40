_base_ = ['./_base_/imagenet.py', './_base_/dfq_timm.py']
# pretrained=True fetches timm's weights; for a local file set load_from, or pass --checkpoint FILE.
model = dict(type='TimmClassifier', model='swin_small_patch4_window7_224.ms_in1k', pretrained=True)
quantization = dict(weight=dict(bits=4), activation=dict(bits=8), targets=['backbone', 'head'])
