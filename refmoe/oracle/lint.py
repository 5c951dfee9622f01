"""A checkpoint examined without running it: what is wrong, suspicious, or worth knowing.

    lint(folder)                  one checkpoint, read once from end to end
    lint_against(folder, other)   two checkpoints of one model, whatever each is stored in

    config    constants against the published member of the same shape; ids that end a turn
    YaRN      ramp, softmax scale and gain as other engines take them from this config
    tensors   missing, never read, twice, in the wrong shard, of a wrong shape or dtype
    values    NaN and infinity, all zero, subnormal, copies of another tensor, gains of norms
    INT4      codes and scales, and whether GGUF's Q4_0 can hold them exactly
    FP8       NaN codes, scales that are zero or look inverted
    router    gate rows, and what rounding the bias to bf16 does to the choice of experts

    error     the weights or constants cannot be right: `ok` is false
    warning   probably wrong, or right and known to break an engine
    note      facts

Two tensors are compared tile by tile in float64, where every stored format is exact:

    the same bits; the same values; rounded: |a - b| is at most half a step of each plain type
    (bf16, float16, float32); within a step: also half a quantisation step, s·(1/2 + 8/256) of
    INT4 (rounding to the code, and of the scale to bf16 at code 8), half a unit of e4m3 · s of
    FP8; else wrong, and a cause is sought.

Of a GGUF the same is asked, of its metadata for config.json, and of a GGUF and a folder together.
Without a meaning there: shards and index (a split is held together when it is opened, where names,
shapes and tensors stored twice are errors as well); a dtype for each tensor, which may be any;
generation_config.json and an <|im_end|> that no id names, as llama.cpp ends a turn at that name;
INT4, FP8 and whether Q4_0 could hold them: Q4_0, Q8_0 and the halves of other blocks are looked at
instead. Without a bound of its own a K-quant or IQ is compared by its RMS (`quant.LOOSE`).

Findings of one kind are many in a model of 208,550 tensors: the worst `SHOWN` are listed and the
others counted. Not decidable here: a nibble order or a row order that is wrong in the only copy.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from hashlib import blake2b
from math import ceil, floor, log, pi, prod, sqrt
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from refmoe.config import Config, Fp8Scheme, OtherScheme, Yarn, as_ids
from refmoe.files import InputError, read_object
from refmoe.model.decoder import policy
from refmoe.model.matrix import (
    BF16,
    E4M3,
    Q4,
    Q8,
    Coded,
    Fp8Block,
    Heads,
    Int4,
    Matrix,
    Tiled,
    dequantize,
    round_bf16,
    rows,
    tiles,
    widen_bf16,
)
from refmoe.model.rope import inv_freq, softmax_scale
from refmoe.model.router import limit_groups, sigmoid
from refmoe.oracle import quant
from refmoe.weights import members
from refmoe.weights.checkpoint import (
    INDEX,
    MISSING_LIMIT,
    Checkpoint,
    Stored,
    canonical,
    expected,
    known_extra,
    read_header,
    tensor_class,
)
from refmoe.weights.gguf import Gguf, block_of, is_gguf

Level = Literal["error", "warning", "note"]
SHOWN = 5  # findings of one kind that are listed
TILE = 1 << 22  # elements in memory at a time
CAUSES = 100  # wrong tensors whose cause is sought: each takes seconds at K2's sizes
CAUSE_LIMIT = 20_000_000  # elements of such a tensor; K2's q_b_proj has 18.9 million
DRAWS = 2048  # tokens drawn to see what a rounded bias does to the choice


@dataclass(frozen=True)
class Finding:
    level: Level
    tensor: str | None  # as the file has it; None: of the whole checkpoint
    text: str


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    ok = all(f.level != "error" for f in findings)
    return {"findings": [asdict(f) for f in findings], "ok": ok}


@dataclass
class _Findings:
    """Collected by level and kind, so that a kind with very many can be cut."""

    groups: dict[tuple[Level, str], list[tuple[float, Finding]]] = field(default_factory=dict)

    def add(
        self, level: Level, kind: str, tensor: str | None, text: str, weight: float = 0.0
    ) -> None:
        """`weight`: how bad, among those of its kind."""
        self.groups.setdefault((level, kind), []).append((weight, Finding(level, tensor, text)))

    def listed(self) -> list[Finding]:
        """Errors first; of each kind the worst, then how many more there are."""
        out: list[Finding] = []
        for level in ("error", "warning", "note"):
            for (own, kind), found in self.groups.items():
                if own != level:
                    continue
                worst = sorted(found, key=lambda f: -f[0])
                limit = len(worst) if kind == "yarn" else SHOWN
                out += [f for _, f in worst[:limit]]
                if len(worst) > limit:
                    more = f"{kind}: {len(worst) - limit:,} more such findings"
                    out.append(Finding(own, None, more))
        return out


@np.errstate(over="ignore", invalid="ignore")  # values that are not finite are looked for
def lint(folder: str | Path) -> list[Finding]:
    """Examine the checkpoint in a folder, or a GGUF; `InputError` only if there is no config."""
    if is_gguf(Path(folder)):
        return _lint_gguf(Path(folder))
    folder, out = _folder(folder), _Findings()
    cfg = _config(folder, out)
    if cfg is None:
        return out.listed()
    _yarn(cfg, out)
    if isinstance(cfg.quantization, OtherScheme):
        method = cfg.quantization.quant_method
        text = f"quant_method = {method!r}: its weights cannot be read here"
        out.add("error", "format", None, text)
        return out.listed()
    if not any(folder.glob("*.safetensors")):
        out.add("error", "shards", None, f"{folder}: no *.safetensors file")
        return out.listed()
    checkpoint = Checkpoint(folder, cfg, _gather(folder, out))
    try:
        fit = _names(checkpoint, out)
    except InputError as e:  # sizes that no tensor can have
        out.add("error", "config", None, f"config.json: {e}")
        return out.listed()
    _values(checkpoint, fit, out)
    _router(checkpoint, fit, out)
    return out.listed()


@np.errstate(over="ignore", invalid="ignore")
def lint_against(folder: str | Path, other: str | Path) -> list[Finding]:
    """Compare two checkpoints of one model, tensor by tensor; `folder` is taken to be right.

    `other` may lack a config.json, as a dump of an engine's loaded weights does.
    """
    out = _Findings()
    a = _one_of_two(folder, None, out)
    b = _one_of_two(other, a.cfg, out)
    if isinstance(b, Gguf) or (b.path / "config.json").exists():
        _two_configs(a, b, out)
    else:
        text = f"{b.path} has no config.json: only tensors are compared"
        out.add("note", "config", None, text)
    _two_checkpoints(a, b, out)
    return out.listed()


def _one_of_two(path: str | Path, cfg: Config | None, out: _Findings) -> Checkpoint:
    """`cfg`: what a folder without a config.json is taken to be of."""
    if is_gguf(Path(path)):
        return Gguf.open(path)
    folder = _folder(path)
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"{folder}: no *.safetensors file")
    if cfg is None or (folder / "config.json").exists():
        cfg = Config.load(folder)
    return Checkpoint(folder, cfg, _gather(folder, out))


def _lint_gguf(path: Path) -> list[Finding]:
    """The same questions, as far as a GGUF has them."""
    out = _Findings()
    try:
        checkpoint = Gguf.open(path)
    except InputError as e:
        out.add("error", "file", None, str(e))
        return out.listed()
    for note in checkpoint.notes:
        out.add("warning", "metadata", None, note)
    _member(_said(checkpoint), out)
    _words(checkpoint, out)
    _yarn(checkpoint.cfg, out)
    for name in checkpoint.missing:
        out.add("error", "missing tensors", name, "the metadata call for it, no part has it")
    for name in checkpoint.unread:
        out.add("warning", "tensors never read", name, "nothing in the network is called that")
    _gguf_values(checkpoint, out)
    _router(checkpoint, list(checkpoint.tensors), out)
    return out.listed()


def _folder(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; lint takes a checkpoint's folder")
    return path


def _watched(names: Iterable[str], size: Callable[[str], int]) -> Iterator[str]:
    """The names, with a bar of bytes on a terminal."""
    names = list(names)
    total, quiet = sum(map(size, names)), not sys.stderr.isatty()
    with tqdm(total=total, unit="B", unit_scale=True, disable=quiet, leave=False) as bar:
        for name in names:
            yield name
            bar.update(size(name))


def _read(file: Path, out: _Findings) -> dict[str, Any]:
    """A JSON object beside the weights; nothing if it is not there, and an error if it is none."""
    try:
        return read_object(file) if file.exists() else {}
    except InputError as e:
        out.add("error", "files", None, str(e))
        return {}


def _of(part: float, whole: float) -> str:
    return f"{100 * part / whole:.2g} %" if part else "none"


# --- shards


def _gather(folder: Path, out: _Findings) -> dict[str, Stored]:
    """Every tensor of the folder that the index knows, by canonical name; damage is a finding."""
    weight_map: dict[str, str] = _object(_read(folder / INDEX, out).get("weight_map"))
    if not all(isinstance(f, str) for f in weight_map.values()):
        out.add("error", "files", None, f"{folder / INDEX}: weight_map has other than file names")
        weight_map = {}
    files = {file.name: file for file in sorted(folder.glob("*.safetensors"))}
    for shard, count in Counter(weight_map.values()).items():
        if shard not in files:  # also one outside the folder, which is not looked for
            text = f"shard {shard!r} of {INDEX} is not in the folder; {count} tensors are lost"
            out.add("error", "shards", None, text)
    tensors: dict[str, Stored] = {}
    strays: list[Stored] = []
    seen: set[tuple[str, str]] = set()
    for shard, file in files.items():
        try:
            header = read_header(file)
        except InputError as e:
            out.add("error", "shards", None, str(e))
            continue
        for stored in header.values():
            seen.add((stored.name, shard))
            if weight_map and weight_map.get(stored.name) != shard:
                strays.append(stored)
            elif other := tensors.get(canonical(stored.name)):
                _twice(stored, other, "refmoe refuses it", "error", out)
            else:
                tensors[canonical(stored.name)] = stored
    for stored in strays:
        where = weight_map.get(stored.name, "nothing of it")
        text = f"in {stored.file.name}, {INDEX} says {where}"
        out.add("warning", "stray tensors", stored.name, text)
        if other := tensors.get(canonical(stored.name)):
            _twice(stored, other, "engines that read whole shards", "warning", out)
    for name, shard in weight_map.items():
        if shard in files and (name, shard) not in seen:
            out.add("error", "absent tensors", name, f"not in {shard}, though {INDEX} says so")
    return tensors


def _twice(a: Stored, b: Stored, who: str, mild: Level, out: _Findings) -> None:
    same = (a.dtype, a.shape) == (b.dtype, b.shape) and _same_bytes(_mapped(a), _mapped(b))
    text = f"in {a.file.name} and, as {b.name}, in {b.file.name} ({who}): "
    text += "the same bytes" if same else "different values, the last one read wins"
    out.add(mild if same else "error", "tensors stored twice", a.name, text)


def _mapped(t: Stored) -> np.ndarray:
    if not t.nbytes:
        return np.zeros(0, np.uint8)
    return np.memmap(t.file, np.uint8, "r", t.start, (t.nbytes,))


def _same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two contiguous arrays hold the same bytes, a piece at a time."""
    if a.nbytes != b.nbytes:
        return False
    x, y = (m.reshape(-1).view(np.uint8) for m in (a, b))
    pieces = range(0, len(x), 4 * TILE)
    return all(np.array_equal(x[i : i + 4 * TILE], y[i : i + 4 * TILE]) for i in pieces)


# --- config

SHAPE = (
    "hidden_size",
    "num_hidden_layers",
    "first_k_dense_replace",
    "moe_layer_freq",
    "num_attention_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "intermediate_size",
    "moe_intermediate_size",
    "n_routed_experts",
    "n_shared_experts",
    "vocab_size",
)
MATHS = (  # another value is another function
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "topk_method",
    "scoring_func",
    "norm_topk_prob",
    "routed_scaling_factor",
    "hidden_act",
    "attention_bias",
    "tie_word_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling.type",
    "rope_scaling.factor",
    "rope_scaling.original_max_position_embeddings",
    "rope_scaling.beta_fast",
    "rope_scaling.beta_slow",
    "rope_scaling.mscale",
    "rope_scaling.mscale_all_dim",
)
USE = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
DEFAULTS = {  # what Config takes for an absent field
    "moe_layer_freq": 1,
    "first_k_dense_replace": 0,
    "n_shared_experts": 0,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "q_lora_rank": None,
}
NEAR = 2  # fields of the shape in which a derived model may differ and is still recognised
IM_END = "<|im_end|>"  # ends a turn in every K2 template


@cache
def published() -> dict[str, dict[str, Any]]:
    """Fields of each member's published config; what is not known is not there.

    Sources: those of weights/members.py. K2-Instruct-0905 (62 shards, factor 64, betas 1/1, 256K):
    ParagEkbote/hf-model-inspector, model_inspection_report.md; its eps and ids were not seen.
    K2.7-Code has K2.6's fields: ai-dynamo/aiconfigurator, nvidia--Kimi-K2.7-Code-NVFP4_config.json.
    K2-Thinking's values that differ from K2.5's: NVIDIA/Model-Optimizer, speculative/eagle/
    default_config.py; THUDM/slime, scripts/models/kimi-k2-thinking.sh.
    """
    out = {}
    for name, member in members.MEMBERS.items():
        raw = json.loads((members.HERE / f"{member.config}.json").read_text("utf-8"))
        out["k2.6 or k2.7-code" if name == "k2.6" else name] = _fields(member.edit(raw))
    later = {**out["k2-instruct"], "rope_scaling.factor": 64.0, "max_position_embeddings": 262144}
    unknown = ("rms_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id")
    out["k2-instruct-0905"] = {k: v for k, v in later.items() if k not in unknown}
    return out


def _fields(raw: dict[str, Any]) -> dict[str, Any]:
    """The fields of config.json that matter, flat, whichever wrapper and spelling they are in."""
    text = raw.get("text_config") or raw
    rope = _object(text.get("rope_parameters") or text.get("rope_scaling"))
    scheme = _object(text.get("quantization_config") or raw.get("quantization_config"))
    out = {k: text.get(k, DEFAULTS.get(k)) for k in (*SHAPE, *MATHS, *USE)}
    if isinstance(eos := out["eos_token_id"], list) and len(eos) == 1:
        out["eos_token_id"] = eos[0]
    out["rope_theta"] = rope.get("rope_theta", text.get("rope_theta"))
    kind = rope.get("rope_type", rope.get("type", "default"))
    out |= {k: rope.get(k.partition(".")[2]) for k in MATHS if "." in k}
    out["rope_scaling.type"] = kind
    out["quantization"] = scheme.get("quant_method", "none")
    optional = ("q_lora_rank", "quantization")
    return {k: v for k, v in out.items() if v is not None or k in optional}


def _said(checkpoint: Checkpoint) -> dict[str, Any]:
    """The same of a checkpoint; a GGUF's formats are its tensors' own matter."""
    if not isinstance(checkpoint, Gguf):
        return _fields(read_object(checkpoint.path / "config.json"))
    tensors, out = checkpoint.tensors, _fields(checkpoint.raw_config())
    head, embedding = (tensors.get(f"{n}.weight") for n in ("lm_head", "model.embed_tokens"))
    out["tie_word_embeddings"] = head is not None and head == embedding
    absent = [] if checkpoint.cfg.eos_token_id else ["eos_token_id"]
    return {k: v for k, v in out.items() if k not in ("quantization", *absent)}


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _config(folder: Path, out: _Findings) -> Config | None:
    """Constants, ids and the two files that state them; None if the graph cannot do it."""
    raw = read_object(folder / "config.json")
    try:
        cfg = Config.from_dict(raw)
    except InputError as e:
        out.add("error", "config", None, f"config.json: {e}")
        cfg = None
    text = raw.get("text_config") or raw
    if not isinstance(text, dict):
        return None
    _member(_fields(raw), out)
    if "rope_parameters" in text and "rope_scaling" not in text:
        note = "YaRN is in rope_parameters alone: engines that look for rope_scaling have none"
        out.add("note", "config", None, f"{note} (red-hat-data-services/vllm-cpu efe1b6e07)")
    _stops(folder, raw, text, out)
    return cfg


def _member(found: dict[str, Any], out: _Findings) -> None:
    """The nearest published member, and each field that departs from it."""
    said = {*SHAPE, *MATHS, *USE, *found}  # of a GGUF without the quantisation
    departs = {
        name: [k for k, v in fields.items() if k in said and found.get(k) != v and k not in USE]
        for name, fields in published().items()
    }

    def shape(name: str) -> int:
        return sum(k in SHAPE for k in departs[name])

    def distance(name: str) -> tuple[int, int, int]:
        ids = sum(k in found and found[k] != v for k, v in published()[name].items() if k in USE)
        return shape(name), len(departs[name]), ids

    nearest = min(departs, key=distance)
    if shape(nearest) > NEAR:
        out.add("note", "config", None, "no published member has this shape: constants not judged")
        return
    names = " or ".join(n for n in departs if distance(n) == distance(nearest))
    exact = shape(nearest) == 0
    mark = "" if exact else f"shape but for {shape(nearest)} fields; "
    out.add("note", "config", None, f"the {mark or 'shape '}nearest published member is {names}")
    for key, value in published()[nearest].items():
        ours = found.get(key)
        if ours == value or key not in said or (key in USE and ours is None):
            continue
        level: Level = "error" if exact and key in MATHS else "warning"
        level = "note" if key == "quantization" else level
        text = "is absent" if ours is None and key in MATHS else f"= {ours!r}"
        out.add(level, f"config.{key}", None, f"{key} {text}, published {names} has {value!r}")


def _stops(folder: Path, raw: dict[str, Any], inner: dict[str, Any], out: _Findings) -> None:
    """Ids that end a turn: config.json, its text_config and generation_config.json must agree."""
    said = {"config.json": _ids(raw, out)}
    if inner is not raw:
        said["text_config"] = _ids(inner, out)
    said["generation_config.json"] = _ids(_read(folder / "generation_config.json", out), out)
    said = {where: ids for where, ids in said.items() if ids}
    if len({frozenset(ids) for ids in said.values()}) > 1:
        each = ", ".join(f"{where} {list(ids)}" for where, ids in said.items())
        text = f"eos_token_id differs: {each}; an engine that reads one of them may never stop"
        out.add("warning", "eos", None, f"{text} (K2-Instruct was published so)")
    stops = {i for ids in said.values() for i in ids}
    added = _object(_read(folder / "tokenizer_config.json", out).get("added_tokens_decoder"))
    named = {_object(t).get("content"): int(i) for i, t in added.items() if i.isdecimal()}
    size = inner.get("vocab_size")
    if isinstance(size, int):
        for i in sorted(i for i in stops if i >= size):
            out.add("error", "ids", None, f"eos_token_id {i} is outside the vocabulary of {size}")
        for name, i in named.items():
            if i >= size:  # K2's first tokenization_kimi.py reserved 258 ids for 256
                text = f"special token {name} has id {i}, vocab_size is {size}"
                out.add("warning", "ids", None, text)
    end = named.get(IM_END)
    if end is not None and end not in stops:
        text = f"{IM_END} is {end} and in no eos_token_id ({sorted(stops)}): turns do not end"
        out.add("warning", "eos", None, f"{text} in engines that stop at those alone")


def _ids(raw: dict[str, Any], out: _Findings) -> tuple[int, ...]:
    try:
        return as_ids(raw.get("eos_token_id"))
    except InputError as e:
        out.add("error", "ids", None, str(e))
        return ()


def _words(checkpoint: Gguf, out: _Findings) -> None:
    """A GGUF's vocabulary and the ids of its special tokens."""
    size, tokens = checkpoint.cfg.vocab_size, checkpoint.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) != size:
        text = f"tokenizer.ggml.tokens are {len(tokens)}, vocab_size is {size}"
        out.add("error", "ids", None, f"{text}: llama.cpp takes the first for the second")
    for name, i in checkpoint.ids.items():
        if not 0 <= i < size:
            text = f"{name} has id {i}, outside the vocabulary of {size}"
            out.add("error", "ids", None, f"{text}: llama.cpp puts another in its place")


def _two_configs(a: Checkpoint, b: Checkpoint, out: _Findings) -> None:
    ours, theirs = _said(a), _said(b)
    gguf = isinstance(a, Gguf) or isinstance(b, Gguf)
    for key in sorted(set(ours) | set(theirs), key=[*SHAPE, *MATHS, *USE, "quantization"].index):
        x, y = ours.get(key), theirs.get(key)
        if x == y or (gguf and (key == "quantization" or _one_in_a_gguf(key, x, y))):
            continue
        level: Level = "warning" if key in USE else "error"
        level = "note" if key == "quantization" else level
        text = f"{key} = {theirs.get(key, 'absent')!r}, {a.path} has {ours.get(key, 'absent')!r}"
        out.add(level, f"config.{key}", None, text)


def _one_in_a_gguf(key: str, x: Any, y: Any) -> bool:
    """Whether they differ only because a GGUF has float32 numbers, and one end of a turn."""
    if isinstance(x, float) and isinstance(y, float):
        return np.float32(x) == np.float32(y)
    ends = [ids if isinstance(ids, list) else [ids] for ids in (x, y)]
    return key == "eos_token_id" and min(map(len, ends)) == 1 and bool({*ends[0]} & {*ends[1]})


# --- YaRN, as engines take it from the config


class Engine(NamedTuple):
    name: str
    source: str
    betas: tuple[float, float] | None = None  # used whatever the config says
    one_mscale: bool = False  # takes mscale to be mscale_all_dim
    short: bool = False  # the softmax scale has mscale² only where the allocated length is longer


ENGINES = (
    Engine(
        "refmoe, transformers",
        "huggingface/transformers models/deepseek_v3/modeling_deepseek_v3.py",
    ),
    Engine("Moonshot", "modeling_deepseek.py of K2-Instruct, as in mfarisadip/Kimi-K2-Mini"),
    Engine("DeepSeek", "deepseek-ai/DeepSeek-V3 inference/model.py", short=True),
    Engine(
        "vLLM",
        "vllm-project/vllm layers/rotary_embedding/deepseek_scaling_rope.py, models/deepseek_v2.py",
    ),
    Engine("SGLang", "sgl-project/sglang srt/models/deepseek_v2.py"),
    Engine(
        "llama.cpp",
        "ggml-org/llama.cpp src/llama-context.cpp, src/models/deepseek2.cpp, #18013",
        betas=(32.0, 1.0),
        one_mscale=True,
    ),
    Engine(
        "KTransformers",
        "kvcache-ai/ktransformers operators/RoPE.py, models/modeling_deepseek_v3.py",
    ),
    Engine("mlx-lm", "ml-explore/mlx-lm mlx_lm/models/deepseek_v3.py"),
)


def _yarn(cfg: Config, out: _Findings) -> None:
    yarn = cfg.rope_scaling
    scale = softmax_scale(cfg)
    if yarn is None:
        text = f"no YaRN: theta {cfg.rope_theta:g}, softmax scale {scale:.6f} in every engine"
        out.add("note", "yarn", None, text)
        return
    gain = _mscale(yarn, yarn.mscale) / _mscale(yarn, yarn.mscale_all_dim)
    for e in ENGINES:
        low, high = _ramp(cfg, yarn, e.betas or (yarn.beta_fast, yarn.beta_slow))
        short = (
            f" ({1 / sqrt(cfg.qk_head_dim):.6f} if not more than "
            f"{yarn.original_max_position_embeddings} positions are allocated)"
        )
        text = (
            f"YaRN in {e.name}: ramp {low} to {high}, softmax scale {scale:.6f}"
            f"{short if e.short else ''}, cos and sin x{1.0 if e.one_mscale else gain:.6g}"
        )
        out.add("note", "yarn", None, f"{text} [{e.source}]")
        if e.betas:
            _other_betas(cfg, yarn, e, out)
        if e.one_mscale and gain != 1:
            text = f"{e.name}: GGUF has no key for mscale; cos and sin lack the factor {gain:.6g}"
            out.add("warning", "YaRN", None, text)
    given = cfg.max_position_embeddings / yarn.original_max_position_embeddings
    if given != yarn.factor:
        text = (
            f"max_position_embeddings / original_max_position_embeddings = {given:g}, factor is "
            f"{yarn.factor:g}: some transformers versions take the quotient (transformers#40320)"
        )
        out.add("warning", "YaRN", None, text)


def _mscale(yarn: Yarn, m: float) -> float:
    return 0.1 * m * log(yarn.factor) + 1 if yarn.factor > 1 else 1.0


def _ramp(cfg: Config, yarn: Yarn, betas: tuple[float, float]) -> tuple[int, int]:
    """low and high of model/rope.py."""
    R, L = cfg.qk_rope_head_dim, yarn.original_max_position_embeddings
    fast, slow = (R * log(L / (2 * pi * n)) / (2 * log(cfg.rope_theta)) for n in betas)
    return max(floor(fast), 0), min(ceil(slow), R - 1)


def _other_betas(cfg: Config, yarn: Yarn, e: Engine, out: _Findings) -> None:
    ratio = inv_freq(cfg, e.betas) / inv_freq(cfg)
    wrong = np.flatnonzero(np.abs(ratio - 1) > 1e-12)
    if len(wrong):
        worst = wrong[np.abs(np.log(ratio[wrong])).argmax()]
        assert e.betas is not None
        text = (
            f"{e.name}'s deepseek2 takes beta_fast, beta_slow = {e.betas[0]:g}, {e.betas[1]:g} for "
            f"{yarn.beta_fast:g}, {yarn.beta_slow:g}: {len(wrong)} of {len(ratio)} frequencies are "
            f"wrong, number {worst} by x{1 / ratio[worst]:.3g} (measured in llama-cpp-python "
            "0.3.36; older GGUFs lack the keys too: ggml-org/llama.cpp#18013)"
        )
        out.add("warning", "YaRN", None, text)


# --- names, shapes, dtypes


def _names(checkpoint: Checkpoint, out: _Findings) -> list[str]:
    """The names that are there as the config has them; whatever else is there is a finding."""
    cfg, tensors = checkpoint.cfg, checkpoint.tensors
    unread, missing = dict.fromkeys(tensors), 0
    fit: list[str] = []
    for name, shape, dtypes in expected(cfg):
        stored = tensors.get(name)
        if stored is None:
            missing += 1
            out.add("error", "missing tensors", name, "missing")
            if missing > MISSING_LIMIT:
                out.add("error", "config", None, "config.json is another model's")
                break
            continue
        del unread[name]
        if stored.shape != shape:
            text = f"shape {list(stored.shape)}, config.json makes it {list(shape)}"
            text += ": transposed" if stored.shape == shape[::-1] else ""
            out.add("error", "shapes", stored.name, text)
        elif stored.dtype not in dtypes:
            text = f"dtype {stored.dtype}, expected {' or '.join(dtypes)}"
            out.add("error", "dtypes", stored.name, text)
        else:
            fit.append(name)
    extra = [name for name in unread if known_extra(name, cfg)]
    for name in unread:
        if not known_extra(name, cfg):
            out.add("warning", "unread tensors", tensors[name].name, "never read")
    if extra:
        text = f"{len(extra)} tensors beside the text model (vision, MTP, left-over tables)"
        out.add("note", "extra", None, text)
    apart = []
    for name in fit:
        weight = tensors.get(re.sub(r"_scale$", "_packed", name.removesuffix("_scale_inv")))
        if weight and name.endswith(("_scale", "_scale_inv")) and weight.file != tensors[name].file:
            apart.append(name)
    if apart:
        text = f"{len(apart)} scales are in another shard than their weight, first {apart[0]}"
        out.add("note", "apart", None, f"{text}; converters that go by shard miss them")
    return fit


# --- values


def _label(checkpoint: Checkpoint, name: str) -> str:
    """A tensor as the file has it; of a GGUF, whose experts lie in one, as a checkpoint has it."""
    return name if isinstance(checkpoint, Gguf) else checkpoint.tensors[name].name


class Bits(NamedTuple):
    """A float format by the bits of its magnitude."""

    dtype: Any
    infinity: int  # from here on not finite
    normal: int  # the least that is not subnormal


BITS = {
    "F64": Bits(np.uint64, 0x7FF << 52, 1 << 52),
    "F32": Bits(np.uint32, 0xFF << 23, 1 << 23),
    "F16": Bits(np.uint16, 0x1F << 10, 1 << 10),
    "BF16": Bits(np.uint16, 0xFF << 7, 1 << 7),
    "F8_E5M2": Bits(np.uint8, 0x1F << 2, 1 << 2),
    "F8_E4M3": Bits(np.uint8, 0x7F, 1 << 3),
}
MANY_SUBNORMAL = 0.1


@dataclass
class Scan:
    n: int = 0
    nonfinite: int = 0
    first: int = -1  # flat index of the first that is not finite
    zeros: int = 0
    subnormal: int = 0


def _scan(x: np.ndarray, bits: Bits) -> Scan:
    """Kinds of numbers in a tensor, by integer operations on pieces of it."""
    out, flat = Scan(), x.reshape(-1).view(bits.dtype)
    magnitude = np.iinfo(bits.dtype).max >> 1
    for start in range(0, len(flat), TILE):
        m = flat[start : start + TILE] & bits.dtype(magnitude)
        bad = m >= bits.dtype(bits.infinity)
        count = int(np.count_nonzero(bad))
        if count and out.first < 0:
            out.first = start + int(bad.argmax())
        zeros = len(m) - int(np.count_nonzero(m))
        out.n += len(m)
        out.nonfinite += count
        out.zeros += zeros
        out.subnormal += int(np.count_nonzero(m < bits.dtype(bits.normal))) - zeros
    return out


def _values(checkpoint: Checkpoint, fit: list[str], out: _Findings) -> None:
    """Read every tensor once; those that do not fit the config as plain numbers."""
    tensors = checkpoint.tensors
    prints: dict[bytes, str] = {}
    packed: dict[str, Int4Facts] = {}
    ok = set(fit)
    for name in _watched(tensors, lambda name: tensors[name].nbytes):
        stored = tensors[name]
        if not stored.nbytes:
            continue
        x = checkpoint.array(name)
        if stored.dtype in BITS:
            _floats(name, x, checkpoint, out)
        if name not in ok:
            continue
        if name.endswith(".weight_packed") and name.replace("_packed", "_scale") in ok:
            _int4(name, checkpoint, packed, out)
        if name.endswith(".weight_scale_inv") and name.removesuffix("_scale_inv") in ok:
            _fp8(name, checkpoint, out)
        if tensor_class(name, checkpoint.cfg) == "norms":
            _gain(name, checkpoint, out)
        _copies(name, x, checkpoint, prints, out)
    for kind, facts in packed.items():
        facts.note(kind, out)
    _q4_0(list(packed.values()), out)


def _floats(name: str, x: np.ndarray, checkpoint: Checkpoint, out: _Findings) -> None:
    stored, label = checkpoint.tensors[name], _label(checkpoint, name)
    seen = _scan(x, BITS[stored.dtype])
    if seen.nonfinite:
        at = [int(i) for i in np.unravel_index(seen.first, stored.shape)]
        what = "NaN codes" if stored.dtype == "F8_E4M3" else "values that are not finite"
        text = f"{seen.nonfinite:,} {what}, first at {at}"
        out.add("error", "not finite", label, text, seen.nonfinite)
    if seen.zeros == seen.n:
        bias = name.endswith(("e_score_correction_bias", ".bias"))
        mild = bias or known_extra(name, checkpoint.cfg)
        text = "all zero: never written or never loaded?"
        out.add("warning" if mild else "error", "all zero", label, text)
    # subnormal e4m3 is what a block with an outlier looks like
    elif stored.dtype != "F8_E4M3" and seen.subnormal > MANY_SUBNORMAL * seen.n:
        text = f"{_of(seen.subnormal, seen.n)} of its values are subnormal: another dtype's bytes?"
        out.add("warning", "subnormal", label, text, seen.subnormal)


def _gain(name: str, checkpoint: Checkpoint, out: _Findings) -> None:
    """A norm's gains: trained ones vary and, but for a few, are positive."""
    w, label = _named(checkpoint, name), _label(checkpoint, name)
    if len(w) < 8 or not np.isfinite(w).all() or not w.any():
        return
    if (w == w[0]).all():
        text = f"every gain is {w[0]:g}: the initial value, never loaded?"
        out.add("warning", "norms", label, text)
    elif abs(np.median(w)) < 0.05 and 0.2 < np.mean(w < 0) < 0.8:
        text = f"gains lie around 0 (median {np.median(w):.2g}): stored less 1, as x·(1 + w) wants?"
        out.add("warning", "norms", label, text)


def _copies(
    name: str, x: np.ndarray, checkpoint: Checkpoint, prints: dict[bytes, str], out: _Findings
) -> None:
    """Two tensors of the graph with the same bytes: trained ones are never alike."""
    raw = x.reshape(-1).view(np.uint8)
    if len(raw) < 64:
        return
    n, size = len(raw), x.itemsize
    middle = n // 2 // size * size
    pieces = [raw[:4096], raw[middle : middle + 4096], raw[max(0, n - 4096) :]]
    if all(len(np.unique(p[: len(p) // size * size].view(x.dtype))) == 1 for p in pieces):
        return  # constant: zeros, initial gains
    seen = blake2b(b"".join(p.tobytes() for p in pieces) + str((n, x.dtype)).encode()).digest()
    other = prints.setdefault(seen, name)
    if other != name and _same_bytes(x, checkpoint.array(other)):
        text = f"the same bytes as {_label(checkpoint, other)}"
        out.add("warning", "copies", _label(checkpoint, name), text)


# --- INT4


@dataclass
class Int4Facts:
    """Codes and scales of one kind of matrix, all layers and experts."""

    tensors: int = 0
    bytes: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))  # two codes each
    scales: int = 0
    least: float = np.inf
    largest: float = 0.0
    subnormal: int = 0  # in float16, exact or not
    inexact: int = 0  # changed by float16, too large ones included

    @property
    def codes(self) -> np.ndarray:
        """How often each code is used, -8 to 7."""
        two = self.bytes.reshape(16, 16)
        return two.sum(axis=0) + two.sum(axis=1)

    def note(self, kind: str, out: _Findings) -> None:
        c, n = self.codes, int(self.codes.sum())
        text = (
            f"{kind}: {self.tensors:,} tensors, {n:,} codes: -8 {_of(c[0], n)}, "
            f"±7 {_of(c[1] + c[15], n)}, 0 {_of(c[8], n)}; "
            f"scales {self.least:.3g} to {self.largest:.3g}"
        )
        out.add("note", "INT4", None, text)


def _int4(name: str, checkpoint: Checkpoint, packed: dict[str, Int4Facts], out: _Findings) -> None:
    """Codes and scales of one matrix; what is odd is a finding, the rest is summed by kind."""
    module = name.removesuffix(".weight_packed")
    stored, scale = checkpoint.tensors[name], checkpoint.tensors[module + ".weight_scale"]
    m = Int4(checkpoint.array(name), checkpoint.array(module + ".weight_scale"))
    facts = packed.setdefault(re.sub(r"\.\d+\.", ".*.", module), Int4Facts())
    facts.tensors += 1
    untouched = lost = negative = inexact = large = 0
    for _, tile in tiles(m, TILE):
        assert isinstance(tile, Int4)
        O, G = tile.scale.shape
        words = np.ascontiguousarray(tile.packed).reshape(O, G, -1)
        s = widen_bf16(tile.scale)
        facts.bytes += _histogram(words)
        empty = ~words.any(axis=-1)  # [O, G] every code -8: bytes that nobody wrote
        untouched += int(np.count_nonzero(empty))
        if not s.all():  # words of 0x88888888 hold codes of 0
            lost += int(np.count_nonzero((s == 0) & (words.view(np.uint32) != 0x88888888).any(-1)))
        negative += int(np.count_nonzero((s < 0) & np.isfinite(s)))
        size = np.abs(s[np.isfinite(s)])
        with np.errstate(over="ignore"):
            half = size.astype(np.float16).astype(np.float32)
        inexact += int(np.count_nonzero(half != size))
        large += int(np.count_nonzero(half == np.inf))
        facts.subnormal += int(np.count_nonzero((size > 0) & (size < 2.0**-14)))
        facts.scales += s.size
        facts.least = min(facts.least, float(size.min(initial=np.inf)))
        facts.largest = max(facts.largest, float(size.max(initial=0)))
    facts.inexact += inexact
    groups = m.scale.size
    for level, kind, where, count, text in (
        ("error", "untouched codes", stored, untouched, "have every code at -8: never packed"),
        ("error", "lost scales", scale, lost, "have codes, and a scale of 0"),
        ("error", "negative scales", scale, negative, "have a negative scale"),
        ("warning", "scales beyond float16", scale, large, "have a scale above float16's 65504"),
        ("warning", "scales float16 rounds", scale, inexact - large, "change in float16 (Q4_0)"),
    ):
        if count:
            text = f"{count:,} of {groups:,} groups {text}"
            out.add(level, kind, where.name, text, count / groups)  # type: ignore[arg-type]
    shape = checkpoint.tensors.get(module + ".weight_shape")
    if shape and checkpoint.array(module + ".weight_shape").tolist() != list(m.shape):
        said = checkpoint.array(module + ".weight_shape").tolist()
        text = f"says {said}, weight_packed holds {list(m.shape)}"
        out.add("error", "weight_shape", shape.name, text)


def _histogram(x: np.ndarray) -> np.ndarray:
    """How often each byte occurs; counted in pairs, which halves the time."""
    flat = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    pairs = np.bincount(flat[: len(flat) & ~1].view(np.uint16), minlength=1 << 16)
    two = pairs.reshape(256, 256)
    out = two.sum(axis=0) + two.sum(axis=1)
    if len(flat) & 1:
        out[flat[-1]] += 1
    return out


def _q4_0(kinds: list[Int4Facts], out: _Findings) -> None:
    """Q4_0 is (nibble - 8)·d with d in float16: the same grid if d is the scale."""
    if not kinds:
        return
    lowest = sum(int(k.codes[0]) for k in kinds)
    n = sum(int(k.codes.sum()) for k in kinds)
    inexact, subnormal = sum(k.inexact for k in kinds), sum(k.subnormal for k in kinds)
    text = f"INT4 to Q4_0: -8 in {lowest:,} of {n:,} codes; "
    text += f"{inexact:,} scales change in float16" if inexact else "every scale survives float16"
    text += f" ({subnormal:,} as subnormals)" if subnormal else ""
    text += ": a repack is not exact" if inexact else ": a repack of codes and scales is exact"
    if not lowest:
        text += (
            "; llama.cpp's own quantiser, d = max/-8, is not (ggml-org/llama.cpp#17064): "
            "d = amax/7 is where a group holds ±7"
        )
    out.add("note", "INT4", None, text)


# --- blocks of a GGUF

HALVES = {  # where a block's float16 are, the scale first (ggml-org/llama.cpp ggml-common.h)
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS"), (0,)),
    **dict.fromkeys(("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
}


def _gguf_values(checkpoint: Gguf, out: _Findings) -> None:
    """Read every tensor once, experts one by one."""
    tensors = checkpoint.tensors
    types: Counter[str] = Counter()
    prints: dict[bytes, str] = {}
    kinds: dict[str, Q4Facts] = {}
    places = set()
    for name in _watched(tensors, lambda name: tensors[name].nbytes):
        t = tensors[name]
        if (t.file, t.start) in places:  # the head that is the embedding
            continue
        places.add((t.file, t.start))
        types[t.dtype] += 1
        x = checkpoint.array(name)
        if t.dtype in BITS:
            _floats(name, x, checkpoint, out)
        else:
            _blocks(name, checkpoint, kinds, out)
        if tensor_class(name, checkpoint.cfg) == "norms":
            _gain(name, checkpoint, out)
        _copies(name, x, checkpoint, prints, out)
    told = ", ".join(f"{n:,} {kind}" for kind, n in types.most_common())
    out.add("note", "types", None, f"{told}, experts counted one by one")
    for kind, facts in kinds.items():
        facts.note(kind, out)


@dataclass
class Q4Facts:
    """Codes and scales of Q4_0 in one kind of matrix."""

    tensors: int = 0
    bytes: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))  # two codes each
    scales: int = 0
    negative: int = 0
    inexact: int = 0  # no bf16

    def note(self, kind: str, out: _Findings) -> None:
        two = self.bytes.reshape(16, 16)
        c = two.sum(axis=0) + two.sum(axis=1)
        n = int(c.sum())
        text = (
            f"{kind}: {self.tensors:,} of Q4_0, {n:,} codes: -8 {_of(c[0], n)}, "
            f"±7 {_of(c[1] + c[15], n)}, 0 {_of(c[8], n)}; of {self.scales:,} scales "
            f"{_of(self.negative, self.scales)} negative, {_of(self.inexact, self.scales)} no bf16"
        )
        if not c[0] and not self.negative and not self.inexact:
            text += ": as a repack of INT4 leaves them (amax/7), and it goes back exactly"
        elif self.negative:
            text += ": as llama.cpp's quantiser leaves them (d = max/-8), so not a repack of INT4"
        out.add("note", "Q4_0", None, text)


def _blocks(name: str, checkpoint: Gguf, kinds: dict[str, Q4Facts], out: _Findings) -> None:
    """Scales of a quantised tensor; of types whose float16 lie elsewhere, the values."""
    t = checkpoint.tensors[name]
    places = HALVES.get(t.dtype)
    if places is None:
        try:
            m = checkpoint.matrix(name.removesuffix(".weight"))
        except InputError as e:  # of a type that nothing decodes
            out.add("error", "types", name, str(e))
            return
        bad = sum(int((~np.isfinite(dequantize(tile))).sum()) for _, tile in tiles(m, TILE))
        if bad:
            out.add("error", "not finite", name, f"{bad:,} values are not finite", bad)
        return
    blocks = checkpoint.array(name).reshape(-1, block_of(t)[1])
    halves = [np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16)[:, 0] for at in places]
    bad = sum(int((~np.isfinite(half)).sum()) for half in halves)
    if bad:
        out.add("error", "not finite", name, f"{bad:,} scales are not finite", bad)
    if not any(half.any() for half in halves):
        out.add("error", "all zero", name, "every scale is zero: never written?")
        return
    if t.dtype in ("Q4_0", "Q8_0"):
        _codes(name, t.dtype, blocks[:, 2:], halves[0], kinds, out)


def _codes(
    name: str,
    dtype: str,
    codes: np.ndarray,
    d: np.ndarray,
    kinds: dict[str, Q4Facts],
    out: _Findings,
) -> None:
    """codes [n, 16] of Q4_0, two nibbles a byte, or [n, 32] of Q8_0; scales d [n]."""
    zero = d == 0
    lost = codes[zero] != (0x88 if dtype == "Q4_0" else 0)  # the code of 0
    unwritten, others, equal, negative = 0, lost.any(axis=1), 0, 0
    if dtype == "Q4_0":
        empty = np.logical_not(codes.any(axis=1))
        unwritten, equal = int(empty[zero].sum()), int(empty[~zero].sum())
        others &= codes[zero].any(axis=1)
        kind = re.sub(r"\.\d+\.", ".*.", name.removesuffix(".weight"))
        facts = kinds.setdefault(kind, Q4Facts())
        facts.tensors += 1
        for i in range(0, len(codes), TILE // 16):
            facts.bytes += _histogram(codes[i : i + TILE // 16])
        wide = d[np.isfinite(d)].astype(np.float32)
        facts.scales += len(d)
        facts.negative += int((wide < 0).sum())
        facts.inexact += int((round_bf16(wide) != wide).sum())
    else:
        negative = int((d < 0).sum())
    for level, what, count, text in (
        ("error", "unwritten blocks", unwritten, "are nothing but zero bytes: never written"),
        ("error", "negative scales", negative, "have a negative scale, which no quantiser makes"),
        ("warning", "lost scales", int(others.sum()), "have codes, and a scale of 0"),
        ("warning", "untouched codes", equal, "have every code at -8: equal weights, or no codes"),
    ):
        if count:
            text = f"{count:,} of {len(d):,} blocks {text}"
            out.add(level, what, name, text, count / len(d))  # type: ignore[arg-type]


# --- FP8

ABSURD, SANE = 100.0, 10.0  # RMS of a weight


def _fp8(name: str, checkpoint: Checkpoint, out: _Findings) -> None:
    """Block scales: positive, and the right way up."""
    stored, weight = checkpoint.tensors[name], name.removesuffix("_scale_inv")
    if checkpoint.tensors[weight].dtype != "F8_E4M3":
        return
    s = np.asarray(checkpoint.array(name), np.float64)  # not finite: found among all floats
    for count, what in (
        (int((s == 0).sum()), "0"),
        (int(((s < 0) & np.isfinite(s)).sum()), "negative"),
    ):
        if count:
            text = f"{count:,} of {s.size:,} block scales are {what}"
            out.add("error", f"block scales {what}", stored.name, text, count / s.size)
    good = s[np.isfinite(s) & (s > 0)]
    if not good.size:
        return
    bits = checkpoint.array(weight)
    hist = sum(_histogram(bits[i : i + 1024]) for i in range(0, len(bits), 1024))
    squares = np.nan_to_num(E4M3.astype(np.float64)) ** 2
    code = sqrt(float((hist * squares).sum()) / bits.size)
    up, down = (code * sqrt(float((scale**2).mean())) for scale in (good, 1 / good))
    if up > ABSURD and down < SANE:
        text = f"weights have RMS {up:.2g} times the scale, {down:.2g} divided by it: inverted?"
        out.add("error", "inverted scales", stored.name, text, up)


# --- router


def _router(checkpoint: Checkpoint, fit: list[str], out: _Findings) -> None:
    """Gate rows of every layer; then the bias, in the layer where bf16 hurts most."""
    cfg, ok = checkpoint.cfg, set(fit)
    worst: tuple[float, str, str] | None = None
    seen = 0
    for i in range(cfg.num_hidden_layers):
        gate = f"model.layers.{i}.mlp.gate."
        names = gate + "weight", gate + "e_score_correction_bias"
        if not cfg.is_moe(i) or not ok.issuperset(names):
            continue
        _gate_rows(_label(checkpoint, names[0]), _named(checkpoint, names[0]), out)
        stored, bias = checkpoint.tensors[names[1]], _named(checkpoint, names[1])
        label = _label(checkpoint, names[1])
        if not np.isfinite(bias).all() or not bias.any():
            continue
        if stored.dtype in ("BF16", "F16"):
            text = (
                f"stored as {stored.dtype}, {len(np.unique(bias))} distinct values for "
                f"{len(bias)} experts; published is F32, and near ties flip in less "
                "(huggingface/transformers#42580)"
            )
            out.add("warning", "router bias", label, text)
            continue
        rounded = round_bf16(bias.astype(np.float32))
        facts = _rounding(checkpoint, i, bias, rounded)
        seen += 1
        if worst is None or facts[0] > worst[0]:
            worst = (*facts, label)
    if worst:
        text = f"{worst[1]}; the worst of {seen} layers. Engines must keep it in float32"
        refs = "(huggingface/transformers#42580, sgl-project/sglang#31213)"
        out.add("note", "router bias", worst[2], f"{text} {refs}")


def _rounding(
    checkpoint: Checkpoint, layer: int, bias: np.ndarray, rounded: np.ndarray
) -> tuple[float, str]:
    """What another bias does to the choice: share of tokens, and in words."""
    before, after = _ties(bias), _ties(rounded)
    share = _flips(checkpoint, layer, bias, rounded)
    text = (
        f"in bf16 {len(np.unique(bias))} distinct values become {len(np.unique(rounded))}, "
        f"{after - before} pairs of experts become equal, and {share:.1%} of tokens choose other "
        f"experts, by {DRAWS:,} draws of logits ~ N(0, |w_e|²)"
    )
    return share, text


def _ties(bias: np.ndarray) -> int:
    counts = np.unique(bias, return_counts=True)[1]
    return int((counts * (counts - 1) // 2).sum())


def _flips(checkpoint: Checkpoint, layer: int, bias: np.ndarray, other: np.ndarray) -> float:
    """Share of drawn tokens whose set of experts differs under another bias.

    x after the norm has unit RMS but for the gain g, so that a logit has the variance |w_e·g|² if
    its directions are random; correlations of the gate's rows are left out. The draw is seeded.
    """
    cfg, nx = checkpoint.cfg, policy("float64")
    at = f"model.layers.{layer}."
    gate = _named(checkpoint, at + "mlp.gate.weight")  # [E, D]
    norm = at + "post_attention_layernorm.weight"
    stored = checkpoint.tensors.get(norm)
    gain = _named(checkpoint, norm) if stored and stored.shape == gate.shape[1:] else 1.0
    spread = np.sqrt(((gate * gain) ** 2).sum(axis=1))  # [E]
    if not np.isfinite(spread).all():
        return 0.0
    z = np.random.default_rng(layer).standard_normal((DRAWS, len(spread))) * spread
    s, K = sigmoid(z), cfg.num_experts_per_tok
    top = []
    for b in (bias, other):
        score, _ = limit_groups(s + b, cfg, nx)
        chosen = np.argsort(-score, axis=-1, kind="stable")[:, :K]
        top.append(np.sort(chosen, axis=-1))
    return float((top[0] != top[1]).any(axis=-1).mean())


def _gate_rows(label: str, gate: np.ndarray, out: _Findings) -> None:
    """A row of the gate is an expert's: none may be constant, no two alike."""
    if not gate.any():
        return  # all zero: already said
    first: dict[bytes, int] = {}
    for e, row in enumerate(gate):
        if (row == row[0]).all():
            text = f"row {e} is {'zero' if row[0] == 0 else 'constant'}: expert {e} has no gate"
            out.add("error", "gate rows", label, f"{text} (vllm-project/vllm#36190)")
        elif (other := first.setdefault(row.tobytes(), e)) != e:
            text = f"row {e} is row {other} again: two experts are always chosen alike"
            out.add("warning", "gate rows", label, text)


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


def _two_checkpoints(a: Checkpoint, b: Checkpoint, out: _Findings) -> None:
    """Every tensor of both; equal ones are counted by class, the others named."""
    ours, theirs = _keys(a), _keys(b)
    there = set(theirs)
    for key in sorted(set(ours) - there):
        extra = known_extra(key, a.cfg)
        kind = "extra tensors only here" if extra else "tensors the other lacks"
        out.add("note" if extra else "error", kind, key, f"not in {b.path}")
    unnamed = set(b.unread) - b.tensors.keys() if isinstance(b, Gguf) else set()
    for key in sorted((there - set(ours)) | unnamed):
        extra = known_extra(key, b.cfg)
        kind = "extra tensors only there" if extra else "tensors only the other has"
        out.add("note" if extra else "warning", kind, key, f"only in {b.path}")

    def size(key: str) -> int:
        return sum(c.tensors[n].nbytes for c in (a, b) for n in _stored(c, key))

    equal: dict[tuple[str, str], list[float]] = {}
    wrong = 0
    for key in _watched([key for key in ours if key in there], size):
        try:
            x, y = _matrix(a, key), _matrix(b, key)
            found = _compare(x, y)
        except (KeyError, ValueError, IndexError) as e:  # a part is missing or of a wrong shape
            out.add("error", "damaged tensors", key, f"cannot be compared: {e}")
            continue
        kinds = dict.fromkeys((_kind(a, key), _kind(b, key)))
        if found.verdict == "wrong":
            wrong += 1
            cause = found.cause or (_cause(key, x, y, a) if wrong <= CAUSES else None)
            if cause is None and _quantised(x, y) and x.shape == y.shape and wrong <= CAUSES:
                likely = quant.likely(key.removesuffix(".weight"), a, x, y)
                cause = None if likely is None else (likely, likely)
            category, text = cause or ("wrong", "no simple cause found")
            how = f"relative error {found.error:.2g}: " if found.error is not None else ""
            how = f"shape {list(y.shape)} for {list(x.shape)}: " if x.shape != y.shape else how
            out.add("error", category, key, how + text, found.error or np.inf)
        else:
            kind = f"{tensor_class(key, a.cfg)}, {' and '.join(kinds)}"
            equal.setdefault((found.verdict, kind), []).append(found.error or 0.0)
            if found.verdict != "the same bits" and key.endswith("e_score_correction_bias"):
                _two_biases(a, b, key, out)
    for (verdict, kind), errors in sorted(equal.items()):
        worst = f", relative error up to {max(errors):.2g}" if max(errors) else ""
        out.add("note", verdict + kind, None, f"{verdict}: {len(errors):,} of {kind}{worst}")


def _stored(checkpoint: Checkpoint, key: str) -> list[str]:
    names = [key + part for part in ("", "_packed", "_scale", "_scale_inv")]
    if isinstance(checkpoint, Gguf) and key.endswith(".kv_b_proj.weight"):
        names += [key.replace(".kv_b_proj.weight", half) for half in KV_HALVES]
    return [name for name in names if name in checkpoint.tensors]


def _kind(checkpoint: Checkpoint, key: str) -> str:
    match _matrix(checkpoint, key):
        case Int4():
            return "INT4"
        case Fp8Block():
            return "FP8"
        case _:
            tensors = checkpoint.tensors
            return "/".join(dict.fromkeys(tensors[name].dtype for name in _stored(checkpoint, key)))


def _two_biases(a: Checkpoint, b: Checkpoint, key: str, out: _Findings) -> None:
    bias, other = _named(a, key), _named(b, key)
    layer = re.match(r"model\.layers\.(\d+)\.mlp\.gate\.", key)
    if (
        (bias == other).all()
        or not layer
        or key.replace("e_score_correction_bias", "weight") not in a.tensors
    ):
        return
    share = _flips(a, int(layer[1]), bias, other)
    text = (
        f"rounded to {b.tensors[key].dtype}: {len(np.unique(bias))} distinct values are "
        f"{len(np.unique(other))}, and {share:.1%} of tokens choose other experts, by {DRAWS:,} "
        "draws of logits ~ N(0, |w_e|²); it must stay F32 (huggingface/transformers#42580)"
    )
    out.add("warning", "router bias", key, text, share)


class Compared(NamedTuple):
    verdict: str  # the same bits, the same values, rounded, within a step; or wrong
    error: float | None = None  # of the second, relative to the first in the 2-norm
    cause: tuple[str, str] | None = None  # category and text


def _compare(a: Matrix, b: Matrix) -> Compared:
    if _same_parts(a, b):
        return Compared("the same bits")
    if a.shape != b.shape:
        return Compared("wrong")
    if not _is_float(a) or not _is_float(b):
        return Compared("wrong", cause=("bits", "not the same bits, and no numbers to compare"))
    exact = np.float32 if _fits_float32(a) and _fits_float32(b) else np.float64
    aa = ab = dd = 0.0
    equal = near = step = True
    with np.errstate(invalid="ignore", over="ignore"):
        for p, q in _tile_pairs(a, b):
            x, y = dequantize(p, exact), dequantize(q, exact)
            if np.array_equal(x, y):  # most tiles, and the rest of the sums is for what differs
                square = float(np.vdot(x, x))
                aa, ab = aa + square, ab + square
                continue
            if exact is np.float32 and _rounds_to_bf16(p, x, q, y):
                equal = False
                aa, ab = aa + float(np.vdot(x, x)), ab + float(np.vdot(x, y))
                dd += float(np.vdot(x - y, x - y))
                continue
            x, y = x.astype(np.float64), y.astype(np.float64)
            same = (x == y) | (np.isnan(x) & np.isnan(y))
            d = np.where(same, 0.0, np.abs(x - y))
            fine = _fine(p, x, q) + _fine(q, y, p)
            equal = equal and bool(same.all())
            near = near and bool((d <= fine).all())
            step = step and bool((d <= fine + _coarse(p, q) + _coarse(q, p)).all())
            aa, ab, dd = aa + (x * x).sum(), ab + (x * y).sum(), dd + (d * d).sum()
    if equal:
        return Compared("the same values")
    error = sqrt(dd / aa) if aa > 0 and np.isfinite(dd / aa) else None
    if _coded(a) or _coded(b):
        step = error is not None and error <= quant.LOOSE
    if near:
        return Compared("equal but for rounding", error)
    if aa > 0 and np.isfinite(ab):
        factor = ab / aa
        # a rounded scale is off by up to 2^-9 as a whole: not a factor anyone multiplied by
        if abs(factor - 1) > 2.0**-8 and factor != 0 and _scaled(a, b, factor):
            return Compared("wrong", error, ("factor", f"the right one times {factor:.4g}"))
    return Compared("within a quantisation step" if step else "wrong", error)


def _rounds_to_bf16(a: Matrix, x: np.ndarray, b: Matrix, y: np.ndarray) -> bool:
    """The commonest rounding, four times quicker than looking for it in general."""
    if isinstance(a, BF16) == isinstance(b, BF16):
        return False
    wide, narrow = (x, y) if isinstance(b, BF16) else (y, x)
    return np.array_equal(round_bf16(wide), narrow)


def _fits_float32(m: Matrix) -> bool:
    """A code of INT4 times a bf16 scale has 11 significant bits; e4m3 times float32 has 28."""
    if isinstance(m, Heads):
        return _fits_float32(m.k_b) and _fits_float32(m.v_b)
    return not isinstance(m, Fp8Block) and not (isinstance(m, np.ndarray) and m.dtype == np.float64)


def _same_parts(a: Matrix, b: Matrix) -> bool:
    if type(a) is not type(b) or a.shape != b.shape:
        return False
    parts = zip(_arrays(a), _arrays(b), strict=True)
    return all(x.dtype == y.dtype and _same_bytes(x, y) for x, y in parts)


def _arrays(m: Matrix) -> list[np.ndarray]:
    match m:
        case BF16(bits):
            return [bits]
        case Int4(packed, scale):
            return [packed, scale]
        case Fp8Block(bits, scale, _):
            return [bits, scale]
        case Q8(blocks) | Q4(blocks) | Coded(blocks):
            return [blocks]
        case Heads(k_b, v_b):
            return [*_arrays(k_b), *_arrays(v_b)]
        case Tiled():  # of a store; what is checked is mapped
            return [dequantize(m)]
        case _:
            return [m]


def _is_float(m: Matrix) -> bool:
    return not isinstance(m, np.ndarray) or np.issubdtype(m.dtype, np.floating)


def _tile_pairs(a: Matrix, b: Matrix) -> Iterator[tuple[Matrix, Matrix]]:
    if len(a.shape) < 2 or isinstance(a, Heads) or isinstance(b, Heads):  # whose rows are columns
        yield a, b
        return
    blocked = a if isinstance(a, Fp8Block) or not isinstance(b, Fp8Block) else b
    for tile, _ in tiles(blocked, TILE // 4):  # several float64 arrays of this size are alive
        yield rows(a, tile), rows(b, tile)


def _scaled(a: Matrix, b: Matrix, factor: float) -> bool:
    """Whether b is a times a factor, both as exactly as they are stored."""
    # a scale in bf16 was rounded once more; else the fit is off by less than roundings are
    unit = 2.0**-8 if isinstance(a, Int4) or isinstance(b, Int4) else 2.0**-12
    for p, q in _tile_pairs(a, b):
        x, y = factor * _wide(p), _wide(q)
        bound = abs(factor) * _fine(p, x / factor, q) + _fine(q, y, p) + unit * np.abs(x)
        if not (np.abs(x - y) <= bound).all():
            return False
    return True


def _quantised(*each: Matrix) -> bool:
    return any(isinstance(m, Q8 | Q4 | Coded | Heads) for m in each)


def _coded(m: Matrix) -> bool:
    """Whether nobody here knows its steps."""
    return isinstance(m, Coded) or (isinstance(m, Heads) and (_coded(m.k_b) or _coded(m.v_b)))


def _one_grid(a: Matrix, b: Matrix) -> bool:
    """Whether both have codes of one kind, so that only scales may have been rounded."""
    return type(a) is type(b) or (isinstance(a, Int4 | Q4) and isinstance(b, Int4 | Q4))


def _by_half(
    m: Heads, other: Matrix, of: Callable[[Matrix, Matrix], np.ndarray | float]
) -> np.ndarray:
    """What `of` says of each number, whose two halves are stored apart."""
    others = (other.k_b, other.v_b) if isinstance(other, Heads) else (other, other)
    pairs = zip((m.k_b, m.v_b), others, strict=True)
    halves = [np.broadcast_to(of(half, its), half.shape) for half, its in pairs]
    return _wide(Heads(halves[0], halves[1], m.heads))


PRECISION = {"float16": (11, -14), "float32": (24, -126), "float64": (53, -1022)}


def _fine(m: Matrix, w: np.ndarray, other: Matrix) -> np.ndarray | float:
    """Half a step of the plain type; where both are quantised alike, of their scales."""
    if isinstance(m, Heads):
        return _by_half(m, other, lambda half, its: _fine(half, _wide(half), its))
    if isinstance(m, Int4 | Fp8Block | Q8 | Q4 | Coded | Tiled):
        unit = {Int4: 2.0**-8, Fp8Block: 2.0**-24}.get(type(m), 2.0**-11)
        return unit * np.abs(w) if _one_grid(m, other) else 0.0
    digits, least = (8, -126) if isinstance(m, BF16) else PRECISION[m.dtype.name]
    exponent = np.where(w == 0, least, np.frexp(w)[1] - 1)
    return np.ldexp(1.0, np.maximum(exponent, least) - digits)


def _coarse(m: Matrix, other: Matrix) -> np.ndarray | float:
    """Half a quantisation step [O, I], as far as a weight may be from its code.

    Two tensors quantised alike have no such excuse: codes that differ are other weights.
    """
    match m:
        case Heads():
            return _by_half(m, other, _coarse)
        case _ if _one_grid(m, other):
            return 0.0
        case Int4(_, scale):
            s = np.abs(widen_bf16(scale).astype(np.float64))
            return np.repeat(s * (0.5 + 8 / 256), 32, axis=1)
        case Q4() | Q8():
            return quant.half_step(m, _wide(m))
        case Fp8Block(bits, scale, (r, c)):
            exponent = np.maximum((np.arange(256) & 0x7F) >> 3, 1)
            half = np.ldexp(1.0, exponent - 11)  # 3 bits of fraction, bias 7
            O, I = bits.shape
            s = np.repeat(np.repeat(np.abs(scale), r, axis=0)[:O], c, axis=1)[:, :I]
            return half[bits] * s * (1 + 1e-6)
        case _:
            return 0.0


# --- what a wrong tensor is


class Seen(NamedTuple):
    values: np.ndarray
    bound: np.ndarray  # how far the number meant may be from the one stored

    def moved(self, move: Callable[[np.ndarray], np.ndarray]) -> "Seen":
        return Seen(move(self.values), move(self.bound))

    def is_(self, other: "Seen") -> bool:
        if self.values.shape != other.values.shape:
            return False
        return bool((np.abs(self.values - other.values) <= self.bound + other.bound).all())


def _see(m: Matrix, other: Matrix) -> Seen:
    w = _wide(m)
    return Seen(w, np.broadcast_to(_fine(m, w, other) + _coarse(m, other), w.shape))


def _cause(key: str, a: Matrix, b: Matrix, ours: Checkpoint) -> tuple[str, str] | None:
    """The first simple cause that turns our tensor into theirs: category and text."""
    if prod(b.shape) > CAUSE_LIMIT or not _is_float(a) or not _is_float(b):
        return None
    with np.errstate(all="ignore"):  # values that are not finite are equal to nothing
        return _sought(key, a, b, ours)


def _sought(key: str, a: Matrix, b: Matrix, ours: Checkpoint) -> tuple[str, str] | None:
    x, y = _see(a, b), _see(b, a)
    if not y.values.any():
        return "all zero", "all zero: never loaded?"
    for text, move in _moves(key, x.values.shape, ours.cfg):
        if x.moved(move).is_(y):
            return text, text
    if found := _misread(a, b, x, y):
        return found
    for category, other in _others(key, ours):
        m = _matrix(ours, other)
        if m.shape == b.shape and _first_row(m, b) and _see(m, b).is_(y):
            return category, f"{category}: it is our {other}"
    return None


def _moves(
    key: str, shape: tuple[int, ...], cfg: Config
) -> Iterator[tuple[str, Callable[[np.ndarray], np.ndarray]]]:
    """The same numbers in another order."""
    if len(shape) < 2:
        return
    O, I = shape
    yield "transposed", lambda w: w.T
    if O % 2 == 0:
        yield "halves of its rows swapped", lambda w: np.roll(w, O // 2, axis=0)
    for text, order in _rope_orders(key, O, cfg):
        yield text, lambda w, order=order: w[order]  # type: ignore[misc]
    if I % 32 == 0:
        c = np.arange(I)
        for text, order in (
            ("nibbles swapped in each byte", c ^ 1),
            ("nibbles read from the highest of each word", c ^ 7),
            ("bytes of each word reversed", c ^ 6),
            ("nibbles in Q4_0's order, j beside j + 16", c // 32 * 32 + c % 2 * 16 + c % 32 // 2),
            ("Q4_0's nibbles taken as consecutive", c // 32 * 32 + c % 16 * 2 + c % 32 // 16),
        ):
            yield text, lambda w, order=order: w[:, order]  # type: ignore[misc]


def _rope_orders(key: str, O: int, cfg: Config) -> Iterator[tuple[str, np.ndarray]]:
    """Rows of the rotated channels taken from pairs to halves, or back."""
    R = cfg.qk_rope_head_dim
    if key.endswith(("q_b_proj.weight", "q_proj.weight")) and O % cfg.qk_head_dim == 0:
        head = cfg.qk_head_dim
    elif key.endswith("kv_a_proj_with_mqa.weight"):
        head = O
    else:
        return
    halves = np.concatenate((np.arange(0, R, 2), np.arange(1, R, 2)))
    for text, turn in (
        ("rows of the rotated channels permuted from pairs to halves", halves),
        ("rows of the rotated channels permuted from halves to pairs", np.argsort(halves)),
    ):
        order = np.arange(O).reshape(-1, head)
        order[:, head - R :] = order[:, head - R :][:, turn]
        yield text, order.reshape(-1)


def _misread(a: Matrix, b: Matrix, x: Seen, y: Seen) -> tuple[str, str] | None:
    """The same stored numbers taken for others: zero point, sign, scale, offset."""
    if x.values.shape != y.values.shape:
        return None
    for m, w, v in ((a, x, y), (b, y, x)):
        match m:
            case Int4() | Q4():
                s = quant.signed_steps(m)
                k = np.rint(np.median((v.values - w.values)[s != 0] / s[s != 0])) if s.any() else 0
                if k and Seen(w.values + k * s, w.bound).is_(v):
                    return "zero point", f"codes read with an offset of {8 - k:.0f} instead of 8"
                signed = np.where(w.values * np.sign(s) < 0, 8 * s, -8 * s)
                if Seen(w.values + signed, w.bound).is_(v):
                    text = "codes read as two's complement instead of offset by 8"
                    return "signed nibbles", text
            case Fp8Block(bits, scale, (r, c)):
                O, I = bits.shape
                s = np.repeat(np.repeat(scale, r, axis=0)[:O], c, axis=1)[:, :I].astype(np.float64)
                if Seen(w.values / s, w.bound / s).is_(v):
                    return "no scale", "its codes without their block scales"
                if Seen(w.values / s**2, w.bound / s**2).is_(v):
                    return "inverted scales", "codes divided by weight_scale_inv"
    if x.values.ndim == 1:
        k = float(np.median(y.values - x.values))
        if Seen(x.values + k, x.bound + 2.0**-52 * abs(k)).is_(y):
            return "offset", f"the right one plus {k:.6g}"
    return None


def _others(key: str, ours: Checkpoint) -> Iterator[tuple[str, str]]:
    """Tensors this one may have been confused with."""
    for one, two in (("gate_proj", "up_proj"), ("up_proj", "gate_proj")):
        if key.endswith(f".{one}.weight"):
            yield "gate and up swapped", key.replace(f".{one}.", f".{two}.")
    expert = re.match(r"(model\.layers\.\d+\.mlp\.experts\.)(\d+)(\..*)", key)
    if expert:
        for e in range(ours.cfg.n_routed_experts):
            other = f"{expert[1]}{e}{expert[3]}"
            if e != int(expert[2]) and _stored(ours, other):
                yield "another expert's", other


def _first_row(a: Matrix, b: Matrix) -> bool:
    """Whether the first rows (of FP8, the first block's) could be the same: cheap to look at."""
    first = slice(0, min(128, a.shape[0]) if isinstance(a, Fp8Block) else 1)
    if isinstance(b, Fp8Block):
        first = slice(0, min(b.block[0], b.shape[0]))
    p, q = rows(a, first), rows(b, first)
    return _see(p, q).is_(_see(q, p))
