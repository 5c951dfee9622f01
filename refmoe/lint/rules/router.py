"""Judge the routers."""

from collections.abc import Iterator

import numpy as np

from refmoe.lint.base import Found
from refmoe.lint.facts.router import (
    DRAWS,
    Gate,
    RouterBias,
    RouterBiases,
    count_ties,
    share_of_flips,
)
from refmoe.lint.registry import rule
from refmoe.model.matrix import round_bf16


@rule(
    "error",
    example="model.layers.2.mlp.gate.weight: row 4 is zero: expert 4 has no gate",
    reference="vllm-project/vllm#36190",
)
def router_constant_row(g: Gate) -> Iterator[Found]:
    """A row of the router is constant, so that its expert cannot be told from noise.

    A row that is all zero gives the logit 0 to every token. A matrix that is all zero is left to
    `tensor-zero`.
    """
    if not g.rows.any():
        return
    for e, row in enumerate(g.rows):
        if (row == row[0]).all():
            text = f"row {e} is {'zero' if row[0] == 0 else 'constant'}: expert {e} has no gate"
            yield Found(f"{text} (vllm-project/vllm#36190)", g.tensor)


@rule(
    "warning",
    example="model.layers.2.mlp.gate.weight: row 9 is row 4 again: two experts are always chosen "
    "alike",
)
def router_equal_rows(g: Gate) -> Iterator[Found]:
    """Two rows of the router are equal.

    Two experts then differ in their biases alone.
    """
    first: dict[bytes, int] = {}
    for e, row in enumerate(g.rows):
        if (row == row[0]).all():
            continue
        if (other := first.setdefault(row.tobytes(), e)) != e:
            text = f"row {e} is row {other} again: two experts are always chosen alike"
            yield Found(text, g.tensor)


@rule(
    "warning",
    example="model.layers.2.mlp.gate.e_score_correction_bias: stored as BF16, 7 distinct values "
    "for 384 experts; published is F32",
    reference="huggingface/transformers#42580, sgl-project/sglang#29783",
)
def router_bias_dtype(b: RouterBias) -> Iterator[Found]:
    """The router's bias is stored in 16 bits.

    It decides which experts are chosen. Rounded to bf16 it gives several experts the same bias
    and flips near ties, so that tokens go to other experts.
    """
    if b.dtype in ("BF16", "F16"):
        text = (
            f"stored as {b.dtype}, {len(np.unique(b.values))} distinct values for "
            f"{len(b.values)} experts; published is F32, and near ties flip in less "
            "(huggingface/transformers#42580)"
        )
        yield Found(text, b.tensor)


@rule(
    "note",
    example="model.layers.2.mlp.gate.e_score_correction_bias: in bf16 238 distinct values become "
    "8, 3,412 pairs of experts become equal, and 7.1% of tokens choose other experts",
    reference="huggingface/transformers#42580, sgl-project/sglang#31213",
)
def router_bias_rounding(every: RouterBiases) -> Iterator[Found]:
    """Estimate how many tokens choose other experts once the bias is rounded to bf16.

    Told of the layer where rounding hurts most, from logits drawn as if the directions of tokens
    were random.
    """

    def flips(b: RouterBias) -> float:
        rounded = round_bf16(b.values.astype(np.float32))
        return share_of_flips(every.checkpoint, b.layer, b.values, rounded)

    shares = [flips(b) for b in every.biases]
    worst = max(range(len(shares)), key=lambda i: shares[i])
    bias = every.biases[worst]
    rounded = round_bf16(bias.values.astype(np.float32))
    text = (
        f"in bf16 {len(np.unique(bias.values))} distinct values become "
        f"{len(np.unique(rounded))}, {count_ties(rounded) - count_ties(bias.values)} pairs of "
        f"experts become equal, and {shares[worst]:.1%} of tokens choose other experts, by "
        f"{DRAWS:,} draws of logits ~ N(0, |w_e|²); the worst of {len(shares)} layers. Engines "
        "must keep it in float32 (huggingface/transformers#42580, sgl-project/sglang#31213)"
    )
    yield Found(text, bias.tensor)
