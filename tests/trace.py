"""A trace of the operations that really run: the judge of what is quantized."""
import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
PRODUCTS = {aten.addmm.default, aten.mm.default, aten.bmm.default, aten.convolution.default, aten.baddbmm.default,
            aten.linear.default}
FAKE_QUANTIZE = ('fake_quantize.default', 'fake_quantize_per_tensor', 'fake_quantize_per_channel', '_fake_quantize')
VIEWS = ('clone', 'expand', 'view', '_unsafe_view', 't', 'transpose', 'permute', 'reshape', '_reshape_alias',
         '_to_copy', 'as_strided', 'unsqueeze', 'slice', 'split')


class Trace(TorchDispatchMode):
    """Counts products, and which of their operands come straight from a fake-quantize operation."""

    def __init__(self):
        super().__init__()
        self.quantized, self.products, self.kept = set(), [], []
        self.multiplications = 0  # of scalars, in all products

    def mark(self, out):
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            self.quantized.add(tensor.untyped_storage().data_ptr())
        self.kept.append(out)  # alive, so that no address is used twice

    def comes_quantized(self, tensor):
        return tensor.untyped_storage().data_ptr() in self.quantized

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.__name__
        if any(word in name for word in FAKE_QUANTIZE):
            self.mark(out)
        elif 'scaled_dot_product' in name:
            query, key = args[:2]  # (B, heads, N, d) each: scores and context
            self.multiplications += 2 * query.numel() * key.shape[-2]
        elif func in PRODUCTS:
            weight = args[1] if func is not aten.addmm.default and func is not aten.baddbmm.default else args[2]
            inner = weight[0].numel() if func in (aten.convolution.default, aten.linear.default) else weight.shape[-2]
            transposed = func is aten.convolution.default and args[6]
            self.multiplications += (args[0] if transposed else out).numel() * inner
            tensors = [a for a in args if isinstance(a, torch.Tensor) and a.dim() >= 2]
            self.products.append((name, [self.comes_quantized(t) for t in tensors[-2:]
                                         if func is not aten.convolution.default or t.dim() == 4]))
        elif name.split('.')[0] in VIEWS and args and isinstance(args[0], torch.Tensor):
            if self.comes_quantized(args[0]):
                self.mark(out)
        return out
