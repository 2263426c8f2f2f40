# The demo's classifier, quantized to W8A8 without data: backbone and head.
_base_ = ['./vit_mini_objects.py', '../configs/_base_/dfq_timm.py']
load_from = '{{ fileDirname }}/vit_mini_objects.pth'
quantization = dict(
    targets=['backbone', 'head'],
    synthesis=dict(num_images=24, batch_size=8, size=(96, 96), steps=100, jitter=8),
    game=dict(steps=120, evaluate_every=10), report=dict(images=8))
