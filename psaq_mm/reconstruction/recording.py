"""What units get and put out while a model runs."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress

import torch
from torch import Tensor, nn

from ..errors import is_out_of_memory
from ..quantization import hooked
from .nested import floats, mapped
from .units import Unit

CLOSE = 1e-4  # mean difference over mean size, up to which two recordings are one; our choice


class _Enough(BaseException):
    """Ends a pass of the model behind the unit. No model catches it."""


@contextmanager
def attempt(tell: Callable[[str], None], instead: str) -> Iterator[None]:
    """Try what a model may refuse with any error, and say what is done instead; memory that has ended is an error.

    Args:
        tell (Callable): Is told.
        instead (str): What is done then.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        tell(f'{instead} ({type(error).__name__}: {str(error).partition(chr(10))[0]})')


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
    found_values, values = floats(found), floats(wanted)
    return len(found) == len(wanted) and len(found_values) == len(values) and all(
        a.shape == b.shape and (a.float() - b.float()).abs().mean() <= CLOSE * b.float().abs().mean()
        for a, b in zip(found_values, values))


@contextmanager
def standing_in(outputs: Mapping[nn.Module, Sequence]) -> Iterator[None]:
    """Let modules put out what is given instead of computing it.

    Args:
        outputs (Mapping[nn.Module, Sequence]): What each module puts out, call by call. Its tensors are copied. A
            further call raises IndexError.
    """
    before = {module: vars(module).get('forward') for module in outputs}
    try:
        for module, values in outputs.items():
            module.forward = lambda *args, values=list(values), **kwargs: mapped(
                values.pop(0), lambda value: value.clone(memory_format=torch.contiguous_format))
        yield
    finally:
        for module, forward in before.items():
            vars(module).pop('forward', None)
            if forward is not None:
                module.forward = forward


class Recorder:
    """Records unit after unit on the same batches.

    Where a unit gets all that it gets from the unit before it, a pass starts there: the unit before runs on what was
    recorded of it, in half precision, and everything earlier puts out zeros. Other units, as a neck, are recorded from
    the pixels on. The first two batches of each shape are, too, and tell which is right: with what the unit before put
    out on the first, and what earlier units left behind on the second, the first has to be the same again.
    Source: our choice.

    Args:
        model (nn.Module): Holds the units.
        units (Sequence[Unit]): In the order in which it runs them.
        run (Callable): ``run(batch)`` runs the model.
        batches (Sequence[Tensor]): Of images (B, C, H, W).
        precision (Callable): The context in which ``run`` computes.
        tell (Callable): Is told of each unit that is recorded from the pixels on since the model fails otherwise.
    """

    def __init__(self, model: nn.Module, units: Sequence[Unit], run: Callable[[Tensor], object],
                 batches: Sequence[Tensor], precision: Callable[[], AbstractContextManager] = nullcontext,
                 tell: Callable[[str], None] = lambda message: None):
        self.units, self.modules = list(units), [model.get_submodule(unit.name) for unit in units]
        self.run, self.batches, self.precision, self.tell = run, batches, precision, tell
        self.recorded = 0  # units
        self.arguments: list = []  # of the last of them, for each batch

    def record(self, number: int) -> Iterator[list[tuple]]:
        """Yield for each batch what :func:`record` returns of one unit.

        Units are recorded in order. After an interruption the recorder records earlier ones first, and yields what it
        would have without the interruption.

        Args:
            number (int): Of the unit, larger than at the last call. Units before it have learned all they will.
        """
        while self.recorded < number:
            for _ in self._next():
                pass
        yield from self._next()

    def _next(self):
        number, self.recorded = self.recorded, self.recorded + 1
        earlier, self.arguments = self.arguments, []
        first: dict[torch.Size, tuple] = {}  # batch, recording, outputs of earlier units
        zeros: dict[torch.Size, dict | None] = {}  # what earlier units put out; None: from the pixels on
        for place, batch in enumerate(self.batches):
            shape, found = batch.shape, None
            if number and shape not in zeros:
                found, outputs = self._watched(number, batch)
                if shape in first:
                    zeros[shape] = self._zeros(number, *first.pop(shape), outputs)
                else:
                    first[shape] = batch, found, outputs
            elif number and zeros[shape] is not None:
                found = self._short(number, batch, earlier[place], zeros[shape])
            found = found or self._whole(number, batch)
            if number:
                earlier[place] = None  # memory
            self.arguments.append([arguments for arguments, _ in found])
            yield found

    def _whole(self, number, batch):
        return record(self.modules[number], self.units[number].calls, lambda: self.run(batch))

    @torch.no_grad()
    def _short(self, number, batch, arguments, zeros):
        """Return a recording that starts behind the unit before; None where that does not work for this batch."""
        before, found = self.modules[number - 1], []
        with self._attempt(number):  # a model may call its units now and then
            with self.precision():
                outputs = [before(*mapped(args, given), **mapped(kwargs, given)) for args, kwargs in arguments]
            with standing_in({**zeros, before: outputs}):
                found = self._whole(number, batch)
        return found if len(found) == self.units[number].calls else None

    def _attempt(self, number):
        return attempt(self.tell, f'{self.units[number].name}: what it gets is computed from the pixels on, which '
                       'takes longer')

    def _watched(self, number, batch):
        """Return a recording from the pixels on, and what earlier units put out: the one before, the others zeros."""
        outputs: dict[nn.Module, list] = {module: [] for module in self.modules[:number]}
        before = self.modules[number - 1]

        def after(module, args, output):
            outputs[module].append(mapped(output, lambda value: value.detach().clone() if module is before or
                                          not value.is_floating_point() else value.new_zeros(()).expand(value.shape)))

        with hooked([module.register_forward_hook(after) for module in outputs]):
            return self._whole(number, batch), outputs

    def _zeros(self, number, batch, found, outputs, others):
        """Return what earlier units may put out on any batch of this shape; None where it matters what they do.

        Args:
            number (int): Of the unit.
            batch, found, outputs: The first batch, and what :meth:`_watched` returned of it.
            others (dict): Outputs on another batch, the last one that the model ran on.
        """
        before = self.modules[number - 1]
        if not all(outputs.values()):
            return None
        zeros, again = {module: values for module, values in others.items() if module is not before}, []
        with self._attempt(number), standing_in({**zeros, before: outputs[before]}):  # it may need earlier units
            again = self._whole(number, batch)
        return zeros if alike(again, found) else None
