"""Read what config.json and its companions, or the metadata of a GGUF, say."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from refmoe.config import Config, as_ids
from refmoe.files import InputError, read_object
from refmoe.lint.base import Findings, Place
from refmoe.lint.facts.shards import as_object, read_beside
from refmoe.weights.checkpoint import Checkpoint
from refmoe.weights.gguf import Gguf
from refmoe.weights.synthetic import members

SHAPE = (  # decide shapes of tensors: who differs here is another model
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
MATHS = (  # another value is another function of the same weights
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
STORAGE = "quantization"
FIELDS = (*SHAPE, *MATHS, *USE, STORAGE)
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


@dataclass(frozen=True)
class ConfigFile:
    """A config.json as decoded, and why it cannot be served, if it cannot."""

    places: ClassVar[tuple[Place, ...]] = ("folder",)
    text: dict[str, Any]  # the fields of the text model, out of their wrapper
    refused: str | None


@dataclass(frozen=True)
class Network:
    """A config that can be served."""

    places: ClassVar[tuple[Place, ...]] = ("folder", "gguf")
    cfg: Config


@dataclass(frozen=True)
class UnreadableGguf:
    """A GGUF that cannot be opened."""

    places: ClassVar[tuple[Place, ...]] = ("gguf",)
    problem: str


@dataclass(frozen=True)
class Metadata:
    """Notes about settings that the metadata of a GGUF leave unsaid."""

    places: ClassVar[tuple[Place, ...]] = ("gguf",)
    notes: list[str]


class Departure(NamedTuple):
    """A field with another value than the published member has."""

    key: str
    value: Any  # None: absent
    published: Any
    names: str  # of the members that have it

    def __str__(self) -> str:
        text = "is absent" if self.value is None and self.key in MATHS else f"= {self.value!r}"
        return f"{self.key} {text}, published {self.names} has {self.published!r}"


@dataclass(frozen=True)
class Constants:
    """The settings of a checkpoint beside those of the published member nearest to it."""

    places: ClassVar[tuple[Place, ...]] = ("folder", "gguf")
    names: str | None  # of the nearest members; None: no member has this shape or nearly
    exact: bool  # the whole shape is that member's
    other_shape: int  # fields of the shape that differ
    departures: list[Departure]


@dataclass(frozen=True)
class Stops:
    """Ids that end a turn, as each file of a folder states them, and special tokens."""

    places: ClassVar[tuple[Place, ...]] = ("folder",)
    stated: dict[str, tuple[int, ...]]  # file → ids; without those that state none
    invalid: list[str]  # eos_token_id that are no ids
    named: dict[str, int]  # special tokens of tokenizer_config.json
    vocab_size: int | None

    @property
    def ids(self) -> set[int]:
        """Ids that end a turn in any of the files."""
        return {i for ids in self.stated.values() for i in ids}


@dataclass(frozen=True)
class Vocabulary:
    """The vocabulary of a GGUF."""

    places: ClassVar[tuple[Place, ...]] = ("gguf",)
    size: int  # rows of the embedding
    tokens: int | None  # entries of tokenizer.ggml.tokens
    ids: dict[str, int]  # special tokens that the metadata name


@dataclass(frozen=True)
class TwoConfigs:
    """Fields in which the second of two models differs from the first."""

    places: ClassVar[tuple[Place, ...]] = ("pair",)
    first: str  # path
    second: str
    differ: list[tuple[str, Any, Any]]  # field, first's value, second's; None: absent
    stated: bool  # false: the second has no config.json


@cache
def published() -> dict[str, dict[str, Any]]:
    """Return the fields of each member's published config; what is not known is left out.

    Sources: those of weights/synthetic/members.py. K2-Instruct-0905 (62 shards, factor 64, betas
    1/1, 256K): ParagEkbote/hf-model-inspector, model_inspection_report.md; its eps and ids were
    not seen. K2.7-Code has K2.6's fields: ai-dynamo/aiconfigurator,
    nvidia--Kimi-K2.7-Code-NVFP4_config.json. K2-Thinking's values that differ from K2.5's:
    NVIDIA/Model-Optimizer, speculative/eagle/default_config.py; THUDM/slime,
    scripts/models/kimi-k2-thinking.sh.
    """
    out = {}
    for name, member in members.MEMBERS.items():
        out["k2.6 or k2.7-code" if name == "k2.6" else name] = flatten(member.published())
    later = {**out["k2-instruct"], "rope_scaling.factor": 64.0, "max_position_embeddings": 262144}
    unknown = ("rms_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id")
    out["k2-instruct-0905"] = {k: v for k, v in later.items() if k not in unknown}
    return out


def flatten(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the `FIELDS` of a config.json, whichever wrapper and spelling they are in."""
    text = raw.get("text_config") or raw
    rope = as_object(text.get("rope_parameters") or text.get("rope_scaling"))
    scheme = as_object(text.get("quantization_config") or raw.get("quantization_config"))
    out = {k: text.get(k, DEFAULTS.get(k)) for k in (*SHAPE, *MATHS, *USE)}
    if isinstance(eos := out["eos_token_id"], list) and len(eos) == 1:
        out["eos_token_id"] = eos[0]
    out["rope_theta"] = rope.get("rope_theta", text.get("rope_theta"))
    kind = rope.get("rope_type", rope.get("type", "default"))
    out |= {k: rope.get(k.partition(".")[2]) for k in MATHS if "." in k}
    out["rope_scaling.type"] = kind
    out[STORAGE] = scheme.get("quant_method", "none")
    optional = ("q_lora_rank", STORAGE)
    return {k: v for k, v in out.items() if v is not None or k in optional}


def settings_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the fields of a checkpoint; without storage for a GGUF, whose tensors state it."""
    if not isinstance(checkpoint, Gguf):
        return flatten(read_object(checkpoint.path / "config.json"))
    tensors, out = checkpoint.tensors, flatten(checkpoint.raw_config())
    head, embedding = (tensors.get(f"{n}.weight") for n in ("lm_head", "model.embed_tokens"))
    out["tie_word_embeddings"] = head is not None and head == embedding
    absent = [] if checkpoint.cfg.eos_token_id else ["eos_token_id"]
    return {k: v for k, v in out.items() if k not in (STORAGE, *absent)}


def compare_with_published(found: dict[str, Any]) -> Constants:
    """Return the nearest published member, and each field that departs from it.

    Nearest: fewest departures in the shape, then in all constants, then in ids and context.
    """
    said = {*SHAPE, *MATHS, *USE, *found}  # a GGUF does not say how it is stored
    departs = {
        name: [k for k, v in fields.items() if k in said and found.get(k) != v and k not in USE]
        for name, fields in published().items()
    }

    def other_shape(name: str) -> int:
        return sum(k in SHAPE for k in departs[name])

    def distance(name: str) -> tuple[int, int, int]:
        ids = sum(k in found and found[k] != v for k, v in published()[name].items() if k in USE)
        return other_shape(name), len(departs[name]), ids

    nearest = min(departs, key=distance)
    if other_shape(nearest) > NEAR:
        return Constants(None, False, other_shape(nearest), [])
    names = " or ".join(n for n in departs if distance(n) == distance(nearest))
    differ = [
        Departure(key, found.get(key), value, names)
        for key, value in published()[nearest].items()
        if key in said and found.get(key) != value and not (key in USE and found.get(key) is None)
    ]
    return Constants(names, other_shape(nearest) == 0, other_shape(nearest), differ)


def read_stops(folder: Path, raw: dict[str, Any], findings: Findings) -> Stops:
    """Read the ids that end a turn: from config.json, its text_config, generation_config.json."""
    text = raw.get("text_config") or raw
    files = {"config.json": raw}
    if text is not raw:
        files["text_config"] = text
    files["generation_config.json"] = read_beside(folder / "generation_config.json", findings)
    stated, invalid = {}, []
    for name, content in files.items():
        try:
            if ids := as_ids(content.get("eos_token_id")):
                stated[name] = ids
        except InputError as e:
            invalid.append(str(e))
    words = read_beside(folder / "tokenizer_config.json", findings)
    added = as_object(words.get("added_tokens_decoder"))
    named = {as_object(t).get("content"): int(i) for i, t in added.items() if i.isdecimal()}
    size = text.get("vocab_size")
    return Stops(stated, invalid, named, size if isinstance(size, int) else None)  # type: ignore[arg-type]


def vocabulary_of(checkpoint: Gguf) -> Vocabulary:
    """Return the vocabulary that the metadata of a GGUF state."""
    tokens = checkpoint.metadata.get("tokenizer.ggml.tokens")
    count = len(tokens) if isinstance(tokens, list) else None
    return Vocabulary(checkpoint.cfg.vocab_size, count, checkpoint.ids)


def compare_configs(a: Checkpoint, b: Checkpoint) -> TwoConfigs:
    """Return the fields in which b differs from a, as far as both can state them."""
    first, second = str(a.path), str(b.path)
    if not isinstance(b, Gguf) and not (b.path / "config.json").exists():
        return TwoConfigs(first, second, [], stated=False)
    ours, theirs = settings_of(a), settings_of(b)
    gguf = isinstance(a, Gguf) or isinstance(b, Gguf)
    differ = []
    for key in sorted(set(ours) | set(theirs), key=FIELDS.index):
        x, y = ours.get(key), theirs.get(key)
        if x != y and not (gguf and (key == STORAGE or _same_in_gguf(key, x, y))):
            differ.append((key, x, y))
    return TwoConfigs(first, second, differ, stated=True)


def _same_in_gguf(key: str, x: Any, y: Any) -> bool:
    """Return whether x and y differ only as a GGUF must: float32 numbers, one end of a turn."""
    if isinstance(x, float) and isinstance(y, float):
        return np.float32(x) == np.float32(y)
    ends = [ids if isinstance(ids, list) else [ids] for ids in (x, y)]
    return key == "eos_token_id" and min(map(len, ends)) == 1 and bool({*ends[0]} & {*ends[1]})
