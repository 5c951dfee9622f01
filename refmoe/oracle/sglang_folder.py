"""SGLang's dumper (sgl-project/sglang, python/sglang/srt/debug_utils/dumper.py).

A folder with a file for each tensor, named by its tags:

    step=0___rank=0___dump_index=7___name=NAME___layer_id=3.pt    {"value": tensor, "meta": {...}}

NAME is `non_intrusive__` and a module path with `.output`, `.output.0`, `.output.1` or
`.inputs.0` (DUMPER_NON_INTRUSIVE_MODE=all), a field of the batch (`input_ids`), or what the user
called it, with `layer_id` beside it. Steps are forward passes: the rows of later ones follow those
of the first. Ranks that hold the same are one; what differs between ranks is not read.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refmoe.config import InputError
from refmoe.oracle.torch_file import read_torch

INPUTS = {  # a module's input that is a point
    "o_proj": "#context",
    "down_proj": ".act",
    "post_attention_layernorm": "#attn_residual",
}


class Folder(NamedTuple):
    arrays: dict[str, np.ndarray]
    tokens: list[int] | None
    notes: tuple[str, ...]


def read_sglang(folder: Path) -> Folder:
    """Every tensor of the folder. `InputError` where it has none, or one cannot be read."""
    files = sorted(folder.glob("*.pt"))
    if not files:
        raise InputError(f"{folder}: no .pt file in it; a dump of SGLang has one for each tensor")
    found: dict[str, dict[int, dict[int, np.ndarray]]] = {}  # name → step → rank
    notes = []
    for _, file in sorted((_index(f), f) for f in files):
        tags = _tags(file)
        value = read_torch(file)
        value = value.get("value") if isinstance(value, dict) else value
        if not isinstance(value, np.ndarray):
            notes.append(f"{file.name}: a {type(value).__name__}, no tensor")
            continue
        name = _point(tags)
        if name is not None:
            steps = found.setdefault(name, {}).setdefault(int(tags.get("step", 0)), {})
            steps.setdefault(int(tags.get("rank", 0)), value)
    arrays, steps_seen = {}, set()
    for name, by_step in found.items():
        rows = [by_step[step] for step in sorted(by_step)]
        if any(not _alike(ranks) for ranks in rows):
            notes.append(f"{name}: its ranks hold different parts; dump it where it is whole")
            continue
        parts = [next(iter(ranks.values())) for ranks in rows]
        steps_seen.add(len(parts))
        shapes = {x.shape[1:] for x in parts}
        arrays[name] = np.concatenate(parts) if len(shapes) == 1 and parts[0].ndim else parts[0]
    if max(steps_seen, default=0) > 1:
        notes.append(f"{max(steps_seen)} steps are read as one sequence")
    tokens = arrays.pop("input_ids", None)
    return Folder(arrays, None if tokens is None else tokens.ravel().tolist(), tuple(notes))


def _tags(file: Path) -> dict[str, Any]:
    return dict(part.partition("=")[::2] for part in file.stem.split("___"))


def _index(file: Path) -> int:
    number = _tags(file).get("dump_index", "")
    return int(number) if number.isdigit() else 0


def _point(tags: dict[str, Any]) -> str | None:
    """The engine's name for it, as adapters.py knows it; None for what is no result of a module."""
    name = tags.get("name", "")
    if not name.startswith("non_intrusive__"):
        inside = "layers." in name or not tags.get("layer_id")
        return name if inside else f"model.layers.{tags['layer_id']}.{name}"
    path = name.removeprefix("non_intrusive__")
    module, _, role = path.partition(".output")
    if module != path:
        ends = {"": "", ".0": "", ".1": "#residual" if module.endswith("norm") else None}
        end = ends.get(role)
        return None if end is None else module + end
    module, _, role = path.partition(".inputs.")
    last = module.rpartition(".")[2]
    if role == "0" and last in INPUTS and not module.endswith("residual"):
        return module.removesuffix("." + last) + INPUTS[last]
    return None


def _alike(ranks: dict[int, np.ndarray]) -> bool:
    first, *others = ranks.values()
    return all(x.shape == first.shape and np.array_equal(x, first) for x in others)
