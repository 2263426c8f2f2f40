"""Config files of all kinds: read, checked, written, and read again. Command lines that are wrong."""
import collections
import contextlib
import datetime
import decimal
import enum
import functools
import importlib
import json
import math
import os
import pathlib
import re
import runpy
import sys
import uuid
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS

from psaq_mm.engine.compare import _software
from psaq_mm.engine.config_file import config_text, plain_config, read_config, write_config
from psaq_mm.engine.hooks import wrapped
from psaq_mm.errors import UserError, doing
from psaq_mm.python_text import UnwritableError, difference, statements
from psaq_mm.stanza import QuantizationConfig

from .conftest import DEMO_CONFIG, ROOT, run_tool

common = SimpleNamespace(**runpy.run_path(str(ROOT / 'tools' / 'common.py')))

LAZY = """
from mmengine.config import read_base
with read_base():
    from .base import *
import my_nets_{tag} as nets
from my_nets_{tag} import OwnRegistered
from torch.nn import GELU

model.update(type=OwnRegistered)
model.backbone.update(type=nets.Own, act_cfg=dict(type=GELU), dtype=nets.DTYPE)
"""
LAZY_BASE = """
from mmcv.ops import nms
from mmcv.transforms import LoadImageFromFile
from mmengine.dataset.sampler import DefaultSampler
from mmdet.datasets.transforms import PackDetInputs, Resize
from mmdet.models import FPN, RetinaNet, SwinTransformer

default_scope = None
model = dict(type=RetinaNet, backbone=dict(type=SwinTransformer, embed_dims=32), neck=dict(type=FPN),
             test_cfg=dict(nms=dict(type=nms)))
quantization = dict()
test_dataloader = dict(sampler=dict(type=DefaultSampler), dataset=dict(type='CocoDataset', pipeline=[
    dict(type=LoadImageFromFile), dict(type=Resize), dict(type=PackDetInputs)]))
"""
NETS = """
import torch
from mmdet.models import RetinaNet, SwinTransformer
from mmdet.registry import MODELS
DTYPE = torch.float16

class Own(SwinTransformer):
    pass

@MODELS.register_module()
class OwnRegistered(RetinaNet):
    pass
"""


@pytest.fixture
def lazy_config(tmp_path, monkeypatch, request):
    """A lazy config with classes of the user's, from a folder on sys.path; the module is unique to the test."""
    tag = f'{abs(hash(request.node.name)) % 10**8}_{os.getpid()}'
    (tmp_path / 'base.py').write_text(LAZY_BASE)
    (tmp_path / 'lazy.py').write_text(LAZY.format(tag=tag))
    nets = NETS.replace('OwnRegistered', f'Own{tag}') + f'OwnRegistered = Own{tag}\n'
    (tmp_path / f'my_nets_{tag}.py').write_text(nets)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / 'lazy.py', f'my_nets_{tag}', f'Own{tag}'
    sys.modules.pop(f'my_nets_{tag}', None)


def test_a_lazy_config_becomes_an_ordinary_one(lazy_config, tmp_path):
    path, module, name = lazy_config
    cfg = read_config(path)
    assert cfg.default_scope == 'mmdet' and cfg.model.type == name and cfg.model.neck.type == 'FPN'
    assert cfg.model.backbone.type == f'{module}.Own' and cfg.model.backbone.act_cfg.type == 'GELU'
    assert cfg.model.backbone.dtype is torch.float16
    assert [step.type for step in cfg.test_dataloader.dataset.pipeline] == ['LoadImageFromFile', 'Resize',
                                                                           'PackDetInputs']
    assert cfg.custom_imports['imports'] == [module] and not {'nets', 'GELU', 'nms'} & cfg.keys()
    write_config(cfg, tmp_path / 'written.py')
    again = Config.fromfile(tmp_path / 'written.py')
    assert difference(again._cfg_dict, cfg._cfg_dict) is None and 'lazy' not in again.pretty_text.lower()
    with MODELS.switch_scope_and_registry('mmdet') as registry:
        own = sys.modules[module]
        assert registry.get(again.model.type) is own.OwnRegistered
        assert registry.get(again.model.backbone.type) is own.Own
        assert registry.get(again.model.backbone.act_cfg.type) is torch.nn.GELU
    from mmcv.ops import nms
    assert again.model.test_cfg.nms.type is nms  # which no registry knows: mmcv calls it


def test_options_reach_a_lazy_config_and_ordinary_ones_stay_as_they_are(lazy_config):
    cfg = read_config(lazy_config[0], {'model.backbone.embed_dims': 8, 'quantization.weight.bits': 4})
    assert cfg.model.backbone.embed_dims == 8 and cfg.quantization.weight.bits == 4
    plain, ours = Config.fromfile(DEMO_CONFIG), read_config(DEMO_CONFIG)
    assert difference(plain._cfg_dict, ours._cfg_dict) is None


def test_a_lazy_config_names_what_cannot_be_imported(tmp_path):
    (tmp_path / 'c.py').write_text('from no_such_package.nets import Net\nmodel = dict(backbone=dict(type=Net))\n')
    with pytest.raises(UserError, match=r'model.backbone.type = no_such_package.nets.Net: cannot be imported.*'
                                        'PYTHONPATH must name the folder that holds no_such_package'):
        read_config(tmp_path / 'c.py')
    (tmp_path / 'd.py').write_text('from torch import Size\nmodel = dict(a=Size([1]))\n')
    with pytest.raises(UserError, match=r'line 2 of .*d.py: model = dict.*not call it'):
        read_config(tmp_path / 'd.py')


@pytest.mark.parametrize('model, scope', [('MaskRCNN', 'mmdet'), ('mmseg.EncoderDecoder', 'mmseg'),
                                          ('EncoderDecoder', 'mmseg'), ('psaq_mm.TimmClassifier', 'psaq_mm')])
def test_a_missing_scope_is_that_of_the_model(model, scope):
    for absent in (dict(default_scope=None), {}):
        assert plain_config(Config(dict(model=dict(type=model), **absent))).default_scope == scope


class Colour(enum.Enum):
    RED = 'r'


VALUES = dict(
    path=pathlib.Path("/a/O'Brien {{ fileDirname }}"), windows=pathlib.PureWindowsPath('a\\b'), sets=[{3, 1}, set()],
    frozen=frozenset(['b']), scalars=[np.float32(0.1), np.float64(1 / 3), np.int64(4), np.bool_(True), np.str_('a"\'')],
    array=np.arange(6).reshape(2, 3) / 7, arrays=[np.array(3), np.zeros((0, 2), 'f4'), np.array([math.nan, math.inf])],
    words=np.array(['a', 'b']), dtypes=[torch.float16, np.dtype('f4'), np.float32], functions=[os.path.join, len],
    classes=[collections.OrderedDict, torch.nn.GELU], slices=slice(0, None, 2), pattern=re.compile('a{{x}}\n', re.I),
    floats=(math.inf, -math.inf, math.nan, -0.0, 1e-300), raw=[b'\x00{{$HOME:x}}', bytearray(b'x')], enums=Colour.RED,
    partials=functools.partial(int, base=2), dots=...,
    keys={1: 2, None: 3, (1, 2): 4, 'a b': 5, 'class': 6, '{{a}}': 7},
    quotes='a\'b"c\'\'\'"""', braces='{{ fileDirname }} {{$HOME:x}} {{{{ {{_base_.x}}', lines='a\nb\r\\n\\',
    surrogate='\udc80é', large=[10**5000, -10**5000], nested=[[], (), {}, dict(a=[{}, ((), )])], one=(1, ),
    others=[range(3), 1 + 2j, decimal.Decimal('1.5'), uuid.UUID(int=5), torch.device('cpu')],
    date=datetime.datetime(2020, 1, 1), queue=collections.deque([1, 2], 3), counter=collections.Counter(a=2),
    tensor=torch.ones(2, 3, dtype=torch.int8), unicode='日本語 😀', long='x' * 500, many=list(range(100)), class_='a')


@pytest.mark.parametrize('key', VALUES)
def test_a_value_comes_back(key, tmp_path):
    cfg = Config({key: VALUES[key], 'model': dict(a=[dict(b=VALUES[key])])})
    write_config(cfg, tmp_path / 'c.py')
    again = Config.fromfile(tmp_path / 'c.py')
    assert difference(cfg._cfg_dict, again._cfg_dict) is None
    assert again.pretty_text  # mmengine's Runner prints it


@pytest.mark.parametrize('a, b', [(1, 1.0), (True, 1), ([1], (1, )), (math.nan, 0.0), ({'a': 1}, {'b': 1}),
                                  (np.zeros(2), np.zeros(3)), (np.zeros(2, 'f4'), np.zeros(2)), ('a', b'a'),
                                  (functools.partial(int, base=2), functools.partial(int, base=3))])
def test_values_that_differ(a, b):
    assert difference(dict(k=[a]), dict(k=[b]))[:2] == ('k', 0)
    assert difference(dict(k=[a]), dict(k=[a])) is None


def test_a_value_that_cannot_be_written_is_named():
    with open(__file__) as stream:
        for value in (stream, lambda x: x, (i for i in 'a')):
            with pytest.raises(UserError, match=r'model.neck.1.act: cannot be written to a config file'):
                config_text(Config(dict(model=dict(neck=[1, dict(act=value)]))))
    with pytest.raises(UnwritableError, match='is not found by importing it'):
        statements(dict(a=lambda: 1))


def test_a_config_is_whole_or_not_there_and_utf8_in_any_locale(tmp_path):
    write_config(Config(dict(a='é')), tmp_path / 'c.py')
    before = (tmp_path / 'c.py').read_bytes()
    assert 'é'.encode() in before
    with pytest.raises(UserError):
        write_config(Config(dict(a=[lambda: 1])), tmp_path / 'c.py')
    assert (tmp_path / 'c.py').read_bytes() == before and os.listdir(tmp_path) == ['c.py']


def test_what_mmengine_prints_itself_stays_and_interruptions_are_no_syntax_errors(monkeypatch):
    assert Config(dict(a=dict(b=[1, 'x']))).pretty_text == "a = dict(b=[\n    1,\n    'x',\n])\n"

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr('mmengine.config.config.FormatCode', interrupted)
    with pytest.raises(KeyboardInterrupt):
        Config(dict(a=1)).pretty_text  # noqa: B018


@pytest.mark.parametrize('key, value, words', [
    ('quantization', 4, 'must be a dict'), ('randomness', 7, 'must be a dict, e.g. dict'),
    ('randomness.seed', 'x', 'a whole number'), ('default_hooks', 3, 'must be a dict'),
    ('default_hooks.logger', 3, 'must be a dict'), ('test_dataloader', [1], 'must be a dict'),
    ('test_dataloader.dataset', 3, 'must be a dict, e.g. dict'), ('test_dataloader.batch_size', 0, 'above 0'),
    ('calib_dataloader.dataset', 'x', 'must be a dict'), ('load_from', 3, 'a string'), ('work_dir', 3, 'a string'),
    ('custom_imports', 7, 'must be a dict'), ('custom_imports.imports', 7, 'the name of a module'),
    ('custom_imports.imports', [7], 'the name of a module'), ('visualizer', 7, 'must be a dict'),
    ('visualizer.vis_backends', dict(type='x'), 'must be a list'), ('model', 5, 'must be a dict'),
    ('env_cfg', 'x', 'must be a dict'), ('env_cfg.dist_cfg', 1, 'must be a dict'), ('launcher', 'x', "'pytorch'"),
    ('default_scope', 3, 'the name of a library'), ('custom_hooks', dict(type='x'), 'must be a list'),
    ('custom_hooks', ['x'], 'custom_hooks.0 = '), ('test_evaluator', 'CocoMetric', 'must be a dict'),
    ('default_hooks.logger.interval', 0, 'above 0'), ('log_processor', 1, 'must be a dict'), ('resume', 'x', 'True')])
def test_a_key_of_the_wrong_kind_is_named(tmp_path, key, value, words):
    first, *rest = key.split('.')
    for part in reversed(rest):
        value = {part: value}
    (tmp_path / 'c.py').write_text(f'{first} = {value!r}\n')
    with pytest.raises(UserError) as error:
        read_config(tmp_path / 'c.py')
    assert str(error.value).startswith(f'{key}') and words in str(error.value)
    assert '\n' not in str(error.value)


def test_options_of_the_wrong_kind_are_named(tmp_path):
    (tmp_path / 'c.py').write_text("model = dict(type='MaskRCNN', depth=3)\nquantization = dict()\n")
    with pytest.raises(UserError, match='quantization = 4: must be a dict'):
        read_config(tmp_path / 'c.py', {'quantization': 4})
    with pytest.raises(UserError, match='--cfg-options model.depth.x=1: must be KEY=VALUE with keys of the config'):
        read_config(tmp_path / 'c.py', {'model.depth.x': 1})
    for words in (['foo'], ['=3'], ['a=[1,(2]']):
        with pytest.raises(UserError, match=re.escape(f'--cfg-options {words[0]}: must be KEY=VALUE')):
            common.parse_options(words)


def test_places_that_are_no_config_are_told_apart(tmp_path):
    with pytest.raises(UserError, match='is a folder: name a config file in it'):
        read_config(tmp_path)
    with pytest.raises(UserError, match="does not exist.*_base_ = 'mmdet::a/b.py'"):
        read_config('mmdet::a/b.py')


def test_a_single_import_is_a_list_and_psaq_mm_comes_first(tmp_path):
    from psaq_mm.engine import test_config
    (tmp_path / 'c.py').write_text("custom_imports = dict(imports='json.tool')\nmodel = dict(type='MaskRCNN')\n")
    cfg = read_config(tmp_path / 'c.py')
    assert cfg.custom_imports['imports'] == ['json.tool']
    assert test_config(cfg, QuantizationConfig())['custom_imports']['imports'] == ['psaq_mm', 'json.tool']
    cfg.custom_imports = dict(imports=['json', 'psaq_mm'])
    assert test_config(cfg, QuantizationConfig())['custom_imports']['imports'] == ['psaq_mm', 'json']


def test_imports_that_fail_are_named(tmp_path, monkeypatch):
    (tmp_path / 'broken_of_mine.py').write_text('1 / 0')
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, words in (('broken_of_mine', 'ZeroDivisionError'), ('none_of_mine.a', 'PYTHONPATH must name the folder '
                                                                  'that holds none_of_mine')):
        with pytest.raises(UserError, match=rf"custom_imports.imports: '{name}' cannot be imported .*{words}"):
            plain_config(Config(dict(custom_imports=dict(imports=[name]))))
    with pytest.warns(UserWarning, match='none_of_mine'):
        plain_config(Config(dict(custom_imports=dict(imports=['none_of_mine'], allow_failed_imports=True))))


def test_a_library_without_configs_is_told(tmp_path, monkeypatch):
    from psaq_mm.engine import config_file
    from psaq_mm.zoo import check
    monkeypatch.setattr(config_file, 'folder_of', lambda package, *parts: tmp_path.joinpath(package, *parts))
    monkeypatch.setattr(check, 'folder_of', config_file.folder_of)
    monkeypatch.setattr('mmengine.config.config.get_installed_path', lambda package: str(tmp_path / 'mmdet'))
    (tmp_path / 'c.py').write_text("_base_ = 'mmdet::_base_/default_runtime.py'\n")
    for work in (lambda: read_config(tmp_path / 'c.py'), lambda: list(check.zoo_configs())):
        with pytest.raises(UserError, match=r"mmdet's configs are not here: .*\.mim, which this installation does not "
                                            'have.*pip install mmdet'):
            work()


def test_a_zoo_without_configs_does_not_hide_the_other(tmp_path, monkeypatch):
    from psaq_mm.zoo import check
    folder, said = check.folder_of, []
    monkeypatch.setattr(check, 'folder_of', lambda package, *parts: folder(package, *parts) if package == 'mmseg'
                        else tmp_path.joinpath(package, *parts))
    monkeypatch.setattr(check, 'print_log', lambda message, *unused: said.append(message))
    names = [name for name, _ in check.zoo_configs()]
    assert names and all(name.startswith('mmseg::') for name in names)
    assert len(said) == 1 and said[0].startswith("mmdet's configs are not here")


# -- wrappers --------------------------------------------------------------------------------------------------------


def test_the_model_inside_a_wrapper_is_found():
    class Wrapper(torch.nn.Module):

        def __init__(self, **parts):
            super().__init__()
            for name, part in parts.items():
                self.add_module(name, part)

    inner = Wrapper(backbone=torch.nn.Linear(1, 1))
    stanza = QuantizationConfig()
    for outer in (inner, Wrapper(module=inner), Wrapper(data_preprocessor=torch.nn.Identity(), model=inner),
                  Wrapper(module=Wrapper(inner=inner))):
        assert wrapped(outer, stanza) is inner
    several = Wrapper(student=inner, teacher=Wrapper(backbone=torch.nn.Linear(1, 1)))
    assert wrapped(several, stanza) is several  # which of them is for the targets to say
    alien = torch.nn.Linear(1, 1)
    assert wrapped(alien, stanza) is alien


# -- grid: what results depend on -------------------------------------------------------------------------------------


def test_own_modules_count_for_what_is_kept(tmp_path, monkeypatch):
    (tmp_path / 'own_net_package').mkdir()
    (tmp_path / 'own_net_package' / '__init__.py').write_text('from .part import a')
    part = tmp_path / 'own_net_package' / 'part.py'
    part.write_text('a = 1')
    monkeypatch.syspath_prepend(str(tmp_path))
    cfg = Config(dict(custom_imports=dict(imports=['own_net_package'])))
    importlib.import_module('own_net_package')
    before = _software(cfg)
    assert _software(cfg) == before and json.dumps(before)
    part.write_text('a = 2')
    assert _software(cfg)['own_modules'] != before['own_modules'] and _software(cfg)['psaq_mm'] == before['psaq_mm']


# -- the command line ------------------------------------------------------------------------------------------------


def status(work, capsys, **args):
    """Run some work in the net: (exit status, what it printed to stderr)."""
    with contextlib.suppress(OSError):
        found = common.run(Namespace(**args), work)
    return found, capsys.readouterr().err


def test_the_net_tells_what_was_done_and_where_the_traceback_is(tmp_path, capsys, monkeypatch):

    def work(args):
        (tmp_path / 'quantized.pth').write_text('')
        with doing('evaluating (test_dataloader)'):
            raise ZeroDivisionError('a\nb')

    found, printed = status(work, capsys, work_dir=str(tmp_path))
    assert found == 2 and printed.count('\n') == 1 and 'Traceback' not in printed
    assert printed.startswith('error: ZeroDivisionError: a b (while evaluating (test_dataloader))')
    assert 'quantized.pth' in printed and f'{tmp_path}/error.log' in printed and '--debug' in printed
    log = (tmp_path / 'error.log').read_text()
    assert 'Traceback' in log and 'raise ZeroDivisionError' in log
    status(work, capsys, work_dir=str(tmp_path))
    assert (tmp_path / 'error.log').read_text().startswith(log)  # earlier ones stay
    assert 'Traceback' in status(work, capsys, work_dir=str(tmp_path), debug=True)[1]
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert 'error.rank1.log' in status(work, capsys, work_dir=str(tmp_path))[1]


def test_a_class_that_ends_the_process_is_an_error(tmp_path, capsys, monkeypatch):
    (tmp_path / 'module_that_quits.py').write_text("raise SystemExit('no licence')")
    monkeypatch.syspath_prepend(str(tmp_path))

    def work(args):
        raise SystemExit(0)

    assert status(work, capsys, work_dir=str(tmp_path))[0] == 2
    with pytest.raises(UserError, match="'module_that_quits' cannot be imported .SystemExit: no licence"):
        plain_config(Config(dict(custom_imports=dict(imports='module_that_quits'))))


def test_where_the_net_cannot_write_it_takes_a_temporary_file(tmp_path, capsys):
    def work(args):
        args.work_dir = str(tmp_path / 'file' / 'w')
        raise RuntimeError

    (tmp_path / 'file').write_text('')
    found, printed = status(work, capsys)
    assert found == 2
    path = pathlib.Path(re.search(r'The traceback is in (\S+);', printed)[1])
    assert 'RuntimeError' in path.read_text()
    path.unlink()


@pytest.mark.parametrize('cause, left, words', [
    (False, True, ', --resume goes on'), (True, True, ', --resume goes on'),
    (False, False, '. Nothing to go on from was written yet')])
def test_ctrl_c_is_one_line(capsys, monkeypatch, cause, left, words):
    monkeypatch.setattr(sys.modules['psaq_mm.engine.pipeline'], 'was_interrupted', lambda work_dir: left)

    def work(args):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            if cause:
                raise SyntaxError('a library of theirs') from None
            raise

    assert status(work, capsys, resume=False) == (130, f'interrupted{words}\n')


@pytest.mark.parametrize('args, words', [
    (dict(json='/proc/none/x.json'), '--json .*cannot be written'), (dict(json='{}'), '--json .*it is a folder'),
    (dict(json='{}/file/x/y.json'), '--json .*file is not a folder'), (dict(markdown='{}/file/x.md'), '--markdown'),
    (dict(json='/dev/null'), '.*it is not a file'), (dict(json=''), '--json is empty'),
    (dict(logs='{}/file'), '.*choose another with --logs'),
    (dict(work_dir='{}/file/w'), 'cannot write to the work dir .*--work-dir')])
def test_places_for_results_are_tried_before_the_work(tmp_path, capsys, args, words):
    (tmp_path / 'file').write_text('')
    args = {name: value.format(tmp_path) for name, value in args.items()}
    found, printed = status(lambda args: pytest.fail('it has begun'), capsys, **args)
    assert found == 2 and re.match(f'error: {words}', printed), printed
    assert os.listdir(tmp_path) == ['file']
    good = dict(json=str(tmp_path / 'a' / 'b.json'), work_dir=str(tmp_path / 'c'))
    assert status(lambda args: None, capsys, **good) == (0, '')
    assert os.listdir(tmp_path) == ['file']


def test_tools_hide_no_module_of_the_users_and_help_is_quick(tmp_path, monkeypatch):
    for name in ('common', 'export'):
        (tmp_path / f'{name}.py').write_text('mine = True\n')
    (tmp_path / 'c.py').write_text("custom_imports = dict(imports=['common', 'export'])\nmodel = 5\n")
    script = ('import runpy, sys; sys.path[:0] = {!r}; sys.argv = sys.argv[1:]\n'
              'try: runpy.run_path(sys.argv[0], run_name="__main__")\n'
              'except SystemExit: pass\n'
              'assert "torch" not in sys.modules\n'
              'import common, export; assert common.mine and export.mine').format([str(ROOT / 'tools'), str(tmp_path)])
    for tool in ('dfq', 'grid', 'coverage'):
        assert 'usage' in run_tool('-c', script, f'tools/{tool}.py', '--help').stdout


def test_config_dicts_are_copied_not_shared():
    raw = ConfigDict(a=dict(b=[1]))
    cfg = Config(dict(model=raw))
    plain_config(cfg).model.a.b.append(2)
    assert cfg.model.a.b == [1]
