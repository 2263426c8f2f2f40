# The demo's segmentor, quantized to W8A8 without data: backbone; the decode head stays in float.
_base_ = ['./upernet_swin_mini_scenes.py', '../configs/_base_/dfq_mmseg.py']
load_from = '{{ fileDirname }}/upernet_swin_mini_scenes.pth'
quantization = dict(
    synthesis=dict(num_images=24, batch_size=8, size=(192, 192), steps=100),
    game=dict(steps=120, evaluate_every=10), report=dict(images=8))
