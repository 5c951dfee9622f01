"""Faults of the experts."""

import math
from collections.abc import Callable

import numpy as np

from refmoe.model.decoder import Decoder
from refmoe.model.experts import MlpWeights
from refmoe.model.matrix import Matrix
from refmoe.model.router import Routing, sigmoid
from refmoe.oracle.faults.base import (
    CHOICE,
    EXPERT,
    IN,
    OUT,
    ROUTED,
    WEIGHTS,
    Change,
    Changes,
    Here,
    _moe,
    changed,
    experts,
    has_int4,
    has_shared,
    misread,
    plain,
    shared,
    written,
)


def second_shared_missing(x: np.ndarray, here: Here) -> np.ndarray:
    return np.where(np.arange(x.shape[-1]) < here.cfg.moe_intermediate_size, x, 0)


def weight_on_input(y: np.ndarray, here: Here) -> np.ndarray:
    x, top, g = here["post_attention_layernorm"], here[CHOICE], here[WEIGHTS].astype(y.dtype)
    run, expert = here.nx.experts, here.decoder.experts[here.layer]
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
    gate, up, down = decoder.experts[i](e)
    return MlpWeights(up, gate, down)


def gate_up_interleaved(decoder: Decoder, i: int, e: int) -> MlpWeights:
    gate, up, down = decoder.experts[i](e)
    both = np.stack((plain(decoder, gate), plain(decoder, up)), axis=1)  # [F, 2, D]
    first, second = np.split(both.reshape(-1, both.shape[-1]), 2)
    return MlpWeights(first, second, down)


def columns_swapped(decoder: Decoder, i: int, e: int) -> MlpWeights:
    def swap(m: Matrix) -> np.ndarray:
        w = plain(decoder, m)
        even = w.shape[1] // 2 * 2
        pairs = w[:, :even].reshape(len(w), -1, 2)[..., ::-1].reshape(len(w), even)
        return np.concatenate((pairs, w[:, even:]), axis=1)

    return MlpWeights(*map(swap, decoder.experts[i](e)))


def projected(name: str) -> Change:
    """The shared experts' input through another of their matrices."""

    def change(_: np.ndarray, here: Here) -> np.ndarray:
        w = _moe(here.w).shared_experts
        return here["post_attention_layernorm"] @ plain(here.decoder, getattr(w, name)).T

    return change


def down_transposed(decoder: Decoder, i: int, e: int) -> MlpWeights:
    w = decoder.experts[i](e)
    down = plain(decoder, w.down_proj)
    return w._replace(down_proj=down.reshape(down.shape[::-1]).T)


def nothing(decoder: Decoder, i: int, e: int) -> MlpWeights:
    w = decoder.experts[i](e)
    return w._replace(down_proj=np.zeros(w.down_proj.shape, decoder.nx.dtype))


def next_expert(decoder: Decoder, i: int, e: int) -> MlpWeights:
    return decoder.experts[i]((e + 1) % decoder.cfg.n_routed_experts)


def expert_before(decoder: Decoder, i: int, e: int) -> MlpWeights:
    return decoder.experts[i]((e - 1) % decoder.cfg.n_routed_experts)


def expert_left_random(decoder: Decoder, i: int, e: int) -> MlpWeights:
    rng = np.random.default_rng((i, e))
    draw = [0.02 * rng.standard_normal(m.shape) for m in decoder.experts[i](e)]
    return MlpWeights(*(w.astype(decoder.nx.dtype) for w in draw))


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
