"""llama.cpp's `llama-eval-callback` (ggml-org/llama.cpp, common/debug.cpp): corners of tensors.

    common_debug_cb_eval:   attn_norm-3 = (f32)  MUL(norm-3{..}, blk.3.attn_norm.weight{..}}) = {..}
        [ [ [   0.1234,   ..., ] ] ]        three first and three last of each axis, four decimals
        sum = 12.345678                     in float32, one after another: not used

ne has the innermost axis first, [D, T] for most. What was not printed is NaN in the arrays. Older
prints say `ggml_debug` and show the three first alone. Names: src/models/deepseek2.cpp and
src/llama-graph.cpp (build_moe_ffn). The last layer and what follows hold the rows that were asked
for, in a prompt only the last.
"""

import re
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np

from refmoe.config import InputError, read_text

HEADER = re.compile(
    r"(?:ggml_debug|common_debug_cb_eval):\s+(\S.*?) = \((\w+)\)\s+(\w+)\((.*)\) = \{([\d, ]+)\}"
)
NUMBER = re.compile(r"-?(?:\d+\.(\d+)|nan|inf)")
NAMES = {
    "inp_embd": "model.embed_tokens",
    "attn_norm": "input_layernorm",
    "kv_cmpr_pe": "self_attn.kv_a_proj_with_mqa",
    "attn_out": "self_attn",
    "ffn_inp": "#attn_residual",
    "ffn_norm": "post_attention_layernorm",
    "ffn_moe_logits": "mlp.gate",
    "ffn_moe_topk": "mlp.gate#experts",
    "ffn_moe_weights_norm": "mlp.gate#weights",
    "ffn_moe_weights_scaled": "mlp.gate#weights",  # what follows is later, and wins
    "ffn_moe_out": "mlp.experts",
    "ffn_shexp": "mlp.shared_experts",
    "ffn_out": "mlp",
    "l_out": "",
    "result_norm": "model.norm",
    "result_output": "lm_head",
}
TURNED = {"q_pe": "#q_pe", "k_pe": "#k_pe"}  # printed twice: the view before, the rotation after
PRODUCTS = {"wq_a": "q_a_proj", "attn_q_a": "q_a_proj", "attn_q_b": "q_b_proj", "attn_q": "q_proj"}
LIMIT = 1 << 28  # numbers of one tensor: 2 GB of float64


class Printed(NamedTuple):
    arrays: dict[str, np.ndarray]
    step: float  # half of the last decimal
    notes: tuple[str, ...]


def read_llamacpp(path: Path) -> Printed:
    """Every tensor whose name is a point's. `InputError` if nothing in the file is."""
    arrays: dict[str, np.ndarray] = {}
    rows: dict[str, int] = {}
    digits = 4
    for name, op, sources, ne, body in _blocks(read_text(path)):
        point = _point(name, op, sources)
        numbers = list(NUMBER.finditer(body))
        if point is None or not numbers:
            continue
        if np.prod(ne, dtype=float) > LIMIT:
            raise InputError(f"{path}: {name} has {ne} numbers; is it a print of llama.cpp?")
        shape = tuple(reversed(ne))  # [.., T, D], or [.., T, H, D]
        x = _placed(shape, [m[0] for m in numbers])
        if x is None:
            raise InputError(
                f"{path}: {name} is {ne} and {len(numbers)} numbers are printed of it; is the "
                "file cut off?"
            )
        digits = next((len(m[1]) for m in numbers if m[1]), digits)
        _, a, b, c = x.shape if x.ndim == 4 else (1, 1, *x.shape[-2:])
        if point.endswith("#q_pe"):
            arrays[point] = x.reshape(a, b, c)  # tokens, heads, channels
        elif point.endswith("#k_pe") or (point.endswith("#weights") and c == 1):
            arrays[point] = x.reshape(a, b * c)  # one head, or one number a slot
        else:
            arrays[point] = x.reshape(a * b, c)
        rows[point] = len(arrays[point])
    if not arrays:
        raise InputError(f"{path}: no tensor of llama-eval-callback in it that is a point of K2's")
    total = max(rows.values())
    notes = []
    for point, count in rows.items():
        if count < total:  # the rows that logits were asked of: the last ones
            whole = np.full((total, *arrays[point].shape[1:]), np.nan)
            whole[total - count :] = arrays[point]
            arrays[point] = whole
            notes.append(f"{point}: {count} of {total} rows, taken as the last")
    return Printed(arrays, 0.5 * 10.0**-digits, tuple(notes))


def _blocks(text: str) -> Iterator[tuple[str, str, str, list[int], str]]:
    heads = list(HEADER.finditer(text))
    for head, following in zip_longest(heads, heads[1:]):
        body = text[head.end() : following.start() if following else len(text)]
        ne = [int(n) for n in head[5].split(",") if n.strip()]
        if 2 <= len(ne) <= 4 and all(n > 0 for n in ne):
            yield head[1].strip(), head[3], head[4], ne, body.partition("sum =")[0]


def _point(name: str, op: str, sources: str) -> str | None:
    base, _, layer = name.rpartition("-")
    if not layer.isdigit():
        found = NAMES.get(name)
        return found if found and found[:2] in ("mo", "lm") else None
    at = f"model.layers.{layer}"
    if base in TURNED:
        return f"{at}.self_attn{TURNED[base]}" if op.startswith("ROPE") else None
    if base == "kv_cmpr" and op.startswith(("MUL", "RMS_NORM")):
        return f"{at}.self_attn.kv_a_layernorm" if op == "MUL" else None
    if base == "q":  # two products and a norm have this name
        if op == "MUL":
            return f"{at}.self_attn.q_a_layernorm"
        weight = re.search(r"blk\.\d+\.(\w+)\.weight", sources)
        product = PRODUCTS.get(weight[1]) if weight else None
        return f"{at}.self_attn.{product}" if product else None
    end = NAMES.get(base)
    if end is None or end.startswith(("model.", "lm_head")):
        return None
    return at + (end if end[:1] in ("", "#") else f".{end}")


def _placed(shape: tuple[int, ...], numbers: list[str]) -> np.ndarray | None:
    """The printed numbers where they stand; None if their count is that of no way to print."""
    for tail in (3, 0):  # newer prints show the last three as well
        axes = []
        for n in shape:
            whole = n <= 3 + tail if tail else n <= 3
            axes.append(list(range(n)) if whole else [*range(3), *range(n - tail, n)])
        if np.prod([len(a) for a in axes]) == len(numbers):
            out = np.full(shape, np.nan)
            out[np.ix_(*axes)] = np.array(numbers, float).reshape([len(a) for a in axes])
            return out
    return None
