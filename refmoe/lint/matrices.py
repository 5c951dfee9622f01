"""Find a checkpoint's matrices and their names."""

import re

import numpy as np

from refmoe.config import Fp8Scheme
from refmoe.model.formats.bf16 import BF16
from refmoe.model.formats.fp8_block import Fp8Block
from refmoe.model.formats.int4 import Int4
from refmoe.model.matrix import Matrix, dequantize
from refmoe.weights.checkpoint import (
    Checkpoint,
)
from refmoe.weights.gguf import Gguf

# --- values


def _label(checkpoint: Checkpoint, name: str) -> str:
    """A tensor as the file has it; of a GGUF, whose experts lie in one, as a checkpoint has it."""
    return name if isinstance(checkpoint, Gguf) else checkpoint.tensors[name].name


# --- two checkpoints


def _matrix_of(x: np.ndarray, dtype: str) -> Matrix:
    x = x.reshape(len(x), -1) if x.ndim > 2 else x
    return BF16(x) if dtype == "BF16" else x


def _named(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """The values of a plain tensor in float64; of a GGUF, of any."""
    return _wide(_matrix(checkpoint, name))


def _wide(m: Matrix) -> np.ndarray:
    return dequantize(m, np.float64)


KV_HALVES = (".k_b_proj.weight", ".v_b_proj.weight")


def _keys(checkpoint: Checkpoint) -> list[str]:
    """What a checkpoint holds whatever it is stored in: `module.weight`, or a tensor's name."""
    tensors, out = checkpoint.tensors, dict[str, None]()
    for name in tensors:
        if isinstance(checkpoint, Gguf) and name.endswith(KV_HALVES):
            out[re.sub(r"[kv]_b_proj\.weight$", "kv_b_proj.weight", name)] = None
            continue
        module = re.sub(r"\.weight_(scale|shape|scale_inv)$", "", name)
        part = module != name and tensors.keys() & {module + ".weight", module + ".weight_packed"}
        if not part:
            out[re.sub(r"\.weight_packed$", ".weight", name)] = None
    return list(out)


def _matrix(checkpoint: Checkpoint, key: str) -> Matrix:
    """The tensor of a key as stored; of integers and of FP8 without a scale only the bits."""
    tensors, array = checkpoint.tensors, checkpoint.array
    if isinstance(checkpoint, Gguf):
        module = key.removesuffix(".weight")
        return (
            checkpoint.matrix(module)
            if module != key
            else _matrix_of(array(key), tensors[key].dtype)
        )
    if key + "_packed" in tensors:
        return Int4(array(key + "_packed"), array(key + "_scale"))
    if key + "_scale_inv" in tensors and tensors[key].dtype == "F8_E4M3":
        scheme = checkpoint.cfg.quantization
        block = scheme.block if isinstance(scheme, Fp8Scheme) else (128, 128)
        return Fp8Block(array(key), array(key + "_scale_inv"), block)
    return _matrix_of(array(key), tensors[key].dtype)
