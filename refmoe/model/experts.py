"""SwiGLU, and the mixture: a shared expert for every token, routed experts for those who chose.

    E(x) = W_down (silu(W_gate x) · W_up x)             silu(z) = z·sigmoid(z)         [T, D]
    y    = Σ_k g[k] · E_top[k](x) + E_shared(x)                                        [T, D]

Sources: Shazeer, arXiv:2002.05202, eq. 6 (SwiGLU); DeepSeek-V3 (arXiv:2412.19437), eq. 12.
Checkpoint: `mlp.experts.E.{gate,up,down}_proj`, `mlp.shared_experts.*` (n_shared_experts stored
as one matrix of that many times the width), and `mlp.{gate,up,down}_proj` in the first
`first_k_dense_replace` layers, which are dense. K2: 384 routed experts of width 2048, INT4.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from refmoe.config import Config
from refmoe.model.matrix import Matrix, array_module
from refmoe.model.numerics import Numerics
from refmoe.model.router import GateWeights, Routing, route, sigmoid


class MlpWeights(NamedTuple):
    """The three matrices of SwiGLU."""

    gate_proj: Matrix  # [F, D]
    up_proj: Matrix  # [F, D]
    down_proj: Matrix  # [D, F]


class MoeWeights(NamedTuple):
    """A mixture but for its routed experts, which are too many (`Experts`)."""

    gate: GateWeights
    shared_experts: MlpWeights | None


class Experts(Protocol):
    """The routed experts of one layer, which may be too many to have at once."""

    @property
    def streamed(self) -> bool:
        """Whether matrices become invalid when others are asked for."""
        ...

    def __call__(self, e: int) -> MlpWeights:
        """Return the matrices of expert e."""
        ...

    def batches(self, chosen: Sequence[int], x: np.ndarray) -> Iterator[dict[int, MlpWeights]]:
        """Yield the chosen experts in order, some at a time.

        Of streamed experts a batch becomes invalid when the next one is asked for. x [T, D] is
        what the router chose them by: whoever reads ahead may guess from it.
        """
        ...


@dataclass(frozen=True)
class ExpertsFrom:
    """Experts that a function returns: one batch of all, or of each if they are streamed."""

    expert: Callable[[int], MlpWeights]
    streamed: bool = False

    def __call__(self, e: int) -> MlpWeights:
        return self.expert(e)

    def batches(self, chosen: Sequence[int], x: np.ndarray) -> Iterator[dict[int, MlpWeights]]:
        for batch in [[e] for e in chosen] if self.streamed else [chosen]:
            yield {e: self.expert(e) for e in batch}


def swiglu(x: np.ndarray, w: MlpWeights, nx: Numerics) -> np.ndarray:
    """Return W_down (silu(W_gate x) · W_up x), [T, D], of x [T, D]."""
    gate = nx.point("gate_proj", nx.linear(x, w.gate_proj))  # [T, F]
    up = nx.point("up_proj", nx.linear(x, w.up_proj))  # [T, F]
    act = nx.point("act", gate * sigmoid(gate) * up)  # [T, F]
    return nx.point("down_proj", nx.linear(act, w.down_proj))


def routed_experts(x: np.ndarray, routing: Routing, experts: Experts, nx: Numerics) -> np.ndarray:
    """Return Σ_k g[k] · E_top[k](x), [T, D]: experts in index order, each with its own rows.

    The tap `experts.E#rows` tells which rows chose expert E. A row that names an expert twice gets
    it twice.
    """
    xp = array_module(x)
    y = xp.zeros_like(x)
    for batch in experts.batches(xp.unique(routing.experts).tolist(), x):
        for e, w in batch.items():
            rows, slots = xp.nonzero(routing.experts == e)  # [n], [n]
            nx.tap(f"experts.{e}#rows", rows)
            out = nx.swiglu(x[rows], w, nx.within(f"experts.{e}."))  # [n, D]
            g = routing.weights[rows, slots].astype(x.dtype, copy=False)
            xp.add.at(y, rows, g[:, None] * out)
    return y


def moe(x: np.ndarray, w: MoeWeights, experts: Experts, cfg: Config, nx: Numerics) -> np.ndarray:
    """Route x [T, D], sum its chosen experts and add the shared one: [T, D]."""
    routing = route(x, w.gate, cfg, nx)
    y = nx.point("experts", nx.experts(x, routing, experts, nx))
    return add_shared_expert(x, y, w, nx)


def add_shared_expert(x: np.ndarray, y: np.ndarray, w: MoeWeights, nx: Numerics) -> np.ndarray:
    """Return the routed sum y and the shared expert of x, added: [T, D] → [T, D]."""
    if w.shared_experts is None:
        return y
    shared = nx.swiglu(x, w.shared_experts, nx.within("shared_experts."))
    return nx.add(y, nx.point("shared_experts", shared))
