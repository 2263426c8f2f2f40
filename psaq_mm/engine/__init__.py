"""The data-free loop, its hooks and data set, and what turns a stanza into a runner. Knows mmengine."""
from ..files import write_json
from ..report import comparison_table, markdown, result_table, write_comparison
from .checkpoint import CheckpointError, convert_file, read_checkpoint, save_quantized, versions
from .compare import compare
from .config import data_free_config, evaluation_gap, float_config, test_config
from .config_file import read_config, write_config
from .hooks import QuantizationHook, QuantizedCheckpointHook, SyntheticImageHook
from .loop import DataFreeLoop
from .pipeline import evaluate, quantize, with_stanza
from .runner import QuantizationRunner
from .start_dataset import StartDataset

__all__ = [
    'CheckpointError', 'DataFreeLoop', 'StartDataset', 'QuantizationHook', 'QuantizationRunner',
    'QuantizedCheckpointHook', 'SyntheticImageHook', 'compare', 'comparison_table', 'convert_file', 'data_free_config',
    'evaluate', 'evaluation_gap', 'float_config', 'markdown', 'quantize', 'read_checkpoint', 'read_config',
    'result_table', 'save_quantized', 'test_config', 'versions', 'with_stanza', 'write_comparison', 'write_config',
    'write_json'
]
