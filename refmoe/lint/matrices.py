"""Find the matrices of a checkpoint under one name each, whatever they are stored in."""

import re
from functools import cache

import numpy as np

from refmoe.config import Fp8Scheme
from refmoe.model.formats.bf16 import BF16
from refmoe.model.formats.registry import all_formats
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
    tensors, out = checkpoint.tensors, dict[str, None]()
    for name in tensors:
        if isinstance(checkpoint, Gguf) and name.endswith(KV_HALVES):
            out[re.sub(r"[kv]_b_proj\.weight$", "kv_b_proj.weight", name)] = None
            continue
        out[re.sub(r"\.weight_\w+$", ".weight", name)] = None
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
    module, scheme = key.removesuffix(".weight"), checkpoint.cfg.quantization
    for f in all_formats() if module != key else ():
        if f.scheme is None or module + f.mark not in tensors:
            continue
        if f.scheme is Fp8Scheme:
            if tensors[key].dtype != "F8_E4M3":
                continue
            # a dump of loaded weights may have no config that states the blocks
            scheme = scheme if isinstance(scheme, Fp8Scheme) else Fp8Scheme((128, 128), ())
        opened: Matrix = f.matrix.open(lambda suffix: array(module + suffix), scheme)
        return opened
    return _plain(array(key), tensors[key].dtype)


@cache
def _marks() -> tuple[str, ...]:
    """Return the suffixes by which modules in a safetensors format are known."""
    return tuple(f.mark for f in all_formats() if f.scheme is not None)


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
