# The demo's model, quantized to W8A8 without data. The same two lines extend any config of your own.
_base_ = ['./mask_rcnn_swin_mini_scenes.py', '../configs/_base_/dfq.py']
load_from = '{{ fileDirname }}/mask_rcnn_swin_mini_scenes.pth'
quantization = dict(
    synthesis=dict(num_images=24, batch_size=8, size=(192, 192), steps=100),
    game=dict(steps=120, evaluate_every=10), report=dict(images=8))
