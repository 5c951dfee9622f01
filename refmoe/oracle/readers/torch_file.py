"""A .pt or .pth file: what torch.save wrote, read without torch. No code of the pickle runs.

What was saved is a dict of tensors, or dicts and lists of them. The file is a zip with
data.pkl and one file a storage (torch.save since 1.6; pytorch/pytorch, torch/serialization.py).
The pickle is interpreted by pickle's own machine, which can reach the names of `find_class` and
nothing else.
"""

import io
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from refmoe.files import InputError
from refmoe.model.matrix import widen_bf16
from refmoe.oracle.readers.arrays import dump_of_arrays, flatten
from refmoe.oracle.readers.base import Dump, Reader, register

PICKLE_LIMIT = 100_000_000  # bytes of data.pkl; tensors lie beside it
EXPANDED = 1024  # times its storage: a view may repeat it (one rotated key for 128 heads)
SMALL = 1 << 20  # numbers that any tensor may have

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


class ForeignError(InputError):
    """A whole file, whose pickle asks for something that is no plain data."""


def recognise(path: Path) -> bool:
    """Tell whether this is a .pt or .pth file."""
    return path.is_file() and path.suffix in (".pt", ".pth")


def read(path: Path) -> Dump:
    """Read every tensor of nested dicts and lists."""
    value = load_torch(path)
    if not isinstance(value, dict):
        raise InputError(f"{path}: a {type(value).__name__}, expected a dict of tensors")
    return dump_of_arrays(path, flatten(path, value))


@dataclass(frozen=True)
class _Storage:
    """The bytes that a tensor is a view of, and the name of their type."""

    kind: str
    data: bytes


def load_torch(path: Path) -> Any:
    """Return what was saved, tensors as arrays.

    Raises `ForeignError` if the pickle asks for anything but plain data, `InputError` for a file
    that is damaged or too large.
    """
    try:
        with zipfile.ZipFile(path) as file:
            top = next((n for n in file.namelist() if n.endswith("/data.pkl")), None)
            if top is None:
                raise InputError(f"{path}: a zip without data.pkl; torch.save did not write it")
            size = path.stat().st_size
            for member in file.infolist():  # torch does not compress: nothing swells
                if member.file_size > size:
                    raise InputError(
                        f"{path}: {member.filename} is said to have {member.file_size} bytes in a "
                        f"file of {size}; save it again with torch.save"
                    )
            if file.getinfo(top).file_size > PICKLE_LIMIT:
                raise InputError(
                    f"{path}: data.pkl of {file.getinfo(top).file_size} bytes, at most "
                    f"{PICKLE_LIMIT} are read; save tensors, not lists of numbers"
                )
            try:
                return _Tensors(file, top.removesuffix("data.pkl")).load()
            except _ForeignNameError as e:
                raise ForeignError(f"{path}: {e}; save tensors in dicts and lists") from None
    except InputError:
        raise
    except Exception as e:  # a pickle can be broken in any way
        raise InputError(f"{path}: not a file of tensors that can be read safely ({e!r})") from None


class _ForeignNameError(Exception):
    """The pickle asks for a name that `find_class` does not give."""


class _Tensors(pickle.Unpickler):
    """Pickle's own machine with few names in reach; its API asks for a subclass."""

    def __init__(self, file: zipfile.ZipFile, prefix: str):
        raw = file.read(prefix + "data.pkl")
        for op, arg, _ in pickletools.genops(raw):
            # the machine makes room for as many values as the largest place it is told of
            if op.name in ("PUT", "BINPUT", "LONG_BINPUT") and (arg or 0) > len(raw):
                raise ValueError(f"a memo of {arg} places in {len(raw)} bytes")
        super().__init__(io.BytesIO(raw))
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
        raise _ForeignNameError(f"its pickle asks for {module}.{name}, which is not read")

    def persistent_load(self, pid: Any) -> _Storage:
        _, kind, key, _, _ = pid
        return _Storage(kind, self._file.read(f"{self._prefix}data/{key}"))


def _tensor(storage: _Storage, offset: int, size: Any, stride: Any, *_: Any) -> np.ndarray:
    """Return the tensor that `torch._utils._rebuild_tensor_v2` would make, as an array."""
    flat = np.frombuffer(storage.data, _STORAGES[storage.kind])
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if min(offset, *size, *stride, 0) < 0 or (prod(size) and last >= flat.size):
        raise ValueError("a tensor reaches outside its storage")
    if prod(size) > max(SMALL, EXPANDED * flat.size):
        raise ValueError(f"a tensor of shape {list(size)} in a storage of {flat.size} numbers")
    steps = [s * flat.itemsize for s in stride]
    x = np.lib.stride_tricks.as_strided(flat[offset:], tuple(size), steps, writeable=False).copy()
    return widen_bf16(x) if storage.kind == "BFloat16Storage" else x


register(Reader("torch", ".pt", recognise, read))
