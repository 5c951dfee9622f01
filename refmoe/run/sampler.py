"""Choose a token from logits: the likeliest, or drawn after temperature, top-p and min-p.

    p = softmax(logits / temperature)
    kept: the fewest most likely tokens whose p sum to top_p, and of these p ≥ min_p · max p

Both limits look at the same p, so their order does not matter. Equal logits: the lower id.
Sources: Holtzman et al., arXiv:1904.09751 (top-p); Nguyen et al., arXiv:2407.01082 (min-p).
Moonshot recommends temperature 0.6 for K2-Instruct, 1.0 for K2-Thinking and, with top-p 0.95,
for K2.5 and later.
"""

from dataclasses import dataclass

import numpy as np

from refmoe.files import InputError


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: temperature 0 is greedy; top_p 1 and min_p 0 keep every token.

    Raises `InputError` for numbers outside their ranges.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature = {self.temperature}, expected 0 or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p = {self.top_p}, expected above 0, at most 1")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min_p = {self.min_p}, expected 0 to 1")


def sample(logits: np.ndarray, how: Sampling, rng: "np.random.Generator | None") -> int:
    """Return a token id for logits [Z]; takes one draw from `rng`, which greedy does without."""
    if how.temperature == 0:
        return int(logits.argmax())
    assert rng is not None
    z = logits.astype(np.float64)
    p = np.exp((z - z.max()) / how.temperature)
    p /= p.sum()
    order = np.argsort(-p, kind="stable")  # most likely first
    ranked = p[order]
    before = np.cumsum(ranked) - ranked  # what the more likely ones sum to
    kept = (before < how.top_p) & (ranked >= how.min_p * ranked[0])
    kept[0] = True
    total = np.cumsum(ranked * kept)
    return int(order[np.searchsorted(total, rng.random() * total[-1], side="right")])
