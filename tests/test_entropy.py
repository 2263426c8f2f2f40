"""Patch-similarity entropy against scipy's kernel density and against finite differences."""
import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid
from scipy.stats import gaussian_kde

from psaq_mm.errors import UserError
from psaq_mm.synthesis import (
    PatchSimilarityTap,
    attention_tokens,
    map_tokens,
    patch_similarity,
    patch_similarity_entropy,
)


def scipy_entropy(values, bandwidth):
    """The same quantity by scipy: exact Gaussian kernel density on a fine grid, trapezoid rule."""
    density = gaussian_kde(values, bw_method=bandwidth / np.std(values, ddof=1))
    at = np.linspace(-1 - 8 * bandwidth, 1 + 8 * bandwidth, 8001)
    p = density(at)
    return trapezoid(-p * np.log(np.maximum(p, 1e-300)), at)


def plain_entropy(tokens, images, bandwidth, points=8001):
    """The formula as it stands, in double precision for autograd: every kernel at every point of a fine grid."""
    tokens = tokens / tokens.norm(dim=-1, keepdim=True)
    values = (tokens @ tokens.transpose(1, 2)).reshape(images, -1)
    at = torch.linspace(-1 - 8 * bandwidth, 1 + 8 * bandwidth, points, dtype=torch.float64)
    entropies = []
    for row in values:
        p = torch.exp(-0.5 * ((at[:, None] - row) / bandwidth)**2).mean(1) / (bandwidth * math.sqrt(2 * math.pi))
        entropies.append(torch.trapezoid(-p * p.clamp(min=1e-300).log(), at))
    return torch.stack(entropies)


def tokens_of(kind, images=2, windows=1, count=20, width=6):
    """Tokens whose similarities are spread out, close together, or in two heaps."""
    shared = dict(wide=0.0, narrow=6.0, two=0.0)[kind]
    tokens = torch.randn(images * windows, count, width) + shared * torch.randn(images * windows, 1, width)
    if kind == 'two':
        tokens[..., 0] += 8.0 * torch.sign(torch.randn(images * windows, count))
    return tokens


@pytest.fixture(params=['binned', 'exact'])
def density(request):
    return request.param


@pytest.fixture(params=['whole', 'strips'])
def strips(request, monkeypatch):
    """Gamma in one piece, and in strips, as it is with many tokens."""
    if request.param == 'strips':
        monkeypatch.setattr('psaq_mm.synthesis.entropy.WHOLE', 4)
        monkeypatch.setattr('psaq_mm.synthesis.entropy.CHUNK', 50)


@pytest.mark.parametrize('bandwidth', [0.01, 0.05])
@pytest.mark.parametrize('kind', ['wide', 'narrow', 'two'])
def test_entropy_equals_scipy(bandwidth, kind, density, strips):
    tokens = tokens_of(kind, windows=3, count=18)
    ours = patch_similarity_entropy(tokens, 2, bandwidth, density)
    for image, values in enumerate(patch_similarity(tokens).reshape(2, -1).double().numpy()):
        assert ours[image].item() == pytest.approx(scipy_entropy(values, bandwidth), abs=1e-3)


def test_known_values(density):
    sphere = torch.randn(1, 600, 3)  # cosines of directions in space are uniform in [-1, 1]
    assert patch_similarity_entropy(sphere, 1, 0.01, density).item() == pytest.approx(math.log(2), abs=0.02)
    constant = torch.ones(1, 10, 3)
    assert patch_similarity_entropy(constant, 1, 0.01, density).item() == pytest.approx(
        math.log(0.01 * math.sqrt(2 * math.pi * math.e)), abs=1e-3)


@pytest.mark.parametrize('kind', ['wide', 'narrow', 'two'])
def test_gradient_equals_autograd_of_the_plain_formula(kind, density, strips):
    tokens, weights = tokens_of(kind, windows=2), torch.tensor([1.0, -2.0])
    plain, ours = tokens.double().requires_grad_(), tokens.clone().requires_grad_()
    value = plain_entropy(plain, 2, 0.02)
    (value * weights).sum().backward()
    found = patch_similarity_entropy(ours, 2, 0.02, density)
    (found * weights).sum().backward()
    torch.testing.assert_close(found.double(), value, rtol=0, atol=1e-3)
    error = (ours.grad - plain.grad).norm() / plain.grad.norm()
    assert error < dict(binned=2e-2, exact=1e-4)[density], error


def test_the_default_sees_every_similarity_where_ten_points_do_not():
    """Gradients against the plain formula's, on as many entries as a ViT has."""

    def gradient(entropy, tokens):
        tokens = tokens.detach().requires_grad_()
        return torch.autograd.grad(entropy(tokens), tokens)[0].double()

    def ten_points(tokens):
        values = patch_similarity(tokens).flatten()
        at = torch.linspace(values.min().item(), values.max().item(), 10)
        p = torch.exp(-0.5 * ((values - at[:, None]) / 0.01)**2).mean(1) / (0.01 * math.sqrt(2 * math.pi))
        return torch.trapezoid(-p * p.clamp(min=1e-30).log(), at)

    tokens = tokens_of('wide', count=98, width=64, images=1) + 0.8 * torch.randn(64)
    expected = gradient(lambda t: plain_entropy(t, 1, 0.01, 2001).sum(), tokens.double())
    ours = gradient(lambda t: patch_similarity_entropy(t, 1).sum(), tokens)
    ten = gradient(ten_points, tokens)
    assert (ours - expected).norm() < 0.02 * expected.norm()
    assert torch.cosine_similarity(ten.flatten(), expected.flatten(), 0) < 0.5


def test_gradient_through_tokens_raises_the_entropy(density):
    tokens = torch.randn(4, 16, 8) * 0.1 + torch.randn(8)
    tokens.requires_grad_()
    before = patch_similarity_entropy(tokens, 2, density=density).sum()
    before.backward()
    after = patch_similarity_entropy(tokens + 0.01 * tokens.grad / tokens.grad.abs().max(), 2, density=density).sum()
    assert after > before


def test_images_are_independent_and_windows_are_pooled(density):
    tokens = torch.randn(6, 9, 5)  # 2 images of 3 windows
    both = patch_similarity_entropy(tokens, 2, density=density)
    assert torch.allclose(both[1:], patch_similarity_entropy(tokens[3:], 1, density=density), atol=1e-5)
    order = patch_similarity_entropy(tokens[[2, 0, 1, 5, 3, 4]], 2, density=density)
    assert torch.allclose(both, order, atol=1e-5)


def test_similarity_is_the_cosine():
    tokens = torch.randn(2, 5, 7)
    expected = torch.nn.functional.cosine_similarity(tokens[:, :, None], tokens[:, None], dim=-1)
    assert torch.allclose(patch_similarity(tokens), expected, atol=1e-6)


def test_tap_averages_heads_drops_class_tokens_and_forgets():
    product = torch.nn.Identity()
    tap = PatchSimilarityTap([product], [partial(attention_tokens, skip=1)])
    output = torch.randn(2, 3, 10, 4)
    product(output)
    assert not tap.tokens  # nobody asked
    with tap:
        product(output)
    assert torch.equal(tap.tokens[0], output.mean(1)[:, 1:])
    expected = patch_similarity_entropy(output.mean(1)[:, 1:], 2)
    assert torch.equal(tap.entropy(2), expected)
    assert not tap.tokens
    tap.remove()
    with tap:
        product(output)
    assert not tap.tokens


def test_tokens_of_every_shape_of_attention():
    """Three windows of two images in four heads, laid out as the libraries do."""
    output = torch.randn(2, 3, 4, 10, 5)  # (images, windows, heads, N, d)
    expected = output.mean(2).flatten(0, 1)[:, 1:]
    for shown in (output, output.flatten(0, 1), output.flatten(0, 2)):
        found, = attention_tokens(shown, skip=1, heads=4)
        torch.testing.assert_close(found, expected)


def test_positions_of_feature_maps_are_tokens():
    small, large = torch.randn(2, 3, 5, 7), torch.randn(2, 4, 56, 30)
    found = map_tokens((small, [large], torch.randn(2, 9)))
    assert len(found) == 2
    assert torch.equal(found[0][1, 7], small[1, :, 1, 0])
    assert found[1].shape == (2, 28 * 28, 4)
    torch.testing.assert_close(found[1].mean(1), torch.nn.functional.adaptive_avg_pool2d(large, 28).mean((2, 3)))
    tap = PatchSimilarityTap([torch.nn.Identity()], [map_tokens])
    with pytest.raises(UserError, match='no feature map'), tap:
        tap.entropy(2)


def test_a_pass_ends_at_the_last_tap():
    """The model runs whole once, to show how many taps there are, and no further than to the last from then on."""
    ran = []

    class Model(torch.nn.Module):

        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Identity(), torch.nn.Identity()

        def forward(self, x):
            y = self.second(self.first(x) * 2)
            ran.append('behind')
            return y

    model, x = Model(), torch.randn(2, 3, 10, 4)
    tap = PatchSimilarityTap([model.first, model.second], [attention_tokens] * 2)
    entropies = []
    for _ in range(3):
        tap.run(model, x)
        entropies.append(tap.entropy(2))
    assert ran == ['behind'] and torch.equal(entropies[0], entropies[1]) and torch.equal(entropies[1], entropies[2])
    model(x)  # anybody else's pass is not cut short
    assert ran == ['behind', 'behind']


def test_nan_tokens_give_nan_and_no_crash(density):
    tokens = torch.randn(2, 9, 5)
    tokens[1, 3] = float('nan')
    entropy = patch_similarity_entropy(tokens, 2, density=density)
    assert torch.isfinite(entropy[0]) and torch.isnan(entropy[1])


def test_no_intermediate_is_larger_than_the_similarities():
    """Counts the largest tensor that any op makes: a strip of Gamma, not points x Gamma or Gamma x d."""
    from torch.utils._python_dispatch import TorchDispatchMode
    largest = 0

    class Watch(TorchDispatchMode):

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.numel())
            return out

    tokens = torch.randn(2, 600, 64, requires_grad=True)
    patch_similarity_entropy(tokens[:1], 1).sum()  # builds the grid
    with Watch():
        patch_similarity_entropy(tokens, 2).sum().backward()
    assert largest <= 2 * 600 * 600 / 4
