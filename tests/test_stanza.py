"""The stanza: defaults, round trip, and one clear error for every mistake."""
import pydantic
import pytest
import torch
from mmengine.config import Config, ConfigDict

from psaq_mm.quantization import PatternError, quantizable
from psaq_mm.stanza import QuantizationConfig, StanzaError


def test_empty_stanza_is_w8a8_v2_of_backbone_and_neck():
    config = QuantizationConfig.parse({})
    assert (config.weight.bits, config.activation.bits) == (8, 8)
    assert config.synthesis.method == 'psaq_v2'
    assert config.targets is None and config.synthesis.size is None  # what the model has and takes
    assert config.weight.symmetric and config.weight.granularity == 'per_channel'
    assert not config.activation.symmetric and config.activation.granularity == 'per_tensor'


def test_learning_rate_of_the_student_follows_the_bits():
    rates = [QuantizationConfig.parse(dict(weight=dict(bits=bits))).student_lr for bits in (8, 7, 4)]
    assert rates == pytest.approx([6e-6, 1.2e-5, 9.6e-5])
    assert QuantizationConfig.parse(dict(game=dict(student_lr=0.1))).student_lr == 0.1


def test_frozen():
    with pytest.raises(pydantic.ValidationError):
        QuantizationConfig.parse({}).weight.bits = 4


def test_survives_a_config_file(tmp_path):
    raw = dict(weight=dict(bits=4), keep_float=['neck.*'], overrides=[dict(pattern='*.qkv', weight=dict(bits=6))],
               synthesis=dict(size=[(64, 96), (32, 32)]))
    parsed = QuantizationConfig.parse(raw)
    path = tmp_path / 'c.py'
    Config(dict(quantization=parsed.to_dict())).dump(path)
    assert QuantizationConfig.parse(Config.fromfile(path).quantization) == parsed
    assert QuantizationConfig.parse(ConfigDict(raw)) == parsed


@pytest.mark.parametrize('raw,words', [
    (dict(wieght=dict(bits=4)), ['quantization.wieght', "did you mean 'weight'", 'activation']),
    (dict(weight=dict(bit=4)), ['quantization.weight.bit = 4', "did you mean 'bits'", 'observer']),
    (dict(placement='al'), ["quantization.placement = 'al'", "did you mean 'all'", 'operands']),
    (dict(weight=dict(bits=9)), ['quantization.weight.bits = 9', 'less than or equal to 8']),
    (dict(activation=dict(bits=1)), ['quantization.activation.bits = 1', 'greater than or equal to 2']),
    (dict(weight=dict(bits='8')), ["quantization.weight.bits = '8'", 'integer']),
    (dict(weight=dict(bits=4.0)), ['quantization.weight.bits = 4.0', 'integer']),
    (dict(weight=dict(symmetric=1)), ['quantization.weight.symmetric = 1', 'boolean']),
    (dict(activation=dict(observer='min_max')), ["'min_max'", "did you mean 'minmax'", "'percentile'", "'mse'"]),
    (dict(activation=dict(percentile=120.0)), ['quantization.activation.percentile = 120.0', '100']),
    (dict(weight=8), ['quantization.weight = 8']),
    (dict(targets='backbone'), ["quantization.targets = 'backbone'"]),
    (dict(targets=[]), ['quantization.targets']),
    (dict(synthesis=dict(method='psaqv2')), ["did you mean 'psaq_v2'", "'noise'"]),
    (dict(synthesis=dict(size=224)), ['quantization.synthesis.size = 224', '(height, width)']),
    (dict(synthesis=dict(size=(8, 224))), ['at least 32']),
    (dict(synthesis=dict(lr=-1.0)), ['quantization.synthesis.lr = -1.0', 'greater than 0']),
    (dict(synthesis=dict(steps=0)), ['quantization.synthesis.steps = 0']),
    (dict(synthesis=dict(num_images=1)), ['quantization.synthesis.num_images = 1', 'at least 2', 'game.steps=0']),
    (dict(game=dict(holdout=1.0)), ['quantization.game.holdout = 1.0', 'less than 1']),
    (dict(overrides=[dict(pattern='*', weight=dict(bits=1))]), ['quantization.overrides.0.weight.bits = 1']),
    (dict(overrides=[dict(pattern='*', weight=dict(bitz=4))]), ['overrides.0.weight.bitz', "did you mean 'bits'"]),
    (dict(overrides=[dict(patern='*')]), ['overrides.0.patern', "did you mean 'pattern'"]),
    (dict(synthesis=dict(method='noise', reuse='x.pt')), ['quantization.synthesis.reuse', "not for 'noise'"]),
    (3, ['quantization = 3', 'must be a dict']),
])
def test_mistakes_are_named(raw, words):
    with pytest.raises(StanzaError) as caught:
        QuantizationConfig.parse(raw)
    for word in words:
        assert word in str(caught.value)
    assert 'Traceback' not in str(caught.value) and 'pydantic' not in str(caught.value)


def test_several_mistakes_are_all_named():
    with pytest.raises(StanzaError) as caught:
        QuantizationConfig.parse(dict(weight=dict(bits=0), activation=dict(observer='x')))
    assert len(str(caught.value).splitlines()) == 2


class Net(torch.nn.Module):

    def __init__(self):
        super().__init__()
        self.backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 4, 4), torch.nn.Conv2d(4, 4, 1))
        self.head = torch.nn.Linear(4, 2)


def test_layers_get_what_the_stanza_says():
    layers = quantizable(Net(), ['backbone', 'head'])
    layers['backbone.0'].reads_pixels = True
    config = QuantizationConfig.parse(
        dict(weight=dict(bits=4), activation=dict(bits=6), targets=['backbone', 'head'], keep_float=['head'],
             overrides=[dict(pattern='backbone.1', activation=dict(bits=3)),
                        dict(pattern='backbone.*', weight=dict(observer='mse'))]))
    result = config.layer_configs(layers)
    assert list(result) == ['backbone.0', 'backbone.1']
    assert (result['backbone.0'].weight.bits, result['backbone.0'].activation.bits) == (8, 8)  # reads pixels
    assert (result['backbone.1'].weight.bits, result['backbone.1'].activation.bits) == (4, 3)
    assert result['backbone.1'].weight.observer == 'mse'


def test_patterns_and_targets_that_match_nothing():
    layers = quantizable(Net(), ['backbone'])
    for raw in (dict(keep_float=['backbone.2']), dict(overrides=[dict(pattern='backbone.2*')])):
        with pytest.raises(PatternError, match=r"'backbone\.2\*?' matches none of the 2 .*backbone"):
            QuantizationConfig.parse(raw).layer_configs(layers)
    with pytest.raises(PatternError, match="target 'bakbone' is no submodule of Net, did you mean 'backbone'"):
        quantizable(Net(), ['bakbone'])


@pytest.mark.parametrize('changes, recipe', [
    ({}, 'paper'), (dict(weight=dict(bits=4)), 'low_bit'), (dict(patch_embed_bits=4), 'low_bit'),
    (dict(overrides=[dict(pattern='*', activation=dict(bits=6))]), 'low_bit'),
    (dict(weight=dict(bits=4), recipe='paper'), 'paper')])
def test_the_recipe_of_a_stanza_that_names_none(changes, recipe):
    assert QuantizationConfig.parse(changes).recipe == recipe


@pytest.mark.parametrize('changes, searches', [
    ({}, True), (dict(synthesis=dict(method='psaq_v1')), False), (dict(game=dict(steps=0)), False),
    (dict(game=dict(weight_ranges='calibrated')), False),
    (dict(reconstruction=dict(steps=9), game=dict(steps=0)), True),
    (dict(reconstruction=dict(steps=9, weight_ranges='calibrated')), False),
    (dict(reconstruction=dict(steps=9, weight_ranges='calibrated'), game=dict(steps=0)), False)])
def test_whether_weights_get_ranges_of_least_squared_error(changes, searches):
    assert QuantizationConfig.parse(changes).searches_weight_ranges == searches


def test_the_game_wants_two_images_where_it_is_played():
    with pytest.raises(StanzaError, match=r'num_images = 1: at least 2 for the game.*game\.steps=0'):
        QuantizationConfig.parse(dict(synthesis=dict(num_images=1)))
    QuantizationConfig.parse(dict(synthesis=dict(num_images=1), game=dict(steps=0)))


FOUR = dict(weight=dict(bits=4), activation=dict(bits=4))


@pytest.mark.parametrize('stanza, expected', [
    ({}, []), (FOUR, []), (dict(FOUR, recipe='paper'), []), (dict(recipe='low_bit'), []),
    (dict(game=dict(steps=9)), ['game.steps=9']),
    (dict(FOUR, reconstruction=dict(final=0.0, mix=0.0, weights='free', weight_ranges='calibrated', range_lr=0.0),
          game=dict(steps=0)),
     ['reconstruction.range_lr=0.0', "reconstruction.weights='free'", "reconstruction.weight_ranges='calibrated'",
      'reconstruction.mix=0.0', 'reconstruction.final=0.0', 'game.steps=0']),
    (dict(recipe='paper', reparameterize=True, reconstruction=dict(steps=300)),
     ['reparameterize=True', 'reconstruction.steps=300']),
    (dict(weight=dict(bits=4, observer='mse'), activation=dict(bits=4, symmetric_products=True, softmax='per_tensor')),
     ["weight.observer='mse'", 'activation.symmetric_products=True', "activation.softmax='per_tensor'"]),
    (dict(FOUR, synthesis=dict(steps=100, start='dead_leaves')), ['synthesis.steps=100']),
    (dict(FOUR, synthesis=dict(method='noise'), reconstruction=dict(steps=9)),
     ["synthesis.method='noise'", 'reconstruction.steps=9']),
    (dict(FOUR, synthesis=dict(method='real', num_images=24)), ["synthesis.method='real'", 'synthesis.num_images=24']),
    # What goes by the model, the machine or the task is no matter of the recipe.
    (dict(FOUR, targets=['head'], patch_embed_bits=4, keep_float=['a'], report=dict(images=0), overrides=[
        dict(pattern='*', weight=dict(bits=3))], synthesis=dict(size=(64, 64), batch_size=2, checkpointing=True)), [])])
def test_what_a_stanza_says_otherwise_than_its_recipe(stanza, expected):
    found = QuantizationConfig.parse(stanza)
    assert found.departures == expected
    assert QuantizationConfig.parse(found.to_dict()).departures == expected  # with all defaults spelled out


@pytest.mark.parametrize('key', ['final', 'range_lr', 'rounding_lr'])
def test_infinite_numbers_are_refused(key):
    with pytest.raises(StanzaError, match=rf'quantization\.reconstruction\.{key} = inf'):
        QuantizationConfig.parse(dict(reconstruction={key: float('inf')}))
