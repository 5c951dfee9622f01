"""The fault dictionary: what goes wrong in real engines, each as an alteration of a decoder.

    written    an operation's result is wrong: changed before the watcher inside sees it
    misread    the result is right, and what follows reads it wrongly: changed after that watcher
    experts, stored    other weights        rerouted    other experts for the same choice
    altered(decoder, fault, layer)          the decoder as an engine with this fault computes

`altered` keeps `decoder.nx.watch` as the watcher inside. With one that hands back an engine's own
tensors (compare.Replay), each operation is done on the engine's inputs as the faulty engine would
do it: the fault whose results are the engine's is the cause. With one that only records, it is an
engine with that fault. A change sees what the computation went on with so far (`Here`), so that a
point can be made anew from earlier ones by another rule.

To add a fault, add an entry to `FAULTS`:

    written(
        "logits-softcap",
        "logits are squashed by 30·tanh(x/30)",
        {"lm_head": lambda x, here: 30 * np.tanh(x / 30)},
        "owner/repo#123 owner/another#45",
    ),

Points are given by the end of their name without numbers: `mlp.gate#weights`, `.experts.act`; a
layer's own output is `model.layers`. The tests then demand that it changes something, first at one
of its points, and that no other fault does the same unless `equivalent` says so.

Faults are planted in runs of one prompt from its beginning, in expanded attention. Not here,
because no tensor of such a run shows them: whatever depends on batch, chunk or rank alone.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from refmoe.config import Config, Fp8Scheme, Int4Scheme
from refmoe.model.decoder import Decoder, LayerWeights
from refmoe.model.experts import Experts, MlpWeights, MoeWeights
from refmoe.model.formats.bf16 import BF16
from refmoe.model.formats.fp8_block import Fp8Block
from refmoe.model.formats.int4 import Int4
from refmoe.model.matrix import Matrix, dequantize
from refmoe.model.numerics import Numerics, Watch
from refmoe.model.points import kind
from refmoe.model.router import GateWeights, Routing, sigmoid

Alter = Callable[[Decoder, int | None], Decoder]  # layer it is confined to; None: all
Graded = Callable[[Decoder, int | None, float], Decoder]  # the same with a strength in (0, 1]


class Fitted(NamedTuple):
    """A factor that the engine's numbers tell: 1 in a healthy engine, `value` in a faulty one."""

    name: str
    value: Callable[[Config], float]

    def at(self, cfg: Config, strength: float) -> float:
        """The factor at the strength that fits best (`strength_of`), which need not be 1."""
        return 1 + strength * (self.value(cfg) - 1)


@dataclass(frozen=True)
class Fault:
    id: str
    text: str  # a sentence for a verdict
    references: tuple[str, ...]  # where it happened
    points: tuple[str, ...]  # ends of the names of points at which it shows first
    alter: Alter
    strength: Graded | None = None  # where it can be had in part
    fitted: Fitted | None = None
    where: Callable[[Config], bool] = lambda cfg: True  # models that can have it
    predicts: bool = True  # False: its numbers cannot be foretold, so that no replay confirms it


def altered(
    decoder: Decoder,
    fault: Fault,
    layer: int | None = None,
    expert: int | None = None,
    part: str | None = None,
    strength: float = 1.0,
) -> Decoder:
    """The decoder as an engine with this fault computes: everywhere, or in one layer, in one
    routed expert, in one part of it (`gate_proj`, `up_proj`, `down_proj`).

    A model that cannot have it is left as it is. Alter last: what replaces the watcher of an
    altered decoder takes the fault out of it.
    """
    if not fault.where(decoder.cfg):
        return decoder
    if strength == 1:
        out = fault.alter(decoder, layer)
    elif fault.strength is not None:
        out = fault.strength(decoder, layer, strength)
    else:
        raise ValueError(f"{fault.id} has no strength: it is there or it is not")
    return out if expert is None and part is None else _within(decoder, out, fault, expert, part)


def _within(
    decoder: Decoder, out: Decoder, fault: Fault, expert: int | None, part: str | None
) -> Decoder:
    """`out` where this part of this expert is concerned, else the healthy decoder."""
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
    """How far from healthy to faulty the engine is, by least squares; 1 if it has the fault."""
    way = (faulty - healthy).reshape(-1)
    return float((theirs - healthy).reshape(-1) @ way / max(way @ way, 1e-300))


def _layer(path: str) -> int | None:
    found = re.match(r"model\.layers\.(\d+)", path)
    return int(found[1]) if found else None


# ------------------------------------------------------------------ changes of values, at points


@dataclass(frozen=True)
class Here:
    """What a change at a point knows: the healthy decoder, and what came before in this layer."""

    decoder: Decoder
    path: str
    seen: Mapping[str, np.ndarray]  # what the computation went on with

    @property
    def cfg(self) -> Config:
        return self.decoder.cfg

    @property
    def nx(self) -> Numerics:
        """Its numerics, unwatched."""
        return replace(self.decoder.nx, watch=None, stop_at_nonfinite=False)

    @property
    def layer(self) -> int:
        i = _layer(self.path)
        assert i is not None, f"{self.path} is in no layer"
        return i

    @property
    def w(self) -> LayerWeights:
        return self.decoder.layers[self.layer]

    @property
    def x(self) -> np.ndarray:
        """The layer's input; of the final norm, the last layer's output."""
        i = _layer(self.path)
        before = (len(self.decoder.layers) if i is None else i) - 1
        return self.seen["model.embed_tokens" if before < 0 else f"model.layers.{before}"]

    def __getitem__(self, name: str) -> np.ndarray:
        """Another point of this layer."""
        return self.seen[f"model.layers.{self.layer}{'' if name[0] == '#' else '.'}{name}"]

    def beside(self, name: str) -> np.ndarray:
        """Another point of this module."""
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
        if self.layer is not None and _layer(path) not in (None, self.layer):
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


def planted(writes: Changes, reads: Changes) -> Graded:
    def alter(decoder: Decoder, layer: int | None, strength: float = 1.0) -> Decoder:
        watch = Planted(decoder, writes, reads, layer, strength)
        return decoder.using(replace(decoder.nx, watch=watch, attention="expanded"))

    return alter


def written(
    id: str,
    text: str,
    changes: Changes,
    references: str = "",
    points: tuple[str, ...] = (),
    **more: Any,
) -> Fault:
    """A fault of the operations whose results these points are."""
    alter = planted(changes, {})
    more = {"strength": None if any("#experts" in end for end in changes) else alter} | more
    return Fault(
        id, text, tuple(references.split()), points or tuple(changes), _whole(alter), **more
    )


def misread(
    id: str, text: str, changes: Changes, points: tuple[str, ...], references: str = "", **more: Any
) -> Fault:
    """A fault of those who read these points; it shows at later ones."""
    alter = planted({}, changes)
    return Fault(id, text, tuple(references.split()), points, _whole(alter), alter, **more)


def scaled(
    id: str,
    text: str,
    end: str,
    name: str,
    factor: Callable[[Config], float],
    references: str = "",
    **more: Any,
) -> Fault:
    """A point is multiplied by a constant, which can be fitted."""
    times: Changes = {end: lambda x, here: x * factor(here.cfg)}
    return written(id, text, times, references, fitted=Fitted(name, factor), **more)


def changed(
    id: str, text: str, references: str, points: tuple[str, ...], alter: Alter, **more: Any
) -> Fault:
    """A fault of weights, routing or layers."""
    return Fault(id, text, tuple(references.split()), points, alter, **more)


def _whole(alter: Graded) -> Alter:
    return lambda decoder, layer: alter(decoder, layer, 1.0)


# ------------------------------------------------------------------ changes of weights and routing


def experts(change: Callable[[Decoder, int, int], MlpWeights]) -> Alter:
    """Other matrices for expert e of layer i, made when it is asked for."""

    def alter(decoder: Decoder, layer: int | None) -> Decoder:
        def expert(i: int, e: int) -> MlpWeights:
            return change(decoder, i, e) if layer in (None, i) else decoder.experts[i](e)

        return decoder.with_experts(expert)

    return alter


def stored(form: type, change: Callable[[Any], Matrix]) -> Alter:
    """Every matrix of one format decoded differently."""

    def each(w: Any) -> Any:
        if isinstance(w, form):
            return change(w)
        if w is None or isinstance(w, np.ndarray | BF16 | Int4 | Fp8Block):
            return w
        return type(w)(*map(each, w))

    def alter(decoder: Decoder, layer: int | None) -> Decoder:
        layers = [each(w) if layer in (None, i) else w for i, w in enumerate(decoder.layers)]
        changed = experts(lambda d, i, e: each(d.experts[i](e)))(decoder, layer)
        return replace(changed, layers=layers)

    return alter


Reroute = Callable[[np.ndarray, Routing, GateWeights, Config, Numerics], Routing]


def rerouted(change: Reroute) -> Alter:
    """The router is right, and the experts are run on something else."""

    def alter(decoder: Decoder, layer: int | None) -> Decoder:
        def run(x: np.ndarray, routing: Routing, expert: Experts, nx: Numerics) -> np.ndarray:
            i = _layer(nx.scope)
            assert i is not None
            if layer in (None, i):
                gate = _moe(decoder.layers[i]).gate
                routing = change(x, routing, gate, decoder.cfg, nx.watching(None))
            return decoder.nx.experts(x, routing, expert, nx)

        return decoder.using(replace(decoder.nx, experts=run))

    return alter


def plain(decoder: Decoder, m: Matrix) -> np.ndarray:
    return dequantize(m, decoder.nx.dtype, decoder.nx.conventions.rounded_products)


def _moe(w: LayerWeights) -> MoeWeights:
    assert isinstance(w.mlp, MoeWeights), "no mixture in this layer"
    return w.mlp


CHOICE, WEIGHTS = "mlp.gate#experts", "mlp.gate#weights"


def healthy(z: np.ndarray, b: np.ndarray) -> np.ndarray:
    return sigmoid(z) + b


# ------------------------------------------------------------------ experts


def mixture(change: Change) -> Change:
    """A change of `mlp` where it is a mixture."""
    return lambda x, here: change(x, here) if isinstance(here.w.mlp, MoeWeights) else x


def shared(id: str, text: str, factor: Callable[[Config], float], references: str = "") -> Fault:
    """The shared experts are added with another weight than 1."""

    def change(x: np.ndarray, here: Here) -> np.ndarray:
        return x + (factor(here.cfg) - 1) * here["mlp.shared_experts"]

    return written(
        id,
        text,
        {".mlp": mixture(change)},
        references,
        fitted=Fitted("factor on the shared experts", factor),
        where=has_shared,
    )


MAIN = ("input_layernorm", "post_attention_layernorm", "model.norm")
LATENT = ("q_a_layernorm", "kv_a_layernorm")


def has_groups(cfg: Config) -> bool:
    return cfg.topk_group < cfg.n_group


def has_half_groups(cfg: Config) -> bool:
    G, E, K = 2 * cfg.n_group, cfg.n_routed_experts, cfg.num_experts_per_tok
    return has_groups(cfg) and not E % G and E // G * cfg.topk_group >= K


def has_shared(cfg: Config) -> bool:
    return cfg.n_shared_experts > 0


def has_int4(cfg: Config) -> bool:
    return isinstance(cfg.quantization, Int4Scheme)


def has_fp8(cfg: Config) -> bool:
    return isinstance(cfg.quantization, Fp8Scheme)


def has_low_rank_queries(cfg: Config) -> bool:
    return cfg.q_lora_rank is not None


def renormalises(cfg: Config) -> bool:
    return cfg.norm_topk_prob


def gamma(cfg: Config) -> float:
    return cfg.routed_scaling_factor


EXPERT = (".experts.gate_proj", ".experts.up_proj", ".experts.act", ".experts.down_proj")
IN, OUT = EXPERT[:2], EXPERT[3:]
ROUTED = "mlp.experts"  # their sum, all that most engines dump
LINEAR = ("_proj", "kv_a_proj_with_mqa", ROUTED)
LAYER = (*LINEAR, *MAIN[:2], *LATENT, "mlp.gate", CHOICE)
