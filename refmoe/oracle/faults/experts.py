"""Faults of the experts: routed and shared matrices, their activation, their sum."""

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
    Family,
    Here,
    Models,
    changed,
    misread,
    written,
)
from refmoe.oracle.faults.common import (
    WITH_SHARED,
    WITHOUT_INT4,
    experts,
    moe_of,
    plain,
    shared,
)

# --- what several of these faults use


def with_activation(rule: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Changes:
    """Compute rule(gate, up) as the activation of every MLP."""
    return {".act": lambda x, here: rule(here.beside("gate_proj"), here.beside("up_proj"))}


EXPERTS = Family("experts")

EXPERTS += shared("shared-dropped", "the shared experts are missing", lambda cfg: 0.0)

EXPERTS += shared(
    "shared-twice",
    "the shared experts are added twice",
    lambda cfg: 2.0,
    "vllm-project/vllm#40673 sgl-project/sglang#4883 sgl-project/sglang#25974 "
    "vllm-project/vllm#31523",
)


def first_shared_expert_only(x: np.ndarray, here: Here) -> np.ndarray:
    """Zero the channels beyond those of the first shared expert."""
    return np.where(np.arange(x.shape[-1]) < here.cfg.moe_intermediate_size, x, 0)


EXPERTS += misread(
    "shared-width",
    "only the first of several shared experts, stored as one, is used",
    {"shared_experts.act": first_shared_expert_only},
    ("shared_experts.down_proj", "shared_experts"),
    where=Models("several shared experts", lambda cfg: cfg.n_shared_experts > 1),
)


def next_expert(decoder: Decoder, i: int, e: int) -> MlpWeights:
    """Return the matrices of expert e + 1."""
    return decoder.experts[i]((e + 1) % decoder.cfg.n_routed_experts)


EXPERTS += changed(
    "experts-shifted",
    "an expert's place is taken by the next one",
    "",
    (*EXPERT, ROUTED),
    experts(next_expert),
)


def previous_expert(decoder: Decoder, i: int, e: int) -> MlpWeights:
    """Return the matrices of expert e - 1."""
    return decoder.experts[i]((e - 1) % decoder.cfg.n_routed_experts)


EXPERTS += changed(
    "experts-shifted-back",
    "an expert's place is taken by the one before it",
    "",
    (*EXPERT, ROUTED),
    experts(previous_expert),
)


def expert_without_output(decoder: Decoder, i: int, e: int) -> MlpWeights:
    """Return the matrices of expert e with a down_proj of zeros."""
    w = decoder.experts[i](e)
    return w._replace(down_proj=np.zeros(w.down_proj.shape, decoder.nx.dtype))


EXPERTS += changed(
    "experts-missing",
    "routed experts give nothing",
    "sgl-project/sglang#21348",
    (*OUT, ROUTED),
    experts(expert_without_output),
)


def random_expert(decoder: Decoder, i: int, e: int) -> MlpWeights:
    """Return random matrices of the usual size."""
    rng = np.random.default_rng((i, e))
    draw = [0.02 * rng.standard_normal(m.shape) for m in decoder.experts[i](e)]
    return MlpWeights(*(w.astype(decoder.nx.dtype) for w in draw))


EXPERTS += changed(
    "experts-random",
    "routed experts were never loaded",
    "",
    (*EXPERT, ROUTED),
    experts(random_expert),
    predicts=False,
)


def swap_gate_and_up(decoder: Decoder, i: int, e: int) -> MlpWeights:
    """Return the matrices of expert e, gate in the place of up and up in that of gate."""
    gate, up, down = decoder.experts[i](e)
    return MlpWeights(up, gate, down)


EXPERTS += changed(
    "gate-up-swapped",
    "gate and up are swapped in the routed experts",
    "sgl-project/sglang#11081 vllm-project/vllm#40082 vllm-project/vllm#42821",
    (*IN, ROUTED),
    experts(swap_gate_and_up),
)


def project_shared(name: str) -> Change:
    """Multiply the shared experts' input by another of their matrices."""

    def change(_: np.ndarray, here: Here) -> np.ndarray:
        w = moe_of(here.w).shared_experts
        return here["post_attention_layernorm"] @ plain(here.decoder, getattr(w, name)).T

    return change


EXPERTS += written(
    "gate-up-swapped-shared",
    "gate and up are swapped in the shared experts",
    {
        "mlp.shared_experts.gate_proj": project_shared("up_proj"),
        "mlp.shared_experts.up_proj": project_shared("gate_proj"),
    },
    "vllm-project/vllm#40082",
    where=WITH_SHARED,
)


def swap_columns(decoder: Decoder, i: int, e: int) -> MlpWeights:
    """Return the matrices of expert e with each two neighbouring columns swapped."""

    def swap(m: Matrix) -> np.ndarray:
        w = plain(decoder, m)
        even = w.shape[1] // 2 * 2
        pairs = w[:, :even].reshape(len(w), -1, 2)[..., ::-1].reshape(len(w), even)
        return np.concatenate((pairs, w[:, even:]), axis=1)

    return MlpWeights(*map(swap, decoder.experts[i](e)))


EXPERTS += changed(
    "columns-swapped",
    "neighbouring columns of the routed experts are swapped, as by the nibbles of INT4",
    "ggml-org/llama.cpp#17083",
    (*EXPERT, ROUTED),
    experts(swap_columns),
    where=WITHOUT_INT4,
)


def read_interleaved_as_halves(decoder: Decoder, i: int, e: int) -> MlpWeights:
    """Return gate and up as two halves of their rows stored in turn."""
    gate, up, down = decoder.experts[i](e)
    both = np.stack((plain(decoder, gate), plain(decoder, up)), axis=1)  # [F, 2, D]
    first, second = np.split(both.reshape(-1, both.shape[-1]), 2)
    return MlpWeights(first, second, down)


EXPERTS += changed(
    "gate-up-interleaved",
    "rows of gate and up, stored in turn, are read as two halves",
    "",
    (*IN, ROUTED),
    experts(read_interleaved_as_halves),
)


def read_down_columns_first(decoder: Decoder, i: int, e: int) -> MlpWeights:
    """Return the matrices of expert e, down_proj's numbers read columns first."""
    w = decoder.experts[i](e)
    down = plain(decoder, w.down_proj)
    return w._replace(down_proj=down.reshape(down.shape[::-1]).T)


EXPERTS += changed(
    "down-transposed",
    "down_proj is read columns first",
    "",
    (*OUT, ROUTED),
    experts(read_down_columns_first),
)


def weigh_inputs(y: np.ndarray, here: Here) -> np.ndarray:
    """Sum the outputs of the chosen experts, each run on its weight times x."""
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


EXPERTS += written(
    "weight-on-input",
    "an expert's weight multiplies its input, not its output",
    {ROUTED: weigh_inputs},
)

EXPERTS += written(
    "silu-on-up",
    "silu is applied to up, not to gate",
    with_activation(lambda g, u: g * u * sigmoid(u)),
)


def gelu(z: np.ndarray) -> np.ndarray:
    """Return gelu(z) = z·Φ(z)."""
    return 0.5 * z * (1 + np.vectorize(math.erf, otypes=[z.dtype])(z / math.sqrt(2)))


EXPERTS += written(
    "act-gelu", "gelu takes the place of silu", with_activation(lambda g, u: gelu(g) * u)
)


def gelu_tanh(z: np.ndarray) -> np.ndarray:
    """Return gelu(z) in its approximation by tanh."""
    return 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


EXPERTS += written(
    "act-gelu-tanh",
    "gelu, with its tanh, takes the place of silu",
    with_activation(lambda g, u: gelu_tanh(g) * u),
)

EXPERTS += written(
    "act-relu", "relu takes the place of silu", with_activation(lambda g, u: np.maximum(g, 0) * u)
)

EXPERTS += written(
    "act-sigmoid", "sigmoid takes the place of silu", with_activation(lambda g, u: sigmoid(g) * u)
)

EXPERTS += written(
    "act-missing", "gate and up are multiplied without silu", with_activation(lambda g, u: g * u)
)
