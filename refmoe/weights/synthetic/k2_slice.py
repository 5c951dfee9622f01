"""Write a random INT4 checkpoint of K2's dimensions: one dense layer, one or more MoE layers.

What a token costs in it is a known part of what it costs in K2, and it fits into memory: 15.5 GB
with K2's 384 experts and 163,840 words, 3 GB with 32 and 32,768. Written as a stream, one matrix in
memory at a time. Numbers repeat every 2²⁴, from random places: nothing that a benchmark sees, and
much quicker than drawing 20 billion. It has no vocabulary; prompts are ids.
"""

import json
import shutil
from collections.abc import Iterator
from math import prod, sqrt
from pathlib import Path
from typing import Any

import numpy as np

from refmoe.config import Config
from refmoe.files import InputError
from refmoe.model.matrix import bf16_bits
from refmoe.weights.checkpoint import expected
from refmoe.weights.synthetic.random import FIXED, INT4_CONFIG, SINGLE
from refmoe.weights.writer import Spec, write_stream

SHAPE: dict[str, Any] = {  # moonshotai/Kimi-K2-Thinking config.json, but for the number of layers
    "hidden_size": 7168,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 384,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "vocab_size": 163840,
    "max_position_embeddings": 262144,
    "bos_token_id": 163584,
    "eos_token_id": 163586,
    "pad_token_id": 163839,
}
YARN = {
    "type": "yarn",
    "factor": 64.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
DRAWN = 1 << 24  # numbers that are drawn, and then repeated


def k2_slice(folder: Path, experts: int = 384, vocab: int = 163840, layers: int = 2) -> Path:
    """Return the checkpoint's folder inside `folder`; it is written if it is not there.

    Raises `InputError` if the disk has not enough space.
    """
    path = folder / f"k2-slice-{experts}-{vocab}{f'-{layers}' if layers != 2 else ''}"
    if (path / SINGLE).is_file():
        return path
    raw = {**FIXED, **SHAPE, "rope_scaling": YARN, "n_routed_experts": experts}
    raw |= {
        "vocab_size": vocab,
        "num_hidden_layers": layers,
        "torch_dtype": "bfloat16",
        "quantization_config": INT4_CONFIG,
    }
    raw |= {k: v % vocab for k, v in raw.items() if k.endswith("_token_id")}
    cfg = Config.from_dict(raw)
    specs = [
        Spec(name, "F32" if name.endswith("_bias") else dtypes[0], shape)
        for name, shape, dtypes in expected(cfg)
    ]
    size = sum(spec.nbytes for spec in specs)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < size + (1 << 30):
        raise InputError(
            f"{folder}: the slice takes {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; "
            "name another folder, or fewer --experts and a smaller --vocab"
        )
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(raw, indent=2) + "\n", "utf-8")
    write_stream(path / SINGLE, specs, _chunks(specs), path.name)
    return path


def _chunks(specs: list[Spec]) -> Iterator[np.ndarray]:
    """Yield every tensor's numbers in order, at most `DRAWN` at a time."""
    numbers = Numbers(0)
    words = numbers.rng.integers(-(2**31), 2**31, DRAWN, np.int32)
    shapes = {spec.name: spec.shape for spec in specs}
    for name, dtype, shape in specs:
        if dtype == "I32" and name.endswith("_shape"):
            yield weight_shape(shapes[name.replace("_shape", "_packed")])
            continue
        plain = words if dtype == "I32" else scale_numbers(name, shape, numbers.normal)
        plain = bf16_bits(plain) if dtype == "BF16" else plain
        yield from numbers.repeat(plain, prod(shape))


def weight_shape(packed: tuple[int, ...]) -> np.ndarray:
    """Return the tensor `weight_shape` that belongs to a `weight_packed` [O, I/8]."""
    return np.array([packed[0], 8 * packed[1]], np.int32)


class Numbers:
    """Draws `DRAWN` normal numbers, and repeats them from random places on."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.Generator(np.random.SFC64(seed))
        self.normal = self.rng.standard_normal(DRAWN, np.float32)

    def repeat(self, plain: np.ndarray, left: int) -> Iterator[np.ndarray]:
        """Yield pieces of `plain`, `left` numbers in all."""
        while left:
            at = int(self.rng.integers(0, max(1, len(plain) - min(left, DRAWN // 2) + 1)))
            piece = plain[at : at + left]
            yield piece
            left -= len(piece)


def scale_numbers(name: str, shape: tuple[int, ...], normal: np.ndarray) -> np.ndarray:
    """Return normal numbers scaled for a tensor so that every activation stays near 1."""
    few = normal[: max(1, min(DRAWN, 2 * prod(shape)))]
    if name.endswith("_scale"):  # of codes of variance 21
        return (1 + 0.1 * few) / np.float32(sqrt(21 * 32 * shape[-1]))
    if "norm" in name:
        return 1 + np.float32(0.1) * few
    if name.endswith("e_score_correction_bias"):
        return np.float32(0.1) * few
    return few if "embed_tokens" in name else few / np.float32(sqrt(shape[-1]))
