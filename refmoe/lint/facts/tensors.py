"""Read every tensor of a checkpoint once, and show what was counted to the rules."""

from collections import Counter
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, ClassVar, NamedTuple

import numpy as np

from refmoe.files import InputError
from refmoe.lint.base import TILE, Findings, Place, same_bytes, show_progress
from refmoe.lint.facts.blocks import CodedBlocks, Q4Kind, Types, Undecodable, read_blocks
from refmoe.lint.facts.fp8 import Fp8Matrix, read_fp8
from refmoe.lint.facts.int4 import AllInt4, Int4Kind, Int4Matrix, kind_of, read_int4
from refmoe.lint.matrices import label_of, values_of
from refmoe.weights.checkpoint import Checkpoint, known_extra, tensor_class
from refmoe.weights.gguf import Gguf

SAMPLE = 4096  # bytes at the beginning, middle and end that make a tensor's fingerprint
LEAST_COPY = 64  # bytes; smaller tensors may be alike by chance


class Bits(NamedTuple):
    """A float format by the bits of its magnitude."""

    dtype: Any
    infinity: int  # from here on not finite
    normal: int  # the least that is not subnormal


BITS = {
    "F64": Bits(np.uint64, 0x7FF << 52, 1 << 52),
    "F32": Bits(np.uint32, 0xFF << 23, 1 << 23),
    "F16": Bits(np.uint16, 0x1F << 10, 1 << 10),
    "BF16": Bits(np.uint16, 0xFF << 7, 1 << 7),
    "F8_E5M2": Bits(np.uint8, 0x1F << 2, 1 << 2),
    "F8_E4M3": Bits(np.uint8, 0x7F, 1 << 3),
}


@dataclass
class Numbers:
    """Kinds of numbers in one tensor; of a quantised one in a GGUF, among its scales."""

    places: ClassVar[tuple[Place, ...]] = ("folder", "gguf")
    tensor: str
    unit: str = "values"  # what is counted: values, scales, or NaN codes
    may_be_zero: bool = False  # a bias, or beside the text model
    count: int = 0
    nonfinite: int = 0
    first: list[int] | None = None  # index of the first that is not finite
    zeros: int = 0
    subnormal: int = 0  # not counted in e4m3, where a block with an outlier has many


@dataclass(frozen=True)
class Gains:
    """The weights of one norm."""

    places: ClassVar[tuple[Place, ...]] = ("folder", "gguf")
    tensor: str
    values: np.ndarray  # [n] float64


@dataclass(frozen=True)
class Copy:
    """Two tensors of the network with the same bytes."""

    places: ClassVar[tuple[Place, ...]] = ("folder", "gguf")
    tensor: str
    of: str


@dataclass
class CopyFinder:
    """Fingerprints of the tensors read so far."""

    checkpoint: Checkpoint
    seen: dict[bytes, str] = field(default_factory=dict)

    def find(self, name: str, x: np.ndarray) -> str | None:
        """Return the earlier tensor with the same bytes as x, if there is one.

        Constant tensors (zeros, initial gains) and small ones are alike without being copies.
        """
        raw = x.reshape(-1).view(np.uint8)
        if len(raw) < LEAST_COPY:
            return None
        n, size = len(raw), x.itemsize
        middle = n // 2 // size * size
        pieces = [raw[:SAMPLE], raw[middle : middle + SAMPLE], raw[max(0, n - SAMPLE) :]]
        if all(len(np.unique(p[: len(p) // size * size].view(x.dtype))) == 1 for p in pieces):
            return None
        sample = b"".join(p.tobytes() for p in pieces) + str((n, x.dtype)).encode()
        other = self.seen.setdefault(blake2b(sample).digest(), name)
        alike = other != name and same_bytes(x, self.checkpoint.array(other))
        return other if alike else None


def read_tensors(checkpoint: Checkpoint, fit: list[str], findings: Findings) -> None:
    """Show `Numbers` of every tensor to the rules, and more of those that fit the config.

    Each tensor is read once, whatever the rules ask for; none is read that no rule asks for.
    """
    if not findings.needs(
        Numbers, Gains, Copy, Int4Matrix, Int4Kind, AllInt4, Fp8Matrix,
        CodedBlocks, Q4Kind, Types, Undecodable,
    ):  # fmt: skip
        return
    tensors = checkpoint.tensors
    types: Counter[str] = Counter()
    copies = CopyFinder(checkpoint)
    int4: dict[str, Int4Kind] = {}
    q4: dict[str, Q4Kind] = {}
    places: set[tuple[Any, int]] = set()
    ok = set(fit)
    for name in show_progress(tensors, lambda name: tensors[name].nbytes):
        stored = tensors[name]
        if not stored.nbytes or (stored.file, stored.start) in places:  # a head that is tied
            continue
        places.add((stored.file, stored.start))
        types[stored.dtype] += 1
        label = label_of(checkpoint, name)
        x = checkpoint.array(name)
        if stored.dtype in BITS:
            if findings.needs(Numbers):
                findings.judge(count_numbers(name, x, checkpoint))
        elif isinstance(checkpoint, Gguf) and findings.needs(
            Numbers, CodedBlocks, Q4Kind, Undecodable
        ):
            _read_blocks(name, checkpoint, q4, findings)
        if name not in ok:
            continue
        if (
            name.endswith(".weight_packed")
            and name.replace("_packed", "_scale") in ok
            and findings.needs(Int4Matrix, Int4Kind, AllInt4)
        ):
            m = read_int4(name, checkpoint)
            module = kind_of(name.removesuffix(".weight_packed"))
            int4.setdefault(module, Int4Kind(module)).add(m)
            findings.judge(m)
        if (
            name.endswith(".weight_scale_inv")
            and name.removesuffix("_scale_inv") in ok
            and findings.needs(Fp8Matrix)
            and (scales := read_fp8(name, checkpoint))
        ):
            findings.judge(scales)
        if tensor_class(name, checkpoint.cfg) == "norms" and findings.needs(Gains):
            findings.judge(Gains(label, values_of(checkpoint, name)))
        if findings.needs(Copy) and (other := copies.find(name, x)):
            findings.judge(Copy(label, label_of(checkpoint, other)))
    if isinstance(checkpoint, Gguf):
        findings.judge(Types(types.most_common()))
    for kind in int4.values():
        findings.judge(kind)
    for blocks in q4.values():
        findings.judge(blocks)
    if int4:
        findings.judge(AllInt4(list(int4.values())))


def count_numbers(name: str, x: np.ndarray, checkpoint: Checkpoint) -> Numbers:
    """Count kinds of numbers in a plain tensor, by integer operations on pieces of it."""
    stored = checkpoint.tensors[name]
    bits = BITS[stored.dtype]
    out = Numbers(label_of(checkpoint, name))
    out.unit = "NaN codes" if stored.dtype == "F8_E4M3" else "values"
    bias = name.endswith(("e_score_correction_bias", ".bias"))
    out.may_be_zero = bias or known_extra(name, checkpoint.cfg)
    flat = x.reshape(-1).view(bits.dtype)
    magnitude = np.iinfo(bits.dtype).max >> 1
    for start in range(0, len(flat), TILE):
        m = flat[start : start + TILE] & bits.dtype(magnitude)
        bad = m >= bits.dtype(bits.infinity)
        count = int(np.count_nonzero(bad))
        if count and out.first is None:
            out.first = [int(i) for i in np.unravel_index(start + int(bad.argmax()), stored.shape)]
        zeros = len(m) - int(np.count_nonzero(m))
        out.count += len(m)
        out.nonfinite += count
        out.zeros += zeros
        if stored.dtype != "F8_E4M3":
            out.subnormal += int(np.count_nonzero(m < bits.dtype(bits.normal))) - zeros
    return out


def _read_blocks(name: str, checkpoint: Gguf, kinds: dict[str, Q4Kind], findings: Findings) -> None:
    """Show the scales and codes of a quantised tensor of a GGUF to the rules."""
    try:
        seen, codes = read_blocks(name, checkpoint)
    except InputError as e:
        findings.judge(Undecodable(name, str(e)))
        return
    zeros, bad = seen.zeros, seen.nonfinite
    findings.judge(Numbers(name, seen.unit, count=seen.count, nonfinite=bad, zeros=zeros))
    if codes is None:
        return
    if codes.dtype == "Q4_0":
        kind = kind_of(name.removesuffix(".weight"))
        kinds.setdefault(kind, Q4Kind(kind)).add(codes)
    findings.judge(codes)
