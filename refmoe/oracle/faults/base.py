"""Define a fault, how it is planted into a decoder, and how an entry of the dictionary is written.

A fault is an alteration of a decoder, made by one of four constructors:

    written    an operation's result is wrong: changed before the watcher inside sees it
    misread    the result is right, and what follows reads it wrongly: changed after that watcher
    scaled     a result is multiplied by a constant, which can be fitted
    changed    other weights, other routing, other layers

`altered(decoder, fault, layer)` is the decoder as an engine with this fault computes. It keeps
`decoder.nx.watch` as the watcher inside. With one that hands back an engine's own tensors
(replay.Replay), each operation is computed on the engine's inputs as the faulty engine would do
it: the fault whose results are the engine's is the cause. With a watcher that only records, it is
an engine with that fault. A change sees what the computation went on with so far (`Here`), so that
a point can be computed anew from earlier ones by another rule.

To add a fault, add an entry to the family whose file it belongs to, with its function above it:

    LAYERS += written(
        "logits-softcap",
        "logits are squashed by 30·tanh(x/30)",
        {"lm_head": lambda x, here: 30 * np.tanh(x / 30)},
        "owner/repo#123 owner/another#45",
    )

Points are given by the end of their name without numbers: `mlp.gate#weights`, `.experts.act`; a
layer's own output is `model.layers`. The tests then demand that it changes something, first at one
of its points, and that no other fault does the same unless `dictionary.equivalent` says so.
docs/faults.md is written anew by `python -m refmoe.oracle.faults.dictionary docs/faults.md`.

Faults are planted in runs of one prompt from its beginning, in expanded attention. What depends on
batch, chunk or rank alone is not here, because no tensor of such a run shows it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Self

import numpy as np

from refmoe.config import Config
from refmoe.model.decoder import Decoder, LayerWeights
from refmoe.model.experts import MlpWeights
from refmoe.model.numerics import Numerics, Watch
from refmoe.model.points import kind, parse

Alter = Callable[[Decoder, int | None], Decoder]  # layer it is confined to; None: all
Graded = Callable[[Decoder, int | None, float], Decoder]  # the same with a strength in (0, 1]


class Fitted(NamedTuple):
    """A factor that the engine's numbers tell: 1 in a healthy engine, `value` in a faulty one."""

    name: str
    value: Callable[[Config], float]

    def at(self, cfg: Config, strength: float) -> float:
        """Return the factor at the strength that fits best (`strength_of`), which need not be 1."""
        return 1 + strength * (self.value(cfg) - 1)


class Free(NamedTuple):
    """A constant of which engines with a fault have any value, so that it is solved for.

    Of a factor or a limit, the values are tried and the best is refined; of a position, those at
    which the engine's rows begin to be wrong are tried.
    """

    name: str  # as the answer gives it: NAME 0.25
    alter: Callable[[float], "Alter"]  # the fault with this value
    sort: Literal["factor", "position"]


@dataclass(frozen=True)
class Models:
    """Which models can have a fault: in words, and as a test of their config."""

    text: str
    holds: Callable[[Config], bool]

    def __call__(self, cfg: Config) -> bool:
        return self.holds(cfg)


ALL = Models("all", lambda cfg: True)


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong in real engines, and how to compute as they do."""

    id: str
    text: str  # a sentence for a verdict
    references: tuple[str, ...]  # where it happened
    points: tuple[str, ...]  # ends of the names of points at which it shows first
    alter: Alter
    strength: Graded | None = None  # where it can be had in part
    fitted: Fitted | None = None
    where: Models = ALL
    predicts: bool = True  # False: its numbers cannot be foretold, so that no replay confirms it
    by: Literal["result", "reading", "weights"] = "result"  # what the engine has wrong
    free: Free | None = None  # where it has a constant that is no one's in particular


class Family:
    """The faults of one file, in the order in which they are tried; `+=` adds one."""

    def __init__(self, title: str):
        self.title = title
        self.faults: list[Fault] = []

    def __iadd__(self, fault: Fault) -> Self:
        self.faults.append(fault)
        return self

    def __iter__(self) -> Iterator[Fault]:
        return iter(self.faults)


# --- a decoder with a fault


def altered(
    decoder: Decoder,
    fault: Fault,
    layer: int | None = None,
    expert: int | None = None,
    part: str | None = None,
    strength: float = 1.0,
) -> Decoder:
    """Return the decoder as an engine with this fault computes.

    The fault is in every layer, or confined to one `layer`, to one routed `expert`, to one `part`
    of it (`gate_proj`, `up_proj`, `down_proj`). A model that cannot have the fault is returned
    unchanged. Alter last: replacing the watcher of an altered decoder takes the fault out of it.
    Raises `ValueError` where the fault cannot be confined so, or has no strength but 1.
    """
    if not fault.where(decoder.cfg):
        return decoder
    if strength == 1:
        out = fault.alter(decoder, layer)
    elif fault.strength is not None:
        out = fault.strength(decoder, layer, strength)
    else:
        raise ValueError(f"{fault.id} has no strength: it is there or it is not")
    if expert is None and part is None:
        return out
    return _confined(decoder, out, fault, expert, part)


def _confined(
    decoder: Decoder, out: Decoder, fault: Fault, expert: int | None, part: str | None
) -> Decoder:
    """Return `out` for this part of this expert, and the healthy decoder for everything else."""
    watch = out.nx.watch
    inside = any(end in EXPERT or end == ".act" for end in fault.points)
    if isinstance(watch, Planted) and watch.decoder is decoder and inside and part is None:
        return out.using(out.nx.watching(replace(watch, expert=expert)))
    if out.experts is decoder.experts:
        raise ValueError(f"{fault.id} is no fault of a single {'expert' if part is None else part}")

    def one(i: int, e: int) -> MlpWeights:
        if expert not in (None, e):
            return decoder.experts[i](e)
        wrong = out.experts[i](e)
        if part is None:
            return wrong
        return decoder.experts[i](e)._replace(**{part: getattr(wrong, part)})

    return decoder.with_experts(one)


def strength_of(theirs: np.ndarray, healthy: np.ndarray, faulty: np.ndarray) -> float:
    """Return how far from healthy (0) to faulty (1) the engine's tensor is, by least squares."""
    way = (faulty - healthy).reshape(-1)
    return float((theirs - healthy).reshape(-1) @ way / max(way @ way, 1e-300))


# --- changes of values, at points


@dataclass(frozen=True)
class Here:
    """The knowledge of a change at a point: the healthy decoder, and what came before it."""

    decoder: Decoder
    path: str
    seen: Mapping[str, np.ndarray]  # what the computation went on with

    @property
    def cfg(self) -> Config:
        return self.decoder.cfg

    @property
    def nx(self) -> Numerics:
        """The decoder's numerics, unwatched."""
        return replace(self.decoder.nx, watch=None, stop_at_nonfinite=False)

    @property
    def layer(self) -> int:
        i = parse(self.path).layer
        assert i is not None, f"{self.path} is in no layer"
        return i

    @property
    def w(self) -> LayerWeights:
        return self.decoder.layers[self.layer]

    @property
    def x(self) -> np.ndarray:
        """The layer's input; for the final norm, the last layer's output."""
        i = parse(self.path).layer
        before = (len(self.decoder.layers) if i is None else i) - 1
        return self.seen["model.embed_tokens" if before < 0 else f"model.layers.{before}"]

    def __getitem__(self, name: str) -> np.ndarray:
        """Return the value of another point of this layer."""
        return self.seen[f"model.layers.{self.layer}{'' if name[0] == '#' else '.'}{name}"]

    def beside(self, name: str) -> np.ndarray:
        """Return the value of another point of this module."""
        return self.seen[f"{self.path.rpartition('.')[0]}.{name}"]


Change = Callable[[np.ndarray, Here], np.ndarray]
Changes = Mapping[str, Change]  # by the end of the point's name
TAPS = ("#scores", "#probs", "mlp.gate", "gate#experts", "gate#weights", "#rows")  # never rounded


@dataclass(frozen=True)
class Planted:
    """A watcher around the decoder's own: it changes values before and after that one sees them."""

    decoder: Decoder
    writes: Changes
    reads: Changes
    layer: int | None
    strength: float = 1.0
    expert: int | None = None
    seen: dict[str, np.ndarray] = field(default_factory=dict)

    def wants(self, path: str) -> bool:
        """Tell whether this point is looked at: scores, [T, H, T], where a change or one inside is.

        Whatever else is computed is kept for the changes of its layer.
        """
        if not path.endswith((SCORES, PROBS)) or {SCORES, PROBS} & {*self.writes, *self.reads}:
            return True
        wants = getattr(self.decoder.nx.watch, "wants", None)
        return self.decoder.nx.watch is not None and (wants is None or bool(wants(path)))

    def __call__(self, path: str, x: np.ndarray) -> np.ndarray:
        if "@" in path:
            raise ValueError(f"{path}: faults are planted in runs of one prompt")
        inside: Watch | None = self.decoder.nx.watch
        wants = getattr(inside, "wants", lambda path: True)
        x = self._changed(self.writes, path, x)
        if inside is not None and wants(path):
            x = np.asarray(inside(path, x)).astype(x.dtype, copy=False)
        x = self._changed(self.reads, path, x)
        if kind(path) in ("model.embed_tokens", "model.layers"):
            self.seen.clear()  # a layer needs its own points and its input
        self.seen[path] = x
        return x

    def _changed(self, changes: Changes, path: str, x: np.ndarray) -> np.ndarray:
        """Return x with the changes that are for this point, mixed in and rounded as written."""
        if self.layer is not None and parse(path).layer not in (None, self.layer):
            return x
        if self.expert is not None and f".experts.{self.expert}." not in path:
            return x
        if kind(path) == "model.layers" and f"{path}.mlp" not in self.seen:
            return x  # it was not computed here, but given
        for end, change in changes.items():
            if kind(path).endswith(end):
                y = change(x, Here(self.decoder, path, self.seen))
                if x.dtype.kind == "f" and self.strength != 1:
                    y = x + self.strength * (y - x)
                rounding = None if path.endswith(TAPS) else self.decoder.nx.round
                x = (y if rounding is None else rounding(y)).astype(x.dtype, copy=False)
        return x


def _planted(writes: Changes, reads: Changes) -> Graded:
    """Return the alteration that runs a decoder under a `Planted` watcher."""

    def alter(decoder: Decoder, layer: int | None, strength: float = 1.0) -> Decoder:
        watch = Planted(decoder, writes, reads, layer, strength)
        return decoder.using(replace(decoder.nx, watch=watch, attention="expanded"))

    return alter


def _whole(alter: Graded) -> Alter:
    """Return an alteration at strength 1."""
    return lambda decoder, layer: alter(decoder, layer, 1.0)


# --- constructors of entries


def written(
    id: str,
    text: str,
    changes: Changes,
    references: str = "",
    points: tuple[str, ...] = (),
    **more: Any,
) -> Fault:
    """Return a fault of the operations whose results are the points that `changes` names.

    A change of numbers can be had in part (`strength`), a change of choices cannot. `references`
    are repository#issue or repository@commit, with spaces between.
    """
    alter = _planted(changes, {})
    more = {"strength": None if any("#experts" in end for end in changes) else alter} | more
    shown = points or tuple(changes)
    return Fault(id, text, tuple(references.split()), shown, _whole(alter), **more)


def misread(
    id: str, text: str, changes: Changes, points: tuple[str, ...], references: str = "", **more: Any
) -> Fault:
    """Return a fault of what reads the points that `changes` names; it shows first at `points`."""
    alter = _planted({}, changes)
    named = tuple(references.split())
    return Fault(id, text, named, points, _whole(alter), alter, by="reading", **more)


def scaled(
    id: str,
    text: str,
    end: str,
    name: str,
    factor: Callable[[Config], float],
    references: str = "",
    **more: Any,
) -> Fault:
    """Return a fault that multiplies a point by a constant; `name` says what the factor is on."""
    times: Changes = {end: lambda x, here: x * factor(here.cfg)}
    return written(id, text, times, references, fitted=Fitted(name, factor), **more)


def changed(
    id: str, text: str, references: str, points: tuple[str, ...], alter: Alter, **more: Any
) -> Fault:
    """Return a fault of weights, routing or layers."""
    return Fault(id, text, tuple(references.split()), points, alter, by="weights", **more)


def with_free(fault: Fault, name: str, sort: Literal["factor", "position"], make: Any) -> Fault:
    """Return the fault with a constant that is solved for; make(value) is the fault with it."""
    return replace(fault, strength=None, free=Free(name, lambda value: make(value).alter, sort))


# --- ends of points' names

CHOICE, WEIGHTS = "mlp.gate#experts", "mlp.gate#weights"
EXPERT = (".experts.gate_proj", ".experts.up_proj", ".experts.act", ".experts.down_proj")
IN, OUT = EXPERT[:2], EXPERT[3:]
ROUTED = "mlp.experts"  # their sum, all that most engines dump
LINEAR = ("_proj", "kv_a_proj_with_mqa", ROUTED)
MAIN = ("input_layernorm", "post_attention_layernorm", "model.norm")
LATENT = ("q_a_layernorm", "kv_a_layernorm")
LAYER = (*LINEAR, *MAIN[:2], *LATENT, "mlp.gate", CHOICE)
Q, K, ROTATED = "#q_pe", "#k_pe", ("#q_pe", "#k_pe")
SCORES, PROBS, CONTEXT = "#scores", "#probs", "#context"
