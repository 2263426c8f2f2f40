_base_ = ['./_base_/cascade_mask_rcnn_swin_t.py', './_base_/dfq.py', './_base_/calib_coco.py']
# Written by mmdet 2: recognised and converted when it is loaded.
load_from = 'https://github.com/SwinTransformer/storage/releases/download/v1.0.2/cascade_mask_rcnn_swin_tiny_patch4_window7.pth'  # noqa: E501
quantization = dict(weight=dict(bits=4), activation=dict(bits=8))
