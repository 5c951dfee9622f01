"""A checkpoint folder → a `Decoder`: names, shards and shapes, all checked before any computation.

    folder/config.json                        what tensors there must be, and their shapes
    folder/model.safetensors.index.json       tensor → shard; without it every *.safetensors counts
    folder/*.safetensors                      8 bytes length, JSON header, then the raw tensors

Weights are views of the mapped files: opening copies nothing, and a tensor is read when it is
used. The reader is ours because safetensors' NumPy side has no bf16 and no FP8; the library
writes, and reads the same files in the tests. A linear module is stored in a format that
`quantization_config` announces where that covers it (model/formats/); a module's weight and its
scale may be in different shards.

Tensors have one name here, the one of K2-Instruct: `model.layers.0…`, `lm_head.weight`. K2.5 and
later wrap the text model and write `language_model.model.layers.0…`; transformers' own K2.5 writes
`model.language_model.layers.0…`, older NVFP4 exports `language_model.layers.0…`.
"""

import hashlib
import json
import mmap
import re
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Self

import numpy as np

from refmoe.config import Config, Quantization, as_ids
from refmoe.files import InputError, read_object
from refmoe.model.decoder import Decoder, LayerWeights
from refmoe.model.experts import ExpertsFrom, MlpWeights, MoeWeights
from refmoe.model.formats.base import StoredFormat
from refmoe.model.formats.bf16 import BF16
from refmoe.model.formats.names import canonical
from refmoe.model.formats.registry import (
    announced_formats,
    formats_by_part,
    gguf_formats,
    supported_methods,
    unknown_method,
)
from refmoe.model.matrix import Matrix
from refmoe.model.mla import AttentionWeights
from refmoe.model.numerics import Numerics
from refmoe.model.router import GateWeights

DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
    "F8_E4M3": np.uint8,
    "F8_E5M2": np.uint8,
    "U16": np.uint16,
    "U32": np.uint32,
    "U64": np.uint64,
}
FLOATS = ("BF16", "F16", "F32", "F64")
MISSING_LIMIT = 1_000_000  # K2 has 208,550 tensors
HEADER_LIMIT = 100_000_000  # bytes, the limit of the safetensors library
INDEX = "model.safetensors.index.json"


class TensorEntry(NamedTuple):
    """One tensor of one file, not yet read."""

    file: Path
    name: str  # as the file has it
    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    nbytes: int


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Read the tensors of a safetensors file; `InputError` unless they tile its data exactly."""
    size = file.stat().st_size
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > min(HEADER_LIMIT, size - 8):
            raise InputError(
                f"{file}: header of {length} bytes in a file of {size}; "
                "truncated, or not safetensors"
            )
        try:
            header = json.loads(f.read(length).decode("utf-8"))
            header.pop("__metadata__", None)
            found = {}
            for name, t in header.items():
                start, stop = t["data_offsets"]
                numbers = (*t["shape"], start, stop)
                if not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
                    raise TypeError(f"{name}: shape or data_offsets are not counts")
                found[name] = (str(t["dtype"]), tuple(t["shape"]), start, stop)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise InputError(f"{file}: the header is not that of safetensors ({e!r})") from None
    end = 0
    out = {}
    for name, (dtype, shape, start, stop) in sorted(found.items(), key=lambda t: t[1][2:]):
        where = f"{file}: {name}"
        if dtype not in DTYPES:
            raise InputError(f"{where} has dtype {dtype}; supported: {', '.join(DTYPES)}")
        nbytes = prod(shape) * np.dtype(DTYPES[dtype]).itemsize
        if stop - start != nbytes:
            raise InputError(
                f"{where} is {dtype} {list(shape)}, {nbytes} bytes, "
                f"but its offsets hold {stop - start}"
            )
        if start != end:
            raise InputError(
                f"{where} begins at {start}, the tensor before it ends at {end}: "
                f"{'overlapping' if start < end else 'a gap'}; the file is damaged"
            )
        end = stop
        out[name] = TensorEntry(file, name, dtype, shape, 8 + length + start, nbytes)
    if 8 + length + end != size:
        raise InputError(
            f"{file}: the header describes {8 + length + end} bytes, the file has {size}: "
            "truncated or damaged; copy this shard again"
        )
    return out


def read_config(path: str | Path) -> Config:
    """Read a config.json, given itself or by its folder, and examine its `quantization_config`.

    Raises `InputError` as `Config.load` does, and if a format of model/formats/ refuses the
    settings of the quantisation. One that no format reads is left to the caller.
    """
    path = Path(path)
    cfg = Config.load(path)
    try:
        announced_formats(cfg.quantization)
    except InputError as e:
        raise InputError(f"{path / 'config.json' if path.is_dir() else path}: {e}") from None
    return cfg


@dataclass
class Checkpoint:
    """The tensors of a folder by name. `missing`, `unread` and `stray` say what does not fit.

    missing: in the config's list, in no shard. unread: in a shard, but nothing reads it.
    stray: in another shard than the index says, or in none of it.
    """

    path: Path
    cfg: Config
    tensors: dict[str, TensorEntry]
    generation_eos: tuple[int, ...] = ()
    missing: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    stray: list[str] = field(default_factory=list)
    source: Callable[[TensorEntry], np.ndarray] = field(init=False, repr=False)
    _maps: dict[Path, np.ndarray] = field(default_factory=dict, repr=False)
    _experts: dict[tuple[int, int], MlpWeights] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.source = self.mapped

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        """Read config, index and headers, and compare every name, dtype and shape.

        A wrong shape or dtype is an `InputError` here; missing tensors are when the model is made.
        """
        path = Path(path)
        if not path.is_dir():
            raise InputError(f"{path}: no such folder; --model takes a checkpoint's folder")
        cfg = read_config(path)
        if (method := unknown_method(cfg.quantization)) is not None:
            raise InputError(
                f"{path}: quant_method = {method!r} is not supported; "
                f"supported: {supported_methods()}"
            )
        tensors, stray = _shards(path)
        out = cls(path, cfg, tensors, _generation_eos(path), stray=stray)
        out._compare()
        return out

    @property
    def has_words(self) -> bool:
        """Tell whether the checkpoint has a vocabulary."""
        return (self.path / "tiktoken.model").is_file()

    @property
    def identity(self) -> str:
        """Return a hash of config.json and of the shards' sizes and times."""
        facts = [self.path.resolve().as_posix(), (self.path / "config.json").read_text("utf-8")]
        for file in sorted({t.file for t in self.tensors.values()}):
            stat = file.stat()
            facts.append(f"{file.name} {stat.st_size} {stat.st_mtime_ns}")
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()

    def _compare(self) -> None:
        unread = dict.fromkeys(self.tensors)
        for name, shape, dtypes in expected(self.cfg):
            stored = self.tensors.get(name)
            if stored is None:
                self.missing.append(name)
                if len(self.missing) > MISSING_LIMIT:
                    raise InputError(
                        f"{self.path}: config.json calls for more than {MISSING_LIMIT} tensors "
                        f"that are not there, first {self.missing[0]}; it is another model's"
                    )
                continue
            del unread[name]
            if stored.shape != shape:
                raise InputError(
                    f"{stored.file}: {stored.name} is {list(stored.shape)}, "
                    f"config.json makes it {list(shape)}; this shard belongs to another model"
                )
            if stored.dtype not in dtypes:
                raise InputError(
                    f"{stored.file}: {stored.name} is {stored.dtype}, "
                    f"expected {' or '.join(dtypes)}"
                )
        self.unread = [self.tensors[n].name for n in unread if not known_extra(n, self.cfg)]

    @property
    def warnings(self) -> list[str]:
        """Return what a user should know, a line each."""
        return [
            f"{len(names)} tensors {what}: {', '.join(names[:4])}{', …' if len(names) > 4 else ''}"
            for names, what in (
                (self.unread, "are never read"),
                (self.stray, f"are not where {INDEX} says"),
            )
            if names
        ]

    def array(self, name: str) -> np.ndarray:
        """Return a tensor as a read-only view of its bytes; bf16 as its bits."""
        stored = self.tensors[name]
        return self.source(stored).view(DTYPES[stored.dtype]).reshape(stored.shape)

    def mapped(self, stored: TensorEntry) -> np.ndarray:
        """Return a tensor's bytes in the mapped file."""
        file = self._maps.get(stored.file)
        if file is None:
            file = self._maps[stored.file] = np.memmap(stored.file, np.uint8, "r")
        return np.asarray(file[stored.start : stored.start + stored.nbytes])

    def let_go(self) -> None:
        """Tell the system that what was read of mapped files need not stay in memory."""
        for file in self._maps.values():
            advise(file, "MADV_DONTNEED")

    def reading(self, source: Callable[[TensorEntry], np.ndarray]) -> Self:
        """Return this checkpoint with bytes from elsewhere: TensorEntry → uint8 [nbytes]."""
        other = copy(self)
        other.source, other._experts = source, {}
        return other

    def matrix(self, module: str) -> Matrix:
        """Return the weight of a module, as stored."""
        announced = announced_formats(self.cfg.quantization)
        found = [a for a in announced if module + a.format.mark in self.tensors]
        if not found:
            return self._plain(module + ".weight")
        form, scheme = next((a for a in found if a.scheme.covers(module)), found[0])
        try:
            return form.matrix.open(lambda part: self.array(module + part), scheme)
        except InputError as e:
            file = next(t.file for name, t in self.tensors.items() if name.startswith(module + "."))
            raise InputError(f"{file}: {module}: {e}") from None

    def _plain(self, name: str) -> Matrix:
        stored = self.tensors[name]
        blocks = gguf_formats().get(stored.dtype)  # Q8_0 of `dense.checkpoint_q8`
        if blocks is not None:
            return blocks.from_bytes(self.source(stored), stored.shape)
        return plain_matrix(self.array(name), stored.dtype)

    def mlp(self, prefix: str) -> MlpWeights:
        """Return the three matrices of an MLP."""
        return MlpWeights(*(self.matrix(f"{prefix}{part}_proj") for part in ("gate", "up", "down")))

    def expert(self, layer: int, e: int) -> MlpWeights:
        """Return the matrices of one routed expert: views, made once."""
        key = (layer, e)
        if key not in self._experts:
            self._experts[key] = self.mlp(f"model.layers.{layer}.mlp.experts.{e}.")
        return self._experts[key]

    def layer(self, i: int) -> LayerWeights:
        """Return all matrices of a layer but the routed experts, as views."""
        at = f"model.layers.{i}."
        a = at + "self_attn."
        low_rank = self.cfg.q_lora_rank is not None
        attention = AttentionWeights(
            q_proj=None if low_rank else self.matrix(a + "q_proj"),
            q_a_proj=self.matrix(a + "q_a_proj") if low_rank else None,
            q_a_layernorm=self.matrix(a + "q_a_layernorm") if low_rank else None,
            q_b_proj=self.matrix(a + "q_b_proj") if low_rank else None,
            kv_a_proj_with_mqa=self.matrix(a + "kv_a_proj_with_mqa"),
            kv_a_layernorm=self.matrix(a + "kv_a_layernorm"),
            kv_b_proj=self.matrix(a + "kv_b_proj"),
            o_proj=self.matrix(a + "o_proj"),
        )
        mlp: MlpWeights | MoeWeights
        if self.cfg.is_moe(i):
            bias = self._plain(f"{at}mlp.gate.e_score_correction_bias")
            gate = GateWeights(self.matrix(f"{at}mlp.gate"), bias)
            shared = self.mlp(f"{at}mlp.shared_experts.") if self.cfg.n_shared_experts else None
            mlp = MoeWeights(gate, shared)
        else:
            mlp = self.mlp(f"{at}mlp.")
        return LayerWeights(
            self.matrix(at + "input_layernorm"),
            attention,
            self.matrix(at + "post_attention_layernorm"),
            mlp,
        )

    def decoder(self, nx: Numerics) -> Decoder:
        """Return the whole network as views; `InputError` if a tensor is missing."""
        if self.missing:
            raise InputError(
                f"{self.path}: {len(self.missing)} tensors are missing, first "
                f"{', '.join(self.missing[:3])}; is a shard missing?"
            )
        return Decoder(
            self.cfg,
            nx,
            self.matrix("model.embed_tokens"),
            [self.layer(i) for i in range(self.cfg.num_hidden_layers)],
            [ExpertsFrom(partial(self.expert, i)) for i in range(self.cfg.num_hidden_layers)],
            self.matrix("model.norm"),
            self.matrix("lm_head"),
        )


def plain_matrix(values: np.ndarray, dtype: str) -> Matrix:
    """Return a tensor of floats as a matrix; those of dtype BF16 are its bits."""
    return BF16(values) if dtype == "BF16" else values


def advise(file: Any, how: str) -> None:
    """Tell the system how a memory map is used, where it can be told."""
    advice = getattr(mmap, how, None)
    if advice is not None:
        file._mmap.madvise(advice)


def _shards(path: Path) -> tuple[dict[str, TensorEntry], list[str]]:
    """Return tensors by canonical name, and the names that are not where the index says."""
    tensors: dict[str, TensorEntry] = {}

    def take(stored: TensorEntry) -> None:
        other = tensors.setdefault(canonical(stored.name), stored)
        if other is not stored:
            raise InputError(
                f"{stored.name} of {stored.file} is {other.name} of {other.file.name} again"
            )

    index = path / INDEX
    if not index.exists():
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise InputError(f"{path}: no *.safetensors file")
        for file in files:
            for stored in read_header(file).values():
                take(stored)
        return tensors, []
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise InputError(f"{index}: no weight_map of names to files")
    names = sorted(set(weight_map.values()))
    stray, found = [], set()
    for shard in names:
        plain = PurePosixPath(shard)
        if plain.is_absolute() or len(plain.parts) != 1 or plain.parts[0] in ("..", "."):
            raise InputError(f"{index}: shard {shard!r} is not a file of this folder")
        if not (path / shard).is_file():
            count = sum(f == shard for f in weight_map.values())
            raise InputError(
                f"{index}: shard {shard} is not there; {count} tensors should be in it"
            )
        for name, stored in read_header(path / shard).items():
            if weight_map.get(name) == shard:
                take(stored)
                found.add(name)
            else:
                stray.append(name)
    for name, shard in weight_map.items():
        if name not in found:
            raise InputError(f"{path / shard}: {name} is not in it, though {INDEX} says so")
    return tensors, stray


def _generation_eos(path: Path) -> tuple[int, ...]:
    file = path / "generation_config.json"
    try:
        return as_ids(read_object(file).get("eos_token_id")) if file.exists() else ()
    except InputError as e:
        raise InputError(f"{file}: {e}") from None


Expected = tuple[str, tuple[int, ...], tuple[str, ...]]  # name, shape, dtypes


def expected(cfg: Config) -> Iterator[Expected]:
    """Yield every tensor the config calls for: name, shape, and the dtypes that can be read."""
    D, H, C, R = cfg.hidden_size, cfg.num_attention_heads, cfg.kv_lora_rank, cfg.qk_rope_head_dim
    A, F, E = cfg.q_lora_rank, cfg.moe_intermediate_size, cfg.n_routed_experts
    linear = partial(_linear, cfg.quantization)

    def mlp(prefix: str, width: int) -> Iterator[Expected]:
        yield from linear(prefix + "gate_proj", width, D)
        yield from linear(prefix + "up_proj", width, D)
        yield from linear(prefix + "down_proj", D, width)

    yield "model.embed_tokens.weight", (cfg.vocab_size, D), FLOATS
    for i in range(cfg.num_hidden_layers):
        at = f"model.layers.{i}."
        a = at + "self_attn."
        yield at + "input_layernorm.weight", (D,), FLOATS
        if A is None:
            yield from linear(a + "q_proj", H * cfg.qk_head_dim, D)
        else:
            yield from linear(a + "q_a_proj", A, D)
            yield a + "q_a_layernorm.weight", (A,), FLOATS
            yield from linear(a + "q_b_proj", H * cfg.qk_head_dim, A)
        yield from linear(a + "kv_a_proj_with_mqa", C + R, D)
        yield a + "kv_a_layernorm.weight", (C,), FLOATS
        yield from linear(a + "kv_b_proj", H * (cfg.qk_nope_head_dim + cfg.v_head_dim), C)
        yield from linear(a + "o_proj", D, H * cfg.v_head_dim)
        yield at + "post_attention_layernorm.weight", (D,), FLOATS
        m = at + "mlp."
        if not cfg.is_moe(i):
            yield from mlp(m, cfg.intermediate_size)
            continue
        yield m + "gate.weight", (E, D), FLOATS
        yield m + "gate.e_score_correction_bias", (E,), FLOATS
        if cfg.n_shared_experts:
            yield from mlp(m + "shared_experts.", F * cfg.n_shared_experts)
        for e in range(E):
            yield from mlp(f"{m}experts.{e}.", F)
    yield "model.norm.weight", (D,), FLOATS
    yield from linear("lm_head", cfg.vocab_size, D)


def _linear(quantization: Quantization | None, module: str, O: int, I: int) -> Iterator[Expected]:
    for form, scheme in announced_formats(quantization):
        if not scheme.covers(module):
            continue
        try:
            tensors = form.matrix.tensors(O, I, scheme)
        except InputError as e:
            raise InputError(f"{module}: {e}") from None
        for suffix, (shape, dtypes) in tensors.items():
            yield module + suffix, shape, dtypes
        return
    yield module + ".weight", (O, I), FLOATS


def known_extra(name: str, cfg: Config) -> bool:
    """Tell whether it is a tensor that published checkpoints carry and the text graph leaves aside.

    A left-over `rotary_emb.inv_freq` (K2-Instruct's has the wrong length), the multi-token
    prediction layer behind the last one (DeepSeek-V3), vision tower and projector (K2.5 and later).
    """
    if name.endswith("rotary_emb.inv_freq") or _VISION.match(name):
        return True
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return layer is not None and int(layer[1]) >= cfg.num_hidden_layers


_VISION = re.compile(r"(model\.)?(vision_tower|mm_projector|multi_modal_projector)\.")


def tensor_class(name: str, cfg: Config) -> str:
    """Return the class of a tensor in summaries: by what it does, not by its format."""
    if known_extra(name, cfg):
        return "other"
    for mark, kind in (
        (".mlp.experts.", "routed experts"),
        (".mlp.shared_experts.", "shared experts"),
        (".mlp.gate.", "router"),
        ("layernorm.", "norms"),
        ("model.norm.", "norms"),
        (".self_attn.", "attention"),
        (".mlp.", "dense mlp"),
        ("embed_tokens.", "embedding"),
        ("lm_head.", "head"),
    ):
        if mark in name:
            return kind
    return "other"


def format_of_part(cfg: Config, name: str, dtype: str) -> StoredFormat | None:
    """Return the safetensors format that has such a tensor; None for floats and for a GGUF's."""
    part = "." + name.rpartition(".")[2]
    form = formats_by_part(cfg.quantization).get(part)
    if form is None or dtype not in DTYPES or (form.parts[part] and dtype in FLOATS):
        return None
    return form


def count_numbers(cfg: Config, name: str, dtype: str, shape: tuple[int, ...]) -> int:
    """Return how many numbers of a weight a tensor holds, also in packed codes; 0 for scales."""
    form = format_of_part(cfg, name, dtype)
    if form is None:
        return prod(shape)
    bits = form.parts["." + name.rpartition(".")[2]]
    return prod(shape) * 8 * np.dtype(DTYPES[dtype]).itemsize // bits if bits else 0


def summary(checkpoint: Checkpoint) -> dict[str, Any]:
    """Count bytes by class, and parameters in total and those that one token uses."""
    cfg = checkpoint.cfg
    bytes_by_class: dict[str, int] = {}
    count = {"once": 0, "routed": 0, "embedding": 0}
    for name, stored in checkpoint.tensors.items():
        kind = tensor_class(name, cfg)
        bytes_by_class[kind] = bytes_by_class.get(kind, 0) + stored.nbytes
        if kind == "other":
            continue
        use = {"routed experts": "routed", "embedding": "embedding"}.get(kind, "once")
        count[use] += count_numbers(cfg, name, stored.dtype, stored.shape)
    chosen = count["routed"] * cfg.num_experts_per_tok // cfg.n_routed_experts
    active = count["once"] + chosen + cfg.hidden_size  # a token looks up one row of the embedding
    return {
        "bytes": bytes_by_class,
        "parameters": {"total": sum(count.values()), "active": active},
    }
