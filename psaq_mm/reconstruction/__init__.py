"""Block by block reconstruction of a quantized model: knows only torch and the quantized layers."""
from .config import ReconstructionConfig
from .reconstruct import UnitReconstruction, importance, neighbours, record
from .units import Unit, find_units

__all__ = ['ReconstructionConfig', 'Unit', 'UnitReconstruction', 'find_units', 'importance', 'neighbours',
           'record']
