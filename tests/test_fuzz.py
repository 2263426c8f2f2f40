"""Bad input of every kind: hundreds of mutated stanzas and checkpoints either work or are one clear error."""
import copy
import io
import pickle
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from psaq_mm.engine.checkpoint import load_float, load_safely, read_checkpoint
from psaq_mm.errors import UserError
from psaq_mm.models import quantize_model
from psaq_mm.stanza import QuantizationConfig, StanzaError

MANY = settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
COMPLETE = QuantizationConfig.parse(dict(
    keep_float=['neck'], overrides=[dict(pattern='backbone.*', weight=dict(bits=4))])).to_dict()
ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-10**20, 10**20), st.floats(), st.text(max_size=8), st.binary(max_size=4),
    st.lists(st.integers(-1, 300), max_size=3), st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
    st.sampled_from(['backbone', 'neck', '*', 'minmax', 'psaq_v1', (32, 32), [[32, 64]], 4, 8, 0.5, object, print]))


def paths_of(value, path=()):
    """Where something can be changed in nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from paths_of(item, (*path, key))


PATHS = list(paths_of(COMPLETE))


@st.composite
def stanzas(draw):
    """A complete stanza with up to four changes: another value, another name, something missing or too much."""
    stanza = copy.deepcopy(COMPLETE)
    for _ in range(draw(st.integers(1, 4))):
        *path, key = draw(st.sampled_from(PATHS))
        place = stanza
        try:
            for part in path:
                place = place[part]
            kind = draw(st.sampled_from(['value', 'value', 'value', 'missing', 'more', 'name']))
            if kind == 'value':
                place[key] = draw(ODD)
            elif kind == 'missing':
                del place[key]
            elif kind == 'more':
                place[draw(st.text(max_size=6))] = draw(ODD)
            else:
                place[draw(st.one_of(st.text(max_size=6), st.integers(), st.none()))] = place.pop(key)
        except (KeyError, IndexError, TypeError, AttributeError):  # changed away by an earlier change
            pass
    return stanza


class Tiny(nn.Module):

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
        self.neck = nn.Linear(4, 2)


def clear(error):
    """Whether a message is for people: says something, and nothing of what it came through."""
    text = str(error)
    return text.strip() and 'Traceback' not in text and 'pydantic.dev' not in text and '\x00' not in text


@MANY
@given(stanzas())
def test_a_stanza_converts_a_model_or_is_one_clear_error(stanza):
    try:
        parsed = QuantizationConfig.parse(stanza)
        assert QuantizationConfig.parse(parsed.to_dict()) == parsed
        quantize_model(Tiny(), parsed)
    except UserError as error:
        assert clear(error)


@MANY
@given(ODD)
def test_anything_at_all_as_a_stanza(value):
    if isinstance(value, dict) and not value:
        assert QuantizationConfig.parse(value) == QuantizationConfig().settled()
    else:
        with pytest.raises(StanzaError) as caught:
            QuantizationConfig.parse(value)
        assert clear(caught.value)


@st.composite
def state_dicts(draw):
    """A model's state dict with up to three changes to its entries."""
    state = copy.deepcopy(Tiny().state_dict())
    for _ in range(draw(st.integers(0, 3))):
        if not state:
            break
        key = draw(st.sampled_from(sorted(state, key=str)))
        kind = draw(st.sampled_from(['missing', 'extra', 'shape', 'nan', 'type', 'name', 'dtype', 'odd']))
        if kind == 'missing':
            del state[key]
        elif kind == 'extra':
            name = draw(st.one_of(st.text(max_size=6), st.sampled_from(['backbone.9.weight', 'x.scale'])))
            state[name] = torch.ones(2)
        elif kind == 'shape':
            state[key] = torch.ones(draw(st.lists(st.integers(0, 5), max_size=4)))
        elif kind == 'nan' and torch.is_tensor(state[key]) and state[key].is_floating_point():
            state[key] = torch.full_like(state[key], draw(st.sampled_from([float('nan'), float('inf')])))
        elif kind == 'type':
            state[key] = draw(st.one_of(st.none(), st.integers(), st.text(max_size=3), st.just([1])))
        elif kind == 'name':
            state[f'module.{key}'] = state.pop(key)
        elif kind == 'dtype' and torch.is_tensor(state[key]):
            state[key] = state[key].to(draw(st.sampled_from([torch.float16, torch.int8, torch.complex64, torch.bool])))
        elif kind == 'odd' and torch.is_tensor(state[key]):
            state[key] = draw(st.sampled_from([torch.ones(2, 2).to_sparse(), torch.empty(2, device='meta'),
                                               torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8)]))
    return draw(st.sampled_from([dict(state_dict=state), dict(model=state), state,
                                 dict(state_dict=state, meta=3), dict(state_dict=list(state))]))


@MANY
@given(state_dicts(), st.booleans())
def test_a_checkpoint_fits_or_is_one_clear_error(tmp_path_factory, content, converted):
    path = tmp_path_factory.getbasetemp() / 'fuzz.pth'
    torch.save(content, path)
    model = Tiny()
    if converted:
        quantize_model(model, {})
    before = copy.deepcopy(model.state_dict())
    try:
        load_float(model, read_checkpoint(str(path)))
    except UserError as error:
        assert clear(error) and 'fuzz.pth' in str(error)
        assert all(torch.equal(v.nan_to_num(), before[k].nan_to_num()) for k, v in model.state_dict().items())
    else:
        assert all(torch.isfinite(p).all() for p in model.parameters())


@MANY
@given(st.data())
def test_a_damaged_file_loads_or_is_one_clear_error(tmp_path_factory, data):
    """Bytes changed, cut off or put in, anywhere."""
    path = tmp_path_factory.getbasetemp() / 'damaged.pth'
    stream = io.BytesIO()
    torch.save(dict(state_dict=Tiny().state_dict(), meta=dict(a=1)), stream,
               _use_new_zipfile_serialization=data.draw(st.booleans()))
    content = bytearray(stream.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(['change', 'cut', 'insert']))
        if kind == 'change':
            content[at] ^= data.draw(st.integers(1, 255))
        elif kind == 'cut':
            del content[at:at + data.draw(st.integers(1, len(content)))]
            content = content or bytearray(b'.')
        else:
            content[at:at] = data.draw(st.binary(min_size=1, max_size=8))
    path.write_bytes(content)
    model = Tiny()
    try:
        load_float(model, read_checkpoint(str(path)))
    except UserError as error:
        assert clear(error)


class Call:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize('new', [True, False])
@pytest.mark.parametrize('place', ['meta', 'state_dict', 'entry', 'key', 'whole'])
@pytest.mark.parametrize('function', ['exec', 'os.system', 'open', 'torch.load', 'torch.hub.load', 'builtins.getattr',
                                      'subprocess.check_call', 'numpy.load', 'mmengine.config.Config.fromfile'])
def test_code_never_runs_wherever_it_is(tmp_path, function, place, new):
    ran = tmp_path / 'ran'
    module, _, name = function.rpartition('.')
    owner = __import__(module or 'builtins', fromlist=['_']) if not module.startswith('mmengine') else None
    call = owner and getattr(owner, name)
    arguments = dict(exec=(f'open({str(ran)!r}, "w")', ), system=(f'touch {ran}', ), open=(str(ran), 'w'),
                     check_call=(['touch', str(ran)], ), getattr=(nn.Linear, 'forward')).get(name, (str(ran), ))
    if owner is None:
        from mmengine.config import Config
        (tmp_path / 'evil.py').write_text(f'open({str(ran)!r}, "w")')
        call, arguments = Config.fromfile, (str(tmp_path / 'evil.py'), )
    evil = Call(call, *arguments)
    content = dict(state_dict=dict(a=torch.ones(1)), meta={})
    if place == 'entry':
        content['state_dict']['b'] = evil
    elif place == 'key':
        content['state_dict'][Call(str, evil)] = torch.ones(1)
    elif place == 'whole':
        content = evil
    else:
        content[place] = evil
    path = tmp_path / 'c.pth'
    torch.save(content, path, _use_new_zipfile_serialization=new)
    for read in (lambda: read_checkpoint(str(path)), lambda: load_safely(path)):
        with pytest.raises(UserError):
            read()
    assert not ran.exists()


def test_protocol_and_persistent_ids_are_no_way_in(tmp_path):
    path = tmp_path / 'c.pth'
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps(dict(state_dict=Call(exec, f'open({str(tmp_path / "ran")!r}, "w")')), protocol))
        with pytest.raises(UserError, match='no readable checkpoint'):
            read_checkpoint(str(path))
    assert not (tmp_path / 'ran').exists()


def test_a_bomb_is_refused_by_its_size(tmp_path, monkeypatch):
    """100 MB of zeros in a zip of 100 kB, refused before anything is unpacked."""
    stored, bomb = tmp_path / 'stored.pth', tmp_path / 'bomb.pth'
    torch.save(dict(state_dict=dict(a=torch.zeros(25_000_000))), stored)
    with zipfile.ZipFile(stored) as source, zipfile.ZipFile(bomb, 'w', zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    assert bomb.stat().st_size < 1e6
    assert load_safely(stored)['state_dict']['a'].numel() == 25_000_000  # what torch stores is no bomb

    def unpack(*args, **kwargs):
        raise AssertionError('unpacked')

    monkeypatch.setattr(torch, 'load', unpack)
    with pytest.raises(UserError, match='bomb.pth has 0.1 MB and would unpack to 100.0 MB'):
        read_checkpoint(str(bomb))


def test_more_than_is_stored_cannot_be_claimed(tmp_path):
    """A tensor of a size that its storage lacks, and one of a terabyte that is a single number."""
    path = tmp_path / 'c.pth'
    torch.save(dict(state_dict={'backbone.0.weight': torch.zeros(1).expand(1 << 19, 1 << 19)}), path)
    assert path.stat().st_size < 1e5
    with pytest.raises(UserError, match='does not fit the model'):
        load_float(Tiny(), read_checkpoint(str(path)))
