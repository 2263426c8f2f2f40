"""Packages that only deployment needs."""
from __future__ import annotations

import importlib

from ..errors import UserError

OLDEST = dict(onnx='1.14', onnxruntime='1.17', openvino='2024.0')  # opset 17, per-channel QDQ and 8-bit transformers


def need(package: str):
    """An optional package, imported.

    Raises:
        UserError: If it is missing or too old; names the command that installs it.
    """
    from packaging.version import Version
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"{package} is not installed ({error}): pip install 'psaq_mm[deploy]', or pip install "
                        f"'{package}>={OLDEST[package]}'") from None
    version = module.__version__.split('-')[0]
    if Version(version) < Version(OLDEST[package]):
        raise UserError(f"{package} {version} is too old: pip install '{package}>={OLDEST[package]}'")
    return module
