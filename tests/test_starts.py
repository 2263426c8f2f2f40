"""Starts of images, and what drives images of a batch apart."""
import pytest
import torch

from psaq_mm.stanza import QuantizationConfig
from psaq_mm.synthesis import (
    PatchSimilarityTap,
    SynthesisConfig,
    dead_leaves,
    image_diversity,
    start_image,
    synthesize,
    valid_range,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize('size, channels', [((64, 64), 3), ((33, 97), 1), ((96, 40), 5), ((8, 8), 3)])
def test_dead_leaves_of_any_size_and_number_of_channels(size, channels):
    image = dead_leaves(size, channels, generator())
    assert image.shape == (channels, *size) and 0 <= image.min() and image.max() <= 1 and torch.isfinite(image).all()
    assert torch.equal(image, dead_leaves(size, channels, generator()))
    assert not torch.equal(image, dead_leaves(size, channels, generator(1)))


def test_dead_leaves_have_the_statistics_of_natural_images():
    """Amplitudes fall as 1 / f, neighbours are alike, and images differ from each other in brightness."""
    images = torch.stack([dead_leaves((128, 128), 3, generator(seed)) for seed in range(24)])
    grey = images.mean(1)
    power = torch.fft.fft2(grey - grey.mean((1, 2), keepdim=True)).abs().square().mean(0)
    frequency = (torch.fft.fftfreq(128)[:, None].square() + torch.fft.fftfreq(128).square()).sqrt()
    bands = [power[(frequency >= low) & (frequency < 2 * low)].mean().log2() for low in (1 / 64, 1 / 32, 1 / 16, 1 / 8)]
    slope = (bands[-1] - bands[0]) / 3
    assert -3.5 < slope < -1.5  # power falls as f^-2 in natural images
    a, b = grey[:, :, 1:].flatten(), grey[:, :, :-1].flatten()
    assert torch.corrcoef(torch.stack([a, b]))[0, 1] > 0.9
    assert grey.mean((1, 2)).std() > 0.08


def test_starts_lie_in_the_valid_range_and_depend_on_seed_and_number():
    low, high = valid_range([120, 110, 100], [60, 58, 57])
    for kind in ('noise', 'dead_leaves'):
        images = [start_image(kind, seed, number, (48, 32), low, high) for seed, number in ((0, 0), (0, 1), (1, 0))]
        assert all((low[0] <= image).all() and (image <= high[0]).all() for image in images)
        assert not torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])
        assert torch.equal(images[0], start_image(kind, 0, 0, (48, 32), low, high))


def test_diversity_is_zero_for_orthogonal_features_and_falls_as_they_agree():
    orthogonal, equal = torch.eye(4), torch.ones(4, 4)
    assert image_diversity([orthogonal], 4).abs() < 1e-2
    between = orthogonal + equal
    assert image_diversity([orthogonal], 4) > image_diversity([between], 4) > image_diversity([equal], 4)
    assert torch.allclose(image_diversity([5 * between], 4), image_diversity([between], 4))  # of any scale
    one = torch.randn(1, 8, 3, 3, generator=generator())
    other = torch.randn(2, 8, 1, 1, generator=generator()).expand(2, 8, 3, 3)
    assert image_diversity([one.expand(2, -1, -1, -1)], 2) < -1 > image_diversity([other], 2)  # of quarters as well
    assert image_diversity([torch.randn(6, 2, 5)], 2) == 0  # a DETR's decoder layers


def test_synthesis_by_diversity_drives_images_apart():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 4, 4), torch.nn.GELU(), torch.nn.Conv2d(16, 16, 2, 2))
    low, high = valid_range([127.5] * 3, [60.0] * 3)
    config = SynthesisConfig(start='dead_leaves', entropy=0.0, diversity=3.0, lr=0.05, steps=40, jitter=2)
    start = torch.stack([start_image('dead_leaves', 0, n, (32, 32), low, high) for n in range(4)])
    images = synthesize(start, lambda view: [net(view)], PatchSimilarityTap([], []), config, low, high, '0')
    assert image_diversity([net(images)], 4) > image_diversity([net(start)], 4) + 0.05


@pytest.mark.parametrize('stanza, recipe', [
    (dict(), 'paper'), (dict(weight=dict(bits=4)), 'low_bit'), (dict(activation=dict(bits=6)), 'low_bit'),
    (dict(overrides=[dict(pattern='*', weight=dict(bits=4))]), 'low_bit'),
    (dict(weight=dict(bits=4), recipe='paper'), 'paper'), (dict(recipe='low_bit'), 'low_bit')])
def test_the_recipe_follows_the_bits_and_the_stanza_goes_before(stanza, recipe):
    found = QuantizationConfig.parse(stanza)
    low = recipe == 'low_bit'
    assert (found.recipe, found.reparameterize, found.reconstruction.steps > 0) == (recipe, low, low)
    assert found.synthesis.start == ('dead_leaves' if low else 'noise')
    assert QuantizationConfig.parse(found.to_dict()) == found == found.settled()
    own = QuantizationConfig.parse(dict(stanza, reparameterize=False, reconstruction=dict(steps=7),
                                        synthesis=dict(start='noise', entropy=0.5)))
    assert (own.reparameterize, own.reconstruction.steps, own.synthesis.start) == (False, 7, 'noise')
    assert (own.synthesis.entropy, own.synthesis.diversity) == (0.5, 3.0 if low else 0.0)


def test_noise_is_noise_with_any_recipe():
    found = QuantizationConfig.parse(dict(weight=dict(bits=4), synthesis=dict(method='noise')))
    assert (found.recipe, found.synthesis.start) == ('low_bit', 'noise')
