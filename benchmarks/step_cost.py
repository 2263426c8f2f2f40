"""What a step costs: synthesis against a bare teacher pass, a student step of the game against plain float training.

    python benchmarks/step_cost.py
    python benchmarks/step_cost.py --cases deit_t swin_t --repeats 15 --json FILE

A bare pass is one forward of the library's own float model and the gradient with respect to the image, weights frozen;
a plain training step is forward, backward and Adam on the same modules, in float. Both sides of a ratio take turns in
one process; times are medians, so a noisy machine changes the seconds more than the ratios. Memory is what is
allocated at the peak beyond weights, images and optimiser state, from torch's own record of allocations.
"""
import argparse
import random
import runpy
import statistics
import sys
import time
from pathlib import Path

parse_options = runpy.run_path(str(Path(__file__).resolve().parents[1] / 'tools' / 'common.py'))['parse_options']

CASES = {
    'deit_t': ('DeiT-Tiny, batch 8, 224 x 224', 'configs/deit_t_w8a8.py', 8, (224, 224)),
    'swin_t': ('Swin-Tiny, batch 8, 224 x 224', 'configs/swin_t_w8a8.py', 8, (224, 224)),
    'mask_rcnn_512': ('Mask R-CNN Swin-T features, batch 1, 512 x 512', 'configs/mask_rcnn_swin_t_w8a8.py', 1,
                      (512, 512)),
    'mask_rcnn_800': ('Mask R-CNN Swin-T features, batch 1, 800 x 1344', 'configs/mask_rcnn_swin_t_w8a8.py', 1,
                      (800, 1344)),
    'mask_rcnn_s_800': ('Mask R-CNN Swin-S features, batch 1, 800 x 1344', 'configs/mask_rcnn_swin_s_w8a8.py', 1,
                        (800, 1344)),
}
DEFAULT = ('deit_t', 'swin_t', 'mask_rcnn_512', 'mask_rcnn_800')  # the last one is for a GPU


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--cases', nargs='+', choices=CASES, default=DEFAULT, metavar='CASE',
                        help=f'of {", ".join(CASES)} (default: {" ".join(DEFAULT)})')
    parser.add_argument('--steps', nargs='+', choices=('synthesis', 'student'), default=['synthesis', 'student'])
    parser.add_argument('--repeats', type=int, default=7, help='measurements of each side (default: 7)')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--amp', action='store_true', help='our steps in bfloat16, the floor in float32')
    parser.add_argument('--cfg-options', nargs='+', metavar='KEY=VALUE', default=[], help='as of tools/dfq.py, e.g. '
                        'quantization.synthesis.density=exact')
    parser.add_argument('--json', metavar='FILE')
    return parser.parse_args()


def peak_bytes(step, device):
    """Most bytes allocated at any moment of a step, beyond what was there before."""
    import torch
    if device == 'cuda':
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    now = peak = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == '[memory]']
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def measure(steps, repeats, device):
    """Median seconds of each step and its peak bytes; they take turns."""
    import torch
    times = [[] for _ in steps]
    for turn in range(repeats + 1):  # the first warms up
        for step, taken in zip(steps, times):
            started = time.perf_counter()
            step()
            if device == 'cuda':
                torch.cuda.synchronize()
            if turn:
                taken.append(time.perf_counter() - started)
    return [statistics.median(t) for t in times], [peak_bytes(step, device) for step in steps]


def loop_of(path, batch, size, device, options, amp=False):
    """A DataFreeLoop ready to step, and the library's own float model with the same weights."""
    import copy
    import tempfile

    import torch
    from mmengine.config import Config
    from mmengine.registry import MODELS
    from mmengine.runner import Runner

    from psaq_mm.engine import data_free_config
    from psaq_mm.engine.config import default_scope, without_pretrained
    from psaq_mm.stanza import QuantizationConfig
    cfg = Config.fromfile(path)
    cfg.merge_from_dict(options)
    default_scope(cfg)
    cfg.work_dir = tempfile.mkdtemp()
    # Half of the images are held back: whole batches alone take part in the game.
    cfg.quantization.merge(dict(synthesis=dict(num_images=2 * batch, batch_size=batch, size=size),
                                game=dict(holdout=0.5)))
    model = MODELS.build(without_pretrained(copy.deepcopy(cfg.model)))
    if hasattr(model, 'init_weights'):
        model.init_weights()
    weights = f'{cfg.work_dir}/float.pth'
    torch.save(dict(state_dict=model.state_dict()), weights)
    run = data_free_config(cfg, QuantizationConfig.parse(cfg.quantization), weights, {}, amp)
    run.log_level = 'ERROR'
    run.experiment_name = f'step_cost_{time.time_ns()}'
    runner = Runner.from_cfg(run)
    loop = runner.train_loop
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    runner.call_hook('before_run')
    runner.load_or_resume()
    loop.prepare()
    return loop, model.to(device).eval()


def synthesis_case(path, batch, size, device, options, amp=False):
    """A bare pass and a synthesis step."""
    import torch

    from psaq_mm.models import extract_features
    loop, model = loop_of(path, batch, size, device, options, amp)
    model.requires_grad_(False)
    image = loop.images[0].clone().requires_grad_()

    def bare():
        features = extract_features(model, image)
        torch.autograd.grad(sum(f.sum() for f in features), image)

    step = loop.find('synthesis').step
    step(random.Random(0))
    return bare, lambda: step(random.Random(0))


def student_case(path, batch, size, device, options, amp=False):
    """Adam on the float model; an update of ours with a new lesson; one with the lesson of the update before."""
    import torch
    from torch.nn.functional import mse_loss

    from psaq_mm.models import extract_features
    loop, model = loop_of(path, batch, size, device, options, amp)
    loop.find('calibration').start()
    stage = loop.find('game')
    stage.start()
    names = tuple(f'{t}.' for t in loop.targets)
    parameters = [p for n, p in model.named_parameters() if n.startswith(names)]
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_()
    adam = torch.optim.Adam(parameters, lr=1e-6)
    image = loop.images[0]
    with torch.no_grad():
        aim = [f + 0.01 * torch.randn_like(f) for f in extract_features(model, image, loop.heads)]

    def plain():
        adam.zero_grad()
        torch.stack([*map(mse_loss, extract_features(model, image, loop.heads), aim)]).mean().backward()
        adam.step()

    game = stage.game
    assert all(len(o.images) == batch for o in game.optimizers)

    def first():
        game.uses = 0
        game.lesson = None
        game.student_update(random.Random(0))

    def update():
        game.uses = 1
        game.lesson = game.lesson or game.new_lesson(0)
        game.student_update(random.Random(0))

    return plain, first, update


def student_cost(times, peaks, uses=None):
    """Seconds and peak bytes of an update, one in ``uses`` of which needs the teacher; and of plain training."""
    from psaq_mm.synthesis import GameConfig
    (plain, first, update), uses = times, uses or GameConfig().view_updates
    return ((first + (uses - 1) * update) / uses, plain), (peaks[1], peaks[0])


def main():
    args = parse_args()
    import logging
    import warnings
    warnings.simplefilter('ignore')
    logging.disable(logging.WARNING)
    import torch
    from rich.console import Console
    from rich.table import Table

    from psaq_mm.engine import write_json
    options = parse_options(args.cfg_options)
    torch.manual_seed(0)
    table = Table(title=f'{args.device}, {torch.get_num_threads()} threads, medians of {args.repeats}')
    for name in ('', 'seconds', 'floor, s', 'time / floor', 'peak, MB', 'floor, MB', 'memory / floor'):
        table.add_column(name, justify='right' if name else 'left')
    results = {}
    for case in args.cases:
        title, path, batch, size = CASES[case]
        for kind in args.steps:
            steps = dict(synthesis=synthesis_case, student=student_case)[kind](path, batch, size, args.device, options,
                                                                                       args.amp)
            times, peaks = measure(steps, args.repeats, args.device)
            if kind == 'student':
                times, peaks = student_cost(times, peaks, options.get('quantization.game.view_updates'))
            else:
                times, peaks = times[::-1], peaks[::-1]
            results[f'{case} {kind}'] = dict(seconds=times, bytes=peaks, time=times[0] / times[1],
                                             memory=peaks[0] / peaks[1])
            table.add_row(f'{kind} step: {title}', *(f'{t:.3f}' for t in times), f'{times[0] / times[1]:.2f}',
                          *(f'{p / 1e6:.0f}' for p in peaks), f'{peaks[0] / peaks[1]:.2f}')
            print(f'{case} {kind}: {times[0]:.3f} s / {times[1]:.3f} s, '
                  f'{peaks[0] / 1e6:.0f} MB / {peaks[1] / 1e6:.0f} MB', flush=True)
    Console(width=140).print(table)
    if args.json:
        write_json(results, args.json)
    return 0


if __name__ == '__main__':
    sys.exit(main())
