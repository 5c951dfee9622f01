"""Judge the blocks of a GGUF's quantised tensors."""

from collections.abc import Iterator

from refmoe.lint.base import Found, percent
from refmoe.lint.facts.blocks import CodedBlocks, Q4Kind, Types, Undecodable
from refmoe.lint.registry import rule


def _blocks(m: CodedBlocks, count: int, what: str) -> Iterator[Found]:
    """Yield one finding about so many blocks of a tensor, if there are any."""
    if count:
        yield Found(f"{count:,} of {m.blocks:,} blocks {what}", m.tensor, count / m.blocks)


@rule("note", example="360 Q4_0, 57 F32, experts counted one by one")
def gguf_types(t: Types) -> Iterator[Found]:
    """Count the tensors of each type in a GGUF.

    A mixture that a quantiser was not asked for shows here.
    """
    told = ", ".join(f"{n:,} {kind}" for kind, n in t.counts)
    yield Found(f"{told}, experts counted one by one")


@rule("error", example="model.gguf: blk.3.attn_output.weight is IQ4_KS, which nothing decodes")
def gguf_undecodable(u: Undecodable) -> Iterator[Found]:
    """A tensor is of a type that nothing here decodes.

    Some engines write types of their own; another engine that reads them as something else
    computes with noise.
    """
    yield Found(u.problem, u.tensor)


@rule("error", example="8 of 1,024 blocks are nothing but zero bytes: never written")
def gguf_unwritten(m: CodedBlocks) -> Iterator[Found]:
    """Blocks of Q4_0 are nothing but zero bytes.

    The code of 0 is 8. A quantiser writes 0x88 for zeros, so nobody wrote these.
    """
    yield from _blocks(m, m.unwritten, "are nothing but zero bytes: never written")


@rule("error", example="1 of 1,280 blocks have a negative scale, which no quantiser makes")
def gguf_negative_scale(m: CodedBlocks) -> Iterator[Found]:
    """A scale of Q8_0 is negative.

    Its quantiser takes amax/127: these bytes are no scales. Q4_0's d = max/-8 may be negative.
    """
    if m.dtype == "Q8_0":
        yield from _blocks(m, m.negative, "have a negative scale, which no quantiser makes")


@rule("warning", example="1 of 1,024 blocks have codes, and a scale of 0")
def gguf_zero_scale(m: CodedBlocks) -> Iterator[Found]:
    """A block has codes other than 0 and a scale of zero.

    Its weights are all 0 whatever the codes say. A scale that is below float16's least number
    becomes 0 so.
    """
    yield from _blocks(m, m.lost, "have codes, and a scale of 0")


@rule(
    "warning",
    example="8 of 1,024 blocks have every code at -8: equal weights, or no codes",
)
def gguf_lowest_codes(m: CodedBlocks) -> Iterator[Found]:
    """Blocks of Q4_0 have a scale, and zero bytes for codes.

    All 32 weights are then the same, -8 times the scale, or the codes were never written.
    """
    yield from _blocks(m, m.lowest, "have every code at -8: equal weights, or no codes")


@rule(
    "note",
    example="model.layers.*.mlp.experts.*.up_proj: 120 of Q4_0, 3,932,160 codes: -8 none, ±7 6 %, "
    "0 9.6 %; of 122,880 scales none negative, none no bf16: as a repack of INT4 leaves them "
    "(amax/7), and it goes back exactly",
    reference="ggml-org/llama.cpp#17064",
)
def gguf_q4_codes(k: Q4Kind) -> Iterator[Found]:
    """Count the codes and scales of each kind of Q4_0 tensor, and say who made them.

    A repack of K2's INT4 has positive scales in bf16 and no -8. llama.cpp's own quantiser has
    scales of both signs, so its file is not a repack of the published weights.
    """
    c, n = k.codes, int(k.codes.sum())
    text = (
        f"{k.kind}: {k.tensors:,} of Q4_0, {n:,} codes: -8 {percent(c[0], n)}, "
        f"±7 {percent(c[1] + c[15], n)}, 0 {percent(c[8], n)}; of {k.scales:,} scales "
        f"{percent(k.negative, k.scales)} negative, {percent(k.inexact, k.scales)} no bf16"
    )
    if not c[0] and not k.negative and not k.inexact:
        text += ": as a repack of INT4 leaves them (amax/7), and it goes back exactly"
    elif k.negative:
        text += ": as llama.cpp's quantiser leaves them (d = max/-8), so not a repack of INT4"
    yield Found(text)
