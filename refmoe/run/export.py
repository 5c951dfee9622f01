"""Export checkpoints to GGUF, INT4 or bf16, and name the tensors whose values changed.

    gguf     routed experts in INT4 become Q4_0 with their codes as they are, if each scale is a
             float16 too; if not, the stack of that layer is written as `otherwise`. The rest is
             written as `dense`: Q8_0, BF16, F16 or F32; norms, router and its bias as F32
    int4     routed experts become pack-quantized INT4: Q4_0 with its codes as they are, anything
             else quantised anew, scale = max|w|/7 or max|w|/7.5 rounded to bf16; the rest `dense`
    bf16     everything is written in bf16, as a checkpoint without quantisation

A scale of INT4 is a bf16; it is a float16 where it is zero or from 2⁻²⁴ to 65504 and, below 2⁻¹⁴,
has few enough digits. Files are written as streams, a tensor at a time.
"""

import base64
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refmoe.config import Config
from refmoe.files import InputError, read_object, write_atomically
from refmoe.model.formats.bf16 import BF16
from refmoe.model.formats.int4 import Int4
from refmoe.model.formats.q4_0 import Q4
from refmoe.model.formats.q8_0 import Q8
from refmoe.model.matrix import Matrix, bf16_bits, dequantize, tiles, widen_bf16
from refmoe.run.load import Model
from refmoe.text.tokenizer import Tokenizer, byte_alphabet
from refmoe.weights.checkpoint import Checkpoint, expected
from refmoe.weights.gguf import GLOBAL, REST, SELF, Gguf, library
from refmoe.weights.synthetic.random import INT4_CONFIG, SINGLE, pack_int4
from refmoe.weights.writer import Spec, write_stream

DENSE = ("q8_0", "bf16", "f16", "f32")
QUANTISERS = {"amax/7": 7.0, "amax/7.5": 7.5}
TILE = 1 << 22  # elements of a matrix that are wide at once: 16 MB in float32


class Exported(NamedTuple):
    """The outcome of an export."""

    out: Path
    tensors: int
    bytes: int
    not_exact: list[str]  # tensors whose values are not those of the source

    def as_json(self) -> dict[str, Any]:
        """Return this as an object for JSON."""
        return {**self._asdict(), "out": str(self.out)}


# --- INT4 and Q4_0


def int4_to_q4(m: Int4) -> Q4:
    """Return an INT4 matrix as Q4_0: codes in Q4_0's order, scales rounded to float16."""
    O, G = m.scale.shape
    two = np.ascontiguousarray(m.packed).view(np.uint8).reshape(O, G, 16)
    codes = np.stack((two & 15, two >> 4), axis=-1).reshape(O, G, 32)
    blocks = np.empty((O, G, 18), np.uint8)
    with np.errstate(over="ignore"):
        blocks[..., :2] = widen_bf16(m.scale).astype(np.float16)[..., None].view(np.uint8)
    blocks[..., 2:] = codes[..., :16] | codes[..., 16:] << 4
    return Q4(blocks)


def q4_to_int4(m: Q4) -> Int4:
    """Return a Q4_0 matrix as INT4: codes in pack-quantized's order, scales rounded to bf16."""
    O = len(m.blocks)
    low, high = m.blocks[..., 2:] & 15, m.blocks[..., 2:] >> 4
    codes = np.concatenate((low, high), axis=-1).reshape(O, -1)
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).view(np.int32)
    scale = np.ascontiguousarray(m.blocks[..., :2]).view(np.float16)[..., 0]
    return Int4(packed, bf16_bits(scale.astype(np.float32)))


def survives(scale: np.ndarray) -> bool:
    """Return whether each scale, given as bits of bf16, is a float16 too."""
    wide = widen_bf16(scale)
    with np.errstate(over="ignore"):
        return bool((wide.astype(np.float16).astype(np.float32) == wide).all())


# --- GGUF


def to_gguf(
    model: Model, out: Path, dense: str = "q8_0", otherwise: str = "f32", experts: str = "q4_0"
) -> Exported:
    """Write a checkpoint as one GGUF file, for llama.cpp's deepseek2.

    dense      the type of what is not a routed expert: q8_0, bf16, f16 or f32
    otherwise  the type of routed experts in INT4 whose scales are no float16
    experts    the type of routed experts: q4_0, or one of the above

    Raises `InputError` for an unknown type, and for a config that deepseek2 cannot say.
    """
    gguf = library("writing a GGUF")
    if {dense, otherwise} - {*DENSE} or experts not in ("q4_0", *DENSE):
        raise InputError(
            f"types {dense!r}, {otherwise!r}, {experts!r}; supported: {', '.join(DENSE)}, "
            "and q4_0 for experts"
        )
    with write_atomically(out) as part:
        writer = gguf.GGUFWriter(part, "deepseek2")
        _write_metadata(writer, model)
        plans = list(_plan_tensors(model, dense, otherwise, experts))
        for plan in plans:
            kind = gguf.GGMLQuantizationType[plan.type.upper()]
            shape = gguf.quant_shape_to_byte_shape(plan.shape, kind) if plan.blocks else plan.shape
            stored = {"f32": np.float32, "f16": np.float16}.get(plan.type, np.uint8)
            writer.add_tensor_info(
                plan.name, shape, np.dtype(stored), plan.nbytes(gguf), raw_dtype=kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        wrong = []
        for plan in plans:
            data, exact = plan.make()
            writer.write_tensor_data(data)
            if not exact:
                wrong.append(plan.name)
        writer.close()
    return Exported(out, len(plans), out.stat().st_size, wrong)


class _Plan(NamedTuple):
    """A tensor that is going to be written."""

    name: str
    type: str
    shape: tuple[int, ...]  # slowest first
    make: Callable[[], tuple[np.ndarray, bool]]  # data, whether it is exact

    @property
    def blocks(self) -> bool:
        """Whether the type stores numbers in blocks."""
        return self.type not in ("f32", "f16")

    def nbytes(self, gguf: Any) -> int:
        """Return the bytes of its data."""
        elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.type.upper()]]
        return int(np.prod(self.shape)) // elements * size


def _plan_tensors(model: Model, dense: str, otherwise: str, experts: str) -> Iterator[_Plan]:
    """Yield every tensor of the GGUF."""
    checkpoint, cfg = model.checkpoint, model.cfg

    def plain(name: str, m: Callable[[], Matrix], shape: tuple[int, ...], kind: str) -> _Plan:
        kind = "f32" if kind == "q8_0" and shape[-1] % 32 else kind
        return _Plan(name, kind, shape, lambda: _encode(m(), shape, kind))

    def module(gguf_name: str, name: str) -> _Plan:
        m = checkpoint.matrix(name)
        kind = "f32" if len(m.shape) == 1 or name.endswith("mlp.gate") else dense
        return plain(f"{gguf_name}.weight", lambda: m, m.shape, kind)

    yield from (module(theirs, ours) for theirs, ours in GLOBAL.items())
    for i in range(cfg.num_hidden_layers):
        at, blk = f"model.layers.{i}.", f"blk.{i}."
        names = {f"self_attn.{ours}": theirs for theirs, ours in SELF.items()}
        names |= {ours: theirs for theirs, ours in REST.items()}
        for ours, theirs in names.items():
            if f"{at}{ours}.weight" in checkpoint.tensors and ours != "self_attn.kv_b_proj":
                yield module(blk + theirs, at + ours)
        yield from _plan_heads(checkpoint, cfg, i, plain, dense)
        if cfg.is_moe(i):
            bias = f"{at}mlp.gate.e_score_correction_bias"
            values = checkpoint.array(bias)
            wide: Matrix = BF16(values) if checkpoint.tensors[bias].dtype == "BF16" else values
            name = f"{blk}exp_probs_b.bias"
            yield plain(name, lambda wide=wide: wide, values.shape, "f32")  # type: ignore[misc]
            for n, part in enumerate(("gate", "up", "down")):
                kinds = experts, dense, otherwise
                yield _plan_stack(model, i, n, f"{blk}ffn_{part}_exps.weight", *kinds)


def _plan_heads(
    checkpoint: Checkpoint, cfg: Config, i: int, plain: Any, dense: str
) -> Iterator[_Plan]:
    """Yield kv_b_proj as the two tensors of a GGUF: keys [H, C, N] and values [H, V, C]."""
    H, N, V = cfg.num_attention_heads, cfg.qk_nope_head_dim, cfg.v_head_dim
    C = cfg.kv_lora_rank

    def half(keys: bool) -> np.ndarray:
        m = checkpoint.matrix(f"model.layers.{i}.self_attn.kv_b_proj")
        w = dequantize(m).reshape(H, N + V, C)
        w = w[:, :N].transpose(0, 2, 1) if keys else w[:, N:]
        return np.ascontiguousarray(w).reshape(-1, w.shape[-1])

    yield plain(f"blk.{i}.attn_k_b.weight", lambda: half(True), (H, C, N), dense)
    yield plain(f"blk.{i}.attn_v_b.weight", lambda: half(False), (H, V, C), dense)


def _plan_stack(
    model: Model, i: int, n: int, name: str, experts: str, dense: str, otherwise: str
) -> _Plan:
    """Return the tensor that stacks one matrix of all experts of a layer."""
    each = [model.decoder.experts[i](e)[n] for e in range(model.cfg.n_routed_experts)]
    shape = len(each), *each[0].shape
    codes = [m for m in each if isinstance(m, Int4)]
    kind = experts
    if kind == "q4_0" and len(codes) == len(each) and all(survives(m.scale) for m in codes):
        return _Plan(
            name, kind, shape, lambda: (np.stack([_flat(int4_to_q4(m)) for m in codes]), True)
        )
    if kind == "q4_0":
        kind = otherwise if codes else dense
    kind = "f32" if kind == "q8_0" and shape[-1] % 32 else kind
    return _Plan(name, kind, shape, lambda: _encode_stack(each, shape[1:], kind))


def _flat(m: Q4) -> np.ndarray:
    return m.blocks.reshape(len(m.blocks), -1)


def _encode_stack(
    each: Sequence[Matrix], shape: tuple[int, ...], kind: str
) -> tuple[np.ndarray, bool]:
    made = [_encode(m, shape, kind) for m in each]
    return np.stack([data for data, _ in made]), all(exact for _, exact in made)


def _encode(m: Matrix, shape: tuple[int, ...], kind: str) -> tuple[np.ndarray, bool]:
    """Encode a matrix → its data, [..., bytes of a row] if the type has blocks, whether exact."""
    if len(m.shape) != 2:
        return _encode_tile(dequantize(m), kind)
    made = [_encode_tile(dequantize(tile), kind) for _, tile in tiles(m, TILE)]
    data = np.concatenate([data for data, _ in made])
    return data.reshape(*shape[:-1], -1), all(exact for _, exact in made)


def _encode_tile(w: np.ndarray, kind: str) -> tuple[np.ndarray, bool]:
    """Encode some rows in a type → data, whether exact."""
    w = w.astype(np.float32, copy=False)
    match kind:
        case "f32":
            return w, True
        case "f16":
            with np.errstate(over="ignore"):
                half = w.astype(np.float16)
            return half, bool((half.astype(np.float32) == w).all())
        case "bf16":
            bits = bf16_bits(w)
            return bits.view(np.uint8), bool((widen_bf16(bits) == w).all())
        case _:
            q8 = Q8.quantize(w)
            return q8.blocks.reshape(len(w), -1), bool((dequantize(q8) == w).all())


def _write_metadata(writer: Any, model: Model) -> None:
    """Write the metadata as ggml-org/llama.cpp's conversion/deepseek.py does."""
    cfg, yarn = model.cfg, model.cfg.rope_scaling
    counts = {
        "vocab_size": cfg.vocab_size,
        "context_length": cfg.max_position_embeddings,
        "embedding_length": cfg.hidden_size,
        "block_count": cfg.num_hidden_layers,
        "feed_forward_length": cfg.intermediate_size,
        "leading_dense_block_count": cfg.first_k_dense_replace,
        "attention.head_count": cfg.num_attention_heads,
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": cfg.q_lora_rank,
        "attention.kv_lora_rank": cfg.kv_lora_rank,
        "attention.key_length": cfg.kv_lora_rank + cfg.qk_rope_head_dim,
        "attention.value_length": cfg.kv_lora_rank,
        "attention.key_length_mla": cfg.qk_head_dim,
        "attention.value_length_mla": cfg.v_head_dim,
        "rope.dimension_count": cfg.qk_rope_head_dim,
        "expert_count": cfg.n_routed_experts,
        "expert_used_count": cfg.num_experts_per_tok,
        "expert_shared_count": cfg.n_shared_experts,
        "expert_feed_forward_length": cfg.moe_intermediate_size,
        "expert_group_count": cfg.n_group,
        "expert_group_used_count": cfg.topk_group,
        "expert_gating_func": 2,
    }
    if cfg.moe_layer_freq != 1:
        raise InputError(f"moe_layer_freq = {cfg.moe_layer_freq}: GGUF's deepseek2 has only 1")
    numbers = {
        "attention.layer_norm_rms_epsilon": cfg.rms_norm_eps,
        "rope.freq_base": cfg.rope_theta,
        "expert_weights_scale": cfg.routed_scaling_factor,
    }
    if yarn is not None:
        writer.add_string("deepseek2.rope.scaling.type", "yarn")
        counts["rope.scaling.original_context_length"] = yarn.original_max_position_embeddings
        numbers |= {
            "rope.scaling.factor": yarn.factor,
            "rope.scaling.yarn_log_multiplier": 0.1 * yarn.mscale_all_dim,
            "rope.scaling.yarn_beta_fast": yarn.beta_fast,
            "rope.scaling.yarn_beta_slow": yarn.beta_slow,
        }
        if yarn.mscale != yarn.mscale_all_dim:
            raise InputError(
                f"mscale = {yarn.mscale}, mscale_all_dim = {yarn.mscale_all_dim}: a GGUF has one"
            )
    for key, count in counts.items():
        if count is not None:
            writer.add_uint32(f"deepseek2.{key}", count)
    for key, number in numbers.items():
        writer.add_float32(f"deepseek2.{key}", number)
    writer.add_bool("deepseek2.expert_weights_norm", cfg.norm_topk_prob)
    if model.checkpoint.has_words:
        _write_gguf_words(writer, model)
    else:
        writer.add_string("tokenizer.ggml.model", "no_vocab")


def vocabulary(words: Tokenizer) -> dict[str, list[Any]]:
    """Return the arrays of a GGUF's vocabulary, by their keys after `tokenizer.ggml.`.

    They are the tokens, spelt in GPT-2's alphabet, their types (1 plain, 3 control) and the merges.
    """
    letters, names = byte_alphabet(), {i: name for name, i in words.special.items()}
    ranks = words.size - len(names)
    raw = [words.token_bytes(i) for i in range(ranks)]
    rank = {token: i for i, token in enumerate(raw)}

    def spelt(token: bytes) -> str:
        return "".join(letters[b] for b in token)

    return {
        "tokens": [*map(spelt, raw), *(names[ranks + n] for n in range(len(names)))],
        "token_type": [1] * ranks + [3] * len(names),
        "merges": [" ".join(map(spelt, _halves(t, rank))) for t in raw if len(t) > 1],
    }


def _write_gguf_words(writer: Any, model: Model) -> None:
    """Write the vocabulary and the chat template into a GGUF's metadata."""
    words = model.tokenizer
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", "kimi-k2")
    for key, values in vocabulary(words).items():
        writer.add_array(f"tokenizer.ggml.{key}", values)
    ids = model.cfg.eos_token_id
    if ids:
        writer.add_uint32("tokenizer.ggml.eos_token_id", ids[0])
    bos = words.special.get("[BOS]") if model.bos is None else model.bos
    if bos is not None:
        writer.add_bos_token_id(bos)
    if "[PAD]" in words.special:
        writer.add_pad_token_id(words.special["[PAD]"])
    if model.bos is not None:
        writer.add_add_bos_token(True)
    try:
        writer.add_string("tokenizer.chat_template", model.template.source)
    except InputError:  # it has no template
        return


def _halves(token: bytes, rank: dict[bytes, int]) -> list[bytes]:
    """Return the two tokens that a token is merged from last: its bytes merged without itself."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        joined = (a + b for a, b in pairwise(parts))
        pairs = [(rank.get(pair, 1 << 60), n) for n, pair in enumerate(joined)]
        best, n = min(p for p in pairs if p[0] != rank[token])
        if best == 1 << 60:
            raise InputError(f"token {token!r} is no merge of two others")
        parts[n : n + 2] = [parts[n] + parts[n + 1]]
    return parts


# --- safetensors


def to_safetensors(
    model: Model, out: Path, experts: str, dense: str = "bf16", quantiser: str = "amax/7"
) -> Exported:
    """Write a checkpoint into a new folder of safetensors.

    experts    the format of routed experts: int4 or bf16
    dense      the type of the rest: bf16, f16 or f32
    quantiser  how experts that have no codes of four bits get them: amax/7 or amax/7.5

    Raises `InputError` for anything else, and for a folder that is not empty.
    """
    kinds = {"bf16": "BF16", "f16": "F16", "f32": "F32"}
    if dense not in kinds or experts not in ("int4", "bf16") or quantiser not in QUANTISERS:
        raise InputError(f"experts {experts!r}, the rest {dense!r}, quantiser {quantiser!r}")
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} exists and is not empty; give a new folder")
    out.mkdir(parents=True, exist_ok=True)
    raw = raw_config(model)
    raw["torch_dtype"] = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}[dense]
    if experts == "int4":
        raw["quantization_config"] = INT4_CONFIG
    cfg = Config.from_dict(raw)
    names = [(name, shape) for name, shape, _ in expected(cfg)]
    specs, wrong = [], []
    for name, shape in names:
        if name.endswith("_packed"):
            specs.append(Spec(name, "I32", shape))
        elif name.endswith("_scale"):
            specs.append(Spec(name, "BF16", shape))
        elif name.endswith("_shape"):
            specs.append(Spec(name, "I32", shape))
        else:
            specs.append(Spec(name, "F32" if name.endswith("_bias") else kinds[dense], shape))

    def chunks() -> Iterator[np.ndarray]:
        packed: Int4 | None = None
        for spec in specs:
            module, _, end = spec.name.rpartition(".")
            if end == "weight_packed":
                packed, exact = _quantize_int4(
                    _read_matrix(model.checkpoint, module), QUANTISERS[quantiser]
                )
                if not exact:
                    wrong.append(module)
                yield packed.packed
            elif end == "weight_scale":
                assert packed is not None
                yield packed.scale
            elif end == "weight_shape":
                assert packed is not None
                yield np.array(packed.shape, np.int32)
            else:
                m = _read_matrix(model.checkpoint, module if end == "weight" else spec.name)
                pieces = tiles(m, TILE) if len(m.shape) == 2 else [(slice(None), m)]
                exact = True
                for _, tile in pieces:
                    data, same = _encode_tile(dequantize(tile), spec.dtype.lower())
                    exact = exact and same
                    yield data
                if not exact:
                    wrong.append(module)

    write_stream(out / SINGLE, specs, chunks())
    (out / "config.json").write_text(json.dumps(raw, indent=2) + "\n", "utf-8")
    _write_words(model, out)
    return Exported(out, len(specs), (out / SINGLE).stat().st_size, wrong)


def _read_matrix(checkpoint: Checkpoint, module: str) -> Matrix:
    if module.endswith("_bias"):
        values = checkpoint.array(module)
        return BF16(values) if checkpoint.tensors[module].dtype == "BF16" else values
    return checkpoint.matrix(module)


def _quantize_int4(m: Matrix, divisor: float) -> tuple[Int4, bool]:
    if isinstance(m, Int4):
        return m, True
    if isinstance(m, Q4):
        again = q4_to_int4(m)
    else:
        again = Int4(*pack_int4(dequantize(m, np.float64), divisor))
    return again, bool((dequantize(again) == dequantize(m)).all())


def raw_config(model: Model) -> dict[str, Any]:
    """Return config.json without quantisation, or what a GGUF's metadata say in its place."""
    checkpoint = model.checkpoint
    if isinstance(checkpoint, Gguf):
        return checkpoint.raw_config()
    raw = read_object(checkpoint.path / "config.json")
    text = raw.get("text_config") or raw
    return {k: v for k, v in text.items() if k != "quantization_config"}


def _write_words(model: Model, out: Path) -> None:
    """Write the vocabulary and the chat template into a folder."""
    checkpoint = model.checkpoint
    if not isinstance(checkpoint, Gguf):
        for pattern in ("tiktoken.model", "tokenizer*.json", "chat_template.jinja", "gen*.json"):
            for file in checkpoint.path.glob(pattern):
                shutil.copyfile(file, out / file.name)
        return
    if not checkpoint.has_words:
        return
    words = model.tokenizer
    ranks = words.size - len(words.special)
    lines = (base64.b64encode(words.token_bytes(i)) + b" %d\n" % i for i in range(ranks))
    (out / "tiktoken.model").write_bytes(b"".join(lines))
    added = {str(i): {"content": name, "special": True} for name, i in words.special.items()}
    config: dict[str, Any] = {"added_tokens_decoder": added}
    tokens = checkpoint.metadata["tokenizer.ggml.tokens"]
    for name, i in checkpoint.ids.items():
        if name != "eot" and 0 <= i < len(tokens):
            config[f"{name}_token"] = tokens[i]
    if model.bos is not None:
        config["add_bos_token"] = True
    template = checkpoint.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
    (out / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
