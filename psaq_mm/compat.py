"""Lets torch's safe unpickler read the checkpoints that mmengine writes.

Since torch 2.6 ``torch.load`` refuses everything but plain data unless it is allow-listed; mmengine 0.10 pickles its
``HistoryBuffer`` (log history) and NumPy values into every checkpoint. The types below are data containers; none of
them runs code from the file. ``weights_only`` stays on.
"""
import numpy as np
import torch

try:
    from numpy._core.multiarray import _reconstruct, scalar
except ImportError:  # NumPy before 1.26
    from numpy.core.multiarray import _reconstruct, scalar


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
