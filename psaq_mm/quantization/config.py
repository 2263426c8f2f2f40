"""How one tensor is quantized, as frozen objects checked once when they are made."""
from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Observer = Literal['minmax', 'moving_average_minmax', 'percentile', 'mse']
Granularity = Literal['per_tensor', 'per_channel']

# 99.99 clips one value in ten thousand: the usual choice of post-training quantization toolkits.
PERCENTILE = 99.99
# Weight of the newest batch in the moving average; torch.ao uses 0.01 over hundreds of batches, a calibration here
# sees tens. Our choice.
MOMENTUM = 0.1


class FrozenConfig(BaseModel):
    """Base of all settings: immutable, no unknown keys, no silent conversion of types."""
    model_config = ConfigDict(frozen=True, extra='forbid', strict=True, allow_inf_nan=False)


class WeightConfig(FrozenConfig):
    """Quantization of weights. Default: the paper's naive quantizer (min-max per output channel, symmetric)."""
    bits: int = Field(8, ge=2, le=8, description='bit-width')
    granularity: Granularity = Field('per_channel', description='one scale a tensor, or one an output channel')
    symmetric: bool = Field(True, description='zero point fixed at 0')
    observer: Observer = Field('minmax', description='how the range is chosen')
    percentile: float = Field(PERCENTILE, gt=50, le=100, description="share of values inside, for 'percentile', in %")
    momentum: float = Field(MOMENTUM, gt=0, le=1, description="weight of the newest batch, 'moving_average_minmax'")


class ActivationConfig(WeightConfig):
    """Quantization of activations. Default: the paper's naive quantizer (per tensor, asymmetric, moving average).

    ``per_channel`` means one scale an input channel for Linear and Conv2d; operands of attention products, which have
    no channel axis of their own, stay per tensor, but for what ``softmax`` says.
    """
    granularity: Granularity = Field('per_tensor', description='one scale a tensor, or one an input channel')
    symmetric: bool = Field(False, description='zero point fixed at 0')
    symmetric_products: bool | None = Field(
        None, description='zero point fixed at 0 for queries, keys and values, without which OpenVINO has no int8 '
        'kernels for their products; None: with 8 bits')
    observer: Observer = Field('moving_average_minmax', description='how the range is chosen')
    softmax: Literal['per_tensor', 'per_head'] = Field(
        'per_tensor', description='one scale for all attention weights of a block, or one a head: some heads look at '
        'one token and others at all, so that their weights differ by orders of magnitude. An attention that does not '
        'keep its heads on an axis of their own has one scale')

    @property
    def of_products(self) -> ActivationConfig:
        """The same for queries, keys and values."""
        wanted = self.bits == 8 if self.symmetric_products is None else self.symmetric_products
        return self.model_copy(update=dict(symmetric=self.symmetric or wanted))

    @property
    def of_softmax(self) -> ActivationConfig:
        """The same for attention weights, whose channels are the heads."""
        return self.model_copy(update=dict(
            granularity='per_channel' if self.softmax == 'per_head' else 'per_tensor'))


class LayerConfig(FrozenConfig):
    """What one layer gets: both parts set, or None to keep that side in floating point."""
    weight: WeightConfig | None
    activation: ActivationConfig | None
