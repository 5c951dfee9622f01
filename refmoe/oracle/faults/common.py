"""Changes that several families use, and the models that have what a fault needs."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from refmoe.config import Config
from refmoe.model.decoder import Decoder, LayerWeights
from refmoe.model.experts import Experts, MlpWeights, MoeWeights
from refmoe.model.formats.bf16 import BF16
from refmoe.model.formats.fp8_block import Fp8Block
from refmoe.model.formats.int4 import Int4
from refmoe.model.formats.registry import find_scheme
from refmoe.model.matrix import Matrix, dequantize
from refmoe.model.numerics import Numerics
from refmoe.model.points import parse
from refmoe.model.router import GateWeights, Routing
from refmoe.oracle.faults.base import (
    Alter,
    Change,
    Fault,
    Fitted,
    Here,
    Models,
    Q,
    written,
)

# --- models that can have a fault


def _limits_groups(cfg: Config) -> bool:
    """Tell whether some groups of experts are refused."""
    return cfg.topk_group < cfg.n_group


def _can_halve_groups(cfg: Config) -> bool:
    """Tell whether twice as many groups could be formed and still hold the chosen experts."""
    G, E, K = 2 * cfg.n_group, cfg.n_routed_experts, cfg.num_experts_per_tok
    return _limits_groups(cfg) and not E % G and E // G * cfg.topk_group >= K


WITH_GROUPS = Models("several groups of experts", _limits_groups)
WITH_LARGE_GROUPS = Models("groups that can be halved", _can_halve_groups)
WITH_SHARED = Models("shared experts", lambda cfg: cfg.n_shared_experts > 0)
WITH_INT4 = Models("INT4 weights", lambda cfg: find_scheme(cfg.quantization, "int4") is not None)
WITHOUT_INT4 = Models("no INT4 weights", lambda cfg: not WITH_INT4(cfg))
WITH_FP8 = Models("FP8 weights", lambda cfg: find_scheme(cfg.quantization, "fp8") is not None)
WITH_Q_LORA = Models("`q_lora_rank`", lambda cfg: cfg.q_lora_rank is not None)
WITH_NORM_TOPK = Models("`norm_topk_prob`", lambda cfg: cfg.norm_topk_prob)


def gamma(cfg: Config) -> float:
    """Return γ, the factor on the routed experts."""
    return cfg.routed_scaling_factor


# --- weights


def plain(decoder: Decoder, m: Matrix) -> np.ndarray:
    """Return a stored matrix as numbers, under the decoder's conventions."""
    return dequantize(m, decoder.nx.dtype, decoder.nx.conventions.rounded_products)


def experts(change: Callable[[Decoder, int, int], MlpWeights]) -> Alter:
    """Give expert e of layer i the matrices change(decoder, i, e), made when it is asked for."""

    def alter(decoder: Decoder, layer: int | None) -> Decoder:
        def expert(i: int, e: int) -> MlpWeights:
            return change(decoder, i, e) if layer in (None, i) else decoder.experts[i](e)

        return decoder.with_experts(expert)

    return alter


def stored(form: type, change: Callable[[Any], Matrix]) -> Alter:
    """Replace every matrix m stored in one format by change(m)."""

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


# --- routing and mixture

Reroute = Callable[[np.ndarray, Routing, GateWeights, Config, Numerics], Routing]


def rerouted(change: Reroute) -> Alter:
    """Run the experts on another routing than the router's, whose points stay right."""

    def alter(decoder: Decoder, layer: int | None) -> Decoder:
        def run(x: np.ndarray, routing: Routing, expert: Experts, nx: Numerics) -> np.ndarray:
            i = parse(nx.scope.rstrip(".")).layer
            assert i is not None
            if layer in (None, i):
                gate = moe_of(decoder.layers[i]).gate
                routing = change(x, routing, gate, decoder.cfg, nx.watching(None))
            return decoder.nx.experts(x, routing, expert, nx)

        return decoder.using(replace(decoder.nx, experts=run))

    return alter


def moe_of(w: LayerWeights) -> MoeWeights:
    """Return the mixture of a layer that has one."""
    assert isinstance(w.mlp, MoeWeights), "no mixture in this layer"
    return w.mlp


def mixture(change: Change) -> Change:
    """Confine a change of `mlp` to the layers where it is a mixture."""
    return lambda x, here: change(x, here) if isinstance(here.w.mlp, MoeWeights) else x


def shared(id: str, text: str, factor: Callable[[Config], float], references: str = "") -> Fault:
    """Return a fault that adds the shared experts with another factor than 1."""

    def change(x: np.ndarray, here: Here) -> np.ndarray:
        return x + (factor(here.cfg) - 1) * here["mlp.shared_experts"]

    return written(
        id,
        text,
        {".mlp": mixture(change)},
        references,
        fitted=Fitted("factor on the shared experts", factor),
        where=WITH_SHARED,
    )


# --- rotation


def query(here: Here) -> np.ndarray:
    """Return the queries before rotation, [T, H, N+R]."""
    name = "q_b_proj" if here.w.self_attn.q_proj is None else "q_proj"
    q = here[f"self_attn.{name}"]
    return q.reshape(len(q), here.cfg.num_attention_heads, -1)


def unrotated(_: np.ndarray, here: Here) -> np.ndarray:
    """Return the channels that are rotated into this point, before rotation."""
    if here.path.endswith(Q):
        return query(here)[..., here.cfg.qk_nope_head_dim :]
    return here["self_attn.kv_a_proj_with_mqa"][:, here.cfg.kv_lora_rank :]
