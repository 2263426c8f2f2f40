"""Where attention lives in a backbone, and the tokens that patch similarity is taken from."""
from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..quantization import CONTEXT, LAYERS, FakeQuantizer, attention_parts, head_count
from ..synthesis import HeadTap, PatchSimilarityTap, attention_tokens, is_grid, last_axis_tokens, map_tokens

CLASS_TOKENS = ('cls_token', 'class_token', 'class_embed')  # what the libraries call the parameter

def layer_types() -> dict:
    """Quantized counterparts of torch's layers and of mmcv's wrappers, which differ for empty inputs of old torch."""
    from mmcv.cnn.bricks import wrappers
    same = {getattr(wrappers, kind.__name__).forward: LAYERS[kind.forward]
            for kind in (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)}
    return {**LAYERS, **same}


def attention_blocks(backbone: nn.Module) -> list[nn.Module]:
    """The blocks that hold the attentions of a backbone, converted or not: members of a ModuleList or Sequential."""
    modules = dict(backbone.named_modules())
    blocks = {}
    for name, module in modules.items():
        if not hasattr(module, CONTEXT) and not attention_parts(module):
            continue
        while '.' in name:
            owner = name.rpartition('.')[0]
            if isinstance(modules[owner], (nn.ModuleList, nn.Sequential)):
                blocks[name] = modules[name]
                break
            name = owner
    return list(blocks.values())


def checkpoint_blocks(backbone: nn.Module) -> None:
    """Makes attention blocks recompute their activations in the backward pass, in place.

    Not the last one, in which a pass for patch similarities ends.
    """
    for block in attention_blocks(backbone)[:-1]:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def prefix_tokens(backbone: nn.Module, name: str) -> int:
    """How many leading tokens of a module in a backbone may be no patches: class token, distillation token, registers.

    The innermost module around it that says so counts, which may lie inside a wrapper.

    Args:
        backbone (nn.Module): Holds the module.
        name (str): Of the module in the backbone.
    """
    while name:
        name = name.rpartition('.')[0]
        owner = backbone.get_submodule(name)
        if hasattr(owner, 'num_prefix_tokens'):  # timm
            return owner.num_prefix_tokens
        if hasattr(owner, 'with_cls_token'):  # mmseg
            return int(owner.with_cls_token)
        if any(word in key for key, _ in owner.named_parameters(recurse=False) for word in CLASS_TOKENS):
            return 1
    return 0


def mixes_channels(module: nn.Module, output: Tensor) -> bool:
    """Whether the products of an attention lie over channels instead of positions.

    The projection behind the products reads all channels: those of one token in all heads, or all tokens of a
    position where the tokens are channels.

    Args:
        module (nn.Module): The attention.
        output (Tensor): Of its second product, (..., heads, N, d), or (B * heads, N, d).
    """
    heads = output.shape[-3] if output.dim() > 3 else head_count(module)
    reads = {layer.weight.shape[1] * getattr(layer, 'groups', 1) for layer in module.modules()
             if isinstance(layer, (nn.Linear, nn.Conv2d))}
    tokens, width = heads * output.shape[-2], heads * output.shape[-1]
    return tokens in reads and width not in reads


def similarity_taps(backbone: nn.Module, image: Tensor) -> tuple[list[nn.Module], list, nn.Module]:
    """The modules whose outputs hold the tokens of patch similarity, and how to read those of each.

    Attentions are read at their second product; those over channels, or of fewer than two patches, say nothing about
    patches and are left out. A backbone without any other is read at its feature maps: those that it puts out, or else
    the last one of each size inside it. Which modules these are shows when the backbone runs.

    Args:
        backbone (nn.Module): Of a converted model.
        image (Tensor): An example, (B, C, H, W).

    Returns:
        tuple[list[nn.Module], list, nn.Module]: Arguments of :class:`psaq_mm.synthesis.PatchSimilarityTap`.

    Raises:
        ValueError: If the backbone is not converted.
    """
    sources, readers = [], []
    for name, module in backbone.named_modules():
        if hasattr(module, CONTEXT):
            sources.append(getattr(module, CONTEXT).output)
            readers.append(functools.partial(attention_tokens, skip=prefix_tokens(backbone, name),
                                             heads=head_count(module),
                                             unless=functools.partial(mixes_channels, module)))
        elif attention_parts(module):
            raise ValueError(f'{type(module).__name__} is not converted: the tap needs its products as modules')
    sources.append(backbone)
    readers.append(map_tokens)
    inner = MapSearch(backbone)
    tap = PatchSimilarityTap(sources, [functools.partial(_told, reader, source)
                                       for reader, source in zip(readers, sources)], backbone)
    try:
        with torch.no_grad(), tap, inner:
            backbone(image)
        shown = {source for source, tokens in tap.tokens if tokens}
    finally:
        tap.remove()
    attentions = [(s, r) for s, r in zip(sources[:-1], readers) if s in shown]
    chosen = attentions or [(backbone, map_tokens)] * (backbone in shown) or inner.found()
    return [source for source, _ in chosen], [reader for _, reader in chosen], backbone


def head_tap(backbone: nn.Module, sources: list[nn.Module]) -> HeadTap:
    """Return what hears the heads of those attentions that patch similarity is taken from.

    Args:
        backbone (nn.Module): Of a converted model.
        sources (list[nn.Module]): Of :func:`similarity_taps`.
    """
    products = [(getattr(module, CONTEXT), head_count(module)) for module in backbone.modules()
                if hasattr(module, CONTEXT) and getattr(module, CONTEXT).output in sources]
    return HeadTap(*zip(*products)) if products else HeadTap([], [])


def _told(reader, source, output, size):
    """What a reader finds, with where."""
    return [(source, reader(output, size))]


class MapSearch:
    """Finds, while a backbone runs inside ``with search:``, the last module that puts out a map of each size.

    Args:
        backbone (nn.Module): Its submodules are watched.
    """

    def __init__(self, backbone: nn.Module):
        self.backbone = backbone
        self.last: dict[int, tuple] = {}  # by number of positions: module, reader

    def __enter__(self):
        self.handles = [self.backbone.register_forward_pre_hook(self._see_image)]
        self.handles += [module.register_forward_hook(self._see) for module in self.backbone.modules()
                         if module is not self.backbone and not isinstance(module, FakeQuantizer)]

    def __exit__(self, *unused):
        for handle in self.handles:
            handle.remove()

    def _see_image(self, module, inputs):
        self.count, self.size = len(inputs[0]), tuple(inputs[0].shape[-2:])

    def _see(self, module, inputs, output):
        if not isinstance(output, Tensor) or output.dim() not in (3, 4) or len(output) != self.count:
            return
        if output.dim() == 4 and is_grid(self.size, output.shape[2:]):
            self.last[output.shape[2] * output.shape[3]] = module, map_tokens
        elif output.dim() == 4 and is_grid(self.size, output.shape[1:3]):
            self.last[output.shape[1] * output.shape[2]] = module, last_axis_tokens
        elif output.dim() == 3 and output.shape[1] in self.last:
            self.last[output.shape[1]] = module, last_axis_tokens

    def found(self) -> list[tuple]:
        """(module, reader) of each size but the image's own and single positions."""
        height, width = self.size
        return [found for positions, found in self.last.items() if 1 < positions < height * width]
