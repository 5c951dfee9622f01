"""Which points feed which: the layer of model/decoder.py as a graph of names.

The oracle judges a point from the engine's tensors that it is made of; where the dump lacks one,
its own makers take its place, and the report says through which.
"""

import re
from collections.abc import Collection, Iterator
from functools import cache

from refmoe.config import Config

ATTENTION = {
    "q_a_proj": ("input_layernorm",),
    "q_a_layernorm": (".q_a_proj",),
    "q_b_proj": (".q_a_layernorm",),
    "q_proj": ("input_layernorm",),
    "kv_a_proj_with_mqa": ("input_layernorm",),
    "kv_a_layernorm": (".kv_a_proj_with_mqa",),
    "kv_b_proj": (".kv_a_layernorm",),
    "#q_pe": (".q_b_proj", ".q_proj"),
    "#k_pe": (".kv_a_proj_with_mqa",),
    "#q_latent": (".q_b_proj", ".q_proj"),
    "#scores": (".q_b_proj", ".q_proj", "#q_pe", "#k_pe", ".kv_b_proj", "#q_latent"),
    "#probs": ("#scores",),
    "#context_latent": ("#probs", ".kv_a_layernorm"),
    "#context": ("#probs", ".kv_b_proj", "#context_latent"),
    "o_proj": ("#context",),
    "": (".o_proj",),
}
SWIGLU = {"gate_proj": (), "up_proj": (), "act": (".gate_proj", ".up_proj"), "down_proj": (".act",)}


def parents(path: str, cfg: Config) -> Iterator[str]:
    """The points that this one is computed from; some exist only in other forms of the graph."""
    last = cfg.num_hidden_layers - 1
    if path == "lm_head":
        yield "model.norm"
    elif path == "model.norm":
        yield f"model.layers.{last}"
    elif path.startswith("model.layers."):
        number, _, name = path.removeprefix("model.layers.").partition(".")
        number, mark, tail = number.partition("#")
        at = f"model.layers.{number}"
        before = f"model.layers.{int(number) - 1}" if int(number) else "model.embed_tokens"
        yield from _layer(at, before, mark + tail + name.split("@")[0])


def _layer(at: str, before: str, name: str) -> Iterator[str]:
    if name == "":
        yield from (f"{at}#attn_residual", f"{at}.mlp")
    elif name == "input_layernorm":
        yield before
    elif name == "#attn_residual":
        yield from (before, f"{at}.self_attn")
    elif name == "post_attention_layernorm":
        yield f"{at}#attn_residual"
    elif name.startswith("self_attn"):
        own = f"{at}.self_attn"
        for parent in ATTENTION[name.removeprefix("self_attn").removeprefix(".")]:
            yield f"{at}.{parent}" if parent == "input_layernorm" else own + parent
    else:
        yield from _mlp(f"{at}.mlp", f"{at}.post_attention_layernorm", name[len("mlp") :])


def _mlp(own: str, x: str, name: str) -> Iterator[str]:
    if name == "":
        yield from (f"{own}.down_proj", f"{own}.experts", f"{own}.shared_experts")
    elif name == ".gate":
        yield x
    elif name == ".gate#experts":
        yield f"{own}.gate"
    elif name == ".gate#weights":
        yield from (f"{own}.gate", f"{own}.gate#experts")
    elif name == ".experts":
        yield from (x, f"{own}.gate#experts", f"{own}.gate#weights")
    elif name == ".shared_experts":
        yield f"{own}.shared_experts.down_proj"
    else:
        module, _, end = name.rpartition(".")
        makers = SWIGLU.get(end, ())
        yield from ((own + module + maker for maker in makers) if makers else (x,))


def through(path: str, known: Collection[str], order: Collection[str], cfg: Config) -> list[str]:
    """Points on the way from the `known` ones to this one, in the `order` they are computed in."""
    found: set[str] = set()
    todo = list(parents(path, cfg))
    while todo:
        point = todo.pop()
        if point not in known and point in order and point not in found:
            found.add(point)
            todo += parents(point, cfg)
    return [p for p in order if p in found]


@cache
def kind(path: str) -> str:
    """A point's name without the numbers of layer and expert."""
    return re.sub(r"\.\d+(?=[.#]|$)", "", path)
