"""Judge the block scales of FP8 matrices."""

from collections.abc import Iterator

from refmoe.lint.base import Found
from refmoe.lint.facts.fp8 import Fp8Matrix
from refmoe.lint.registry import rule

ABSURD, SANE = 100.0, 10.0  # RMS of a matrix; a trained one's is well below 1


@rule("error", example="1 of 768 block scales are 0")
def fp8_zero_scale(m: Fp8Matrix) -> Iterator[Found]:
    """A block scale of FP8 is zero.

    The weights of its 128 × 128 block are all 0, whatever the codes say.
    """
    if m.zero:
        yield Found(f"{m.zero:,} of {m.blocks:,} block scales are 0", m.scale, m.zero / m.blocks)


@rule("error", example="4 of 768 block scales are negative")
def fp8_negative_scale(m: Fp8Matrix) -> Iterator[Found]:
    """A block scale of FP8 is negative.

    Scales are max|w| / 448 and so never below 0: these bytes are no scales.
    """
    if m.negative:
        text = f"{m.negative:,} of {m.blocks:,} block scales are negative"
        yield Found(text, m.scale, m.negative / m.blocks)


@rule(
    "error",
    example="weights have RMS 8.1e+05 times the scale, 0.09 divided by it: inverted?",
    reference="deepseek-ai/DeepSeek-V3 inference/kernel.py",
)
def fp8_inverted_scale(m: Fp8Matrix) -> Iterator[Found]:
    """Block scales look as if they divided, where they multiply.

    `weight_scale_inv` multiplies in spite of its name. Scales stored the other way up make weights
    larger by several orders of magnitude.
    """
    if m.times > ABSURD and m.divided < SANE:
        text = f"weights have RMS {m.times:.2g} times the scale, {m.divided:.2g} divided by it"
        yield Found(f"{text}: inverted?", m.scale, m.times)
