"""Scale reparameterisation behind norms: channels of one range for every layer that reads a LayerNorm.

Behind a LayerNorm channels differ by orders of magnitude, and one scale for all of them wastes most of a few bits. The
norm's own weight and bias can bring all channels to one range, and the weight of the layer that reads them can take
that back: exact in float, free at inference, plain in the exported graph. Source: RepQ-ViT (ICCV 2023) for the idea
and, at strength 1, the ratios. Ours: sites told by what feeds what; the strength, which trades the range of the input
for that of the weight, chosen by the error of the layer's output; centres aligned instead of minima, so that symmetric
quantizers gain as well; padded inputs, which are scaled only.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .conversion import quantized_layers, quantizer_mode
from .hooks import hooked
from .layers import QuantizedConv2d, QuantizedLayer, QuantizedProjection
from .observers import affine_parameters, build_observer, quantization_grid
from .quantizer import Mode
from .weights import SAME, TRANSPOSED, function_name, nested_values

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # tried for each site; 1 is RepQ-ViT's; our choice
ROWS = 4096  # of the input of a layer, that strengths are compared on; our choice
TOLERANCE = 1e-3  # of the features' magnitude: what rounding in float32 may change; our choice
PADDING = frozenset(('pad', 'constant_pad_nd', '_pad'))
# Functions whose result has the channels of their argument, value by value or averaged over positions.
CARRYING = SAME | TRANSPOSED | PADDING | frozenset((
    'view', 'reshape', 'reshape_as', 'view_as', 'flatten', 'unflatten', 'squeeze', 'unsqueeze', 'chunk', 'split',
    'split_with_sizes', 'tensor_split', 'narrow', 'select', 'index_select', '__getitem__', 'unbind', 'expand',
    'expand_as', 'repeat', 'roll', 'flip', 'cat', 'concat', 'stack', 'dropout', 'mean'))


@dataclass
class Site:
    """A norm and the quantized layers that read it, which nothing else does.

    Attributes:
        name (str): Of the norm.
        norm (nn.Module): With ``weight`` (C,), and ``bias`` (C,) or None.
        readers (list[nn.Module]): Each takes C channels.
        shifts (bool): Whether channels may be shifted as well: the norm and all readers have a bias, and no zeros are
            padded in between.
    """
    name: str
    norm: nn.Module
    readers: list[nn.Module]
    shifts: bool
    observer: object = field(default=None, repr=False)
    rows: list[Tensor] = field(default_factory=list, repr=False)  # (n, C) each: samples of what the readers take

    @property
    def parameters(self) -> list[Tensor]:
        """What a change of the channels changes."""
        found = [self.norm.weight, bias_of(self.norm), *(p for r in self.readers for p in (r.weight, bias_of(r)))]
        return [parameter for parameter in found if parameter is not None]


def channel_axis(layer: nn.Module) -> int:
    """Return the axis of a layer's input that its channels lie along."""
    return 1 if isinstance(layer, QuantizedConv2d) else -1


def reads_channels(layer: nn.Module) -> bool:
    """Return whether each output of a quantized layer is one sum over the channels of a position of its input."""
    if isinstance(layer, QuantizedConv2d):
        return layer.kernel_size == (1, 1) and layer.padding in ((0, 0), 'valid') and layer.groups == 1
    return isinstance(layer, QuantizedProjection) or isinstance(layer, (QuantizedLayer, nn.Linear)) and \
        layer.weight.dim() == 2


def inputs_of(arguments: Sequence) -> list[Tensor]:
    """Return the input tensors of a layer that was called with these arguments."""
    first = arguments[0] if arguments else None
    return list(first) if isinstance(first, (list, tuple)) else [first]


def bias_of(layer: nn.Module) -> Tensor | None:
    """Return a layer's or norm's bias, or None; of an attention's projection, that of the attention."""
    if isinstance(layer, QuantizedProjection):
        return layer.owner.in_proj_bias if layer.parameter == 'in_proj_weight' else None
    return getattr(layer, 'bias', None)


class _Follower(TorchFunctionMode):
    """Follows what norms put out to the layers that read it, while a model runs inside ``with``."""

    def __init__(self, norms: dict[nn.Module, str], layers: set[nn.Module]):
        super().__init__()
        self.norms, self.layers = norms, layers
        self.tags: dict[int, tuple] = {}  # by id: tensor, norm, whether zeros were padded
        self.readers: dict[nn.Module, dict[nn.Module, bool]] = {}  # of a norm: layer -> padded
        self.sources: dict[nn.Module, set] = {}  # of a layer: norms, or None for anything else
        self.elsewhere: set[nn.Module] = set()  # norms that something else reads
        self.inside = 0

    def __enter__(self):
        self.handles = []
        for module in (*self.norms, *self.layers):
            tell = self._read if module in self.layers else self._begin
            self.handles.append(module.register_forward_pre_hook(tell, prepend=True))
            self.handles.append(module.register_forward_hook(
                self._end if module in self.layers else self._put_out, always_call=True))
        return super().__enter__()

    def __exit__(self, *raised):
        for handle in self.handles:
            handle.remove()
        return super().__exit__(*raised)

    def _begin(self, module, inputs):
        if not self.inside:
            for value in nested_values(inputs):
                self._escape(value)
        self.inside += 1

    def _put_out(self, norm, inputs, output):
        self.inside -= 1
        if not self.inside and isinstance(output, Tensor):
            self.tags[id(output)] = output, norm, False

    def _read(self, layer, arguments):
        if not self.inside:
            for value in inputs_of(arguments):
                _, norm, padded = self.tags.get(id(value), (None, None, False))
                self.sources.setdefault(layer, set()).add(norm)
                if norm is not None:
                    readers = self.readers.setdefault(norm, {})
                    readers[layer] = padded or readers.get(layer, False)
        self.inside += 1

    def _end(self, *unused):
        self.inside -= 1

    def _escape(self, value):
        if id(value) in self.tags:
            self.elsewhere.add(self.tags[id(value)][1])

    def ends(self, values) -> None:
        """Tell what leaves the model: others may read it."""
        for value in nested_values(values):
            self._escape(value)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if self.inside:
            return result
        used = [self.tags[id(v)] for v in nested_values((args, kwargs or {})) if id(v) in self.tags]
        if not used:
            return result
        name = function_name(func)
        made = [value for value in nested_values(result) if isinstance(value, Tensor)]
        norms = {norm for _, norm, _ in used}
        given = [v for v in nested_values((args, kwargs or {})) if isinstance(v, Tensor) and v.is_floating_point()]
        if name in CARRYING and len(norms) == 1 and len(given) == len(used):
            for value in made:
                if value.is_floating_point():
                    self.tags[id(value)] = value, *norms, name in PADDING or any(padded for *_, padded in used)
        elif made or name == '__setitem__':
            self.elsewhere |= norms
        return result


@torch.no_grad()
def find_sites(model: nn.Module, run: Callable[[], Sequence[Tensor]]) -> tuple[list[Site], dict[str, str]]:
    """Find the norms that quantized linear layers read and nothing else.

    Args:
        model (nn.Module): Converted.
        run (Callable): Runs it on an image and returns whatever it puts out.

    Returns:
        tuple[list[Site], dict[str, str]]: The sites in the order of the norms' definition; why other norms that
        quantized layers read are left alone, by name.
    """
    norms = {m: name for name, m in model.named_modules() if isinstance(m, (nn.LayerNorm, nn.RMSNorm))
             and isinstance(m.weight, Tensor) and m.weight.dim() == 1}
    layers = {layer: name for name, layer in quantized_layers(model).items() if isinstance(layer, QuantizedLayer)
              and reads_channels(layer)}
    with quantizer_mode(model, Mode.FLOAT), _Follower(norms, set(layers)) as follower:
        follower.ends(run())
    holders = {}  # of each parameter: how many modules hold it
    for module in model.modules():
        for parameter in module._parameters.values():
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    sites, left = [], {}
    for norm, name in norms.items():
        readers = follower.readers.get(norm, {})
        if not readers:
            continue
        other = next((layers[r] for r in readers if follower.sources[r] != {norm}), None)
        shifts = not any(readers.values()) and all(bias_of(part) is not None for part in (norm, *readers))
        site = Site(name, norm, list(readers), shifts)
        if norm in follower.elsewhere:
            left[name] = 'something else than quantized linear layers reads it, too'
        elif other:
            left[name] = f"'{other}' reads more than this norm"
        elif any(r.input_quantizer is None or r.input_quantizer.per_channel for r in readers):
            left[name] = 'the input of a layer that reads it has no single scale'
        elif any(r.weight.shape[1] != len(norm.weight) for r in readers):
            left[name] = 'layers read its channels rearranged'
        elif any(holders.get(id(parameter), 0) > 1 for parameter in site.parameters):
            left[name] = 'it shares parameters with other layers'
        else:
            sites.append(site)
    return sites, left


@torch.no_grad()
def observe_sites(model: nn.Module, sites: Sequence[Site], run: Callable[[], None]) -> None:
    """Show the sites what their layers read.

    Args:
        model (nn.Module): In float for as long.
        sites (Sequence[Site]): From :func:`find_sites`.
        run (Callable): Feeds the calibration images through the model.
    """
    generator = torch.Generator().manual_seed(0)

    def watch(site, layer):
        def see(module, arguments):
            for value in inputs_of(arguments):
                rows = value.detach().movedim(channel_axis(layer), -1).flatten(0, -2).float()
                site.observer.update(rows.T)
                chosen = torch.randint(len(rows), (min(ROWS // 8, len(rows)), ), generator=generator)
                site.rows.append(rows[chosen.to(rows.device)])
                if len(site.rows) > 16:  # thinned, however many batches there are
                    site.rows = site.rows[::2]

        return layer.register_forward_pre_hook(see)

    handles = []
    for site in sites:
        site.observer, site.rows = build_observer(site.readers[0].input_quantizer.config), []
        handles += [watch(site, reader) for reader in site.readers]
    with hooked(handles), quantizer_mode(model, Mode.FLOAT):
        run()


def rounded(values: Tensor, config, axis: int | None = None) -> Tensor:
    """Return values as a min-max quantizer represents them, with one scale or one along an axis."""
    flat = values.reshape(1, -1) if axis is None else values.movedim(axis, 0).flatten(1)
    low, high = torch.aminmax(flat, dim=1)
    scale, zero_point = affine_parameters(low, high, config.bits, config.symmetric)
    ends = quantization_grid(config.bits, config.symmetric)
    if axis is None:
        return torch.fake_quantize_per_tensor_affine(values, scale, zero_point, *ends)
    return torch.fake_quantize_per_channel_affine(values, scale, zero_point, axis, *ends)


def output_errors(site: Site, ratio: Tensor, offset: Tensor) -> Tensor:
    """Return the squared error of the readers' outputs over their power, (), on the sampled rows.

    Args:
        site (Site): Observed.
        ratio, offset (Tensor): (C,) each: channels become ``x / ratio - offset``.
    """
    rows = torch.cat(site.rows)
    rows = rows[::math.ceil(len(rows) / ROWS)]
    error = power = rows.new_zeros(())
    for reader in site.readers:
        weight = reader.weight.detach().flatten(1)
        exact = rows @ weight.T
        scaled = weight * ratio
        if reader.weight_quantizer is not None:
            config = reader.weight_quantizer.config
            scaled = rounded(scaled, config, 0 if reader.weight_quantizer.per_channel else None)
        found = (rounded(rows / ratio - offset, reader.input_quantizer.config) + offset) @ scaled.T
        # What the offset adds is in the bias, in full precision: with the weight as it is, not as it is rounded.
        found += offset @ (weight * ratio - scaled).T
        error = error + (found - exact).square().sum()
        power = power + exact.square().sum()
    return error / power.clamp(min=1e-12)


@torch.no_grad()
def choose(site: Site, reduce=None, mean: Callable[[float], float] = float) -> tuple:
    """Choose how the channels of a site change.

    Args:
        site (Site): Observed.
        reduce (callable, optional): See :meth:`FakeQuantizer.calibrate`.
        mean (Callable): Averages a float over processes.

    Returns:
        tuple: ratio and offset, (C,) each; the strength; the relative squared error of the readers' outputs before
        and with it.
    """
    low, high = site.observer.range()
    if reduce is not None:
        low, high = reduce(low, high, site.observer.merge)
    # Without a shift 0 stays where it is: the larger end counts, and it takes part in every range.
    width = (high - low) / 2 if site.shifts else torch.maximum(high.abs(), low.abs())
    width = width.clamp(min=1e-5 * width.max().clamp(min=1e-12))
    centre = (high + low) / 2 if site.shifts else torch.zeros_like(low)
    plain = mean(output_errors(site, torch.ones_like(width), torch.zeros_like(width)).item())
    best = torch.ones_like(width), torch.zeros_like(width), 0.0, plain, plain
    for strength in STRENGTHS:
        ratio = (width / width.log().mean().exp()) ** strength
        offset = centre / ratio
        found = mean(output_errors(site, ratio, offset).item())
        if found < best[-1]:
            best = ratio, offset, strength, plain, found
    return best


@torch.no_grad()
def apply(site: Site, ratio: Tensor, offset: Tensor) -> None:
    """Change norm and readers of a site, in place: exact in float.

    Args:
        site (Site): The site.
        ratio, offset (Tensor): (C,) each: what the readers take becomes ``x / ratio - offset``.
    """
    site.norm.weight.div_(ratio)
    if bias_of(site.norm) is not None:
        site.norm.bias.div_(ratio).sub_(offset)
    for reader in site.readers:
        weight = reader.weight
        weight.mul_(ratio.view(1, -1, *[1] * (weight.dim() - 2)))
        if site.shifts:
            bias_of(reader).add_(weight.flatten(1) @ offset)


@torch.no_grad()
def reparameterize(model: nn.Module, run: Callable[[], None], example: Callable[[], Sequence[Tensor]], reduce=None,
                   mean: Callable[[float], float] = float) -> dict:
    """Bring the channels behind norms to one range wherever that lowers the error of the layers that read them.

    A site is put back where the model, in float, does not compute what it did.

    Args:
        model (nn.Module): Converted, not calibrated yet: its ranges are those of other values afterwards.
        run (Callable): Feeds the calibration images through the model.
        example (Callable): Runs the model on one image and returns what it puts out.
        reduce (callable, optional): See :meth:`FakeQuantizer.calibrate`.
        mean (Callable): Averages a float over processes.

    Returns:
        dict: ``changed``: name of each norm -> strength, relative squared error of its readers' outputs ``before`` and
        ``after``, ``shifted``; ``left``: name of each other norm that quantized layers read -> why.
    """
    sites, left = find_sites(model, example)
    changed = {}
    if not sites:
        return dict(changed=changed, left=left)
    observe_sites(model, sites, run)

    def outputs():
        with quantizer_mode(model, Mode.FLOAT):
            return [value.clone() for value in nested_values(example()) if isinstance(value, Tensor)]

    expected = outputs()
    for site in sites:
        ratio, offset, strength, before, after = choose(site, reduce, mean)
        if after >= before:
            left[site.name] = 'its channels are as good as they are'
            continue
        saved = [p.detach().clone() for p in site.parameters]
        apply(site, ratio, offset)
        same = all((a - b).abs().max() <= TOLERANCE * a.abs().max().clamp(min=1e-12)
                   for a, b in zip(expected, outputs()))
        if mean(float(same)) == 1:  # in every process
            changed[site.name] = dict(strength=strength, before=before, after=after, shifted=site.shifts)
        else:
            for parameter, value in zip(site.parameters, saved):
                parameter.copy_(value)
            left[site.name] = 'the model computes something else with changed channels'
        site.rows = []
    return dict(changed=changed, left=left)
