"""SwiGLU, and the mixture: a shared expert for every token, routed experts for those who chose.

    E(x) = W_down (silu(W_gate x) · W_up x)             silu(z) = z·sigmoid(z)         [T, D]
    y    = Σ_k g[k] · E_top[k](x) + E_shared(x)                                        [T, D]

Sources: Shazeer, arXiv:2002.05202, eq. 6 (SwiGLU); DeepSeek-V3 (arXiv:2412.19437), eq. 12.
Checkpoint: `mlp.experts.E.{gate,up,down}_proj`, `mlp.shared_experts.*` (n_shared_experts stored
as one matrix of that many times the width), and `mlp.{gate,up,down}_proj` in the first
`first_k_dense_replace` layers, which are dense. K2: 384 routed experts of width 2048, INT4.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from refmoe.config import Config
from refmoe.model.matrix import Matrix, array_module
from refmoe.model.numerics import Numerics
from refmoe.model.router import GateWeights, Routing, route, sigmoid


class MlpWeights(NamedTuple):
    gate_proj: Matrix  # [F, D]
    up_proj: Matrix  # [F, D]
    down_proj: Matrix  # [D, F]


class MoeWeights(NamedTuple):
    gate: GateWeights
    shared_experts: MlpWeights | None


Experts = Callable[[int], MlpWeights]  # expert index → its matrices, until the next is asked for


@runtime_checkable
class Lender(Protocol):
    """Experts that are lent, not kept: what streams them from a disk into a few places."""

    def __call__(self, e: int) -> MlpWeights: ...

    def loans(self, chosen: Sequence[int], x: np.ndarray) -> Iterator[dict[int, MlpWeights]]:
        """All of `chosen` in this order, some at a time; a loan ends when the next is asked for.

        x [T, D] is what chose them, from which the next layer's choice can be guessed.
        """
        ...


class Lent(NamedTuple):
    """Some of a lender's, passed on: whoever gets them knows that they are not to be kept."""

    matrices: dict[int, MlpWeights]

    def __call__(self, e: int) -> MlpWeights:
        return self.matrices[e]

    def loans(self, chosen: Sequence[int], x: np.ndarray) -> Iterator[dict[int, MlpWeights]]:
        yield {e: self.matrices[e] for e in chosen}


def swiglu(x: np.ndarray, w: MlpWeights, nx: Numerics) -> np.ndarray:
    """x [T, D] → [T, D]."""
    gate = nx.point("gate_proj", nx.linear(x, w.gate_proj))  # [T, F]
    up = nx.point("up_proj", nx.linear(x, w.up_proj))  # [T, F]
    act = nx.point("act", gate * sigmoid(gate) * up)
    return nx.point("down_proj", nx.linear(act, w.down_proj))


def routed_experts(x: np.ndarray, routing: Routing, expert: Experts, nx: Numerics) -> np.ndarray:
    """The routed sum, [T, D]: expert by expert in index order, each with all rows that chose it.

    This is the definition of the `nx.experts` seam. `experts.E#rows` tells which rows the points
    of expert E belong to. A row that names an expert twice gets it twice.
    """
    xp = array_module(x)
    y = xp.zeros_like(x)
    for e, w in in_order(expert, xp.unique(routing.experts).tolist(), x):
        rows, slot = xp.nonzero(routing.experts == e)  # [n], [n]
        nx.tap(f"experts.{e}#rows", rows)
        out = swiglu(x[rows], w, nx.within(f"experts.{e}."))  # [n, D]
        weight = routing.weights[rows, slot].astype(x.dtype, copy=False)
        xp.add.at(y, rows, weight[:, None] * out)
    return y


def in_order(
    expert: Experts, chosen: Sequence[int], x: np.ndarray
) -> Iterator[tuple[int, MlpWeights]]:
    """Each of `chosen` with its matrices, whether they are lent or kept."""
    if isinstance(expert, Lender):
        for loan in expert.loans(chosen, x):
            yield from loan.items()
    else:
        for e in chosen:
            yield e, expert(e)


def moe(x: np.ndarray, w: MoeWeights, expert: Experts, cfg: Config, nx: Numerics) -> np.ndarray:
    """x [T, D] → [T, D]."""
    routing = route(x, w.gate, cfg, nx)
    if w.shared_experts is None or not nx.shared_first:
        return with_shared(x, nx.experts(x, routing, expert, nx), w, nx)
    shared = of_all(x, w.shared_experts, nx)
    y = nx.point("experts", nx.experts(x, routing, expert, nx))
    return y + nx.bring(shared, y)


def with_shared(x: np.ndarray, y: np.ndarray, w: MoeWeights, nx: Numerics) -> np.ndarray:
    """The routed sum y and the shared expert of x: [T, D] → [T, D]."""
    y = nx.point("experts", y)
    if w.shared_experts is None:
        return y
    return y + nx.bring(of_all(x, w.shared_experts, nx), y)


def of_all(x: np.ndarray, w: MlpWeights, nx: Numerics) -> np.ndarray:
    """The shared expert, where its weights are."""
    x = nx.bring(x, w.gate_proj)
    return nx.point("shared_experts", swiglu(x, w, nx.within("shared_experts.")))
