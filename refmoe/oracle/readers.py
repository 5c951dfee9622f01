"""Another engine's dump → arrays under refmoe's names.

    .safetensors   by module path, any float type; metadata `tokens` if the engine put it there
    .npz           by module path, no pickles
    .pt, .pth      what torch.save wrote of a dict of tensors, read without torch: its pickle is
                   interpreted with five harmless names and nothing else, so no code of it runs

Module paths are those of the Hugging Face model; wrapper prefixes are taken off. An array fits a
point if it has its rows and its numbers: a batch axis of one is dropped, heads may be flattened or
stand before the rows, halves of rotated channels are put back into pairs where the engine's
conventions say so.
"""

import difflib
import io
import json
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refmoe.config import Conventions, InputError
from refmoe.model.matrix import widen_bf16
from refmoe.weights.checkpoint import DTYPES, canonical, read_header

PICKLE_LIMIT = 100_000_000  # bytes of data.pkl; tensors lie beside it


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
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    tokens: Any = None
    match path.suffix:
        case ".safetensors":
            arrays, tokens = _safetensors(path)
        case ".npz":
            arrays = _npz(path)
        case ".pt" | ".pth":
            arrays = _torch(path)
        case other:
            raise InputError(f"{path}: {other or 'no'} suffix; supported: .safetensors, .npz, .pt")
    arrays = {canonical(name): x for name, x in arrays.items()}
    for name in ("tokens", "input_ids"):
        if name in arrays:
            tokens = arrays.pop(name).reshape(-1).tolist()
    return Dump(path, arrays, tokens, _narrowest(arrays.values()))


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


_STORAGES: dict[str, Any] = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(np.uint16),  # the bits; widened below
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}


@dataclass(frozen=True)
class _Storage:
    kind: str
    data: bytes


def _torch(path: Path) -> dict[str, np.ndarray]:
    """A zip with data.pkl and one file a storage (torch.save since 1.6)."""
    try:
        with zipfile.ZipFile(path) as file:
            top = next(n for n in file.namelist() if n.endswith("/data.pkl"))
            if file.getinfo(top).file_size > PICKLE_LIMIT:
                raise InputError(f"{path}: data.pkl of {file.getinfo(top).file_size} bytes")
            value = _Tensors(file, top.removesuffix("data.pkl")).load()
    except InputError:
        raise
    except Exception as e:  # a pickle can be broken in any way
        raise InputError(f"{path}: not a file of tensors that can be read safely ({e!r})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: a {type(value).__name__}, expected a dict of tensors")
    return {str(name): x for name, x in value.items() if isinstance(x, np.ndarray)}


class _Tensors(pickle.Unpickler):
    """pickle's own machine, which can reach five names; the API asks for a subclass."""

    def __init__(self, file: zipfile.ZipFile, prefix: str):
        super().__init__(io.BytesIO(file.read(prefix + "data.pkl")))
        self._file, self._prefix = file, prefix

    def find_class(self, module: str, name: str) -> Any:
        match module, name:
            case "collections", "OrderedDict":
                return OrderedDict
            case "torch._utils", "_rebuild_tensor_v2":
                return _tensor
            case "torch._utils", "_rebuild_parameter":
                return lambda data, *_: data
            case "torch", "Size":
                return tuple
            case "torch", kind if kind in _STORAGES:
                return kind
        raise InputError(f"its pickle asks for {module}.{name}, which is not read")

    def persistent_load(self, pid: Any) -> _Storage:
        _, kind, key, _, _ = pid
        return _Storage(kind, self._file.read(f"{self._prefix}data/{key}"))


def _tensor(storage: _Storage, offset: int, size: Any, stride: Any, *_: Any) -> np.ndarray:
    flat = np.frombuffer(storage.data, _STORAGES[storage.kind])
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if min(offset, *size, *stride, 0) < 0 or (np.prod(size) and last >= flat.size):
        raise InputError("a tensor reaches outside its storage")
    steps = [s * flat.itemsize for s in stride]
    x = np.lib.stride_tricks.as_strided(flat[offset:], tuple(size), steps, writeable=False).copy()
    return widen_bf16(x) if storage.kind == "BFloat16Storage" else x


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
