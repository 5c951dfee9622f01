"""Points on the way from what is known to what is judged.

The oracle judges a point from the engine's tensors that it is made of (`model/points.py`); where
the dump lacks one, its own makers take its place, and the report says through which.
"""

from collections.abc import Collection

from refmoe.config import Config
from refmoe.model.points import parents


def through(path: str, known: Collection[str], order: Collection[str], cfg: Config) -> list[str]:
    """Return the points between the `known` ones and this one, in the `order` of computation."""
    found: set[str] = set()
    todo = list(parents(path, cfg))
    while todo:
        point = todo.pop()
        if point not in known and point in order and point not in found:
            found.add(point)
            todo += parents(point, cfg)
    return [p for p in order if p in found]
