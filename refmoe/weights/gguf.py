"""A GGUF of `deepseek2` → the same `Checkpoint` as a folder of safetensors, under the same names.

    magic "GGUF", version 3, counts of tensors and of metadata
    metadata    key, type, value; strings and arrays with their lengths
    tensors     name, sizes (fastest first), type, place; then the data, aligned

One file, or the parts of `llama-gguf-split`, all mapped; opening copies nothing. The file is read
here, bounds first, and not by the gguf package, whose reader trusts every length; of what is not
plain, Q8_0 or Q4_0, that package (extra `gguf`) knows the blocks.

    token_embd, output_norm, output          model.embed_tokens, model.norm, lm_head
    blk.N.attn_{q, q_a, q_b, kv_a_mqa, kv_b, output}, attn_{q_a, kv_a}_norm   self_attn.*
    blk.N.attn_k_b [H, C, N], attn_v_b [H, V, C]        kv_b_proj by head, the keys' transposed
    blk.N.ffn_{gate, up, down}[_shexp, _exps], ffn_gate_up_exps               mlp.*, stacked experts
    blk.N.ffn_gate_inp, exp_probs_b.bias                mlp.gate.weight, .e_score_correction_bias

What a GGUF cannot say is made explicit (`warnings`): there is one mscale (yarn_log_multiplier is a
tenth of mscale_all_dim), and files older than ggml-org/llama.cpp#18013 lack the YaRN betas, which
are then llama.cpp's 32 and 1, whatever the model was trained with. llama.cpp's loader uses these
two even where the file has others. Sources: ggml-org/ggml docs/gguf.md; ggml-org/llama.cpp
conversion/deepseek.py, src/models/deepseek2.cpp.
"""

import hashlib
import importlib
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from refmoe.config import Config
from refmoe.files import InputError
from refmoe.model.formats.coded import Coded
from refmoe.model.formats.heads import Heads
from refmoe.model.formats.registry import gguf_formats, gguf_types
from refmoe.model.matrix import Matrix
from refmoe.weights.checkpoint import MISSING_LIMIT, Checkpoint, TensorEntry, expected, plain_matrix

PLAIN = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 28: ("F64", 1, 8)}
BLOCKS = {t.number: (t.name, t.elements, t.nbytes) for t in gguf_types()}
NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "F64": np.float64}
LENGTHS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?"}
LENGTHS |= {10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
LEAST = 12  # bytes of the smallest metadata or tensor entry
KEYS = 1 << 16  # bytes of a key or a tensor's name, as the format has it
SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


class _Bytes:
    """A header that is read forwards, each length being held against what is left of the file."""

    def __init__(self, file: Path, data: np.ndarray):
        # a memory map of NumPy's takes 5 µs for each slice; a vocabulary has 160,000 words
        self.file, self.data, self.at = file, data.data, 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise InputError(
                f"{self.file}: {count} bytes at {self.at} in a file of {len(self.data)}; "
                "truncated or damaged, copy it again"
            )
        self.at += count
        return self.data[self.at - count : self.at].tobytes()

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def string(self, limit: int | None = None) -> str:
        length = self.number("<Q")
        if limit is not None and length > limit:
            raise InputError(f"{self.file}: a name of {length} bytes at {self.at}; damaged")
        return self.take(length).decode("utf-8", "surrogateescape")

    def count(self, least: int, what: str) -> int:
        """Read a number of entries, each of at least `least` bytes."""
        count = int(self.number("<Q"))
        if count * least > len(self.data) - self.at:
            raise InputError(
                f"{self.file}: {count} {what} cannot be in {len(self.data) - self.at} bytes; "
                "damaged"
            )
        return count

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in LENGTHS:
            return self.number(LENGTHS[kind])
        if kind == STRING:
            return self.string()
        if kind == ARRAY and depth == 0:
            inner = self.number("<I")
            if inner in LENGTHS:
                form = LENGTHS[inner]
                count = self.count(struct.calcsize(form), "numbers")
                raw = self.take(count * struct.calcsize(form))
                return np.frombuffer(raw, np.dtype(form)).tolist()
            return [self.value(inner, 1) for _ in range(self.count(8, "strings"))]
        raise InputError(f"{self.file}: metadata of type {kind} at {self.at}; damaged")


@dataclass(frozen=True)
class Part:
    """One file: its metadata and tensors."""

    file: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorEntry]  # names as the file has them; shapes slowest first


def read_part(file: Path) -> Part:
    """Read one file's header; `InputError` unless it is a whole GGUF of version 2 or 3."""
    try:
        data = np.memmap(file, np.uint8, "r")
    except (OSError, ValueError) as e:
        raise InputError(f"{file}: cannot be mapped ({e})") from None
    head = _Bytes(file, data)
    magic, version = head.take(4), head.number("<I")
    if magic != b"GGUF" or version not in (2, 3):
        raise InputError(f"{file}: begins with {magic!r}, version {version}; not a GGUF of 2 or 3")
    tensors, entries = head.count(LEAST, "tensors"), head.count(LEAST, "metadata entries")
    metadata: dict[str, Any] = {}
    for _ in range(entries):
        key = head.string(KEYS)
        metadata[key] = head.value(head.number("<I"))
    infos = []
    for _ in range(tensors):
        name, dims = head.string(KEYS), head.number("<I")
        if not 1 <= dims <= 4:
            raise InputError(f"{file}: {name} has {dims} dimensions, expected 1 to 4")
        shape = tuple(head.number("<Q") for _ in range(dims))[::-1]
        infos.append((name, shape, head.number("<I"), head.number("<Q")))
    align = metadata.get("general.alignment", 32)
    if not isinstance(align, int) or not 0 < align <= 1 << 20:
        raise InputError(f"{file}: general.alignment = {align!r}")
    base = -(-head.at // align) * align
    found: dict[str, TensorEntry] = {}
    for name, shape, kind, place in infos:
        typed, elements, size = _type(file, name, kind)
        if name in found or any(not 0 < n < 2**40 for n in shape) or shape[-1] % elements:
            raise InputError(f"{file}: {name} is {typed} {list(shape)}, or there twice; damaged")
        nbytes = prod(shape) // elements * size
        if base + place + nbytes > len(data) or place % align:
            raise InputError(
                f"{file}: {name} is {nbytes} bytes at {base + place}, the file has {len(data)}; "
                "truncated or damaged, copy it again"
            )
        found[name] = TensorEntry(file, name, typed, shape, base + place, nbytes)
    return Part(file, metadata, found)


def _type(file: Path, name: str, kind: int) -> tuple[str, int, int]:
    known = PLAIN.get(kind) or BLOCKS.get(kind)
    if known is not None:
        return known
    gguf = library(f"{file}: {name} is of GGUF type {kind}")
    try:
        which = gguf.GGMLQuantizationType(kind)
        elements, size = gguf.GGML_QUANT_SIZES[which]
    except (ValueError, KeyError):
        raise InputError(f"{file}: {name} is of type {kind}, which no GGUF has; damaged") from None
    return which.name, elements, size


def block_of(t: TensorEntry) -> tuple[int, int]:
    """Return how many elements and bytes a block of this tensor's type has."""
    for name, elements, size in (*PLAIN.values(), *BLOCKS.values()):
        if name == t.dtype:
            return elements, size
    gguf = library(f"{t.file}: {t.name} is {t.dtype}")
    elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[t.dtype]]
    return elements, size


def library(why: str) -> Any:
    """Import the gguf package; `InputError` says why it is needed and how to install it."""
    try:
        return importlib.import_module("gguf")
    except ModuleNotFoundError:
        raise InputError(f"{why}; it takes the gguf package: pip install 'refmoe[gguf]'") from None


def is_gguf(path: Path) -> bool:
    """Tell whether a path is a GGUF file, or a folder with GGUF files and no config.json."""
    if path.is_dir():
        return not (path / "config.json").exists() and any(path.glob("*.gguf"))
    return path.suffix == ".gguf"


def parts(path: Path) -> list[Part]:
    """Read all files of a model: of the one named, or of the only model in the folder."""
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        firsts = [f for f in files if not (m := SPLIT.fullmatch(f.name)) or m[2] == "00001"]
        if len(firsts) != 1:
            raise InputError(f"{path}: {len(firsts)} models; name one of their files")
        path = firsts[0]
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    split = SPLIT.fullmatch(path.name)
    if split is None:
        return [read_part(path)]
    count = int(split[3])
    if not 1 <= count <= 9999:
        raise InputError(f"{path}: {count} parts")
    found = []
    for i in range(count):
        file = path.with_name(f"{split[1]}-{i + 1:05d}-of-{split[3]}.gguf")
        if not file.is_file():
            raise InputError(f"{file}: not there; the model has {count} parts")
        part = read_part(file)
        told = part.metadata.get("split.no", i), part.metadata.get("split.count", count)
        if told != (i, count):
            raise InputError(f"{file}: says it is part {told[0]} of {told[1]}")
        found.append(part)
    total = found[0].metadata.get("split.tensors.count")
    held = sum(len(part.tensors) for part in found)
    if total is not None and total != held:
        raise InputError(f"{path}: {held} tensors in all parts, split.tensors.count says {total}")
    return found


SELF = {
    "attn_q": "q_proj",
    "attn_q_a": "q_a_proj",
    "attn_q_a_norm": "q_a_layernorm",
    "attn_q_b": "q_b_proj",
    "attn_kv_a_mqa": "kv_a_proj_with_mqa",
    "attn_kv_a_norm": "kv_a_layernorm",
    "attn_kv_b": "kv_b_proj",
    "attn_k_b": "k_b_proj",
    "attn_v_b": "v_b_proj",
    "attn_output": "o_proj",
}
REST = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
GLOBAL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
STACKED: dict[str, tuple[str, ...]] = {
    "ffn_gate_exps": ("gate",),
    "ffn_up_exps": ("up",),
    "ffn_down_exps": ("down",),
    "ffn_gate_up_exps": ("gate", "up"),
}


def named(t: TensorEntry, cfg: Config) -> Iterator[tuple[str, TensorEntry]]:
    """Yield a GGUF tensor under the checkpoint's names: one, or one for each expert."""
    module, _, end = t.name.rpartition(".")
    layer = re.fullmatch(r"blk\.(\d+)\.(.*)", module)
    if layer is None:
        if module in GLOBAL and end == "weight":
            yield f"{GLOBAL[module]}.weight", t
        return
    at, name = f"model.layers.{layer[1]}.", layer[2]
    if name == "exp_probs_b" and end == "bias":
        yield f"{at}mlp.gate.e_score_correction_bias", t
    elif end != "weight":
        return
    elif name in SELF:
        merged = (t.shape[0] * t.shape[1], t.shape[2]) if len(t.shape) == 3 else t.shape
        yield f"{at}self_attn.{SELF[name]}.weight", t._replace(shape=merged)
    elif name in REST:
        yield f"{at}{REST[name]}.weight", t
    elif name in STACKED and len(t.shape) == 3:
        E, rows, columns = t.shape
        each = STACKED[name]
        size, O = t.nbytes // E // len(each), rows // len(each)
        for e in range(E):
            for n, part in enumerate(each):
                start = t.start + (e * len(each) + n) * size
                one = t._replace(shape=(O, columns), start=start, nbytes=size)
                yield f"{at}mlp.experts.{e}.{part}_proj.weight", one


def config_of(metadata: dict[str, Any], file: Path) -> tuple[Config, list[str]]:
    """Return the Config this metadata means to llama.cpp, and notes on what it leaves unsaid."""
    architecture = metadata.get("general.architecture")
    if architecture != "deepseek2":
        raise InputError(f"{file}: general.architecture = {architecture!r}; supported: 'deepseek2'")

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"deepseek2.{key}", default)

    notes: list[str] = []
    rope = get("rope.dimension_count")
    keys, values = get("attention.key_length_mla"), get("attention.value_length_mla")
    if keys is None:  # older files have no compressed form
        keys, values = get("attention.key_length"), get("attention.value_length")
    if not all(isinstance(n, int) for n in (rope, keys, values)):
        raise InputError(f"{file}: key_length, value_length or rope.dimension_count is no count")
    if get("expert_gating_func", 2) != 2:
        raise InputError(f"{file}: expert_gating_func = {get('expert_gating_func')}, expected 2")
    tokens = metadata.get("tokenizer.ggml.tokens")
    raw: dict[str, Any] = {
        "model_type": "deepseek_v3",
        "vocab_size": get("vocab_size", len(tokens) if isinstance(tokens, list) else None),
        "hidden_size": get("embedding_length"),
        "num_hidden_layers": _less(get("block_count"), get("nextn_predict_layers", 0)),
        "num_attention_heads": get("attention.head_count"),
        "q_lora_rank": get("attention.q_lora_rank"),
        "kv_lora_rank": get("attention.kv_lora_rank"),
        "qk_nope_head_dim": keys - rope,
        "qk_rope_head_dim": rope,
        "v_head_dim": values,
        "intermediate_size": get("feed_forward_length"),
        "moe_intermediate_size": get("expert_feed_forward_length"),
        "first_k_dense_replace": get("leading_dense_block_count"),
        "n_routed_experts": get("expert_count"),
        "n_shared_experts": get("expert_shared_count", 0),
        "num_experts_per_tok": get("expert_used_count"),
        "n_group": get("expert_group_count", 1),
        "topk_group": get("expert_group_used_count", 1),
        "norm_topk_prob": get("expert_weights_norm", False),
        "routed_scaling_factor": get("expert_weights_scale", 1.0),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_theta": get("rope.freq_base"),
        "max_position_embeddings": get("context_length"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
    }
    if get("rope.scaling.type") == "yarn":
        betas = get("rope.scaling.yarn_beta_fast"), get("rope.scaling.yarn_beta_slow")
        if None in betas:
            notes.append(
                "the YaRN betas are not in this GGUF: 32 and 1 are used, as llama.cpp does; "
                "K2-Instruct, 0905 and Thinking were trained with 1 and 1 "
                "(ggml-org/llama.cpp#18013)"
            )
        for key in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor"):
            if get(f"rope.scaling.{key}", 1.0) != 1.0:
                notes.append(f"rope.scaling.{key} is not 1, which llama.cpp would multiply by")
        m = get("rope.scaling.yarn_log_multiplier", 0.0)
        if not isinstance(m, float) or m <= 0:
            raise InputError(f"{file}: rope.scaling.yarn_log_multiplier = {m!r}, expected 0.1")
        m = float(np.float32(m) / np.float32(0.1))  # the file has a tenth
        raw["rope_scaling"] = {
            "type": "yarn",
            "factor": get("rope.scaling.factor"),
            "original_max_position_embeddings": get("rope.scaling.original_context_length"),
            "beta_fast": 32.0 if betas[0] is None else betas[0],
            "beta_slow": 1.0 if betas[1] is None else betas[1],
            "mscale": round(m, 6),
            "mscale_all_dim": round(m, 6),
        }
    for key, value in raw.items():  # a float32 of a decimal constant is that constant
        if isinstance(value, float):
            raw[key] = float(f"{value:.7g}")
    try:
        return Config.from_dict(raw), notes
    except InputError as e:
        raise InputError(f"{file}: {e}") from None


def _less(count: Any, fewer: Any) -> Any:
    return count - fewer if isinstance(count, int) and isinstance(fewer, int) else count


@dataclass
class Gguf(Checkpoint):
    """A checkpoint whose tensors lie in GGUF files."""

    metadata: dict[str, Any] = field(default_factory=dict, repr=False)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, path: str | Path) -> "Gguf":
        found = parts(Path(path))
        metadata = found[0].metadata
        cfg, notes = config_of(metadata, found[0].file)
        tensors: dict[str, TensorEntry] = {}
        unread: list[str] = []
        for part in found:
            for t in part.tensors.values():
                mine = dict(named(t, cfg))
                twice = [name for name in mine if name in tensors]
                if twice:
                    raise InputError(f"{t.file}: {t.name} gives {twice[0]} again")
                tensors |= mine
                if not mine and t.name != "rope_freqs.weight":
                    unread.append(t.name)
        if "lm_head.weight" not in tensors and "model.embed_tokens.weight" in tensors:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
            notes.append("no output.weight: the head is the embedding, as llama.cpp has it")
        out = cls(found[0].file, cfg, tensors, metadata=metadata, notes=notes)
        out._compare()
        out.unread = [*unread, *out.unread]
        return out

    @property
    def has_words(self) -> bool:
        return isinstance(self.metadata.get("tokenizer.ggml.tokens"), list)

    @property
    def ids(self) -> dict[str, int]:
        """Return the ids of bos, eos, eot and pad, as far as the metadata name them."""
        keys = {"pad": "padding", "eos": "eos", "bos": "bos", "eot": "eot"}
        found = {n: self.metadata.get(f"tokenizer.ggml.{key}_token_id") for n, key in keys.items()}
        return {name: i for name, i in found.items() if isinstance(i, int)}

    def raw_config(self) -> dict[str, Any]:
        """Return what config.json would say, without quantisation."""
        cfg = self.cfg
        apart = ("quantization", "rope_scaling", "eos_token_id")
        raw: dict[str, Any] = {k: v for k, v in cfg.__dict__.items() if k not in apart}
        raw |= {"architectures": ["DeepseekV3ForCausalLM"], "eos_token_id": list(cfg.eos_token_id)}
        raw |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "hidden_act": "silu"}
        raw |= {"attention_bias": False, "num_key_value_heads": cfg.num_attention_heads}
        raw |= {f"{n}_token_id": i for n, i in self.ids.items() if n in ("bos", "pad")}
        if cfg.rope_scaling is not None:
            raw["rope_scaling"] = {"type": "yarn", **cfg.rope_scaling.__dict__}
        return raw

    @property
    def identity(self) -> str:
        facts = [self.path.resolve().as_posix()]
        for file in sorted({t.file for t in self.tensors.values()}):
            stat = file.stat()
            facts.append(f"{file.name} {stat.st_size} {stat.st_mtime_ns}")
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()

    @property
    def warnings(self) -> list[str]:
        return [*self.notes, *super().warnings]

    def _compare(self) -> None:
        cfg = self.cfg
        H, N, V, C = (
            cfg.num_attention_heads,
            cfg.qk_nope_head_dim,
            cfg.v_head_dim,
            cfg.kv_lora_rank,
        )
        unread = dict.fromkeys(self.tensors)
        for name, shape, _ in expected(cfg):
            wanted = {name: shape}
            if name.endswith("kv_b_proj.weight") and name not in self.tensors:
                at = name.removesuffix("kv_b_proj.weight")
                wanted = {f"{at}k_b_proj.weight": (H * C, N), f"{at}v_b_proj.weight": (H * V, C)}
            for one, size in wanted.items():
                stored = self.tensors.get(one)
                if stored is None:
                    self.missing.append(one)
                    if len(self.missing) > MISSING_LIMIT:
                        raise InputError(
                            f"{self.path}: the metadata call for more than {MISSING_LIMIT} tensors "
                            f"that are not there, first {self.missing[0]}; damaged"
                        )
                    continue
                del unread[one]
                if len(size) == 1 and stored.dtype not in NUMPY:
                    raise InputError(
                        f"{stored.file}: {stored.name} is {stored.dtype}, a vector is never in "
                        f"blocks; expected {' or '.join(NUMPY)}"
                    )
                if stored.shape != size:
                    raise InputError(
                        f"{stored.file}: {stored.name} is {list(stored.shape)}, the metadata make "
                        f"{one} {list(size)}"
                    )
        layers = range(cfg.num_hidden_layers)
        self.unread = [
            name
            for name in unread
            if not (m := re.match(r"model\.layers\.(\d+)\.", name)) or int(m[1]) in layers
        ]

    def array(self, name: str) -> np.ndarray:
        t = self.tensors[name]
        raw = self.source(t)
        if t.dtype in NUMPY:
            return raw.view(NUMPY[t.dtype]).reshape(t.shape)
        return raw.reshape(t.shape[0], -1)

    def matrix(self, module: str) -> Matrix:
        if module.endswith("kv_b_proj") and module + ".weight" not in self.tensors:
            at = module.removesuffix("kv_b_proj")
            halves = self._plain(f"{at}k_b_proj.weight"), self._plain(f"{at}v_b_proj.weight")
            return Heads(*halves, self.cfg.num_attention_heads)
        return self._plain(module + ".weight")

    def _plain(self, name: str) -> Matrix:
        t = self.tensors[name]
        values = self.array(name)
        if t.dtype in NUMPY:
            return plain_matrix(values, t.dtype)
        if (form := gguf_formats().get(t.dtype)) is not None:
            return form.from_bytes(values, t.shape)
        library(f"{t.file}: {t.name} is {t.dtype}")
        try:
            return Coded(values, t.shape[-1], decoder_of(t.dtype), t.dtype)
        except NotImplementedError:
            raise InputError(
                f"{t.file}: {t.name} is {t.dtype}, which the gguf package cannot decode"
            ) from None


@cache
def decoder_of(kind: str) -> Callable[[np.ndarray], np.ndarray]:
    """Return the gguf package's decoder, tried on a block: it knows sizes of more types."""
    gguf, quants = importlib.import_module("gguf"), importlib.import_module("gguf.quants")
    which = gguf.GGMLQuantizationType[kind]
    decode: Callable[[np.ndarray], np.ndarray] = partial(quants.dequantize, qtype=which)
    decode(np.zeros((1, gguf.GGML_QUANT_SIZES[which][1]), np.uint8))
    return decode
