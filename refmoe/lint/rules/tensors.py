"""Judge names, shapes and plain values of tensors."""

from collections.abc import Iterator

import numpy as np

from refmoe.lint.base import Found, percent
from refmoe.lint.facts.names import Names
from refmoe.lint.facts.tensors import Copy, Gains, Numbers
from refmoe.lint.registry import rule

MANY_SUBNORMAL = 0.1  # of a tensor's values; trained weights have next to none
FEW_GAINS = 8  # a norm with fewer may be alike by chance
AROUND_ZERO = 0.05  # |median| of gains; trained gains of K2's family lie well above 0


@rule(
    "error",
    example="model.layers.0.mlp.up_proj.weight: missing: config.json calls for it, and it is in no "
    "file",
    reference="vllm-project/vllm#33876, vllm-project/vllm#13725",
)
def tensor_missing(n: Names) -> Iterator[Found]:
    """A tensor that the config calls for is in no file.

    Engines that initialise before they load run on with random numbers in its place, or with
    zeros.
    """
    for name in n.missing:
        yield Found(f"missing: {n.source} calls for it, and it is in no file", name)


@rule("error", example="config.json is another model's")
def config_other_model(n: Names) -> Iterator[Found]:
    """The config calls for more absent tensors than any member of the family has at all.

    Names were no longer compared from there on.
    """
    if n.gave_up:
        yield Found(f"{n.source} is another model's")


@rule(
    "error",
    example="model.layers.0.mlp.down_proj.weight: shape [18432, 7168], config.json makes it "
    "[7168, 18432]: transposed",
    reference="modelscope/ms-swift#6851, huggingface/transformers#36026",
)
def tensor_shape(n: Names) -> Iterator[Found]:
    """A tensor has another shape than the config makes it.

    Frequent: scales of the partial last block of the 576 rows of kv_a_proj_with_mqa, and matrices
    stored transposed. The GGUF reader refuses such a file, so the rule is for folders.
    """
    for stored, shape in n.wrong_shape:
        text = f"shape {list(stored.shape)}, {n.source} makes it {list(shape)}"
        text += ": transposed" if stored.shape == shape[::-1] else ""
        yield Found(text, stored.name)


@rule(
    "error",
    example="model.layers.1.input_layernorm.weight: dtype I32, expected BF16 or F16 or F32 or F64",
)
def tensor_dtype(n: Names) -> Iterator[Found]:
    """A tensor has a dtype that its place in the network cannot have.

    Its bytes would be read as other numbers.
    """
    for stored, dtypes in n.wrong_dtype:
        yield Found(f"dtype {stored.dtype}, expected {' or '.join(dtypes)}", stored.name)


@rule("warning", example="model.layers.0.mlp.up.weight: never read: no place of the network has it")
def tensor_unread(n: Names) -> Iterator[Found]:
    """A tensor has a name that nothing in the network reads.

    Beside a missing tensor it is often that tensor under another name.
    """
    for name in n.unread:
        yield Found("never read: no place of the network has this name", name)


@rule("note", example="335 tensors beside the text model (vision, MTP, left-over tables)")
def tensor_extra(n: Names) -> Iterator[Found]:
    """Count tensors beside the text model, as published checkpoints carry them.

    Vision tower and projector (K2.5 and later), the multi-token prediction layer (DeepSeek-V3),
    a left-over table of rotary frequencies (K2-Instruct, of the wrong length). Text needs none.
    """
    if n.extra:
        text = f"{len(n.extra)} tensors beside the text model (vision, MTP, left-over tables)"
        yield Found(text)


@rule(
    "error",
    example="model.layers.3.self_attn.q_b_proj.weight: 1 values that are not finite, first at "
    "[3, 5]",
    reference="vllm-project/vllm#42426",
)
def tensor_nonfinite(t: Numbers) -> Iterator[Found]:
    """A tensor holds NaN or infinity.

    One such value makes every token that meets it NaN. Of quantised tensors in a GGUF the scales
    are looked at; in FP8 the code ±0x7f is NaN.
    """
    if not t.nonfinite:
        return
    if t.first is None:
        text = f"{t.nonfinite:,} {t.unit} are not finite"
    else:
        what = t.unit if t.unit == "NaN codes" else f"{t.unit} that are not finite"
        text = f"{t.nonfinite:,} {what}, first at {t.first}"
    yield Found(text, t.tensor, t.nonfinite)


@rule("error", example="lm_head.weight: all zero: never written or never loaded?")
def tensor_zero(t: Numbers) -> Iterator[Found]:
    """Every value of a tensor is zero.

    A trained tensor never is: it was never written, or never loaded. A warning for biases and for
    tensors beside the text model, which may be.
    """
    if t.zeros == t.count:
        text = "every scale is zero" if t.unit == "scales" else "all zero"
        question = "never written?" if t.unit == "scales" else "never written or never loaded?"
        yield Found(f"{text}: {question}", t.tensor, level="warning" if t.may_be_zero else None)


@rule(
    "warning",
    example="model.layers.1.self_attn.o_proj.weight: 98 % of its values are subnormal: another "
    "dtype's bytes?",
)
def tensor_subnormal(t: Numbers) -> Iterator[Found]:
    """Many values of a tensor are subnormal.

    Trained weights have next to none; bytes of another dtype read as this one have many. Codes of
    e4m3 are not judged, since a block with an outlier has many.
    """
    if t.subnormal > MANY_SUBNORMAL * t.count:
        share = percent(t.subnormal, t.count)
        text = f"{share} of its values are subnormal: another dtype's bytes?"
        yield Found(text, t.tensor, t.subnormal)


@rule(
    "warning",
    example="model.layers.2.mlp.experts.7.up_proj.weight_packed: the same bytes as "
    "model.layers.1.mlp.experts.3.up_proj.weight_packed",
)
def tensor_copy(c: Copy) -> Iterator[Found]:
    """Two tensors of the network have the same bytes.

    Trained tensors are never alike: a loop wrote one in the other's place.
    """
    yield Found(f"the same bytes as {c.of}", c.tensor)


@rule("warning", example="model.norm.weight: every gain is 1: the initial value, never loaded?")
def norm_initial(g: Gains) -> Iterator[Found]:
    """Every gain of a norm has one value.

    Norms are initialised to 1 and vary once trained: this one was never loaded.
    """
    w = g.values
    if _judged(w) and (w == w[0]).all():
        yield Found(f"every gain is {w[0]:g}: the initial value, never loaded?", g.tensor)


@rule(
    "warning",
    example="model.layers.2.post_attention_layernorm.weight: gains lie around 0 (median -0.0038): "
    "stored less 1, as x·(1 + w) wants?",
)
def norm_around_zero(g: Gains) -> Iterator[Found]:
    """The gains of a norm lie around 0 in place of 1.

    Some networks compute x·(1 + w) and store gains less 1; K2's computes x·w.
    """
    w = g.values
    if not _judged(w) or (w == w[0]).all():
        return
    if abs(np.median(w)) < AROUND_ZERO and 0.2 < np.mean(w < 0) < 0.8:
        text = f"gains lie around 0 (median {np.median(w):.2g}): stored less 1, as x·(1 + w) wants?"
        yield Found(text, g.tensor)


def _judged(w: np.ndarray) -> bool:
    """Return whether gains can be judged: enough, finite, and not all zero (another rule's)."""
    return len(w) >= FEW_GAINS and bool(np.isfinite(w).all()) and bool(w.any())
