"""The files of SGLang's two dumpers, and which tensor each holds.

    step=0___rank=0___dump_index=7___name=NAME___layer_id=3.pt    {"value": tensor, "meta": {...}}
    TP0_PP0_Rank0_pid77/Pass00003.pt                              {module path: its output, ...}

The first is the dumper's: NAME is `non_intrusive__` and a module path with `.output`, `.output.0`,
`.output.1` or `.inputs.0` (DUMPER_NON_INTRUSIVE_MODE=all), a field of the batch (`input_ids`,
`positions`), or what the user called it, with `layer_id` beside it.

The second is --debug-tensor-dump-output-folder's: a file for each forward pass, with what every
module that holds no other returned. What follows the last norm comes in the next pass' file.

Source: sgl-project/sglang, python/sglang/srt/debug_utils/dumper.py and tensor_dump_forward_hook.py.
"""

import os
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refmoe.files import InputError
from refmoe.oracle.readers.torch_file import load_torch

INPUTS = {"o_proj": "#context", "down_proj": ".act"}  # a module's input that is a point
FIRST = ("0", "x", "input", "input_", "hidden_states")
POSITIONS = {"positions": "positions", "position_ids": "positions"}
FIELDS = ("seq_lens", "req_pool_indices", "rids", "cu_seqlens_q", "cu_seqlens_kv", "qkv_format")
LOGITS = "next_token_logits"
CHOICES = ("#experts", "#weights")  # of a gate that returns them behind its logits
PASS = re.compile(r"Pass(\d{1,9})\.pt")
RANK = re.compile(r"TP\d+_PP\d+_Rank(\d{1,9})_pid\d+")


class Tensor(NamedTuple):
    """A tensor that has a file of its own, or the value that a file with many holds."""

    file: Path
    value: Any = None  # read already


Files = dict[str, dict[int, dict[int, Tensor]]]  # name → step → rank


def find_files(folder: Path) -> tuple[Files, list[str]]:
    """Return the tensors by name, step and rank, in the order of dumping, and notes.

    Raises `InputError` where no file is one of the dumpers'.
    """
    with os.scandir(folder) as scan:
        entries = sorted(scan, key=lambda e: e.name)
    if any(PASS.fullmatch(e.name) for e in entries):
        return _find_passes({0: folder})
    ranks = {int(m[1]): Path(e.path) for e in entries if (m := RANK.fullmatch(e.name))}
    if ranks:
        return _find_passes(ranks)
    return _find_tensors(folder, entries)


def _find_tensors(folder: Path, entries: list[os.DirEntry[str]]) -> tuple[Files, list[str]]:
    """Return the tensors that have a file each, by name, step and rank, and notes; open none."""
    listed, others = [], 0
    for entry in entries:
        tags = dict(part.partition("=")[::2] for part in entry.name[:-3].split("___"))
        if not entry.name.endswith(".pt") or "name" not in tags or not entry.is_file():
            others += 1
        elif tags.get("recompute_status") != "recompute":  # a second time, for the gradients
            order = [_number(entry.name, tags, key) for key in ("step", "dump_index", "rank")]
            listed.append((order, tags, Path(entry.path)))
    names = {tags["name"] for _, tags, _ in listed}
    if listed and names <= {*FIELDS, *POSITIONS, "input_ids"}:
        raise _only_fields(folder, names)
    if not listed:
        inside = sorted(e.name for e in entries if e.is_dir())[:3]
        hint = f"; give a folder inside it: {', '.join(inside)}" if inside else ""
        raise InputError(
            f"{folder}: no .pt file named like step=0___rank=0___dump_index=7___name=..., as "
            f"SGLang's dumper writes one for each tensor{hint}"
        )
    found: Files = {}
    fused, again = set(), Counter[str]()
    for (step, _, rank), tags, path in sorted(listed, key=lambda t: t[0]):
        if re.search(r"post_attention_layernorm\.inputs\.(1|residual)$", tags["name"]):
            fused.add(_layer(tags["name"]))
        name = _point(tags)
        if name is not None:
            ranks = found.setdefault(name, {}).setdefault(step, {})
            again[name] += rank in ranks
            ranks.setdefault(rank, Tensor(path))
    for layer in fused:  # it adds the residual itself: its input is not the sum
        found.pop(f"model.layers.{layer}#attn_residual", None)
    notes = [f"{others} entries are no .pt files of the dumper"] if others else []
    twice = {n: "called more than once in a step, the first is read" for n in again if again[n]}
    fields = ("input_ids", "positions")  # every layer is given them
    return found, notes + grouped({n: why for n, why in twice.items() if n not in fields})


def _find_passes(ranks: dict[int, Path]) -> tuple[Files, list[str]]:
    """Return the tensors that each forward pass has one file of, by name, step and rank."""
    found: Files = {}
    notes = []
    for rank, folder in sorted(ranks.items()):
        numbered = {int(m[1]): f for f in folder.iterdir() if (m := PASS.fullmatch(f.name))}
        for step, file in sorted(numbered.items()):
            saved = load_torch(file)
            if not isinstance(saved, dict):
                raise InputError(
                    f"{file}: a {type(saved).__name__}, expected a dict of module paths; was it "
                    "written by --debug-tensor-dump-output-folder?"
                )
            for key, value in saved.items():
                for end, x in _outputs(value):
                    name = _of_pass(str(key), end)
                    if name is None:
                        continue
                    # a pass is written when its last norm is done: logits are in the next file
                    at = step - (name == LOGITS)
                    found.setdefault(name, {}).setdefault(at, {}).setdefault(rank, Tensor(file, x))
        if not numbered:
            notes.append(f"{folder.name} has no file like Pass00000.pt")
    if not found:
        raise InputError(f"{next(iter(ranks.values()))}: no file like Pass00000.pt in it")
    return found, notes


def _outputs(value: Any) -> list[tuple[str, Any]]:
    """Return what a module returned, one by one, with the end of each one's name."""
    if isinstance(value, list | tuple):
        return [(f".output.{i}", x) for i, x in enumerate(value)]
    return [(".output", value)]


def _of_pass(key: str, end: str) -> str | None:
    """Return a tensor's name as adapt.py knows it, from the key and the place that it has."""
    field = key.partition(".forward_batch_info.")[2]
    if field:
        return field if field in ("input_ids", "positions") else None
    if key.rpartition(".")[2] in ("lm_head", "logits_processor"):
        return LOGITS
    return _point({"name": f"non_intrusive__{key}{end}"}) if "." in key else None


def _only_fields(folder: Path, names: set[str]) -> InputError:
    """Return the error of a dump in the dumper's default mode, which has no tensor of the model."""
    return InputError(
        f"{folder}: {', '.join(sorted(names))} and nothing else: the dumper's default mode, core, "
        "writes the fields of a batch and no module's output; set DUMPER_NON_INTRUSIVE_MODE=all "
        "and dump again"
    )


def _number(file: str, tags: dict[str, str], key: str) -> int:
    """Return the number that a tag of a file's name has."""
    text = tags.get(key, "0")
    if not text.isdecimal() or len(text) > 18:
        raise InputError(f"{file}: {key} is {text!r}, expected a number; was the file renamed?")
    return int(text)


def _layer(name: str) -> str | None:
    """Return the number of the layer in a module path."""
    found = re.search(r"(?:^|\.)layers\.(\d+)(?:\.|$)", name)
    return found[1] if found else None


def _point(tags: dict[str, str]) -> str | None:
    """Return a tensor's name as adapt.py knows it; None for what is no result of a module."""
    name = tags["name"]
    if name == "input_ids" or name in POSITIONS:
        return POSITIONS.get(name, name)  # also from within a layer
    if name in FIELDS or name.startswith(("param__", "grad__")):
        return None
    if not name.startswith("non_intrusive__"):
        name = name.removesuffix("__output").removesuffix(".output")
        bare = "layer_id" in tags and _layer(name) is None
        return f"model.layers.{tags['layer_id']}.{name}" if bare else name
    path = name.removeprefix("non_intrusive__")
    found = re.fullmatch(r"(?:(.*)\.)?(output|inputs)(?:\.(\w+))?", path)
    if found is None:
        return None
    module, role, key = found[1] or "", found[2], found[3]
    at, _, last = module.rpartition(".")
    if role == "inputs":
        if last == "post_attention_layernorm" and key in FIRST:
            return f"{at}#attn_residual"
        return at + INPUTS[last] if last in INPUTS and key in FIRST else None
    if key == LOGITS:
        return LOGITS
    if module.endswith(".experts.act_fn"):  # of one expert after another, nobody says which
        return None
    if last == "gate" and key in ("1", "2"):  # of transformers: logits, weights, experts
        return f"{module}{CHOICES[key == '1']}"
    if last == "topk":  # weights, ids, logits; the weights are scaled by some backends
        return f"{at}.gate#experts" if key == "1" else None
    if key is None:
        return module
    if key == "0" and not last.isdecimal():  # of a layer it is the mlp's part without the residual
        return module
    return f"{module}#residual" if key == "1" and last.endswith("norm") else None


def load(tensor: Tensor) -> tuple[Any, dict[str, Any]]:
    """Return the value of a tensor, lists of integers as arrays, and its meta.

    Raises `ForeignError` where it is no plain data, `InputError` for a damaged file.
    """
    saved = load_torch(tensor.file) if tensor.value is None else tensor.value
    if not isinstance(saved, dict) or "value" not in saved:
        return saved, {}
    value, meta = saved["value"], saved.get("meta")
    if isinstance(value, list | tuple) and value and all(type(x) is int for x in value):
        value = np.array(value)
    return value, meta if isinstance(meta, dict) else {}


def grouped(reasons: dict[str, str]) -> list[str]:
    """Return a line for each reason, which stands for all layers and experts that it is said of."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, why in reasons.items():
        groups.setdefault((re.sub(r"\.\d+(?=\W|$)", ".*", name), why), []).append(name)
    return [
        f"{names[0] if len(names) == 1 else f'{kind} ({len(names)} of them)'}: {why}"
        for (kind, why), names in groups.items()
    ]
