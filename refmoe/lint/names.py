"""Check names, shapes and dtypes."""

import re

from refmoe.lint.base import _Findings
from refmoe.weights.checkpoint import (
    MISSING_LIMIT,
    Checkpoint,
    expected,
    known_extra,
)

# --- names, shapes, dtypes


def _names(checkpoint: Checkpoint, out: _Findings) -> list[str]:
    """The names that are there as the config has them; whatever else is there is a finding."""
    cfg, tensors = checkpoint.cfg, checkpoint.tensors
    unread, missing = dict.fromkeys(tensors), 0
    fit: list[str] = []
    for name, shape, dtypes in expected(cfg):
        stored = tensors.get(name)
        if stored is None:
            missing += 1
            out.add("error", "missing tensors", name, "missing")
            if missing > MISSING_LIMIT:
                out.add("error", "config", None, "config.json is another model's")
                break
            continue
        del unread[name]
        if stored.shape != shape:
            text = f"shape {list(stored.shape)}, config.json makes it {list(shape)}"
            text += ": transposed" if stored.shape == shape[::-1] else ""
            out.add("error", "shapes", stored.name, text)
        elif stored.dtype not in dtypes:
            text = f"dtype {stored.dtype}, expected {' or '.join(dtypes)}"
            out.add("error", "dtypes", stored.name, text)
        else:
            fit.append(name)
    extra = [name for name in unread if known_extra(name, cfg)]
    for name in unread:
        if not known_extra(name, cfg):
            out.add("warning", "unread tensors", tensors[name].name, "never read")
    if extra:
        text = f"{len(extra)} tensors beside the text model (vision, MTP, left-over tables)"
        out.add("note", "extra", None, text)
    apart = []
    for name in fit:
        weight = tensors.get(re.sub(r"_scale$", "_packed", name.removesuffix("_scale_inv")))
        if weight and name.endswith(("_scale", "_scale_inv")) and weight.file != tensors[name].file:
            apart.append(name)
    if apart:
        text = f"{len(apart)} scales are in another shard than their weight, first {apart[0]}"
        out.add("note", "apart", None, f"{text}; converters that go by shard miss them")
    return fit
