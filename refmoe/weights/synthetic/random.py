"""Write random checkpoints in Hugging Face layout, small, finite, and with no two axes alike.

What equal axes hide (a transposed matrix, two swapped heads) cannot pass on these. The same
shape, format and seed give the same bytes on every machine: PCG64 and a fixed order.
"""

import base64
import json
import re
from collections.abc import Mapping
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import TensorSpec, serialize_file

from refmoe.config import Config
from refmoe.files import InputError, write_atomically
from refmoe.model.formats.fp8_block import Fp8Block
from refmoe.model.formats.int4 import Int4
from refmoe.model.formats.registry import find_scheme
from refmoe.model.matrix import bf16_bits
from refmoe.weights.checkpoint import INDEX, expected, tensor_class

SINGLE = "model.safetensors"
FORMATS = ("bf16", "f16", "f32", "int4", "fp8")
Tensors = dict[str, tuple[str, np.ndarray]]  # name → dtype as safetensors spells it, values

SHAPE: dict[str, Any] = {
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 5,
    "q_lora_rank": 40,
    "kv_lora_rank": 48,
    "qk_nope_head_dim": 18,
    "qk_rope_head_dim": 12,
    "v_head_dim": 28,
    "intermediate_size": 160,
    "moe_intermediate_size": 32,
    "n_routed_experts": 11,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "vocab_size": 530,
}
FIXED: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "kimi_k2",
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.827,
    "hidden_act": "silu",
    "attention_bias": False,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 4.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
    },
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
RESERVED = 256  # ids behind the ranks
FP8_CONFIG: dict[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
INT4_CONFIG: dict[str, Any] = {
    "config_groups": {
        "group_0": {
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": None,
                "dynamic": False,
                "group_size": 32,
                "num_bits": 4,
                "observer": "minmax",
                "strategy": "group",
                "symmetric": True,
                "type": "int",
            },
        }
    },
    "format": "pack-quantized",
    "ignore": [
        "lm_head",
        "re:.*self_attn.*",
        "re:.*shared_experts.*",
        r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
    ],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}


def write_random(
    folder: str | Path,
    format: str = "bf16",
    seed: int = 0,
    shape: Mapping[str, Any] | None = None,
    shards: int = 1,
) -> None:
    """Write a random checkpoint into a new folder.

    format  bf16, f16, f32, int4 (routed experts packed, the rest bf16), or fp8 (blocks)
    shape   fields of config.json that differ from `SHAPE` and `FIXED`
    shards  files that the layers are dealt to

    The vocabulary is the 256 bytes, then pairs of bytes, then K2's special tokens. Raises
    `InputError` for an unknown format, a shape that the network cannot have, a used folder.
    """
    folder = Path(folder)
    if format not in FORMATS:
        raise InputError(f"format {format!r}; supported: {', '.join(FORMATS)}")
    dtype = {"f16": "float16", "f32": "float32"}.get(format, "bfloat16")
    raw = {**FIXED, **SHAPE, "torch_dtype": dtype, **(shape or {})}
    ranks = raw["vocab_size"] - RESERVED
    if not 256 <= ranks <= 256 + 256**2:
        raise InputError(f"vocab_size = {raw['vocab_size']}, expected 512 to {512 + 256**2}")
    raw |= {"bos_token_id": ranks, "eos_token_id": ranks + 2, "pad_token_id": ranks + 255}
    raw["num_key_value_heads"] = raw["num_attention_heads"]
    if format in ("int4", "fp8"):
        raw["quantization_config"] = INT4_CONFIG if format == "int4" else FP8_CONFIG
    cfg = Config.from_dict(raw)
    files: dict[str, Tensors] = {}
    for name, tensor in draw(cfg, dtype, seed).items():
        # layers dealt to shards in order; the embedding first, norm and head last
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        at = int(layer[1]) * shards // cfg.num_hidden_layers if layer else shards - 1
        at = 0 if "embed_tokens" in name else at
        file = f"model-{at + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else SINGLE
        files.setdefault(file, {})[name] = tensor
    write(folder, raw, files)
    write_vocabulary(folder, ranks)


def draw(cfg: Config, dtype: str, seed: int) -> Tensors:
    """Return every tensor the config calls for, at random; `dtype` is of what is not quantised."""
    rng = np.random.Generator(np.random.PCG64(seed))
    tensors: Tensors = {}
    for name, size, dtypes in expected(cfg):
        if name.endswith(".weight_packed"):
            O, words = size
            packed, scale = pack_int4(rng.standard_normal((O, words * 8)) / sqrt(words * 8))
            tensors[name] = ("int32", packed)
            tensors[name.replace("_packed", "_scale")] = ("bfloat16", scale)
            tensors[name.replace("_packed", "_shape")] = ("int32", np.array([O, words * 8], "<i4"))
        elif dtypes == ("F8_E4M3",):
            w = rng.standard_normal(size) / sqrt(size[-1])
            bits, scale = pack_fp8(w, find_scheme(cfg.quantization, "fp8").block)
            tensors[name] = ("float8_e4m3fn", bits)
            tensors[name + "_scale_inv"] = ("float32", scale)
        elif name not in tensors:
            tensors[name] = _encode(_draw_values(name, size, cfg, rng), name, dtype)
    return tensors


def axes(cfg: Config) -> dict[str, int]:
    """Return the sizes along which an array may be laid out, derived ones included."""
    H, N, R, V = (
        cfg.num_attention_heads,
        cfg.qk_nope_head_dim,
        cfg.qk_rope_head_dim,
        cfg.v_head_dim,
    )
    own = {key: getattr(cfg, key) for key in SHAPE if key != "first_k_dense_replace"}
    return {
        **own,
        "nope + rope": N + R,
        "heads (nope + rope)": H * (N + R),
        "heads (nope + v)": H * (N + V),
        "heads v": H * V,
        "kv_lora + rope": cfg.kv_lora_rank + R,
        "rope / 2": R // 2,
        "shared width": cfg.moe_intermediate_size * cfg.n_shared_experts,
    }


def pack_int4(w: np.ndarray, divisor: float = 7.0) -> tuple[np.ndarray, np.ndarray]:
    """Return [O, I] as Int4's arrays, packed and scale, with scales max|w| / divisor."""
    packed, scale = Int4.quantize(w, divisor)
    return packed, scale


def pack_fp8(w: np.ndarray, block: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return [O, I] as Fp8Block's arrays, bits and scale."""
    bits, scale, _ = Fp8Block.quantize(w, block)
    return bits, scale


def _draw_values(
    name: str, size: tuple[int, ...], cfg: Config, rng: np.random.Generator
) -> np.ndarray:
    z = rng.standard_normal(size)
    if name.endswith("e_score_correction_bias"):
        return 0.1 * z
    if tensor_class(name, cfg) == "norms":
        return 1 + 0.2 * z
    return z / sqrt(size[-1]) if "embed_tokens" not in name else z


def _encode(x: np.ndarray, name: str, dtype: str) -> tuple[str, np.ndarray]:
    if name.endswith("e_score_correction_bias") or dtype == "float32":
        return "float32", x.astype("<f4")
    return (dtype, x.astype("<f2")) if dtype == "float16" else (dtype, bf16_bits(x))


def write(folder: Path, raw: Mapping[str, Any], files: Mapping[str, Tensors]) -> None:
    """Write config.json, the shards by file name, and their index if there are several.

    Raises `InputError` for a folder that is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} exists and is not empty; give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", raw)
    for file, tensors in files.items():
        specs = {
            name: TensorSpec(dtype=dtype, shape=x.shape, data_ptr=x.ctypes.data, data_len=x.nbytes)
            for name, (dtype, x) in tensors.items()
        }
        serialize_file(specs, folder / file, {"format": "pt"})
    if len(files) > 1:
        size = sum(x.nbytes for tensors in files.values() for _, x in tensors.values())
        weight_map = {name: file for file, tensors in files.items() for name in tensors}
        _write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


def write_vocabulary(folder: Path, ranks: int) -> None:
    """Write a vocabulary of single bytes, then of pairs of bytes, with K2's special tokens."""
    single = [bytes([b]) for b in range(256)]
    pairs = [a + b for a in single[97:] + single[:97] for b in single[97:] + single[:97]]
    lines = (base64.b64encode(t) + b" %d\n" % i for i, t in enumerate((single + pairs)[:ranks]))
    (folder / "tiktoken.model").write_bytes(b"".join(lines))
    names = {0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 4: "<|im_assistant|>"}
    names |= {10: "<|im_system|>", 17: "<|im_middle|>", 254: "[UNK]", 255: "[PAD]"}
    added = {str(ranks + i): {"content": name, "special": True} for i, name in names.items()}
    _write_json(
        folder / "tokenizer_config.json",
        {"added_tokens_decoder": added, "bos_token": "[BOS]", "eos_token": "[EOS]"},
    )


def _write_json(file: Path, value: object) -> None:
    with write_atomically(file) as part:
        part.write_text(json.dumps(value, indent=2) + "\n", "utf-8")
