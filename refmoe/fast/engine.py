"""The engine's own Numerics: the definition's mathematics with quicker seams."""

from dataclasses import replace
from functools import partial

from refmoe.engines import Conventions
from refmoe.fast.attention import absorbed, expanded
from refmoe.fast.linear import experts, linear
from refmoe.model.decoder import policy
from refmoe.model.numerics import Numerics


def engine(name: str, conventions: Conventions | str = "refmoe", fast: bool = False) -> Numerics:
    """`policy(name)` with this room's seams."""
    nx = policy(name, conventions)
    rounded = nx.conventions.rounded_products
    return replace(
        nx,
        linear=partial(linear, rounded=rounded, fast=fast),
        experts=partial(experts, fast=fast),
        gate=linear,
        expanded=expanded,
        absorbed=absorbed,
    )
