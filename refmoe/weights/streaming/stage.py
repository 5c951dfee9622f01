"""Hold what every token uses: some of it stays in memory, the rest passes through two buffers."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from refmoe.model.decoder import LayerWeights
from refmoe.model.matrix import Matrix
from refmoe.weights.checkpoint import TensorEntry
from refmoe.weights.streaming.budget import Budget
from refmoe.weights.streaming.counters import Counters
from refmoe.weights.streaming.layout import Layout
from refmoe.weights.streaming.reader import SOON, URGENT, Reader, Ticket, allocate

STAYS = -1  # in place of a buffer's index: the item has memory of its own
Item = LayerWeights | Matrix  # a layer's always-active weights, or a tile of the head
Source = Callable[[TensorEntry], np.ndarray]  # a tensor → its bytes


class Stage:
    """The always-active weights: items in the order in which a token uses them.

    layouts  of the items
    make     turns an item's index and the source of its bytes into weights
    """

    def __init__(
        self,
        layouts: Sequence[Layout],
        budget: Budget,
        reader: Reader,
        counters: Counters,
        make: Callable[[int, Source], Item],
    ):
        self.layouts, self.budget = layouts, budget
        self.reader, self.counters, self.make = reader, counters, make
        self.resident: dict[int, np.ndarray] = {}  # item → its own memory
        self.buffers: list[np.ndarray] = []
        self.holds: list[int | None] = [None, None]  # which item is in each buffer
        self.tickets: dict[int, Ticket] = {}
        self.made: dict[tuple[int, int], Item] = {}  # item, buffer → the weights made of it
        self.current: int | None = None

    def get(self, i: int) -> Any:
        """Return item i, valid until another is asked for; meanwhile the next ones are read."""
        where = self._begin(i, URGENT)
        self.current = i
        self._read_ahead(i)
        ticket = self.tickets[i]
        if not ticket.done:
            self.reader.hurry(ticket)
        try:
            self.counters.stalled += ticket.wait()
        except BaseException:
            if ticket.done:  # it failed: another try reads it anew
                self._drop(i)
            raise
        return self._weights(i, where)

    def get_if_ready(self, i: int) -> Any:
        """Return item i if it is there already, or None."""
        ticket = self.tickets.get(i)
        if ticket is None or not ticket.done or ticket.error is not None:
            return None
        return self._weights(i, STAYS if i in self.resident else self.holds.index(i))

    def _weights(self, i: int, where: int) -> Item:
        if (i, where) not in self.made:
            memory = self.resident[i] if where == STAYS else self.buffers[where]
            self.made[i, where] = self.make(i, self.layouts[i].source(memory))
        return self.made[i, where]

    def _read_ahead(self, i: int) -> None:
        """Begin to read those of the next two that stay, and the next that passes."""
        n = len(self.layouts)
        following = [(i + k) % n for k in range(1, n)]
        near = following[:2]
        passing = [j for j in following if j not in self.budget.resident]
        for j in [j for j in near if j in self.budget.resident] + passing[:1]:
            if j not in self.tickets and j != self.current:
                self._begin(j, SOON)

    def _begin(self, i: int, urgency: int) -> int:
        """Read item i unless it is there or under way → its buffer's index, or `STAYS`."""
        stays = i in self.budget.resident
        if i in self.tickets:
            return STAYS if stays else self.holds.index(i)
        if stays:
            where, memory = STAYS, allocate(self.layouts[i].nbytes)
            self.resident[i] = memory
        else:
            if not self.buffers:
                self.buffers = [allocate(self.budget.buffer) for _ in range(2)]
            where = self._free_buffer()
            memory = self.buffers[where]
            self.holds[where] = i
        self.tickets[i] = self.reader.read(self.layouts[i].places(memory), urgency)
        self.counters.dense_bytes += self.layouts[i].needed
        return where

    def _free_buffer(self) -> int:
        """Return the index of a buffer that is not the current item's, emptied."""
        for where in (0, 1):
            if self.holds[where] is None:
                return where
        where = 1 if self.holds[0] == self.current else 0
        held = self.holds[where]
        assert held is not None
        ticket = self.tickets[held]
        self.counters.dense_bytes -= self.reader.cancel(ticket)
        ticket.event.wait()  # it was read ahead and then not asked for
        self._drop(held)
        return where

    def _drop(self, i: int) -> None:
        self.tickets.pop(i)
        if self.resident.pop(i, None) is not None:
            self.made.pop((i, STAYS), None)
        for where in (0, 1):
            if self.holds[where] == i:
                self.holds[where] = None
