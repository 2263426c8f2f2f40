# A small UperNet + Swin (32 channels, depths 2-2-4-2, window 7) on the rendered scenes' semantic maps: a plain mmseg
# config, without a quantization stanza. demo/train.py trained the shipped checkpoint with it, from the detector's
# backbone.
_base_ = ['mmseg::_base_/models/upernet_swin.py', 'mmseg::_base_/default_runtime.py']
# Lets mmengine read checkpoints under torch's safe loading.
custom_imports = dict(imports=['psaq_mm'], allow_failed_imports=False)
demo_root = '{{ fileDirname }}/'
data_root = demo_root + 'data/'
norm_cfg = dict(type='BN', requires_grad=True)
class_weight = [0.15, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]  # most pixels are ground
model = dict(
    data_preprocessor=dict(size=(128, 128)),
    backbone=dict(
        init_cfg=dict(type='Pretrained', checkpoint=demo_root + 'mask_rcnn_swin_mini_scenes.pth'),
        pretrain_img_size=192,
        embed_dims=32, depths=[2, 2, 4, 2], num_heads=[2, 4, 8, 16], drop_path_rate=0.05),
    decode_head=dict(
        in_channels=[32, 64, 128, 256], channels=64, num_classes=7, norm_cfg=norm_cfg,
        loss_decode=dict(class_weight=class_weight)),
    auxiliary_head=dict(
        in_channels=128, channels=32, num_classes=7, norm_cfg=norm_cfg, loss_decode=dict(class_weight=class_weight)))

metainfo = dict(
    classes=('ground', 'disk', 'square', 'triangle', 'star', 'ring', 'cross'),
    palette=[(90, 90, 90), (230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 130, 200), (245, 130, 48), (145, 30, 180)])
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomCrop', crop_size=(128, 128)),
    dict(type='RandomFlip', prob=0.5),
    dict(type='RandomFlip', prob=0.5, direction='vertical'),
    dict(type='PackSegInputs')
]
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
dataset = dict(
    type='BaseSegDataset', data_root=data_root, metainfo=metainfo, img_suffix='.png', seg_map_suffix='.png',
    reduce_zero_label=False)
train_dataloader = dict(
    batch_size=16, num_workers=0, sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(data_prefix=dict(img_path='train', seg_map_path='train_maps'), pipeline=train_pipeline, **dataset))
val_dataloader = dict(
    batch_size=4, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(data_prefix=dict(img_path='val', seg_map_path='val_maps'), pipeline=test_pipeline, **dataset))
test_dataloader = val_dataloader
# Scenes that are neither trained nor evaluated on, only for the real-data calibration baseline.
calib_dataloader = dict(
    batch_size=4, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(data_prefix=dict(img_path='calib', seg_map_path='calib_maps'), pipeline=test_pipeline, **dataset))
del dataset
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator

max_iters = 2400
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=400)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=6e-4, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0., bias_decay_mult=0.,
                       custom_keys=dict(backbone=dict(lr_mult=0.5))),
    clip_grad=dict(max_norm=5.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=150),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=150, T_max=max_iters - 150, eta_min=6e-6)
]
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=50),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=250, max_keep_ckpts=1))
randomness = dict(seed=0)
