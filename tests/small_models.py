"""Detectors that are small enough to be traced in a second, of each kind, with random weights that find objects."""
import copy

import torch
from mmengine.config import Config
from torch import nn

PREPROCESSOR = dict(type='DetDataPreprocessor', mean=[123.7, 116.3, 103.5], std=[58.4, 57.1, 57.4], bgr_to_rgb=True,
                    pad_size_divisor=32)
BACKBONE = dict(type='ResNet', depth=18, base_channels=8, frozen_stages=-1, norm_cfg=dict(type='BN'))
PYRAMID = dict(type='FPN', in_channels=[8, 16, 32, 64], out_channels=16, num_outs=5)
TEST_CFG = dict(nms_pre=100, min_bbox_size=0, score_thr=0.05, nms=dict(type='nms', iou_threshold=0.5), max_per_img=10)
SCALES = dict(retina_cls=0.015, retina_reg=0.04, conv_cls=0.5, conv_reg=0.2)  # of last weights
MODELS = dict(
    RetinaNet=dict(
        neck=dict(PYRAMID, start_level=1, add_extra_convs='on_input'), test_cfg=TEST_CFG,
        bbox_head=dict(type='RetinaHead', num_classes=3, in_channels=16, stacked_convs=1, feat_channels=16,
                       anchor_generator=dict(type='AnchorGenerator', octave_base_scale=4, scales_per_octave=3,
                                             ratios=[0.5, 1., 2.], strides=[8, 16, 32, 64, 128]),
                       bbox_coder=dict(type='DeltaXYWHBBoxCoder'))),
    FCOS=dict(
        neck=dict(PYRAMID, start_level=1, add_extra_convs='on_output', relu_before_extra_convs=True),
        bbox_head=dict(type='FCOSHead', num_classes=3, in_channels=16, stacked_convs=1, feat_channels=16,
                       strides=[8, 16, 32, 64, 128], norm_cfg=dict(type='GN', num_groups=4)), test_cfg=TEST_CFG),
    CondInst=dict(
        neck=dict(PYRAMID, start_level=1, add_extra_convs='on_output', relu_before_extra_convs=True),
        bbox_head=dict(type='CondInstBboxHead', num_params=169, num_classes=3, in_channels=16, stacked_convs=1,
                       feat_channels=16, strides=[8, 16, 32, 64, 128], norm_on_bbox=True, centerness_on_reg=True,
                       norm_cfg=dict(type='GN', num_groups=4)),
        mask_head=dict(type='CondInstMaskHead', num_layers=3, feat_channels=8, size_of_interest=8, mask_out_stride=4,
                       loss_mask=dict(type='DiceLoss', activate=True),
                       mask_feature_head=dict(in_channels=16, feat_channels=16, start_level=0, end_level=2,
                                              out_channels=8, mask_stride=8, num_stacked_convs=1,
                                              norm_cfg=dict(type='BN'))),
        test_cfg=dict(TEST_CFG, mask_thr=0.5)),
)


def small_model(name):
    """Return config and model."""
    from mmdet.registry import MODELS as DETECTORS
    torch.manual_seed(0)
    model = dict(type=name, data_preprocessor=PREPROCESSOR, backbone=BACKBONE, **MODELS[name])
    cfg = Config(dict(default_scope='mmdet', model=copy.deepcopy(model)))
    model = DETECTORS.build(copy.deepcopy(cfg.model)).eval()
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):  # heads begin with weights that tell nothing apart
            nn.init.kaiming_normal_(module.weight)
            module.weight.data *= SCALES.get(name.rpartition('.')[2], 1)
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    model.train()
    with torch.no_grad():  # norms see images, so that numbers do not grow from layer to layer
        images = list(pictures(2, 96, 128).permute(0, 3, 1, 2))
        model.extract_feat(model.data_preprocessor(dict(inputs=images))['inputs'])
    return cfg, model.eval()


def pictures(count, height, width):
    """Return images of smooth patches, (B, H, W, 3) uint8."""
    noise = torch.rand(count, 3, height // 12 + 1, width // 12 + 1, generator=torch.Generator().manual_seed(0)) * 255
    images = nn.functional.interpolate(noise, (height, width), mode='bicubic').clamp(0, 255)
    return images.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
