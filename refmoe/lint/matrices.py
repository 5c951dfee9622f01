"""Find the matrices of a checkpoint under one name each, whatever they are stored in."""

import re
from functools import cache
from typing import Any

import numpy as np

from refmoe.config import Quantization
from refmoe.files import InputError
from refmoe.model.formats.base import StoredFormat, TensorSpec
from refmoe.model.formats.bf16 import BF16
from refmoe.model.formats.registry import (
    Announced,
    announced_formats,
    formats_by_part,
    safetensors_formats,
)
from refmoe.model.matrix import Matrix, dequantize
from refmoe.weights.checkpoint import Checkpoint
from refmoe.weights.gguf import Gguf

KV_HALVES = (".k_b_proj.weight", ".v_b_proj.weight")  # kv_b_proj, as a GGUF has it


def label_of(checkpoint: Checkpoint, name: str) -> str:
    """Return the name that the file has for a tensor.

    The experts of a GGUF lie in one tensor, so its tensors keep the names of a checkpoint.
    """
    return name if isinstance(checkpoint, Gguf) else checkpoint.tensors[name].name


def keys_of(checkpoint: Checkpoint) -> list[str]:
    """Return one key for each weight: `module.weight` for matrices, else the tensor's name.

    Parts of one matrix (codes, scales, shape; the halves of kv_b_proj) have one key.
    """
    parts, out = formats_by_part(checkpoint.cfg.quantization), dict[str, None]()
    for name in checkpoint.tensors:
        if isinstance(checkpoint, Gguf) and name.endswith(KV_HALVES):
            out[re.sub(r"[kv]_b_proj\.weight$", "kv_b_proj.weight", name)] = None
            continue
        module, _, part = name.rpartition(".")
        own = part.startswith("weight_") or "." + part in parts
        out[f"{module}.weight" if own else name] = None
    return list(out)


def parts_of(checkpoint: Checkpoint, key: str) -> list[str]:
    """Return the names of the tensors that hold the weight of a key; none if it is not there."""
    module = key.removesuffix(".weight")
    names = [key, *(module + mark for mark in _marks()), key + "_scale"]
    if isinstance(checkpoint, Gguf) and key.endswith(".kv_b_proj.weight"):
        names += [key.replace(".kv_b_proj.weight", half) for half in KV_HALVES]
    return [name for name in names if name in checkpoint.tensors]


def matrix_of(checkpoint: Checkpoint, key: str) -> Matrix:
    """Return the weight of a key as stored; integers, and FP8 without a scale, as their bits.

    Raises KeyError if a part is missing.
    """
    tensors, array = checkpoint.tensors, checkpoint.array
    if isinstance(checkpoint, Gguf):
        module = key.removesuffix(".weight")
        return (
            checkpoint.matrix(module) if module != key else _plain(array(key), tensors[key].dtype)
        )
    module = key.removesuffix(".weight")
    for f, scheme in _schemes(checkpoint.cfg.quantization) if module != key else ():
        if module + f.mark not in tensors:
            continue
        if ".weight" in f.parts:
            codes = tensors[key]
            if len(codes.shape) != 2 or codes.dtype not in _dtypes(f, scheme, codes.shape):
                continue
        opened: Matrix = f.matrix.open(lambda suffix: array(module + suffix), scheme)
        return opened
    return _plain(array(key), tensors[key].dtype)


def _dtypes(form: StoredFormat, scheme: Any, shape: tuple[int, ...]) -> tuple[str, ...]:
    """Return the dtypes that `.weight` may have in a format; none at a shape it cannot have."""
    try:
        tensors: dict[str, TensorSpec] = form.matrix.tensors(*shape, scheme)
    except InputError:
        return ()
    return tensors[".weight"][1]


def _schemes(quantization: Quantization | None) -> list[Announced]:
    """Return every safetensors format, those that the config announces first.

    The others have their usual settings: a dump of loaded weights may have no config that states
    them.
    """
    announced = announced_formats(quantization)
    known = {a.format.name for a in announced}
    others = (f for f in safetensors_formats().values() if f.name not in known)
    return [*announced, *(Announced(f, f.scheme()) for f in others if f.scheme is not None)]


@cache
def _marks() -> tuple[str, ...]:
    """Return the suffixes by which modules in a safetensors format are known."""
    return tuple(f.mark for f in safetensors_formats().values())


def _plain(x: np.ndarray, dtype: str) -> Matrix:
    """Return an array as a matrix; tensors of a vision tower have more than two axes."""
    x = x.reshape(len(x), -1) if x.ndim > 2 else x
    return BF16(x) if dtype == "BF16" else x


def widen(m: Matrix) -> np.ndarray:
    """Return the values of a matrix in float64, where every stored format is exact."""
    return dequantize(m, np.float64)


def values_of(checkpoint: Checkpoint, key: str) -> np.ndarray:
    """Return the values of a weight in float64."""
    return widen(matrix_of(checkpoint, key))
