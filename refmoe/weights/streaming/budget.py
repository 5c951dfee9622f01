"""Divide a budget of bytes between weights that stay and weights that are read in turn.

The items are what every token uses: each layer's always-active weights, and each tile of the head.
Some stay in memory; the others pass through two buffers, one in use while the next is read. What
is left is the arena, which holds routed experts.
"""

from collections.abc import Sequence
from typing import NamedTuple

from refmoe.files import InputError


class Budget(NamedTuple):
    """How the bytes are divided."""

    resident: frozenset[int]  # the items that stay, by their index
    buffer: int  # bytes of each of the two buffers
    slots: int  # places for experts


def least(items: Sequence[int], expert: int, chosen: int) -> int:
    """Return the smallest budget that works, in bytes.

    It holds a layer's choice of experts, and either all items or, beside those that stay, two of
    the largest of the others.
    """
    return min(_always_bytes(items, n) for n in range(len(items) + 1)) + chosen * expert


def divide(items: Sequence[int], expert: int, experts: int, chosen: int, ram: int) -> Budget:
    """Divide `ram` bytes.

    items    bytes of each item
    expert   bytes of the largest routed expert, of which there are `experts` in all
    chosen   routed experts that a token takes in a layer

    Raises `InputError`, which says how much is needed, for a budget that is too small.
    """
    if not experts:
        expert = chosen = 0
    smallest = least(items, expert, chosen)
    if ram < smallest:
        raise InputError(
            f"a budget of {ram / 1e9:.2f} GB is too small: {smallest / 1e9:.2f} GB are needed, "
            f"{chosen * expert / 1e9:.2f} GB of them for the {chosen} experts that one token "
            "chooses in a layer"
        )
    fits = [n for n in range(len(items) + 1) if _always_bytes(items, n) + chosen * expert <= ram]
    roomy = [n for n in fits if _always_bytes(items, n) + 2 * chosen * expert <= ram]
    stay = max(roomy or fits)
    largest_first = sorted(range(len(items)), key=lambda i: -items[i])
    rest = [items[i] for i in largest_first[stay:]]
    slots = (ram - _always_bytes(items, stay)) // expert if expert else 0
    return Budget(frozenset(largest_first[:stay]), max(rest, default=0), min(slots, experts))


def _always_bytes(items: Sequence[int], stay: int) -> int:
    """Return the bytes that the items take if the largest `stay` of them stay in memory."""
    sizes = sorted(items, reverse=True)
    return sum(sizes[:stay]) + (2 * sizes[stay] if stay < len(sizes) else 0)
