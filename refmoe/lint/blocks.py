"""Check a GGUF's blocks."""

import re
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from refmoe.files import InputError
from refmoe.lint.base import TILE, _Findings, _of, _watched
from refmoe.lint.int4 import _histogram
from refmoe.lint.values import BITS, _copies, _floats, _gain
from refmoe.model.matrix import (
    dequantize,
    round_bf16,
    tiles,
)
from refmoe.weights.checkpoint import (
    tensor_class,
)
from refmoe.weights.gguf import Gguf, block_of

# --- blocks of a GGUF

HALVES = {  # where a block's float16 are, the scale first (ggml-org/llama.cpp ggml-common.h)
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS"), (0,)),
    **dict.fromkeys(("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
}


def _gguf_values(checkpoint: Gguf, out: _Findings) -> None:
    """Read every tensor once, experts one by one."""
    tensors = checkpoint.tensors
    types: Counter[str] = Counter()
    prints: dict[bytes, str] = {}
    kinds: dict[str, Q4Facts] = {}
    places = set()
    for name in _watched(tensors, lambda name: tensors[name].nbytes):
        t = tensors[name]
        if (t.file, t.start) in places:  # the head that is the embedding
            continue
        places.add((t.file, t.start))
        types[t.dtype] += 1
        x = checkpoint.array(name)
        if t.dtype in BITS:
            _floats(name, x, checkpoint, out)
        else:
            _blocks(name, checkpoint, kinds, out)
        if tensor_class(name, checkpoint.cfg) == "norms":
            _gain(name, checkpoint, out)
        _copies(name, x, checkpoint, prints, out)
    told = ", ".join(f"{n:,} {kind}" for kind, n in types.most_common())
    out.add("note", "types", None, f"{told}, experts counted one by one")
    for kind, facts in kinds.items():
        facts.note(kind, out)


@dataclass
class Q4Facts:
    """Codes and scales of Q4_0 in one kind of matrix."""

    tensors: int = 0
    bytes: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))  # two codes each
    scales: int = 0
    negative: int = 0
    inexact: int = 0  # no bf16

    def note(self, kind: str, out: _Findings) -> None:
        two = self.bytes.reshape(16, 16)
        c = two.sum(axis=0) + two.sum(axis=1)
        n = int(c.sum())
        text = (
            f"{kind}: {self.tensors:,} of Q4_0, {n:,} codes: -8 {_of(c[0], n)}, "
            f"±7 {_of(c[1] + c[15], n)}, 0 {_of(c[8], n)}; of {self.scales:,} scales "
            f"{_of(self.negative, self.scales)} negative, {_of(self.inexact, self.scales)} no bf16"
        )
        if not c[0] and not self.negative and not self.inexact:
            text += ": as a repack of INT4 leaves them (amax/7), and it goes back exactly"
        elif self.negative:
            text += ": as llama.cpp's quantiser leaves them (d = max/-8), so not a repack of INT4"
        out.add("note", "Q4_0", None, text)


def _blocks(name: str, checkpoint: Gguf, kinds: dict[str, Q4Facts], out: _Findings) -> None:
    """Scales of a quantised tensor; of types whose float16 lie elsewhere, the values."""
    t = checkpoint.tensors[name]
    places = HALVES.get(t.dtype)
    if places is None:
        try:
            m = checkpoint.matrix(name.removesuffix(".weight"))
        except InputError as e:  # of a type that nothing decodes
            out.add("error", "types", name, str(e))
            return
        bad = sum(int((~np.isfinite(dequantize(tile))).sum()) for _, tile in tiles(m, TILE))
        if bad:
            out.add("error", "not finite", name, f"{bad:,} values are not finite", bad)
        return
    blocks = checkpoint.array(name).reshape(-1, block_of(t)[1])
    halves = [np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16)[:, 0] for at in places]
    bad = sum(int((~np.isfinite(half)).sum()) for half in halves)
    if bad:
        out.add("error", "not finite", name, f"{bad:,} scales are not finite", bad)
    if not any(half.any() for half in halves):
        out.add("error", "all zero", name, "every scale is zero: never written?")
        return
    if t.dtype in ("Q4_0", "Q8_0"):
        _codes(name, t.dtype, blocks[:, 2:], halves[0], kinds, out)


def _codes(
    name: str,
    dtype: str,
    codes: np.ndarray,
    d: np.ndarray,
    kinds: dict[str, Q4Facts],
    out: _Findings,
) -> None:
    """codes [n, 16] of Q4_0, two nibbles a byte, or [n, 32] of Q8_0; scales d [n]."""
    zero = d == 0
    lost = codes[zero] != (0x88 if dtype == "Q4_0" else 0)  # the code of 0
    unwritten, others, equal, negative = 0, lost.any(axis=1), 0, 0
    if dtype == "Q4_0":
        empty = np.logical_not(codes.any(axis=1))
        unwritten, equal = int(empty[zero].sum()), int(empty[~zero].sum())
        others &= codes[zero].any(axis=1)
        kind = re.sub(r"\.\d+\.", ".*.", name.removesuffix(".weight"))
        facts = kinds.setdefault(kind, Q4Facts())
        facts.tensors += 1
        for i in range(0, len(codes), TILE // 16):
            facts.bytes += _histogram(codes[i : i + TILE // 16])
        wide = d[np.isfinite(d)].astype(np.float32)
        facts.scales += len(d)
        facts.negative += int((wide < 0).sum())
        facts.inexact += int((round_bf16(wide) != wide).sum())
    else:
        negative = int((d < 0).sum())
    for level, what, count, text in (
        ("error", "unwritten blocks", unwritten, "are nothing but zero bytes: never written"),
        ("error", "negative scales", negative, "have a negative scale, which no quantiser makes"),
        ("warning", "lost scales", int(others.sum()), "have codes, and a scale of 0"),
        ("warning", "untouched codes", equal, "have every code at -8: equal weights, or no codes"),
    ):
        if count:
            text = f"{count:,} of {len(d):,} blocks {text}"
            out.add(level, what, name, text, count / len(d))  # type: ignore[arg-type]
