"""Runs an exported graph inside the ecosystem: registered modules in place of backbone and neck, or of a classifier."""
from __future__ import annotations

import os
from pathlib import Path

import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS as ROOT_MODELS
from torch import Tensor, nn

from ..classification import Classifier
from ..errors import UserError
from ..models.features import tensors
from ..registry import MODELS
from .extras import need
from .graph import INPUT
from .heads import nested

RUNTIMES = ('openvino', 'onnxruntime')


class OnnxRuntimeSession:
    """A graph in ONNX Runtime, on CPU.

    Args:
        path (str): The graph.
        threads (int): 0: as many as the runtime chooses.
    """
    PRODUCTS = ('MatMul', 'Gemm', 'Conv', 'ConvTranspose', 'FusedMatMul', 'FusedConv', 'FusedGemm')
    INTEGER = ('QLinearMatMul', 'MatMulIntegerToFloat', 'MatMulInteger', 'QLinearConv', 'ConvInteger', 'QGemm')

    def __init__(self, path: str, threads: int = 0):
        ort = need('onnxruntime')
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        self.session = ort.InferenceSession(path, options, providers=['CPUExecutionProvider'])
        self.path = path

    def run(self, inputs):
        """Outputs, NumPy arrays, from a dict of arrays."""
        return self.session.run(None, inputs)

    def products(self) -> dict[str, bool]:
        """Products and convolutions of the optimised graph by name, and whether they run in int8."""
        import tempfile
        ort, onnx = need('onnxruntime'), need('onnx')
        options = ort.SessionOptions()
        options.log_severity_level = 3
        with tempfile.TemporaryDirectory() as folder:
            options.optimized_model_filepath = f'{folder}/optimized.onnx'
            ort.InferenceSession(self.path, options, providers=['CPUExecutionProvider'])
            nodes = onnx.load(options.optimized_model_filepath).graph.node
        return {node.name: node.op_type in self.INTEGER for node in nodes
                if node.op_type in self.PRODUCTS + self.INTEGER}


class OpenVinoSession:
    """A graph in OpenVINO, on CPU; everything that is not int8 in float32."""
    PRODUCTS = ('Convolution', 'Deconvolution', 'FullyConnected', 'MatMul', 'GroupConvolution', 'BrgemmCPU', 'Gemm')

    def __init__(self, path: str, threads: int = 0):
        openvino = need('openvino')
        options = {'INFERENCE_PRECISION_HINT': 'f32', 'PERFORMANCE_HINT': 'LATENCY'}
        if threads:
            options['INFERENCE_NUM_THREADS'] = threads
        self.model = openvino.Core().compile_model(path, 'CPU', options)
        self.request = self.model.create_infer_request()

    def run(self, inputs):
        """Outputs, NumPy arrays, from a dict of arrays."""
        found = self.request.infer(inputs, share_inputs=True)  # outputs are copies
        return [found[output] for output in self.model.outputs]

    def products(self) -> dict[str, bool]:
        """Products and convolutions of the compiled graph by name, and whether they run in int8."""
        found = {}
        for node in self.model.get_runtime_model().get_ordered_ops():
            info = node.get_rt_info()
            kind = info['layerType'].astype(str) if 'layerType' in info else ''
            if kind in self.PRODUCTS:
                found[node.get_friendly_name()] = info['runtimePrecision'].astype(str) in ('i8', 'u8')
        return found


SESSIONS = dict(onnxruntime=OnnxRuntimeSession, openvino=OpenVinoSession)


class Graph:
    """An exported graph and the runtime that runs it.

    Args:
        path (str): The file that tools/export.py wrote.
        runtime (str): 'openvino' or 'onnxruntime'.
        threads (int): 0: ``OMP_NUM_THREADS``, or as many as the runtime chooses.

    Raises:
        UserError: If the file is none of ours, or the runtime is unknown, missing or too old.
    """

    def __init__(self, path: str, runtime: str = 'openvino', threads: int = 0):
        if runtime not in RUNTIMES:
            raise UserError(f"runtime '{runtime}': must be one of {', '.join(RUNTIMES)}")
        if not Path(path).is_file():
            raise UserError(f'the graph {path} does not exist: write it with tools/export.py')
        self.path, self.runtime = str(path), runtime
        self.notes = read_notes(path)
        try:
            self.session = SESSIONS[runtime](self.path, threads or int(os.environ.get('OMP_NUM_THREADS', 0)))
        except UserError:
            raise
        except Exception as error:
            raise UserError(f'{runtime} cannot load {path} ({type(error).__name__}: {error}): export it again, or '
                            'install a newer version of the runtime') from None

    def run(self, images: Tensor) -> list[Tensor]:
        """Feature maps (B, C_i, H_i, W_i) from images (B, 3, H, W), one image at a time.

        Raises:
            UserError: If the graph cannot take images of that size.
        """
        size = tuple(images.shape[-2:])
        if self.notes['size'] is not None and size != self.notes['size']:
            height, width = self.notes['size']
            raise UserError(f'{self.path} takes images of {height} x {width}, not {size[0]} x {size[1]}: export it '
                            'without --size, or resize and pad images to that size')
        return self.each([images], [INPUT])

    def each(self, inputs, names) -> list[Tensor]:
        """Outputs of one image after the other, together; the first axis of the inputs counts images."""
        arrays = [value.float().cpu().numpy() for value in inputs]
        outputs = [self.session.run({name: array[i:i + 1] for name, array in zip(names, arrays)})
                   for i in range(len(arrays[0]))]
        return [torch.from_numpy(parts[0]) if len(outputs) == 1 else torch.cat([*map(torch.from_numpy, parts)])
                for parts in zip(*outputs)]


class HeadGraph(Graph):
    """An exported head; called as the head was."""

    def __init__(self, path: str, runtime: str = 'openvino', threads: int = 0):
        super().__init__(path, runtime, threads)
        if 'inputs' not in self.notes:
            raise UserError(f'{path} is the graph of a backbone, not of a head: export again')

    def __call__(self, *inputs):
        flat = list(tensors(inputs))
        names = [f'input_{i}' for i in range(len(flat))]
        if len(flat) != self.notes['inputs']:
            raise UserError(f"{self.path} takes {self.notes['inputs']} feature maps, not {len(flat)}: export it again")
        device, count = flat[0].device, len(flat[0])
        if not self.notes['proposals']:
            found = self.each(flat, names)
        else:  # no runtime is asked to compute nothing
            arrays = [(x if count else x.new_zeros(1, *x.shape[1:])).float().cpu().numpy() for x in flat]
            found = [torch.from_numpy(out)[:count] for out in self.session.run(dict(zip(names, arrays)))]
        return nested(self.notes['outputs'], [out.to(device) for out in found])


def read_notes(path) -> dict:
    """What :func:`psaq_mm.deploy.export_graph` noted in a graph: ``size`` (H, W), None where it takes any. In that of a
    head: how many ``inputs`` it takes, how ``outputs`` are nested, and whether it takes ``proposals``.

    Raises:
        UserError: If it is no graph of ours.
    """
    import json
    onnx = need('onnx')
    try:
        graph = onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise UserError(f'{path} is no ONNX graph ({type(error).__name__}: {error})') from None
    notes = {item.key: item.value for item in graph.metadata_props}
    if 'psaq_mm' not in notes:
        raise UserError(f'{path} was not written by tools/export.py')
    if 'head' in notes:
        return dict(preset=notes['preset'], size=None, proposals=notes['proposals'] == 'True',
                    **{key: json.loads(notes[key]) for key in ('inputs', 'outputs')})
    return dict(preset=notes['preset'],
                size=None if notes['dynamic'] == 'True' else tuple(json.loads(notes['size'])))


@MODELS.register_module()
class ExportedFeatures(BaseModule):
    """Backbone and neck as an exported graph: stands in a detector's or segmentor's ``backbone``; ``neck`` goes away.

    Args:
        graph (str): The file that tools/export.py wrote.
        runtime (str): 'openvino' or 'onnxruntime'.
        threads (int): 0: ``OMP_NUM_THREADS``, or as many as the runtime chooses.
    """

    def __init__(self, graph, runtime='openvino', threads=0):
        super().__init__()
        self.graph = Graph(graph, runtime, threads)

    def forward(self, images):
        """Feature maps, (B, C_i, H_i, W_i) each, from images (B, 3, H, W)."""
        return tuple(part.to(images.device) for part in self.graph.run(images))


@MODELS.register_module('ExportedModel')
def build_exported_model(exported_type: str, heads: dict[str, str], runtime='openvino', threads=0,
                         **model) -> nn.Module:
    """Builds a model and puts graphs in place of heads, which lose their weights.

    Args:
        exported_type (str): Registered name of the model.
        heads (dict[str, str]): Files that tools/export.py wrote, by name of the head in the model.
        runtime, threads: As of :class:`ExportedFeatures`.
        **model: The model's own config.
    """
    model = ROOT_MODELS.build(dict(type=exported_type, **model))
    for name, path in heads.items():
        head = model.get_submodule(name)
        graph = HeadGraph(path, runtime, threads)
        for part, child in list(head.named_children()):  # losses stay: predictions ask them for their activation
            if child.state_dict():
                setattr(head, part, nn.Identity())
        for store in (head._parameters, head._buffers):
            store.update(dict.fromkeys(store))
        head.forward = graph.__call__  # shadows the class's
    return model


@MODELS.register_module()
class ExportedClassifier(Classifier):
    """A classifier as an exported graph, head included.

    Args:
        graph, runtime, threads: As of :class:`ExportedFeatures`.
        data_preprocessor (dict): The float model's.
    """

    def __init__(self, graph, data_preprocessor, runtime='openvino', threads=0):
        super().__init__(data_preprocessor)
        self.graph = Graph(graph, runtime, threads)

    def logits(self, inputs):
        """(B, classes) from images (B, 3, H, W)."""
        return self.graph.run(inputs)[0].to(inputs.device)
