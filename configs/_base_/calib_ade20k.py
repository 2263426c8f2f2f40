# Images of ADE20K that are not evaluated on, for method 'real' alone: what data-free calibration is compared with.
calib_dataloader = dict(
    batch_size=8, num_workers=2, sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='ADE20KDataset', data_root='data/ade/ADEChallengeData2016', test_mode=True,
        data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'), pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='Resize', scale=(512, 512)),
            dict(type='PackSegInputs')
        ]))
