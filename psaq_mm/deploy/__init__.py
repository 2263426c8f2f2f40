"""The int8 model: exported as ONNX, run inside the ecosystem by ONNX Runtime or OpenVINO."""
from .export import export
from .graph import PRESETS, Form, export_graph
from .heads import export_head, head_inputs, head_names
from .runtime import RUNTIMES, ExportedClassifier, ExportedFeatures, Graph, HeadGraph, build_exported_model

__all__ = [
    'ExportedClassifier', 'ExportedFeatures', 'Form', 'Graph', 'HeadGraph', 'PRESETS', 'RUNTIMES',
    'build_exported_model', 'export', 'export_graph', 'export_head', 'head_inputs', 'head_names'
]
