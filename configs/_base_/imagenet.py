# ImageNet validation images in folders, one a class (data/imagenet/val/n01440764/*.JPEG): what timm's classifiers are
# evaluated on. Evaluation crops 0.9 of the resized image, as timm's DeiT and Swin weights want it: the same pixels.
# For one flat folder and a list: dataset=dict(ann_file='val.txt', ...), lines of 'FILE CLASS_INDEX'.
default_scope = 'psaq_mm'
custom_imports = dict(imports=['psaq_mm'], allow_failed_imports=False)
data_root = 'data/imagenet/'
test_pipeline = [
    dict(type='LoadImageFromFile', imdecode_backend='pillow'),
    dict(type='ResizeEdge', scale=248),
    dict(type='mmcv.CenterCrop', crop_size=224),
    dict(type='PackClassificationInputs')
]
test_dataloader = dict(
    batch_size=50, num_workers=2, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='ImageFolder', data_root=data_root, data_prefix=dict(img_path='val'), test_mode=True,
                 pipeline=test_pipeline))
# Images that are not evaluated on, for method 'real' alone: what data-free calibration is compared with.
calib_dataloader = dict(
    batch_size=8, num_workers=2, sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='ImageFolder', data_root=data_root, data_prefix=dict(img_path='train'), test_mode=True,
                 pipeline=test_pipeline))
test_evaluator = dict(type='Accuracy', topk=(1, 5))
test_cfg = dict(type='TestLoop')
