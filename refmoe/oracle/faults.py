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

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from refmoe.config import Config, Fp8Scheme, Int4Scheme
from refmoe.model import matrix
from refmoe.model.cache import LatentCache
from refmoe.model.decoder import Decoder, LayerWeights
from refmoe.model.decoder import layer as run_layer
from refmoe.model.experts import Experts, MlpWeights, MoeWeights
from refmoe.model.matrix import BF16, E4M3, Fp8Block, Int4, Matrix, dequantize, widen_bf16
from refmoe.model.mla import Segment, softmax
from refmoe.model.norm import rms_norm
from refmoe.model.numerics import Numerics, Watch
from refmoe.model.rope import cos_sin, rotate, softmax_scale
from refmoe.model.router import GateWeights, Routing, limit_groups, route, sigmoid
from refmoe.oracle.graph import kind

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
            return decoder.experts(i, e)
        wrong = out.experts(i, e)
        if part is None:
            return wrong
        return decoder.experts(i, e)._replace(**{part: getattr(wrong, part)})

    return replace(decoder, experts=one)


def candidates(point: str, through: Iterable[str], cfg: Config | None = None) -> list[Fault]:
    """Faults that would show at this point, or at one that is judged with it."""
    return [
        f
        for f in FAULTS
        if any(kind(p).endswith(f.points) for p in (point, *through))
        and (cfg is None or f.where(cfg))
    ]


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
            return change(decoder, i, e) if layer in (None, i) else decoder.experts(i, e)

        return replace(decoder, experts=expert)

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
        changed = experts(lambda d, i, e: each(d.experts(i, e)))(decoder, layer)
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


# ------------------------------------------------------------------ router

Scores = Callable[[np.ndarray, np.ndarray], np.ndarray]  # logits [T, E], bias [E] → [T, E]
CHOICE, WEIGHTS = "mlp.gate#experts", "mlp.gate#weights"


def healthy(z: np.ndarray, b: np.ndarray) -> np.ndarray:
    return sigmoid(z) + b


def _logits_bias(here: Here) -> tuple[np.ndarray, np.ndarray]:
    z = here["mlp.gate"]
    return z, dequantize(_moe(here.w).gate.e_score_correction_bias, z.dtype)


def choose(
    scores: Scores = healthy,
    limit: Callable[[np.ndarray, Here], np.ndarray] = lambda s, here: limit_groups(
        s, here.cfg, here.nx
    )[0],
) -> Changes:
    """Another score chooses, or another limit to groups."""

    def change(top: np.ndarray, here: Here) -> np.ndarray:
        score = limit(scores(*_logits_bias(here)), here)
        return np.argsort(-score, axis=-1, kind="stable")[:, : top.shape[1]]

    return {CHOICE: change}


def weigh(scores: Scores, total: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Changes:
    """Another score weighs; `total` of the chosen scores [T, K] and of all [T, E] divides it."""

    def change(g: np.ndarray, here: Here) -> np.ndarray:
        s = scores(*_logits_bias(here))
        chosen = np.take_along_axis(s, here[CHOICE], axis=-1)
        on_sum = here.nx.conventions.routed_scale == "sum"
        return chosen / total(chosen, s) * (1 if on_sum else here.cfg.routed_scaling_factor)

    return {WEIGHTS: change}


def rescaled(
    id: str, text: str, factor: Callable[[Config], float], references: str, **more: Any
) -> Fault:
    """The routed weights times a constant: the weights, or their sum, wherever an engine scales."""

    def times(side: str) -> Change:
        def change(x: np.ndarray, here: Here) -> np.ndarray:
            return x * factor(here.cfg) if here.nx.conventions.routed_scale == side else x

        return change

    changes = {WEIGHTS: times("weights"), ROUTED: times("sum")}
    fitted = Fitted("factor on the routed weights", factor)
    return written(id, text, changes, references, fitted=fitted, **more)


def _sum(chosen: np.ndarray, _: np.ndarray) -> np.ndarray:
    return chosen.sum(axis=-1, keepdims=True)


def _softmax(z: np.ndarray, _: np.ndarray) -> np.ndarray:
    return softmax(z)


def groups(**changes: Any) -> Callable[[np.ndarray, Here], np.ndarray]:
    """Limited as another config says."""

    def limit(score: np.ndarray, here: Here) -> np.ndarray:
        cfg = replace(here.cfg, **changes)
        return limit_groups(score, cfg, here.nx)[0]

    return limit


def groups_doubled(score: np.ndarray, here: Here) -> np.ndarray:
    return groups(n_group=2 * here.cfg.n_group)(score, here)


def groups_by_maximum(score: np.ndarray, here: Here) -> np.ndarray:
    T, G, M = len(score), here.cfg.n_group, here.cfg.topk_group
    grouped = score.reshape(T, G, -1)
    best = np.argsort(-grouped.max(axis=-1), axis=-1, kind="stable")[:, :M]
    taken = (best[..., None] == np.arange(G)).any(axis=1)  # [T, G]
    return np.where(taken[..., None], grouped, -np.inf).reshape(score.shape)


def groups_masked_with_zero(score: np.ndarray, here: Here) -> np.ndarray:
    sides = replace(here.nx.conventions, masked_groups=0.0)
    return limit_groups(score, here.cfg, replace(here.nx, conventions=sides))[0]


def groups_strided(score: np.ndarray, here: Here) -> np.ndarray:
    """Expert e in group e mod G."""
    T, G = len(score), here.cfg.n_group
    limited = groups()(score.reshape(T, -1, G).swapaxes(1, 2).reshape(T, -1), here)
    return limited.reshape(T, G, -1).swapaxes(1, 2).reshape(T, -1)


def bias_as_bf16(z: np.ndarray, b: np.ndarray) -> np.ndarray:
    return sigmoid(z) + matrix.round_bf16(b)


def top_k(more: int) -> Reroute:
    def change(
        x: np.ndarray, routing: Routing, gate: GateWeights, cfg: Config, nx: Numerics
    ) -> Routing:
        return route(x, gate, replace(cfg, num_experts_per_tok=cfg.num_experts_per_tok + more), nx)

    return change


def within_capacity(
    x: np.ndarray, routing: Routing, gate: GateWeights, cfg: Config, nx: Numerics
) -> Routing:
    """Each expert takes its fair share of the rows, the first that come, and drops the others."""
    flat = routing.experts.reshape(-1)
    mine = flat[:, None] == np.arange(cfg.n_routed_experts)  # [TK, E]
    place = (mine.cumsum(axis=0) - 1)[np.arange(len(flat)), flat]
    kept = place < math.ceil(len(flat) / cfg.n_routed_experts)
    return routing._replace(weights=routing.weights * kept.reshape(routing.weights.shape))


def gate_left_random(_: np.ndarray, here: Here) -> np.ndarray:
    rng = np.random.default_rng(here.layer)
    w = 0.02 * rng.standard_normal((here.cfg.n_routed_experts, here.cfg.hidden_size))
    return here["post_attention_layernorm"] @ w.T


def gate_unnormed(_: np.ndarray, here: Here) -> np.ndarray:
    return here["#attn_residual"] @ plain(here.decoder, _moe(here.w).gate.weight).T


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


def second_shared_missing(x: np.ndarray, here: Here) -> np.ndarray:
    return np.where(np.arange(x.shape[-1]) < here.cfg.moe_intermediate_size, x, 0)


def weight_on_input(y: np.ndarray, here: Here) -> np.ndarray:
    x, top, g = here["post_attention_layernorm"], here[CHOICE], here[WEIGHTS].astype(y.dtype)
    run, expert = here.nx.experts, partial(here.decoder.experts, here.layer)
    none = np.full(len(x), np.inf)
    slots = (
        run(
            x * g[:, [k]],
            Routing(top[:, [k]], np.ones_like(g[:, [k]]), none, none),
            expert,
            here.nx,
        )
        for k in range(top.shape[1])
    )
    return np.sum(list(slots), axis=0)


def activated(rule: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Changes:
    """Another function of gate and up, in every MLP."""
    return {".act": lambda x, here: rule(here.beside("gate_proj"), here.beside("up_proj"))}


def gelu(z: np.ndarray) -> np.ndarray:
    return 0.5 * z * (1 + np.vectorize(math.erf, otypes=[z.dtype])(z / math.sqrt(2)))


def gelu_tanh(z: np.ndarray) -> np.ndarray:
    return 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def gate_up_swapped(decoder: Decoder, i: int, e: int) -> MlpWeights:
    gate, up, down = decoder.experts(i, e)
    return MlpWeights(up, gate, down)


def gate_up_interleaved(decoder: Decoder, i: int, e: int) -> MlpWeights:
    gate, up, down = decoder.experts(i, e)
    both = np.stack((plain(decoder, gate), plain(decoder, up)), axis=1)  # [F, 2, D]
    first, second = np.split(both.reshape(-1, both.shape[-1]), 2)
    return MlpWeights(first, second, down)


def columns_swapped(decoder: Decoder, i: int, e: int) -> MlpWeights:
    def swap(m: Matrix) -> np.ndarray:
        w = plain(decoder, m)
        even = w.shape[1] // 2 * 2
        pairs = w[:, :even].reshape(len(w), -1, 2)[..., ::-1].reshape(len(w), even)
        return np.concatenate((pairs, w[:, even:]), axis=1)

    return MlpWeights(*map(swap, decoder.experts(i, e)))


def projected(name: str) -> Change:
    """The shared experts' input through another of their matrices."""

    def change(_: np.ndarray, here: Here) -> np.ndarray:
        w = _moe(here.w).shared_experts
        return here["post_attention_layernorm"] @ plain(here.decoder, getattr(w, name)).T

    return change


def down_transposed(decoder: Decoder, i: int, e: int) -> MlpWeights:
    w = decoder.experts(i, e)
    down = plain(decoder, w.down_proj)
    return w._replace(down_proj=down.reshape(down.shape[::-1]).T)


def nothing(decoder: Decoder, i: int, e: int) -> MlpWeights:
    w = decoder.experts(i, e)
    return w._replace(down_proj=np.zeros(w.down_proj.shape, decoder.nx.dtype))


def next_expert(decoder: Decoder, i: int, e: int) -> MlpWeights:
    return decoder.experts(i, (e + 1) % decoder.cfg.n_routed_experts)


def expert_before(decoder: Decoder, i: int, e: int) -> MlpWeights:
    return decoder.experts(i, (e - 1) % decoder.cfg.n_routed_experts)


def expert_left_random(decoder: Decoder, i: int, e: int) -> MlpWeights:
    rng = np.random.default_rng((i, e))
    draw = [0.02 * rng.standard_normal(m.shape) for m in decoder.experts(i, e)]
    return MlpWeights(*(w.astype(decoder.nx.dtype) for w in draw))


# ------------------------------------------------------------------ stored formats


def nibbles(change: Callable[[np.ndarray], np.ndarray]) -> Alter:
    """The bytes of INT4 weights, two nibbles each, read otherwise."""

    def decode(m: Int4) -> Int4:
        two = np.ascontiguousarray(m.packed).view(np.uint8)
        return Int4(np.ascontiguousarray(change(two)).view(np.int32), m.scale)

    return stored(Int4, decode)


def scales(form: type[Int4] | type[Fp8Block], change: Callable[[Any], np.ndarray]) -> Alter:
    return stored(form, lambda m: m._replace(scale=change(m)))


def swap_nibbles(two: np.ndarray) -> np.ndarray:
    return (two << 4) | (two >> 4)


def zero_point_7(m: Int4) -> np.ndarray:
    """(nibble - 7)·scale is the healthy weight and one more scale."""
    w = dequantize(m, np.float64)
    s = widen_bf16(m.scale).astype(np.float64)
    return w + np.repeat(s, w.shape[1] // s.shape[1], axis=1)


def scale_as_fp8(m: Int4) -> np.ndarray:
    """The nearest e4m3, as bits of bf16, which holds it exactly."""
    s = widen_bf16(m.scale)
    positive = E4M3[:127]
    near = positive[np.searchsorted((positive[1:] + positive[:-1]) / 2, np.abs(s))]
    return (np.copysign(near, s).view(np.uint32) >> 16).astype(np.uint16)


def read_across(scale: np.ndarray) -> np.ndarray:
    """Columns first instead of rows first."""
    return scale.reshape(scale.shape[::-1]).T


def partial_block_of_the_one_before(m: Fp8Block) -> np.ndarray:
    scale = m.scale.copy()
    for axis in (0, 1):
        if m.bits.shape[axis] % m.block[axis] and scale.shape[axis] > 1:
            ends = np.moveaxis(scale, axis, 0)
            ends[-1] = ends[-2]
    return scale


# ------------------------------------------------------------------ norms


def _norm_inputs(here: Here) -> tuple[np.ndarray, Matrix, float]:
    """Input, gain and eps of the norm whose result is here."""
    cfg, eps = here.cfg, here.cfg.rms_norm_eps
    latent = here.nx.conventions.latent_norm_eps or eps
    match kind(here.path).rpartition(".")[2]:
        case "norm":
            return here.x, here.decoder.norm, eps
        case "input_layernorm":
            return here.x, here.w.input_layernorm, eps
        case "post_attention_layernorm":
            return here["#attn_residual"], here.w.post_attention_layernorm, eps
        case "q_a_layernorm":
            gain = here.w.self_attn.q_a_layernorm
            assert gain is not None
            return here["self_attn.q_a_proj"], gain, latent
        case _:
            x = here["self_attn.kv_a_proj_with_mqa"][:, : cfg.kv_lora_rank]
            return x, here.w.self_attn.kv_a_layernorm, latent


MAIN = ("input_layernorm", "post_attention_layernorm", "model.norm")
LATENT = ("q_a_layernorm", "kv_a_layernorm")


def normed(
    rule: Callable[[np.ndarray, np.ndarray, float], np.ndarray],
    ends: tuple[str, ...] = MAIN + LATENT,
) -> Changes:
    """rule(x, gain, eps) in place of the norms with these ends."""

    def change(_: np.ndarray, here: Here) -> np.ndarray:
        x, gain, eps = _norm_inputs(here)
        return rule(x, dequantize(gain, x.dtype), eps)

    return dict.fromkeys(ends, change)


def unnormed(x: np.ndarray, gain: np.ndarray, eps: float) -> np.ndarray:
    return x


def divided_by_sum(x: np.ndarray, gain: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).sum(axis=-1, keepdims=True) + eps) * gain


def layer_norm(x: np.ndarray, gain: np.ndarray, eps: float) -> np.ndarray:
    return rms_norm(x - x.mean(axis=-1, keepdims=True), gain, eps)


def other_eps(eps: float) -> float:
    return 1e-5 if eps == 1e-6 else 1e-6


def latent_eps(_: np.ndarray, here: Here) -> np.ndarray:
    x, gain, eps = _norm_inputs(here)
    config = here.cfg.rms_norm_eps
    return rms_norm(x, gain, 1e-6 if eps == config else config)


def over_latent_and_key(_: np.ndarray, here: Here) -> np.ndarray:
    x, gain, eps = _norm_inputs(here)
    both = here["self_attn.kv_a_proj_with_mqa"]  # [T, C+R]
    mean = (both * both).mean(axis=-1, keepdims=True)
    return x / np.sqrt(mean + eps) * dequantize(gain, x.dtype)


def of_the_layers_input(_: np.ndarray, here: Here) -> np.ndarray:
    return rms_norm(here.x, here.w.post_attention_layernorm, here.cfg.rms_norm_eps)


# ------------------------------------------------------------------ rotation and softmax scale

Q, K, ROTATED = "#q_pe", "#k_pe", ("#q_pe", "#k_pe")
SCORES, PROBS, CONTEXT = "#scores", "#probs", "#context"


def _query(here: Here) -> np.ndarray:
    """[T, H, N+R], before rotation."""
    name = "q_b_proj" if here.w.self_attn.q_proj is None else "q_proj"
    q = here[f"self_attn.{name}"]
    return q.reshape(len(q), here.cfg.num_attention_heads, -1)


def unrotated(_: np.ndarray, here: Here) -> np.ndarray:
    if here.path.endswith(Q):
        return _query(here)[..., here.cfg.qk_nope_head_dim :]
    return here["self_attn.kv_a_proj_with_mqa"][:, here.cfg.kv_lora_rank :]


def turn(
    change: Callable[[Config], Config] = lambda cfg: cfg,
    betas: Callable[[Config], tuple[float, float] | None] = lambda cfg: None,
    stretch: Callable[[Config], float] = lambda cfg: 1.0,
    shift: int = 0,
    by: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray] = rotate,
) -> Change:
    """Rotated anew: under another config, betas, positions, or by another rule."""

    def rotation(x: np.ndarray, here: Here) -> np.ndarray:
        nx = here.nx
        sides = replace(nx.conventions, yarn_betas=betas(here.cfg) or nx.conventions.yarn_betas)
        positions = np.arange(len(x)) * stretch(here.cfg) + shift
        cos, sin = cos_sin(positions, change(here.cfg), replace(nx, conventions=sides))
        if here.path.endswith(Q):
            cos, sin = cos[:, None], sin[:, None]
        return by(unrotated(x, here), cos, sin)

    return rotation


def rotate_halves(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate((a * cos - b * sin, b * cos + a * sin), axis=-1)


def rotate_unpermuted(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """An engine that brings pairs into halves, rotates, and has forgotten the former: as pairs."""
    a, b = np.split(rotate_halves(x, cos, sin), 2, axis=-1)
    return np.stack((a, b), axis=-1).reshape(x.shape)


def rotate_back(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    return rotate(x, cos, -sin)


def rotate_some(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """The first half of the channels, with the frequencies they have."""
    half = x.shape[-1] // 4 * 2
    turned = rotate(x[..., :half], cos[..., : half // 2], sin[..., : half // 2])
    return np.concatenate((turned, x[..., half:]), axis=-1)


def yarn(**changes: Callable[[Config], float]) -> Callable[[Config], Config]:
    def change(cfg: Config) -> Config:
        if cfg.rope_scaling is None:
            return cfg
        new: dict[str, Any] = {name: value(cfg) for name, value in changes.items()}
        return replace(cfg, rope_scaling=replace(cfg.rope_scaling, **new))

    return change


def yarn_factor(cfg: Config) -> float:
    return cfg.rope_scaling.factor if cfg.rope_scaling else 1.0


def other_factor(cfg: Config) -> float:
    return 32.0 if yarn_factor(cfg) == 64 else 64.0


def other_betas(cfg: Config) -> tuple[float, float]:
    return (1.0, 1.0) if cfg.rope_scaling and cfg.rope_scaling.beta_fast == 32 else (32.0, 1.0)


def without_yarn(cfg: Config) -> Config:
    return replace(cfg, rope_scaling=None)


def settings(change: Callable[[Config], Config]) -> Changes:
    """Rotation and softmax scale as another config has them."""

    def rescale(x: np.ndarray, here: Here) -> np.ndarray:
        return x * (softmax_scale(change(here.cfg)) / softmax_scale(here.cfg))

    return {**dict.fromkeys(ROTATED, turn(change)), SCORES: rescale}


def mscale(cfg: Config) -> float:
    return math.sqrt(softmax_scale(cfg) * math.sqrt(cfg.qk_head_dim))


def scale(
    id: str, text: str, value: Callable[[Config], float], references: str = "", **more: Any
) -> Fault:
    """Scores are multiplied by another number than `softmax_scale`."""

    def factor(cfg: Config) -> float:
        return value(cfg) / softmax_scale(cfg)

    return scaled(id, text, SCORES, "factor on the scores", factor, references, **more)


# ------------------------------------------------------------------ attention


def attended(visible: Callable[[int], np.ndarray]) -> Changes:
    """Probabilities under another mask: positions [T] → [T, T], true where seen."""

    def change(p: np.ndarray, here: Here) -> np.ndarray:
        s = here["self_attn#scores"]  # [T, H, T]
        return softmax(np.where(visible(len(s))[:, None], s, -np.inf))

    return {PROBS: change}


def all_but_oneself(T: int) -> np.ndarray:
    return np.tri(T, k=-1, dtype=bool) | (np.eye(T, dtype=bool) & (np.arange(T) == 0))


def all_but_the_first(T: int) -> np.ndarray:
    seen = np.tri(T, dtype=bool)
    seen[1:, 0] = False
    return seen


def half_a_prompt_back(T: int) -> np.ndarray:
    return np.tri(T, dtype=bool) & ~np.tri(T, k=-max(1, T // 2), dtype=bool)


def by_head(change: Callable[[np.ndarray, Config], np.ndarray]) -> Change:
    """A change of a point [T, H·n] seen as [T, H, n]."""

    def changed(x: np.ndarray, here: Here) -> np.ndarray:
        heads = x.reshape(len(x), here.cfg.num_attention_heads, -1)
        return change(heads, here.cfg).reshape(x.shape)

    return changed


def interleaved(x: np.ndarray, cfg: Config) -> np.ndarray:
    """[T, H, n] read as [T, n, H]."""
    return x.reshape(len(x), -1, cfg.num_attention_heads).swapaxes(1, 2)


def heads_behind_each_other(x: np.ndarray, cfg: Config) -> np.ndarray:
    """All keys, then all values, instead of key and value of each head."""
    T, H, N = len(x), cfg.num_attention_heads, cfg.qk_nope_head_dim
    flat = x.reshape(T, -1)
    k, v = flat[:, : H * N], flat[:, H * N :]
    return np.concatenate((k.reshape(T, H, N), v.reshape(T, H, -1)), axis=-1)


def key_untransposed(_: np.ndarray, here: Here) -> np.ndarray:
    cfg, w = here.cfg, plain(here.decoder, here.w.self_attn.kv_b_proj).copy()
    H, N, C = cfg.num_attention_heads, cfg.qk_nope_head_dim, cfg.kv_lora_rank
    heads = w.reshape(H, -1, C)  # [H, N+V, C]
    heads[:, :N] = heads[:, :N].reshape(H, C, N).swapaxes(1, 2)
    return here["self_attn.kv_a_layernorm"] @ w.T


def latent_before_norm(_: np.ndarray, here: Here) -> np.ndarray:
    return here["self_attn.kv_a_proj_with_mqa"][:, : here.cfg.kv_lora_rank]


# ------------------------------------------------------------------ layers, loading, ends


def layer_again(x: np.ndarray, here: Here) -> np.ndarray:
    segment = Segment(slice(0, len(x)), LatentCache(here.cfg, here.nx.dtype))
    expert = partial(here.decoder.experts, here.layer)
    return run_layer(x, here.w, expert, [segment], here.cfg, here.nx)


def of_the_layer_before(decoder: Decoder, layer: int | None) -> Decoder:
    """Weights of the layer before; the first has those of the second."""

    def other(i: int) -> int:
        return i - 1 if i else min(1, len(decoder.layers) - 1)

    def neighbour(i: int, w: LayerWeights) -> LayerWeights:
        its = decoder.layers[other(i)]
        return its if type(its.mlp) is type(w.mlp) else its._replace(mlp=w.mlp)

    def expert(d: Decoder, i: int, e: int) -> MlpWeights:
        return d.experts(other(i) if d.cfg.is_moe(other(i)) else i, e)

    layers = [neighbour(i, w) if layer in (None, i) else w for i, w in enumerate(decoder.layers)]
    return replace(experts(expert)(decoder, layer), layers=layers)


def embedding_shifted(decoder: Decoder, layer: int | None) -> Decoder:
    shifted = (np.arange(decoder.cfg.vocab_size) + 1) % decoder.cfg.vocab_size
    return replace(decoder, embed_tokens=matrix.rows(decoder.embed_tokens, shifted))


def head_tied(decoder: Decoder, layer: int | None) -> Decoder:
    return replace(decoder, lm_head=decoder.embed_tokens)


def last_token_not_finite(x: np.ndarray, here: Here) -> np.ndarray:
    y = x.copy()
    y[-1] = np.nan
    return y


def clipped(x: np.ndarray, here: Here) -> np.ndarray:
    return np.clip(x, -65504, 65504)


# ------------------------------------------------------------------ the dictionary


def has_yarn(cfg: Config) -> bool:
    return cfg.rope_scaling is not None


def has_mscale(cfg: Config) -> bool:
    return mscale(cfg) != 1


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

ROUTER = (
    rescaled(
        "scaling-dropped",
        "routed_scaling_factor is not applied",
        lambda cfg: 1 / gamma(cfg),
        "sgl-project/sglang#8040 sgl-project/sglang#12738 sgl-project/sglang#8333 "
        "sgl-project/sglang#8688 sgl-project/sglang#8511 sgl-project/sglang-jax#1282 "
        "vllm-project/vllm#43769",
    ),
    rescaled(
        "scaling-twice",
        "routed_scaling_factor is applied twice",
        gamma,
        "vllm-project/vllm#24119 vllm-project/vllm#24132 vllm-project/vllm#45037 "
        "sgl-project/sglang#35152",
    ),
    shared(
        "scaling-on-shared", "routed_scaling_factor is applied to the shared experts too", gamma
    ),
    written(
        "scaling-on-sum",
        "routed_scaling_factor is applied again to the sum of routed and shared experts",
        {".mlp": mixture(lambda x, here: x * gamma(here.cfg))},
        fitted=Fitted("factor on the mixture", gamma),
    ),
    written(
        "weights-biased",
        "the scores with the router's bias, which only choose, weigh the experts",
        weigh(healthy, _sum),
        "vllm-project/vllm#12002 huggingface/transformers#41647 ModelTC/lightllm#744 "
        "ml-explore/mlx-lm#67",
    ),
    written(
        "weights-unnormalised",
        "the weights of the chosen experts are not divided by their sum",
        weigh(lambda z, b: sigmoid(z), lambda chosen, s: np.ones(1)),
        "EricLBuehler/mistral.rs#1173",
        where=renormalises,
    ),
    written(
        "weights-over-all",
        "weights are divided by the sum over all experts, not over the chosen",
        weigh(lambda z, b: sigmoid(z), lambda chosen, s: s.sum(axis=-1, keepdims=True)),
    ),
    rescaled(
        "normalised-after-scaling",
        "weights are divided by their sum again after the scaling",
        lambda cfg: 1 / gamma(cfg),
        "",
        where=renormalises,
    ),
    written(
        "weights-softmax",
        "softmax takes the place of sigmoid in the weights",
        weigh(_softmax, _sum),
        "ggml-org/llama.cpp#18980",
        where=renormalises,
    ),
    written(
        "weights-squared", "each expert's weight is applied twice", {WEIGHTS: lambda g, here: g * g}
    ),
    written(
        "weights-reversed",
        "weights are paired with the chosen experts in another order",
        {WEIGHTS: lambda g, here: g[:, ::-1]},
        "huggingface/transformers#43288",
    ),
    written(
        "weights-uniform",
        "the chosen experts weigh the same",
        {WEIGHTS: lambda g, here: np.broadcast_to(g.mean(axis=-1, keepdims=True), g.shape)},
    ),
    written(
        "softmax-router",
        "softmax and a plain top-k without bias take the place of the sigmoid router",
        {**choose(lambda z, b: z), **weigh(_softmax, _sum)},
        "ggml-org/llama.cpp#18980 NVIDIA/TensorRT-Model-Connect#662",
        where=renormalises,
    ),
    written(
        "choice-softmax",
        "softmax takes the place of sigmoid in the choice",
        choose(lambda z, b: softmax(z) + b),
    ),
    written(
        "bias-ignored",
        "the router's bias is missing",
        choose(lambda z, b: z),
        "NVIDIA-NeMo/Megatron-Bridge#4657",
    ),
    written(
        "bias-subtracted",
        "the router's bias has the wrong sign",
        choose(lambda z, b: sigmoid(z) - b),
    ),
    written(
        "bias-before-sigmoid",
        "the router's bias is added to the logits",
        choose(lambda z, b: z + b),
    ),
    written(
        "bias-bf16",
        "the router's bias is rounded to bf16",
        choose(bias_as_bf16),
        "huggingface/transformers#42580 vllm-project/vllm#23640 vllm-project/vllm#36725 "
        "sgl-project/sglang#31213 sgl-project/sglang#37133 tenstorrent/tt-metal#47914 "
        "NVIDIA/TensorRT-LLM#17061",
    ),
    written(
        "groups-maximum",
        "a group counts as its best expert, not as the sum of its two best",
        choose(limit=groups_by_maximum),
        "vllm-project/vllm#13474 ModelTC/lightllm#744",
        where=has_groups,
    ),
    written(
        "groups-masked-zero",
        "experts of refused groups score 0, and beat those with a negative score",
        choose(limit=groups_masked_with_zero),
        "huggingface/transformers#45441 sgl-project/sglang#3705 vllm-project/vllm#13474 "
        "deepseek-ai/DeepSeek-V3@1398800",
        where=has_groups,
    ),
    written(
        "groups-ignored",
        "experts are chosen from all groups",
        choose(limit=groups(n_group=1, topk_group=1)),
        "ggml-org/llama.cpp#16063",
        where=has_groups,
    ),
    written(
        "groups-doubled",
        "there are twice as many groups as n_group",
        choose(limit=groups_doubled),
        where=has_half_groups,
    ),
    written(
        "groups-strided",
        "a group is every n_group-th expert, not neighbouring ones",
        choose(limit=groups_strided),
        "EricLBuehler/mistral.rs#1278",
        where=has_groups,
    ),
    written(
        "choice-of-token-before",
        "each token goes to the experts that the token before it chose",
        {CHOICE: lambda top, here: np.roll(top, 1, axis=0)},
    ),
    changed(
        "top-k-too-few", "one expert a token too few", "", (*EXPERT, ROUTED), rerouted(top_k(-1))
    ),
    changed(
        "top-k-too-many",
        "one expert a token too many",
        "",
        (*EXPERT, ROUTED),
        rerouted(top_k(1)),
        where=lambda cfg: (
            cfg.num_experts_per_tok < cfg.n_routed_experts // cfg.n_group * cfg.topk_group
        ),
    ),
    changed(
        "capacity",
        "an expert drops the tokens beyond its fair share",
        "",
        (ROUTED,),
        rerouted(within_capacity),
    ),
    written(
        "gate-unnormed",
        "the router reads the residual stream before its norm",
        {"mlp.gate": gate_unnormed},
    ),
    written(
        "gate-random",
        "the router's gate was never loaded",
        {"mlp.gate": gate_left_random},
        "vllm-project/vllm#36190",
        predicts=False,
        strength=None,
    ),
)

EXPERTS = (
    shared("shared-dropped", "the shared experts are missing", lambda cfg: 0.0),
    shared(
        "shared-twice",
        "the shared experts are added twice",
        lambda cfg: 2.0,
        "vllm-project/vllm#40673 sgl-project/sglang#4883 sgl-project/sglang#25974 "
        "vllm-project/vllm#31523",
    ),
    misread(
        "shared-width",
        "only the first of several shared experts, stored as one, is used",
        {"shared_experts.act": second_shared_missing},
        ("shared_experts.down_proj", "shared_experts"),
        where=lambda cfg: cfg.n_shared_experts > 1,
    ),
    changed(
        "experts-shifted",
        "an expert's place is taken by the next one",
        "",
        (*EXPERT, ROUTED),
        experts(next_expert),
    ),
    changed(
        "experts-shifted-back",
        "an expert's place is taken by the one before it",
        "",
        (*EXPERT, ROUTED),
        experts(expert_before),
    ),
    changed(
        "experts-missing",
        "routed experts give nothing",
        "sgl-project/sglang#21348",
        (*OUT, ROUTED),
        experts(nothing),
    ),
    changed(
        "experts-random",
        "routed experts were never loaded",
        "",
        (*EXPERT, ROUTED),
        experts(expert_left_random),
        predicts=False,
    ),
    changed(
        "gate-up-swapped",
        "gate and up are swapped in the routed experts",
        "sgl-project/sglang#11081 vllm-project/vllm#40082 vllm-project/vllm#42821",
        (*IN, ROUTED),
        experts(gate_up_swapped),
    ),
    written(
        "gate-up-swapped-shared",
        "gate and up are swapped in the shared experts",
        {
            "mlp.shared_experts.gate_proj": projected("up_proj"),
            "mlp.shared_experts.up_proj": projected("gate_proj"),
        },
        "vllm-project/vllm#40082",
        where=has_shared,
    ),
    changed(
        "columns-swapped",
        "neighbouring columns of the routed experts are swapped, as by the nibbles of INT4",
        "ggml-org/llama.cpp#17083",
        (*EXPERT, ROUTED),
        experts(columns_swapped),
        where=lambda cfg: not has_int4(cfg),
    ),
    changed(
        "gate-up-interleaved",
        "rows of gate and up, stored in turn, are read as two halves",
        "",
        (*IN, ROUTED),
        experts(gate_up_interleaved),
    ),
    changed(
        "down-transposed",
        "down_proj is read columns first",
        "",
        (*OUT, ROUTED),
        experts(down_transposed),
    ),
    written(
        "weight-on-input",
        "an expert's weight multiplies its input, not its output",
        {ROUTED: weight_on_input},
    ),
    written(
        "silu-on-up",
        "silu is applied to up, not to gate",
        activated(lambda g, u: g * u * sigmoid(u)),
    ),
    written("act-gelu", "gelu takes the place of silu", activated(lambda g, u: gelu(g) * u)),
    written(
        "act-gelu-tanh",
        "gelu, with its tanh, takes the place of silu",
        activated(lambda g, u: gelu_tanh(g) * u),
    ),
    written(
        "act-relu", "relu takes the place of silu", activated(lambda g, u: np.maximum(g, 0) * u)
    ),
    written(
        "act-sigmoid", "sigmoid takes the place of silu", activated(lambda g, u: sigmoid(g) * u)
    ),
    written(
        "act-missing", "gate and up are multiplied without silu", activated(lambda g, u: g * u)
    ),
)

STORED = (
    changed(
        "int4-swapped",
        "INT4: the two nibbles of each byte are swapped",
        "ggml-org/llama.cpp#17083 ggml-org/llama.cpp#17064",
        (*EXPERT, ROUTED),
        nibbles(swap_nibbles),
        where=has_int4,
    ),
    changed(
        "int4-reversed",
        "INT4: the eight nibbles of each word are read from the highest",
        "ggml-org/llama.cpp#17083",
        (*EXPERT, ROUTED),
        nibbles(
            lambda two: swap_nibbles(two.reshape(len(two), -1, 4)[..., ::-1]).reshape(two.shape)
        ),
        where=has_int4,
    ),
    changed(
        "int4-signed",
        "INT4: nibbles are read as two's complement, not with an offset of 8",
        "",
        (*EXPERT, ROUTED),
        nibbles(lambda two: two ^ 0x88),
        where=has_int4,
    ),
    changed(
        "int4-zero-7",
        "INT4: 7 instead of 8 is taken from each nibble",
        "ggml-org/llama.cpp#17083",
        (*EXPERT, ROUTED),
        stored(Int4, zero_point_7),
        where=has_int4,
    ),
    changed(
        "int4-scale-neighbour",
        "INT4: each group has the scale of the group before it",
        "vllm-project/vllm#41161 vllm-project/vllm#13769",
        (*EXPERT, ROUTED),
        scales(Int4, lambda m: np.roll(m.scale, 1, axis=1)),
        where=has_int4,
    ),
    changed(
        "int4-scale-across",
        "INT4: the scales are read columns first",
        "vllm-project/vllm#13769",
        (*EXPERT, ROUTED),
        scales(Int4, lambda m: read_across(m.scale)),
        where=has_int4,
    ),
    changed(
        "int4-scale-fp8",
        "INT4: scales are rounded to e4m3",
        "",
        (*EXPERT, ROUTED),
        scales(Int4, scale_as_fp8),
        where=has_int4,
    ),
    changed(
        "int4-scale-ignored",
        "INT4: the scales are not applied",
        "",
        (*EXPERT, ROUTED),
        scales(Int4, lambda m: np.full_like(m.scale, 0x3F80)),
        where=has_int4,
    ),
    changed(
        "fp8-scale-divides",
        "FP8: weights are divided by weight_scale_inv, which multiplies",
        "",
        LINEAR,
        scales(Fp8Block, lambda m: 1 / m.scale),
        where=has_fp8,
    ),
    changed(
        "fp8-scale-across",
        "FP8: the scales of the blocks are read columns first",
        "",
        LINEAR,
        scales(Fp8Block, lambda m: read_across(m.scale)),
        where=has_fp8,
    ),
    changed(
        "fp8-partial-block",
        "FP8: a partial last block has the scale of the block before it",
        "modelscope/ms-swift#6851 huggingface/transformers#36026",
        LINEAR,
        scales(Fp8Block, partial_block_of_the_one_before),
        where=has_fp8,
    ),
    changed(
        "fp8-scale-ignored",
        "FP8: the scales are not applied",
        "deepseek-ai/DeepSeek-V3@8f1c948",
        LINEAR,
        scales(Fp8Block, lambda m: np.ones_like(m.scale)),
        where=has_fp8,
    ),
    changed(
        "fp8-fnuz",
        "FP8: e4m3fn is read as e4m3fnuz, half of it",
        "sgl-project/sglang#2667",
        LINEAR,
        scales(Fp8Block, lambda m: m.scale / 2),
        where=has_fp8,
    ),
)

NORMS = (
    written(
        "norm-eps",
        "the norms have another eps than the config's, 1e-5 for 1e-6 or the reverse",
        normed(lambda x, gain, eps: rms_norm(x, gain, other_eps(eps)), MAIN),
        "ml-explore/mlx-lm#67",
    ),
    written(
        "norm-eps-latent",
        "q_a_layernorm and kv_a_layernorm have the config's eps for 1e-6, or the reverse",
        dict.fromkeys(LATENT, latent_eps),
        "huggingface/transformers#44261 vllm-project/vllm#35515 sgl-project/sglang#16029 "
        "PaddlePaddle/FastDeploy#2797 pytorch/torchtitan#4395",
        where=lambda cfg: cfg.rms_norm_eps != 1e-6,
    ),
    written(
        "norm-eps-zero",
        "the norms have no eps",
        normed(lambda x, gain, eps: rms_norm(x, gain, 0.0)),
    ),
    written(
        "norm-gain-missing",
        "the norms have no gain",
        normed(lambda x, gain, eps: rms_norm(x, np.ones_like(gain), eps)),
    ),
    written(
        "norm-gain-plus-one",
        "1 is added to the gain of the norms",
        normed(lambda x, gain, eps: rms_norm(x, 1 + gain, eps)),
    ),
    written(
        "norm-sum",
        "the norms divide by the sum of squares, not by their mean",
        normed(divided_by_sum),
        "tenstorrent/tt-xla#5209",
    ),
    written("norm-centred", "the norms take off the mean, as LayerNorm does", normed(layer_norm)),
    written(
        "norm-q-skipped",
        "q_a_layernorm is skipped",
        normed(unnormed, LATENT[:1]),
        where=has_low_rank_queries,
    ),
    written("norm-kv-skipped", "kv_a_layernorm is skipped", normed(unnormed, LATENT[1:])),
    written(
        "norm-kv-with-key",
        "kv_a_layernorm takes its mean over latent and key",
        {LATENT[1]: over_latent_and_key},
    ),
    written("norm-final-skipped", "the final norm is skipped", normed(unnormed, MAIN[2:])),
    written(
        "norm-of-input",
        "the MLP reads the layer's input without attention",
        {MAIN[1]: of_the_layers_input},
    ),
)

POSITIONS = (
    written(
        "rope-halves",
        "channels are rotated in halves, not in pairs",
        dict.fromkeys(ROTATED, turn(by=rotate_halves)),
        "vllm-project/vllm#28968 vllm-project/vllm#34353 vllm-project/vllm-ascend#4641 "
        "ml-explore/mlx-lm#1431 ModelTC/lightllm#672 huggingface/optimum-intel#1877",
    ),
    written(
        "rope-halves-q",
        "channels of the queries are rotated in halves, those of the keys in pairs",
        {Q: turn(by=rotate_halves)},
        "vllm-project/vllm#28968",
    ),
    written(
        "rope-halves-k",
        "channels of the keys are rotated in halves, those of the queries in pairs",
        {K: turn(by=rotate_halves)},
    ),
    written(
        "rope-unpermuted-q",
        "queries are rotated in halves, but only the keys were brought into halves for it",
        {Q: turn(by=rotate_unpermuted)},
        "huggingface/optimum-intel#1877",
    ),
    written(
        "rope-unpermuted-k",
        "keys are rotated in halves, but only the queries were brought into halves for it",
        {K: turn(by=rotate_unpermuted)},
    ),
    written(
        "rope-missing",
        "nothing is rotated",
        dict.fromkeys(ROTATED, unrotated),
        "vllm-project/vllm#27373",
    ),
    written("rope-missing-k", "the keys are not rotated", {K: unrotated}),
    written(
        "rope-partial",
        "only half of the channels are rotated",
        dict.fromkeys(ROTATED, turn(by=rotate_some)),
        "vllm-project/vllm#41185",
    ),
    written(
        "rope-reversed", "rotation goes the other way", dict.fromkeys(ROTATED, turn(by=rotate_back))
    ),
    written("rope-q-late", "queries stand one position too far", {Q: turn(shift=1)}),
    written("rope-k-late", "keys stand one position too far", {K: turn(shift=1)}),
    written(
        "rope-from-one",
        "positions begin at 1; harmless, as scores depend on distance",
        dict.fromkeys(ROTATED, turn(shift=1)),
    ),
    written(
        "rope-theta",
        "rope_theta is another model's, 10000 or 50000",
        settings(lambda cfg: replace(cfg, rope_theta=50000.0 if cfg.rope_theta == 1e4 else 1e4)),
        points=ROTATED,
    ),
    written(
        "yarn-off",
        "YaRN is off: neither its frequencies nor its softmax scale",
        settings(without_yarn),
        "red-hat-data-services/vllm-cpu@efe1b6e07 AI-Hypercomputer/maxtext@f1498e186",
        where=has_yarn,
    ),
    written(
        "yarn-frequencies",
        "YaRN's frequencies are not used, its softmax scale is",
        dict.fromkeys(ROTATED, turn(without_yarn)),
        where=has_yarn,
    ),
    written(
        "yarn-factor",
        "YaRN's factor is another model's, 32 or 64",
        settings(yarn(factor=other_factor)),
        "huggingface/transformers#40320 huggingface/transformers#37139",
        where=has_yarn,
    ),
    written(
        "yarn-betas",
        "YaRN's betas are another model's, 32/1 or 1/1",
        dict.fromkeys(ROTATED, turn(betas=other_betas)),
        "ggml-org/llama.cpp#18013",
        where=has_yarn,
    ),
    written(
        "yarn-original",
        "YaRN takes max_position_embeddings for the original length",
        settings(yarn(original_max_position_embeddings=lambda cfg: cfg.max_position_embeddings)),
        points=ROTATED,
        where=has_yarn,
    ),
    written(
        "yarn-linear",
        "all frequencies are divided by YaRN's factor",
        dict.fromkeys(ROTATED, turn(without_yarn, stretch=lambda cfg: 1 / yarn_factor(cfg))),
        where=has_yarn,
    ),
    written(
        "yarn-mscale-rotation",
        "mscale multiplies cos and sin",
        dict.fromkeys(ROTATED, lambda x, here: x * mscale(here.cfg)),
        "kekzl/imp#880",
        fitted=Fitted("factor on the rotated channels", mscale),
        where=has_mscale,
    ),
    scale(
        "scale-mscale-missing",
        "the softmax scale lacks mscale²",
        lambda cfg: cfg.qk_head_dim**-0.5,
        "huggingface/transformers#47435 huggingface/optimum-intel#1877 "
        "onnxruntime/mobius#548 sgl-project/sglang#3785 ml-explore/mlx-lm#768",
        where=has_mscale,
    ),
    scale(
        "scale-mscale-once",
        "the softmax scale has mscale, not its square",
        lambda cfg: mscale(cfg) * cfg.qk_head_dim**-0.5,
        "ggml-org/llama.cpp#17945 ggml-org/llama.cpp#18006 ggml-org/llama.cpp#14896",
        where=has_mscale,
    ),
    scale(
        "scale-mscale-twice",
        "mscale² is applied twice",
        lambda cfg: mscale(cfg) ** 4 * cfg.qk_head_dim**-0.5,
        "ggml-org/llama.cpp#17945",
        where=has_mscale,
    ),
    scale(
        "scale-nope",
        "the softmax scale counts the channels without rotation only",
        lambda cfg: mscale(cfg) ** 2 * cfg.qk_nope_head_dim**-0.5,
    ),
    scale(
        "scale-latent",
        "the softmax scale is that of latent and key, without mscale²",
        lambda cfg: (cfg.kv_lora_rank + cfg.qk_rope_head_dim) ** -0.5,
        "vllm-project/vllm#41569",
    ),
    scale(
        "scale-hidden",
        "the softmax scale takes hidden_size / num_attention_heads for the size of a head",
        lambda cfg: mscale(cfg) ** 2 * (cfg.hidden_size / cfg.num_attention_heads) ** -0.5,
    ),
    scale(
        "scale-inverse",
        "scores are divided by the softmax scale",
        lambda cfg: 1 / softmax_scale(cfg),
        "AI-Hypercomputer/maxtext@f1498e186",
    ),
)

ATTENTION = (
    written(
        "mask-missing",
        "a token sees those after it",
        attended(lambda T: np.ones((T, T), bool)),
        "lablup/mlxcel#618",
    ),
    written("mask-strict", "a token does not see itself", attended(all_but_oneself)),
    written(
        "mask-first", "the first token is invisible to the others", attended(all_but_the_first)
    ),
    written("mask-window", "a token sees half a prompt back", attended(half_a_prompt_back)),
    misread(
        "q-split",
        "a head of the queries is split into rotated and plain channels in the wrong order",
        {
            end: by_head(lambda q, cfg: np.roll(q, -cfg.qk_rope_head_dim, axis=-1))
            for end in ("q_b_proj", "q_proj")
        },
        (Q, SCORES),
    ),
    misread(
        "kv-a-split",
        "kv_a_proj_with_mqa is split into key and latent, not into latent and key",
        {"with_mqa": lambda kv, here: np.roll(kv, -here.cfg.qk_rope_head_dim, axis=-1)},
        ("kv_a_layernorm", K),
    ),
    misread(
        "kv-b-split",
        "a head of kv_b_proj is split into value and key, not into key and value",
        {"kv_b_proj": by_head(lambda kv, cfg: np.roll(kv, -cfg.v_head_dim, axis=-1))},
        (SCORES, CONTEXT),
    ),
    misread(
        "kv-b-whole",
        "kv_b_proj is split into all keys and all values, not head by head",
        {"kv_b_proj": by_head(heads_behind_each_other)},
        (SCORES, CONTEXT),
    ),
    misread(
        "kv-b-interleaved",
        "the heads of kv_b_proj are read in turn",
        {"kv_b_proj": by_head(interleaved)},
        (SCORES, CONTEXT),
    ),
    misread(
        "kv-b-heads-shifted",
        "each head has key and value of the head before it",
        {"kv_b_proj": by_head(lambda kv, cfg: np.roll(kv, 1, axis=1))},
        (SCORES, CONTEXT),
    ),
    written(
        "kv-b-untransposed",
        "the key half of kv_b_proj is used without transposing it",
        {"kv_b_proj": key_untransposed},
        "ikawrakow/ik_llama.cpp#394 ikawrakow/ik_llama.cpp#411",
    ),
    misread(
        "cache-latent-unnormed",
        "the latent is cached before its norm",
        {"kv_a_layernorm": latent_before_norm},
        ("kv_b_proj",),
    ),
    misread(
        "cache-key-unrotated", "the key is cached before its rotation", {K: unrotated}, (SCORES,)
    ),
    written(
        "heads-reversed",
        "the heads stand in reverse order before o_proj",
        {CONTEXT: by_head(lambda x, cfg: x[:, ::-1])},
    ),
    written(
        "heads-interleaved",
        "the channels of the heads stand in turn before o_proj",
        {CONTEXT: by_head(lambda x, cfg: x.swapaxes(1, 2))},
    ),
)

LAYERS = (
    written(
        "residual-attention-missing",
        "attention replaces the residual stream",
        {"#attn_residual": lambda x, here: here["self_attn"]},
    ),
    written(
        "residual-mlp-missing",
        "the MLP replaces the residual stream",
        {"model.layers": lambda x, here: here["mlp"]},
    ),
    written(
        "residual-attention-normed",
        "attention is added to the normed input",
        {"#attn_residual": lambda x, here: here["input_layernorm"] + here["self_attn"]},
    ),
    written(
        "residual-mlp-normed",
        "the MLP is added to its normed input",
        {"model.layers": lambda x, here: here["post_attention_layernorm"] + here["mlp"]},
    ),
    written(
        "residual-twice",
        "the residual stream is added twice",
        {"model.layers": lambda x, here: x + here["#attn_residual"]},
    ),
    written(
        "layer-dropped",
        "a layer is dropped",
        {"model.layers": lambda x, here: here.x},
        "lablup/mlxcel#618",
    ),
    written("layer-twice", "a layer is run twice", {"model.layers": layer_again}),
    changed(
        "layer-of-neighbour",
        "a layer has the weights of the layer before it",
        "",
        LAYER,
        of_the_layer_before,
    ),
    written(
        "float16-clip",
        "values beyond 65504 are clipped",
        dict.fromkeys(
            ("model.embed_tokens", "#attn_residual", "model.layers", ROUTED, ".mlp"), clipped
        ),
        "vllm-project/vllm#13232 ikawrakow/ik_llama.cpp#292 lablup/mlxcel#618",
        strength=None,
    ),
    written(
        "not-finite",
        "the experts of a token give NaN",
        {ROUTED: last_token_not_finite},
        "vllm-project/vllm#42426 sgl-project/sglang#28378 sgl-project/sglang#15306",
        predicts=False,
        strength=None,
    ),
)

ENDS = (
    changed(
        "embedding-shifted",
        "each token has the embedding of the next id",
        "",
        ("model.embed_tokens",),
        embedding_shifted,
    ),
    scaled(
        "embedding-scaled",
        "embeddings are multiplied by the root of hidden_size",
        "model.embed_tokens",
        "factor on the embeddings",
        lambda cfg: cfg.hidden_size**0.5,
    ),
    changed("head-tied", "the embedding takes the place of lm_head", "", ("lm_head",), head_tied),
    written(
        "logits-shifted",
        "each logit stands one id too far",
        {"lm_head": lambda x, here: np.roll(x, 1, axis=-1)},
    ),
    scaled(
        "logits-scaled",
        "logits are divided by the root of hidden_size",
        "lm_head",
        "factor on the logits",
        lambda cfg: cfg.hidden_size**-0.5,
    ),
    written(
        "logits-softcap",
        "logits are squashed by 30·tanh(x/30)",
        {"lm_head": lambda x, here: 30 * np.tanh(x / 30)},
    ),
)

FAULTS: tuple[Fault, ...] = (
    ROUTER + EXPERTS + STORED + NORMS + POSITIONS + ATTENTION + LAYERS + ENDS
)
BY_ID = {f.id: f for f in FAULTS}

# Sets that give the same numbers, or do unless the points between them are in the dump
equivalent: tuple[tuple[str, ...], ...] = (
    ("scaling-dropped", "normalised-after-scaling"),
    ("gate-up-swapped", "silu-on-up"),  # but for dense and shared MLPs
    ("norm-kv-skipped", "cache-latent-unnormed"),
    ("rope-missing-k", "cache-key-unrotated"),
)
