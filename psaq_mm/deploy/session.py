"""Loads the graph beside this file in ONNX Runtime or OpenVINO, for predict.py and for services."""
import importlib.util
import sys
from contextlib import contextmanager


@contextmanager
def ending(problem, remedy):
    """Within it, an error ends the process with one line."""
    try:
        yield
    except Exception as error:  # runtimes and Pillow raise many kinds
        sys.exit(f'{problem} ({" ".join(str(error).split())[:200] or type(error).__name__}): {remedy}')


def runner(model, name, right):
    """A function from an array to a dict of arrays.

    Args:
        model (Path): The graph.
        name (str, optional): Of the runtime. Default: the first right one that is installed.
        right (list[str]): Runtimes that were found to compute the graph rightly.
    """
    name = name or next((known for known in right if importlib.util.find_spec(known)), right[0])
    if name not in right:
        sys.exit(f'{name} was not found to compute this graph rightly: take {" or ".join(right)}')
    with ending(f'{name} cannot be imported', f'pip install {name}'):
        module = importlib.import_module(name)
    with ending(f'{name} {module.__version__} cannot load {model}', f'pip install --upgrade {name}'):
        if name == 'onnxruntime':
            options = module.SessionOptions()
            options.log_severity_level = 4  # errors are raised, so that nobody needs to print them as well
            session = module.InferenceSession(model.read_bytes(), options, providers=['CPUExecutionProvider'])
            names = [output.name for output in session.get_outputs()]
            return lambda images: dict(zip(names, session.run(None, dict(images=images))))
        network = module.Core().compile_model(str(model), 'CPU', dict(INFERENCE_PRECISION_HINT='f32'))
    return lambda images: {key.any_name: value for key, value in network(dict(images=images)).items()}
