"""llama.cpp's `llama-eval-callback` (ggml-org/llama.cpp, common/debug.cpp): corners of tensors.

    common_debug_cb_eval:   attn_norm-3 = (f32)  MUL(norm-3{..}, blk.3.attn_norm.weight{..}}) = {..}
        [ [ [   0.1234,   ..., ] ] ]        three first and three last of each axis, four decimals
        sum = 12.345678                     in float32, one after another: not used

ne has the innermost axis first, [D, T] for most. What was not printed is NaN in the arrays, and a
printed NaN is infinite. Older prints say `ggml_debug`; some show the three first alone. Names:
src/models/deepseek2.cpp and src/llama-graph.cpp (build_moe_ffn); a product whose name tells nothing
is known by its weight. The last layer's MLP and what follows hold the rows that were asked for, in
a prompt only the last. Choices of experts are read where every one is printed, and the weights with
them: their order, that of the scores, is nobody's promise otherwise. The tool logs the ids of its
tokens first (examples/eval-callback).
"""

import re
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np

from refmoe.files import InputError

HEADER = re.compile(
    r"(?:ggml_debug|common_debug_cb_eval):\s+(\S.*?) = \((\w+)\)\s+(\w+)\((.*)\) = \{([\d, ]+)\}"
)
NUMBER = re.compile(r"-?(?:\d+\.(\d+)|nan|inf)")
WEIGHT = re.compile(r"blk\.(\d+)\.(\w+)\.weight\{")
COUNT = re.compile(r"number of input tokens = (\d+)")
TOKEN = re.compile(r"(?:[\d.]+ I )?\s*(\d+)\s*")
NAMES = {
    "embd": "model.embed_tokens",
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
RESULTS = {  # names that several steps of the computation bear, by the one that ends it
    ("q", "MUL"): "self_attn.q_a_layernorm",
    ("kv_cmpr", "MUL"): "self_attn.kv_a_layernorm",
    ("q_pe", "ROPE"): "self_attn#q_pe",
    ("k_pe", "ROPE"): "self_attn#k_pe",
    ("kqv_out", "CONT"): "self_attn#context",
    ("kqv_out", "RESHAPE"): "self_attn#context",
}
PRODUCTS = {
    "attn_q": "self_attn.q_proj",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
}
LIMIT = 1 << 28  # numbers of all arrays: 2 GB of float64
LINE = 4096  # characters; a header has at most some 400
PRINTED = 6**3  # numbers of one tensor


class Printed(NamedTuple):
    arrays: dict[str, np.ndarray]
    tokens: list[int] | None
    step: float  # half of the last decimal
    notes: tuple[str, ...]


class Block(NamedTuple):
    name: str
    point: str
    shape: tuple[int, ...]  # four axes, the outermost first
    numbers: list[str]


def read_llamacpp(path: Path) -> Printed:
    """Every tensor whose name is a point's. `InputError` if nothing in the file is."""
    tokens: list[int] = []
    passes: list[dict[str, Block]] = []
    seen: set[tuple[str, str]] = set()
    for block in _blocks(path, tokens):
        key = block.name, block.point
        if not passes or key in seen:  # the graph from its beginning
            passes.append({})
            seen.clear()
        seen.add(key)
        passes[-1][block.point] = block
    if not passes:
        raise InputError(
            f"{path}: no tensor of llama-eval-callback in it that is a point of K2's; expected "
            "lines like common_debug_cb_eval: attn_norm-3 = (f32) ..."
        )
    longest = max(passes, key=_rows)
    total, first = _rows(longest), longest is passes[0]
    size = sum(total * prod(b.shape) // _rows({"": b}) for b in longest.values())
    if size > LIMIT:
        raise InputError(
            f"{path}: {size} numbers in {total} rows, of which six are printed; at most {LIMIT} "
            "are read: print a shorter prompt"
        )
    notes = []
    if len(passes) > 1:
        notes.append(f"{len(passes)} forward passes; that with most rows, {total}, is read")
    arrays = {point: _array(path, block) for point, block in longest.items()}
    digits = [n for b in longest.values() for n in b.numbers if "." in n]
    step = 0.5 * 10.0 ** -len(digits[0].partition(".")[2]) if digits else 0.0
    short = {point: len(x) for point, x in arrays.items() if len(x) < total}
    for point, rows in short.items():  # the rows that logits were asked of: the last ones
        x, arrays[point] = arrays[point], np.full((total, *arrays[point].shape[1:]), np.nan)
        arrays[point][total - rows :] = x
    notes += _whole_choices(arrays)
    notes += [f"{p}: {short[p]} of {total} rows, taken as the last" for p in arrays if p in short]
    known = tokens[:total] if first else tokens
    return Printed(arrays, known if len(known) == total else None, step, tuple(notes))


def _rows(blocks: dict[str, Block]) -> int:
    return max(b.shape[1] if _turned(b) else b.shape[2] for b in blocks.values())


def _turned(block: Block) -> bool:
    """[.., T, H, R], [.., T, 1, R] or [.., T, K, 1]; others are [.., T, D]."""
    one_each = block.point.endswith("#weights") and block.shape[3] == 1
    return one_each or block.point.endswith(("#q_pe", "#k_pe"))


def _array(path: Path, block: Block) -> np.ndarray:
    x = _placed(block.shape, block.numbers)
    if x is None:
        raise InputError(
            f"{path}: {block.name} is {list(reversed(block.shape))} and {len(block.numbers)} "
            "numbers are printed of it; is the file cut off?"
        )
    _, a, b, c = block.shape
    if block.point.endswith("#q_pe"):
        return x.reshape(a, b, c)
    return x.reshape((a, b * c) if _turned(block) else (b, c))


def _whole_choices(arrays: dict[str, np.ndarray]) -> list[str]:
    """Choices with holes tell nothing, and weights in their order no more."""
    gates = [p.removesuffix("#experts") for p in arrays if p.endswith("gate#experts")]
    holes = [g for g in gates if np.isnan(arrays[f"{g}#experts"]).any()]
    lost = [p for p in arrays if p.endswith("gate#weights") and p[:-8] not in set(gates)]
    for gate in holes:
        lost += [f"{gate}{end}" for end in ("#experts", "#weights") if f"{gate}{end}" in arrays]
    for point in lost:
        del arrays[point]
    layers = len({p.split(".")[2] for p in lost})
    if not layers:
        return []
    return [f"experts and weights of {layers} layers: not all are printed, so none is compared"]


def _blocks(path: Path, tokens: list[int]) -> Iterator[Block]:
    """Headers with the numbers that follow, in order; `tokens` is filled with their ids."""
    head: Block | None = None
    numbers: list[str] = []
    expected = 0
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            while line := file.readline(LINE):
                if found := HEADER.search(line[:512]):
                    if head:
                        yield head
                    numbers = []
                    head = _block(found, numbers)
                elif "sum =" in line:
                    numbers = []  # of the next batch entry, or the log's
                elif head and len(numbers) <= PRINTED:
                    numbers += [m[0] for m in NUMBER.finditer(line)]
                elif count := COUNT.search(line):
                    expected = int(count[1]) if len(count[1]) < 9 else 0
                    tokens.clear()
                elif (token := TOKEN.fullmatch(line)) and len(tokens) < expected:
                    tokens.append(int(token[1]) if len(token[1]) < 9 else -1)
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e})") from None
    if head:
        yield head
    if len(tokens) != expected:
        tokens.clear()


def _block(head: re.Match[str], numbers: list[str]) -> Block | None:
    ne = [int(n) for n in head[5].split(",") if n.strip().isdecimal() and len(n) < 15]
    point = _point(head[1].strip(), head[3], head[4])
    if point is None or not 2 <= len(ne) <= 4 or min(ne) < 1 or ne[3:] not in ([], [1]):
        return None
    shape = (1, 1, 1, *reversed(ne[:3]))[-4:]
    return Block(head[1].strip(), point, shape, numbers)


def _point(name: str, op: str, sources: str) -> str | None:
    """None for what is no point: also views and reshapes, `q-0 (view)`."""
    base, _, layer = name.rpartition("-")
    if not layer.isdecimal():
        found = NAMES.get(name)
        if found and found.startswith(("model.", "lm_head")):
            return found
        base, layer = "", ""
    end = RESULTS.get((base, op)) or NAMES.get(base)
    if op == "MUL_MAT" and end is None and (weight := WEIGHT.match(sources)):
        layer, end = weight[1], PRODUCTS.get(weight[2])
    if end is None or end.startswith(("model.", "lm_head")):
        return None
    return f"model.layers.{int(layer)}" + (end if end[:1] in ("", "#") else f".{end}")


def _placed(shape: tuple[int, ...], numbers: list[str]) -> np.ndarray | None:
    """The printed numbers where they stand; None if their count is that of no way to print."""
    for tail in (3, 0):  # newer prints show the last three as well
        axes = [
            list(range(n)) if n <= 3 + tail else [*range(3), *range(n - tail, n)] for n in shape
        ]
        if prod(map(len, axes)) == len(numbers):
            out = np.full(shape, np.nan)
            values = np.array(numbers, float).reshape([len(a) for a in axes])
            out[np.ix_(*axes)] = np.where(np.isnan(values), np.inf, values)  # a fault, no hole
            return out
    return None
