"""A .safetensors file: arrays by module path, of any float type.

Token ids may be an array (arrays.py), or a JSON list under `tokens` of the metadata.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from refmoe.files import InputError
from refmoe.model.matrix import widen_bf16
from refmoe.oracle.readers.arrays import dump_of_arrays
from refmoe.oracle.readers.base import Dump, Reader, register
from refmoe.weights.checkpoint import DTYPES, read_header


def recognise(path: Path) -> bool:
    """Tell whether this is a .safetensors file."""
    return path.is_file() and path.suffix == ".safetensors"


def read(path: Path) -> Dump:
    """Read every array but those in 8-bit types, which mean nothing without their scales."""
    stored = read_header(path)
    arrays, unread = {}, {}
    with path.open("rb") as file:
        for name, t in stored.items():
            if t.dtype.startswith("F8"):
                unread[name] = f"{t.dtype} means nothing without its scales; dump it widened"
                continue
            file.seek(t.start)
            x = np.frombuffer(file.read(t.nbytes), DTYPES[t.dtype]).reshape(t.shape)
            arrays[name] = widen_bf16(x) if t.dtype == "BF16" else x
    return dump_of_arrays(path, arrays, _tokens(path), unread=unread)


def _tokens(path: Path) -> Any:
    """Return the token ids of the metadata, if there are any: a list, or one for each prompt."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        metadata: dict[str, Any] = json.loads(file.read(length)).get("__metadata__") or {}
    if "tokens" not in metadata:
        return None
    try:
        return json.loads(metadata["tokens"])
    except (ValueError, TypeError, RecursionError) as e:
        raise InputError(f"{path}: metadata `tokens` is no JSON list ({e})") from None


register(Reader("safetensors", ".safetensors", recognise, read))
