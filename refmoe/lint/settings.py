"""Check config.json and its companions."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from refmoe.config import Config, as_ids
from refmoe.files import InputError, read_object
from refmoe.lint.base import Level, _Findings, _object, _read
from refmoe.weights.checkpoint import (
    Checkpoint,
)
from refmoe.weights.gguf import Gguf
from refmoe.weights.synthetic import members

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
