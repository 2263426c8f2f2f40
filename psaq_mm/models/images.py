"""What images a model takes: their channels, their size, their range, and which layers read their pixels.

None of that is read off a class. A copy of the backbone without numbers (tensors on torch's ``meta`` device have shapes
only) runs on images of one kind or another, which costs next to nothing and leaves no trace in the model; where that
cannot run, a real copy does. Source: our choice.
"""
from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..errors import UserError
from ..quantization import Mode, set_mode
from ..quantization.weights import PRODUCTS
from .backbones import backbone_of

DEFAULT_SIZE = 224, 224  # where neither stanza nor model says anything else
SIZES = 64, 96, 128, 192, 256, 288, 320, 384, 448, 512, 640  # to try where a model takes none that it names
STEPS = 32, 112  # pixels more: a model that takes neither has one size. The latter is a multiple of patches of 14
SIZE_NAMES = 'img_size', 'image_size', 'input_size'
LAYERS = nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d


class _Reached(Exception):
    """Ends a pass that has gone far enough."""


class Trial:
    """Copies of a backbone that run on images to find out whether they can.

    Args:
        backbone (nn.Module): Converted or not; nothing in it changes.
    """

    def __init__(self, backbone: nn.Module):
        self.backbone = backbone

    @functools.cached_property
    def shapes(self) -> nn.Module | None:
        """A copy whose parameters and buffers have shapes only; None where the backbone cannot be copied."""
        tensors = {id(t): t for t in itertools.chain(self.backbone.parameters(), self.backbone.buffers())}
        return self._copied({key: self._on_meta(t) for key, t in tensors.items()})

    @functools.cached_property
    def real(self) -> nn.Module | None:
        """A copy with numbers; None where the backbone cannot be copied."""
        return self._copied({})

    @staticmethod
    def _on_meta(tensor):
        shape = tensor.detach().to('meta')
        return nn.Parameter(shape, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else shape

    def _copied(self, memo):
        try:
            made = copy.deepcopy(self.backbone, memo)
        except Exception:  # whatever a user's module raises when it is copied
            return None
        made.eval()  # returns nothing in some libraries
        set_mode(made, Mode.FLOAT)
        return made

    def copies(self) -> Iterator[tuple[nn.Module, torch.device]]:
        """The copies that there are and where images for them belong, the cheap one first.

        The real one is not made where the cheap one does all that is asked.
        """
        for kind in ('shapes', 'real'):
            made = getattr(self, kind)
            if made is not None:
                yield made, next((t.device for t in made.parameters()), torch.device('cpu'))

    @torch.no_grad()
    def takes(self, channels: int, size: tuple[int, int]) -> bool:
        """Whether an image of so many channels and this size, (H, W), can be run."""
        for made, device in self.copies():
            try:
                with device:
                    made(torch.zeros(1, channels, *size))
                return True
            except Exception:  # whatever a model raises for such an image
                continue
        return False

    @torch.no_grad()
    def reaches_a_layer(self, channels: int, size: tuple[int, int]) -> bool:
        """Whether the first layer of the backbone can read an image of so many channels."""

        def end(*unused):
            raise _Reached

        for made, device in self.copies():
            handles = [m.register_forward_hook(end) for m in made.modules() if isinstance(m, LAYERS)]
            try:
                with device:
                    made(torch.zeros(1, channels, *size))
                return not handles
            except _Reached:
                return True
            except Exception:  # whatever a model raises for such an image
                continue
            finally:
                for handle in handles:
                    handle.remove()
        return False


def named_sizes(model: nn.Module) -> list[tuple[int, int]]:
    """Image sizes, (H, W), that a model or a module of its backbone names, the model's own first."""
    found = [getattr(model, 'image_size', None)]
    for module in backbone_of(model).modules():
        found += [getattr(module, name, None) for name in SIZE_NAMES]
        known = getattr(module, 'pretrained_cfg', None)
        if isinstance(known, dict) and known.get('input_size'):  # timm's, (channels, H, W)
            found.append(tuple(known['input_size'])[-2:])
    pairs = [(size, size) if isinstance(size, int) else size for size in found]
    return list(dict.fromkeys(tuple(pair) for pair in pairs if isinstance(pair, (tuple, list)) and len(pair) == 2
                              and all(isinstance(side, int) and side > 0 for side in pair)))


def image_channels(model: nn.Module) -> int:
    """How many channels the images of a model have.

    Args:
        model (nn.Module): A detector, segmentor or classifier, converted or not.
    """
    backbone = backbone_of(model)
    convolutions = [m.in_channels for m in backbone.modules() if isinstance(m, nn.Conv2d)]
    first = convolutions[:1]
    statistics = _statistics(model)
    normalised = [len(statistics[0])] if statistics and len(statistics[0]) > 1 else []
    # stems that fold neighbouring pixels into channels read 4 or 16 times as many
    folded = [count // factor for count in first for factor in (4, 16) if count % factor == 0]
    few = sorted({count for count in convolutions if count <= 16})
    trial = Trial(backbone)
    for count in dict.fromkeys([*first, *normalised, 3, 1, *folded, *few]):
        if any(trial.reaches_a_layer(count, size) for size in [*named_sizes(model)[:2], DEFAULT_SIZE]):
            return count
    return (first or normalised or [3])[0]


def own_size(model: nn.Module) -> tuple[int, int] | None:
    """The only image size that a model takes, (H, W), or None where it takes others, too."""
    trial, channels = Trial(backbone_of(model)), image_channels(model)
    named = named_sizes(model)
    for height, width in [*named, DEFAULT_SIZE][:4]:
        if any(trial.takes(channels, (height, width + step)) for step in STEPS):
            return None
        if trial.takes(channels, (height, width)):
            return height, width
    return next(((side, side) for side in SIZES if trial.takes(channels, (side, side))), None)


def default_size(model: nn.Module) -> tuple[int, int]:
    """The image size, (H, W), for a model where nobody asks for another: the one that the model names as that of its
    images, or the only one it takes, or 224 x 224.
    """
    size = getattr(model, 'image_size', None) or own_size(model) or DEFAULT_SIZE
    return int(size[0]), int(size[1])


def preprocessors(model: nn.Module) -> list[nn.Module]:
    """The modules of a model's data preprocessor, which may be wrapped: as of a model that sees several branches."""
    preprocessor = getattr(model, 'data_preprocessor', None)
    return list(preprocessor.modules()) if isinstance(preprocessor, nn.Module) else []


def _statistics(model):
    """Mean and standard deviation of a model's preprocessor, flat tensors; None where it does not normalise."""
    for module in preprocessors(model):
        if getattr(module, 'mean', None) is not None and getattr(module, 'std', None) is not None:
            return [torch.as_tensor(getattr(module, name)).detach().flatten().float().cpu() for name in ('mean', 'std')]
    return None


def swaps_channels(model: nn.Module) -> bool:
    """Whether the preprocessor turns files' BGR into RGB; one that does not say so is taken to."""
    said = [getattr(module, name) for module in preprocessors(model)
            for name in ('_channel_conversion', 'channel_conversion') if hasattr(module, name)]
    return any(said) or not said


def pixel_statistics(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation by which a model's images are normalised, (channels,) each, in 0..255.

    Raises:
        UserError: If the preprocessor has others than one a channel.
    """
    channels, found = image_channels(model), _statistics(model)
    if found is None:
        return torch.zeros(channels), torch.ones(channels)
    for name, values in zip(('mean', 'std'), found):
        if len(values) not in (1, channels):
            raise UserError(f'model.data_preprocessor.{name} has {len(values)} values, but the model takes images of '
                            f'{channels} channel{"s" * (channels > 1)}: give mean and std one value a channel')
    mean, std = (values.expand(channels).clone() for values in found)
    return mean, std


class _PixelTrace(TorchFunctionMode):
    """Finds the layers that read an image before any other has."""

    def __init__(self, names: dict[int, str]):
        super().__init__()
        self.names = names  # of layers, by the id of their weight
        self.image, self.kept = set(), []  # ids of tensors that are rearranged pixels, and the tensors
        self.seen, self.found = set(), set()

    def see(self, value):
        for tensor in tree_leaves(value):
            if isinstance(tensor, Tensor) and id(tensor) not in self.image:
                self.image.add(id(tensor))
                self.kept.append(tensor)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        of_image = any(id(t) in self.image for t in tensors)
        if func in PRODUCTS:
            names = {self.names[id(t)] for t in tensors if id(t) in self.names}
            self.seen |= names
            self.found |= names if of_image else set()
        elif of_image:
            self.see(result)
        return result


@torch.no_grad()
def mark_pixel_layers(model: nn.Module) -> None:
    """Sets ``reads_pixels`` of all layers: whether they read the image itself, as a patch embedding or a stem does.

    Those that the backbone does not run are judged by their number of channels.

    Args:
        model (nn.Module): Not converted.
    """
    backbone, channels = backbone_of(model), image_channels(model)
    layers = {name: module for name, module in backbone.named_modules() if isinstance(module, LAYERS)}
    seen, found = set(), set()
    for made, device in Trial(backbone).copies():
        trace = _PixelTrace({id(made.get_submodule(name).weight): name for name in layers})
        with device:
            image = torch.zeros(1, channels, *(named_sizes(model) or [DEFAULT_SIZE])[0])
        trace.see(image)
        try:
            with device, trace:
                made(image)
        except Exception:  # what has been seen until then counts
            pass
        seen, found = seen | trace.seen, found | trace.found
        if found:
            break
    known = {layers[name] for name in seen}
    pixels = {layers[name] for name in found}
    for module in model.modules():
        if isinstance(module, LAYERS):
            unseen = module not in known and isinstance(module, nn.Conv2d) and module.in_channels == channels
            module.reads_pixels = module in pixels or unseen
