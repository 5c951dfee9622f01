"""All stored formats, found by looking into this folder: a format is one file.

Kernels for a format stand under its name in fast/kernels.py (`FORMATS`) and fast/gpu/kernels.py.
"""

import pkgutil
from functools import cache, lru_cache
from importlib import import_module
from typing import Any, NamedTuple

from refmoe.config import Quantization
from refmoe.files import InputError
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


def safetensors_formats() -> dict[str, StoredFormat]:
    """Return the formats that a `quantization_config` can announce, by name."""
    return {f.name: f for f in all_formats() if f.scheme is not None}


class Announced(NamedTuple):
    """A format that a `quantization_config` announces, and the settings it states."""

    format: StoredFormat
    scheme: Any  # of the class `format.scheme`


@lru_cache
def announced_formats(quantization: Quantization | None) -> tuple[Announced, ...]:
    """Return the formats that a `quantization_config` announces; none if no format reads it.

    Raises `InputError`, with the field's name, if a format refuses the settings and no other reads
    them.
    """
    out: list[Announced] = []
    refused: InputError | None = None
    for form in safetensors_formats().values() if quantization is not None else ():
        assert quantization is not None
        assert form.scheme is not None
        try:
            scheme = form.scheme.parse(quantization.settings())
        except InputError as e:
            refused = refused or e
            continue
        if scheme is not None:
            out.append(Announced(form, scheme))
    if refused is not None and not out:
        raise refused
    return tuple(out)


def find_scheme(quantization: Quantization | None, name: str) -> Any:
    """Return the settings of the format of this name, or None if it is not announced.

    Raises `InputError` as `announced_formats` does.
    """
    return next((a.scheme for a in announced_formats(quantization) if a.format.name == name), None)


def unknown_method(quantization: Quantization | None) -> str | None:
    """Return the label of a quantisation that no format reads; None if one does, or there is none.

    Raises `InputError` as `announced_formats` does.
    """
    if quantization is None or announced_formats(quantization):
        return None
    return quantization.label


def supported_methods() -> str:
    """Return which quantisations can be read, as a list for messages."""
    schemes = (f.scheme for f in safetensors_formats().values())
    return f"{', '.join(sorted(s.announced_as for s in schemes if s is not None))}, and none"


@lru_cache
def formats_by_part(quantization: Quantization | None) -> dict[str, StoredFormat]:
    """Return which format has tensors with a suffix (`.weight_scale`, …).

    A format that the `quantization_config` announces comes before others that have the suffix too.
    """
    first = [a.format for a in announced_formats(quantization)]
    out: dict[str, StoredFormat] = {}
    for form in (*first, *safetensors_formats().values()):
        for part in form.parts:
            out.setdefault(part, form)
    return out
