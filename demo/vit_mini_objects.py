# A small ViT (128 channels, 6 blocks, patches of 8) on single rendered objects: a plain mmengine config around a timm
# model, without a quantization stanza. demo/train.py trained the shipped checkpoint with it.
custom_imports = dict(imports=['psaq_mm'], allow_failed_imports=False)
default_scope = 'psaq_mm'
data_root = '{{ fileDirname }}/data/objects/'
model = dict(
    type='TimmClassifier', model='vit_tiny_patch16_224', num_classes=6, img_size=96, patch_size=8, embed_dim=128,
    depth=6, num_heads=4, drop_path_rate=0.05,
    data_preprocessor=dict(type='mmengine.ImgDataPreprocessor', mean=[127.5] * 3, std=[127.5] * 3, bgr_to_rgb=True))

metainfo = dict(classes=('disk', 'square', 'triangle', 'star', 'ring', 'cross'))
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='mmcv.RandomFlip', prob=[0.25, 0.25, 0.25], direction=['horizontal', 'vertical', 'diagonal']),
    dict(type='PackClassificationInputs')
]
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='PackClassificationInputs')]
train_dataloader = dict(
    batch_size=32, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='ImageFolder', data_root=data_root, data_prefix=dict(img_path='train'), metainfo=metainfo,
                 pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=16, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='ImageFolder', data_root=data_root, data_prefix=dict(img_path='val'), metainfo=metainfo,
                 test_mode=True, pipeline=test_pipeline))
test_dataloader = val_dataloader
# Objects that are neither trained nor evaluated on, only for the real-data calibration baseline.
calib_dataloader = dict(
    batch_size=8, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='ImageFolder', data_root=data_root, data_prefix=dict(img_path='calib'), metainfo=metainfo,
                 test_mode=True, pipeline=test_pipeline))
val_evaluator = dict(type='Accuracy', topk=(1, 2))
test_evaluator = val_evaluator

max_epochs = 14
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=2)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper', optimizer=dict(type='AdamW', lr=3e-4, weight_decay=0.05), clip_grad=dict(max_norm=1.0),
    paramwise_cfg=dict(norm_decay_mult=0., bias_decay_mult=0.))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=200),
    dict(type='CosineAnnealingLR', by_epoch=True, T_max=max_epochs, eta_min=3e-6, convert_to_iter_based=True)
]
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=50),
    checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=1))
randomness = dict(seed=0)
