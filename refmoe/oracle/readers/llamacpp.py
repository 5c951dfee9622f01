"""A print of llama.cpp's `llama-eval-callback`: the corners of every tensor of the graph.

    common_debug_cb_eval:   attn_norm-3 = (f32)  MUL(norm-3{..}, blk.3.attn_norm.weight{..}}) = {..}
        [ [ [   0.1234,   ..., ] ] ]        three first and three last of each axis, four decimals
        sum = 12.345678                     in float32, one after another: not used

The shape `ne` has the innermost axis first, [D, T] for most. What was not printed is NaN in the
arrays, and a printed NaN is infinite. Older prints say `ggml_debug`; some show only the three first
of an axis. A product whose name does not tell its place is known by its weight. The last layer's
MLP and what follows hold only the rows whose logits were asked for, in a prompt the last one.
Choices of experts, and the weights of the chosen, are read only where every one is printed: with
holes, nothing says which weight belongs to which expert. The tool logs the ids of its tokens first.

Sources: ggml-org/llama.cpp common/debug.cpp (the print), examples/eval-callback (the tokens),
src/models/deepseek2.cpp and src/llama-graph.cpp, build_moe_ffn (the names).
"""

import re
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np

from refmoe.files import InputError
from refmoe.oracle.readers.base import MOST_NUMBERS, Arrays, Dump, Reader, register

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
LINE = 4096  # characters; a header has at most some 400
PRINTED = 6**3  # numbers of one tensor


class Block(NamedTuple):
    """One printed tensor."""

    name: str
    point: str
    shape: tuple[int, ...]  # four axes, the outermost first
    numbers: list[str]


def recognise(path: Path) -> bool:
    """Tell whether this is a .txt or .log file."""
    return path.is_file() and path.suffix in (".txt", ".log")


def read(path: Path) -> Dump:
    """Read every tensor whose name is a point's; raise `InputError` if none is.

    Of several forward passes the one with most rows is read.
    """
    tokens: list[int] = []
    passes = _passes(_blocks(path, tokens))
    if not passes:
        raise InputError(
            f"{path}: no tensor of llama-eval-callback in it that is a point of K2's; expected "
            "lines like common_debug_cb_eval: attn_norm-3 = (f32) ..."
        )
    longest = max(passes, key=_rows)
    total, first = _rows(longest), longest is passes[0]
    size = sum(total * prod(b.shape) // _rows({"": b}) for b in longest.values())
    if size > MOST_NUMBERS:
        raise InputError(
            f"{path}: {size} numbers in {total} rows, of which six are printed; at most "
            f"{MOST_NUMBERS} are read: print a shorter prompt"
        )
    notes = []
    if len(passes) > 1:
        notes.append(f"{len(passes)} forward passes; that with most rows, {total}, is read")
    arrays = {point: _array(path, block) for point, block in longest.items()}
    short = _pad_rows(arrays, total)
    notes += _drop_partial_choices(arrays)
    notes += [f"{p}: {short[p]} of {total} rows, taken as the last" for p in arrays if p in short]
    known = tokens[:total] if first else tokens
    partial = frozenset(n for n, x in arrays.items() if np.isnan(x).any())
    found = known if len(known) == total else None
    step = _half_of_last_decimal(longest)
    return Dump(path, arrays, found, "float32", partial, step, notes=tuple(notes))


def _passes(blocks: Iterator[Block]) -> list[dict[str, Block]]:
    """Return each forward pass as its blocks by point: a name seen before begins the next one."""
    passes: list[dict[str, Block]] = []
    seen: set[tuple[str, str]] = set()
    for block in blocks:
        key = block.name, block.point
        if not passes or key in seen:  # the graph from its beginning
            passes.append({})
            seen.clear()
        seen.add(key)
        passes[-1][block.point] = block
    return passes


def _pad_rows(arrays: Arrays, total: int) -> dict[str, int]:
    """Put NaN before the rows of arrays that have fewer than `total`: point → its own rows.

    Such arrays hold the rows whose logits were asked for, which are the last ones.
    """
    short = {point: len(x) for point, x in arrays.items() if len(x) < total}
    for point, rows in short.items():
        x, arrays[point] = arrays[point], np.full((total, *arrays[point].shape[1:]), np.nan)
        arrays[point][total - rows :] = x
    return short


def _half_of_last_decimal(blocks: dict[str, Block]) -> float:
    """Return half a unit of the last decimal that was printed."""
    first = next((n for b in blocks.values() for n in b.numbers if "." in n), None)
    return 0.5 * 10.0 ** -len(first.partition(".")[2]) if first else 0.0


def _rows(blocks: dict[str, Block]) -> int:
    """Return the largest number of rows of these tensors."""
    return max(b.shape[1] if _turned(b) else b.shape[2] for b in blocks.values())


def _turned(block: Block) -> bool:
    """Tell whether the rows are the last axis but two: [.., T, H, R], [.., T, 1, R], [.., T, K, 1].

    Those of other tensors are the last but one, [.., T, D].
    """
    one_each = block.point.endswith("#weights") and block.shape[3] == 1
    return one_each or block.point.endswith(("#q_pe", "#k_pe"))


def _array(path: Path, block: Block) -> np.ndarray:
    """Return a tensor [T, ...] with NaN where it was not printed."""
    x = _place(block.shape, block.numbers)
    if x is None:
        raise InputError(
            f"{path}: {block.name} is {list(reversed(block.shape))} and {len(block.numbers)} "
            "numbers are printed of it; is the file cut off?"
        )
    _, a, b, c = block.shape
    if block.point.endswith("#q_pe"):
        return x.reshape(a, b, c)
    return x.reshape((a, b * c) if _turned(block) else (b, c))


def _drop_partial_choices(arrays: Arrays) -> list[str]:
    """Remove choices of experts that are not all printed, and the weights in their order.

    Returns notes of what was removed.
    """
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
    """Yield the printed tensors in order; `tokens` is filled with the ids that the tool logs."""
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
    """Return the tensor of a header; None where it is no point, or of no shape that is known."""
    ne = [int(n) for n in head[5].split(",") if n.strip().isdecimal() and len(n) < 15]
    point = _point(head[1].strip(), head[3], head[4])
    if point is None or not 2 <= len(ne) <= 4 or min(ne) < 1 or ne[3:] not in ([], [1]):
        return None
    shape = (1, 1, 1, *reversed(ne[:3]))[-4:]
    return Block(head[1].strip(), point, shape, numbers)


def _point(name: str, op: str, sources: str) -> str | None:
    """Return the point's name; None for what is no point, as views and reshapes, `q-0 (view)`."""
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


def _place(shape: tuple[int, ...], numbers: list[str]) -> np.ndarray | None:
    """Return the tensor with the printed numbers in their places, NaN elsewhere.

    None if there are as many numbers as no way to print this shape would give.
    """
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


register(Reader("llama.cpp", ".txt", recognise, read))
