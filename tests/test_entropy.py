"""Patch-similarity entropy against scipy's kernel density and against finite differences."""
import math

import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid
from scipy.stats import gaussian_kde

from psaq_mm.synthesis import PatchSimilarityTap, density_entropy, patch_similarity, patch_similarity_entropy


def scipy_entropy(values, bandwidth):
    """The same quantity by scipy: exact Gaussian kernel density on a fine grid, trapezoid rule."""
    density = gaussian_kde(values, bw_method=bandwidth / np.std(values, ddof=1))
    at = np.linspace(-1 - 8 * bandwidth, 1 + 8 * bandwidth, 8001)
    p = density(at)
    return trapezoid(-p * np.log(np.maximum(p, 1e-300)), at)


@pytest.mark.parametrize('bandwidth', [0.01, 0.05])
@pytest.mark.parametrize('kind', ['uniform', 'narrow', 'two'])
def test_entropy_equals_scipy(bandwidth, kind):
    rng = np.random.default_rng(0)
    values = dict(uniform=rng.uniform(-1, 1, 2000), narrow=rng.normal(0.3, 0.02, 2000).clip(-1, 1),
                  two=np.concatenate([rng.normal(-0.5, 0.1, 500), rng.normal(0.8, 0.05, 500)]).clip(-1, 1))[kind]
    ours = density_entropy(torch.tensor(values, dtype=torch.float32)[None], bandwidth).item()
    assert ours == pytest.approx(scipy_entropy(values, bandwidth), abs=0.01)


def test_known_values():
    uniform = torch.linspace(-1, 1, 20001)[None]
    assert density_entropy(uniform).item() == pytest.approx(math.log(2), abs=0.02)
    constant = torch.full((1, 100), 0.25)
    assert density_entropy(constant).item() == pytest.approx(math.log(0.01 * math.sqrt(2 * math.pi * math.e)), abs=0.02)


def test_gradient_equals_finite_differences():
    """Against central differences of scipy's entropy: an independent estimate, not our own forward."""
    rng = np.random.default_rng(1)
    values, bandwidth, step = rng.normal(0.2, 0.25, 60).clip(-0.95, 0.95), 0.05, 1e-4
    x = torch.tensor(values, dtype=torch.float32)[None].requires_grad_()
    density_entropy(x, bandwidth).sum().backward()
    at = np.linspace(-1.4, 1.4, 6001)

    def entropy(v):
        p = np.exp(-0.5 * ((at[:, None] - v) / bandwidth)**2).mean(1) / (bandwidth * math.sqrt(2 * math.pi))
        return trapezoid(-p * np.log(np.maximum(p, 1e-300)), at)

    expected = []
    for index in range(len(values)):
        up, down = values.copy(), values.copy()
        up[index] += step
        down[index] -= step
        expected.append((entropy(up) - entropy(down)) / (2 * step))
    expected = np.array(expected)
    error = np.abs(x.grad[0].numpy() - expected).max()
    assert error < 0.03 * np.abs(expected).max(), (error, np.abs(expected).max())


def test_gradient_through_tokens_raises_the_entropy():
    tokens = torch.randn(4, 16, 8) * 0.1 + torch.randn(8)
    tokens.requires_grad_()
    before = patch_similarity_entropy(tokens, 2).sum()
    before.backward()
    after = patch_similarity_entropy(tokens + 0.01 * tokens.grad / tokens.grad.abs().max(), 2).sum()
    assert after > before


def test_images_are_independent_and_windows_are_pooled():
    tokens = torch.randn(6, 9, 5)  # 2 images of 3 windows
    both = patch_similarity_entropy(tokens, 2)
    assert torch.allclose(both[1:], patch_similarity_entropy(tokens[3:], 1), atol=1e-5)
    pooled = density_entropy(patch_similarity(tokens[:3]).reshape(1, -1))
    assert torch.allclose(both[:1], pooled, atol=1e-6)


def test_similarity_is_the_cosine():
    tokens = torch.randn(2, 5, 7)
    expected = torch.nn.functional.cosine_similarity(tokens[:, :, None], tokens[:, None], dim=-1)
    assert torch.allclose(patch_similarity(tokens), expected, atol=1e-6)


def test_tap_averages_heads_drops_class_tokens_and_forgets():
    product = torch.nn.Identity()
    tap = PatchSimilarityTap([product], [1])
    output = torch.randn(2, 3, 10, 4)
    product(output)
    assert torch.equal(tap.tokens[0], output.mean(1)[:, 1:])
    expected = patch_similarity_entropy(output.mean(1)[:, 1:], 2)
    assert torch.equal(tap.entropy(2), expected)
    assert not tap.tokens
    tap.remove()
    product(output)
    assert not tap.tokens


def test_nan_tokens_give_nan_and_no_crash():
    tokens = torch.randn(2, 9, 5)
    tokens[1, 3] = float('nan')
    entropy = patch_similarity_entropy(tokens, 2)
    assert torch.isfinite(entropy[0]) and torch.isnan(entropy[1])


def test_no_intermediate_is_larger_than_the_similarities():
    """Counts the largest tensor that any op makes: Gamma, not points x Gamma or Gamma x d."""
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

    tokens = torch.randn(2, 300, 64, requires_grad=True)
    patch_similarity_entropy(tokens[:1], 1).sum()  # builds the grid
    with Watch():
        patch_similarity_entropy(tokens, 2).sum().backward()
    kernel = 842**2
    assert largest <= max(2 * 300 * 300, kernel)
