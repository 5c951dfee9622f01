"""All stored formats, found by looking into this folder: a format is one file.

Kernels for a format stand under its name in fast/kernels.py (`FORMATS`) and fast/gpu/kernels.py.
"""

import pkgutil
from functools import cache
from importlib import import_module
from typing import Any

from refmoe.model import formats
from refmoe.model.formats.base import GgufType, StoredFormat


@cache
def all_formats() -> tuple[StoredFormat, ...]:
    """Return what every file of this folder says about its format."""
    names = (info.name for info in pkgutil.iter_modules(formats.__path__))
    modules = (import_module(f"{formats.__name__}.{name}") for name in names if name != "registry")
    return tuple(module.FORMAT for module in modules if hasattr(module, "FORMAT"))


@cache
def gguf_formats() -> dict[str, StoredFormat]:
    """Return the formats that GGUF files have, by GGUF's name: Q8_0, …"""
    return {f.gguf.name: f for f in all_formats() if f.gguf is not None}


def gguf_types() -> list[GgufType]:
    """Return how GGUF files know these formats."""
    return [f.gguf for f in all_formats() if f.gguf is not None]


def format_for(scheme: Any) -> StoredFormat | None:
    """Return the format that a `quantization_config` chooses, if any."""
    known = (f for f in all_formats() if f.scheme is not None and isinstance(scheme, f.scheme))
    return next(known, None)
