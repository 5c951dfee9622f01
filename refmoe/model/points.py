"""The points and taps of the network: one table, in the order in which they are computed.

A *point* is a place where real engines write a tensor to memory (`Numerics.point`), a *tap* one
that they keep wide (`Numerics.tap`). A row of `POINTS` says for each what it is called, its axes in
the letters of config.py, the points that it is computed from, and how often an engine may round
inside the operation that ends there. Layers are written L and routed experts E:

    model.layers.L.self_attn.q_a_proj        [T, A]
    model.layers.L.mlp.experts.E.act         [rows of E, F]

Which rows a model has depends on its config and on the form of attention (`points`). A path in a
dump is such a name with numbers, and with `@i` behind it if it is of one of several prompts
(`parse`). docs/points.md is this table, written by `python -m refmoe.model.points docs/points.md`.
"""

import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from math import prod
from pathlib import Path
from typing import NamedTuple

from refmoe.config import Config

LAYER = "model.layers.L"
SWIGLU = ("gate_proj", "up_proj", "act", "down_proj")  # the points of an MLP, in order
BEFORE = "the layer's input"  # stands for the layer before, or for model.embed_tokens
LAST = "the last layer"


class Point(NamedTuple):
    """One row of the table."""

    name: str
    axes: tuple[str, ...]
    parents: tuple[str, ...]  # what it is computed from, in every form of the graph
    tap: bool = False  # shown, and never rounded
    roundings: int = 1  # that an engine may make inside the operation, the last one included
    where: str = ""  # a key of `WHERE`, or the form of attention; empty: always there


WHERE: dict[str, Callable[[Config, int], bool]] = {
    "": lambda cfg, i: True,
    "low-rank queries": lambda cfg, i: cfg.q_lora_rank is not None,
    "full-rank queries": lambda cfg, i: cfg.q_lora_rank is None,
    "dense": lambda cfg, i: not cfg.is_moe(i),
    "mixture": lambda cfg, i: cfg.is_moe(i),
    "shared": lambda cfg, i: cfg.is_moe(i) and cfg.n_shared_experts > 0,
}
FORMS = ("expanded", "absorbed")  # of attention


def _never(cfg: Config, i: int) -> bool:
    return False


AXES: dict[str, Callable[[Config], int]] = {
    "D": lambda c: c.hidden_size,
    "H": lambda c: c.num_attention_heads,
    "A": lambda c: c.q_lora_rank or 0,
    "C": lambda c: c.kv_lora_rank,
    "R": lambda c: c.qk_rope_head_dim,
    "C+R": lambda c: c.kv_lora_rank + c.qk_rope_head_dim,
    "H(N+R)": lambda c: c.num_attention_heads * c.qk_head_dim,
    "H(N+V)": lambda c: c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim),
    "HV": lambda c: c.num_attention_heads * c.v_head_dim,
    "E": lambda c: c.n_routed_experts,
    "K": lambda c: c.num_experts_per_tok,
    "F": lambda c: c.moe_intermediate_size,
    "n_shared·F": lambda c: c.moe_intermediate_size * c.n_shared_experts,
    "dense width": lambda c: c.intermediate_size,
    "Z": lambda c: c.vocab_size,
}  # but T, S and "rows of E", which depend on the tokens


def _swiglu(at: str, rows: str, width: str, where: str) -> tuple[Point, ...]:
    x = f"{LAYER}.post_attention_layernorm"
    gate, up, act = (f"{at}.{name}" for name in SWIGLU[:3])
    return (
        Point(gate, (rows, width), (x,), where=where),
        Point(up, (rows, width), (x,), where=where),
        # sigmoid, silu, product
        Point(act, (rows, width), (gate, up), roundings=3, where=where),
        Point(f"{at}.down_proj", (rows, "D"), (act,), where=where),
    )


_A, _M = f"{LAYER}.self_attn", f"{LAYER}.mlp"
_Q = f"{_A}.q_b_proj", f"{_A}.q_proj"
_IN, _X = f"{LAYER}.input_layernorm", f"{LAYER}.post_attention_layernorm"
_GATE, _CHOICE, _WEIGHTS = f"{_M}.gate", f"{_M}.gate#experts", f"{_M}.gate#weights"
_SCORED = (*_Q, f"{_A}#q_pe", f"{_A}#k_pe", f"{_A}.kv_b_proj", f"{_A}#q_latent")

POINTS = (
    Point("model.embed_tokens", ("T", "D"), ()),
    # roundings of a norm: of the quotient, of the product with the gain, of x where it was wide
    Point(_IN, ("T", "D"), (BEFORE,), roundings=3),
    Point(
        f"{_A}.q_proj", ("T", "H(N+R)"), (f"{LAYER}.input_layernorm",), where="full-rank queries"
    ),
    Point(f"{_A}.q_a_proj", ("T", "A"), (f"{LAYER}.input_layernorm",), where="low-rank queries"),
    Point(f"{_A}.q_a_layernorm", ("T", "A"), (f"{_A}.q_a_proj",), False, 3, "low-rank queries"),
    Point(f"{_A}.q_b_proj", ("T", "H(N+R)"), (f"{_A}.q_a_layernorm",), where="low-rank queries"),
    Point(f"{_A}.kv_a_proj_with_mqa", ("T", "C+R"), (_IN,)),
    Point(f"{_A}.kv_a_layernorm", ("T", "C"), (f"{_A}.kv_a_proj_with_mqa",), roundings=3),
    # cos, sin, two products, a sum
    Point(f"{_A}#q_pe", ("T", "H", "R"), _Q, roundings=5),
    Point(f"{_A}#k_pe", ("T", "R"), (f"{_A}.kv_a_proj_with_mqa",), roundings=5),
    Point(f"{_A}.kv_b_proj", ("S", "H(N+V)"), (f"{_A}.kv_a_layernorm",), where="expanded"),
    Point(f"{_A}#q_latent", ("T", "H", "C"), _Q, where="absorbed"),
    # the two products, the scaling
    Point(f"{_A}#scores", ("T", "H", "S"), _SCORED, tap=True, roundings=3),
    Point(f"{_A}#probs", ("T", "H", "S"), (f"{_A}#scores",), tap=True, roundings=2),
    Point(
        f"{_A}#context_latent",
        ("T", "H", "C"),
        (f"{_A}#probs", f"{_A}.kv_a_layernorm"),
        where="absorbed",
    ),
    Point(
        f"{_A}#context",
        ("T", "HV"),
        (f"{_A}#probs", f"{_A}.kv_b_proj", f"{_A}#context_latent"),
    ),
    Point(f"{_A}.o_proj", ("T", "D"), (f"{_A}#context",)),
    Point(_A, ("T", "D"), (f"{_A}.o_proj",)),
    Point(f"{LAYER}#attn_residual", ("T", "D"), (BEFORE, _A)),
    Point(_X, ("T", "D"), (f"{LAYER}#attn_residual",), roundings=3),
    *_swiglu(_M, "T", "dense width", "dense"),
    Point(_GATE, ("T", "E"), (_X,), True, 4, "mixture"),
    Point(_CHOICE, ("T", "K"), (_GATE,), True, 1, "mixture"),
    # sigmoid, sum, quotient, scaling
    Point(_WEIGHTS, ("T", "K"), (_GATE, _CHOICE), True, 6, "mixture"),
    Point(f"{_M}.experts.E#rows", ("rows of E",), (_X,), True, 1, "mixture"),
    *_swiglu(f"{_M}.experts.E", "rows of E", "F", "mixture"),
    # weight and product of each expert, sums over K
    Point(f"{_M}.experts", ("T", "D"), (_X, _CHOICE, _WEIGHTS), False, 10, "mixture"),
    *_swiglu(f"{_M}.shared_experts", "T", "n_shared·F", "shared"),
    Point(f"{_M}.shared_experts", ("T", "D"), (f"{_M}.shared_experts.down_proj",), where="shared"),
    Point(_M, ("T", "D"), (f"{_M}.down_proj", f"{_M}.experts", f"{_M}.shared_experts")),
    Point(LAYER, ("T", "D"), (f"{LAYER}#attn_residual", _M)),
    Point("model.norm", ("T", "D"), (LAST,), roundings=3),
    Point("lm_head", ("T", "Z"), ("model.norm",)),
)
BY_NAME = {p.name: p for p in POINTS}


class Parsed(NamedTuple):
    """A path taken apart: the row's name, and what L, E and `@i` are in it."""

    name: str
    layer: int | None
    expert: int | None
    segment: int | None

    @property
    def point(self) -> Point | None:
        """The row of the table; None if the path is of no point."""
        return BY_NAME.get(self.name)


_PATH = re.compile(
    r"(?:model\.layers\.(?P<layer>\d+)(?P<rest>[.#][^@]*)?|(?P<other>[^@]*))(?:@(?P<segment>\d+))?"
)
_EXPERT = re.compile(r"\.mlp\.experts\.(\d+)(?=[.#]|$)")


@cache
def parse(path: str) -> Parsed:
    """Take a path apart: `model.layers.3.mlp.experts.5.act` → L = 3, E = 5."""
    found = _PATH.fullmatch(path)
    if found is None:
        return Parsed(path, None, None, None)
    segment = None if found["segment"] is None else int(found["segment"])
    if found["layer"] is None:
        return Parsed(found["other"], None, None, segment)
    rest = found["rest"] or ""
    expert = _EXPERT.match(rest)
    name = LAYER + _EXPERT.sub(".mlp.experts.E", rest, count=1)
    return Parsed(name, int(found["layer"]), int(expert[1]) if expert else None, segment)


@cache
def kind(path: str) -> str:
    """Return a path without its numbers: `model.layers.mlp.experts.act`."""
    return re.sub(r"\.\d+(?=[.#]|$)", "", path)


def roundings(path: str) -> int:
    """Return how often an engine may round in the operation that ends at this point."""
    point = parse(path).point
    return 1 if point is None else point.roundings


def parents(path: str, cfg: Config) -> Iterator[str]:
    """Yield the points that this one is computed from; some exist in other forms of the graph."""
    name, layer, expert, _ = parse(path)
    point = BY_NAME.get(name)
    for parent in () if point is None else point.parents:
        if parent == LAST:
            yield f"model.layers.{cfg.num_hidden_layers - 1}"
        elif parent == BEFORE:
            yield f"model.layers.{layer - 1}" if layer else "model.embed_tokens"
        else:
            yield _numbered(parent, layer, expert)


def points(cfg: Config, forms: tuple[str, ...] = ("expanded",)) -> Iterator[str]:
    """Yield the paths of one prompt's pass in the order of computation, logits last.

    `forms` are the forms of attention whose points are wanted. Every routed expert is named,
    whether a token chooses it or not.
    """
    first, *_, norm, head = POINTS
    inside = POINTS[1:-2]
    yield first.name
    for i in range(cfg.num_hidden_layers):
        here = [
            p for p in inside if (p.where in forms if p.where in FORMS else WHERE[p.where](cfg, i))
        ]
        experts = [p for p in here if ".experts.E" in p.name]
        for p in here:
            if p not in experts:
                yield _numbered(p.name, i, None)
            elif p is experts[0]:
                for e in range(cfg.n_routed_experts):
                    yield from (_numbered(q.name, i, e) for q in experts)
    yield norm.name
    yield head.name


def shape(path: str, cfg: Config, T: int, S: int, rows: int = 0) -> tuple[int, ...]:
    """Return the shape of a point: T tokens, S positions, `rows` that chose the expert."""
    counts = {"T": T, "S": S, "rows of E": rows}
    axes = _point(path).axes
    return tuple(counts[axis] if axis in counts else AXES[axis](cfg) for axis in axes)


def numbers_per_row(path: str, cfg: Config) -> float:
    """Return how many numbers a point has for each row; for each pair of rows, if S is an axis.

    Of a routed expert's point it is the mean over all rows, were each expert as likely as another.
    """
    axes = _point(path).axes
    numbers = prod(AXES[axis](cfg) for axis in axes if axis in AXES)
    if axes[0] == "rows of E":
        return numbers * cfg.num_experts_per_tok / cfg.n_routed_experts
    return numbers


def table() -> str:
    """Return docs/points.md: a row for each point, under a few words on what it all means."""
    rows = []
    for p in POINTS:
        shown = "as computed" if p.tap else "rounded by the precision"
        where = f"{p.where} attention" if p.where in FORMS else p.where or "always"
        rows.append(f"| `{p.name}` | [{', '.join(p.axes)}] | {shown} | {where} |")
    return INTRODUCTION + "\n".join(rows) + "\n"


INTRODUCTION = """\
# Points and taps

A *point* is a place where real engines write a tensor to memory: the precision rounds it there and
the watcher sees it, and may replace it. A *tap* is seen and never rounded. Names are the module
paths of the Hugging Face model; `#` stands where it has no module. L is a layer's number and E a
routed expert's. Axis letters: [refmoe/config.py](../refmoe/config.py); *rows of E* are the tokens
that chose expert E, which its `#rows` tells. With several prompts at once, what attention computes
for each alone bears `@0`, `@1`, …

The order is that of computation. *dense* and *mixture* are layers without and with routed experts,
*shared* mixtures of a model that has shared experts. Attention is expanded unless another form is
asked for. This page is written by `python -m refmoe.model.points docs/points.md`.

| point | shape | shown | where |
|---|---|---|---|
"""


def _point(path: str) -> Point:
    point = parse(path).point
    if point is None:
        raise KeyError(f"{path} is no point; docs/points.md lists them")
    return point


def _numbered(name: str, layer: int | None, expert: int | None) -> str:
    """Return the path that a row's name is in this layer and expert."""
    if layer is not None:
        name = name.replace(LAYER, f"model.layers.{layer}", 1)
    return name if expert is None else name.replace(".experts.E", f".experts.{expert}", 1)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(table(), encoding="utf-8")
