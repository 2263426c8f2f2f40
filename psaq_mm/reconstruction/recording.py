"""What units get and put out while a model runs."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress

import torch
from torch import Tensor, nn

from ..quantization import hooked
from ..quantization.weights import nested_values
from .units import Unit

CLOSE = 1e-3  # mean difference over mean size, below which two recordings are one; our choice


class _Enough(Exception):
    """Ends a pass of the model behind the unit."""


def mapped(nested, function: Callable[[Tensor], Tensor]):
    """Return nested dicts, tuples and lists with a function applied to every tensor in them."""
    if isinstance(nested, Tensor):
        return function(nested)
    if isinstance(nested, dict):
        return {key: mapped(value, function) for key, value in nested.items()}
    if isinstance(nested, (tuple, list)):
        return type(nested)(*(mapped(v, function) for v in nested)) if hasattr(nested, '_fields') else type(nested)(
            mapped(value, function) for value in nested)
    return nested


def floats(nested) -> list[Tensor]:
    """Return all tensors of floating-point numbers in nested dicts, tuples and lists, in order."""
    return [value for value in nested_values(nested) if isinstance(value, Tensor) and value.is_floating_point()]


def kept(value: Tensor) -> Tensor:
    """Return a copy that later operations in place do not reach; float32 in half the memory, exact to 0.05 %."""
    value = value.detach()
    limit = torch.finfo(torch.float16).max
    return value.clamp(-limit, limit).half() if value.dtype == torch.float32 else value.clone()


def given(value: Tensor) -> Tensor:
    """Return a kept tensor as the model computes with it."""
    return value.float() if value.dtype == torch.float16 else value.clone()


@torch.no_grad()
def record(unit: nn.Module, calls: int, run: Callable[[], object]) -> list[tuple]:
    """Return what a unit gets and puts out while a model runs, no deeper than it.

    Args:
        unit (nn.Module): In the model.
        calls (int): How often a pass runs it.
        run (Callable): Runs the model on a batch.

    Returns:
        list[tuple]: For each call, in order, its arguments (args, kwargs) and its output, detached.
    """
    found, inputs = [], []

    def before(module, args, kwargs):
        inputs.append((mapped(args, kept), mapped(kwargs, kept)))

    def after(module, args, output):
        found.append((inputs.pop(), mapped(output, kept)))
        if len(found) == calls:
            raise _Enough

    handles = [unit.register_forward_pre_hook(before, with_kwargs=True), unit.register_forward_hook(after)]
    with hooked(handles), suppress(_Enough):
        run()
    return found


def alike(found: Sequence[tuple], wanted: Sequence[tuple]) -> bool:
    """Return whether two recordings of one unit, as :func:`record` returns them, are the same but for rounding."""
    pairs = zip(floats(found), floats(wanted))
    return len(found) == len(wanted) and len(floats(found)) == len(floats(wanted)) and all(
        a.shape == b.shape and (a.float() - b.float()).abs().mean() <= CLOSE * b.float().abs().mean() for a, b in pairs)


@contextmanager
def standing_in(outputs: Mapping[nn.Module, Sequence]) -> Iterator[None]:
    """Let modules put out what is given instead of computing it.

    Args:
        outputs (Mapping[nn.Module, Sequence]): What each module puts out, call by call. Its values are copied.
    """
    before = {module: vars(module).get('forward') for module in outputs}
    for module, values in outputs.items():
        values = iter(values)
        module.forward = lambda *args, values=values, **kwargs: mapped(
            next(values), lambda value: value.clone(memory_format=torch.contiguous_format))
    try:
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward


class Recorder:
    """Records unit after unit on the same batches.

    A pass computes what lies between a unit and the one before it, and no more, where the unit gets all that it gets
    from there: the unit before runs on what was recorded of it, and everything earlier puts out zeros. A unit that
    other values reach, as a neck, is recorded from the pixels on. The first batch of each shape tells which: it is
    recorded in both ways. Source: our choice.

    Args:
        model (nn.Module): Holds the units.
        units (Sequence[Unit]): In the order in which it runs them.
        run (Callable): ``run(batch)`` runs the model.
        batches (Sequence[Tensor]): Of images (B, C, H, W).
        precision (Callable): The context in which ``run`` computes.
    """

    def __init__(self, model: nn.Module, units: Sequence[Unit], run: Callable[[Tensor], object],
                 batches: Sequence[Tensor], precision: Callable[[], AbstractContextManager] = nullcontext):
        self.units, self.modules = list(units), [model.get_submodule(unit.name) for unit in units]
        self.run, self.batches, self.precision = run, batches, precision
        self.recorded = 0  # units
        self.arguments: list = []  # of the last of them, for each batch

    def record(self, number: int) -> Iterator[list[tuple]]:
        """Yield for each batch what :func:`record` returns of one unit.

        Units are recorded in order. Where earlier ones have not been, as after an interruption, that is done first, and
        what is yielded is the same as without it.

        Args:
            number (int): Of the unit, not smaller than at the last call. Units before it have learned all they will.
        """
        while self.recorded < number:
            for _ in self._next():
                pass
        yield from self._next()

    def _next(self):
        number, self.recorded = self.recorded, self.recorded + 1
        earlier, self.arguments = self.arguments, []
        zeros: dict[torch.Size, dict | None] = {}  # by shape of a batch; None: from the pixels on
        for place, batch in enumerate(self.batches):
            if batch.shape not in zeros:
                found, zeros[batch.shape] = self._both_ways(number, batch, earlier[place] if number else None)
            elif zeros[batch.shape] is None:
                found = self._whole(number, batch)
            else:
                found = self._short(number, batch, earlier[place], zeros[batch.shape])
            if number:
                earlier[place] = None  # memory
            self.arguments.append([arguments for arguments, _ in found])
            yield found

    def _whole(self, number, batch):
        return record(self.modules[number], self.units[number].calls, lambda: self.run(batch))

    @torch.no_grad()
    def _short(self, number, batch, arguments, zeros):
        before = self.modules[number - 1]
        with self.precision():
            outputs = [before(*mapped(args, given), **mapped(kwargs, given)) for args, kwargs in arguments]
        with standing_in({**zeros, before: outputs}):
            return self._whole(number, batch)

    def _both_ways(self, number, batch, arguments):
        """Return a recording from the pixels on, and what earlier units put out where it can start behind them."""
        zeros: dict[nn.Module, list] = {module: [] for module in self.modules[:number]}

        def after(module, args, output):
            zeros[module].append(mapped(output, lambda value: value.new_zeros(()).expand(value.shape)
                                        if value.is_floating_point() else value.clone()))

        with hooked([module.register_forward_hook(after) for module in zeros]):
            found = self._whole(number, batch)
        if not number or not all(zeros.values()):
            return found, None
        try:
            short = self._short(number, batch, arguments, zeros)
        except Exception:  # whatever the model raises that cannot do without earlier units
            return found, None
        return found, zeros if alike(short, found) else None
