"""Write tiny random checkpoints in exactly the layout a member of the family was published in.

Names, dtypes, shard names and config.json are the published ones, only the sizes are reduced; so
what opens these opens the real ones. A member is one entry of `MEMBERS`: to add one, add an entry
(and, if no known config.json is near enough to edit, its own in members/).

Sources, in members/*.json: moonshotai/Kimi-K2-Instruct and moonshotai/Kimi-K2.5 `config.json`
(K2.6 differs in eos_token_id alone), deepseek-ai/DeepSeek-V3 and
moonshotai/Moonlight-16B-A3B-Instruct `config.json`; names and dtypes from listings of the published
tensors. K2-Thinking's own config.json was not at hand: it is K2.5's text config with the
values that differ (beta_fast 1, eos_token_id 163586), and its shards are laid out as K2.5's.
Moonlight's shard names are those of K2-Instruct, unverified.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refmoe.config import Config
from refmoe.files import InputError
from refmoe.model.matrix import bf16_bits
from refmoe.weights.synthetic.random import RESERVED, SHAPE, Tensors, draw, write, write_vocabulary

HERE = Path(__file__).with_name("members")
K2_RANKS = 163_584  # ids from here on are special, and move with the vocabulary
ROPE_TABLE = 56  # numbers of a left-over rotary table, whatever the sizes: nobody reads them

FP8_SIZES = {  # blocks are 128 x 128: sizes with several blocks and a partial last one
    **SHAPE,
    "hidden_size": 160,
    "intermediate_size": 288,
    "q_lora_rank": 136,
    "moe_intermediate_size": 144,
}
VISION_SIZES = {  # of the vision tower, which the text model never reads
    "vt_num_hidden_layers": 1,
    "vt_hidden_size": 24,
    "vt_num_attention_heads": 2,
    "vt_intermediate_size": 44,
    "mm_hidden_size": 24,
    "init_pos_emb_height": 6,
    "init_pos_emb_width": 6,
}


class Member(NamedTuple):
    """How a member was published, and the sizes of its tiny twin."""

    config: str  # the file in members/ that holds its config.json, or one near it
    sizes: dict[str, Any]  # fields of config.json, of the tiny twin
    shard: str  # file name of shard i of n
    edit: Callable[[dict[str, Any]], dict[str, Any]] | None = None  # that file → its config.json
    prefix: str = ""  # before `model.` and `lm_head.`
    vision: bool = False  # it has a vision tower and a projector
    nextn: bool = False  # it has a multi-token prediction layer behind the last one
    inv_freq: bool = False  # it has left-over rotary tables
    words: bool = True  # its vocabulary has K2's format

    def published(self) -> dict[str, Any]:
        """Return its config.json, of full size."""
        raw: dict[str, Any] = json.loads((HERE / f"{self.config}.json").read_text("utf-8"))
        return self.edit(raw) if self.edit else raw


def _edit_k2_thinking(raw: dict[str, Any]) -> dict[str, Any]:
    """Return K2-Thinking's config.json, given K2.5's."""
    text: dict[str, Any] = raw["text_config"]
    text["rope_scaling"]["beta_fast"] = 1.0
    return {**text, "eos_token_id": 163586, "transformers_version": "4.51.3"}


def _edit_k26(raw: dict[str, Any]) -> dict[str, Any]:
    """Return K2.6's config.json, given K2.5's."""
    raw["text_config"]["eos_token_id"] = raw["eos_token_id"] = 163586
    return raw


PLAIN, PADDED = "model-{i}-of-{n}.safetensors", "model-{i:05d}-of-{n:06d}.safetensors"
ONE = {**SHAPE, "n_shared_experts": 1}
WRAPPED = "language_model."  # K2.5 and later: the text model is a part of another
MEMBERS = {
    "k2-instruct": Member(
        "k2-instruct", {**FP8_SIZES, "n_shared_experts": 1}, PLAIN, inv_freq=True
    ),
    "k2-thinking": Member("k2.5", ONE, PADDED, edit=_edit_k2_thinking),
    "k2.5": Member("k2.5", ONE, PADDED, prefix=WRAPPED, vision=True),
    "k2.6": Member("k2.5", ONE, PADDED, edit=_edit_k26, prefix=WRAPPED, vision=True),
    "moonlight": Member("moonlight", {**SHAPE, "q_lora_rank": None}, PLAIN),
    "deepseek-v3": Member(
        "deepseek-v3",
        {
            **FP8_SIZES,
            "n_shared_experts": 1,
            "num_hidden_layers": 4,
            "first_k_dense_replace": 3,
            "n_routed_experts": 32,
            "num_experts_per_tok": 8,
        },
        PADDED,
        nextn=True,
        words=False,
    ),
}


def write_member(folder: str | Path, like: str, seed: int = 0) -> None:
    """Write a tiny random checkpoint in the published layout of a member into a new folder.

    The same member and seed give the same bytes. Raises `InputError` for an unknown member, and
    for a folder that is not empty.
    """
    if like not in MEMBERS:
        raise InputError(f"no member {like!r}; known: {', '.join(MEMBERS)}")
    folder, member = Path(folder), MEMBERS[like]
    raw = reduced(member)
    cfg = Config.from_dict(raw)
    tensors = draw(cfg, "bfloat16", seed)
    if member.nextn:
        tensors |= _draw_nextn(cfg, seed)
    if member.inv_freq:
        table = ("bfloat16", bf16_bits(10000.0 ** (-np.arange(ROPE_TABLE) / ROPE_TABLE)))
        names = (f"model.layers.{i}.self_attn" for i in range(cfg.num_hidden_layers))
        tensors |= {f"{name}.rotary_emb.inv_freq": table for name in names}
    files = {
        file: {member.prefix + name: tensors[name] for name in names}
        for file, names in _deal_to_shards(member, cfg, list(tensors)).items()
    }
    if member.vision:
        _add_vision(files, raw["vision_config"], seed)
    write(folder, raw, files)
    if member.words:
        write_vocabulary(folder, cfg.vocab_size - RESERVED)


def published(name: str) -> dict[str, Any]:
    """Return a member's config.json, of full size."""
    return MEMBERS[name].published()


def reduced(member: Member) -> dict[str, Any]:
    """Return the published config.json with reduced sizes, special ids moved accordingly."""
    raw = copy.deepcopy(member.published())
    text = raw.get("text_config", raw)
    text |= {key: value for key, value in member.sizes.items() if key != "first_k_dense_replace"}
    text["num_key_value_heads"] = text["num_attention_heads"]
    shift = K2_RANKS - (text["vocab_size"] - RESERVED)
    for part in (raw, text) if text is not raw else (raw,):
        for key, value in part.items():
            if key.endswith("token_id") and isinstance(value, int) and value >= K2_RANKS:
                part[key] = value - shift
    if "vision_config" in raw:
        raw["vision_config"] |= {**VISION_SIZES, "text_hidden_size": text["hidden_size"]}
    return raw


def _deal_to_shards(member: Member, cfg: Config, names: list[str]) -> dict[str, list[str]]:
    """Return which file holds which tensors, as published."""
    L = cfg.num_hidden_layers
    if member.nextn:  # cut by size: a weight and its scale may be in different shards
        n = 2 * L + 1
        cuts = [len(names) * i // n for i in range(n + 1)]
        return {member.shard.format(i=i + 1, n=n): names[cuts[i] : cuts[i + 1]] for i in range(n)}
    own_end = member.shard == PADDED  # embedding, norm and head in a shard of their own
    n = L + own_end + 2 * member.vision
    files: dict[str, list[str]] = {}
    for name in names:
        first = L + 1 if own_end else 1
        last = L + 1 if own_end else L
        layer = int(name.split(".")[2]) + 1 if ".layers." in name else None
        i = layer or (first if "embed_tokens" in name else last)
        files.setdefault(member.shard.format(i=i, n=n), []).append(name)
    return files


def _draw_nextn(cfg: Config, seed: int) -> Tensors:
    """Draw DeepSeek-V3's layer 61: a decoder layer, two norms, a projection, the shared ends."""
    L, D = cfg.num_hidden_layers, cfg.hidden_size
    raw = draw(cfg, "bfloat16", seed + 1)
    at, last = f"model.layers.{L}.", f"model.layers.{L - 1}."
    out = {at + n.removeprefix(last): t for n, t in raw.items() if n.startswith(last)}
    rng = np.random.default_rng(seed + 2)
    for name, shape in (("enorm", (D,)), ("hnorm", (D,)), ("eh_proj", (D, 2 * D))):
        out[f"{at}{name}.weight"] = ("bfloat16", bf16_bits(rng.standard_normal(shape)))
    out[at + "shared_head.norm.weight"] = raw["model.norm.weight"]
    out[at + "shared_head.head.weight"] = raw["lm_head.weight"]
    out[at + "embed_tokens.weight"] = raw["model.embed_tokens.weight"]
    return out


def _add_vision(files: dict[str, Tensors], vision: dict[str, Any], seed: int) -> None:
    """Add MoonViT and the projector, in the last two shards; the text model never reads them."""
    W, M, P = vision["vt_hidden_size"], vision["vt_intermediate_size"], vision["patch_size"]
    merged, D = 4 * vision["mm_hidden_size"], vision["text_hidden_size"]
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "mm_projector.": {
            "pre_norm": (W,),
            "proj.0": (merged, merged),
            "proj.2": (D, merged),
        },
        "vision_tower.": {
            "patch_embed.proj": (W, 3, P, P),
            "encoder.final_layernorm": (W,),
        },
    }
    for b in range(vision["vt_num_hidden_layers"]):
        block = f"encoder.blocks.{b}."
        shapes["vision_tower."] |= {
            block + "norm0": (W,),
            block + "norm1": (W,),
            block + "wqkv": (3 * W, W),
            block + "wo": (W, W),
            block + "mlp.fc0": (M, W),
            block + "mlp.fc1": (W, M),
        }
    rng = np.random.default_rng(seed + 3)
    n = len(files) + 2
    for i, (part, modules) in enumerate(shapes.items(), start=n - 1):
        tensors: Tensors = {}
        for module, shape in modules.items():
            for kind, size in (("weight", shape), ("bias", shape[:1])):
                value = ("bfloat16", bf16_bits(rng.standard_normal(size)))
                tensors[f"{part}{module}.{kind}"] = value
        if part == "vision_tower.":
            grid = (vision["init_pos_emb_height"], vision["init_pos_emb_width"], W)
            value = ("bfloat16", bf16_bits(rng.standard_normal(grid)))
            tensors[part + "patch_embed.pos_emb.weight"] = value
        files[PADDED.format(i=i, n=n)] = tensors
