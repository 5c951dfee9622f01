"""Another engine's dump → arrays under its own names, and what else it says.

    .safetensors   by module path, any float type; metadata `tokens` if the engine put it there
    .npz           by module path, no pickles
    .pt, .pth      what torch.save wrote of tensors in dicts and lists, read without torch
    .txt, .log     llama.cpp's llama-eval-callback (llamacpp_text.py)
    .json          top-k log-probabilities, ours or as vLLM's server returns them
    a folder       SGLang's dumper (sglang_folder.py)

Module paths are those of the Hugging Face model; wrapper prefixes are taken off, and what an engine
fuses is split by adapters.py. What Hugging Face's forward and generate return is read under the
names of the points it is (huggingface.py). An array fits a point if it has its rows and its
numbers: a batch axis of one is dropped, heads may be flattened or stand before the rows, halves of
rotated channels are put back into pairs where the engine's conventions say so.
"""

import difflib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refmoe.engines import Conventions
from refmoe.files import InputError, read_json
from refmoe.model.matrix import widen_bf16
from refmoe.oracle.readers.huggingface import hugging_face
from refmoe.oracle.readers.llamacpp import read_llamacpp
from refmoe.oracle.readers.sglang import read_sglang
from refmoe.oracle.readers.torch_file import read_torch
from refmoe.weights.checkpoint import DTYPES, canonical, read_header

TOKENS = ("tokens", "input_ids", "sequences")
DEPTH, ENTRIES = 20, 1_000_000  # of dicts in dicts: a pickle may hold itself


@dataclass(frozen=True)
class Dump:
    path: Path
    arrays: dict[str, np.ndarray]
    tokens: list[int] | None
    rounded: str  # the narrowest type that holds every value: bfloat16, float16, float32, float64
    partial: frozenset[str] = frozenset()  # NaN where unknown: compared where known, never fed back
    step: float = 0.0  # half of the last decimal, where numbers were printed
    top: tuple[np.ndarray, np.ndarray] | None = None  # ids [T, K], -1: none; log-probabilities
    notes: tuple[str, ...] = ()  # what was not read, and why


def read_dump(path: str | Path) -> Dump:
    """Read a dump; `InputError` says what is wrong with the file."""
    path = Path(path)
    if path.is_dir():
        seen = read_sglang(path)
        return _dump(path, seen.arrays, seen.tokens, seen.notes, seen.partial)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    match path.suffix:
        case ".safetensors":
            return _dump(path, *_safetensors(path))
        case ".npz":
            return _dump(path, _npz(path))
        case ".pt" | ".pth":
            value = read_torch(path)
            if not isinstance(value, dict):
                raise InputError(f"{path}: a {type(value).__name__}, expected a dict of tensors")
            return _dump(path, _flat(path, value))
        case ".txt" | ".log":
            printed = read_llamacpp(path)
            partial = frozenset(n for n, x in printed.arrays.items() if np.isnan(x).any())
            own = printed.arrays, printed.tokens, "float32", partial, printed.step
            return Dump(path, *own, notes=printed.notes)
        case ".json":
            tokens, top = read_logprobs(path)
            return Dump(path, {}, tokens, "bfloat16", top=top)
        case other:
            raise InputError(
                f"{path}: {other or 'no'} suffix; supported: .safetensors, .npz, .pt, .txt, .json, "
                "or a folder of SGLang's dumper"
            )


def _dump(
    path: Path,
    arrays: dict[str, np.ndarray],
    tokens: Any = None,
    notes: tuple[str, ...] = (),
    partial: frozenset[str] = frozenset(),
) -> Dump:
    named = {canonical(name): x for name, x in arrays.items()}
    ids = {name: named.pop(name) for name in TOKENS if name in named}
    read = hugging_face(named, ids.pop("sequences", None))
    if read.sequence is not None:
        ids.setdefault("sequences", read.sequence)
    for name, value in ids.items():  # the last says most
        tokens = read_ids(f"{path}: {name}", value)
    if tokens is not None and not isinstance(tokens, list):
        tokens = read_ids(f"{path}: tokens", tokens)
    numbers = {n: x for n, x in read.arrays.items() if x.dtype.kind in "fiub"}
    others = tuple(f"{n}: {read.arrays[n].dtype}, no numbers" for n in read.arrays.keys() - numbers)
    partial |= read.partial
    rounded = _narrowest(numbers.values())
    notes += read.notes + others
    return Dump(path, numbers, tokens, rounded, partial & numbers.keys(), notes=notes)


def read_ids(where: str, value: Any) -> list[int]:
    """Token ids of one sequence, whatever axes of one stand before it."""
    x = value if isinstance(value, np.ndarray) else None
    if x is None and isinstance(value, list) and all(type(i) is int for i in value):
        x = np.array(value)  # of ids too large: objects, refused below
    if x is None or x.dtype.kind not in "iu" or not x.size:
        found = "no list of integers" if x is None else f"{x.dtype} {list(x.shape)}"
        raise InputError(f"{where} is {found}, expected the token ids of one sequence")
    if x.ndim and x.size != x.shape[-1]:
        raise InputError(f"{where} is {list(x.shape)}, several sequences; dump one at a time")
    ids: list[int] = x.reshape(-1).tolist()
    return ids


def _flat(path: Path, value: Any) -> dict[str, np.ndarray]:
    """Tensors of nested dicts and lists: a.b, a.0; what is no tensor is left out."""
    out: dict[str, np.ndarray] = {}
    left: list[tuple[str, Any, int]] = [("", value, 0)]
    for _ in range(ENTRIES):
        if not left:
            return out
        name, part, depth = left.pop()
        if isinstance(part, np.ndarray):
            out[name] = part
            continue
        if depth > DEPTH:
            raise InputError(f"{path}: dicts or lists nested {depth} deep, or in a circle")
        items: list[tuple[Any, Any]] = []
        if isinstance(part, dict):
            items = list(part.items())
        elif isinstance(part, list | tuple):
            if name in TOKENS and part and all(type(i) is int for i in part):
                out[name] = np.array(part)
                continue
            items = list(enumerate(part))
        at = f"{name}." if name else ""
        left += [(f"{at}{key}", x, depth + 1) for key, x in reversed(items)]
    raise InputError(f"{path}: more than {ENTRIES} entries; save tensors, not lists of numbers")


def fit(name: str, x: np.ndarray, shape: tuple[int, ...], sides: Conventions) -> np.ndarray | None:
    """The array as the point of this shape has it, or None where it cannot be that point."""
    heads_first = x.ndim == 4 and len(shape) == 3  # [1, H, T, ·], whatever T and H are
    while x.ndim > len(shape) and x.shape[0] == 1:
        x = x[0]
    while x.ndim > 2 and x.ndim == len(shape) and x.shape[0] == 1 != shape[0]:
        x = x[0]  # heads flattened behind a batch axis
    if len(shape) == 3 and x.shape == (shape[1], shape[0], shape[2]):
        x = x.transpose(1, 0, 2) if heads_first or x.shape != shape else x
    if x.size != np.prod(shape) or not x.ndim or not x.size or x.shape[0] != shape[0]:
        return None
    x = x.reshape(shape)
    if sides.rope_layout == "halves" and name.endswith(("#q_pe", "#k_pe")):
        x = np.stack(np.split(x, 2, axis=-1), axis=-1).reshape(shape)
    return x


def read_logprobs(path: Path) -> tuple[list[int] | None, tuple[np.ndarray, np.ndarray]]:
    """Tokens, and for each position ids [T, K] (-1: none) and log-probabilities of what follows.

    Ours: {"tokens": [...], "top_logprobs": [{"id": logprob, ...} or null, ...]}, entry t after
    token t. vLLM's: {"prompt_token_ids": [...], "prompt_logprobs": [null, {"id": {"logprob": x,
    ...}, ...}, ...]}, alone or in `choices`, entry t of token t itself (vllm-project/vllm,
    entrypoints/openai/protocol.py).
    """
    value = read_json(path)
    value = value if isinstance(value, dict) else {}
    inside = value.get("choices") or [{}]
    if isinstance(inside, list) and isinstance(inside[0], dict):
        value = {**inside[0], **{k: v for k, v in value.items() if v is not None}}
    tokens = value.get("tokens") or value.get("prompt_token_ids")
    rows = value.get("top_logprobs")
    if rows is None and isinstance(own := value.get("prompt_logprobs"), list):
        rows = [*own[1:], None]  # what is said of token t is the distribution after token t - 1
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path}: neither top_logprobs nor prompt_logprobs is a list in it")
    tokens = None if tokens is None else read_ids(f"{path}: tokens", tokens)
    if tokens is not None and len(tokens) != len(rows):
        raise InputError(
            f"{path}: log-probabilities of {len(rows)} positions, and other tokens ({len(tokens)})"
        )
    found = [_logprobs(f"{path}: position {t}", row) for t, row in enumerate(rows)]
    width = max(map(len, found))
    ids, values = np.full((len(rows), width), -1), np.full((len(rows), width), np.nan)
    for t, row in enumerate(found):
        ids[t, : len(row)], values[t, : len(row)] = list(row), list(row.values())
    if not width or (np.nan_to_num(values) == 0).all():
        raise InputError(f"{path}: every log-probability is 0 or missing; the server gave none")
    return tokens, (ids, values)


def _logprobs(where: str, row: Any) -> dict[int, float]:
    if row is None:
        return {}
    try:
        pairs = {int(i): float(x["logprob"] if isinstance(x, dict) else x) for i, x in row.items()}
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError):
        raise InputError(f"{where} is no object of token ids and log-probabilities") from None
    for i, x in pairs.items():
        if not 0 <= i < 2**31 or not -9000 < x < 1e-3:
            hint = " (-9999 stands for none)" if x <= -9000 else ""
            raise InputError(
                f"{where}: token {i} has log-probability {x}, expected one below 0{hint}"
            )
    if len(pairs) != len(row):
        raise InputError(f"{where}: the same token twice; the keys must be ids, not texts")
    total = math.fsum(map(math.exp, pairs.values()))
    if total > 1.1:  # some servers print few digits
        raise InputError(f"{where}: the probabilities add up to {total:.3g}; are they logarithms?")
    return pairs


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The most similar name, for a message about one that matches nothing."""
    found = difflib.get_close_matches(name, list(names), 1, 0.6)
    return found[0] if found else None


def _safetensors(path: Path) -> tuple[dict[str, np.ndarray], Any, tuple[str, ...]]:
    stored = read_header(path)
    arrays, notes = {}, []
    with path.open("rb") as file:
        for name, t in stored.items():
            if t.dtype.startswith("F8"):
                notes.append(f"{name}: {t.dtype} means nothing without its scales; dump it widened")
                continue
            file.seek(t.start)
            x = np.frombuffer(file.read(t.nbytes), DTYPES[t.dtype]).reshape(t.shape)
            arrays[name] = widen_bf16(x) if t.dtype == "BF16" else x
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        metadata = json.loads(file.read(length)).get("__metadata__") or {}
    try:
        tokens = json.loads(metadata["tokens"]) if "tokens" in metadata else None
    except (ValueError, TypeError, RecursionError) as e:
        raise InputError(f"{path}: metadata `tokens` is no JSON list ({e})") from None
    tokens = None if tokens is None else read_ids(f"{path}: metadata `tokens`", tokens)
    return arrays, tokens, tuple(notes)


def _npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
            if others := [name for name, x in arrays.items() if not isinstance(x, np.ndarray)]:
                raise ValueError(f"{others[0]} is no array")
            return arrays
    except Exception as e:  # a header of an array is a text that numpy parses
        raise InputError(f"{path}: not an .npz of plain arrays ({e})") from None


def _narrowest(arrays: Iterable[np.ndarray]) -> str:
    """The type that the values are rounded to, whatever they are stored in.

    Judged on whole tensors: some (router logits) are wide in every engine, so most must be narrow.
    """
    votes = {"bfloat16": 0, "float16": 0, "float32": 0, "float64": 0}
    for x in arrays:
        if x.dtype.kind != "f" or not x.size:
            continue
        some = x.reshape(-1)
        some = some[~np.isnan(some)][:4096]
        if not some.size:
            continue
        if x.dtype == np.float16:
            votes["float16"] += 1
        elif (some.astype(np.float32) != some).any():
            votes["float64"] += 1
        elif not (some.astype(np.float32).view(np.uint32) & 0xFFFF).any():
            votes["bfloat16"] += 1
        elif (some.astype(np.float32).astype(np.float16) == some).all():
            votes["float16"] += 1
        else:
            votes["float32"] += 1
    return max(votes, key=lambda name: votes[name])
