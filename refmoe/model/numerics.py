"""How to compute, never what: precision, the heavy seams, and the marks on every boundary.

A *point* is a place where real engines write a tensor to memory:

    c_q = nx.point("q_a_layernorm", c_q)        rounded by the policy, shown to the watcher
    p   = nx.tap("#probs", p)                   shown, never rounded: what engines keep wide

**What the watcher returns is what the computation goes on with.** A watcher that records is a
trace; one that returns another engine's tensor makes every operation be judged on that engine's
own inputs; one that spoils a value injects a fault. Paths are the module paths of the Hugging
Face model, so a torch forward hook names a foreign dump; `#` stands where it has no module.

    float64     the truth: float64 everywhere, norm, softmax, router and rotation included
    float32     the working engine
    bfloat16    float32 arithmetic, every point rounded to bf16: what GPUs do
    float16     the same with float16

Where some weights are in another memory than the processor's, `bring` carries x there and back. A
point looks for what is not finite only in the processor's own; elsewhere that would be a wait at
each. Sums and products hand it on, 0 times infinity included, so it is found where x comes back.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refmoe.engines import CONVENTIONS, Conventions
from refmoe.model.matrix import Matrix, round_bf16

Linear = Callable[[np.ndarray, Matrix], np.ndarray]
Bring = Callable[[np.ndarray, Any], np.ndarray]
Watch = Callable[[str, np.ndarray], np.ndarray]


class NonFinite(ArithmeticError):
    """A point held NaN or infinity: `str()` names the first one and the row."""


def stay(x: np.ndarray, there: Any) -> np.ndarray:
    """Where there is one memory, everything is there."""
    return x


@dataclass(frozen=True)
class Numerics:
    """Two Numerics differ in speed, rounding and conventions; the network is the same."""

    name: str
    dtype: type[np.floating[Any]]  # of activations: float64 or float32
    linear: Linear  # x [T, I], W [O, I] → [T, O]
    experts: Callable[..., np.ndarray]  # x [T, D], routing, expert(e), nx → [T, D]
    gate: Linear  # the router's product: float32 or wider, whatever the activations are
    expanded: Callable[..., np.ndarray]  # attention with keys and values made: model/mla.py
    absorbed: Callable[..., np.ndarray]  # attention over the latent: model/mla.py
    round: Callable[[np.ndarray], np.ndarray] | None = None  # None: nothing is lost
    watch: Watch | None = None
    conventions: Conventions = CONVENTIONS["refmoe"]
    attention: str = "expanded"  # or "absorbed", or "auto": whichever costs less
    cache: str | None = None  # "bf16": latents and rotated keys are kept in it
    room: int | None = None  # positions that a cache makes room for at once, and no more
    rows: int | None = None  # of a prompt that go through together, at most
    stop_at_nonfinite: bool = True
    bring: Bring = stay  # x to the memory in which an array or weights are; None: the processor's
    shared_first: bool = False  # the shared expert is computed elsewhere, meanwhile
    scope: str = ""  # "model.layers.3.self_attn."
    segment: str = ""  # "@1" inside the second of several prompts

    def within(self, scope: str) -> "Numerics":
        return replace(self, scope=self.scope + scope)

    def within_segment(self, i: int) -> "Numerics":
        return replace(self, segment=f"@{i}")

    def watching(self, watch: Watch | None) -> "Numerics":
        return replace(self, watch=watch)

    def path(self, name: str) -> str:
        """`#name` hangs on the module itself; the empty name is the module's own output."""
        scope = self.scope.removesuffix(".") if name[:1] in ("", "#") else self.scope
        return scope + name + self.segment

    def point(self, name: str, x: np.ndarray) -> np.ndarray:
        if self.round is not None:
            x = self.round(x)
        if self.stop_at_nonfinite and isinstance(x, np.ndarray) and not np.isfinite(x).all():
            row = int(np.argwhere(~np.isfinite(x))[0][0])
            raise NonFinite(f"{self.path(name)}: the first value that is not finite, in row {row}")
        return self.tap(name, x)

    def watches(self, name: str) -> bool:
        """Whether the watcher looks at this point; one without `wants(path)` looks at all."""
        if self.watch is None:
            return False
        wants = getattr(self.watch, "wants", None)
        return wants is None or bool(wants(self.path(name)))

    def tap(self, name: str, x: np.ndarray) -> np.ndarray:
        if self.watch is None or not self.watches(name):
            return x
        path = self.path(name)
        seen = np.asarray(self.watch(path, self.bring(x, None)))
        if seen.shape != x.shape:
            raise ValueError(f"{path}: the watcher returned {seen.shape}, expected {x.shape}")
        return self.bring(seen.astype(x.dtype, copy=False), x)


def round_float16(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # an engine in float16 overflows to infinity as well
        return x.astype(np.float16).astype(x.dtype)


POLICIES: dict[str, tuple[type[np.floating[Any]], Callable[[np.ndarray], np.ndarray] | None]] = {
    "float64": (np.float64, None),
    "float32": (np.float32, None),
    "bfloat16": (np.float32, round_bf16),
    "float16": (np.float32, round_float16),
}
