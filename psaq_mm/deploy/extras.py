"""Packages that only deployment needs."""
from __future__ import annotations

import importlib

from ..errors import UserError

OLDEST = dict(onnx='1.14', onnxruntime='1.17', openvino='2024.0',
              polygraphy='0.49', tensorrt='10.0')
"""For opset 17, QDQ with a scale for each channel, 8-bit transformers, and strongly typed networks."""


def need(package: str):
    """An optional package, imported.

    Raises:
        UserError: If it is missing or too old; names the command that installs it.
    """
    from packaging.version import Version
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        group = 'tensorrt' if package in ('polygraphy', 'tensorrt') else 'deploy'
        raise UserError(f"{package} is not installed ({error}): pip install 'psaq_mm[{group}]', or pip install "
                        f"'{package}>={OLDEST[package]}'") from None
    version = module.__version__.split('-')[0]
    if Version(version) < Version(OLDEST[package]):
        raise UserError(f"{package} {version} is too old: pip install '{package}>={OLDEST[package]}'")
    return module
