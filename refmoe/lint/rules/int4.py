"""Judge INT4 matrices: codes, scales, and whether GGUF's Q4_0 can hold them."""

from collections.abc import Iterator

from refmoe.lint.base import Found, percent
from refmoe.lint.facts.int4 import AllInt4, Int4Kind, Int4Matrix
from refmoe.lint.registry import rule


def _groups(m: Int4Matrix, count: int, what: str, tensor: str) -> Iterator[Found]:
    """Yield one finding about so many groups of a matrix, if there are any."""
    if count:
        yield Found(f"{count:,} of {m.groups:,} groups {what}", tensor, count / m.groups)


@rule("error", example="8 of 57,344 groups have every code at -8: never packed")
def int4_unwritten(m: Int4Matrix) -> Iterator[Found]:
    """Groups of INT4 codes are nothing but zero bytes.

    The code of 0 is 8, so zero bytes mean -8 everywhere: nobody wrote these.
    """
    yield from _groups(m, m.unwritten, "have every code at -8: never packed", m.packed)


@rule("error", example="1 of 57,344 groups have codes, and a scale of 0")
def int4_zero_scale(m: Int4Matrix) -> Iterator[Found]:
    """A group of INT4 codes has a scale of zero.

    Its weights are all 0 whatever the codes say. A quantiser leaves a scale of 0 only where the
    codes are 0 as well, which is no finding.
    """
    yield from _groups(m, m.lost, "have codes, and a scale of 0", m.scale)


@rule("error", example="57,344 of 57,344 groups have a negative scale")
def int4_negative_scale(m: Int4Matrix) -> Iterator[Found]:
    """A scale of INT4 is negative.

    Symmetric quantisers (amax/7, amax/7.5) make none: these bytes are no scales.
    """
    yield from _groups(m, m.negative, "have a negative scale", m.scale)


@rule(
    "warning",
    example="1 of 57,344 groups have a scale above float16's 65504",
    reference="ggml-org/llama.cpp#17064",
)
def int4_scale_overflow(m: Int4Matrix) -> Iterator[Found]:
    """A scale of INT4 is infinite in float16, which Q4_0 of a GGUF has for scales.

    bf16 reaches 3e38, float16 65504.
    """
    yield from _groups(m, m.beyond, "have a scale above float16's 65504", m.scale)


@rule(
    "warning",
    example="1 of 57,344 groups have a scale that changes in float16 (Q4_0)",
    reference="ggml-org/llama.cpp#17064, ggml-org/llama.cpp#17083",
)
def int4_scale_inexact(m: Int4Matrix) -> Iterator[Found]:
    """A scale of INT4 is rounded by float16, so that a repack to Q4_0 is not exact.

    A bf16 below 2⁻¹⁴ may have more digits than a subnormal float16 has room for.
    """
    count = m.inexact - m.beyond
    yield from _groups(m, count, "have a scale that changes in float16 (Q4_0)", m.scale)


@rule(
    "error",
    example="says [33, 96], weight_packed holds [32, 96]",
    reference="huggingface/transformers#47315",
)
def int4_shape(m: Int4Matrix) -> Iterator[Found]:
    """weight_shape states another shape than the packed codes have.

    Engines unpack by the one or the other, so that columns are cut or added.
    """
    if m.shape_name and m.shape_told != list(m.shape):
        yield Found(f"says {m.shape_told}, weight_packed holds {list(m.shape)}", m.shape_name)


@rule(
    "note",
    example="model.layers.*.mlp.experts.*.up_proj: 23,040 tensors, 338,228,674,560 codes: -8 none, "
    "±7 6.1 %, 0 9.4 %; scales 0.00014 to 0.051",
)
def int4_codes(k: Int4Kind) -> Iterator[Found]:
    """Count the codes and scales of each kind of INT4 matrix.

    The quantiser shows: amax/7 never makes -8 and has ±7 in every group, amax/7.5 has -8.
    """
    c, n = k.codes, int(k.codes.sum())
    yield Found(
        f"{k.kind}: {k.tensors:,} tensors, {n:,} codes: -8 {percent(c[0], n)}, "
        f"±7 {percent(c[1] + c[15], n)}, 0 {percent(c[8], n)}; "
        f"scales {k.least:.3g} to {k.largest:.3g}"
    )


@rule(
    "note",
    example="INT4 to Q4_0: -8 in 0 of 11,796,480 codes; every scale survives float16: a repack of "
    "codes and scales is exact",
    reference="ggml-org/llama.cpp#17064",
)
def int4_to_q4(every: AllInt4) -> Iterator[Found]:
    """Say whether GGUF's Q4_0 can hold the INT4 weights exactly.

    Q4_0 is (nibble - 8)·d with d in float16: the same grid, if d is the scale. llama.cpp's own
    quantiser takes d = max/-8 and so makes another grid of weights that never use -8.
    """
    kinds = every.kinds
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
    yield Found(text)
