_base_ = [
    'mmseg::vit/vit_deit-s16_mln_upernet_8xb2-160k_ade20k-512x512.py',
    './_base_/dfq_mmseg.py', './_base_/calib_ade20k.py'
]
load_from = 'https://download.openmmlab.com/mmsegmentation/v0.5/vit/upernet_deit-s16_mln_512x512_160k_ade20k/upernet_deit-s16_mln_512x512_160k_ade20k_20210621_161021-fb9a5dfb.pth'  # noqa: E501
# The published file has a bias in the patch embedding, which mmseg 1 leaves out unless asked.
model = dict(backbone=dict(patch_bias=True))
quantization = dict(weight=dict(bits=4), activation=dict(bits=8))
