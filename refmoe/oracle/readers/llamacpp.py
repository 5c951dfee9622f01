"""A print of llama.cpp's `llama-eval-callback`: the corners of every tensor of the graph.

    common_debug_cb_eval:   attn_norm-3 = (f32)  MUL(norm-3{..}, blk.3.attn_norm.weight{..}}) = {..}
        [ [ [   0.1234,   ..., ] ] ]        three first and three last of each axis, four decimals
        sum = 12.345678                     in float32, one after another: not used

Both streams may be in the log, `2>&1`, or standard output alone, which has no tokens. What else
writes into a tensor is skipped where the tensor can still be told. The tool ends without waiting
for its printing: a log may end anywhere, and its last tensor is read as far as it goes.

The shape `ne` has the innermost axis first, [D, T] for most. What was not printed is NaN in the
arrays, and a printed NaN is infinite. Older prints say `ggml_debug`; some show only the three first
of an axis. A product whose name does not tell its place is known by its weight. The last layer's
MLP and what follows hold only the rows whose logits were asked for, in a prompt the last one.
Choices of experts, and the weights of the chosen, are read only where every one is printed: with
holes, nothing says which weight belongs to which expert. The tool logs the ids of its tokens first.
A prompt longer than a batch (-ub) is several passes, which are put together.

Sources: ggml-org/llama.cpp common/debug.cpp (the print), examples/eval-callback (the tokens),
src/models/deepseek2.cpp and src/llama-graph.cpp, build_moe_ffn (the names).
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TextIO

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
JSON = '{"type":"log"'
PRINTED = 6**3  # numbers of one tensor
COLOUR = re.compile("\x1b\\[[0-9;]*m")
_VALUE = r"-?(?:\d+\.\d+|nan|inf)"
BEGUN = re.compile(rf"\s*\[\s*{_VALUE}(?:\s*,\s*(?:{_VALUE}|\.\.\.))*\s*,?")
OPEN = re.compile(r"\s*\[")
ROW = re.compile(rf"\[\s*{_VALUE}(?:\s*,\s*(?:{_VALUE}|\.\.\.))*\s*,?\s*\][\s,\]]*$")
BARE = re.compile(r"[\s\[\],.]*")  # what is printed between rows


@dataclass
class Block:
    """One printed tensor."""

    name: str
    point: str
    shape: tuple[int, ...]  # four axes, the outermost first
    numbers: list[str]
    cut: bool = False  # the log ends inside it


@dataclass
class _Pass:
    """The tensors of one forward pass, by point."""

    prompt: int  # how many prompts the log had begun before it
    blocks: dict[str, Block] = field(default_factory=dict)
    seen: set[tuple[str, str]] = field(default_factory=set)
    last: str = ""  # name of the last one

    @property
    def rows(self) -> int:
        """The largest number of rows of its tensors."""
        return max(map(_rows, self.blocks.values()), default=0)


@dataclass
class _Log:
    """The passes of a log, the tokens of each prompt, and what stands between."""

    passes: list[_Pass] = field(default_factory=list)
    prompts: list[tuple[int, list[int]]] = field(default_factory=list)  # how many, and which
    strays: list[str] = field(default_factory=list)  # lines of something else inside tensors
    headless: int = 0  # tensors whose header is none
    cut: bool = False  # it ends inside a tensor

    def add(self, block: Block) -> None:
        """Add a tensor; a name seen before begins the next pass: the graph from its beginning."""
        key = block.name, block.point
        if not self.passes or key in self.passes[-1].seen:
            self.passes.append(_Pass(len(self.prompts)))
        self.passes[-1].seen.add(key)
        self.passes[-1].blocks[block.point] = block
        self.passes[-1].last = block.name


def recognise(path: Path) -> bool:
    """Tell whether this is a .txt or .log file."""
    return path.is_file() and path.suffix in (".txt", ".log")


def read(path: Path) -> Dump:
    """Read every tensor whose name is a point's; raise `InputError` if none is.

    The passes of one prompt are put together in order; of several prompts the longest is read.
    """
    log = _read_log(path)
    if not log.passes:
        raise InputError(
            f"{path}: no tensor of llama-eval-callback in it that is a point of K2's; expected "
            "lines like common_debug_cb_eval: attn_norm-3 = (f32) ..."
        )
    passes, tokens = _longest(log)
    total = sum(p.rows for p in passes)
    widths = {b.point: prod(b.shape) // _rows(b) for p in passes for b in p.blocks.values()}
    size = total * sum(widths.values())
    if size > MOST_NUMBERS:
        raise InputError(
            f"{path}: {size} numbers in {total} rows, of which six are printed; at most "
            f"{MOST_NUMBERS} are read: print a shorter prompt"
        )
    arrays, damaged, notes = _put_together(passes, total)
    if not arrays:
        name = passes[0].last
        why = damaged.get(next(iter(passes[0].blocks)), f"nothing is printed of {name}")
        raise InputError(f"{path}: {name}: {why}; was the log cut off? run the tool again")
    notes = _said(log, passes, total) + notes + _drop_partial_choices(arrays)
    notes += [f"{name}: {why}; it is not read" for name, why in damaged.items()]
    # what is printed whole is rounded to its decimals too: nothing goes on with it but choices
    partial = frozenset(n for n in arrays if not n.endswith("#experts"))
    step = _half_of_last_decimal(passes)
    found = tokens if len(tokens) == total else None
    return Dump(path, arrays, found, "float32", partial, step, notes=tuple(notes), unread=damaged)


def _longest(log: _Log) -> tuple[list[_Pass], list[int]]:
    """Return the passes of the longest prompt in order, and its tokens where the log has them.

    A prompt's passes have no more rows together than it has tokens. Where the log does not say how
    many, a pass of more rows than the one before begins another prompt: chunks are of one size but
    for the last, and what is decoded is one row each.
    """
    sequences: list[list[_Pass]] = []
    left = before = 0
    for i, p in enumerate(log.passes):
        follows = i > 0 and p.prompt == log.passes[i - 1].prompt
        counted = log.prompts[p.prompt - 1][0] if p.prompt else 0
        if not follows:
            left = counted
        if follows and (p.rows <= left if counted else p.rows <= before):
            sequences[-1].append(p)
        else:
            sequences.append([p])
        left, before = left - p.rows, p.rows
    chosen = max(sequences, key=lambda passes: sum(p.rows for p in passes))
    prompt = chosen[0].prompt
    return chosen, log.prompts[prompt - 1][1] if prompt else []


def _said(log: _Log, passes: list[_Pass], total: int) -> list[str]:
    """Return notes on what was put together, and what was left out."""
    notes = []
    if len(passes) < len(log.passes):
        others = len(log.passes) - len(passes)
        notes.append(f"{others} forward passes are of other prompts and are not read")
    if len(passes) > 1:
        notes.append(f"{len(passes)} forward passes are read as one sequence of {total} rows")
    if log.strays:
        notes.append(
            f"{len(log.strays)} lines inside tensors are no part of them and are skipped, first "
            f"{log.strays[0]!r}"
        )
    if log.cut:
        notes.append(
            f"the log ends within {log.passes[-1].last} or after it, and nothing later is there: "
            "the tool does not wait for what it has still to print; run it again"
        )
    if log.headless:
        notes.append(f"{log.headless} tensors have no line that says their name, and are not read")
    return notes


def _put_together(passes: list[_Pass], total: int) -> tuple[Arrays, dict[str, str], list[str]]:
    """Return the points [T, ...], NaN where nothing is printed, the damaged ones and notes.

    A tensor with fewer rows than its pass holds those whose logits were asked for, the last.
    """
    arrays: Arrays = {}
    damaged: dict[str, str] = {}
    rows: dict[str, int] = {}
    end = 0
    for p in passes:
        end += p.rows
        for point, block in p.blocks.items():
            x = _array(block)
            if x is None and block.cut and not block.numbers:
                continue  # nothing of it is there
            if x is None:
                shape = list(reversed(block.shape))
                damaged[point] = f"{shape}, of which {len(block.numbers)} numbers are printed"
                continue
            whole = arrays.setdefault(point, np.full((total, *x.shape[1:]), np.nan))
            if whole.shape[1:] != x.shape[1:]:
                damaged[point] = (
                    f"{list(whole.shape[1:])} in one pass, {list(x.shape[1:])} in another"
                )
                continue
            whole[end - len(x) : end] = x
            rows[point] = rows.get(point, 0) + len(x)
    for point in damaged:
        arrays.pop(point, None)
    which = "the last" if len(passes) == 1 else "the last of each pass"
    short = [p for p in arrays if rows[p] < total]
    return arrays, damaged, [f"{p}: {rows[p]} of {total} rows, taken as {which}" for p in short]


def _half_of_last_decimal(passes: list[_Pass]) -> float:
    """Return half a unit of the last decimal that was printed."""
    blocks = (b for p in passes for b in p.blocks.values())
    first = next((n for b in blocks for n in b.numbers if "." in n), None)
    return 0.5 * 10.0 ** -len(first.partition(".")[2]) if first else 0.0


def _rows(block: Block) -> int:
    """Return how many rows a tensor has."""
    return block.shape[1] if _turned(block) else block.shape[2]


def _turned(block: Block) -> bool:
    """Tell whether the rows are the last axis but two: [.., T, H, R], [.., T, 1, R], [.., T, K, 1].

    Those of other tensors are the last but one, [.., T, D].
    """
    one_each = block.point.endswith("#weights") and block.shape[3] == 1
    return one_each or block.point.endswith(("#q_pe", "#k_pe"))


def _array(block: Block) -> np.ndarray | None:
    """Return a tensor [T, ...], NaN where it was not printed; None where numbers are missing."""
    x = _place(block.shape, block.numbers, block.cut)
    if x is None:
        return None
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


class _Rows:
    """The rows of one tensor as they are printed, and what something else writes between them."""

    def __init__(self, log: _Log):
        self.log = log
        self.numbers: list[str] | None = None  # None between two tensors
        self.begun = ""  # of a row that something else was written into

    def start(self) -> list[str]:
        """Begin a tensor; return the list that its numbers go into."""
        self.numbers, self.begun = [], ""
        return self.numbers

    def end(self) -> None:
        """End a tensor."""
        self.numbers, self.begun = None, ""

    def take(self, line: str) -> bool:
        """Take a line that is a row, or inside a tensor; False for one that stands elsewhere."""
        row = ROW.search(self.begun + line) or ROW.search(line)
        if row and self.numbers is None:
            self.log.headless += 1
            self.numbers = []  # nobody's
        elif row and len(self.numbers or []) <= PRINTED:
            assert self.numbers is not None
            self.numbers += [m[0] for m in NUMBER.finditer(row[0])]
            if not self.begun:
                self._stray(line[: row.start()])
            self.begun = ""
        elif self.numbers is None:
            return False
        elif not row and not BARE.fullmatch(line):
            part = BEGUN.match(line) or OPEN.match(line)
            self.begun = part[0] if part else self.begun
            self._stray(line[part.end() :] if part else line)
        return True

    def _stray(self, text: str) -> None:
        """Note a text that is no part of a tensor."""
        if text.strip():
            self.log.strays.append(text.strip()[:80])


def _lines(file: TextIO) -> Iterator[str]:
    """Yield the lines of a log; of one in JSON (--log-jsonl), those that its messages make up."""
    whole = ""
    while line := file.readline(LINE):
        try:
            message = json.loads(line) if line.startswith(JSON) else None
        except ValueError:  # cut off, or not of this kind
            message = None
        if not isinstance(message, dict) or not isinstance(message.get("msg"), str):
            yield line
            continue
        *lines, whole = (whole + message["msg"]).split("\n")
        yield from lines
    if whole:
        yield whole


def _read_log(path: Path) -> _Log:
    """Return what a log of standard output, standard error or both says."""
    log = _Log()
    rows = _Rows(log)
    head: Block | None = None
    expected = 0
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for printed in _lines(file):
                line = COLOUR.sub("", printed).rstrip()
                if found := HEADER.search(line[:512]):
                    if head:
                        log.add(head)
                    head = _block(found, rows.start())
                elif "sum =" in line:
                    rows.end()  # numbers of the next batch entry are nobody's
                elif rows.take(line):
                    continue
                elif count := COUNT.search(line):
                    expected = int(count[1]) if len(count[1]) < 9 else 0
                    log.prompts.append((expected, []))
                elif (token := TOKEN.fullmatch(line)) and log.prompts:
                    ids = log.prompts[-1][1]
                    if len(ids) < expected:
                        ids.append(int(token[1]) if len(token[1]) < 9 else -1)
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e})") from None
    if rows.numbers is not None:  # the tool ends without waiting for what it has still to print
        log.cut = True
        if rows.begun and log.strays:
            del log.strays[-1]
        if head:
            head.cut = True
    if head:
        log.add(head)
    return log


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


def _place(shape: tuple[int, ...], numbers: list[str], cut: bool) -> np.ndarray | None:
    """Return the tensor with the printed numbers in their places, NaN elsewhere.

    None if there are as many numbers as no way to print this shape would give. Of a tensor that the
    log ends in there may be fewer; they are taken for the first of a newer print.
    """
    axes = [  # newer prints show the last three as well
        [list(range(n)) if n <= 3 + tail else [*range(3), *range(n - tail, n)] for n in shape]
        for tail in (3, 0)
    ]
    counts = [prod(map(len, a)) for a in axes]
    if len(numbers) not in counts and not (cut and 0 < len(numbers) < counts[0]):
        return None
    form = counts.index(len(numbers)) if len(numbers) in counts else 0
    shown, values = np.array(numbers, float), np.full(counts[form], np.nan)
    values[: len(shown)] = np.where(np.isnan(shown), np.inf, shown)  # a fault, no hole
    out = np.full(shape, np.nan)
    out[np.ix_(*axes[form])] = values.reshape([len(a) for a in axes[form]])
    return out


register(Reader("llama.cpp", ".txt", recognise, read))
