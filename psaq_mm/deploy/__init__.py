"""The int8 model: exported as ONNX, run inside the ecosystem by ONNX Runtime or OpenVINO."""
from .export import export
from .graph import PRESETS, export_graph
from .runtime import RUNTIMES, ExportedClassifier, ExportedFeatures, Graph

__all__ = ['ExportedClassifier', 'ExportedFeatures', 'Graph', 'PRESETS', 'RUNTIMES', 'export', 'export_graph']
