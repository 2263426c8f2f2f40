"""Builds TensorRT engines from exported graphs, and holds them against the graphs. Never run here: it needs a GPU."""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ..errors import UserError
from ..files import write_atomically
from .agreement import first_line, unpacked
from .answers import agreement, anything, single
from .extras import need
from .graph import INPUT
from .runtime import SESSIONS
from .session import unpacked as check_of
from .tensorrt import check_for_tensorrt
from .whole import GOOD, MARGIN, enlarged

RUNTIME = 'tensorrt'


class TensorRtSession:
    """A graph as an engine, on the first GPU, in the types that the graph has; by NVIDIA's Polygraphy.

    Args:
        path (str): The graph, for images of one size.

    Attributes:
        engine (bytes): To be kept.

    Raises:
        UserError: If TensorRT, Polygraphy or a GPU is missing, or TensorRT does not build the engine.
    """

    def __init__(self, path: str):
        for package in ('polygraphy', RUNTIME):
            need(package)
        from polygraphy.backend.trt import EngineFromBytes, NetworkFromOnnxPath, TrtRunner, engine_bytes_from_network
        try:
            self.engine = bytes(engine_bytes_from_network(NetworkFromOnnxPath(path, strongly_typed=True)))
            self.runner = TrtRunner(EngineFromBytes(self.engine))
            self.runner.activate()
        except Exception as error:  # Polygraphy's own, or CUDA's
            raise UserError(f'TensorRT does not build an engine from {path} ({first_line(error)}). It needs an NVIDIA '
                            'GPU and its driver; run it again with --debug to see more') from None

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name, from inputs by name."""
        return {name: np.array(value) for name, value in self.runner.infer(inputs).items()}


def compared(run: Callable, path: Path) -> tuple[str, bool]:
    """Hold what an engine computes against its graph.

    Args:
        run (Callable): From inputs by name to outputs by name.
        path (Path): The graph. A graph of features holds probes, which the engine must compute. A graph of a whole
            model is compared with ONNX Runtime, on the image of the check in the ``model.json`` beside it.

    Returns:
        tuple[str, bool]: What was found, and whether that is good.
    """
    model = need('onnx').load_model_from_string(Path(path).read_bytes())
    graph, notes = model.graph, {item.key: item.value for item in model.metadata_props}
    names = [output.name for output in graph.output]
    if 'probes' in notes:
        found = [probe.check(lambda x: [torch.from_numpy(run({INPUT: x.numpy()})[name]) for name in names], RUNTIME)
                 for probe in unpacked(notes['probes'])]
        return '; '.join(map(str, found)), all(item.passed for item in found)
    shape = [axis.dim_value or 1 for axis in graph.input[0].type.tensor_type.shape.dim]
    card = path.with_suffix('.json')
    check = json.loads(card.read_text(encoding='utf-8')).get('check') if card.is_file() else None
    images = check_of(check)[1] if check else np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    images = enlarged(torch.from_numpy(images), shape[1:3]).expand(shape[0], -1, -1, -1).numpy()
    expected = SESSIONS['onnxruntime'](str(path)).run({INPUT: images})
    found = run({INPUT: images})
    value = min(agreement(names, *pair) for pair in zip(single(names, expected), single(
        names, [found[name] for name in names])))
    said = f'the image of {card.name}' if check else f'noise ({card.name} has no check image)'
    nothing = '' if anything(names, expected) else ', in which there is no object, so that little is known'
    return (f'the answers to {said}{nothing} agree with those in ONNX Runtime by {value:.3f}, and need '
            f'{GOOD - MARGIN:.2f}', value >= GOOD - MARGIN)


def build_engine(path: Path, target: Path, make: Callable = TensorRtSession) -> str:
    """Build an engine, hold it against the graph, and write it.

    Args:
        path (Path): What tools/export.py wrote with ``--preset symmetric --size H W``.
        target (Path): The file to write.
        make (Callable): Takes the path, and gives what :class:`TensorRtSession` has. Defaults to that.

    Returns:
        str: What was compared.

    Raises:
        UserError: If there is no such graph, it breaks a rule of TensorRT's parser or takes images of several sizes,
            the target is there, or the engine computes something else than the graph.
    """
    if not path.is_file():
        raise UserError(f'{path} does not exist: write it with tools/export.py --preset symmetric --size H W')
    if target.exists():
        raise UserError(f'{target} is there already: name another file with --out, or remove it')
    try:
        check_for_tensorrt(need('onnx').load_model_from_string(path.read_bytes()), static=True)
    except UserError as error:
        raise UserError(f'{path}: {error}. Export it with --preset symmetric --size H W, of a model that was quantized '
                        'with quantization.activation.symmetric=True') from None
    session = make(str(path))
    found, good = compared(session.run, path)
    if not good:
        raise UserError(f'TensorRT computes {path} wrongly: {found}. No engine was written')
    write_atomically(session.engine, target)
    return found
