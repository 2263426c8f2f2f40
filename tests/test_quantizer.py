"""Fake-quantization against integer arithmetic written out, observers against their definitions."""
import copy
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from psaq_mm.errors import UserError
from psaq_mm.quantization import (
    ActivationConfig,
    FakeQuantizer,
    LayerConfig,
    Mode,
    QuantizedConvTranspose2d,
    QuantizerMismatchError,
    UncalibratedError,
    WeightConfig,
    kernels,
)


def calibrated(config, *batches, channels=1, axis=0):
    quantizer = FakeQuantizer(config, channels, axis)
    for batch in batches:
        quantizer.observe(batch)
    assert quantizer.calibrate()
    return quantizer


def test_one_scale_serves_where_heads_have_no_axis_of_their_own():
    """And a checkpoint of either kind loads."""
    config, heads = ActivationConfig(bits=4, granularity='per_channel'), torch.rand(2, 3, 5, 5)
    own, flat = (FakeQuantizer(config, 3, -3, optional=True) for _ in range(2))
    own.observe(heads * torch.tensor([1.0, 0.1, 0.01]).view(3, 1, 1))
    flat.observe(heads.flatten(0, 1))
    assert own.calibrate() and flat.calibrate()
    assert len(own.scale) == 3 and own.scale[0] > 5 * own.scale[1] > 25 * own.scale[2]
    assert flat.merged and not own.merged
    assert len(flat.scale) == 1 and flat(heads.flatten(0, 1)).unique().numel() <= 16
    for source in (own, flat):
        loaded = FakeQuantizer(config, 3, -3, optional=True)
        loaded.load_state_dict(source.state_dict())
        assert torch.equal(loaded.scale, source.scale) and loaded.per_channel == source.per_channel
        assert torch.equal(loaded(heads), source(heads))
    fixed = FakeQuantizer(config, 3, -3)
    with pytest.raises(QuantizerMismatchError, match='3 scales'):
        fixed.load_state_dict(flat.state_dict())


def integer_reference(x, low, high, bits, symmetric):
    """Quantizes one channel with NumPy integers, from the textbook definition."""
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        quant_min, quant_max = -2**(bits - 1), 2**(bits - 1) - 1
        scale, zero_point = np.float32(max(-low, high)) / np.float32(quant_max), 0
    else:
        quant_min, quant_max = 0, 2**bits - 1
        scale = np.float32(np.float32(high) - np.float32(low)) / np.float32(quant_max)
        zero_point = int(np.clip(np.rint(np.float32(-low) / scale), quant_min, quant_max))
    integers = np.clip(np.rint(x / scale).astype(np.int64) + zero_point, quant_min, quant_max)
    return integers, zero_point, scale


@pytest.mark.parametrize('bits', range(2, 9))
@pytest.mark.parametrize('symmetric', [True, False])
def test_equals_integer_arithmetic_per_tensor(bits, symmetric):
    x = torch.randn(4, 7, 5) * 3 + 0.7
    config = ActivationConfig(bits=bits, symmetric=symmetric, observer='minmax')
    quantizer = calibrated(config, x)
    wider = torch.cat([x.flatten(), x.flatten() * 1.5])  # some values outside the range
    out = quantizer(wider).numpy()
    integers, zero_point, scale = integer_reference(wider.numpy(), x.min().item(), x.max().item(), bits, symmetric)
    assert quantizer.zero_point.item() == zero_point
    np.testing.assert_allclose(quantizer.scale.item(), scale, rtol=1e-6)
    # A value half-way between two integers may go either way in the last bit of float32: one step at most, rarely.
    steps = np.abs(out - (integers - zero_point) * scale) / scale
    assert steps.max() < 1.01 and (steps > 1e-3).mean() < 0.01
    assert len(np.unique(out)) <= 2**bits


@pytest.mark.parametrize('bits', [2, 4, 8])
@pytest.mark.parametrize('axis,shape', [(0, (6, 5, 3)), (1, (2, 6, 4, 3)), (-1, (3, 5, 6))])
def test_equals_integer_arithmetic_per_channel(bits, axis, shape):
    x = torch.randn(shape) * torch.logspace(-3, 2, 6).view([6 if s == axis % len(shape) else 1
                                                             for s in range(len(shape))])
    quantizer = calibrated(WeightConfig(bits=bits), x, channels=6, axis=axis)
    out = quantizer(x).movedim(axis, 0).numpy()
    for channel, values in enumerate(x.movedim(axis, 0).numpy()):
        integers, zero, scale = integer_reference(values, values.min(), values.max(), bits, True)
        assert zero == 0
        steps = np.abs(out[channel] - integers * scale) / scale
        assert steps.max() < 1.01 and (steps > 1e-3).mean() < 0.1


def test_zero_is_exact_whatever_the_range():
    for data in (torch.rand(100) + 5, -torch.rand(100) - 5, torch.randn(100)):
        quantizer = calibrated(ActivationConfig(bits=3), data)
        assert quantizer(torch.zeros(1)).item() == 0


def test_a_constant_tensor_does_not_divide_by_zero():
    quantizer = calibrated(ActivationConfig(), torch.zeros(10))
    assert torch.equal(quantizer(torch.zeros(3)), torch.zeros(3))
    quantizer = calibrated(WeightConfig(), torch.stack([torch.zeros(4), torch.ones(4)]), channels=2)
    assert torch.isfinite(quantizer(torch.ones(2, 4))).all()


def test_gradient_is_straight_through_inside_and_zero_outside():
    quantizer = calibrated(ActivationConfig(bits=4, observer='minmax'), torch.tensor([-1.0, 2.0]))
    x = torch.tensor([-3.0, -0.9, 0.0, 0.33, 1.9, 5.0], requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 0]


def test_minmax_and_moving_average():
    first, second = torch.tensor([-1.0, 3.0]), torch.tensor([-2.0, 1.0])
    quantizer = FakeQuantizer(ActivationConfig(observer='minmax'))
    quantizer.observe(first), quantizer.observe(second)
    assert [v.item() for v in quantizer.observer.range()] == [-2, 3]
    quantizer = FakeQuantizer(ActivationConfig(observer='moving_average_minmax', momentum=0.25))
    quantizer.observe(first), quantizer.observe(second)
    assert [v.item() for v in quantizer.observer.range()] == [-1.25, 2.5]


def test_percentile_agrees_with_numpy_and_cuts_an_outlier():
    x = torch.randn(20000)
    x[7] = 1000
    quantizer = FakeQuantizer(ActivationConfig(observer='percentile', percentile=99.0))
    quantizer.observe(x)
    low, high = (v.item() for v in quantizer.observer.range())
    expected = np.percentile(x.numpy(), [0.5, 99.5])
    np.testing.assert_allclose([low, high], expected, rtol=1e-4)
    assert high < 10


@pytest.mark.parametrize('observer', ['percentile', 'mse'])
def test_sampling_sees_every_channel(observer):
    """Tokens of Swin, channel last, outliers in one channel: equal steps through the flat tensor could miss it."""
    tokens = torch.randn(8, 1024, 96)
    tokens[..., 7] *= 20
    quantizer = FakeQuantizer(ActivationConfig(observer=observer, percentile=99.8))
    quantizer.observe(tokens)
    low, high = quantizer.observer.range()
    assert high > 20 and low < -20


@pytest.mark.parametrize('bits', [2, 3, 4, 8])
@pytest.mark.parametrize('config', [WeightConfig, ActivationConfig])
def test_mse_observer_is_never_worse_than_minmax_and_better_with_outliers(bits, config):
    x = torch.randn(8, 2000)
    x[:, 0] = 15
    errors = {}
    for observer in ('minmax', 'mse'):
        quantizer = calibrated(config(bits=bits, observer=observer), x, channels=8)
        errors[observer] = (quantizer(x) - x).square().mean().item()
    assert errors['mse'] <= errors['minmax'] * 1.0001
    if bits <= 4:
        assert errors['mse'] < 0.8 * errors['minmax']


def test_mse_observer_keeps_a_sample_however_many_batches_there_are():
    """Half of the batches are ten times as wide: the range is that of all values at once, from few of them."""
    batches = [torch.randn(64, 1000) * (10 if number % 2 else 1) for number in range(100)]
    for channels in (1, 64):
        config = ActivationConfig(observer='mse', bits=4, granularity='per_channel' if channels > 1 else 'per_tensor')
        quantizer = FakeQuantizer(config, channels)
        for batch in batches:
            quantizer.observe(batch)
        kept = sum(sample.numel() for sample in quantizer.observer.samples)
        assert 10_000 < kept < 1_000_000
        assert all(len(sample) == channels for sample in quantizer.observer.samples)
        (low, *_), (high, *_) = quantizer.observer.range()
        once = FakeQuantizer(ActivationConfig(observer='mse', bits=4))
        once.observe(torch.cat(batches))
        expected = once.observer.range()
        assert low == pytest.approx(expected[0].item(), rel=0.2) and high == pytest.approx(expected[1].item(), rel=0.2)


def test_uncalibrated_refuses_and_says_what_to_do():
    quantizer = FakeQuantizer(WeightConfig())
    quantizer.name = 'backbone.x.weight_quantizer'
    with pytest.raises(UncalibratedError, match=r'backbone\.x\.weight_quantizer.*tools/dfq.py'):
        quantizer(torch.ones(2))
    quantizer.mode = Mode.FLOAT
    assert torch.equal(quantizer(torch.ones(2)), torch.ones(2))


def test_nan_during_calibration_is_refused():
    quantizer = FakeQuantizer(ActivationConfig())
    quantizer.observe(torch.tensor([1.0, float('nan')]))
    with pytest.raises(UserError, match='NaN'):
        quantizer.calibrate()


def test_state_round_trip_and_mismatch():
    quantizer = calibrated(ActivationConfig(), torch.randn(100))
    state = copy.deepcopy(quantizer.state_dict())
    assert set(state) == {'scale', 'zero_point', 'grid'}
    fresh = FakeQuantizer(ActivationConfig())
    fresh.load_state_dict(state)
    x = torch.randn(50)
    assert torch.equal(fresh(x), quantizer(x))
    with pytest.raises(QuantizerMismatchError, match=r'0\.\.255 \(8 bits.*config says 0\.\.15 \(4 bits'):
        FakeQuantizer(ActivationConfig(bits=4)).load_state_dict(state)
    with pytest.raises(QuantizerMismatchError, match=r'0\.\.255.*config says -128\.\.127'):
        FakeQuantizer(ActivationConfig(symmetric=True)).load_state_dict(state)
    with pytest.raises(QuantizerMismatchError, match='lacks.*zero_point'):
        FakeQuantizer(ActivationConfig()).load_state_dict({k: v for k, v in state.items() if k != 'zero_point'})


def test_bfloat16_goes_in_and_out():
    quantizer = calibrated(ActivationConfig(), torch.randn(100))
    assert quantizer(torch.randn(3).bfloat16()).dtype is torch.bfloat16


@pytest.mark.parametrize('groups', [1, 2])
def test_a_transposed_convolution_has_a_scale_for_each_output_channel(groups):
    layer = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=groups)
    layer.weight.data[:, 1] *= 50
    config = LayerConfig(weight=WeightConfig(), activation=ActivationConfig())
    converted = QuantizedConvTranspose2d.from_float(layer, config)
    x = torch.randn(2, 4, 5, 7)
    for output_size in (None, (10, 14)):
        for quantizer in (converted.input_quantizer, converted.weight_quantizer):
            quantizer.mode = Mode.FLOAT
        assert torch.equal(converted(x, output_size), layer(x, output_size))
    converted.input_quantizer.observe(x)
    converted.weight_quantizer.observe(layer.weight)
    for quantizer in (converted.input_quantizer, converted.weight_quantizer):
        quantizer.calibrate()
        quantizer.mode = Mode.QUANTIZE
    scale = converted.weight_quantizer.scale
    torch.testing.assert_close(scale, layer.weight.detach().abs().amax((0, 2, 3)) / 127)
    expected = layer(x)
    assert 0 < (converted(x) - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.fixture(params=['compiled', 'in passes'])
def rounding(request):
    """Both implementations of rounding and its gradient; the compiled one where a compiler was at hand."""
    if request.param == 'in passes':
        return kernels.round_in_passes, kernels.backward_in_passes
    if not kernels.IS_COMPILED:
        assert shutil.which('c++') is None, 'a compiler is here, but psaq_mm was installed without its kernels'
        pytest.skip('the kernels are not compiled: torch or a C++ compiler were absent when psaq_mm was installed')
    return kernels.fake_quantize, kernels.fake_quantize_backward


GRIDS = pytest.mark.parametrize('shape, channels, axis', [
    ((3, 50_000), 1, 0), ((2, 7, 40, 30), 1, 0), ((6, 5, 3, 3), 6, 0), ((4, 6, 3, 3), 6, 1), ((2, 9, 5), 5, 2),
    ((300, 700), 700, 1), ((70, ), 70, 0), ((40, 9000), 40, 0), ((0, 3), 3, 1)])


def affine(channels, symmetric):
    scale = torch.rand(channels) * 0.02 + 0.005
    if symmetric:
        return scale, torch.zeros(channels, dtype=torch.int32), -128, 127
    return scale, torch.randint(100, 150, (channels, ), dtype=torch.int32), 0, 255


@GRIDS
@pytest.mark.parametrize('symmetric', [True, False])
def test_fake_quantize_is_torchs_own_bit_for_bit(shape, channels, axis, symmetric, rounding):
    fake_quantize, backward = rounding
    x = torch.randn(shape) * 3
    scale, zero_point, low, high = affine(channels, symmetric)

    def torchs(value):
        if channels == 1:
            return torch.fake_quantize_per_tensor_affine(value, scale, zero_point, low, high)
        return torch.fake_quantize_per_channel_affine(value, scale, zero_point, axis, low, high)

    for value in (x, x.mT.contiguous().mT if x.dim() > 1 else x, x.repeat_interleave(2, -1)[..., ::2]):
        rounded = fake_quantize(value, scale, zero_point, axis, low, high)
        reference = value.clone().requires_grad_()
        expected = torchs(reference)
        assert rounded.is_contiguous() and torch.equal(rounded, expected)
        expected.backward(torch.ones_like(expected))
        found = torch.ones(x.shape)
        backward(found, value.contiguous(), scale, zero_point, axis, low, high, False)
        assert torch.equal(found, reference.grad) and (not x.numel() or 0 < found.sum() < value.numel())


@GRIDS
@pytest.mark.parametrize('symmetric', [True, False])
def test_gradients_of_scale_and_zero_point(shape, channels, axis, symmetric, rounding):
    """Against the formula, written with booleans, in double precision."""
    x, grad = torch.randn(shape) * 3, torch.randn(shape)
    scale, zero_point, low, high = affine(channels, symmetric)
    along = (1, ) if channels == 1 else tuple(-1 if dim == axis else 1 for dim in range(len(shape)))
    wide, zero = scale.view(along), zero_point.view(along)
    integers = (x * (1 / wide)).round() + zero
    inside = (integers >= low) & (integers <= high)
    by_scale = (integers.clamp(low, high) - zero - torch.where(inside, x / wide, 0)).double()
    passed = grad.clone()
    of_scale, of_zero_point = rounding[1](passed, x, scale, zero_point, axis, low, high, True)
    assert torch.equal(passed, grad * inside)
    for found, terms in ((of_scale, grad * by_scale), (of_zero_point, -(grad * ~inside).double() * wide)):
        expected = terms.sum().view(1) if channels == 1 else terms.movedim(axis, 0).reshape(channels, -1).sum(1)
        torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-2)


def test_gradients_do_not_depend_on_the_number_of_threads(rounding):
    x, grad, threads = torch.randn(9, 70_001), torch.randn(9, 70_001), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(rounding[1](grad.clone(), x, torch.tensor([0.01]), torch.zeros(1), 0, -128, 127, True))
    finally:
        torch.set_num_threads(threads)
    if rounding[1] is kernels.fake_quantize_backward:  # sums of torch's own do depend on it
        assert all(torch.equal(a, b) for pair in (found[:2], found[1:]) for a, b in zip(*pair))
    for pair in (found[:2], found[1:]):
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)


def test_nan_stays_nan(rounding):
    x = torch.tensor([float('nan'), 1.0, float('inf')])
    rounded = rounding[0](x, torch.tensor([0.01]), torch.zeros(1), 0, -128, 127)
    assert rounded[0].isnan() and torch.equal(rounded[1:], torch.tensor([1.0, 1.27]))


@pytest.mark.parametrize('low, high, zero_point', [(-128, 127, 0), (0, 255, 100), (0, 255, 101), (-8, 7, 0)])
def test_halves_at_the_ends_of_the_grid_pass_as_torch_rounds_them(low, high, zero_point, rounding):
    scale, zero_point = torch.tensor([0.5]), torch.tensor([zero_point], dtype=torch.int32)
    ends = torch.tensor([low, high]) - zero_point
    x = torch.cat([(ends + 0.5) * 0.5, (ends - 0.5) * 0.5, ends * 0.5])
    x = torch.cat([x, x.nextafter(x + 1), x.nextafter(x - 1)]).requires_grad_()
    torch.fake_quantize_per_tensor_affine(x, scale, zero_point, low, high).sum().backward()
    found = torch.ones(len(x))
    rounding[1](found, x.detach(), scale, zero_point, 0, low, high, False)
    assert torch.equal(found, x.grad) and 0 < found.sum() < len(x)


def test_straight_through_gradient_of_a_quantizer_is_torchs_own():
    quantizer = calibrated(ActivationConfig(observer='percentile', percentile=90.0), torch.randn(4, 500))
    quantizer.mode = Mode.QUANTIZE
    x = torch.randn(500, 4).mT.requires_grad_()  # not contiguous
    weights = torch.randn(4, 500)
    found, = torch.autograd.grad((quantizer(x) * weights).sum(), x)
    expected, = torch.autograd.grad((torch.fake_quantize_per_tensor_affine(
        x, quantizer.scale, quantizer.zero_point, 0, 255) * weights).sum(), x)
    assert torch.equal(found, expected) and (found == 0).any()


@pytest.mark.parametrize('config', [ActivationConfig(bits=4), ActivationConfig(bits=4, symmetric=True),
                                    ActivationConfig(bits=4, granularity='per_channel')])
def test_gradient_of_a_learned_range(config):
    """That of torch's own learnable quantizer, carried on to the ends; and a step along it lowers the error."""
    x = torch.randn(5, 7, 6) * torch.linspace(0.5, 2, 6)
    quantizer = calibrated(config.model_copy(update=dict(observer='minmax')), x * 0.6, channels=6, axis=-1)
    stretch = quantizer.learn_range()
    assert stretch.shape == (1 if config.symmetric else 2, 6 if config.granularity == 'per_channel' else 1)
    stretch.data.uniform_(-0.3, 0.3)
    weights = torch.randn(7, 5, 6).transpose(0, 1)
    values = x.clone().requires_grad_()
    gradients = []
    for forward in (quantizer, quantizer.torchs):
        out = forward(values)
        gradients.append((out.detach(), *torch.autograd.grad((out * weights).sum(), (values, stretch))))
    for ours, torchs in zip(*gradients):
        torch.testing.assert_close(ours, torchs)
    (quantizer(values) - x).square().sum().backward()
    before = (quantizer(x) - x).square().sum()
    with torch.no_grad():
        stretch -= 0.01 * stretch.grad / stretch.grad.norm()
    assert (quantizer(x) - x).square().sum() < before


def test_a_fixed_range_is_the_learned_one():
    quantizer = calibrated(ActivationConfig(), torch.randn(100))
    plain, x = copy.deepcopy(quantizer.state_dict()), torch.randn(500)
    quantizer.learn_range()
    quantizer.fix_range()
    assert all(torch.equal(plain[key], value) for key, value in quantizer.state_dict().items())
    quantizer.learn_range().data.copy_(torch.tensor([[-1.0], [0.2]]))
    assert torch.equal(quantizer.scale, plain['scale']), 'the state holds what was calibrated'
    learned = quantizer(x)
    quantizer.fix_range()
    assert torch.equal(quantizer(x), learned)
    low, high = (plain['scale'] * (end - plain['zero_point']) for end in (0, 255))
    step = quantizer.scale
    assert (step * -quantizer.zero_point - low * np.exp(-1)).abs() <= step
    assert (step * (255 - quantizer.zero_point) - high * np.exp(0.2)).abs() <= step
