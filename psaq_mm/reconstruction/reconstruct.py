"""Reconstruction of one unit: its quantized output comes as close as it can to that of its full-precision original.

Source: BRECQ (ICLR 2021) for blocks as units, QDrop (ICLR 2022) and GLF-Q (2026) for inputs that are a random mix of
the full-precision and the quantized model's, GLF-Q for the error of the final features beside the local one. Ours: that
error to first order. The Jacobian of the final features is met in random directions once, before the unit learns,
instead of running the rest of the model at each update; its mean square weighs the squared error of each element.
"""
from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..quantization import hooked, quantized_layers
from ..quantization.weights import nested_values
from .config import ReconstructionConfig
from .nested import floats, mapped
from .recording import attempt, given
from .rounding import LearnedRounding

SHARES = (0.85, 0.7, 0.55, 0.42, 0.3, 0.2, 0.12, 0.07, 0.04)  # of a calibrated range, that are tried; our choice
PATIENCE = 2  # shares in a row without a gain, after which smaller ones are not tried; our choice
SEARCHED = 32  # images that they are tried on, or about as many; our choice
POSITIONS = 8192  # tokens or pixels that an update learns from, and each batch of the search has, where an image can do
# without the others of its batch; our choice


class Sample(NamedTuple):
    """What a unit learns from: one call of it on a batch.

    Args:
        exact: Its arguments in the full-precision model, (args, kwargs) as :func:`record` keeps them.
        quantized: Its arguments in the quantized model.
        aims: What its full-precision original puts out.
        weights (list[Tensor], optional): :func:`importance` of each tensor of ``aims``.
    """
    exact: Any
    quantized: Any
    aims: Any
    weights: list[Tensor] | None = None


def importance(unit: nn.Module, runs: Sequence[Callable[[], Sequence[Tensor]]], generator) -> list[list[Tensor]]:
    """Return how much each element of a unit's output matters to the final features.

    The mean over images and random directions u of (d <u, f / |f|> / d z)^2: the diagonal of the Gauss-Newton matrix.

    Args:
        unit (nn.Module): In the full-precision model.
        runs (Sequence[Callable]): Each runs that model on a batch, all of them of one size, and returns the final
            feature maps. Each meets one random direction for every image.
        generator (torch.Generator): Draws them; on the CPU.

    Returns:
        list[list[Tensor]]: For each call, in order, one tensor for each of floating-point numbers that it puts out, of
        its shape but for the first axis, which is 1, and of mean 1; all 1 where the features do not depend on it.
    """
    outputs, sums = [], None

    def watch(module, args, output):
        def leaf(value):
            return value.detach().requires_grad_() if value.is_floating_point() else value
        output = mapped(output, leaf)
        outputs.append(floats(output))
        return mapped(output, lambda value: value * 1)  # what follows may change it in place

    with hooked([unit.register_forward_hook(watch)]):
        for run in runs:
            outputs.clear()
            with torch.enable_grad():
                features = [f.float() for f in run() if f.requires_grad]
                score = sum((f * (torch.randint(2, f.shape, generator=generator).to(f.device) * 2 - 1)).sum() / (
                    f.detach().square().mean().sqrt() * f.numel() ** 0.5 + 1e-12) for f in features)
            leaves = [value for call in outputs for value in call]
            grads = torch.autograd.grad(score, leaves, allow_unused=True) if features else [None] * len(leaves)
            squares = [torch.zeros_like(value[:1], dtype=torch.float32) if grad is None else
                       grad.float().square().mean(0, keepdim=True) for value, grad in zip(leaves, grads)]
            sums = squares if sums is None else [a + b for a, b in zip(sums, squares)]
    weights = iter([total / mean if (mean := total.mean()) > 0 else torch.ones_like(total) for total in sums])
    return [[next(weights) for _ in call] for call in outputs]


def images_of(output) -> int:
    """Return how many images a unit's output is of: the length of its first axis, 1 where there is none."""
    first = floats(output)[0]
    return len(first) if first.dim() else 1


def of_images(nested, chosen: slice | Tensor, total: int):
    """Return nested tensors with some of ``total`` images alone, where their first axis is that of the images."""
    return mapped(nested, lambda value: value[chosen] if value.dim() and len(value) == total else value)


@torch.no_grad()
def unrelated(exact: Sequence, quantized: Sequence) -> bool:
    """Return whether what a unit gets in two models is not of the same things.

    Queries or boxes that each model chooses for itself differ as much as those of two images. Each may be good, and the
    output for one is no aim for the other.

    Args:
        exact, quantized (Sequence): Arguments of all calls in the full-precision and in the quantized model.
    """
    ours, theirs = floats(exact), floats(quantized)
    if [value.shape for value in ours] != [value.shape for value in theirs]:
        return True
    power = sum(value.float().square().sum() for value in ours)
    return bool(sum((a.float() - b.float()).square().sum() for a, b in zip(ours, theirs)) > power)


@torch.no_grad()
def enough_images(unit: nn.Module, arguments: tuple, output, tell: Callable[[str], None] = lambda message: None) -> int:
    """Return how many images of a batch give an update enough to learn from.

    Maps of large images have thousands of positions, and one image says as much as many small ones do.

    Args:
        unit (nn.Module): In the quantized model.
        arguments (tuple): What it gets, (args, kwargs) as :func:`record` keeps them.
        output: What its original puts out; the first axis of the first tensor is that of the images.
        tell (Callable): Is told if the unit fails with fewer images.

    Returns:
        int: As many as have :data:`POSITIONS` tokens or pixels behind the layer that makes most, at least 1; all of
        them where the unit does not treat each image by itself.
    """
    total, seen = len(floats(output)[0]), [0]

    def watch(layer, inputs, made):
        channels = getattr(layer, 'out_channels', layer.weight.shape[0])
        seen[0] = max(seen[0], sum(value.numel() for value in floats(made)) // channels)

    def run(args, kwargs):
        return floats(unit(*mapped(args, given), **mapped(kwargs, given)))

    handles = [layer.register_forward_hook(watch) for layer in quantized_layers(unit).values()
               if hasattr(layer, 'input_quantizer')]
    with hooked(handles):
        whole = run(*arguments)
    count = max(1, math.ceil(POSITIONS * total / max(1, seen[0])))
    if count >= total:
        return total
    part = []
    with attempt(tell, 'each update takes all images of a batch'):
        part = run(*of_images(arguments, slice(count), total))
    alone = part and all(value.shape == (count, *all_.shape[1:]) and len(all_) == total
                and (value - all_[:count]).float().abs().mean() <= 1e-2 * all_.float().abs().mean()
                for value, all_ in zip(part, whole))
    return count if alone else total


class UnitReconstruction:
    """Learns the parameters of one unit.

    Args:
        unit (nn.Module): In the quantized model.
        samples (list[Sample]): Of each batch and call.
        parameters (list[Tensor]): What the unit learns with ``lr``, or where a weight learns its rounding, with
            ``config.rounding_lr``.
        ranges (list[Tensor]): What it learns with ``config.range_lr``.
        lr (float): Peak learning rate of ``parameters``.
        config (ReconstructionConfig): How it learns.
        precision (Callable): The context in which features are computed.
        average (Callable): Averages the gradients of a list of parameters over processes, in place.
        mean (Callable): Averages a float over processes.
        tell (Callable): Is told if each update takes more images than it needs.
    """

    def __init__(self, unit: nn.Module, samples: list[Sample], parameters: list[Tensor], ranges: list[Tensor],
                 lr: float, config: ReconstructionConfig, precision: Callable = nullcontext,
                 average: Callable[[list[Tensor]], None] = lambda parameters: None,
                 mean: Callable[[float], float] = float,
                 tell: Callable[[str], None] = lambda message: None):
        self.unit, self.samples, self.parameters, self.ranges = unit, samples, parameters, ranges
        self.lr, self.config = lr, config
        self.precision, self.average, self.mean, self.tell = precision, average, mean, tell
        self.before = None  # copies of what the unit learns, and the error with them
        self.error = self.adam = None
        self.roundings: dict[int, LearnedRounding] = {}  # by id of the weight
        self.enough: dict[tuple, int] = {}  # by shape of the output: images of a batch that an update learns from

    def loss(self, sample: Sample, generator=None) -> tuple[Tensor, Tensor]:
        """Return the squared errors of the unit's output over its power, plain and by importance.

        Args:
            sample (Sample): Of ``samples``.
            generator (torch.Generator, optional): Draws the mix; without it inputs are those of the quantized model.
        """
        def mixed(a, b):
            a, b = given(a), given(b)
            if generator is None or not b.is_floating_point() or a.shape != b.shape:
                return b
            return torch.where(torch.rand(b.shape, generator=generator, device=b.device) < self.config.mix, a, b)

        sources = (value for value in nested_values(sample.exact) if isinstance(value, Tensor))
        args, kwargs = mapped(sample.quantized, lambda value: mixed(next(sources), value))
        with self.precision():
            outputs = floats(self.unit(*args, **kwargs))
        plain, weighted = [], []
        for number, (found, aim) in enumerate(zip(outputs, floats(sample.aims))):
            aim = given(aim).float()
            error = (found.float() - aim).square()
            plain.append(error.mean() / aim.square().mean().clamp(min=1e-12))
            if sample.weights is not None:
                weight = sample.weights[number]
                weighted.append((error * weight).mean() / (aim.square() * weight).mean().clamp(min=1e-12))
        plain = torch.stack(plain).mean()
        return plain, torch.stack(weighted).mean() if weighted else plain.detach()

    def part(self, sample: Sample, rng: random.Random) -> Sample:
        """Return what an update learns from: as many images of a sample as it needs, drawn at random."""
        first, total = floats(sample.aims)[0], images_of(sample.aims)
        if first.shape not in self.enough:
            with self.precision():
                self.enough[first.shape] = enough_images(
                    self.unit, sample.quantized, sample.aims, self.tell) if total > 1 else 1
        count = self.enough[first.shape]
        if count == total:
            return sample
        chosen = torch.tensor(rng.sample(range(total), count), device=first.device)
        return Sample(*(of_images(nested, chosen, total) for nested in sample[:3]), sample.weights)

    @torch.no_grad()
    def measure(self) -> float:
        """Return the mean error of the unit on all samples, with the quantized model's inputs."""
        found = [self.combined(*self.loss(sample)).item() for sample in self.samples]
        return self.mean(sum(found) / len(found))

    def combined(self, plain: Tensor, weighted: Tensor) -> Tensor:
        """Return what the unit minimises."""
        return (plain + self.config.final * weighted) / (1 + self.config.final)

    def learned(self) -> list[Tensor]:
        """Return all that the unit learns."""
        return [*self.parameters, *self.ranges]

    def start(self, rounded: Sequence[nn.Module] = (), error: float | None = None) -> None:
        """Get ready to learn.

        Args:
            rounded (Sequence[nn.Module]): Quantized layers, of whose weights the unit learns the rounding alone where
                it learns them. Other parameters go where the error leads.
            error (float, optional): Of the unit as it is, if that has been measured.
        """
        self.before = [value.detach().clone() for value in self.learned()]
        self.error = self.measure() if error is None else error
        self._prepare(rounded)

    def _prepare(self, rounded: Sequence[nn.Module]) -> None:
        starts = {id(value): start for value, start in zip(self.parameters, self.before)}
        for layer in rounded:
            weight = getattr(layer, 'weight', None)
            if getattr(layer, 'weight_quantizer', None) is not None and id(weight) in starts:
                self.roundings.setdefault(id(weight), LearnedRounding(layer, starts[id(weight)]))
        free = [value for value in self.parameters if id(value) not in self.roundings]
        places = [rounding.place for rounding in self.roundings.values()]
        rates = (free, self.lr), (places, self.config.rounding_lr), (self.ranges, self.config.range_lr)
        self.adam = torch.optim.Adam([dict(params=values, lr=rate, peak=rate) for values, rate in rates if values],
                                     fused=True)

    @torch.no_grad()
    def search(self) -> tuple[float, float]:
        """Shrink the ranges, one after the other, to the share with the least error of the unit's output.

        What learns by gradients afterwards cannot leave a bad start: a range for attention weights that reaches from 0
        to 1 rounds nearly all of them to 0, and gradients say little there. The search sees a part of the samples, and
        leaves a range when :data:`PATIENCE` shares in a row bring nothing. On all samples, the error is not larger than
        before: else the ranges stay as they were.

        Returns:
            tuple[float, float]: The unit's error before and now.
        """
        rng, kinds = random.Random(0), {}
        for sample in self.samples:  # levels of a pyramid, sizes of images: of each some
            kinds.setdefault(tuple(value.shape[1:] for value in floats(sample.aims)), []).append(sample)
        seen = []
        for kind in kinds.values():
            parts = max(1, round(SEARCHED / len(kinds) / images_of(self.part(kind[0], rng).aims)))
            seen += [self.part(sample, rng) for sample in kind[::max(1, len(kind) // parts)][:parts]]

        def error():
            return self.mean(sum(self.combined(*self.loss(sample)).item() for sample in seen) / len(seen))

        initial, best, before = self.measure(), error(), [stretch.clone() for stretch in self.ranges]
        for stretch in self.ranges:
            chosen, worse = stretch.clone(), 0
            for share in SHARES:
                stretch.fill_(math.log(share))
                found = error()
                worse += 1
                if found < best:
                    best, chosen, worse = found, stretch.clone(), 0
                if worse == PATIENCE:
                    break
            stretch.copy_(chosen)
        found = self.measure()
        if found < initial:
            return initial, found
        for stretch, old in zip(self.ranges, before):
            stretch.copy_(old)
        return initial, initial

    def step(self, share: float, settled: float, rng: random.Random, device) -> dict:
        """Make one update.

        Args:
            share (float): Of the peak learning rates.
            settled (float): Share of the weights with learned rounding that are to be on their integer for good.
            rng (random.Random): Chooses the sample and the mix.
            device (torch.device): Of the unit.

        Returns:
            dict: For the log: ``error``, squared, over the power of the unit's output.
        """
        for group in self.adam.param_groups:
            group['lr'] = group['peak'] * share
        sample = self.part(self.samples[rng.randrange(len(self.samples))], rng)
        generator = torch.Generator(device).manual_seed(rng.getrandbits(32))
        plain, weighted = self.loss(sample, generator)
        learned, changed = self.learned(), []
        grads = torch.autograd.grad(self.combined(plain, weighted), learned, allow_unused=True)
        for value, grad in zip(learned, grads):
            grad = torch.zeros_like(value) if grad is None else grad
            rounding = self.roundings.get(id(value))
            if rounding is not None:
                value, grad = rounding.place, rounding.gradient(grad)
            value.grad = grad
            changed.append(value)
        self.average(changed)
        self.adam.step()
        self.adam.zero_grad()
        for rounding in self.roundings.values():
            rounding.apply(settled)
        return dict(error=plain.item())

    @torch.no_grad()
    def finish(self) -> tuple[float, float]:
        """Leave the unit with what it learned, or as it was where that is better.

        Returns:
            tuple[float, float]: Its error before and now.
        """
        # What follows, or another machine, starts from the integers themselves: in the middle between two of them, the
        # least change rounds a weight the other way.
        for rounding in self.roundings.values():
            rounding.apply(1.0)
        found = self.measure()
        if found < self.error:  # NaN is not
            return self.error, found
        for value, old in zip(self.learned(), self.before):
            value.copy_(old)
        return self.error, self.error

    def state_dict(self) -> dict:
        """Return what an interrupted reconstruction needs besides the parameters."""
        return dict(adam=self.adam.state_dict(), ranges=[r.detach().clone() for r in self.ranges], error=self.error,
                    before=self.before, roundings=[r.state_dict() for r in self.roundings.values()])

    @torch.no_grad()
    def load_state_dict(self, state: dict, rounded: Sequence[nn.Module] = ()) -> None:
        """Go on where another left off.

        Args:
            state (dict): From :meth:`state_dict`.
            rounded (Sequence[nn.Module]): As for :meth:`start`.
        """
        self.error, self.before = state['error'], state['before']
        self._prepare(rounded)
        self.adam.load_state_dict(state['adam'])
        for value, saved in zip(self.ranges, state['ranges']):
            value.copy_(saved)
        for rounding, saved in zip(self.roundings.values(), state['roundings']):
            rounding.load_state_dict(saved)
