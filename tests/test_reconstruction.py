"""Block by block reconstruction: which blocks, what they learn from, and that they get better or stay."""
import copy
import io
import random
import re
from dataclasses import dataclass

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from rich.console import Console
from torch import nn

from psaq_mm.engine import quantize
from psaq_mm.engine.display import Display
from psaq_mm.engine.stages import reconstruction as stage_module
from psaq_mm.engine.stages.reconstruction import ReconstructionStage
from psaq_mm.models import attention_blocks, backbone_of, copy_model, extract_features, quantize_model
from psaq_mm.quantization import (
    ActivationConfig,
    LayerConfig,
    Mode,
    QuantizedConv2d,
    QuantizedLinear,
    WeightConfig,
    calibrate,
    hooked,
    quantized_layers,
    quantizers,
    set_mode,
)
from psaq_mm.reconstruction import (
    LearnedRounding,
    ReconstructionConfig,
    Recorder,
    Sample,
    Unit,
    UnitReconstruction,
    enough_images,
    find_units,
    importance,
    neighbours,
    record,
    settled_share,
    unrelated,
    without_unit,
)
from psaq_mm.reconstruction.reconstruct import of_images
from psaq_mm.synthesis import Game

from .conftest import DEMO_CONFIG, ROOT, run_tool
from .test_engine import EVERY_RANK, RUN, config, killed_at, run, same, torchrun, weights  # noqa: F401
from .test_families import images_for, timm_vit

FOUR = dict(weight=dict(bits=4), activation=dict(bits=4))


@pytest.fixture(scope='module')
def players():
    """A calibrated ViT, its full-precision original, and images."""
    torch.manual_seed(0)
    student = quantize_model(timm_vit().eval(), FOUR)
    images = images_for(student, 4)
    teacher = copy_model(student)
    set_mode(teacher, Mode.FLOAT)
    calibrate(student, lambda: extract_features(student, images))
    return student, teacher, images


@pytest.mark.parametrize('images, views, expected', [(32, None, 4), (64, None, 2), (96, None, 2), (24, None, 6),
                                                     (500, None, 1), (8, 3, 3)])
def test_views_are_about_as_many_whatever_the_number_of_images(images, views, expected):
    assert ReconstructionConfig(views=views).views_of_each(images) == expected


def test_units_of_a_detector_in_the_order_in_which_they_run():
    model = quantize_model(MODELS.build(Config.fromfile(DEMO_CONFIG).model).eval(), {})
    units = find_units(model, ['backbone', 'neck'], attention_blocks(backbone_of(model)),
                       lambda: extract_features(model, torch.randn(1, 3, 64, 96)))
    names = [unit.name for unit in units]
    depths = (2, 2, 4, 2)
    expected = ['backbone.patch_embed']
    for stage, depth in enumerate(depths):
        expected += [f'backbone.stages.{stage}.blocks.{block}' for block in range(depth)]
        expected += [f'backbone.stages.{stage}.downsample'] * (stage < 3)
    assert names == [*expected, 'neck']
    assert {unit.calls for unit in units} == {1}


def test_a_unit_that_runs_several_times_says_so():
    model = MODELS.build(dict(
        _scope_='mmdet', type='RetinaNet', backbone=dict(type='ResNet', depth=18, norm_eval=True, num_stages=4,
                                                         out_indices=(0, 1, 2, 3)),
        neck=dict(type='FPN', in_channels=[64, 128, 256, 512], out_channels=16, num_outs=5),
        bbox_head=dict(type='RetinaHead', num_classes=3, in_channels=16, feat_channels=16, stacked_convs=1,
                       anchor_generator=dict(type='AnchorGenerator', scales=[8], ratios=[1.0],
                                             strides=[4, 8, 16, 32, 64])))).eval()
    quantize_model(model, dict(targets=['backbone', 'neck', 'bbox_head']))
    units = find_units(model, ['backbone', 'neck', 'bbox_head'], [],
                       lambda: extract_features(model, torch.randn(1, 3, 64, 64), True))
    calls = {unit.name: unit.calls for unit in units}
    assert calls['backbone.layer4'] == 1 and calls['bbox_head.cls_convs.0'] == 5
    assert 'backbone' not in calls  # too many layers for one unit


def test_record_keeps_what_goes_in_and_comes_out_and_stops_there(players):
    student, teacher, images = players
    block, later = teacher.backbone.blocks[1], []
    handle = teacher.backbone.blocks[2].register_forward_hook(lambda *unused: later.append(1))
    (((x, ), kwargs), output), = record(block, 1, lambda: extract_features(teacher, images))
    handle.remove()
    assert not later and not kwargs and x.dtype == torch.float16
    with torch.no_grad():
        assert torch.allclose(block(x.float()), output.float(), rtol=1e-2, atol=1e-2)


class Chain(nn.Module):
    """Three layers, of which the last gets what the first puts out, too, if asked."""

    def __init__(self, skips):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))
        self.skips = skips

    def forward(self, batch):
        early = self.first(batch).mul_(2)
        late = self.second(early).relu_()
        return self.third(late + early if self.skips else late)


UNITS = [Unit(name, 1) for name in ('first', 'second', 'third')]


def recorded(model, batches, counted=None):
    """What a recorder finds of each unit on each batch; ``counted`` gets a 1 for each real output of the first unit
    during the passes for the third.
    """
    recorder = Recorder(model, UNITS, model, batches)
    found = [list(recorder.record(number)) for number in (0, 1)]
    with hooked([model.first.register_forward_hook(lambda module, args, output: counted.append(bool(output.any())))]
                if counted is not None else []):
        return [*found, list(recorder.record(2))]


@pytest.mark.parametrize('skips, whole', [(False, 3), (True, 5)])
def test_a_recorder_starts_behind_the_unit_before_where_it_can(skips, whole):
    """The first two batches of each shape tell where. With a skip, all batches go through the whole model."""
    model, batches, ran = Chain(skips), [torch.randn(6, 4) for _ in range(4)] + [torch.randn(2, 4)], []
    found = recorded(model, batches, ran)
    assert sum(ran) == whole
    for name, of_unit in zip(('first', 'second', 'third'), found):
        for batch, ((((x, ), _), output), ) in zip(batches, of_unit):
            (((y, ), _), aim), = record(model.get_submodule(name), 1, lambda b=batch: model(b))
            assert torch.allclose(x.float(), y.float(), rtol=5e-3, atol=5e-3)
            assert torch.allclose(output.float(), aim.float(), rtol=5e-3, atol=5e-3)
    assert 'forward' not in vars(model.first)  # nothing stands in any more


@dataclass
class Box:
    """An object with a tensor, which no stand-in looks into."""
    content: torch.Tensor


class Smuggler(Chain):
    """Its third layer gets what depends on the first by a way that no stand-in for outputs shows: integers, an object,
    or something left on a module.
    """

    def __init__(self, way):
        super().__init__(False)
        self.way = way
        self.first = Leaving(way)

    def forward(self, batch):
        early, kept = self.first(batch)
        late = self.second(early)
        kept = {'integers': lambda: kept, 'object': lambda: kept.content, 'state': lambda: self.first.left}[self.way]()
        return self.third(late + kept)


class Leaving(nn.Linear):
    def __init__(self, way):
        super().__init__(4, 4)
        self.way = way

    def forward(self, batch):
        output = super().forward(batch)
        if self.way == 'integers':
            return output, (output > 0).long()
        self.left = output
        return output, Box(output)


@pytest.mark.parametrize('way', ['integers', 'object', 'state'])
def test_a_recorder_notices_what_comes_from_earlier_units_by_other_ways(way):
    model, batches = Smuggler(way), [torch.randn(6, 4) for _ in range(4)]
    for batch, ((((x, ), _), _), ) in zip(batches, recorded(model, batches)[2]):
        (((y, ), _), _), = record(model.third, 1, lambda b=batch: model(b))
        assert torch.equal(x, y)


class Stubborn(Chain):
    """Fails where its first layer puts out zeros alone."""

    def __init__(self, error):
        super().__init__(False)
        self.error = error

    def forward(self, batch):
        early = self.first(batch)
        if not early.any():
            raise self.error
        return self.third(self.second(early))


def test_a_recorder_says_that_a_model_fails_without_earlier_units():
    model, batches, told = Stubborn(ValueError('no tokens\nat all')), [torch.randn(6, 4) for _ in range(3)], []
    recorder = Recorder(model, UNITS, model, batches, tell=told.append)
    assert len(list(recorder.record(2))) == 3
    assert told == ['third: what it gets is computed from the pixels on, which takes longer (ValueError: no tokens)']


@pytest.mark.parametrize('error', [MemoryError(), torch.OutOfMemoryError('CUDA out of memory.'),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory")], ids=repr)
def test_memory_that_ends_is_no_reason_to_go_another_way(error):
    model, batches = Stubborn(error), [torch.randn(6, 4) for _ in range(3)]
    with pytest.raises(type(error)):
        list(Recorder(model, UNITS, model, batches).record(2))
    unit, arguments = needs_images(2, error)
    with pytest.raises(type(error)):
        enough_images(unit, arguments, torch.ones(8, 4, 64, 64))


def test_a_recorder_starts_behind_the_unit_before_in_a_quantized_swin():
    """What was recorded in half precision rounds to other integers here and there, and that is no reason not to."""
    torch.manual_seed(0)
    student = quantize_model(MODELS.build(Config.fromfile(DEMO_CONFIG).model).eval(), FOUR)
    images = torch.randn(4, 3, 64, 64)

    def run(batch):
        return extract_features(student, batch)

    calibrate(student, lambda: run(images))
    units = find_units(student, ['backbone', 'neck'], attention_blocks(backbone_of(student)), lambda: run(images[:1]))
    recorder, ran = Recorder(student, units, run, images.split(1)), []
    stem = student.get_submodule(units[0].name)
    with hooked([stem.register_forward_hook(lambda module, args, output: ran.append(bool(output[0].any())))]):
        for number, unit in enumerate(units):
            ran.clear()
            assert len(list(recorder.record(number))) == 4
            if number > 1:  # the stem is not the unit before: it computes in whole passes alone
                assert sum(ran) == (4 if unit.name == 'neck' else 2), unit.name


@pytest.mark.parametrize('skips', [False, True])
def test_a_recorder_that_starts_late_finds_the_same(skips):
    model, batches = Chain(skips), [torch.randn(6, 4) for _ in range(3)]
    late = Recorder(model, UNITS, model, batches)
    for one, other in zip(late.record(2), recorded(model, batches)[2]):
        assert torch.equal(one[0][0][0][0], other[0][0][0][0]) and torch.equal(one[0][1], other[0][1])


def test_a_recorder_of_a_quantized_vit_finds_what_whole_passes_do(players):
    student, _, images = players
    names = [unit.name for unit in find_units(student, ['backbone'], attention_blocks(backbone_of(student)),
                                              lambda: extract_features(student, images[:1]))]
    recorder = Recorder(student, [Unit(name, 1) for name in names], lambda batch: extract_features(student, batch),
                        images.split(2))
    for number, name in enumerate(names):
        for batch, ((((x, ), _), _), ) in zip(images.split(2), recorder.record(number)):
            (((y, ), _), _), = record(student.get_submodule(name), 1, lambda b=batch: extract_features(student, b))
            assert (x.float() - y.float()).abs().mean() < 0.02 * y.float().abs().mean()  # 4 bits: some round elsewhere


def test_units_that_features_depend_on():
    targets = ['backbone', 'neck', 'roi_head.bbox_head']
    model = quantize_model(MODELS.build(Config.fromfile(DEMO_CONFIG).model).eval(), dict(FOUR, targets=targets))
    units = find_units(model, targets, attention_blocks(backbone_of(model)),
                       lambda: extract_features(model, torch.randn(1, 3, 96, 96), heads=True))
    assert {unit.name: unit.felt for unit in units}['backbone.stages.0.blocks.0']
    assert [unit.name for unit in units if not unit.felt] == ['roi_head.bbox_head']


class Applying(nn.Module):
    """Applies the weight of a layer that it does not call."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, batch):
        return nn.functional.linear(batch, self.layer.weight)


@pytest.mark.parametrize('targets, expected', [
    (['0'], ['0']), (['0.layer'], []), (['1'], ['1']), (['2'], []), (['3'], []), (['0.layer', '1', '2', '3'], ['1'])])
def test_units_are_what_runs_and_has_something_quantized(targets, expected):
    """Not a layer that is never called, or one that stays in float."""
    def quantized():
        return QuantizedLinear.from_float(nn.Linear(3, 3), LayerConfig(weight=WeightConfig(),
                                                                       activation=ActivationConfig()))

    model = nn.Sequential(Applying(quantized()), quantized(), nn.LayerNorm(3), nn.Linear(3, 3))
    found = find_units(model, targets, [], lambda: [model(torch.randn(2, 3))])
    assert [unit.name for unit in found] == expected and all(unit.felt for unit in found)


def test_layers_without_a_unit_are_named(players):
    units = [Unit('backbone.patch_embed', 1), Unit('backbone.blocks.1', 1)]
    left = without_unit(players[0], ['backbone'], units)
    assert 'backbone.blocks.0.mlp.fc1' in left and not any(
        name.startswith(('backbone.patch_embed', 'backbone.blocks.1.')) for name in left)
    assert without_unit(players[0], ['neck'], units) == []


def test_inputs_of_other_things_are_unrelated():
    value = torch.randn(4, 5)
    same = [((value, ), {})]
    assert not unrelated(same, [((value + 0.5 * torch.randn(4, 5), ), {})])
    assert unrelated(same, [((value[torch.tensor([1, 2, 3, 0])], ), {})])
    assert unrelated(same, [((value[:3], ), {})])


def test_importance_is_the_mean_square_of_the_jacobian():
    layer, weight = nn.Linear(3, 4, bias=False), torch.tensor([1.0, 0.0, 10.0, 2.0])
    model = nn.Sequential(layer, nn.Identity())
    runs = [lambda: [model(torch.randn(5, 3)) * weight] for _ in range(4)]
    (found, ), = importance(layer, runs, torch.Generator().manual_seed(0))
    assert found.shape == (1, 4) and torch.allclose(found, weight.square() / weight.square().mean(), atol=1e-5)
    (found, ), = importance(layer, [lambda: [(model(torch.randn(5, 3)) * 0).detach()]], torch.Generator())
    assert torch.equal(found, torch.ones(1, 4))


def samples_of(players, name):
    student, teacher, images = players
    samples = []
    for batch in images.split(2):
        exact, = record(teacher.get_submodule(name), 1, lambda b=batch: extract_features(teacher, b))
        found, = record(student.get_submodule(name), 1, lambda b=batch: extract_features(student, b))
        samples.append(Sample(exact[0], found[0], exact[1]))
    return samples


def reconstruction(players, name, **changes):
    unit = copy.deepcopy(players[0].get_submodule(name))
    ranges = [q.learn_range() for n, q in quantizers(unit).items() if not n.endswith('weight_quantizer')]
    settings = ReconstructionConfig(**(dict(range_lr=0.01, mix=0.5, final=0.0) | changes))
    return UnitReconstruction(unit, samples_of(players, name), list(unit.parameters()), ranges, settings.lr or 1e-3,
                              settings)


class Pooled(nn.Module):
    """A convolution that sees every position, and what all images have in common if asked."""

    def __init__(self, mixes):
        super().__init__()
        self.conv, self.mixes = nn.Conv2d(3, 4, 1), mixes

    def forward(self, image, size=None, scale=1.0):
        found = self.conv(image) * scale
        return found - found.mean(0, keepdim=True) if self.mixes else found


@pytest.mark.parametrize('side, expected', [(8, 8), (64, 2), (100, 1), (200, 1)])
def test_an_update_takes_as_many_images_as_it_needs(side, expected):
    unit = Pooled(False)
    unit.conv = QuantizedConv2d.from_float(unit.conv, LayerConfig(weight=WeightConfig(), activation=ActivationConfig()))
    set_mode(unit, Mode.FLOAT)
    images, size = torch.randn(8, 3, side, side), torch.tensor([side, side])
    arguments = (images, size), dict(scale=torch.tensor(2.0))
    output = unit(*arguments[0], **arguments[1]).detach()
    assert enough_images(unit, arguments, output) == expected
    sample = Sample(arguments, arguments, output)
    current = UnitReconstruction(unit, [sample], [], [], 0.1, ReconstructionConfig())
    (args, kwargs), _, aims, _ = current.part(sample, random.Random(0))
    assert len(args[0]) == expected == len(aims)
    assert torch.equal(args[1], size)
    assert torch.allclose(unit(*args, **kwargs), aims, atol=1e-5)  # of the same images


def test_an_update_takes_all_images_where_they_are_not_apart():
    unit = Pooled(True)
    unit.conv = QuantizedConv2d.from_float(unit.conv, LayerConfig(weight=WeightConfig(), activation=ActivationConfig()))
    set_mode(unit, Mode.FLOAT)
    images = torch.randn(8, 3, 64, 64)
    assert enough_images(unit, ((images, ), {}), unit(images).detach()) == 8


def needs_images(count, error):
    """A unit that fails with so few images, and arguments of which it would need fewer."""
    class Few(Pooled):
        def forward(self, image):
            if len(image) <= count:
                raise error
            return super().forward(image)

    unit = Few(False)
    unit.conv = QuantizedConv2d.from_float(unit.conv, LayerConfig(weight=WeightConfig(), activation=ActivationConfig()))
    set_mode(unit, Mode.FLOAT)
    return unit, ((torch.randn(8, 3, 64, 64), ), {})


def test_an_update_takes_all_images_where_a_unit_fails_with_fewer():
    (unit, arguments), told = needs_images(2, ValueError('one image is no batch')), []
    assert enough_images(unit, arguments, torch.ones(8, 4, 64, 64), told.append) == 8
    assert told == ['each update takes all images of a batch (ValueError: one image is no batch)']


def learn(current, steps=40):
    for step in range(steps):
        current.step(1.0, settled_share(step / steps), random.Random(step), torch.device('cpu'))


def test_a_block_learns(players):
    current = reconstruction(players, 'backbone.blocks.1')
    current.start()
    learn(current)
    before, now = current.finish()
    assert now < 0.8 * before and current.measure() == pytest.approx(now)


def test_learned_rounding_leaves_a_weight_on_one_of_its_two_integers(players):
    current = reconstruction(players, 'backbone.blocks.1', final=0.5)
    layers = [layer for layer in quantized_layers(current.unit).values() if hasattr(layer, 'weight')]
    before = [layer.weight.detach().clone() for layer in layers]
    current.start(layers)
    learn(current)
    started, now = current.finish()
    assert now < 0.9 * started and current.measure() == pytest.approx(now)
    moved = 0
    for layer, old in zip(layers, before):
        quantized = layer.weight_quantizer(layer.weight)
        assert torch.equal(layer.weight, quantized)  # nothing hovers between two integers
        scale, _ = layer.weight_quantizer.affine()
        assert ((quantized - old).abs() <= scale.view(-1, *[1] * (old.dim() - 1)) * 1.001).all()
        moved += (quantized != layer.weight_quantizer(old)).sum().item()
    assert moved > 0


def test_weights_settle_a_share_at_a_time_and_stay(players):
    layer = copy.deepcopy(next(layer for layer in quantized_layers(players[0]).values() if hasattr(layer, 'weight')))
    start = layer.weight.detach().clone()
    rounding = LearnedRounding(layer, start)
    generator, before = torch.Generator().manual_seed(0), torch.zeros_like(rounding.settled)
    for done in (0.1, 0.3, 0.5, 0.7, 0.95, 1.0):
        rounding.place.add_(torch.randn(start.shape, generator=generator) * 0.05)
        certain = (rounding.place.clamp(0, 1) - 0.5).abs().masked_fill(before, -1)
        fixed = layer.weight.detach()[before]
        rounding.apply(settled_share(done))
        new = rounding.settled & ~before
        assert rounding.settled.sum() == round(settled_share(done) * start.numel()) and rounding.settled[before].all()
        assert torch.equal(layer.weight.detach()[before], fixed)  # momentum does not move them
        if new.any() and not rounding.settled.all():
            assert certain[new].min() >= certain[~rounding.settled].max()
        before = rounding.settled.clone()
        other = LearnedRounding(copy.deepcopy(layer), start)
        other.load_state_dict(rounding.state_dict())
        assert torch.equal(other.place, rounding.place) and torch.equal(other.settled, rounding.settled)
    assert before.all() and torch.equal(layer.weight, layer.weight_quantizer(layer.weight))
    assert not rounding.gradient(torch.ones_like(start)).any()
    low, high = neighbours(start, layer.weight_quantizer)
    assert ((layer.weight == low) | (layer.weight == high)).all()


def test_a_block_that_learns_nothing_good_stays(players):
    current = reconstruction(players, 'backbone.blocks.1', lr=10.0)
    current.start()
    kept = [value.detach().clone() for value in current.learned()]
    learn(current, 5)
    before, now = current.finish()
    assert before == now
    assert all(map(torch.equal, kept, current.learned()))


def test_bad_ranges_are_found(players):
    current = reconstruction(players, 'backbone.blocks.1')
    good = current.measure()
    with torch.no_grad():
        for stretch in current.ranges:
            stretch.fill_(1.5)  # 4.5 times too wide
    bad = current.measure()
    current.search()
    assert bad > 1.5 * good and current.measure() < 1.2 * good


def test_the_search_sees_each_shape(players):
    current = reconstruction(players, 'backbone.blocks.1')
    large, seen = current.samples[0], []
    small = Sample(*(of_images(part, slice(1), 2) for part in large[:3]))
    current.samples = [large] * 6 + [small] * 2
    current.loss = lambda sample: seen.append(len(sample.aims)) or (torch.ones(()), torch.ones(()))
    current.search()
    assert set(seen) == {1, 2}


def test_ranges_stay_where_the_searched_part_misleads(players, monkeypatch):
    current = reconstruction(players, 'backbone.blocks.1')
    ranges, error = [stretch.clone() for stretch in current.ranges], current.measure()
    monkeypatch.setattr(current, 'part', lambda sample, rng: sample._replace(
        aims=sample.aims * 0))  # the less a block puts out, the better
    assert current.search() == (error, error)
    assert all(map(torch.equal, ranges, current.ranges))


def stanza(**more):
    return {'weight.bits': 4, 'activation.bits': 4, 'recipe': 'low_bit', 'reconstruction.steps': 3,
            'reconstruction.views': 1, **more}


@pytest.fixture(scope='module')
def whole(small_config, tmp_path_factory):
    """Where the whole recipe has run without an interruption."""
    folder = tmp_path_factory.mktemp('whole')
    run(config(small_config, folder, **stanza()))
    return folder


QUICK = stanza() | {'synthesis.num_images': 2, 'synthesis.batch_size': 1, 'reconstruction.steps': 2, 'game.steps': 0,
                    'report.images': 0, 'keep_float': ['backbone.stages.2.*', 'backbone.stages.3.*']}


@pytest.fixture(scope='module')
def watched(small_config, tmp_path_factory):
    """Where the whole recipe has run with few images and updates, and what showed it in a terminal."""
    folder = tmp_path_factory.mktemp('quick')
    display = Display(console=Console(force_terminal=True, file=io.StringIO()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('psaq_mm.engine.pipeline.Display', lambda quiet: display)
        run(config(small_config, folder, **QUICK))
    return folder, display


@pytest.fixture(scope='module')
def quick(watched):
    """Where the whole recipe has run with few images and updates."""
    return watched[0]


def test_one_bar_goes_on_from_block_to_block(watched):
    assert [task.description for task in watched[1].progress.tasks] == [
        'synthesis', 'calibration', 'recording', 'reconstruction']
    assert all(task.finished for task in watched[1].progress.tasks)


def test_a_run_resumes_within_a_block_and_between_two(small_config, tmp_path, quick, killed_at):  # noqa: F811
    for at in (11, 14):  # of 8 updates of images, then 2 for each block: in the second one, behind the third
        killed_at(at)
        with pytest.raises(KeyboardInterrupt):
            run(config(small_config, tmp_path, **QUICK), resume=True)
        content = torch.load(tmp_path / RUN / f'iter_{at}.pth', weights_only=True)['data_free'][0]
        assert content['stage'] == 'reconstruction' and (content['state']['current'] is None) == (at == 14)
    killed_at(None)
    run(config(small_config, tmp_path, **QUICK), resume=True)
    assert same(weights(tmp_path), weights(quick))
    ours, theirs = (torch.load(folder / 'quantized.pth', weights_only=True)['meta']['reconstruction']
                    for folder in (tmp_path, quick))
    assert ours == theirs


@pytest.mark.slow
@pytest.mark.parametrize('at', [20, 21, 56])  # of 8 updates of images, 15 blocks of 3, then the game
def test_the_whole_recipe_resumes(small_config, tmp_path, killed_at, whole, at):  # noqa: F811
    killed_at(at)
    with pytest.raises(KeyboardInterrupt):
        run(config(small_config, tmp_path, **stanza()))
    killed_at(None)
    run(config(small_config, tmp_path, **stanza()), resume=True)
    assert same(weights(tmp_path), weights(whole))


@pytest.mark.slow
def test_the_recipe_in_bfloat16(small_config, tmp_path):
    cfg = config(small_config, tmp_path, **stanza(**{'report.images': 0}))
    result = quantize(cfg, amp=True, eval_float=False, eval_quantized=False)
    errors = torch.load(result['checkpoint'], weights_only=True)['meta']['reconstruction']['errors']
    assert sum(now < before for before, now in errors.values()) > 10


@pytest.mark.slow
def test_a_two_stage_head_learns_from_the_boxes_it_is_to_answer(small_config, tmp_path):
    """The quantized model proposes other boxes: on these its output is no worse than on the others."""
    targets = ['backbone', 'neck', 'roi_head.bbox_head']
    cfg = config(small_config, tmp_path, **stanza(targets=targets, **{'report.images': 0}))
    result = quantize(cfg, eval_float=False, eval_quantized=False)
    errors = torch.load(result['checkpoint'], weights_only=True)['meta']['reconstruction']['errors']
    before, now = errors['roi_head.bbox_head']
    assert now < before < 0.3


@pytest.mark.slow
def test_frozen_layers_that_read_pixels_are_left_out(small_config, tmp_path):
    cfg = config(small_config, tmp_path, **stanza(**{'report.images': 0}))
    cfg.model.backbone.frozen_stages = 1
    result = quantize(cfg, eval_float=False, eval_quantized=False)
    errors = torch.load(result['checkpoint'], weights_only=True)['meta']['reconstruction']['errors']
    assert 'backbone.patch_embed' not in errors and 'backbone.stages.0.blocks.0' in errors


@pytest.mark.slow
def test_the_recipe_in_two_processes(small_config, tmp_path):
    """Both end with one student, whose blocks have become better."""
    options = ['--cfg-options', 'quantization.recipe=low_bit', 'quantization.weight.bits=4',
               'quantization.activation.bits=4', 'quantization.reconstruction.steps=5']
    (tmp_path / 'every_rank.py').write_text(EVERY_RANK)
    torchrun(small_config, tmp_path, '--no-eval', *options,
             script=(tmp_path / 'every_rank.py', ROOT / 'tools' / 'dfq.py'))
    first, second = (torch.load(tmp_path / RUN / f'rank{rank}.pth', weights_only=True) for rank in (0, 1))
    assert same(first, second) and same({k: first[k] for k in weights(tmp_path)}, weights(tmp_path))
    meta = torch.load(tmp_path / 'quantized.pth', weights_only=True)['meta']
    assert sum(now < before for before, now in meta['reconstruction']['errors'].values()) > 10


@pytest.mark.slow
def test_the_recipe_in_an_exported_graph(small_config, tmp_path):
    """With norms changed, weights on their integers and a range a head, the runtimes agree with the model."""
    pytest.importorskip('onnxruntime', reason="needs pip install 'psaq_mm[deploy]'")
    run_tool('tools/dfq.py', small_config, '--work-dir', tmp_path, '--no-eval', '--cfg-options',
             'quantization.recipe=low_bit', 'quantization.weight.bits=4', 'quantization.activation.bits=4',
             'quantization.reconstruction.steps=10', 'quantization.game.steps=0', 'quantization.report.images=0')
    assert 'on integers' in (tmp_path / 'report.html').read_text()  # what settled weights show for an error
    run_tool('tools/export.py', tmp_path / 'test_config.py', tmp_path / 'quantized.pth', '--parts-only')  # or fails
    assert (tmp_path / 'int8' / 'features.onnx').exists()


def test_images_that_choose_the_best_student_teach_no_block(small_config, tmp_path, monkeypatch):
    seen, make_views = {}, ReconstructionStage.make_views

    def views(stage, images, count):
        seen['lessons'] = torch.cat(images)
        return make_views(stage, images, count)

    def start(game, progress):
        seen['held'] = torch.cat(game.holdout)
        raise KeyboardInterrupt

    monkeypatch.setattr(ReconstructionStage, 'make_views', views)
    monkeypatch.setattr(Game, 'start', start)
    more = {'synthesis.num_images': 4, 'synthesis.batch_size': 2, 'reconstruction.steps': 1, 'game.steps': 2,
            'game.holdout': 0.25}
    with pytest.raises(KeyboardInterrupt):
        run(config(small_config, tmp_path, **QUICK | more))
    assert len(seen['lessons']) == 3 and len(seen['held']) == 1
    assert not any(torch.equal(image, seen['held'][0]) for image in seen['lessons'])


def test_the_game_leaves_the_ranges_of_reconstructed_weights(small_config, tmp_path):
    more = {'synthesis.num_images': 2, 'synthesis.batch_size': 1, 'reconstruction.steps': 1, 'game.steps': 2}
    game = run(config(small_config, tmp_path, **QUICK | more))['stages']['game']
    assert game['student'] and game['searched'] is None


def test_what_goes_otherwise_than_asked_for_is_told(small_config, tmp_path, monkeypatch):
    """Blocks and layers that stay as calibrated, inputs that are not mixed, heads that share a range."""
    monkeypatch.setattr(stage_module, 'find_units', lambda *args: find_units(*args)[:-1])  # without the neck
    monkeypatch.setattr(stage_module, 'unrelated', lambda exact, found: exact[0][0][0].shape[-1] == 64)
    monkeypatch.setattr('psaq_mm.quantization.layers.head_count', lambda attention: 7)
    cfg = config(small_config, tmp_path, **QUICK | {'synthesis.method': 'noise', 'reconstruction.steps': 1})
    cfg.model.backbone.frozen_stages = 1
    errors = run(cfg)['stages']['reconstruction']['errors']
    log = ''.join(path.read_text() for path in tmp_path.rglob('*.log'))
    assert 'backbone.patch_embed' not in errors and 'neck' not in errors
    for words in (r'1 block not reconstructed, since nothing in it may change: backbone\.patch_embed\n',
                  r'8 layers not reconstructed, since the model calls neither .*: neck\.lateral_convs\.0\.conv, ',
                  r'backbone\.stages\.1\.blocks\.0 learns from full-precision inputs alone: ',
                  r'4 attentions with one range for the weights of all heads, .*: backbone\.stages\.0\.blocks\.0\.'):
        assert len(re.findall(words, log)) == 1, words


def test_without_a_game_and_on_images_of_ones_own(small_config, tmp_path):
    cfg = config(small_config, tmp_path, **stanza(**{'synthesis.method': 'real', 'report.images': 0}))
    result = quantize(cfg, eval_float=False, eval_quantized=False)
    meta = torch.load(result['checkpoint'], weights_only=True)['meta']
    errors = meta['reconstruction']['errors']
    assert len(errors) == 15 and sum(now < before for before, now in errors.values()) > 10
    assert meta['quantization']['recipe'] == 'low_bit' and 'game' not in meta
    norms = result['stages']['calibration']['norms']
    assert len(norms['reparameterized']) > 10 and not set(norms['reparameterized']) & set(norms['left_alone'])
