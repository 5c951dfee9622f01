"""Hold routed experts in a fixed number of places: which is where, and which gives way.

A place is never given away while its expert is held: asked for, or handed out. Otherwise the one
goes that was not used for the longest time. But of the hottest experts, by use in this and earlier
runs, as many as fill three quarters of the arena, and leave room for three layers' choices, are
dropped only for each other.
"""

import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from refmoe.files import InputError, write_atomically
from refmoe.model.experts import MlpWeights
from refmoe.weights.checkpoint import Checkpoint
from refmoe.weights.streaming.counters import Counters
from refmoe.weights.streaming.layout import Layout, expert_tensors, lay_out
from refmoe.weights.streaming.reader import MAYBE, URGENT, Reader, Ticket, allocate, forget
from refmoe.weights.streaming.usage import read_usage, usage_file

FADING = 0.999  # what an expert's use is multiplied by from pass to pass: old use counts less
HOT = 0.75  # share of the places for the hottest experts; the rest serves those of the moment

Key = tuple[int, int]  # layer, expert


class Arena:
    """Places for routed experts of one checkpoint.

    slots, slot_bytes  how many places there are, and how large each is
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        slots: int,
        slot_bytes: int,
        reader: Reader,
        counters: Counters,
    ):
        self.checkpoint, self.reader, self.counters = checkpoint, reader, counters
        self.slots, self.slot_bytes = slots, slot_bytes
        self.memory = allocate(slots * slot_bytes)
        self.free = list(range(slots))
        self.slot_of: dict[Key, int] = {}
        self.tickets: dict[Key, Ticket] = {}
        self.layouts: dict[Key, Layout] = {}
        self.lru: OrderedDict[Key, None] = OrderedDict()  # longest unused first
        self.held: set[Key] = set()  # asked for or handed out
        self.guesses: dict[int, list[int]] = {}  # layer → experts
        self.hot: set[Key] = set()
        self.last_layer = -1  # of this pass through the layers
        use, cfg = read_usage(checkpoint), checkpoint.cfg
        nothing = np.zeros((cfg.num_hidden_layers, cfg.n_routed_experts), np.float32)
        self.use = nothing if use is None else use  # [layers, experts]

    @property
    def file(self) -> Path:
        """The file in which usage is kept for the next run."""
        return usage_file(self.checkpoint)

    def save_usage(self) -> None:
        """Keep how much experts were used for the next run; that it cannot be is no error."""
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with write_atomically(self.file) as part, part.open("wb") as f:
                np.save(f, self.use)
        except OSError:
            pass

    def note_choice(self, layer: int, chosen: Sequence[int]) -> None:
        """Count the use of a layer's chosen experts, and forget those wrongly guessed."""
        if layer <= self.last_layer:  # another pass begins
            self.use *= FADING
            self._find_hot()
        self.last_layer = layer
        self.use[layer, chosen] += 1
        guessed = self.guesses.pop(layer, None)
        if guessed is not None:
            self.counters.guessed += len(guessed)
            self.counters.guessed_right += len(set(guessed) & set(chosen))
            for e in set(guessed) - set(chosen):
                self._forget((layer, e))

    def _find_hot(self) -> None:
        count = min(int(HOT * self.slots), self.slots - 3 * self.checkpoint.cfg.num_experts_per_tok)
        if 0 < count < self.use.size:
            order = np.argpartition(self.use, -count, axis=None)[-count:]
            layers, experts = np.unravel_index(order, self.use.shape)
            self.hot = set(zip(layers.tolist(), experts.tolist(), strict=True))

    def ask(self, key: Key) -> bool:
        """Hold an expert, and read it unless it is there. Return False if no place is free now."""
        known = self.tickets.get(key)
        if known is not None and known.error is not None:  # a guess, called off or not readable
            known.event.wait()
            self.free.append(self._drop(key))
            known = None
        if known is not None:
            self.reader.hurry(known)
        elif self._read(key, URGENT):
            self.counters.missed += 1
        else:
            return False
        self.counters.asked += 1
        self.held.add(key)
        self.lru.move_to_end(key)
        return True

    def guess(self, layer: int, experts: Sequence[int]) -> None:
        """Read experts that may be needed next, when nothing else is to be read."""
        self.guesses[layer] = list(experts)
        for e in experts:
            if (layer, e) not in self.tickets and not self._read((layer, e), MAYBE):
                return

    def is_there(self, key: Key) -> bool:
        """Return whether an expert that is held has been read."""
        ticket = self.tickets[key]
        return ticket.done and ticket.error is None

    def wait(self, key: Key) -> None:
        """Wait until an expert that is held has been read. Raises `InputError` if it cannot be."""
        ticket = self.tickets[key]
        try:
            self.counters.stalled += ticket.wait()
        except BaseException:
            if ticket.done:  # it failed: another try reads it anew
                self.free.append(self._drop(key))
            raise

    def wait_for_room(self) -> None:
        """Wait until one of the guesses that threads are reading is there, and can give way."""
        under_way = [t for k, t in self.tickets.items() if k not in self.held and not t.done]
        if not under_way:
            raise RuntimeError("no place for an expert: batches are still in use")
        began = time.perf_counter()
        under_way[0].event.wait()
        self.counters.stalled += time.perf_counter() - began

    def matrices(self, key: Key) -> MlpWeights:
        """Return the matrices of an expert that is there; valid while it is held."""
        layer, e = key
        here = self.checkpoint.reading(self.layouts[key].source(self._place(key)))
        return here.mlp(f"model.layers.{layer}.mlp.experts.{e}.")

    def release(self, keys: Iterable[Key]) -> None:
        """Hold experts no longer: their places may be given away."""
        self.held.difference_update(keys)

    def measure_read_rate(self, nbytes: int) -> float:
        """Return the bytes a second at which experts, drawn at random, are read uncached."""
        rng, done, seconds = np.random.default_rng(0), 0, 0.0
        cfg = self.checkpoint.cfg
        moe = [i for i in range(cfg.num_hidden_layers) if cfg.is_moe(i)]
        together = max(1, self.slots // 2)
        before = replace(self.counters)
        while done < nbytes:
            layers = rng.choice(moe, together)
            experts = rng.integers(0, self.use.shape[1], together)
            keys = dict.fromkeys(zip(layers.tolist(), experts.tolist(), strict=True))
            new = [key for key in keys if key not in self.tickets]
            for key in new:
                for extent, _ in lay_out(expert_tensors(self.checkpoint, *key)).extents:
                    forget(extent.file, extent.start, extent.nbytes)
            began = time.perf_counter()
            for key in new:
                self.ask(key)
            for key in new:
                self.wait(key)
            seconds += time.perf_counter() - began
            done += sum(self.layouts[key].needed for key in new)
            self.release(new)
        self.counters.reset(before)
        return done / seconds

    def _read(self, key: Key, urgency: int) -> bool:
        """Begin to read an expert. Return False if there is no place for it."""
        slot = self._take_slot(urgency)
        if slot is None:
            return False
        there = lay_out(expert_tensors(self.checkpoint, *key))
        if there.nbytes > self.slot_bytes:
            raise InputError(
                f"expert {key[1]} of layer {key[0]} takes {there.nbytes} bytes, expert 0 of the "
                f"largest layer {self.slot_bytes}; experts of one layer are of one size"
            )
        self.slot_of[key], self.layouts[key] = slot, there
        self.tickets[key] = self.reader.read(there.places(self._place(key)), urgency)
        self.counters.expert_bytes += there.needed
        self.lru[key] = None
        return True

    def _take_slot(self, urgency: int) -> int | None:
        """Return a free place, or that of what was not used for the longest time, or None."""
        if self.free:
            return self.free.pop()
        hot = None
        for key in self.lru:
            if key in self.held or not self.tickets[key].done:
                continue
            if key not in self.hot:
                return self._drop(key)
            hot = hot or key
        if hot is not None and urgency == URGENT:
            return self._drop(hot)
        if urgency == URGENT:  # a guess that no thread has begun with
            for key in [k for k in self.lru if k not in self.held]:
                if self._forget(key):
                    return self.free.pop()
        return None

    def _forget(self, key: Key) -> bool:
        """Call a guess off, as far as it has not begun. Return whether its place is free."""
        ticket = self.tickets.get(key)
        if ticket is None or key in self.held:
            return False
        self.counters.expert_bytes -= self.reader.cancel(ticket)
        if not ticket.done or ticket.error is None:
            return False
        self.free.append(self._drop(key))
        return True

    def _drop(self, key: Key) -> int:
        """Forget an expert that is not held, and return its place."""
        del self.tickets[key], self.lru[key], self.layouts[key]
        return self.slot_of.pop(key)

    def _place(self, key: Key) -> np.ndarray:
        start = self.slot_of[key] * self.slot_bytes
        return self.memory[start : start + self.slot_bytes]
