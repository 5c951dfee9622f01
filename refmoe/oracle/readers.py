"""Another engine's dump → arrays under its own names, and what else it says.

    .safetensors   by module path, any float type; metadata `tokens` if the engine put it there
    .npz           by module path, no pickles
    .pt, .pth      what torch.save wrote of tensors in dicts and lists, read without torch
    .txt, .log     llama.cpp's llama-eval-callback (llamacpp_text.py)
    .json          top-k log-probabilities, ours or as vLLM's server returns them
    a folder       SGLang's dumper (sglang_folder.py)

Module paths are those of the Hugging Face model; wrapper prefixes are taken off, and what an engine
fuses is split by adapters.py. Hugging Face's `hidden_states`, `logits` and `router_logits` are read
under the names of the points they are. An array fits a point if it has its rows and its numbers: a
batch axis of one is dropped, heads may be flattened or stand before the rows, halves of rotated
channels are put back into pairs where the engine's conventions say so.
"""

import difflib
import json
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from refmoe.config import Conventions, InputError, read_json
from refmoe.model.matrix import widen_bf16
from refmoe.oracle.llamacpp_text import read_llamacpp
from refmoe.oracle.sglang_folder import read_sglang
from refmoe.oracle.torch_file import read_torch
from refmoe.weights.checkpoint import DTYPES, canonical, read_header


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
        return _dump(path, seen.arrays, seen.tokens, notes=seen.notes)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    match path.suffix:
        case ".safetensors":
            return _dump(path, *_safetensors(path))
        case ".npz":
            return _dump(path, _npz(path), None)
        case ".pt" | ".pth":
            value = read_torch(path)
            if not isinstance(value, dict):
                raise InputError(f"{path}: a {type(value).__name__}, expected a dict of tensors")
            return _dump(path, dict(_flat("", value)), None)
        case ".txt" | ".log":
            printed = read_llamacpp(path)
            dump = _dump(path, printed.arrays, None, notes=printed.notes)
            partial = frozenset(n for n, x in dump.arrays.items() if np.isnan(x).any())
            return replace(dump, rounded="float32", partial=partial, step=printed.step)
        case ".json":
            tokens, top = read_logprobs(path)
            return Dump(path, {}, tokens, "bfloat16", top=top)
        case other:
            raise InputError(
                f"{path}: {other or 'no'} suffix; supported: .safetensors, .npz, .pt, .txt, .json, "
                "or a folder of SGLang's dumper"
            )


def _dump(
    path: Path, arrays: dict[str, np.ndarray], tokens: Any, notes: tuple[str, ...] = ()
) -> Dump:
    arrays = {canonical(name): x for name, x in hugging_face(arrays).items()}
    for name in ("tokens", "input_ids", "sequences"):
        if name in arrays:
            tokens = arrays.pop(name).reshape(-1).tolist()
    return Dump(path, arrays, tokens, _narrowest(arrays.values()), notes=notes)


def _flat(name: str, value: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors of nested dicts and lists: a.b, a.0; what is no tensor is left out."""
    if isinstance(value, np.ndarray):
        yield name, value
        return
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    for key, part in items:
        yield from _flat(f"{name}.{key}" if name else str(key), part)


def hugging_face(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs of a forward pass with `output_hidden_states` and `output_router_logits`.

    hidden_states has one more entry than there are layers: the embedding first; the last is what
    the final norm made of the last layer (transformers, `capture_outputs`). The routers are those
    of the last layers.
    """
    out, layers, routers = {}, _entries(arrays, "hidden_states"), _entries(arrays, "router_logits")
    for i in range(layers):
        x = arrays[f"hidden_states.{i}"]
        name = "model.embed_tokens" if i == 0 else f"model.layers.{i - 1}"
        out["model.norm" if i == layers - 1 else name] = x
    for i in range(routers):
        layer = max(layers - 1, routers) - routers + i
        out[f"model.layers.{layer}.mlp.gate"] = arrays[f"router_logits.{i}"]
    taken = [f"hidden_states.{i}" for i in range(layers)]
    taken += [f"router_logits.{i}" for i in range(routers)]
    for name, x in arrays.items():
        if name not in taken:
            out.setdefault("lm_head" if name == "logits" else name, x)
    return out


def _entries(arrays: dict[str, np.ndarray], name: str) -> int:
    count = 0
    while f"{name}.{count}" in arrays:
        count += 1
    return count


def fit(name: str, x: np.ndarray, shape: tuple[int, ...], sides: Conventions) -> np.ndarray | None:
    """The array as the point of this shape has it, or None where it cannot be that point."""
    heads_first = x.ndim == 4 and len(shape) == 3  # [1, H, T, ·], whatever T and H are
    while x.ndim > len(shape) and x.shape[0] == 1:
        x = x[0]
    while x.ndim > 2 and x.ndim == len(shape) and x.shape[0] == 1 != shape[0]:
        x = x[0]  # heads flattened behind a batch axis
    if len(shape) == 3 and x.shape == (shape[1], shape[0], shape[2]):
        x = x.transpose(1, 0, 2) if heads_first or x.shape != shape else x
    if x.size != np.prod(shape) or not x.size or x.shape[0] != shape[0]:
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
    if tokens is not None and (not isinstance(tokens, list) or len(tokens) != len(rows)):
        raise InputError(f"{path}: log-probabilities of {len(rows)} positions, and other tokens")
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
    except (TypeError, ValueError, KeyError, AttributeError):
        raise InputError(f"{where} is no object of token ids and log-probabilities") from None
    for i, x in pairs.items():
        if i < 0 or not -9000 < x < 1e-3:
            raise InputError(f"{where}: token {i} has log-probability {x}, expected one below 0")
    return pairs


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The most similar name, for a message about one that matches nothing."""
    found = difflib.get_close_matches(name, list(names), 1, 0.6)
    return found[0] if found else None


def _safetensors(path: Path) -> tuple[dict[str, np.ndarray], Any]:
    stored = read_header(path)
    raw = path.read_bytes()
    arrays = {}
    for name, t in stored.items():
        part = raw[t.start : t.start + t.nbytes]
        x = np.frombuffer(part, np.uint8).view(DTYPES[t.dtype]).reshape(t.shape)
        arrays[name] = widen_bf16(x) if t.dtype == "BF16" else x
    length = int.from_bytes(raw[:8], "little")
    metadata = json.loads(raw[8 : 8 + length]).get("__metadata__") or {}
    try:
        return arrays, json.loads(metadata["tokens"]) if "tokens" in metadata else None
    except (ValueError, TypeError) as e:
        raise InputError(f"{path}: metadata `tokens` is no JSON list ({e})") from None


def _npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (ValueError, OSError, zipfile.BadZipFile, EOFError) as e:
        raise InputError(f"{path}: not an .npz of plain arrays ({e})") from None


def _narrowest(arrays: Iterable[np.ndarray]) -> str:
    """The type that the values are rounded to, whatever they are stored in.

    Judged on whole tensors: some (router logits) are wide in every engine, so most must be narrow.
    """
    votes = {"bfloat16": 0, "float16": 0, "float32": 0, "float64": 0}
    for x in arrays:
        if x.dtype.kind != "f" or not x.size:
            continue
        some = np.ascontiguousarray(x.reshape(-1)[:4096])
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
