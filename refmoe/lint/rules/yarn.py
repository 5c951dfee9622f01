"""Judge YaRN's settings as engines read them."""

from collections.abc import Iterator
from math import sqrt

import numpy as np

from refmoe.engines import YARN_READINGS
from refmoe.lint.base import Found
from refmoe.lint.facts.settings import Network
from refmoe.lint.registry import rule
from refmoe.lint.yarn import gain, ramp
from refmoe.model.rope import inv_freq, softmax_scale


@rule(
    "note",
    example="YaRN in vLLM: ramp 8 to 20, softmax scale 0.144680, cos and sin x1 "
    "[vllm-project/vllm layers/rotary_embedding/deepseek_scaling_rope.py]",
    reference="the source named in each finding",
    listed=None,
)
def yarn_engines(net: Network) -> Iterator[Found]:
    """List YaRN's ramp, softmax scale and gain, as each engine takes them from this config.

    The ramp says between which pairs of channels frequencies pass from trained to stretched. Two
    engines that differ here compute different attention at every position but the first.
    """
    cfg, yarn, scale = net.cfg, net.cfg.rope_scaling, softmax_scale(net.cfg)
    if yarn is None:
        text = f"no YaRN: theta {cfg.rope_theta:g}, softmax scale {scale:.6f} in every engine"
        yield Found(text)
        return
    for e in YARN_READINGS:
        low, high = ramp(cfg, yarn, e.betas)
        short = (
            f" ({1 / sqrt(cfg.qk_head_dim):.6f} if not more than "
            f"{yarn.original_max_position_embeddings} positions are allocated)"
        )
        text = (
            f"YaRN in {e.name}: ramp {low} to {high}, softmax scale {scale:.6f}"
            f"{short if e.short else ''}, cos and sin x{1.0 if e.one_mscale else gain(yarn):.6g}"
        )
        yield Found(f"{text} [{e.source}]")


@rule(
    "warning",
    example="llama.cpp's deepseek2 takes beta_fast, beta_slow = 32, 1 for 1, 1: 11 of 32 "
    "frequencies are wrong, number 19 by x10.2",
    reference="ggml-org/llama.cpp#18013",
)
def yarn_betas(net: Network) -> Iterator[Found]:
    """An engine takes its own YaRN betas in place of the config's.

    K2-Instruct, 0905 and Thinking were trained with 1 and 1. With 32 and 1, 11 of their 32
    frequencies are wrong, and the error grows with distance.
    """
    cfg, yarn = net.cfg, net.cfg.rope_scaling
    for e in YARN_READINGS if yarn is not None else ():
        if e.betas is None or yarn is None:
            continue
        ratio = inv_freq(cfg, e.betas) / inv_freq(cfg)
        wrong = np.flatnonzero(np.abs(ratio - 1) > 1e-12)  # beyond rounding in float64
        if not len(wrong):
            continue
        worst = wrong[np.abs(np.log(ratio[wrong])).argmax()]
        yield Found(
            f"{e.name}'s deepseek2 takes beta_fast, beta_slow = {e.betas[0]:g}, {e.betas[1]:g} for "
            f"{yarn.beta_fast:g}, {yarn.beta_slow:g}: {len(wrong)} of {len(ratio)} frequencies are "
            f"wrong, number {worst} by x{1 / ratio[worst]:.3g} (measured in llama-cpp-python "
            "0.3.36; older GGUFs lack the keys too: ggml-org/llama.cpp#18013)"
        )


@rule(
    "warning",
    example="llama.cpp: GGUF has no key for mscale; cos and sin lack the factor 0.853",
    reference="ggml-org/llama.cpp#17945",
)
def yarn_mscale(net: Network) -> Iterator[Found]:
    """mscale and mscale_all_dim differ, and a GGUF has room for one of them.

    Their quotient multiplies cos and sin. llama.cpp takes both to be mscale_all_dim, and leaves
    the factor out.
    """
    yarn = net.cfg.rope_scaling
    for e in YARN_READINGS:
        if yarn is not None and e.one_mscale and gain(yarn) != 1:
            text = f"{e.name}: GGUF has no key for mscale; cos and sin lack the factor"
            yield Found(f"{text} {gain(yarn):.6g}")


@rule(
    "warning",
    example="max_position_embeddings / original_max_position_embeddings = 256, factor is 64: some "
    "transformers versions take the quotient (transformers#40320)",
    reference="huggingface/transformers#40320",
)
def yarn_factor(net: Network) -> Iterator[Found]:
    """YaRN's factor is not the quotient of the two context lengths.

    Some versions of transformers computed the factor from the lengths and ignored the one given,
    so that low frequencies were wrong.
    """
    cfg, yarn = net.cfg, net.cfg.rope_scaling
    if yarn is None:
        return
    given = cfg.max_position_embeddings / yarn.original_max_position_embeddings
    if given != yarn.factor:
        yield Found(
            f"max_position_embeddings / original_max_position_embeddings = {given:g}, factor is "
            f"{yarn.factor:g}: some transformers versions take the quotient (transformers#40320)"
        )
