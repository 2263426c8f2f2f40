"""Block by block reconstruction of a quantized model: knows only torch and the quantized layers."""
from .config import ReconstructionConfig
from .reconstruct import Sample, UnitReconstruction, enough_images, importance, unrelated
from .recording import Recorder, record
from .rounding import LearnedRounding, neighbours, settled_share
from .units import Unit, find_units, without_unit

__all__ = ['LearnedRounding', 'ReconstructionConfig', 'Recorder', 'Sample', 'Unit', 'UnitReconstruction',
           'enough_images', 'find_units', 'importance', 'neighbours', 'record', 'settled_share', 'unrelated',
           'without_unit']
