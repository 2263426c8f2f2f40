"""Layer sensitivity, and bits under a budget."""
import itertools
import json
import re
import runpy

import pytest
import torch
from mmengine.config import Config
from torch import nn

from psaq_mm.engine.checkpoint import load_safely
from psaq_mm.files import OwnedFolder
from psaq_mm.quantization import (
    Choice,
    InfeasibleError,
    LayerConfig,
    QuantizedMatMul,
    allocate,
    calibrate,
    convert,
    multiplications,
    output_error,
    quantizable,
    sensitivities,
)
from psaq_mm.quantization.config import ActivationConfig, WeightConfig

from .conftest import ROOT, run_tool


def test_the_allocation_is_the_best_there_is():
    generator = torch.Generator().manual_seed(0)
    layers = {f'l{i}': [Choice(bits, bits * size, float(torch.rand((), generator=generator)) * 4.0**-bits)
                        for bits in (2, 4, 6, 8)] for i, size in enumerate((3, 10, 7, 1, 20))}
    for share in (0.3, 0.5, 0.8, 1.0):
        budget = share * sum(choices[-1].cost for choices in layers.values())
        found = allocate(layers, budget)
        every = [c for c in itertools.product(*layers.values()) if sum(choice.cost for choice in c) <= budget]
        best = min(sum(choice.error for choice in c) for c in every)
        assert sum(choice.error for choice in found.values()) == pytest.approx(best, rel=1e-6)
        assert sum(choice.cost for choice in found.values()) <= budget and list(found) == list(layers)
    with pytest.raises(InfeasibleError, match='82'):
        allocate(layers, 81)


def quantized(model, targets, bits=4):
    layers = quantizable(model, targets)
    config = LayerConfig(weight=WeightConfig(bits=bits), activation=ActivationConfig(bits=bits, observer='minmax'))
    return convert(model, layers, {name: config for name in layers})


def test_sensitivity_of_a_part_is_the_error_it_makes_alone():
    model = quantized(nn.ModuleDict(dict(a=nn.Linear(8, 8), b=nn.Linear(8, 8))), ['a', 'b'])
    x = torch.randn(32, 8)

    def outputs(images):
        return [model.b(model.a(images))]

    calibrate(model, lambda: outputs(x))
    exact = x @ model.a.weight.T + model.a.bias
    exact = exact @ model.b.weight.T + model.b.bias
    rounded = (x @ model.a.weight_quantizer(model.a.weight).T + model.a.bias) @ model.b.weight.T + model.b.bias
    found = dict(sensitivities(model, outputs, [x, x]))
    assert set(found) == set(itertools.product('ab', ('weight', 'activation')))
    assert found['a', 'weight'] == pytest.approx(
        ((rounded - exact).square().sum() / exact.square().sum()).item(), rel=1e-4)
    whole = output_error(model, outputs, [x])
    assert max(found.values()) < whole < 2 * sum(found.values())
    assert set(dict(sensitivities(model, outputs, [x], skip=[('a', 'weight')]))) == set(found) - {('a', 'weight')}
    assert model.a.weight_quantizer.mode.value == 'quantize'  # as before


def test_multiplications_are_counted():
    model = quantized(nn.ModuleDict(dict(linear=nn.Linear(6, 5), conv=nn.Conv2d(4, 8, 3, stride=2, groups=2),
                                         up=nn.ConvTranspose2d(4, 6, 2, stride=2))), ['linear', 'conv', 'up'])
    product = QuantizedMatMul(LayerConfig(weight=None, activation=ActivationConfig()))
    model.add_module('product', product)

    def run():
        model.linear(torch.rand(2, 3, 6))
        model.conv(torch.rand(1, 4, 9, 9))
        model.up(torch.rand(1, 4, 5, 5))
        product(torch.rand(2, 7, 4), torch.rand(2, 4, 3))

    calibrate(model, run)
    assert multiplications(model, run) == dict(linear=2 * 3 * 6 * 5, conv=4 * 4 * 8 * 2 * 9, up=25 * 4 * 6 * 4,
                                               product=2 * 7 * 4 * 3)


@pytest.mark.slow
def test_the_tool_suggests_what_runs(classification_config, tmp_path):
    folder = tmp_path / 'analysis'
    command = ['tools/analyze.py', classification_config, '--work-dir', folder]
    done = run_tool(*command, '--size-mb', '1.0')
    found = json.loads((folder / 'sensitivity.json').read_text())
    assert 'mixed' in done.stdout and (folder / 'sensitivity.png').stat().st_size > 5000
    assert found['compared']['mixed']['size_mb'] <= 1.0 < found['compared']['W6A8']['size_mb']
    assert found['compared']['mixed']['sqnr_weights'] > found['compared']['W4A8']['sqnr_weights']
    assert {layer['name'] for layer in found['layers']} >= {'head', 'backbone.blocks.0.attn.matmul_scores'}
    # Rounding to fewer bits costs more, and weights at 8 bits next to nothing.
    errors = {layer['name']: layer['errors'] for layer in found['layers'] if layer['weights']}
    sums = [sum(error[bits]['weight'] for error in errors.values()) for bits in ('4', '6', '8')]
    assert sums[0] > 4 * sums[1] > 16 * sums[2]

    before = (folder / 'sensitivity_measured.json').read_text()
    run_tool(*command, '--bops', '0.5', '--quiet')  # on what is measured already
    assert (folder / 'sensitivity_measured.json').read_text() == before
    cfg = Config.fromfile(folder / 'mixed_precision.py')
    chosen = {entry['pattern']: entry for entry in cfg.quantization.overrides}
    assert any('activation' in entry for entry in chosen.values()) and 'weight' not in chosen.get(
        'backbone.blocks.0.attn.matmul_context', {})

    run_tool('tools/dfq.py', folder / 'mixed_precision.py', '--work-dir', tmp_path / 'run', '--no-eval')
    state = load_safely(tmp_path / 'run' / 'quantized.pth')['state_dict']
    for name, entry in chosen.items():
        if 'weight' in entry:
            low, high = state[f'{name}.weight_quantizer.grid'].tolist()
            assert (high - low).bit_length() == entry['weight']['bits']
    assert json.loads((tmp_path / 'run' / 'metrics.json').read_text())['mixed'] is True


@pytest.mark.parametrize('option, message', [
    (('--size-mb', '0.1'), r'--size-mb 0.1: with 4 bits everywhere the model still has 0\.\d+ MB'),
    (('--bops', '0.1'), r'--bops 0.1: with 4 bits everywhere 0.250')])
def test_an_impossible_budget_is_refused_before_measuring(option, message, classification_config, tmp_path,
                                                          classification_images):
    done = run_tool('tools/analyze.py', classification_config, '--work-dir', tmp_path, *option, '--cfg-options',
                    f'quantization.synthesis.reuse={classification_images}', check=False)
    assert done.returncode == 2 and not (tmp_path / 'sensitivity_measured.json').exists()
    assert re.search(message, done.stderr), done.stderr


@pytest.fixture(scope='module')
def classification_images(tmp_path_factory):
    path = tmp_path_factory.mktemp('images') / 'synthetic.pt'
    torch.save(dict(images=[torch.randn(4, 3, 96, 96)]), path)
    return path


def test_overrides_of_ones_own_are_kept_but_for_their_bits(classification_config):
    from psaq_mm.engine.analysis import suggestion
    cfg = Config.fromfile(classification_config)
    cfg.quantization.overrides = [dict(pattern='*.qkv', weight=dict(bits=4, observer='mse')),
                                  dict(pattern='*.proj', activation=dict(bits=4))]
    made = suggestion(cfg, 'weights.pth', [dict(pattern='head', weight=dict(bits=6))])
    kept, chosen = made.quantization.overrides
    assert kept['pattern'] == '*.qkv' and kept['weight'] == dict(observer='mse')
    assert chosen == dict(pattern='head', weight=dict(bits=6)) and made.load_from == 'weights.pth'
    assert len(cfg.quantization.overrides) == 2


def test_layers_are_measured_as_the_mixture_will_be_quantized(classification_config, tmp_path):
    from psaq_mm.engine.analysis import Analysis, with_recipe
    from psaq_mm.engine.config import default_scope
    cfg = Config.fromfile(classification_config)
    cfg.work_dir = str(tmp_path)
    cfg.quantization.pop('recipe', None)
    assert with_recipe(cfg, [8]).quantization.recipe == 'paper'
    measured = with_recipe(cfg, [4, 8])
    assert measured.quantization.recipe == 'low_bit' and 'recipe' not in cfg.quantization
    cfg.quantization.recipe = 'paper'
    assert with_recipe(cfg, [4]).quantization.recipe == 'paper'
    images = [torch.randn(2, 3, 96, 96)]
    try:
        ours, paper = (Analysis(one, images) for one in (measured, cfg))
        settings = [analysis.at(4, 8) for analysis in (ours, paper)]
        norms = [[m.weight for m in analysis.model(one).modules() if isinstance(m, torch.nn.LayerNorm)]
                 for analysis, one in zip((ours, paper), settings)]
    finally:
        default_scope(Config(dict(default_scope='mmdet')))
    assert [one.reparameterize for one in settings] == [True, False]
    assert any(not torch.equal(a, b) for a, b in zip(*norms))


@pytest.mark.slow
def test_layers_that_no_output_shows_keep_their_bits(small_config, tmp_path):
    """A two-stage head's outputs belong to proposals and are not compared: rounding them looks free, and is not."""
    from psaq_mm.engine.analysis import Analysis
    from psaq_mm.engine.display import Display
    cfg = Config.fromfile(small_config)
    cfg.work_dir = str(tmp_path)
    cfg.quantization.targets = ['backbone', 'roi_head.bbox_head']
    analysis = Analysis(cfg, [torch.randn(1, 3, 64, 96)])
    analysis.inspect([4, 8])
    analysis.measure([4, 8], Display(quiet=True), OwnedFolder(tmp_path))
    overrides = analysis.mixed([4, 8], size_mb=1.05 * analysis.least_mb + 0.5)
    patterns = {entry['pattern'] for entry in overrides}
    assert patterns and not any(pattern.startswith('roi_head') for pattern in patterns)


def test_a_mixture_that_is_no_better_is_told():
    no_better = runpy.run_path(str(ROOT / 'tools' / 'analyze.py'))['no_better']
    compared = dict(mixed=dict(sqnr=20.0), W4A4=dict(sqnr=20.0))
    assert '--bops' in no_better(compared, 'W4A4', None) and '--bops' not in no_better(compared, 'W4A4', 50.0)
    assert no_better(dict(compared, mixed=dict(sqnr=20.5)), 'W4A4', None) is None
    assert no_better(compared, 'W6A6', None) is None  # not among those compared
