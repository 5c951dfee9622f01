"""Describe how each engine reads YaRN's settings."""

from math import ceil, floor, log, pi
from typing import NamedTuple

from refmoe.config import Config, Yarn
from refmoe.engines import CONVENTIONS


class YarnReading(NamedTuple):
    """How one engine takes ramp, softmax scale and gain from a config."""

    name: str
    source: str
    betas: tuple[float, float] | None = None  # used whatever the config says; None: the config's
    one_mscale: bool = False  # takes mscale to be mscale_all_dim
    short: bool = False  # mscale² is in the softmax scale only if the allocated length is longer


READINGS = (
    YarnReading(
        "refmoe, transformers",
        "huggingface/transformers models/deepseek_v3/modeling_deepseek_v3.py",
    ),
    YarnReading("Moonshot", "modeling_deepseek.py of K2-Instruct, as in mfarisadip/Kimi-K2-Mini"),
    YarnReading("DeepSeek", "deepseek-ai/DeepSeek-V3 inference/model.py", short=True),
    YarnReading(
        "vLLM",
        "vllm-project/vllm layers/rotary_embedding/deepseek_scaling_rope.py, models/deepseek_v2.py",
    ),
    YarnReading("SGLang", "sgl-project/sglang srt/models/deepseek_v2.py"),
    YarnReading(
        "llama.cpp",
        "ggml-org/llama.cpp src/llama-context.cpp, src/models/deepseek2.cpp, #18013",
        betas=CONVENTIONS["llama.cpp"].yarn_betas,
        one_mscale=True,
    ),
    YarnReading(
        "KTransformers",
        "kvcache-ai/ktransformers operators/RoPE.py, models/modeling_deepseek_v3.py",
    ),
    YarnReading("mlx-lm", "ml-explore/mlx-lm mlx_lm/models/deepseek_v3.py"),
)


def gain(yarn: Yarn) -> float:
    """Return what cos and sin are multiplied by: m(mscale) / m(mscale_all_dim)."""
    return _mscale(yarn, yarn.mscale) / _mscale(yarn, yarn.mscale_all_dim)


def _mscale(yarn: Yarn, m: float) -> float:
    return 0.1 * m * log(yarn.factor) + 1 if yarn.factor > 1 else 1.0


def ramp(cfg: Config, yarn: Yarn, betas: tuple[float, float] | None) -> tuple[int, int]:
    """Return `low` and `high` of model/rope.py under these betas; None: the config's."""
    R, L = cfg.qk_rope_head_dim, yarn.original_max_position_embeddings
    fast, slow = (
        R * log(L / (2 * pi * n)) / (2 * log(cfg.rope_theta))
        for n in betas or (yarn.beta_fast, yarn.beta_slow)
    )
    return max(floor(fast), 0), min(ceil(slow), R - 1)
