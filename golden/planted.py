"""Faults planted in running engines, and the point where each must be found.

Every one of `FAULTS` is a patch of a live transformers model or of its code, as in the issues named
beside it; those of vLLM are planted by golden/make_vllm.py, and only their points are here.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import mlx.core as mx
import mlx.nn as mlx_nn
import torch
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as hf


class Fault(NamedTuple):
    name: str
    plant: Callable[[Any], Any]  # model → a context in which it is wrong
    points: tuple[str, ...]  # where it must be found
    ids: tuple[str, ...]  # of the dictionary, docs/faults.md; any of these names it


def gates(model: Any) -> list[Any]:
    return [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]


def attentions(model: Any) -> list[Any]:
    return [layer.self_attn for layer in model.model.layers]


@contextlib.contextmanager
def setting(objects: list[Any], **values: Any) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for x in objects:
            for name, value in values.items():
                stack.enter_context(mock.patch.object(x, name, value))
        yield


def route(weigh: Callable[..., Any], choose: Callable[..., Any] = lambda s, b: s + b) -> Any:
    """The router with other weights or another choice, in place of the module's forward."""

    def forward(self: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = x.view(-1, self.hidden_dim).float()
        logits = torch.nn.functional.linear(x, self.weight.float())
        top = choose(logits.sigmoid(), self.e_score_correction_bias).topk(self.top_k).indices
        weights = weigh(logits, self.e_score_correction_bias).gather(1, top)
        weights = weights / weights.sum(-1, keepdim=True) * self.routed_scaling_factor
        return logits, weights, top

    return mock.patch.object(hf.DeepseekV3TopkRouter, "forward", forward)


def halves(t: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotated as GPT-NeoX pairs channels; the result in the order that attention expects."""
    a, b = t.chunk(2, -1)
    cos, sin = (x[..., : x.shape[-1] // 2].unsqueeze(1) for x in (cos, sin))
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def rotation(change: Callable[..., Any]) -> Any:
    original = hf.apply_rotary_pos_emb_interleave

    def rotate(q: Any, k: Any, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> Any:
        return change(original, q, k, cos, sin)

    return mock.patch.object(hf, "apply_rotary_pos_emb_interleave", rotate)


def neox_q(original: Any, q: Any, k: Any, cos: Any, sin: Any) -> Any:
    return halves(q, cos, sin), original(q, k, cos, sin)[1]


def neox_both(_: Any, q: Any, k: Any, cos: Any, sin: Any) -> Any:
    return halves(q, cos, sin), halves(k, cos, sin)


def neox_k(original: Any, q: Any, k: Any, cos: Any, sin: Any) -> Any:
    return original(q, k, cos, sin)[0], halves(k, cos, sin)


def unturned(original: Any, q: Any, k: Any, cos: Any, sin: Any) -> Any:
    return original(q, k, torch.ones_like(cos), torch.zeros_like(sin))


def off_by_one(original: Any, q: Any, k: Any, cos: Any, sin: Any) -> Any:
    """The query one position late: its angle and that of position 1 together."""
    c, s = cos[:, 1:2].float(), sin[:, 1:2].float()
    late = (cos * c - sin * s).to(cos.dtype), (sin * c + cos * s).to(cos.dtype)
    return original(q, k, *late)[0], original(q, k, cos, sin)[1]


@contextlib.contextmanager
def tables(model: Any, **changes: Any) -> Iterator[None]:
    wrong = {**model.config.rope_parameters, **changes}
    with mock.patch.object(model.config, "rope_parameters", wrong):
        rotary = hf.DeepseekV3RotaryEmbedding(model.config)
    with mock.patch.object(model.model, "rotary_emb", rotary):
        yield


@contextlib.contextmanager
def weights(
    model: Any, name: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """One expert's matrix of the second mixture layer is changed, and put back."""
    stack = getattr(model.model.layers[2].mlp.experts, name).data
    expert = 7
    before = stack[expert].clone()
    stack[expert] = change(before)
    try:
        yield
    finally:
        stack[expert] = before


def swapped_halves(w: torch.Tensor) -> torch.Tensor:
    return torch.cat(w.chunk(2, 0)[::-1], 0)


def swapped_pairs(w: torch.Tensor) -> torch.Tensor:
    return w.unflatten(1, (-1, 2)).flip(-1).flatten(1)


def moe_without_shared(self: Any, x: torch.Tensor) -> torch.Tensor:
    _, weight, top = self.gate(x)
    self.shared_experts(x)
    return self.experts(x.view(-1, x.shape[-1]), top, weight).view(x.shape)


def moe_with_shared_twice(self: Any, x: torch.Tensor) -> torch.Tensor:
    _, weight, top = self.gate(x)
    y = self.experts(x.view(-1, x.shape[-1]), top, weight).view(x.shape)
    return y + 2 * self.shared_experts(x)


def without_mlp_residual(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    h = (
        hidden_states
        + self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
    )
    return self.mlp(self.post_attention_layernorm(h))


def mixtures(model: Any) -> list[Any]:
    return [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "gate")]


def mscale(model: Any) -> float:
    a = attentions(model)[0]
    return float((a.scaling * a.qk_head_dim**0.5) ** 0.5)


@contextlib.contextmanager
def shifted(model: Any) -> Iterator[None]:
    """Each expert's place is taken by the one before: an index off by one."""
    stacks = [
        getattr(m.experts, n).data for m in mixtures(model) for n in ("gate_up_proj", "down_proj")
    ]
    for stack in stacks:
        stack.copy_(stack.roll(1, 0))
    try:
        yield
    finally:
        for stack in stacks:
            stack.copy_(stack.roll(-1, 0))


def norms(rule: Callable[..., Any]) -> Any:
    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        y = rule(hidden_states.float(), self.weight.float(), self.variance_epsilon)
        return y.to(hidden_states.dtype)

    return mock.patch.object(hf.DeepseekV3RMSNorm, "forward", forward)


def unmasked() -> Any:
    original = hf.eager_attention_forward

    def attend(module: Any, q: Any, k: Any, v: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        return original(module, q, k, v, None, *args, **kwargs)

    return mock.patch.object(hf, "eager_attention_forward", attend)


def scaled_output(module: Any, factor: float) -> Any:
    original = module.forward
    return mock.patch.object(module, "forward", lambda x: original(x) * factor)


def head_tied(model: Any) -> Any:
    return mock.patch.object(model.lm_head, "weight", model.model.embed_tokens.weight)


class MlxFault(NamedTuple):
    name: str
    plant: Callable[[Any], list[tuple[Any, str, Any]]]  # model → object, attribute, wrong value
    points: tuple[str, ...]
    ids: tuple[str, ...]


@contextlib.contextmanager
def set_in(places: list[tuple[Any, str, Any]]) -> Iterator[None]:
    before = [(x, name, getattr(x, name)) for x, name, _ in places]
    for x, name, value in places:
        setattr(x, name, value)
    try:
        yield
    finally:
        for x, name, value in before:
            setattr(x, name, value)


def mlx_attentions(model: Any) -> list[Any]:
    return [layer.self_attn for layer in model.model.layers]


def mlx_gates(model: Any) -> list[Any]:
    return [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]


def last_layer_dropped(model: Any) -> Any:
    return mock.patch.object(
        type(model.model.layers[-1]),
        "forward",
        _skipping(type(model.model.layers[-1]).forward, model.model.layers[-1]),
    )


def _skipping(original: Any, skipped: Any) -> Any:
    def forward(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return hidden_states if self is skipped else original(self, hidden_states, **kwargs)

    return forward


def no_scale(model: Any) -> Any:
    return setting(attentions(model), scaling=model.config.qk_head_dim**-0.5)


def identity_norms(model: Any) -> Any:
    return setting(
        [a.kv_a_layernorm for a in attentions(model)], forward=lambda hidden_states: hidden_states
    )


W, C, X = "mlp.gate#weights", "mlp.gate#experts", "self_attn#context"
FAULTS = [
    Fault(  # sglang#12738
        "routed_scaling_factor dropped",
        lambda m: setting(gates(m), routed_scaling_factor=1.0),
        (f"model.layers.1.{W}",),
        ("scaling-dropped",),
    ),
    Fault(  # vLLM#24119
        "routed_scaling_factor twice",
        lambda m: setting(gates(m), routed_scaling_factor=2.827**2),
        (f"model.layers.1.{W}",),
        ("scaling-twice",),
    ),
    Fault(  # vLLM#12002
        "biased scores as weights",
        lambda m: route(lambda z, b: z.sigmoid() + b),
        (f"model.layers.1.{W}",),
        ("weights-biased",),
    ),
    Fault(  # NVIDIA-NeMo/Megatron-Bridge#4657
        "router bias ignored",
        lambda m: route(lambda z, b: z.sigmoid(), lambda s, b: s),
        (f"model.layers.1.{C}",),
        ("bias-ignored",),
    ),
    Fault(  # mistral.rs#1173
        "weights not renormalised",
        lambda m: setting(gates(m), norm_topk_prob=False),
        (f"model.layers.1.{W}",),
        ("weights-unnormalised",),
    ),
    Fault(  # llama.cpp#18980
        "softmax for sigmoid",
        lambda m: route(lambda z, b: z.softmax(-1)),
        (f"model.layers.1.{W}",),
        ("weights-softmax",),
    ),
    Fault(
        "mscale² missing", no_scale, (f"model.layers.0.{X}",), ("scale-mscale-missing",)
    ),  # transformers#47435
    Fault(  # vLLM#28968
        "rope halves on q only",
        lambda m: rotation(neox_q),
        (f"model.layers.0.{X}",),
        ("rope-unpermuted-q",),
    ),
    Fault(
        "rope halves on both",
        lambda m: rotation(neox_both),
        (f"model.layers.0.{X}",),
        ("rope-halves",),
    ),
    Fault(
        "yarn betas 32/1",
        lambda m: tables(m, beta_fast=32.0),
        (f"model.layers.0.{X}",),
        ("yarn-betas",),
    ),  # llama.cpp#18013
    Fault(
        "position off by one",
        lambda m: rotation(off_by_one),
        (f"model.layers.0.{X}",),
        ("rope-q-late",),
    ),
    Fault(
        "kv_a norm skipped",
        identity_norms,
        ("model.layers.0.self_attn.kv_a_layernorm",),
        ("norm-kv-skipped",),
    ),
    Fault(  # a shadowed variable in rustane
        "shared expert dropped",
        lambda m: mock.patch.object(hf.DeepseekV3MoE, "forward", moe_without_shared),
        ("model.layers.1.mlp",),
        ("shared-dropped",),
    ),
    Fault(  # sglang#11081
        "gate and up swapped in one expert",
        lambda m: weights(m, "gate_up_proj", swapped_halves),
        ("model.layers.2.mlp.experts",),
        ("gate-up-swapped",),
    ),
    Fault(  # llama.cpp#17083
        "nibbles swapped in one expert",
        lambda m: weights(m, "down_proj", swapped_pairs),
        ("model.layers.2.mlp.experts",),
        ("columns-swapped",),
    ),
    Fault(
        "last layer dropped", last_layer_dropped, ("model.layers.3",), ("layer-dropped",)
    ),  # lablup/mlxcel#618
    Fault(
        "mscale applied once",
        lambda m: setting(attentions(m), scaling=attentions(m)[0].scaling / mscale(m)),
        (f"model.layers.0.{X}",),
        ("scale-mscale-once",),
    ),
    Fault(
        "rope halves on k only",
        lambda m: rotation(neox_k),
        (f"model.layers.0.{X}",),
        ("rope-unpermuted-k",),
    ),
    Fault("no rotation", lambda m: rotation(unturned), (f"model.layers.0.{X}",), ("rope-missing",)),
    Fault(
        "rotation reversed",
        lambda m: rotation(lambda f, q, k, cos, sin: f(q, k, cos, -sin)),
        (f"model.layers.0.{X}",),
        ("rope-reversed",),
    ),
    Fault(
        "theta 10000",
        lambda m: tables(m, rope_theta=10000.0),
        (f"model.layers.0.{X}",),
        ("rope-theta",),
    ),
    Fault("mask missing", lambda m: unmasked(), (f"model.layers.0.{X}",), ("mask-missing",)),
    Fault(
        "q_a norm skipped",
        lambda m: setting([a.q_a_layernorm for a in attentions(m)], forward=lambda x: x),
        ("model.layers.0.self_attn.q_a_layernorm",),
        ("norm-q-skipped",),
    ),
    Fault(
        "norm gains plus one",
        lambda m: norms(lambda x, w, eps: (1 + w) * x * (x.pow(2).mean(-1, True) + eps).rsqrt()),
        ("model.layers.0.input_layernorm",),
        ("norm-gain-plus-one",),
    ),
    Fault(
        "norms centred",
        lambda m: norms(
            lambda x, w, eps: w * torch.nn.functional.layer_norm(x, x.shape[-1:], eps=eps)
        ),
        ("model.layers.0.input_layernorm",),
        ("norm-centred",),
    ),
    Fault(  # tt-xla#5209
        "sum for mean in norms",
        lambda m: norms(lambda x, w, eps: w * x * (x.pow(2).sum(-1, True) + eps).rsqrt()),
        ("model.layers.0.input_layernorm",),
        ("norm-sum",),
    ),
    Fault(
        "final norm skipped",
        lambda m: setting([m.model.norm], forward=lambda x: x),
        ("model.norm",),
        ("norm-final-skipped",),
    ),
    Fault(
        "router bias subtracted",
        lambda m: route(lambda z, b: z.sigmoid(), lambda s, b: s - b),
        (f"model.layers.1.{C}",),
        ("bias-subtracted",),
    ),
    Fault(
        "gelu in the routed experts",
        lambda m: setting([x.experts for x in mixtures(m)], act_fn=torch.nn.GELU()),
        ("model.layers.1.mlp.experts",),
        ("act-gelu",),
    ),
    Fault(
        "experts shifted by one",
        shifted,
        ("model.layers.1.mlp.experts",),
        ("experts-shifted-back",),
    ),
    Fault(
        "shared expert twice",
        lambda m: mock.patch.object(hf.DeepseekV3MoE, "forward", moe_with_shared_twice),
        ("model.layers.1.mlp",),
        ("shared-twice",),
    ),
    Fault(
        "residual around the mlp missing",
        lambda m: mock.patch.object(hf.DeepseekV3DecoderLayer, "forward", without_mlp_residual),
        ("model.layers.0",),
        ("residual-mlp-missing",),
    ),
    Fault(
        "embedding scaled",
        lambda m: scaled_output(m.model.embed_tokens, m.config.hidden_size**0.5),
        ("model.embed_tokens",),
        ("embedding-scaled",),
    ),
    Fault(
        "head tied to the embedding",
        lambda m: head_tied(m),
        ("lm_head",),
        ("head-tied",),
    ),
]

# The same in a running mlx-lm: attributes of its modules are set, and set back.
MLX = [
    MlxFault(
        "routed_scaling_factor dropped",
        lambda m: [(g, "routed_scaling_factor", 1.0) for g in mlx_gates(m)],
        (f"model.layers.1.{W}",),
        ("scaling-dropped",),
    ),
    MlxFault(
        "routed_scaling_factor twice",
        lambda m: [(g, "routed_scaling_factor", 2.827**2) for g in mlx_gates(m)],
        (f"model.layers.1.{W}",),
        ("scaling-twice",),
    ),
    MlxFault(
        "router bias ignored",
        lambda m: [
            (g, "e_score_correction_bias", 0 * g.e_score_correction_bias) for g in mlx_gates(m)
        ],
        (f"model.layers.1.{C}",),
        ("bias-ignored",),
    ),
    MlxFault(
        "weights not renormalised",
        lambda m: [(g, "norm_topk_prob", False) for g in mlx_gates(m)],
        (f"model.layers.1.{W}",),
        ("weights-unnormalised",),
    ),
    MlxFault(
        "mscale² missing",
        lambda m: [(a, "scale", a.q_head_dim**-0.5) for a in mlx_attentions(m)],
        (f"model.layers.0.{X}",),
        ("scale-mscale-missing",),
    ),
    MlxFault(
        "rope halves on both",
        lambda m: [(a.rope, "traditional", False) for a in mlx_attentions(m)],
        ("model.layers.0.self_attn#q_pe",),
        ("rope-halves",),
    ),
    MlxFault(
        "kv_a norm skipped",
        lambda m: [(a, "kv_a_layernorm", mlx_nn.Identity()) for a in mlx_attentions(m)],
        ("model.layers.0.self_attn.kv_a_layernorm",),
        ("norm-kv-skipped",),
    ),
    MlxFault(
        "q_a norm skipped",
        lambda m: [(a, "q_a_layernorm", mlx_nn.Identity()) for a in mlx_attentions(m)],
        ("model.layers.0.self_attn.q_a_layernorm",),
        ("norm-q-skipped",),
    ),
    MlxFault(
        "shared expert dropped",
        lambda m: [(m.model.layers[1].mlp.config, "n_shared_experts", None)],
        ("model.layers.1.mlp",),
        ("shared-dropped",),
    ),
    MlxFault(
        "final norm skipped",
        lambda m: [(m.model, "norm", mlx_nn.Identity())],
        ("model.norm",),
        ("norm-final-skipped",),
    ),
    MlxFault(
        "experts shifted by one",
        lambda m: [
            (p, "weight", mx.roll(p.weight, 1, 0))
            for layer in m.model.layers[1:]
            for p in (
                getattr(layer.mlp.switch_mlp, n) for n in ("gate_proj", "up_proj", "down_proj")
            )
        ],
        ("model.layers.1.mlp.experts.*.down_proj",),
        ("experts-shifted-back",),
    ),
]

# dump of golden/vllm → where it begins, and its id. vLLM scales the routed sum, and adds the shared
# expert to it before anything can be seen.
VLLM = {
    "scaling-dropped": ("model.layers.1.mlp", "scaling-dropped"),
    "scaling-twice": ("model.layers.1.mlp", "scaling-twice"),
    "bias-ignored": (f"model.layers.1.{C}", "bias-ignored"),
    "not-renormalised": (f"model.layers.1.{W}", "weights-unnormalised"),
    "biased-weights": (f"model.layers.1.{W}", "weights-biased"),
    "mscale-missing": (f"model.layers.0.{X}", "scale-mscale-missing"),
    "kv-a-norm-skipped": ("model.layers.0.self_attn.kv_a_layernorm", "norm-kv-skipped"),
    "rope-halves": ("model.layers.0.self_attn#q_pe", "rope-halves"),
    "rope-off-by-one": ("model.layers.0.self_attn#q_pe", "rope-from-one"),
    "gate-up-swapped-shared": (
        "model.layers.1.mlp.shared_experts.gate_proj",
        "gate-up-swapped-shared",
    ),
}
