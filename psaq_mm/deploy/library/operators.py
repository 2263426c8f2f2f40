"""mmcv's operators as ONNX has them: non-maximum suppression, RoIAlign and deformable convolution."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.modules.utils import _pair

from ...errors import UserError
from .refused import no_suppression
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


def best(scores, count):
    """Return so many of the best scores and their indices; all where there are fewer, or where ``count`` is not
    positive.
    """
    length = scores.shape[0]
    if count > 0:
        length = torch.minimum(length, torch.tensor(count)) if isinstance(length, torch.Tensor) else min(length, count)
    return scores.topk(length)


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


@replaces('torch.utils.checkpoint:checkpoint')
def checkpoint(function, *args, use_reentrant=None, **named):
    """``checkpoint``, which saves memory in a training: the function itself."""
    return function(*args, **named)


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
        raise UserError(no_suppression(kind))
    settings.pop('split_thr', None)  # how much the library does at once
    if 'iou_thr' in settings:
        settings['iou_threshold'] = settings.pop('iou_thr')
    shifted = boxes
    if not settings.pop('class_agnostic', class_agnostic):
        largest = torch.cat([boxes.reshape(-1), boxes.new_zeros(1)]).max()  # there may be no box
        shifted = boxes + (idxs.to(boxes) * (largest + 1))[:, None]
    found, keep = nms(shifted, scores, **settings)
    return torch.cat([boxes[keep], found[:, 4:]], -1), keep


def at_most(settings, limit):
    """Return the settings of a suppression that looks at no more boxes than a limit, if any, leaves."""
    settings = settings and dict(settings)
    if settings and settings.get('type', 'nms') == 'nms' and limit and limit > 0:
        settings.setdefault('max_num', limit)
    return settings


def outside(rois, which):
    """Return rois (N, 5), some of them moved to where no map is, so that their features are zeros.

    Args:
        rois (Tensor): (N, 5).
        which (Tensor): Bool, (N, ).
    """
    return torch.where(which[:, None], rois.new_tensor([0, -10001, -10001, -10000, -10000]), rois)


@replaces('mmcv.ops:RoIAlign.forward')
def roi_align(self, input, rois):
    """``RoIAlign``.

    Raises:
        UserError: If it pools by maximum.
    """
    if self.pool_mode != 'avg':
        raise UserError(f"RoIAlign with pool_mode='{self.pool_mode}': only 'avg' can be exported")
    size = self.output_size if isinstance(self.output_size, tuple) else (self.output_size, self.output_size)
    if self.aligned and self.sampling_ratio <= 0:  # mmcv samples nothing of an empty roi, OpenVINO yields NaN
        rois = outside(rois, ((rois[:, 3:] - rois[:, 1:3]) <= 0).any(1))
    return _RoIAlign.apply(input, rois, tuple(size), float(self.spatial_scale), int(self.sampling_ratio), self.aligned)


class _DeformableSampling(torch.autograd.Function):
    """What a deformable convolution multiplies with its kernel: (B, C * points, h, w) from a map (B, C, H, W).

    Args:
        offset (Tensor): (B, groups * points * 2, ...).
        mask (Tensor | None): (B, groups * points, ...).
        channels, groups (int): Of the map, and how many of its parts have offsets of their own.
        kernel, stride, padding, dilation (tuple[int, int]): Of the convolution.
    """

    @staticmethod
    def forward(ctx, x, offset, mask, channels, groups, kernel, stride, padding, dilation):
        sides = [int(side) for side in x.shape[2:]]
        tall, wide = [(side + 2 * pad - step * (length - 1) - 1) // move + 1 for side, length, move, pad, step in zip(
            sides, kernel, stride, padding, dilation)]
        points = kernel[0] * kernel[1]
        offset = offset.flatten(1)[:, :groups * points * 2 * tall * wide].reshape(-1, points, 2, tall, wide)
        rows, columns = (torch.arange(length)[:, None] * step - pad + torch.arange(side) * move for length, step, pad,
                         side, move in zip(kernel, dilation, padding, (tall, wide), stride))
        y = offset[:, :, 0] + rows.repeat_interleave(kernel[1], 0)[:, :, None]
        x_ = offset[:, :, 1] + columns.repeat(kernel[0], 1)[:, None]
        grid = (torch.stack([x_, y], -1).flatten(2, 3) * 2 + 1) / torch.tensor(sides[::-1]) - 1
        found = F.grid_sample(x.reshape(-1, channels // groups, *sides), grid, align_corners=False)
        if mask is not None:
            found = found * mask.flatten(1)[:, :groups * points * tall * wide].reshape(-1, 1, points, tall * wide)
        return found.reshape(-1, channels * points, tall, wide)

    @staticmethod
    def symbolic(g, x, offset, mask, channels, groups, kernel, stride, padding, dilation):
        points = kernel[0] * kernel[1]

        def constant(value):
            return g.op('Constant', value_t=torch.as_tensor(value))

        def ints(*values):
            return constant(values)

        def concat(*parts):
            return g.op('Concat', *parts, axis_i=0)

        def places(length, dim, step, pad, repeats, shape):
            """Of each point of the kernel in each row or column, without offset."""
            start = torch.arange(length) * step - pad
            start = (start.repeat_interleave(repeats) if dim == 0 else start.repeat(repeats)).reshape(points, 1, 1)
            along = g.op('Range', constant(0), g.op('Gather', size, constant(dim), axis_i=0), constant(1))
            along = g.op('Reshape', g.op('Cast', along, to_i=1), ints(*shape))
            if stride[dim] > 1:
                along = g.op('Mul', along, constant(float(stride[dim])))
            return g.op('Add', along, constant(start.float()))

        sides = g.op('Slice', g.op('Shape', x), ints(2), ints(4))
        size = g.op('Add', sides, ints(*(2 * p - d * (k - 1) - 1 for p, d, k in zip(padding, dilation, kernel))))
        size = g.op('Add', g.op('Div', size, ints(*stride)), ints(1))
        area = g.op('ReduceProd', size, keepdims_i=1)

        def of_output(value, *shape):
            flat = g.op('Flatten', value, axis_i=1)
            count = g.op('Mul', area, ints(groups * points * (2 if value is offset else 1)))
            return g.op('Reshape', g.op('Slice', flat, ints(0), count, ints(1)), concat(ints(*shape), area))

        shifts = g.op('Reshape', of_output(offset, -1, points, 2), concat(ints(0, points, 2), size))
        y, x_ = (g.op('Gather', shifts, constant(i), axis_i=2) for i in (0, 1))
        y = g.op('Add', y, places(kernel[0], 0, dilation[0], padding[0], kernel[1], (1, -1, 1)))
        x_ = g.op('Add', x_, places(kernel[1], 1, dilation[1], padding[1], kernel[0], (1, 1, -1)))
        grid = g.op('Concat', *(g.op('Unsqueeze', value, ints(-1)) for value in (x_, y)), axis_i=-1)
        grid = g.op('Reshape', grid, ints(0, points, -1, 2))
        unit = g.op('Div', constant(2.), g.op('Cast', g.op('Gather', sides, ints(1, 0), axis_i=0), to_i=1))
        start = g.op('Sub', g.op('Mul', unit, constant(0.5)), constant(1.))
        grid = g.op('Add', g.op('Mul', grid, unit), start)
        if groups > 1:
            x = g.op('Reshape', x, concat(ints(-1, channels // groups), sides))
        found = g.op('GridSample', x, grid, mode_s='bilinear', padding_mode_s='zeros', align_corners_i=0)
        if mask is not None:
            found = g.op('Mul', found, of_output(mask, -1, 1, points))
        found = g.op('Reshape', found, concat(ints(-1, channels * points), size))
        return found.setType(x.type().with_sizes([None, channels * points, None, None]))


@replaces('mmcv.ops.modulated_deform_conv:modulated_deform_conv2d')
def modulated_deform_conv2d(input, offset, mask, weight, bias=None, stride=1, padding=0, dilation=1, groups=1,
                            deform_groups=1):
    """``modulated_deform_conv2d``: a convolution of what is sampled at shifted places, times a mask if there is one.

    Offsets and masks of a larger map count from their first number on, as if it had the size of the output: mmcv reads
    memory so, and DyHead depends on it.
    """
    outputs, channels, *kernel = map(int, weight.shape)
    settings = map(_pair, (kernel, stride, padding, dilation))
    found = _DeformableSampling.apply(input, offset, mask, channels * groups, deform_groups, *map(tuple, settings))
    return F.conv2d(found, weight.reshape(outputs, channels * kernel[0] * kernel[1], 1, 1), bias, groups=groups)


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
