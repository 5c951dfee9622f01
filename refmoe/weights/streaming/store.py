"""A checkpoint larger than memory, under a budget: `--ram BYTES`.

    the arena        places for routed experts, each as large as the largest one
    resident         layers' always-active weights and tiles of the head that stay, read once
    two buffers      the others of these, one in use while the next is read

Nothing is mapped but the embedding, of which a token touches one row. What one token uses always
(attention, shared experts, router, norms, head) is worth more of the budget than experts, which a
token uses with a chance of K/E, so it comes first; the rest is the arena. Where everything fits, or
the files lie in memory already (tmpfs, DAX), nothing of this is needed and `store` gives None.

Experts of a layer are asked for all at once and come in batches (`model/experts.py`, `Experts`): a
place is never given away while it is lent or waited for. Which to drop: the one not used for the
longest time; but of the hottest experts, by use in this and earlier runs, as many as fill three
quarters of the arena, and leave room for three layers' choices, are only dropped for each other.
Earlier runs' use is kept in

    $XDG_CACHE_HOME/refmoe/usage/KEY.npy             KEY: of config.json, names, sizes and times

The next layer's experts are guessed: its router applied to this layer's input to the mixture,
renormed. Guesses are read when nothing else is to be read, and forgotten if they prove wrong before
they begin. Guessing by the next router: Eliseev and Mazur, arXiv:2312.17238, section 3.2.

Bits are those of the mapped checkpoint: the same kernels get the same bytes. Only a float32 head
of a prompt's many rows is an exception: BLAS adds differently for other numbers of rows.
"""

import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from refmoe.config import Config
from refmoe.files import InputError, write_atomically
from refmoe.model.decoder import Decoder, LayerWeights
from refmoe.model.experts import MlpWeights, MoeWeights
from refmoe.model.formats.tiled import Tiled
from refmoe.model.matrix import Matrix, dequantize
from refmoe.model.numerics import Numerics
from refmoe.model.router import route
from refmoe.weights.checkpoint import Checkpoint, TensorEntry, advise
from refmoe.weights.streaming import reader
from refmoe.weights.streaming.budget import (
    FEW,
    Layout,
    _by_layer,
    _head_tiles,
    _size,
    _slot,
    divide,
    expert_tensors,
    layout,
    least,
)
from refmoe.weights.streaming.reader import MAYBE, SOON, URGENT, Reader, Ticket
from refmoe.weights.streaming.usage import usage, usage_file

FADING = 0.999  # of an expert's use, from pass to pass
HOT = 0.75  # of the arena


@dataclass
class Counters:
    """What happened since the model was opened, or since `reset`."""

    asked: int = 0  # experts
    missed: int = 0  # of these, had to be read when asked for
    guessed: int = 0  # for a layer whose choice became known
    guessed_right: int = 0
    expert_bytes: int = 0  # read, wrong guesses included
    dense_bytes: int = 0
    stalled: float = 0.0  # seconds that computing waited for reads

    @property
    def bytes_read(self) -> int:
        return self.expert_bytes + self.dense_bytes

    @property
    def hit_rate(self) -> float | None:
        return 1 - self.missed / self.asked if self.asked else None

    @property
    def guess_rate(self) -> float | None:
        return self.guessed_right / self.guessed if self.guessed else None


class Store:
    """Weights of a checkpoint within `ram` bytes; `decoder(nx)` computes with them."""

    def __init__(
        self, checkpoint: Checkpoint, ram: int, way: str | None = None, threads: int | None = None
    ):
        self.checkpoint, self.ram, self.counters = checkpoint, ram, Counters()
        self.layers = _by_layer(checkpoint)
        self.tiles = _head_tiles(checkpoint)
        items = [layout(tensors) for tensors in (*self.layers, *self.tiles)]
        cfg = checkpoint.cfg
        moe = [i for i in range(cfg.num_hidden_layers) if cfg.is_moe(i)]
        self.slot = max((_slot(expert_tensors(checkpoint, i, 0)) for i in moe), default=0)
        sizes = [item.nbytes for item in items]
        chosen = cfg.num_experts_per_tok
        self.least = least(sizes, self.slot, chosen)
        self.budget = divide(sizes, self.slot, len(moe) * cfg.n_routed_experts, chosen, ram)
        largest = max({t.file for t in checkpoint.tensors.values()}, key=_size)
        self.reader = Reader(way or reader.choose(largest)[0], threads or reader.THREADS)
        self.stage = _Stage(self, items)
        self.arena = _Arena(self, moe)
        self.numerics: Numerics | None = None  # that guesses are made in
        self.maps: list[np.memmap] = []  # of the embedding

    def decoder(self, nx: Numerics) -> Decoder:
        """The network; its layers and experts are read when they are asked for."""
        if self.checkpoint.missing:
            return self.checkpoint.decoder(nx)  # which says what is missing
        self.numerics = nx.watching(None)
        return Decoder(
            self.checkpoint.cfg,
            nx,
            self.embedding,
            _Layers(self),
            [_LayerExperts(self, i) for i in range(len(self.layers))],
            self.checkpoint.reading(_copied).matrix("model.norm"),
            self.head,
        )

    @cached_property
    def embedding(self) -> Matrix:
        """Mapped, without what a system reads ahead."""

        def source(t: TensorEntry) -> np.ndarray:
            file = np.memmap(t.file, np.uint8, "r")
            self.maps.append(file)
            advise(file, "MADV_RANDOM")
            return np.asarray(file[t.start : t.start + t.nbytes])

        return self.checkpoint.reading(source).matrix("model.embed_tokens")

    @property
    def head(self) -> Matrix:
        first = len(self.layers)
        cfg = self.checkpoint.cfg

        def tiles() -> Iterator[tuple[slice, Matrix]]:
            start = 0
            for n in range(len(self.tiles)):
                tile = self.stage.get(first + n)
                yield slice(start, start + tile.shape[0]), tile
                start += tile.shape[0]

        nbytes = sum(t.nbytes for tile in self.tiles for t in tile)
        return Tiled((cfg.vocab_size, cfg.hidden_size), nbytes, tiles)

    def let_go(self) -> None:
        """Rows of the embedding that were touched need not stay."""
        for file in self.maps:
            advise(file, "MADV_DONTNEED")

    def read_rate(self, nbytes: int) -> float:
        """Bytes a second at which experts are read, drawn at random, with nothing else going on."""
        return self.arena.read_rate(nbytes)

    def reset(self) -> None:
        """Count anew."""
        self.counters = Counters()

    def close(self) -> None:
        """Keep the statistics, and let the threads go. Its weights can no longer be used."""
        self.arena.save()
        self.reader.close()


def facts(store: Store) -> dict[str, Any]:
    """For programs: what was read, how much of it was there, and how long computing waited."""
    c = store.counters
    return {
        "budget": store.ram,
        "asked": c.asked,
        "hit_rate": c.hit_rate,
        "guess_rate": c.guess_rate,
        "expert_bytes": c.expert_bytes,
        "dense_bytes": c.dense_bytes,
        "stalled_s": c.stalled,
        "reads": store.reader.way,
        "max_rss": reader.high_water(),
    }


def line(store: Store) -> str:
    """The same for people."""
    c = store.counters
    parts = [f"{c.bytes_read / 1e9:.2f} GB read ({c.dense_bytes / 1e9:.2f} always-active)"]
    if c.hit_rate is not None:
        parts.append(f"{c.hit_rate:.1%} of {c.asked} experts there when asked for")
    if c.guess_rate is not None:
        parts.append(f"{c.guess_rate:.1%} of guesses right")
    parts.append(f"waited {c.stalled:.2f} s")
    parts.append(f"at most {reader.high_water() / 1e9:.2f} GB resident")
    return f"[{', '.join(parts)}]"


def store(checkpoint: Checkpoint, ram: int | None, way: str | None = None) -> Store | None:
    """A `Store` where one is needed: None without a budget, where all fits, or lies in memory.

    way: of reading, direct or cached; None: the quicker one.
    """
    if ram is None:
        return None
    if sum(t.nbytes for t in checkpoint.tensors.values()) <= ram:
        return None
    if all(reader.in_memory(f) for f in {t.file for t in checkpoint.tensors.values()}):
        return None
    return Store(checkpoint, ram, way)


def _copied(t: TensorEntry) -> np.ndarray:
    with t.file.open("rb") as f:
        f.seek(t.start)
        return np.frombuffer(f.read(t.nbytes), np.uint8)


class _Stage:
    """The always-active weights: items in the order of use, some resident, the others in turn."""

    def __init__(self, store: Store, items: list[Layout]):
        self.store, self.items = store, items
        self.resident: dict[int, np.ndarray] = {}
        self.buffers: list[np.ndarray] = []
        self.holds: list[int | None] = [None, None]
        self.tickets: dict[int, Ticket] = {}
        self.made: dict[tuple[int, int], Any] = {}  # item, buffer → what stands in it
        self.current: int | None = None

    def get(self, i: int) -> Any:
        """The item, until another is asked for; what comes after it is read meanwhile."""
        where = self._begin(i, URGENT)
        self.current = i
        self._ahead(i)
        ticket = self.tickets[i]
        if not ticket.done:
            self.store.reader.hurry(ticket)
        try:
            self.store.counters.stalled += ticket.wait()
        except BaseException:
            if ticket.done:  # it failed: another try reads it anew
                self._drop(i)
            raise
        return self._made(i, where)

    def ready(self, i: int) -> Any:
        """The item if it is there already."""
        ticket = self.tickets.get(i)
        if ticket is None or not ticket.done or ticket.error is not None:
            return None
        where = -1 if i in self.resident else self.holds.index(i)
        return self._made(i, where)

    def _made(self, i: int, where: int) -> Any:
        if (i, where) not in self.made:
            self.made[i, where] = self._make(i, where)
        return self.made[i, where]

    def _ahead(self, i: int) -> None:
        n = len(self.items)
        following = [(i + k) % n for k in range(1, n)]
        near = following[:2]
        passing = [j for j in following if j not in self.store.budget.resident]
        for j in [j for j in near if j in self.store.budget.resident] + passing[:1]:
            if j not in self.tickets and j != self.current:
                self._begin(j, SOON)

    def _begin(self, i: int, urgency: int) -> int:
        """Reading it, unless it is there or under way → its buffer, -1 where it stays."""
        stays = i in self.store.budget.resident
        if i in self.tickets:
            return -1 if stays else self.holds.index(i)
        size = self.items[i].nbytes
        if stays:
            where, memory = -1, reader.arena(size)
            self.resident[i] = memory
        else:
            if not self.buffers:
                self.buffers = [reader.arena(self.store.budget.buffer) for _ in range(2)]
            where = self._free()
            memory = self.buffers[where]
            self.holds[where] = i
        places = [(e, memory[at : at + e.nbytes]) for e, at in self.items[i].extents]
        self.tickets[i] = self.store.reader.read(places, urgency)
        self.store.counters.dense_bytes += sum(e.needed for e, _ in self.items[i].extents)
        return where

    def _free(self) -> int:
        """A buffer that nothing uses: not the current item's."""
        for where in (0, 1):
            held = self.holds[where]
            if held is None:
                return where
        where = 1 if self.holds[0] == self.current else 0
        held = self.holds[where]
        assert held is not None
        ticket = self.tickets[held]
        self.store.counters.dense_bytes -= self.store.reader.cancel(ticket)
        ticket.event.wait()  # it was read ahead and then not asked for
        self._drop(held)
        return where

    def _drop(self, i: int) -> None:
        self.tickets.pop(i)
        if self.resident.pop(i, None) is not None:
            self.made.pop((i, -1), None)
        for where in (0, 1):
            if self.holds[where] == i:
                self.holds[where] = None

    def _make(self, i: int, where: int) -> Any:
        memory = self.resident[i] if where < 0 else self.buffers[where]
        here = self.store.checkpoint.reading(_from(memory, self.items[i]))
        layers = len(self.store.layers)
        if i < layers:
            return here.layer(i)
        tile = self.store.tiles[i - layers]
        if len(tile) == 1:
            here.tensors = {"lm_head.weight": tile[0]}
        return here.matrix("lm_head")


def _from(memory: np.ndarray, there: Layout) -> Any:
    """Where `layout` put a tensor's bytes; read-only, as mapped ones are."""
    fixed = memory.view()
    fixed.flags.writeable = False

    def source(t: TensorEntry) -> np.ndarray:
        at = there.at[t.file, t.start]
        return fixed[at : at + t.nbytes]

    return source


Key = tuple[int, int]  # layer, expert


class _Arena:
    """Places for experts, and who has which."""

    def __init__(self, store: Store, moe: Sequence[int]):
        self.store, self.moe = store, list(moe)
        self.memory = reader.arena(store.budget.slots * store.slot)
        self.free = list(range(store.budget.slots))
        self.slots: dict[Key, int] = {}
        self.tickets: dict[Key, Ticket] = {}
        self.layouts: dict[Key, Layout] = {}
        self.lru: OrderedDict[Key, None] = OrderedDict()  # longest unused first
        self.held: set[Key] = set()  # asked for or lent
        self.guesses: dict[int, list[int]] = {}  # layer → experts
        self.hot: set[Key] = set()
        self.pass_over = -1
        cfg = store.checkpoint.cfg
        self.use = np.zeros((cfg.num_hidden_layers, cfg.n_routed_experts), np.float32)
        self._load()

    @property
    def file(self) -> Path:
        return usage_file(self.store.checkpoint)

    def _load(self) -> None:
        use = usage(self.store.checkpoint)
        if use is not None:
            self.use = use

    def save(self) -> None:
        """For the next run; not worth an error."""
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with write_atomically(self.file) as part, part.open("wb") as f:
                np.save(f, self.use)
        except OSError:
            pass

    def begin(self, layer: int, chosen: Sequence[int]) -> None:
        """The choice of a layer is known."""
        counters = self.store.counters
        if layer <= self.pass_over:
            self.use *= FADING
            self._find_hot()
        self.pass_over = layer
        self.use[layer, chosen] += 1
        guessed = self.guesses.pop(layer, None)
        if guessed is not None:
            counters.guessed += len(guessed)
            counters.guessed_right += len(set(guessed) & set(chosen))
            for e in set(guessed) - set(chosen):
                self._forget((layer, e))

    def _find_hot(self) -> None:
        slots = self.store.budget.slots
        count = min(int(HOT * slots), slots - 3 * self.store.checkpoint.cfg.num_experts_per_tok)
        if 0 < count < self.use.size:
            order = np.argpartition(self.use, -count, axis=None)[-count:]
            layers, experts = np.unravel_index(order, self.use.shape)
            self.hot = set(zip(layers.tolist(), experts.tolist(), strict=True))

    def ask(self, key: Key) -> bool:
        """Have it read, unless it is there; hold it. False where there is no place now."""
        counters = self.store.counters
        known = self.tickets.get(key)
        if known is not None and known.error is not None:  # a guess, called off or not readable
            known.event.wait()
            self.free.append(self._drop(key))
            known = None
        if known is not None:
            self.store.reader.hurry(known)
        elif self._read(key, URGENT):
            counters.missed += 1
        else:
            return False
        counters.asked += 1
        self.held.add(key)
        self.lru.move_to_end(key)
        return True

    def guess(self, layer: int, experts: Sequence[int]) -> None:
        """These may be needed next."""
        self.guesses[layer] = list(experts)
        for e in experts:
            if (layer, e) not in self.tickets and not self._read((layer, e), MAYBE):
                return

    def read_rate(self, nbytes: int) -> float:
        rng, done, seconds = np.random.default_rng(0), 0, 0.0
        together = max(1, self.store.budget.slots // 2)
        before = replace(self.store.counters)
        while done < nbytes:
            layers, experts = (
                rng.choice(self.moe, together),
                rng.integers(0, self.use.shape[1], together),
            )
            keys = dict.fromkeys(zip(layers.tolist(), experts.tolist(), strict=True))
            new = [key for key in keys if key not in self.tickets]
            for key in new:
                for extent, _ in layout(expert_tensors(self.store.checkpoint, *key)).extents:
                    reader.forget(extent.file, extent.start, extent.nbytes)
            began = time.perf_counter()
            for key in new:
                self.ask(key)
            for key in new:
                self.wait(key)
            seconds += time.perf_counter() - began
            done += sum(e.needed for key in new for e, _ in self.layouts[key].extents)
            self.release(new)
        self.store.counters = before
        return done / seconds

    def matrices(self, key: Key) -> MlpWeights:
        layer, e = key
        here = self.store.checkpoint.reading(_from(self._place(key), self.layouts[key]))
        return here.mlp(f"model.layers.{layer}.mlp.experts.{e}.")

    def there(self, key: Key) -> bool:
        ticket = self.tickets[key]
        return ticket.done and ticket.error is None

    def wait(self, key: Key) -> None:
        ticket = self.tickets[key]
        try:
            self.store.counters.stalled += ticket.wait()
        except BaseException:
            if ticket.done:  # it failed: another try reads it anew
                self.free.append(self._drop(key))
            raise

    def wait_for_room(self) -> None:
        """Guesses that threads are reading hold every place: until one is read."""
        under_way = [t for k, t in self.tickets.items() if k not in self.held and not t.done]
        if not under_way:
            raise RuntimeError("no place for an expert: loans are still under way")
        began = time.perf_counter()
        under_way[0].event.wait()
        self.store.counters.stalled += time.perf_counter() - began

    def release(self, keys: Iterable[Key]) -> None:
        self.held.difference_update(keys)

    def _read(self, key: Key, urgency: int) -> bool:
        slot = self._slot(urgency)
        if slot is None:
            return False
        there = layout(expert_tensors(self.store.checkpoint, *key))
        if there.nbytes > self.store.slot:
            raise InputError(
                f"expert {key[1]} of layer {key[0]} takes {there.nbytes} bytes, expert 0 of the "
                f"largest layer {self.store.slot}; experts of one layer are of one size"
            )
        self.slots[key], self.layouts[key] = slot, there
        memory = self._place(key)
        places = [(e, memory[at : at + e.nbytes]) for e, at in there.extents]
        self.tickets[key] = self.store.reader.read(places, urgency)
        self.store.counters.expert_bytes += sum(e.needed for e, _ in there.extents)
        self.lru[key] = None
        return True

    def _slot(self, urgency: int) -> int | None:
        """A free place, or that of what was not used for the longest time."""
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
        """Call a read off, as far as it has not begun; whether its place is free."""
        ticket = self.tickets.get(key)
        if ticket is None or key in self.held:
            return False
        self.store.counters.expert_bytes -= self.store.reader.cancel(ticket)
        if not ticket.done or ticket.error is None:
            return False
        self.free.append(self._drop(key))
        return True

    def _drop(self, key: Key) -> int:
        del self.tickets[key], self.lru[key], self.layouts[key]
        return self.slots.pop(key)

    def _place(self, key: Key) -> np.ndarray:
        start = self.slots[key] * self.store.slot
        return self.memory[start : start + self.store.slot]


class _Layers(Sequence[LayerWeights]):
    """The decoder's layers; each is valid until another is asked for."""

    def __init__(self, store: Store):
        self.store = store

    def __len__(self) -> int:
        return len(self.store.layers)

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < len(self):
            raise IndexError(i)
        if i == 0:
            self.store.let_go()
        return self.store.stage.get(i)


class _LayerExperts:
    """One layer's `Experts`, read from files into the arena."""

    streamed = True

    def __init__(self, store: Store, layer: int):
        self.store, self.layer = store, layer

    def __call__(self, e: int) -> MlpWeights:
        arena, key = self.store.arena, (self.layer, e)
        arena.begin(self.layer, [e])
        while not arena.ask(key):
            arena.wait_for_room()
        try:
            arena.wait(key)
            return arena.matrices(key)
        finally:
            arena.release([key])  # a place is taken only by the next that is asked for

    def batches(self, chosen: Sequence[int], x: np.ndarray) -> Iterator[dict[int, MlpWeights]]:
        arena, i = self.store.arena, self.layer
        arena.begin(i, chosen)
        todo = list(reversed(chosen))
        asked: list[int] = []
        most = max(1, self.store.budget.slots // 2)
        guessed = False
        try:
            while todo or asked:
                while todo and arena.ask((i, todo[-1])):
                    asked.append(todo.pop())
                if not todo and not guessed:
                    guessed = True
                    self._guess(x)
                if not asked:
                    arena.wait_for_room()
                    continue
                arena.wait((i, asked[0]))
                lent = [e for n, e in enumerate(asked[:most]) if self._prefix(asked, n)]
                asked = asked[len(lent) :]
                try:
                    yield {e: arena.matrices((i, e)) for e in lent}
                finally:
                    arena.release((i, e) for e in lent)
        finally:
            arena.release((i, e) for e in asked)

    def _prefix(self, asked: Sequence[int], n: int) -> bool:
        return all(self.store.arena.there((self.layer, e)) for e in asked[: n + 1])

    def _guess(self, x: np.ndarray) -> None:
        """The next layer's choice, from this layer's input to its mixture, renormed."""
        store, nx, following = self.store, self.store.numerics, self.layer + 1
        cfg: Config = store.checkpoint.cfg
        if nx is None or len(x) > FEW or following >= cfg.num_hidden_layers:
            return
        here, there = store.stage.ready(self.layer), store.stage.ready(following)
        if here is None or there is None or not isinstance(there.mlp, MoeWeights):
            return
        norms = [dequantize(w.post_attention_layernorm, nx.dtype) for w in (here, there)]
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            h = np.nan_to_num(x / norms[0] * norms[1])
        routing = route(h, there.mlp.gate, cfg, replace(nx, stop_at_nonfinite=False))
        store.arena.guess(following, np.unique(routing.experts).tolist())
