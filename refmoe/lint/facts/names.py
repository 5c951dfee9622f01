"""Hold the names, shapes and dtypes of a checkpoint against what its config calls for."""

import re
from dataclasses import dataclass, field
from typing import ClassVar

from refmoe.files import InputError
from refmoe.lint.base import Place
from refmoe.weights.checkpoint import MISSING_LIMIT, Checkpoint, TensorEntry, expected, known_extra
from refmoe.weights.gguf import Gguf


@dataclass
class Names:
    """Tensors that are there, are not, or do not fit."""

    places: ClassVar[tuple[Place, ...]] = ("folder", "gguf")
    source: str  # what calls for tensors: config.json, or the metadata of a GGUF
    fit: list[str] = field(default_factory=list)  # of the name, shape and dtype called for
    missing: list[str] = field(default_factory=list)
    gave_up: bool = False  # more are missing than any member of the family has
    wrong_shape: list[tuple[TensorEntry, tuple[int, ...]]] = field(
        default_factory=list
    )  # and expected
    wrong_dtype: list[tuple[TensorEntry, tuple[str, ...]]] = field(
        default_factory=list
    )  # and expected
    unread: list[str] = field(default_factory=list)  # in no place of the network
    extra: list[str] = field(default_factory=list)  # published beside the text model
    apart: list[str] = field(default_factory=list)  # scales in another shard than their weight
    impossible: str | None = None  # why no tensor can have the sizes; names from there on are open


def compare_names(checkpoint: Checkpoint) -> Names:
    """Return how the tensors of a folder fit its config."""
    out = Names("config.json")
    try:
        _compare(checkpoint, out)
    except InputError as e:
        out.impossible = str(e)
    return out


def _compare(checkpoint: Checkpoint, out: Names) -> None:
    """Fill `out`. Raises `InputError` at sizes that no tensor can have."""
    cfg, tensors = checkpoint.cfg, checkpoint.tensors
    unread = dict.fromkeys(tensors)
    for name, shape, dtypes in expected(cfg):
        stored = tensors.get(name)
        if stored is None:
            out.missing.append(name)
            if len(out.missing) > MISSING_LIMIT:
                out.gave_up = True
                break
            continue
        del unread[name]
        if stored.shape != shape:
            out.wrong_shape.append((stored, shape))
        elif stored.dtype not in dtypes:
            out.wrong_dtype.append((stored, dtypes))
        else:
            out.fit.append(name)
    out.extra = [name for name in unread if known_extra(name, cfg)]
    out.unread = [tensors[name].name for name in unread if not known_extra(name, cfg)]
    for name in out.fit:
        weight = tensors.get(re.sub(r"_scale$", "_packed", name.removesuffix("_scale_inv")))
        if weight and name.endswith(("_scale", "_scale_inv")) and weight.file != tensors[name].file:
            out.apart.append(name)


def names_of_gguf(checkpoint: Gguf) -> Names:
    """Return how the tensors of a GGUF fit its metadata, as was found when it was opened.

    A wrong shape keeps a GGUF from being opened at all, and any dtype is allowed.
    """
    missing, unread = list(checkpoint.missing), list(checkpoint.unread)
    return Names("the metadata", list(checkpoint.tensors), missing, unread=unread)
