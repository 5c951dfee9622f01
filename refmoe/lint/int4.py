"""Check INT4 matrices."""

import re
from dataclasses import dataclass, field

import numpy as np

from refmoe.lint.base import TILE, _Findings, _of
from refmoe.model.formats.int4 import Int4
from refmoe.model.matrix import tiles, widen_bf16
from refmoe.weights.checkpoint import (
    Checkpoint,
)

# --- INT4


@dataclass
class Int4Facts:
    """Codes and scales of one kind of matrix, all layers and experts."""

    tensors: int = 0
    bytes: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))  # two codes each
    scales: int = 0
    least: float = np.inf
    largest: float = 0.0
    subnormal: int = 0  # in float16, exact or not
    inexact: int = 0  # changed by float16, too large ones included

    @property
    def codes(self) -> np.ndarray:
        """How often each code is used, -8 to 7."""
        two = self.bytes.reshape(16, 16)
        return two.sum(axis=0) + two.sum(axis=1)

    def note(self, kind: str, out: _Findings) -> None:
        c, n = self.codes, int(self.codes.sum())
        text = (
            f"{kind}: {self.tensors:,} tensors, {n:,} codes: -8 {_of(c[0], n)}, "
            f"±7 {_of(c[1] + c[15], n)}, 0 {_of(c[8], n)}; "
            f"scales {self.least:.3g} to {self.largest:.3g}"
        )
        out.add("note", "INT4", None, text)


def _int4(name: str, checkpoint: Checkpoint, packed: dict[str, Int4Facts], out: _Findings) -> None:
    """Codes and scales of one matrix; what is odd is a finding, the rest is summed by kind."""
    module = name.removesuffix(".weight_packed")
    stored, scale = checkpoint.tensors[name], checkpoint.tensors[module + ".weight_scale"]
    m = Int4(checkpoint.array(name), checkpoint.array(module + ".weight_scale"))
    facts = packed.setdefault(re.sub(r"\.\d+\.", ".*.", module), Int4Facts())
    facts.tensors += 1
    untouched = lost = negative = inexact = large = 0
    for _, tile in tiles(m, TILE):
        assert isinstance(tile, Int4)
        O, G = tile.scale.shape
        words = np.ascontiguousarray(tile.packed).reshape(O, G, -1)
        s = widen_bf16(tile.scale)
        facts.bytes += _histogram(words)
        empty = ~words.any(axis=-1)  # [O, G] every code -8: bytes that nobody wrote
        untouched += int(np.count_nonzero(empty))
        if not s.all():  # words of 0x88888888 hold codes of 0
            lost += int(np.count_nonzero((s == 0) & (words.view(np.uint32) != 0x88888888).any(-1)))
        negative += int(np.count_nonzero((s < 0) & np.isfinite(s)))
        size = np.abs(s[np.isfinite(s)])
        with np.errstate(over="ignore"):
            half = size.astype(np.float16).astype(np.float32)
        inexact += int(np.count_nonzero(half != size))
        large += int(np.count_nonzero(half == np.inf))
        facts.subnormal += int(np.count_nonzero((size > 0) & (size < 2.0**-14)))
        facts.scales += s.size
        facts.least = min(facts.least, float(size.min(initial=np.inf)))
        facts.largest = max(facts.largest, float(size.max(initial=0)))
    facts.inexact += inexact
    groups = m.scale.size
    for level, kind, where, count, text in (
        ("error", "untouched codes", stored, untouched, "have every code at -8: never packed"),
        ("error", "lost scales", scale, lost, "have codes, and a scale of 0"),
        ("error", "negative scales", scale, negative, "have a negative scale"),
        ("warning", "scales beyond float16", scale, large, "have a scale above float16's 65504"),
        ("warning", "scales float16 rounds", scale, inexact - large, "change in float16 (Q4_0)"),
    ):
        if count:
            text = f"{count:,} of {groups:,} groups {text}"
            out.add(level, kind, where.name, text, count / groups)  # type: ignore[arg-type]
    shape = checkpoint.tensors.get(module + ".weight_shape")
    if shape and checkpoint.array(module + ".weight_shape").tolist() != list(m.shape):
        said = checkpoint.array(module + ".weight_shape").tolist()
        text = f"says {said}, weight_packed holds {list(m.shape)}"
        out.add("error", "weight_shape", shape.name, text)


def _histogram(x: np.ndarray) -> np.ndarray:
    """How often each byte occurs; counted in pairs, which halves the time."""
    flat = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    pairs = np.bincount(flat[: len(flat) & ~1].view(np.uint16), minlength=1 << 16)
    two = pairs.reshape(256, 256)
    out = two.sum(axis=0) + two.sum(axis=1)
    if len(flat) & 1:
        out[flat[-1]] += 1
    return out


def _q4_0(kinds: list[Int4Facts], out: _Findings) -> None:
    """Q4_0 is (nibble - 8)·d with d in float16: the same grid if d is the scale."""
    if not kinds:
        return
    lowest = sum(int(k.codes[0]) for k in kinds)
    n = sum(int(k.codes.sum()) for k in kinds)
    inexact, subnormal = sum(k.inexact for k in kinds), sum(k.subnormal for k in kinds)
    text = f"INT4 to Q4_0: -8 in {lowest:,} of {n:,} codes; "
    text += f"{inexact:,} scales change in float16" if inexact else "every scale survives float16"
    text += f" ({subnormal:,} as subnormals)" if subnormal else ""
    text += ": a repack is not exact" if inexact else ": a repack of codes and scales is exact"
    if not lowest:
        text += (
            "; llama.cpp's own quantiser, d = max/-8, is not (ggml-org/llama.cpp#17064): "
            "d = amax/7 is where a group holds ±7"
        )
    out.add("note", "INT4", None, text)
