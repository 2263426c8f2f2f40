"""psaq_mm: data-free quantization for OpenMMLab (PSAQ-ViT V2).

Importing the package checks the versions of what it builds on, makes mmengine's checkpoints loadable under torch's safe
unpickler, torchvision importable beside a torch it was not built for, and every config printable; nothing else happens
here.
"""
from .compat import allow_mmengine_checkpoints, check_versions, complete_pretty_text, complete_torchvision
from .version import __version__

check_versions()
allow_mmengine_checkpoints()
complete_torchvision()
complete_pretty_text()

__all__ = ['__version__']
