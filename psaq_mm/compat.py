"""What has to be set right between versions of other people's packages, before anything else is imported.

Checkpoints: since torch 2.6 ``torch.load`` refuses everything but plain data unless it is allow-listed; mmengine 0.10
pickles its ``HistoryBuffer`` (log history) and NumPy values into every checkpoint. The types below are data containers;
none of them runs code from the file. ``weights_only`` stays on.

Configs: mmengine's Runner prints the whole config, and fails with a SyntaxError where the config holds a
``pathlib.Path``, a class, an array. Such a config is printed by :mod:`psaq_mm.python_text` instead.

Versions: those of torch and OpenMMLab that psaq_mm works with, checked before anything of theirs fails in its own way.

torchvision: timm imports it, and mmengine's Runner does where it is installed. Its compiled part is built for one
torch; beside another one, such as a CPU-only torch, it cannot load and the import fails.
"""
import ctypes
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from .version import REQUIRES

try:
    from numpy._core.multiarray import _reconstruct, scalar
except ImportError:  # NumPy before 1.26
    from numpy.core.multiarray import _reconstruct, scalar


def check_versions(requires=None) -> None:
    """Compares what is installed with what psaq_mm works with; what is not installed its importer will miss.

    Args:
        requires (dict[str, str], optional): Versions by name of the distribution, as pip writes them.

    Raises:
        ImportError: Naming every package that is too old or too new, and the pip command that mends it.
    """
    from packaging.specifiers import SpecifierSet
    requires, wrong = REQUIRES if requires is None else requires, {}
    for name, versions in requires.items():
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if not SpecifierSet(versions).contains(installed, prereleases=True):
            wrong[name] = f'{name} {installed} is installed, psaq_mm works with {name}{versions}'
    if wrong:
        command = ' '.join(f"'{name}{requires[name]}'" for name in wrong)
        raise ImportError('; '.join(wrong.values()) + f'. Install: pip install {command}')


def _statistic(owner, name):
    """Stands in for ``getattr`` in checkpoints, where it only ever fetches HistoryBuffer's statistics by name."""
    from mmengine.logging import HistoryBuffer
    if owner is HistoryBuffer and name in ('min', 'max', 'current', 'mean'):
        return getattr(owner, name)
    raise ValueError(f'the checkpoint asks for attribute {name!r} of {owner!r}: refused')


def allow_mmengine_checkpoints() -> None:
    """Registers what mmengine's checkpoints contain with ``torch.serialization.add_safe_globals``."""
    from mmengine.logging import HistoryBuffer
    containers = [
        HistoryBuffer, np.ndarray, np.dtype, (_statistic, 'builtins.getattr'), (_statistic, '__builtin__.getattr')
    ]
    for home in ('numpy.core.multiarray', 'numpy._core.multiarray'):
        containers += [(_reconstruct, f'{home}._reconstruct'), (scalar, f'{home}.scalar')]
    kinds = {type(np.dtype(code)) for code in '?bBhHiIlLqQefdg'}
    torch.serialization.add_safe_globals(containers + sorted(kinds, key=repr))


# Numbers of glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> None:
    """Tells glibc's malloc to keep what a step frees for the next step, instead of returning it to the system.

    Otherwise every large tensor of every step is zeroed again page by page: up to a fifth of a student step on CPU
    (Swin-Tiny). Elsewhere than on glibc it does nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    if mallopt(M_MMAP_THRESHOLD, 1 << 30) or mallopt(M_MMAP_THRESHOLD, 1 << 25):  # some versions take no more
        mallopt(M_TRIM_THRESHOLD, -1)
        mallopt(M_TOP_PAD, 1 << 26)


_declared = []  # a Library takes its declarations back when it is collected

KEPT = 8  # configs whose text is kept


def complete_torchvision() -> None:
    """Declares the operators that ``import torchvision`` looks up, where its compiled part is missing or cannot load.

    They stay without an implementation: calling one still fails, importing does not.
    """
    if _declared or 'torchvision' in sys.modules or find_spec('torchvision') is None:
        return
    compiled = [*Path(find_spec('torchvision').origin).parent.glob('_C*')]
    try:
        torch.ops.load_library(str(compiled[0]))  # as torchvision itself does when it is imported
    except (IndexError, OSError):
        library = torch.library.Library('torchvision', 'DEF')
        library.define('nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
        library.define('qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
        _declared.append(library)


def complete_pretty_text() -> None:
    """Let ``Config.pretty_text`` print every value, and format a config once; what mmengine prints stays as it is.

    A run prints each of its configs three or four times, and formatting one takes a second. mmengine turns whatever
    happens while it formats a config into a SyntaxError, Ctrl-C included: that is undone.
    """
    from mmengine.config import Config
    original = Config.pretty_text.fget
    if original.__module__ == __name__:
        return

    formatted = {}  # by the text of the values; the newest few

    def pretty_text(self) -> str:
        from .python_text import statements
        try:
            plain = statements(self.to_dict())
        except Exception:  # of a value without a text, which mmengine prints all the same
            return original(self)
        if plain not in formatted:
            try:
                text = original(self)
            except (SyntaxError, ValueError) as error:  # of very long integers
                if isinstance(error.__context__, KeyboardInterrupt):
                    raise error.__context__ from None
                text = plain
            while len(formatted) >= KEPT:
                del formatted[next(iter(formatted))]
            formatted[plain] = text
        return formatted[plain]

    Config.pretty_text = property(pretty_text, doc=Config.pretty_text.__doc__)
