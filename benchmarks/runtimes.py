"""What the benchmarks of latency share: graphs in both runtimes, other people's quantizers, turns, and peak memory."""
import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PAUSE = 0.1  # seconds in which the threads of the one before, which wait actively for more work, give up


def ort_static(source, target, images):
    """ONNX Runtime's own quantization of a float graph."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        rest = iter([{'images': image} for image in images])

        def get_next(self):
            return next(self.rest, None)

    prepared = target.with_suffix('.prepared.onnx')
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    quantize_static(str(prepared), str(target), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
                    activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)


def nncf_static(source, target, images):
    """NNCF's quantization of a float graph."""
    import nncf
    import openvino
    network = nncf.quantize(openvino.Core().read_model(str(source)), nncf.Dataset([{'images': i} for i in images]),
                            model_type=nncf.ModelType.TRANSFORMER, preset=nncf.QuantizationPreset.MIXED)
    openvino.save_model(network, target, compress_to_fp16=False)


def by_others(source, images, folder, threads):
    """Quantize a float graph by ONNX Runtime's own quantizer and by NNCF.

    Args:
        source (Path): The graph, with the names that torch gave.
        images (list[np.ndarray]): Inputs to calibrate on.
        folder (Path): For their files.
        threads (int): Of the runtimes.

    Yields:
        tuple: Title, function of an input, file that holds the weights. Where one of them fails or is not installed,
        a line says so instead.
    """
    for title, quantizer, runtime, file in (
            ('ONNX Runtime int8, its own PTQ', ort_static, 'ONNX Runtime', folder / 'ort_int8.onnx'),
            ('OpenVINO int8, NNCF PTQ', nncf_static, 'OpenVINO', folder / 'nncf.xml')):
        try:
            quantizer(source, file, images)
            run = SESSIONS[runtime](file, threads)
        except Exception as error:  # a contestant's own
            print(f'{title} is left out: {type(error).__name__}: {str(error).splitlines()[0]}')
        else:
            yield title, run, file.with_suffix('.bin') if file.suffix == '.xml' else file


def ort_session(path, threads):
    """A graph in ONNX Runtime, as a function of an image array."""
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    found = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    return lambda array: found.run(None, {'images': array})


def openvino_session(path, threads):
    """A graph in OpenVINO, as a function of an image array."""
    import openvino
    options = {'INFERENCE_PRECISION_HINT': 'f32', 'PERFORMANCE_HINT': 'LATENCY', 'INFERENCE_NUM_THREADS': threads}
    request = openvino.Core().compile_model(str(path), 'CPU', options).create_infer_request()
    return lambda array: list(request.infer({'images': array}).values())


SESSIONS = {'ONNX Runtime': ort_session, 'OpenVINO': openvino_session}


def take_turns(runs, repeats):
    """Median seconds of each callable."""
    times = {name: [] for name in runs}
    for turn in range(repeats + 1):  # the first warms up
        for name, run in runs.items():
            time.sleep(PAUSE)
            started = time.perf_counter()
            run()
            if turn:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(taken) for name, taken in times.items()}


def peak_here(load):
    """Return MB that this process needs beyond what it has now to load a model and to run it three times.

    Args:
        load (Callable): Returns what runs the model.
    """
    def megabytes(key):
        status = Path('/proc/self/status').read_text()
        return int(status.split(f'{key}:')[1].split()[0]) / 1e3

    Path('/proc/self/clear_refs').write_text('5')  # the high-water mark starts anew
    before = megabytes('VmRSS')
    run = load()
    for _ in range(3):
        run()
    return round(megabytes('VmHWM') - before)


def peak_of(name, file, array, threads):
    """Return MB that a graph needs in a process of its own.

    Args:
        name (str): Of the contestant: begins with the runtime's.
        file (Path): The graph.
        array (np.ndarray): Its input.
        threads (int): Of the runtime.
    """
    import numpy as np
    runtime = next(runtime for runtime in SESSIONS if name.startswith(runtime))
    if file.suffix == '.bin':
        file = file.with_suffix('.xml')
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / 'input.npy', array)
        done = subprocess.run([sys.executable, __file__, runtime, str(file), str(Path(folder) / 'input.npy'),
                               str(threads)], check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def main():
    parser = argparse.ArgumentParser(description='Print the MB that a graph needs in a process of its own.')
    parser.add_argument('runtime', choices=SESSIONS)
    parser.add_argument('file', help='the graph')
    parser.add_argument('input', help='its input (.npy)')
    parser.add_argument('threads', type=int)
    args = parser.parse_args()
    import numpy as np
    __import__(args.runtime.replace(' ', '').lower())
    array, session = np.load(args.input), SESSIONS[args.runtime]

    def load():
        run = session(args.file, args.threads)
        return lambda: run(array)

    print(peak_here(load))
    return 0


if __name__ == '__main__':
    sys.exit(main())
