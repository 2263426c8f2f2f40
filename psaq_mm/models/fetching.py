"""Building models without fetching anything that nobody asked for."""
from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.registry import MODELS

from ..errors import UserError

CHECKPOINT = re.compile('(^|_)(ckpt|checkpoint|weights)(_|$)', re.I)  # in a key that names a file of weights


def _names_a_file(init):
    """Whether an ``init_cfg`` is one that loads weights."""
    return isinstance(init, dict) and ('checkpoint' in init or init.get('type') == 'Pretrained')


def _fetches_by_default(kind, scope) -> bool:
    """Whether a class that a config names, or its name in a scope, has an argument ``pretrained`` that is not off by
    default.
    """
    if isinstance(kind, str):
        try:
            with MODELS.switch_scope_and_registry(scope) as registry:
                kind = registry.get(kind)
        except Exception:  # of a package that is not installed, say: building it will tell
            return False
    try:
        default = inspect.signature(kind).parameters['pretrained'].default
    except (KeyError, TypeError, ValueError):
        return False
    return default is not inspect.Parameter.empty and bool(default)


def _is_address(value):
    """Whether a value is an address, as of http or of one of mmengine's model zoos, and no file here."""
    return isinstance(value, str) and '://' in value and not value.startswith('file://')


def without_pretrained(model, scope: str | None = None):
    """A model config that fetches nothing: no ``init_cfg`` that names a checkpoint, no ``pretrained``, no other
    checkpoint by its address, such as that of a teacher (``teacher_ckpt``), which predictions have no use for.

    Classes that fetch unless they are told not to, as TIMMBackbone does, are told.

    Args:
        model (dict | list): Changed in place.
        scope (str, optional): Of the types in it. Default: the current one.
    """
    if isinstance(model, dict):
        scope = model.get('_scope_', scope)
        if 'type' in model and 'pretrained' not in model and _fetches_by_default(model['type'], scope):
            model['pretrained'] = False
        for key, value in model.items():
            if key == 'pretrained':
                model[key] = False if isinstance(value, bool) else None
            elif key == 'init_cfg' and isinstance(value, (list, tuple)):
                model[key] = [init for init in value if not _names_a_file(init)]
            elif key == 'init_cfg' and _names_a_file(value):
                model[key] = None
            elif isinstance(key, str) and CHECKPOINT.search(key) and _is_address(value):
                model[key] = None
            else:
                without_pretrained(value, scope)
    elif isinstance(model, (list, tuple)):
        for item in model:
            without_pretrained(item, scope)
    return model


@contextmanager
def nothing_fetched() -> Iterator[None]:
    """Within it, models are built without pretrained weights, whatever wrapper asks for them: the checkpoint brings
    theirs.

    timm's models are built without; torch's download of weights, which torchvision and mmengine use, is refused.

    Raises:
        UserError: Instead of a download.
    """
    thread = threading.get_ident()
    undo = []

    def replace(owner, name, function):
        original = getattr(owner, name, None)
        if original is None:
            return

        def replaced(*args, **kwargs):
            return (function if threading.get_ident() == thread else original)(*args, **kwargs)

        setattr(owner, name, replaced)
        undo.append((owner, name, original))

    def refuse(url, *unused, **named):
        raise UserError(f"building the model wants to download {url}. The checkpoint brings the weights: switch the "
                        'download off in the model config (pretrained=False, weights=None, or what the class calls it)')

    replace(torch.hub, 'download_url_to_file', refuse)
    try:
        from timm.models import _builder
    except ImportError:
        pass
    else:
        replace(_builder, 'load_pretrained', lambda *args, **kwargs: None)
    try:
        yield
    finally:
        for owner, name, original in reversed(undo):
            setattr(owner, name, original)
