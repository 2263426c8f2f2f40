"""The stages of a data-free run, in their order. A new stage is one file here and one entry in STAGES."""
from .base import Stage
from .calibration import CalibrationStage
from .game import GameStage
from .reconstruction import ReconstructionStage
from .synthesis import SynthesisStage

STAGES = (SynthesisStage, CalibrationStage, ReconstructionStage, GameStage)

__all__ = ['STAGES', 'CalibrationStage', 'GameStage', 'ReconstructionStage', 'Stage', 'SynthesisStage']
