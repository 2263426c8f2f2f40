"""Config files: read into one ordinary form, checked, written so that reading gives the same again.

mmengine knows two kinds of config files: those with ``_base_`` and strings, and lazy ones in pure Python, whose types
are classes that are imported when they are used. After :func:`read_config` all code sees the first kind.
"""
from __future__ import annotations

import contextlib
import importlib.util
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Annotated, Literal

import mmengine.registry
from mmengine.config import Config, ConfigDict
from mmengine.config.lazy import LazyAttr, LazyObject
from mmengine.registry import MODELS, Registry
from mmengine.utils import get_object_from_string
from pydantic import Field, TypeAdapter, ValidationError

from ..errors import UserError
from ..files import write_atomically
from ..python_text import UnwritableError, difference, object_path, statements

TYPE_KEYS = ('type', 'float_type', 'runner_type')  # their values name what registries build
SCOPES = ('mmdet', 'mmseg')  # where a model without a scope is looked for
DICT = (dict, 'a dict')
LOADER = (dict, 'a dict, e.g. dict(batch_size=1, num_workers=2, dataset=dict(type=...))')
COUNT = Annotated[int, Field(ge=0)]
SEED = Annotated[int, Field(ge=0, lt=2**32)]
POSITIVE = Annotated[int, Field(gt=0)]
NAME = Annotated[str, Field(min_length=1)]
# What we and mmengine's Runner use of a config: kind and how to say it. None stands for a key that is not there.
KINDS = {
    'model': (dict, "a dict, e.g. dict(type='MaskRCNN', ...)"),
    'quantization': (dict, 'a dict, e.g. quantization = dict(weight=dict(bits=4))'),
    'load_from': (str | Path, 'the path or address of a checkpoint, a string'),
    'work_dir': (str | Path, 'the path of a folder, a string'),
    'resume': (bool, 'True or False'),
    'default_scope': (NAME, "the name of a library, e.g. 'mmdet'"),
    'runner_type': (NAME, "the name of a runner, e.g. 'psaq_mm.QuantizationRunner'"),
    'experiment_name': (str, 'a string'),
    'launcher': (Literal['none', 'pytorch', 'slurm', 'mpi'], "'none', 'pytorch', 'slurm' or 'mpi'"),
    'log_level': (str | int, "the name of a level, e.g. 'INFO'"),
    'log_processor': DICT,
    'randomness': (dict, 'a dict, e.g. dict(seed=0)'),
    'randomness.seed': (SEED, 'a whole number from 0 to 2**32 - 1'),
    'randomness.deterministic': (bool, 'True or False'),
    'randomness.diff_rank_seed': (bool, 'True or False'),
    'env_cfg': (dict, "a dict, e.g. dict(cudnn_benchmark=False, dist_cfg=dict(backend='nccl'))"),
    'env_cfg.mp_cfg': DICT,
    'env_cfg.dist_cfg': DICT,
    'env_cfg.cudnn_benchmark': (bool, 'True or False'),
    'env_cfg.resource_limit': (POSITIVE, 'a whole number above 0'),
    'default_hooks': (dict, "a dict of dicts, e.g. dict(logger=dict(type='LoggerHook', interval=50))"),
    'default_hooks.*': (dict, "a dict, e.g. dict(type='LoggerHook', interval=50)"),
    'default_hooks.logger.interval': (POSITIVE, 'a whole number above 0'),
    'default_hooks.checkpoint.interval': (int, 'a whole number'),
    'default_hooks.checkpoint.by_epoch': (bool, 'True or False'),
    'custom_hooks': (list | tuple, "a list of dicts, e.g. [dict(type='psaq_mm.QuantizationHook')]"),
    'custom_hooks.*': (dict, 'a dict with type'),
    'custom_imports': (dict, "a dict, e.g. dict(imports=['my_package.my_module'])"),
    'custom_imports.imports': (str | list[str] | tuple[str, ...], 'the name of a module, or a list of names'),
    'custom_imports.allow_failed_imports': (bool, 'True or False'),
    'visualizer': (dict, "a dict, e.g. dict(type='DetLocalVisualizer', vis_backends=[...])"),
    'visualizer.vis_backends': (list | tuple, "a list of dicts, e.g. [dict(type='LocalVisBackend')]"),
    'visualizer.vis_backends.*': (dict, 'a dict with type'),
    'metainfo': DICT,
    'test_cfg': DICT,
    'val_cfg': DICT,
    'tta_model': DICT,
    'tta_pipeline': (list | tuple, 'a list of transforms'),
}
for _split in ('test', 'val', 'calib'):
    KINDS |= {
        f'{_split}_dataloader': LOADER,
        f'{_split}_dataloader.batch_size': (POSITIVE, 'a whole number above 0'),
        f'{_split}_dataloader.num_workers': (COUNT, 'a whole number, at least 0'),
        f'{_split}_dataloader.sampler': (dict, "a dict, e.g. dict(type='DefaultSampler', shuffle=False)"),
        f'{_split}_dataloader.dataset': (dict, "a dict, e.g. dict(type='CocoDataset', ann_file=..., pipeline=[...])"),
        f'{_split}_dataloader.dataset.pipeline': (list | tuple, 'a list of transforms'),
        f'{_split}_evaluator': (dict | list | tuple, "a dict, e.g. dict(type='CocoMetric', ...), or a list of such"),
    }


def one_line(error: BaseException) -> str:
    """Return type and message of an error in one line, cut where it is very long."""
    text = ' '.join(str(error).split())
    return f'{type(error).__name__}: {text[:600]}{" ..." if len(text) > 600 else ""}'.removesuffix(': ')


def read_config(path: str | Path, options: dict | None = None) -> Config:
    """Read a config file of any kind into an ordinary config: no lazy object, a scope, modules imported.

    Args:
        path (str | Path): The file.
        options (dict, optional): Settings by dotted key that override those of the file.

    Raises:
        UserError: Where the file cannot be read, naming the key that is wrong, what it is and what it must be.
    """
    path = str(path)
    if Path(path).is_dir():
        raise UserError(f'the config {path} is a folder: name a config file in it')
    if not Path(path).is_file():
        hint = f": to take a config of a library, write a file with _base_ = '{path}'" if '::' in path else ''
        raise UserError(f'the config {path} does not exist{hint}')
    try:
        cfg = Config.fromfile(path, import_custom_modules=False)
    except Exception as error:  # mmengine raises all kinds of things, from SyntaxError to bare RuntimeError
        raise UserError(missing_zoo(error) or f'the config {path} cannot be read ({one_line(error)}{line_of(error)})'
                        ) from error
    if options:
        _merge(cfg, options)
    return plain_config(cfg)


def line_of(error: BaseException) -> str:
    """Return the line of a config file that raised an error, for a message, or nothing."""
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.name == '<module>' and frame.line]
    if not lines or isinstance(error, UserError) or Path(lines[-1].filename).suffix != '.py':
        return ''
    hint = ''
    if not str(error) and isinstance(error, RuntimeError):  # mmengine's lazy objects, when they are called
        hint = ': a config that imports packages is read without importing them; it can name what it imports, as in ' \
               'type=..., and not call it'
    return f", line {lines[-1].lineno} of {lines[-1].filename}: {lines[-1].line}{hint}"


def missing_zoo(error: Exception) -> str | None:
    """Return what to say of an installation without configs, if that is what an error is about, else None."""
    for package in ('mmdet', 'mmseg', 'mmpretrain'):
        if f'{package}/.mim' in str(error) and not folder_of(package, '.mim').is_dir():
            return zoo_message(package)
    return None


def folder_of(package: str, *parts: str) -> Path:
    """Return a folder inside an installed package, there or not."""
    spec = importlib.util.find_spec(package)
    return Path(spec.origin if spec and spec.origin else f'{package}/__init__.py').parent.joinpath(*parts)


def zoo_message(package: str) -> str:
    """Return what to say where an installed library comes without its configs."""
    name = dict(mmseg='mmsegmentation').get(package, package)
    return (f"{package}'s configs are not here: '{package}::...' is looked for in {folder_of(package, '.mim')}, which "
            f'this installation does not have (wheels of {name} have it, source trees have not). Install the wheel '
            f"(pip install {name}), or name the file in your source tree: _base_ = '/.../{name}/configs/...'")


def _merge(cfg: Config, options: dict) -> None:
    for key, value in options.items():
        try:
            cfg.merge_from_dict({key: value})
        except Exception as error:
            raise UserError(f'--cfg-options {key}={value}: must be KEY=VALUE with keys of the config '
                            f'({one_line(error)})') from error


def plain_config(cfg: Config) -> Config:
    """Return a config as :func:`read_config` does, of one that mmengine has read.

    Raises:
        UserError: Naming the key that is wrong.
    """
    name = cfg.filename or 'the config'
    content = _lazy_content(cfg)
    check_kinds(content)
    _import_modules(content)
    content = _resolved(content, (), name)
    content = {key: value for key, value in content.items() if not _left_by_import(value)}
    if not content.get('default_scope'):
        content['default_scope'] = _scope_of((content.get('model') or {}).get('type'))
    registered = _Names(content['default_scope'])
    content = _named(content, registered)
    if registered.modules:
        imports = content.get('custom_imports') or dict(imports=[], allow_failed_imports=False)
        content['custom_imports'] = dict(imports, imports=list(dict.fromkeys([*imports['imports'],
                                                                              *registered.modules])))
    return Config(content, cfg_text=cfg.text, filename=cfg.filename, env_variables=cfg.env_variables)


def _lazy_content(cfg: Config) -> dict:
    """Return a config as dicts, lists and tuples; lazy objects stay."""

    def copied(value):
        if isinstance(value, (ConfigDict, dict)) and type(value).__name__ in ('dict', 'ConfigDict', 'OrderedDict'):
            return {key: copied(item) for key, item in dict.items(value)}
        if isinstance(value, list):
            return [copied(item) for item in value]
        if isinstance(value, tuple):
            return tuple(copied(item) for item in value)
        return value

    imported = getattr(cfg, '_imported_names', set())
    return {key: copied(value) for key, value in dict.items(cfg._cfg_dict) if key not in imported}


def _left_by_import(value) -> bool:
    """Whether a value at the top of a config is only there because an import statement or a function left it."""
    return callable(value) or type(value).__name__ == 'module' or type(value).__module__ in ('typing', '__future__')


def _resolved(value, keys: tuple, name: str):
    """Replace lazy objects by what they stand for."""
    if isinstance(value, (LazyObject, LazyAttr)):
        try:
            return value.build()
        except Exception as error:  # of the user's module
            raise UserError(f"{name}: {dotted(keys)} = {value.module}.{value}: cannot be imported ({one_line(error)})"
                            f'{python_path(value.module, error)}') from error
    if type(value) is dict:
        return {key: _resolved(item, (*keys, key), name) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_resolved(item, (*keys, index), name) for index, item in enumerate(value))
    return value


def dotted(keys) -> str:
    """Return keys from the top of a config as --cfg-options takes them."""
    return '.'.join(map(str, keys)) or 'the config'


def python_path(module: str, error: BaseException) -> str:
    """Return a hint where a module is missing, else nothing."""
    package = module.partition('.')[0]
    absent = isinstance(error, ImportError) and importlib.util.find_spec(package) is None
    return f': PYTHONPATH must name the folder that holds {package}, e.g. PYTHONPATH=. before the command' * absent


def _import_modules(content: dict) -> None:
    """Import what ``custom_imports`` names, in place of mmengine; a single name becomes a list."""
    custom = content.get('custom_imports')
    if not custom:
        return
    names = custom.get('imports') or []
    names = [names] if isinstance(names, str) else list(names)
    content['custom_imports'] = dict(custom, imports=names)
    for name in names:
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:  # of the user's module
            if custom.get('allow_failed_imports') and isinstance(error, ImportError):
                warnings.warn(f'custom_imports: {name} failed to import and is ignored.', stacklevel=2)
                continue
            raise UserError(f'custom_imports.imports: {name!r} cannot be imported ({one_line(error)})'
                            f'{python_path(name, error)}') from error


def registries() -> list[Registry]:
    """Return all registries of mmengine, and those that libraries hung below them."""
    found = list({id(value): value for value in vars(mmengine.registry).values()
                  if isinstance(value, Registry)}.values())
    for registry in found:
        found += registry._children.values()
    return found


def _scope_of(kind) -> str:
    """Return the library that a model's type belongs to: that which has registered it, or a class it inherits from."""
    if isinstance(kind, str):
        scope, _, name = kind.rpartition('.')
        if scope and '.' not in scope:
            with contextlib.suppress(ImportError):
                importlib.import_module(f'{scope}.registry')
        if scope in MODELS._children:
            return scope
        kind = get_object_from_string(kind) if scope else name
        for scope in SCOPES if isinstance(kind, str) else ():
            try:
                importlib.import_module(f'{scope}.models')
            except ImportError:
                continue
            if kind in MODELS._children[scope]._module_dict:
                return scope
    for base in getattr(kind, '__mro__', ()):
        for registry in MODELS._children.values():
            if base in registry._module_dict.values():
                return registry.scope
        if base.__module__.partition('.')[0] in SCOPES:
            return base.__module__.partition('.')[0]
    return SCOPES[0]


class _Names:
    """Names by which registries find classes and functions again, seen from a scope.

    Args:
        scope (str): The default scope of the config.

    Attributes:
        modules (dict): Modules of the user's that register what is named, in order.
    """

    def __init__(self, scope: str):
        self.scope, self.modules = scope, {}
        self.all = registries()

    def __call__(self, value):
        """Return the registered name of a class or function; else a class's dotted path; else itself."""
        for registry in self.all:
            for key in sorted((key for key, item in registry._module_dict.items() if item is value),
                              key=lambda key: key != getattr(value, '__name__', None)):
                for name in (key, f'{registry.scope}.{key}'):
                    if self.finds(registry, name) is value:
                        self.remember(value, registry)
                        return name
        path = object_path(value)
        if isinstance(value, type) and path and get_object_from_string(path) is value:
            return path
        return value

    def finds(self, registry: Registry, name: str):
        """Return what a registry's family finds by a name in the scope."""
        root = registry._get_root_registry()
        start = root._search_child(self.scope) or root
        if '.' in name:
            scope, name = name.split('.', 1)
            start = root if scope == root.scope else root._children.get(scope)
            return None if start is None else start._module_dict.get(name)
        while start is not None:
            start.import_from_location()
            if name in start._module_dict:
                return start._module_dict[name]
            start = start.parent
        return None

    def remember(self, value, registry: Registry) -> None:
        """Note the module of something that no library imports by itself."""
        module = getattr(value, '__module__', None) or ''
        if module.partition('.')[0] not in ('mmengine', 'mmcv', 'torch', 'torchvision', registry.scope):
            self.modules[module] = None


def _named(value, names: _Names, key=None):
    """Replace classes and functions that stand where a type is named by their registered names."""
    if type(value) is dict:
        return {name: _named(item, names, name) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_named(item, names) for item in value)
    return names(value) if key in TYPE_KEYS and callable(value) else value


def check_kinds(content: dict) -> None:
    """Check what kind of value each key has that we or mmengine's Runner use.

    Args:
        content (dict): A config; lazy objects in it may be anything.

    Raises:
        UserError: Naming each wrong key, its value and what it must be.
    """
    wrong = {}
    for pattern, (kind, words) in KINDS.items():
        for key, value in _at(content, pattern.split('.')):
            inside = tuple(f'{known}.' for known in wrong)
            if value is None or isinstance(value, (LazyObject, LazyAttr)) or key.startswith(inside):
                continue
            try:
                TypeAdapter(kind).validate_python(value, strict=True)
            except ValidationError:
                wrong[key] = f'{key} = {_shown(value)}: must be {words}'
    if wrong:
        raise UserError('\n'.join(wrong.values()))


def _at(value, parts: list[str], path: str = ''):
    """Yield path and value of all places that a pattern of keys leads to."""
    if not parts:
        yield path, value
        return
    first, *rest = parts
    if first == '*' and isinstance(value, (list, tuple)):
        pairs = enumerate(value)
    elif isinstance(value, dict):
        pairs = value.items() if first == '*' else [(first, value[first])] if first in value else []
    else:
        return
    for key, item in pairs:
        yield from _at(item, rest, f'{path}.{key}' if path else str(key))


def _shown(value) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f'{text[:76]} ...'


def config_text(cfg: Config) -> str:
    """Return the text of a config file that gives a config again, and make sure that it does.

    Raises:
        UserError: Naming the key whose value cannot be written, or does not come back.
    """
    try:
        text = statements(cfg._cfg_dict)
    except UnwritableError as error:
        raise UserError(f'{dotted(error.keys)}: cannot be written to a config file, since it {error.reason}') from error
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'config.py'
        path.write_text(text, encoding='utf-8')
        try:
            again = Config.fromfile(path, import_custom_modules=False)
        except Exception as error:
            raise UserError(f'the config cannot be written so that it can be read again ({one_line(error)})') from error
    keys = difference(cfg._cfg_dict, again._cfg_dict)
    if keys is not None:
        raise UserError(f'{dotted(keys)}: its value does not come back from a config file. Use strings, numbers, lists '
                        'and dicts, or what can be imported from a module')
    return text


def write_config(cfg: Config, path: str | Path) -> None:
    """Write a config that mmengine's ``Config.fromfile`` reads again: UTF-8, whole or not at all.

    Raises:
        UserError: As :func:`config_text`.
        OSError: Where it cannot be written.
    """
    write_atomically(config_text(cfg).encode(), Path(path))

