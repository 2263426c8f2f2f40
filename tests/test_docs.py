"""What the documentation promises: links, the stanza's reference, options, examples, the tour."""
import ast
import re

import pytest
from mmengine.config import Config

from psaq_mm.reference import reference
from psaq_mm.stanza import QuantizationConfig

from .conftest import ROOT, run_tool

PAGES = sorted([*ROOT.glob('*.md'), *(ROOT / 'docs').glob('*.md')])

COMMAND = r'(?:python|--nproc_per_node=\S+) ((?:tools|demo|benchmarks)/\w+\.py)([^\n`|#]*(?:\n {8,}[^\n`]*)?)'


def code_blocks(path):
    return re.findall(r'```(\w*)\n(.*?)```', path.read_text(), re.S)


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """mkdocs checks those within docs/ and their anchors; this, all files."""
    text = re.sub(r'```.*?```', '', page.read_text(), flags=re.S)
    for target in re.findall(r'\]\(([^)\s]+)\)', text):
        if not re.match(r'https?:|#|mailto:', target):
            assert (page.parent / target.partition('#')[0]).exists(), target


def test_the_reference_of_the_stanza_is_that_of_the_code():
    assert (ROOT / 'docs/stanza.md').read_text() == reference(), 'python -m psaq_mm.reference > docs/stanza.md'
    for name in QuantizationConfig.model_fields:
        assert f'`{name}`' in reference()


def commands():
    """Tools with the options that any page writes behind them."""
    found = {}
    for page in PAGES:
        text = page.read_text().replace('\\\n', ' ')
        for tool, rest in re.findall(COMMAND, text):
            options = set(re.findall(r'(?<![\w-])--[a-z][\w-]*', rest))
            found.setdefault(tool, {}).setdefault(page.name, set()).update(options)
    return found


@pytest.mark.parametrize('tool', commands())
def test_tools_know_the_options_that_are_written_behind_them(tool):
    assert (ROOT / tool).exists()
    wanted = {option: page for page, options in commands()[tool].items() for option in options}
    if not wanted:
        return
    shown = run_tool(tool, '--help').stdout
    if tool in ('benchmarks/deit_tiny.py', 'benchmarks/nuclei.py'):  # the rest goes to the grid
        shown += run_tool('tools/grid.py', '--help').stdout
    for option, page in wanted.items():
        assert re.search(rf'{option}\b', shown), f'{page}: {tool} {option}'


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_python_in_pages_is_python_and_stanzas_are_stanzas(page, tmp_path):
    for number, (language, code) in enumerate(code_blocks(page)):
        if language != 'python':
            continue
        ast.parse(code)
        if re.search(r'^quantization = ', code, re.M):
            path = tmp_path / f'stanza_{number}.py'  # the config's own settings, without what it inherits
            path.write_text(re.sub(r'^_base_ = .*$|^custom_imports = .*$', '', code, flags=re.M))
            stanza = Config.fromfile(path).quantization
            QuantizationConfig.parse(stanza.to_dict() if hasattr(stanza, 'to_dict') else dict(stanza))


@pytest.mark.slow
def test_the_tour():
    done = run_tool('demo/tour.py')
    before, after = map(float, re.search(r'entropy of the noise (\S+), of the images (\S+) nats', done.stdout).groups())
    assert after > before + 1
    worse, better = (float(text) for text in re.findall(r'cosine of features (\S+)', done.stdout))
    assert worse < better
    assert len(re.findall(r': \d+\.\d dB', done.stdout)) == 3


def test_rows_of_the_ablation_change_what_they_say(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'benchmarks'))
    import low_bit

    from psaq_mm.stanza import QuantizationConfig, flat

    def settings(changes):
        changes = {key: dict(value) if isinstance(value, dict) else value for key, value in changes.items()}
        for side in ('weight', 'activation'):
            changes[side] = dict(changes.get(side, {}), bits=4)
        return dict(flat(QuantizationConfig.parse(changes).to_dict()))

    rows = {label: settings(changes) for label, _, changes in low_bit.variants()}
    assert len(rows) == len({label: None for label, *_ in low_bit.variants()})

    def changed(label, base):
        return {key for key, value in rows[label].items() if value != rows[base][key]} - {'recipe'}

    paper, ours = 'paper, psaq_v1', 'low_bit without the game'
    everything = changed(ours, paper)
    parts = [changed(f'paper, psaq_v1, with {part} of ours', paper) for part in low_bit.PARTS]
    assert set().union(*parts, {'game.holdout', 'game.gain'}) == everything and all(parts)  # these count in a game
    for part, keys in zip(low_bit.PARTS, parts):
        assert changed(f'low_bit without the game and {part}', ours) == keys
    for part in low_bit.SMALLER:
        assert len(changed(f'low_bit without the game and {part}', ours)) == 1
