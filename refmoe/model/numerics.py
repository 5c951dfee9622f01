"""How to compute, never what: precision, operations, and who watches.

    Precision     the type of activations, and what is lost where an engine writes a tensor
    Operations    the building blocks of a layer, each defined in model/ and replaceable by a twin
    Watching      who sees the tensors, and where in the network we are

`Numerics` is all three, and the conventions in which correct engines differ. A *point* is a place
where real engines write a tensor to memory; a *tap* is one that they keep wide:

    c_q = nx.point("q_a_layernorm", c_q)        rounded by the precision, shown to the watcher
    p   = nx.tap("#probs", p)                   shown, never rounded

**The computation goes on with what the watcher returns.** A watcher that records makes a trace; one
that returns another engine's tensors lets every operation be judged on that engine's own inputs;
one that spoils a value injects a fault. Names are the module paths of the Hugging Face model, so
that a torch forward hook names a foreign dump; `#` stands where it has no module. The table of all
of them is model/points.py.

    float64     the truth: float64 everywhere, norm, softmax, router and rotation included
    float32     the working engine
    bfloat16    float32 arithmetic, every point rounded to bf16: what GPUs do
    float16     float32 arithmetic, every point rounded to float16
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

import numpy as np

from refmoe.engines import CONVENTIONS, Conventions
from refmoe.model.matrix import Matrix, round_bf16

Linear = Callable[[np.ndarray, Matrix], np.ndarray]
Round = Callable[[np.ndarray], np.ndarray]
Watch = Callable[[str, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class WatchSome:
    """A watcher of some points alone: what nobody looks at is never made whole."""

    look: Watch
    wants: Callable[[str], bool]  # by the point's name

    def __call__(self, path: str, x: np.ndarray) -> np.ndarray:
        return self.look(path, x)


class NonFinite(ArithmeticError):
    """A point held NaN or infinity: `str()` names the first such point and the row."""


@dataclass(frozen=True, kw_only=True)
class Precision:
    """The type of activations, and what every point is rounded to."""

    name: str  # a key of PRECISIONS
    dtype: type[np.floating[Any]]  # float64 or float32
    round: Round | None = None  # None: nothing is lost


@dataclass(frozen=True, kw_only=True)
class Operations:
    """The building blocks of a layer: each is defined in model/, and fast/ has quicker twins."""

    linear: Linear  # x [T, I], W [O, I] → x Wᵀ [T, O]                          matrix.linear
    gate: Linear  # the router's product, float32 or wider                      matrix.linear
    norm: Callable[..., np.ndarray]  # x [T, D], gain [D], eps → [T, D]         norm.rms_norm
    rotate: Callable[..., np.ndarray]  # x [..., R], cos, sin [..., R/2]        rope.rotate
    add: Callable[[np.ndarray, np.ndarray], np.ndarray]  # x + y               operator.add
    swiglu: Callable[..., np.ndarray]  # x [T, D], MlpWeights, nx → [T, D]      experts.swiglu
    experts: Callable[..., np.ndarray]  # x, routing, Experts, nx → [T, D]      routed_experts
    expanded: Callable[..., np.ndarray]  # attention, keys and values made      mla.expanded
    absorbed: Callable[..., np.ndarray]  # attention over the latent            mla.absorbed
    attention: Literal["expanded", "absorbed", "auto"] = "expanded"  # auto: whichever costs less


@dataclass(frozen=True, kw_only=True)
class Watching:
    """Who sees the tensors, and the module path of the place in the network."""

    watch: Watch | None = None
    stop_at_nonfinite: bool = True
    scope: str = ""  # "model.layers.3.self_attn."
    segment: str = ""  # "@1" inside the second of several prompts

    def within(self, scope: str) -> Self:
        """Return these numerics one module further in: `nx.within("self_attn.")`."""
        return replace(self, scope=self.scope + scope)

    def within_segment(self, i: int) -> Self:
        """Return these numerics inside the i-th of several prompts."""
        return replace(self, segment=f"@{i}")

    def watching(self, watch: Watch | None) -> Self:
        """Return these numerics with this watcher, or with none."""
        return replace(self, watch=watch)

    def path(self, name: str) -> str:
        """Return a point's full name. The empty name is the output of the module itself."""
        scope = self.scope.removesuffix(".") if name[:1] in ("", "#") else self.scope
        return scope + name + self.segment

    def watches(self, name: str) -> bool:
        """Tell whether the watcher looks at this point; one without `wants(path)` looks at all."""
        if self.watch is None:
            return False
        wants = getattr(self.watch, "wants", None)
        return wants is None or bool(wants(self.path(name)))

    def takes_rows(self, name: str) -> bool:
        """Tell whether the watcher takes this point in blocks of rows, one after another.

        One without `takes_rows(path)` gets every point whole.
        """
        takes = getattr(self.watch, "takes_rows", None)
        return takes is not None and bool(takes(self.path(name)))

    def tap(self, name: str, x: np.ndarray) -> np.ndarray:
        """Show x as it is, and return what the computation goes on with."""
        if self.watch is None or not self.watches(name):
            return x
        path = self.path(name)
        seen = np.asarray(self.watch(path, x))
        if seen.shape != x.shape:
            raise ValueError(f"{path}: the watcher returned {seen.shape}, expected {x.shape}")
        return seen.astype(x.dtype, copy=False)


@dataclass(frozen=True, kw_only=True)
class Numerics(Precision, Operations, Watching):
    """Precision, operations, watcher and conventions: the network is the same under all of them."""

    conventions: Conventions = CONVENTIONS["refmoe"]

    def computing_with(self, other: Operations) -> Self:
        """Return these numerics with another's operations, but with their own form of attention."""
        names = (f.name for f in fields(Operations) if f.name != "attention")
        return replace(self, **{name: getattr(other, name) for name in names})

    def point(self, name: str, x: np.ndarray) -> np.ndarray:
        """Round x, show it, and return what the computation goes on with.

        Raises `NonFinite` at the first point that holds NaN or infinity.
        """
        if self.round is not None:
            x = self.round(x)
        if self.stop_at_nonfinite and not np.isfinite(x).all():
            row = int(np.argwhere(~np.isfinite(x))[0][0])
            raise NonFinite(f"{self.path(name)}: the first value that is not finite, in row {row}")
        return self.tap(name, x)


def round_float16(x: np.ndarray) -> np.ndarray:
    """Return x rounded to float16, in its own type; overflow becomes infinity, as in engines."""
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(x.dtype)


PRECISIONS = {
    p.name: p
    for p in (
        Precision(name="float64", dtype=np.float64),
        Precision(name="float32", dtype=np.float32),
        Precision(name="bfloat16", dtype=np.float32, round=round_bf16),
        Precision(name="float16", dtype=np.float32, round=round_float16),
    )
}
