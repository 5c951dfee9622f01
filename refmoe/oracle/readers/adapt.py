"""Tensors that an engine fuses, stacks, transposes or renames → the points of the model.

`adapt` splits and renames. A dump by module path has the engine's own modules: vLLM and SGLang
multiply q_a and kv_a, and gate and up, as one matrix; their norms add the residual first and return
both; their mixture returns the routed and the shared sum together; fused expert kernels and
llama.cpp hold one row for each token and slot. Each habit is known by its name, so that the engine
need not be given.

    fused_qkv_a_proj[_with_mqa]         [T, A+C+R]   q_a_proj, kv_a_proj_with_mqa
    gate_up_proj                        [T, 2F]      gate_proj, up_proj
    act_fn, beside a gate_up_proj       [T, F]       act
    input_layernorm#residual            [T, D]       the layer before
    post_attention_layernorm#residual   [T, D]       #attn_residual
    model.norm#residual                 [T, D]       the last layer
    mla_attn.mla_attn [#q, #k_pe]       [T, H(N+R)]  #context, #q_pe, #k_pe (also attn_mqa, attn)
    experts.gate_proj, up_proj, ...     [T, K, F]    experts.E.gate_proj, ...

`fit` brings an array into a point's shape: a batch axis of one is dropped, heads may be flattened
or stand before the rows, halves of rotated channels are put back into pairs where the engine's
conventions say so.

Sources: vllm-project/vllm `model_executor/models/deepseek_v2.py`, `layers/mla.py`,
`layers/fused_moe/runner/moe_runner.py`; sgl-project/sglang `python/sglang/srt/models/
deepseek_v2.py`; ggml-org/llama.cpp `src/llama-graph.cpp` (build_moe_ffn).
"""

from collections.abc import Iterator

import numpy as np

from refmoe.config import Config
from refmoe.engines import Conventions
from refmoe.model.points import parse
from refmoe.oracle.readers.base import Arrays

Named = Iterator[tuple[str, np.ndarray]]


def adapt(arrays: Arrays, cfg: Config) -> Arrays:
    """Return the arrays under the names of points; what is none of the habits above keeps its name.

    Where two arrays are the same point, the first is taken.
    """
    out: Arrays = {}
    for name, x in arrays.items():
        for point, part in _points(name, x, arrays, cfg):
            out.setdefault(point, part)
    return out


def _points(name: str, x: np.ndarray, arrays: Arrays, cfg: Config) -> Named:
    """Yield the points that one array of the dump is, with their parts of it."""
    at, _, last = name.rpartition(".")
    layer = parse(name).layer
    match last:
        case "fused_qkv_a_proj" | "fused_qkv_a_proj_with_mqa":
            yield f"{at}.q_a_proj", x[..., : cfg.q_lora_rank]
            yield f"{at}.kv_a_proj_with_mqa", x[..., cfg.q_lora_rank :]
        case "gate_up_proj":
            yield f"{at}.gate_proj", x[..., : x.shape[-1] // 2]
            yield f"{at}.up_proj", x[..., x.shape[-1] // 2 :]
        case "act_fn" if f"{at}.gate_up_proj" in arrays:  # elsewhere it is silu alone
            yield f"{at}.act", x
        case "input_layernorm#residual" if layer is not None:
            yield f"model.layers.{layer - 1}", x
        case "post_attention_layernorm#residual":
            yield f"{at}#attn_residual", x
        case "norm#residual":
            yield f"model.layers.{cfg.num_hidden_layers - 1}", x
        case "mla_attn" | "attn_mqa" | "attn_mha" if at.endswith((".mla_attn", ".self_attn")):
            attention = at.removesuffix(".mla_attn")
            own = x.size / max(
                1, len(x) * cfg.v_head_dim
            )  # heads, of one rank where there are several
            if cfg.num_attention_heads % own == 0 and x.size != _size(arrays.get(attention)):
                yield f"{attention}#context", x
        case "mla_attn#q":
            heads = x.reshape(len(x), -1, cfg.qk_head_dim) if x.size % cfg.qk_head_dim == 0 else x
            yield f"{at.removesuffix('.mla_attn')}#q_pe", heads[..., cfg.qk_nope_head_dim :]
        case "mla_attn#k_pe":
            yield f"{at.removesuffix('.mla_attn')}#k_pe", x
        case "mla_attn#kv_c" | "rotary_emb":  # what kv_a_layernorm wrote; the query alone
            return
        case i if i.isdigit() and f"{name}.post_attention_layernorm#residual" in arrays:
            return  # its output is the mlp's; the sum is in the next norm
        case "experts" if _same(x, arrays.get(at)):  # the shared expert is in it already
            return
        case "gate_proj" | "up_proj" | "act" | "down_proj" if at.endswith(".mlp.experts"):
            yield from _slots(name, x, arrays.get(at.removesuffix("experts") + "gate#experts"))
        case _:
            yield name, x


def _slots(name: str, x: np.ndarray, chosen: np.ndarray | None) -> Named:
    """Split [T, K, F] or [T·K, F] into each expert's rows, in the order of the tokens."""
    at, _, last = name.rpartition(".")
    if chosen is None or x.size % chosen.size or len(x) not in (len(chosen), chosen.size):
        yield name, x
        return
    rows = x.reshape((*chosen.shape, -1))
    for e in np.unique(chosen):
        yield f"{at}.{int(e)}.{last}", rows[chosen == e]


def _size(x: np.ndarray | None) -> int:
    """Return how many numbers an array has, -1 for no array."""
    return -1 if x is None else x.size


def _same(x: np.ndarray, y: np.ndarray | None) -> bool:
    """Tell whether y has the numbers of x, in whatever shape."""
    return y is not None and x.size == y.size and bool((x.ravel() == y.ravel()).all())


def fit(
    name: str, x: np.ndarray, shape: tuple[int, ...], conventions: Conventions
) -> np.ndarray | None:
    """Return an array as the point of this name and shape has it; None where it cannot be that."""
    heads_first = x.ndim == 4 and len(shape) == 3  # [1, H, T, ·], whatever T and H are
    while x.ndim > len(shape) and x.shape[0] == 1:
        x = x[0]
    while x.ndim > 2 and x.ndim == len(shape) and x.shape[0] == 1 != shape[0]:
        x = x[0]  # heads flattened behind a batch axis
    if len(shape) == 3 and x.shape == (shape[1], shape[0], shape[2]):
        x = x.transpose(1, 0, 2) if heads_first or x.shape != shape else x
    if x.size != np.prod(shape) or not x.ndim or not x.size or x.shape[0] != shape[0]:
        return None
    x = x.reshape(shape)
    if conventions.rope_layout == "halves" and name.endswith(("#q_pe", "#k_pe")):
        x = np.stack(np.split(x, 2, axis=-1), axis=-1).reshape(shape)
    return x
