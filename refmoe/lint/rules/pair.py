"""Judge two checkpoints of one model."""

from collections.abc import Iterator

from refmoe.lint.base import Found, Level
from refmoe.lint.diff.report import Damaged, EqualWeights, OneSided, Pair, RoundedBias
from refmoe.lint.facts.router import DRAWS
from refmoe.lint.facts.settings import STORAGE, USE, TwoConfigs
from refmoe.lint.registry import rule

SAID = {
    "same bits": "the same bits",
    "same values": "the same values",
    "rounded": "equal but for rounding",
    "within a step": "within a quantisation step",
}


@rule(
    "error",
    example="routed_scaling_factor = 2.872, checkpoint has 2.827",
    listed=None,
)
def diff_config(c: TwoConfigs) -> Iterator[Found]:
    """Two copies of one model state different constants.

    Another constant is another function of the same weights. Context length and special ids are
    warnings, the format in which weights are stored is a note.
    """
    for key, first, second in c.differ:
        level: Level | None = "warning" if key in USE else "note" if key == STORAGE else None
        said, has = ("absent" if v is None else repr(v) for v in (second, first))
        yield Found(f"{key} = {said}, {c.first} has {has}", level=level)


@rule("note", example="dump has no config.json: only tensors are compared")
def diff_no_config(c: TwoConfigs) -> Iterator[Found]:
    """Say that the second of two folders has no config.json.

    A dump of the weights that an engine loaded has none. It is taken to be of the first's config.
    """
    if not c.stated:
        yield Found(f"{c.second} has no config.json: only tensors are compared")


@rule(
    "error",
    example="model.layers.1.mlp.experts.3.up_proj.weight: relative error 1.4: nibbles swapped in "
    "each byte",
    reference="ggml-org/llama.cpp#17083, kvcache-ai/ktransformers#2076, vllm-project/vllm#34353",
)
def diff_weights(p: Pair) -> Iterator[Found]:
    """A weight of the copy is another weight.

    In one format any difference is one. In two formats it is what storing one number in both
    cannot produce. Known mistakes are tried one after another until one turns the first into the
    second: order of nibbles, rows, heads and experts, zero points, scales, factors.
    """
    if p.how.verdict == "wrong" and p.cause is not None:
        weight = float("inf") if p.how.error is None else p.how.error
        yield Found(p.text, p.key, weight, group=p.cause.category)


@rule("error", example="cannot be compared: 'model.norm.weight_scale'")
def diff_damaged(d: Damaged) -> Iterator[Found]:
    """A weight of the copy cannot be compared: a part is missing, or of a wrong shape.

    Codes without their scale are no weights.
    """
    yield Found(d.problem, d.key)


@rule("error", example="model.layers.1.input_layernorm.weight: not in copy")
def diff_missing(t: OneSided) -> Iterator[Found]:
    """A weight is not in the copy.

    A note for tensors beside the text model, which conversions may leave out.
    """
    if not t.there:
        extra = t.extra
        yield Found(f"not in {t.other}", t.key, level="note" if extra else None, group=str(extra))


@rule("warning", example="model.layers.0.mlp.up.weight: only in copy")
def diff_added(t: OneSided) -> Iterator[Found]:
    """A tensor is in the copy alone.

    An error if the network needs it, since the first is then incomplete; a note for tensors
    beside the text model.
    """
    if t.there:
        level: Level | None = "note" if t.extra else "error" if t.needed else None
        yield Found(f"only in {t.other}", t.key, level=level, group=str(t.extra))


@rule(
    "note",
    example="within a quantisation step: 66 of routed experts, INT4 and Q8_0, relative error up "
    "to 0.0079",
)
def diff_equal(e: EqualWeights) -> Iterator[Found]:
    """Count the weights that are the same, by class, formats and how nearly they are.

    The same bits; the same values in other bits; equal but for rounding to a plain type; within
    half a step of a quantised one.
    """
    worst = f", relative error up to {e.error:.2g}" if e.error else ""
    said = SAID[e.verdict]
    yield Found(f"{said}: {e.count:,} of {e.kind}{worst}", group=f"{said}{e.kind}")


@rule(
    "warning",
    example="rounded to BF16: 384 distinct values are 201, and 1.2% of tokens choose other experts",
    reference="huggingface/transformers#42580, sgl-project/sglang#29783",
)
def diff_router_bias(b: RoundedBias) -> Iterator[Found]:
    """The router's bias was rounded in the copy.

    That is the same weight but for rounding, and yet it decides which experts are chosen: near
    ties flip.
    """
    yield Found(
        f"rounded to {b.dtype}: {b.values} distinct values are {b.rounded}, and {b.share:.1%} of "
        f"tokens choose other experts, by {DRAWS:,} draws of logits ~ N(0, |w_e|²); it must stay "
        "F32 (huggingface/transformers#42580)",
        b.key,
        b.share,
    )
