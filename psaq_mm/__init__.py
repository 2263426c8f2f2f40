"""psaq_mm: data-free quantization for OpenMMLab (PSAQ-ViT V2).

Importing the package makes mmengine's checkpoints loadable under torch's safe unpickler; nothing else happens here.
"""
from .compat import allow_mmengine_checkpoints
from .version import __version__

allow_mmengine_checkpoints()

__all__ = ['__version__']
