"""What segmentors count in Python: sizes to come, and masks of queries of side adapter networks."""
from __future__ import annotations

from fractions import Fraction

import torch
import torch.nn.functional as F
from mmseg.models.decode_heads.san_head import SideAdapterNetwork
from torch import Tensor

from .replace import replaces

_ENCODE = SideAdapterNetwork.encode_feature


def bins(length, wanted) -> Tensor:
    """Return the places that each bin of adaptive pooling reads, (wanted, widest); narrow bins name their last twice.

    Args:
        length, wanted (int): Of the row, and how many bins it has, traced or not.
    """
    number = torch.arange(wanted)
    first = number * length // wanted
    last = ((number + 1) * length + wanted - 1) // wanted - 1
    widest = (length + wanted - 1) // wanted + 1
    return torch.minimum(first[:, None] + torch.arange(widest)[None], last[:, None])


def adaptive_max(x: Tensor, height, width) -> Tensor:
    """``adaptive_max_pool2d`` of (B, C, H, W), to a size that may be traced."""
    batch, channels, rows, columns = x.shape
    x = x.index_select(3, bins(columns, width).flatten()).reshape(batch, channels, rows, width, -1).amax(4)
    return x.index_select(2, bins(rows, height).flatten()).reshape(batch, channels, height, -1, width).amax(3)


@replaces('mmseg.models.utils.wrappers:Upsample.forward')
def upsample(self, x):
    """``Upsample`` by a factor: sides are cut to integers."""
    size = self.size
    if not size:
        factor = Fraction(self.scale_factor).limit_denominator(1000)
        size = [side * factor.numerator // factor.denominator for side in x.shape[2:]]
    return F.interpolate(x, size, mode=self.mode, align_corners=self.align_corners)


@replaces('mmseg.models.decode_heads.san_head:MLPMaskDecoder.forward')
def masks_of_queries(self, query, x):
    """``MLPMaskDecoder``: masks (B, N, H, W), and for each layer what heads add to attention (B, heads, N, H, W)."""
    query, pixels = self.query_mlp(query), self.pix_mlp(x)
    batch, channels, height, width = pixels.shape
    masks = (query @ pixels.flatten(2)).reshape(batch, -1, height, width)
    keys = self.attn_mlp(x).reshape(batch, self.total_layers, self.total_heads, channels, -1)
    biases = self.bias_scaling((query[:, None, None] @ keys)[..., None])[..., 0]
    return masks, [biases[:, layer].reshape(batch, self.total_heads, -1, height, width)
                   for layer in range(self.total_layers)]


@replaces('mmseg.models.decode_heads.san_head:RecWithAttnbias._build_attn_biases')
def attention_biases(self, attn_biases, target_shape):
    """``RecWithAttnbias``: each query sees itself and what its mask covers, all else sees all but the queries."""
    found = []
    for bias in attn_biases:
        batch, heads, queries, height, width = bias.shape
        bias = adaptive_max(bias.reshape(batch, heads * queries, height, width), *target_shape)
        bias = bias.reshape(batch, heads, queries, target_shape[0] * target_shape[1])
        bias = bias.expand(batch, self.num_heads, queries, bias.shape[3]).flatten(0, 1)
        if not self.cross_attn:
            blind = torch.cat([100 * torch.eye(queries) - 100, torch.full((queries, 1), -100.0)], 1)
            upper = torch.cat([blind.expand(bias.shape[0], queries, queries + 1), bias], 2)
            lower = torch.cat([upper[:, :1, :1].expand(-1, 1, queries) * 0 - 100, upper[:, :1, queries:] * 0], 2)
            bias = torch.cat([upper, lower.expand(-1, 1 + bias.shape[2], -1)], 1)
        found.append(bias)
    return found * self.num_layers if len(found) == 1 else found


@replaces('mmseg.models.decode_heads.san_head:SideAdapterNetwork.encode_feature')
def encode(self, image, clip_features, deep_supervision_idxs):
    """``SideAdapterNetwork``: position embeddings get the image's size before it asks whether they have it."""
    size = [side // patch for side, patch in zip(image.shape[2:], self.patch_embed.projection.stride)]
    positions = self.pos_embed.unflatten(1, self.patch_embed.init_out_size).permute(0, 3, 1, 2)
    positions = F.interpolate(positions, size=size, mode='bicubic')
    vars(self)['pos_embed'] = positions.flatten(2).transpose(1, 2)  # in front of the parameter
    try:
        return _ENCODE(self, image, clip_features, deep_supervision_idxs)
    finally:
        del vars(self)['pos_embed']
