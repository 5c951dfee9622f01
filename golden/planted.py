"""Faults planted in running engines, and the point where each must be found.

Every one of `FAULTS` is a patch of a live transformers model or of its code, as in the issues named
beside it; those of vLLM are planted by golden/make_vllm.py, and only their points are here.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as hf


class Fault(NamedTuple):
    name: str
    plant: Callable[[Any], Any]  # model → a context in which it is wrong
    points: tuple[str, ...]  # where it must be found


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


def off_by_one(original: Any, q: Any, k: Any, cos: Any, sin: Any) -> Any:
    late = [torch.cat((x[:, 1:], x[:, -1:]), 1) for x in (cos, sin)]
    return original(q, k, *late)[0], original(q, k, cos, sin)[1]


@contextlib.contextmanager
def betas(model: Any) -> Iterator[None]:
    wrong = {**model.config.rope_parameters, "beta_fast": 32.0}
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
    ),
    Fault(  # vLLM#24119
        "routed_scaling_factor twice",
        lambda m: setting(gates(m), routed_scaling_factor=2.827**2),
        (f"model.layers.1.{W}",),
    ),
    Fault(  # vLLM#12002
        "biased scores as weights",
        lambda m: route(lambda z, b: z.sigmoid() + b),
        (f"model.layers.1.{W}",),
    ),
    Fault(  # NVIDIA-NeMo/Megatron-Bridge#4657
        "router bias ignored",
        lambda m: route(lambda z, b: z.sigmoid(), lambda s, b: s),
        (f"model.layers.1.{C}",),
    ),
    Fault(  # mistral.rs#1173
        "weights not renormalised",
        lambda m: setting(gates(m), norm_topk_prob=False),
        (f"model.layers.1.{W}",),
    ),
    Fault(  # llama.cpp#18980
        "softmax for sigmoid",
        lambda m: route(lambda z, b: z.softmax(-1)),
        (f"model.layers.1.{W}",),
    ),
    Fault("mscale² missing", no_scale, (f"model.layers.0.{X}",)),  # transformers#47435
    Fault(  # vLLM#28968
        "rope halves on q only", lambda m: rotation(neox_q), (f"model.layers.0.{X}",)
    ),
    Fault("rope halves on both", lambda m: rotation(neox_both), (f"model.layers.0.{X}",)),
    Fault("yarn betas 32/1", betas, (f"model.layers.0.{X}",)),  # llama.cpp#18013
    Fault("position off by one", lambda m: rotation(off_by_one), (f"model.layers.0.{X}",)),
    Fault("kv_a norm skipped", identity_norms, ("model.layers.0.self_attn.kv_a_layernorm",)),
    Fault(  # a shadowed variable in rustane
        "shared expert dropped",
        lambda m: mock.patch.object(hf.DeepseekV3MoE, "forward", moe_without_shared),
        ("model.layers.1.mlp",),
    ),
    Fault(  # sglang#11081
        "gate and up swapped in one expert",
        lambda m: weights(m, "gate_up_proj", swapped_halves),
        ("model.layers.2.mlp.experts",),
    ),
    Fault(  # llama.cpp#17083
        "nibbles swapped in one expert",
        lambda m: weights(m, "down_proj", swapped_pairs),
        ("model.layers.2.mlp.experts",),
    ),
    Fault("last layer dropped", last_layer_dropped, ("model.layers.3",)),  # lablup/mlxcel#618
]

# dump of golden/vllm → where it begins. vLLM scales the routed sum and adds the shared expert to it
# before anything can be seen.
VLLM = {
    "scaling-dropped": ("model.layers.1.mlp",),
    "scaling-twice": ("model.layers.1.mlp",),
    "bias-ignored": (f"model.layers.1.{C}",),
    "not-renormalised": (f"model.layers.1.{W}",),
    "biased-weights": (f"model.layers.1.{W}",),
    "mscale-missing": (f"model.layers.0.{X}",),
    "kv-a-norm-skipped": ("model.layers.0.self_attn.kv_a_layernorm",),
    "rope-halves": ("model.layers.0.self_attn#q_pe",),
    "rope-off-by-one": ("model.layers.0.self_attn#q_pe",),
    "gate-up-swapped-shared": ("model.layers.1.mlp.shared_experts.gate_proj",),
}
