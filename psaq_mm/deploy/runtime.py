"""Runs an exported graph inside the ecosystem: registered modules in place of backbone and neck, or of a classifier."""
from __future__ import annotations

import json
import os
import platform
import re
from functools import cache
from pathlib import Path

import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS as ROOT_MODELS
from torch import Tensor, nn

from ..classification import Classifier
from ..errors import UserError
from ..models.features import tensors
from ..registry import MODELS
from .agreement import unpacked
from .extras import need
from .graph import INPUT, nested

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
        options.intra_op_num_threads, options.log_severity_level = threads, 4  # errors come as exceptions
        self.session = ort.InferenceSession(loadable(path), options, providers=['CPUExecutionProvider'])
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
            ort.InferenceSession(loadable(self.path), options, providers=['CPUExecutionProvider'])
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
        core, source = openvino.Core(), loadable(path)
        model = core.read_model(source) if isinstance(source, str) else core.read_model(source, b'')
        self.model = core.compile_model(model, 'CPU', options)
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


def loadable(path: str) -> str | bytes:
    """Return a path, or the content of the file where no runtime takes the path (not ASCII in a C locale)."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return Path(path).read_bytes()
    return path


@cache
def host(runtime: str) -> str:
    """Describe what decides how a runtime computes here: its version and the vector extensions of this CPU."""
    try:
        flags = re.search(r'^(?:flags|Features)\s*:(.*)$', Path('/proc/cpuinfo').read_text(), re.M)[1].split()
    except (OSError, TypeError):
        flags = [platform.processor()]
    kinds = ('amx', 'asimd', 'avx', 'bf16', 'dot', 'fma', 'i8mm', 'neon', 'sme', 'sse', 'sve')
    limit = os.environ.get('ONEDNN_MAX_CPU_ISA', '')  # oneDNN's own, which OpenVINO's kernels come from
    return ' '.join([runtime, need(runtime).__version__, platform.machine(), *sorted(
        flag for flag in flags if any(kind in flag for kind in kinds)), limit]).strip()


class Graph:
    """An exported graph and the runtime that runs it.

    Where the graph was not measured - in another version of the runtime, on another kind of CPU - it is first checked
    on inputs that are stored in it: kernels differ, and some compute wrongly.

    Args:
        path (str): The file that tools/export.py wrote.
        runtime (str): 'openvino' or 'onnxruntime'.
        threads (int): 0: ``OMP_NUM_THREADS``, or as many as the runtime chooses.

    Raises:
        UserError: If the file is none of ours, the runtime is unknown, missing or too old, or it computes the graph
            wrongly.
    """

    def __init__(self, path: str, runtime: str = 'openvino', threads: int = 0):
        if runtime not in RUNTIMES:
            raise UserError(f"runtime '{runtime}': must be one of {', '.join(RUNTIMES)}")
        if not Path(path).is_file():
            raise UserError(f'the graph {path} does not exist: write it with tools/export.py')
        self.path, self.runtime = str(path), runtime
        self.notes = read_notes(path)
        own = self.notes['preset']
        if own in RUNTIMES and own != runtime:
            raise UserError(f"{path} was exported with preset '{own}' and runs in no other runtime: set runtime to "
                            f"'{own}' in int8_config.py, or export again")
        measured = self.notes['measured'].get(runtime)
        known = measured is not None and measured['host'] == host(runtime)
        if known and measured['wrong']:
            raise UserError(self.wrong(measured['wrong']))
        try:
            self.session = SESSIONS[runtime](self.path, threads or int(os.environ.get('OMP_NUM_THREADS', 0)))
        except UserError:
            raise
        except Exception as error:
            raise UserError(f'{runtime} cannot load {path} ({type(error).__name__}: {error}): export it again, or '
                            'install a newer version of the runtime') from None
        if not known and self.notes['probes']:
            for probe in unpacked(self.notes['probes']):
                finding = probe.check(self.compute, runtime)
                if not finding.passed:
                    raise UserError(self.wrong(str(finding)))

    def wrong(self, why: str) -> str:
        """Say that the runtime computes the graph wrongly, and what to do."""
        other = next(name for name in RUNTIMES if name != self.runtime)
        amx = self.runtime == 'openvino' and 'amx_int8' in host(self.runtime)
        hint = ('. Some versions have wrong kernels for AMX: ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI in the environment '
                'does without them') if amx else ''
        return (f'{self.runtime} computes {self.path} wrongly here: {why}. Set runtime to {other!r} in int8_config.py, '
                f'or export again for one size with --size H W{hint}')

    def run(self, images: Tensor) -> list[Tensor]:
        """Compute feature maps (B, C_i, H_i, W_i) of images (B, C, H, W), one at a time unless the graph takes batches.

        Raises:
            UserError: If the graph is not meant for images of that shape.
        """
        self.check_images(tuple(images.shape))
        return self.compute(images)

    def check_images(self, shape: tuple[int, ...]) -> None:
        """Refuse images that nobody held against the model.

        Raises:
            UserError: If the graph is not meant for that shape.
        """
        size, fixed, unit, least = shape[-2:], *(self.notes[key] for key in ('size', 'multiple_of', 'at_least'))
        found = f'not {size[0]} x {size[1]}'
        if fixed is not None and size != fixed:
            raise UserError(f'{self.path} takes images of {fixed[0]} x {fixed[1]}, {found}: export it for that size '
                            'with --size, or resize and pad images to the one it takes')
        if fixed is None and any(side % unit for side in size):
            raise UserError(f'{self.path} takes images with sides that are multiples of {unit}, as its model does, '
                            f'{found}: pad them (data_preprocessor.pad_size_divisor)')
        if fixed is None and min(size) < least:
            raise UserError(f'{self.path} takes images of {least} pixels a side and more, {found}: smaller ones were '
                            'not measured. Export it for that size with --size, or pad images')
        channels = self.notes['channels']
        if channels is not None and shape[1] != channels:
            raise UserError(f'{self.path} takes images of {channels} channels, not {shape[1]}')

    def compute(self, images: Tensor) -> list[Tensor]:
        """:meth:`run` without questions."""
        return self.each([images], [INPUT])

    def each(self, inputs, names) -> list[Tensor]:
        """Return the outputs for all images; the first axis of the inputs counts them."""
        arrays = [value.float().cpu().numpy() for value in inputs]
        parts = [slice(None)] if self.notes['batch'] else [slice(i, i + 1) for i in range(len(arrays[0]))]
        outputs = [self.session.run({name: array[part] for name, array in zip(names, arrays)}) for part in parts]
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
        wanted = self.notes['inputs']
        if len(flat) != len(wanted):
            raise UserError(f'{self.path} takes {len(wanted)} feature maps, not {len(flat)}: export it again')
        free = self.notes['dynamic'] and not self.notes['proposals']  # maps of any size
        for x, shape in zip(flat, wanted):
            if not free and list(x.shape[1:]) != shape:
                raise UserError(f'{self.path} takes inputs of {shape}, not {list(x.shape[1:])}: export it for the size '
                                'of the images that they come from, with --size H W')
        return nested(self.notes['outputs'], [out.to(flat[0].device) for out in self.compute(*flat)])

    def compute(self, *flat) -> list[Tensor]:
        """Compute outputs from inputs, both flat, without questions."""
        names, count = [f'input_{i}' for i in range(len(flat))], len(flat[0])
        if not self.notes['proposals']:
            return self.each(flat, names)
        # no runtime is asked to compute nothing
        arrays = [(x if count else x.new_zeros(1, *x.shape[1:])).float().cpu().numpy() for x in flat]
        return [torch.from_numpy(out)[:count] for out in self.session.run(dict(zip(names, arrays)))]


def read_notes(path) -> dict:
    """Return what is noted in a graph.

    Returns:
        dict: ``preset``; ``dynamic``; whether it takes a ``batch``; ``size`` (H, W), None where it takes several,
        whose sides are multiples of ``multiple_of`` and ``at_least`` that long; ``channels`` of images; how
        ``outputs`` are nested; what was ``measured`` in each runtime, and ``probes`` to repeat that with. Of a head:
        the shapes of its ``inputs`` without the first axis, and whether that counts ``proposals``.

    Raises:
        UserError: If it is no graph of ours.
    """
    onnx = need('onnx')
    try:
        graph = onnx.load_model_from_string(Path(path).read_bytes())
    except Exception as error:
        raise UserError(f'{path} is no ONNX graph ({type(error).__name__}: {error})') from None
    notes = {item.key: item.value for item in graph.metadata_props}
    if 'psaq_mm' not in notes:
        raise UserError(f'{path} was not written by tools/export.py')
    if 'outputs' not in notes:
        raise UserError(f"{path} was written by psaq_mm {notes['psaq_mm']}, which measured less: export it again")
    dynamic = notes['dynamic'] == 'True'
    found = dict(preset=notes['preset'], dynamic=dynamic, batch=notes.get('batch') == 'True',
                 outputs=json.loads(notes['outputs']),
                 measured=json.loads(notes.get('measured', '{}')), probes=notes.get('probes'), size=None, channels=None,
                 multiple_of=int(notes.get('multiple_of', 1)), at_least=int(notes.get('at_least', 1)))
    if 'head' in notes:
        return dict(found, proposals=notes['proposals'] == 'True', inputs=json.loads(notes['inputs']))
    channels = graph.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    return dict(found, size=None if dynamic else tuple(json.loads(notes['size'])), channels=channels)


@MODELS.register_module()
class ExportedFeatures(BaseModule):
    """Backbone and neck as an exported graph: stands in place of a detector's or segmentor's backbone.

    Args:
        graph (str): The file that tools/export.py wrote.
        runtime (str): 'openvino' or 'onnxruntime'.
        threads (int): 0: ``OMP_NUM_THREADS``, or as many as the runtime chooses.
    """

    def __init__(self, graph, runtime='openvino', threads=0):
        super().__init__()
        self.graph = Graph(graph, runtime, threads)

    def forward(self, images):
        """Compute what backbone and neck put out, nested as they do, from images (B, C, H, W)."""
        return nested(self.graph.notes['outputs'], [part.to(images.device) for part in self.graph.run(images)])


@MODELS.register_module()
class ExportedNeck(BaseModule):
    """Stands in place of a neck whose work :class:`ExportedFeatures` has done: many models cannot do without."""

    def forward(self, features):
        """Pass on what comes in."""
        return features


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
        """Compute logits (B, classes) from images (B, C, H, W)."""
        return self.graph.run(inputs)[0].to(inputs.device)
