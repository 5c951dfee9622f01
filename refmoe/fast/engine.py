"""The engine's own Numerics: the definition's mathematics with quicker operations.

Kernels take half a second to load, and ten to compile where nobody has used them yet. So they are
imported when the first product is asked for, and generation with a tiny model needs none of them
(fast/tiny.py).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

from refmoe.engines import Conventions
from refmoe.model.decoder import policy
from refmoe.model.numerics import Numerics


def engine(name: str, conventions: Conventions | str = "refmoe", fast: bool = False) -> Numerics:
    """Return `policy(name)` with the operations of fast/linear.py and fast/attention.py.

    With `fast`, products with INT4, Q4_0 and Q8_0 may take 16-bit activations: 2e-5 of a result.
    """
    nx = policy(name, conventions)
    linear = _on_use("refmoe.fast.linear", "linear")
    return replace(
        nx,
        linear=partial(linear, rounded=nx.conventions.rounded_products, fast=fast),
        gate=linear,
        experts=partial(_on_use("refmoe.fast.linear", "experts"), fast=fast),
        expanded=_on_use("refmoe.fast.attention", "expanded"),
        absorbed=_on_use("refmoe.fast.attention", "absorbed"),
    )


def _on_use(module: str, name: str) -> Callable[..., Any]:
    """Return a function whose module is imported when it is first called."""
    found: Callable[..., Any] | None = None

    def call(*args: Any, **options: Any) -> Any:
        nonlocal found
        if found is None:
            found = getattr(import_module(module), name)
        return found(*args, **options)

    return call
