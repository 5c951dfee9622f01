"""Where correct engines differ, and which side each takes: one entry an engine."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Conventions:
    """Where correct engines differ; each preset is true to one engine.

    Sources: the tables of differences in docs/conventions.md, with repository and file.
    """

    name: str
    latent_norm_eps: float | None = 1e-6  # q_a/kv_a norms; None: config.rms_norm_eps
    rounded_products: tuple[str, ...] = ()  # formats whose q·s is rounded to bf16: int4, fp8
    router_logits: Literal["wide", "activations"] = "wide"  # float32 at least, or as activations
    normaliser: Literal["sum + 1e-20", "sum", "max(sum, 2^-14)"] = "sum + 1e-20"
    routed_scale: Literal["weights", "sum"] = "weights"  # what γ multiplies: decides what is dumped
    masked_groups: float = float("-inf")  # choice score of experts in groups not chosen
    rope_layout: Literal["pairs", "halves"] = "pairs"  # of q_pe, k_pe in memory and in dumps
    yarn_betas: tuple[float, float] | None = None  # (fast, slow); None: the config's


CONVENTIONS = {
    c.name: c
    for c in (
        Conventions("refmoe"),
        Conventions(
            "moonshot", rounded_products=("int4",), masked_groups=0.0, rope_layout="halves"
        ),
        Conventions("transformers", rounded_products=("int4",), rope_layout="halves"),
        # Marlin multiplies a dequantised nibble by its scale in the activations' dtype
        Conventions(
            "vllm",
            latent_norm_eps=None,
            rounded_products=("int4",),
            router_logits="activations",
            normaliser="sum",
            routed_scale="sum",
        ),
        Conventions(
            "sglang",
            latent_norm_eps=None,
            rounded_products=("int4",),
            router_logits="activations",
            masked_groups=0.0,
        ),
        # its converter writes the betas, its deepseek2 loader never reads them
        Conventions(
            "llama.cpp",
            latent_norm_eps=None,
            normaliser="max(sum, 2^-14)",
            yarn_betas=(32.0, 1.0),
        ),
        Conventions(
            "mlx",
            rounded_products=("fp8",),
            router_logits="activations",
            normaliser="sum",
            masked_groups=0.0,
        ),
    )
}
