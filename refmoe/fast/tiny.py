"""Operations for a model so small that it fits into a processor's cache in float32.

NumPy multiplies matrices of a few hundred rows as quickly as kernels do, once they are decoded, and
there is nothing to load or to compile: the first word comes at once. Generation takes them where
the whole model is tiny (`run.generate.is_tiny`), with BLAS in one thread, so that no token depends
on how many there are. Twins: `matrix.linear`, `norm.rms_norm`,
`experts.routed_experts`, `mla.expanded` and `mla.absorbed`, whose results they have to the bit.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from refmoe.model import mla
from refmoe.model.experts import Experts, routed_experts
from refmoe.model.matrix import Matrix, dequantize
from refmoe.model.numerics import Numerics
from refmoe.model.router import Routing


class TinyOperations:
    """Operations in float32 over decoded matrices, which are kept unless they are streamed."""

    def __init__(self, rounded: tuple[str, ...], keep: bool):
        self.rounded, self.keep = rounded, keep  # `Conventions.rounded_products`
        self.decoded: dict[int, tuple[Matrix, np.ndarray]] = {}  # by id; the matrix keeps its id

    def wide(self, m: Matrix) -> np.ndarray:
        """Return the matrix in float32 [O, I]."""
        if isinstance(m, np.ndarray):
            return m.astype(np.float32, copy=False)
        known = self.decoded.get(id(m))
        if known is None:
            known = m, dequantize(m, np.float32, self.rounded)
            if self.keep:
                self.decoded[id(m)] = known
        return known[1]

    def linear(self, x: np.ndarray, m: Matrix) -> np.ndarray:
        """y = x Wᵀ: x [T, I] → [T, O]."""
        return x @ self.wide(m).T

    def norm(self, x: np.ndarray, gain: Matrix, eps: float) -> np.ndarray:
        """RMSNorm: x [T, D] → [T, D]."""
        mean = (x * x).mean(axis=-1, keepdims=True)
        return x / np.sqrt(mean + x.dtype.type(eps)) * self.wide(gain)

    def experts(
        self, x: np.ndarray, routing: Routing, experts: Experts, nx: Numerics
    ) -> np.ndarray:
        """Return the routed sum [T, D]; a single row's without sorting rows by expert."""
        if len(x) != 1 or nx.watch is not None:
            return routed_experts(x, routing, experts, nx)
        y = np.zeros_like(x)
        for e, g in sorted(zip(routing.experts[0].tolist(), routing.weights[0], strict=True)):
            y += g * nx.swiglu(x, experts(e), nx.within(f"experts.{e}."))
        return y

    def expanded(self, q_nope: Any, q_pe: Any, kv_b_proj: Matrix, *rest: Any) -> np.ndarray:
        """Attend with keys and values made: `mla.expanded`."""
        return mla.expanded(q_nope, q_pe, self.wide(kv_b_proj), *rest)

    def absorbed(self, q_nope: Any, q_pe: Any, kv_b_proj: Matrix, *rest: Any) -> np.ndarray:
        """Attend over the latent: `mla.absorbed`."""
        return mla.absorbed(q_nope, q_pe, self.wide(kv_b_proj), *rest)


def with_tiny_operations(nx: Numerics, keep: bool) -> Numerics:
    """Return these numerics with operations for a tiny model; `keep` what is decoded."""
    own = TinyOperations(nx.conventions.rounded_products, keep)
    return replace(
        nx,
        linear=own.linear,
        gate=own.linear,
        norm=own.norm,
        experts=own.experts,
        expanded=own.expanded,
        absorbed=own.absorbed,
    )
