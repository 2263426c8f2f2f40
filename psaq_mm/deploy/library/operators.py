"""mmcv's operators as ONNX has them: non-maximum suppression, RoIAlign and deformable convolution."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.modules.utils import _pair

from ...errors import UserError
from .replace import replaces


class _Suppression(torch.autograd.Function):
    """Greedy non-maximum suppression of boxes (N, 4) by scores (N, ): indices of what stays, best first."""

    @staticmethod
    def forward(ctx, boxes, scores, threshold, limit):
        from mmcv.ops.nms import NMSop
        keep = NMSop.apply(boxes.contiguous(), scores.contiguous(), threshold, 0, 0.0, -1)
        return keep[:limit] if limit > 0 else keep

    @staticmethod
    def symbolic(g, boxes, scores, threshold, limit):

        def constant(value, kind=torch.int64):
            return g.op('Constant', value_t=torch.tensor(value, dtype=kind))

        # The shapes in so many words: OpenVINO wants to know that a box has four numbers.
        found = g.op('NonMaxSuppression', g.op('Reshape', boxes, constant([1, -1, 4])),
                     g.op('Reshape', scores, constant([1, 1, -1])), constant([limit if limit > 0 else 2**31 - 1]),
                     constant([threshold], torch.float32))
        return g.op('Gather', found, constant(2), axis_i=1)


class _Above(torch.autograd.Function):
    """Which numbers are above a threshold. An example of a trace that has none pretends that its largest are."""

    @staticmethod
    def forward(ctx, x, threshold):
        found = x > threshold
        if torch.jit.is_tracing() and x.numel() and not found.any():
            found = x >= x.max()
        return found

    @staticmethod
    def symbolic(g, x, threshold):
        return g.op('Greater', x, g.op('Constant', value_t=torch.tensor(threshold, dtype=torch.float32)))


def above(x, threshold):
    """Return ``x > threshold``, in a trace with at least one True.

    The libraries leave early where there is nothing, and a trace would keep to that.
    """
    return _Above.apply(x, float(threshold))


class _RoIAlign(torch.autograd.Function):
    """RoIAlign of one map (B, C, H, W) and rois (N, 5), the number of the image first."""

    @staticmethod
    def forward(ctx, x, rois, size, scale, sampling, aligned):
        from mmcv.ops import roi_align
        return roi_align(x.contiguous(), rois, size, scale, sampling, 'avg', aligned)  # reads memory as if it were

    @staticmethod
    def symbolic(g, x, rois, size, scale, sampling, aligned):

        def constant(value):
            return g.op('Constant', value_t=torch.tensor(value))

        image = g.op('Cast', g.op('Gather', rois, constant(0), axis_i=1), to_i=7)
        boxes = g.op('Slice', rois, constant([1]), constant([5]), constant([1]))
        return g.op('RoiAlign', x, g.op('Reshape', boxes, constant([-1, 4])), image, output_height_i=size[0],
                    output_width_i=size[1], spatial_scale_f=scale, sampling_ratio_i=sampling, mode_s='avg',
                    coordinate_transformation_mode_s='half_pixel' if aligned else 'output_half_pixel')


@replaces('mmcv.ops:nms')
def nms(boxes, scores, iou_threshold, offset=0, score_threshold=0, max_num=-1):
    """``mmcv.ops.nms``: (boxes with scores (K, 5), indices (K, )), best first.

    Raises:
        UserError: If boxes end at their last pixel, as in mmdet 1 (``offset=1``).
    """
    if offset:
        raise UserError('test_cfg: nms with offset=1 has no ONNX operator')
    candidates = None
    if score_threshold > 0:
        candidates = above(scores, score_threshold).nonzero()[:, 0]
        boxes, scores = boxes[candidates], scores[candidates]
    keep = _Suppression.apply(boxes, scores, float(iou_threshold), int(max_num))
    found = torch.cat([boxes[keep], scores[keep][:, None]], -1)
    return found, keep if candidates is None else candidates[keep]


@replaces('mmcv.ops:batched_nms')
def batched_nms(boxes, scores, idxs, nms_cfg, class_agnostic=False):
    """``mmcv.ops.batched_nms``: suppression within each class, told apart by an offset, as the library does it.

    Raises:
        UserError: If the suppression is another one, such as soft NMS.
    """
    if nms_cfg is None:
        scores, order = scores.sort(descending=True)
        return torch.cat([boxes[order], scores[:, None]], -1), order
    settings = dict(nms_cfg)
    kind = settings.pop('type', 'nms')
    if kind != 'nms':
        raise UserError(f"test_cfg: nms of type '{kind}' has no ONNX operator; set type='nms' and see what it costs")
    settings.pop('split_thr', None)  # how much the library does at once
    if 'iou_thr' in settings:
        settings['iou_threshold'] = settings.pop('iou_thr')
    shifted = boxes
    if not settings.pop('class_agnostic', class_agnostic):
        largest = torch.cat([boxes.reshape(-1), boxes.new_zeros(1)]).max()  # there may be no box
        shifted = boxes + (idxs.to(boxes) * (largest + 1))[:, None]
    found, keep = nms(shifted, scores, **settings)
    return torch.cat([boxes[keep], found[:, 4:]], -1), keep


@replaces('mmcv.ops:RoIAlign.forward')
def roi_align(self, input, rois):
    """``RoIAlign``.

    Raises:
        UserError: If it pools by maximum.
    """
    if self.pool_mode != 'avg':
        raise UserError(f"RoIAlign with pool_mode='{self.pool_mode}': only 'avg' can be exported")
    size = self.output_size if isinstance(self.output_size, tuple) else (self.output_size, self.output_size)
    return _RoIAlign.apply(input, rois, tuple(size), float(self.spatial_scale), int(self.sampling_ratio), self.aligned)


@replaces('mmcv.ops.modulated_deform_conv:modulated_deform_conv2d')
def modulated_deform_conv2d(input, offset, mask, weight, bias=None, stride=1, padding=0, dilation=1, groups=1,
                            deform_groups=1):
    """``modulated_deform_conv2d``: a convolution of what is sampled at shifted places, times a mask if there is one.

    Offsets and masks of a larger map count from their first number on, as if it had the size of the output: mmcv reads
    memory so, and DyHead depends on it.
    """
    height, width = weight.shape[2:]
    points = height * width
    (down, right), (above_, left), (step_y, step_x) = map(_pair, (stride, padding, dilation))
    tall, wide = input.shape[2:]
    rows = (tall + 2 * above_ - step_y * (height - 1) - 1) // down + 1
    columns = (wide + 2 * left - step_x * (width - 1) - 1) // right + 1

    def of_output(x, kind):
        x = x.flatten(1)[:, :deform_groups * points * kind * rows * columns]
        return x.reshape(-1, points, kind, rows, columns)

    kernel_y, kernel_x = torch.meshgrid(torch.arange(height) * step_y, torch.arange(width) * step_x, indexing='ij')
    offset = of_output(offset, 2)
    y = offset[:, :, 0] + kernel_y.reshape(-1, 1, 1) + (torch.arange(rows) * down - above_)[:, None]
    x = offset[:, :, 1] + kernel_x.reshape(-1, 1, 1) + (torch.arange(columns) * right - left)
    grid = torch.stack([(2 * x + 1) / wide - 1, (2 * y + 1) / tall - 1], -1).flatten(1, 2)
    channels = weight.shape[1] * groups
    found = F.grid_sample(input.reshape(-1, channels // deform_groups, tall, wide), grid, align_corners=False)
    found = found.reshape(-1, channels // deform_groups, points, rows, columns)
    if mask is not None:
        found = found * of_output(mask, 1).transpose(1, 2)
    found = found.reshape(-1, channels * points, rows, columns)
    return F.conv2d(found, weight.reshape(weight.shape[0], -1, 1, 1), bias, groups=groups)


@replaces('mmcv.ops.deform_conv:deform_conv2d')
def deform_conv2d(input, offset, weight, stride=1, padding=0, dilation=1, groups=1, deform_groups=1, bias=False,
                  im2col_step=32):
    """``deform_conv2d``."""
    return modulated_deform_conv2d(input, offset, None, weight, None, stride, padding, dilation, groups, deform_groups)


@replaces('mmcv.ops:DeformConv2d.forward')
def deform_conv_layer(self, x, offset):
    """``DeformConv2d``, without its detour for maps smaller than the kernel, which the sum does not need."""
    return deform_conv2d(x, offset, self.weight, self.stride, self.padding, self.dilation, self.groups,
                         self.deform_groups)
