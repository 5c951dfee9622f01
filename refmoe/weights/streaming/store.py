"""Compute with a checkpoint larger than memory, under a budget: `--ram BYTES`.

    arena          places for routed experts, each as large as the largest one
    resident       layers' always-active weights and tiles of the head that stay, read once
    two buffers    the others of these, one in use while the next is read

Nothing is mapped but the embedding, of which a token touches one row. What every token uses
(attention, shared experts, router, norms, head) is worth more of the budget than experts, which a
token uses with a chance of K/E, so it comes first; the rest is the arena. Where everything fits, or
the files lie in memory already (tmpfs, DAX), nothing of this is needed and `open_store` gives None.

Experts of a layer are asked for all at once and come in batches (`model/experts.py`, `Experts`);
which give way to which is told in `arena.py`. How much each was used is kept for the next run in

    $XDG_CACHE_HOME/refmoe/usage/KEY.npy             KEY: of config.json, names, sizes and times

The next layer's experts are guessed: its router is applied to this layer's input to the mixture,
renormed. Guesses are read when nothing else is to be read, and forgotten if they prove wrong before
they begin. Guessing by the next router: Eliseev and Mazur, arXiv:2312.17238, section 3.2.

Bits are those of the mapped checkpoint: the same kernels get the same bytes. Only a float32 head
of a prompt's many rows is an exception: BLAS adds differently for other numbers of rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from refmoe.config import Config
from refmoe.model.decoder import Decoder, LayerWeights
from refmoe.model.experts import MlpWeights, MoeWeights
from refmoe.model.formats.tiled import Tiled
from refmoe.model.matrix import Matrix, dequantize
from refmoe.model.numerics import Numerics
from refmoe.model.router import route
from refmoe.weights.checkpoint import Checkpoint, TensorEntry, advise
from refmoe.weights.streaming import reader
from refmoe.weights.streaming.arena import Arena
from refmoe.weights.streaming.budget import divide, least
from refmoe.weights.streaming.counters import Counters
from refmoe.weights.streaming.layout import head_tiles, largest_expert, lay_out, tensors_by_layer
from refmoe.weights.streaming.reader import Reader
from refmoe.weights.streaming.stage import Item, Source, Stage

FEW = 4  # tokens; with more, most experts of the next layer are chosen anyway: nothing to guess


class Store:
    """Weights of a checkpoint within `ram` bytes; `decoder(nx)` computes with them.

    way      of reading: direct or cached; None: the quicker one, which is measured
    threads  that read; None: `reader.THREADS`

    Raises `InputError` for a budget that is too small.
    """

    def __init__(
        self, checkpoint: Checkpoint, ram: int, way: str | None = None, threads: int | None = None
    ):
        self.checkpoint, self.ram, self.counters = checkpoint, ram, Counters()
        self.layers, self.tiles = tensors_by_layer(checkpoint), head_tiles(checkpoint)
        layouts = [lay_out(tensors) for tensors in (*self.layers, *self.tiles)]
        sizes = [there.nbytes for there in layouts]
        cfg = checkpoint.cfg
        experts = cfg.n_routed_experts * sum(map(cfg.is_moe, range(cfg.num_hidden_layers)))
        self.slot = largest_expert(checkpoint)
        self.least = least(sizes, self.slot, cfg.num_experts_per_tok)
        self.budget = divide(sizes, self.slot, experts, cfg.num_experts_per_tok, ram)
        largest = max({t.file for t in checkpoint.tensors.values()}, key=_file_size)
        self.reader = Reader(way or reader.choose_way(largest)[0], threads or reader.THREADS)
        self.stage = Stage(layouts, self.budget, self.reader, self.counters, self._make_item)
        self.arena = Arena(checkpoint, self.budget.slots, self.slot, self.reader, self.counters)
        self.numerics: Numerics | None = None  # that guesses are made in
        self.maps: list[np.memmap] = []  # of the embedding

    def decoder(self, nx: Numerics) -> Decoder:
        """Return the network; its layers and experts are read when they are asked for.

        Raises `InputError` if tensors are missing.
        """
        if self.checkpoint.missing:
            return self.checkpoint.decoder(nx)  # which says what is missing
        self.numerics = nx.watching(None)
        return Decoder(
            self.checkpoint.cfg,
            nx,
            self.embedding,
            StreamedLayers(self),
            [StreamedExperts(self, i) for i in range(len(self.layers))],
            self.checkpoint.reading(_read_tensor).matrix("model.norm"),
            self.head,
        )

    @cached_property
    def embedding(self) -> Matrix:
        """The embedding, mapped, without what a system reads ahead."""

        def source(t: TensorEntry) -> np.ndarray:
            file = np.memmap(t.file, np.uint8, "r")
            self.maps.append(file)
            advise(file, "MADV_RANDOM")
            return np.asarray(file[t.start : t.start + t.nbytes])

        return self.checkpoint.reading(source).matrix("model.embed_tokens")

    @property
    def head(self) -> Matrix:
        """The head, which is read tile by tile."""
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

    def _make_item(self, i: int, source: Source) -> Item:
        """Return the weights of the stage's item i: a layer, or a tile of the head."""
        here = self.checkpoint.reading(source)
        if i < len(self.layers):
            return here.layer(i)
        tile = self.tiles[i - len(self.layers)]
        if len(tile) == 1:
            here.tensors = {"lm_head.weight": tile[0]}
        return here.matrix("lm_head")

    def let_go(self) -> None:
        """Let the system drop the rows of the embedding that were touched."""
        for file in self.maps:
            advise(file, "MADV_DONTNEED")

    def reset(self) -> None:
        """Count anew."""
        self.counters.reset()

    def close(self) -> None:
        """Keep the usage of experts, and end the threads. The weights can no longer be used."""
        self.arena.save_usage()
        self.reader.close()


def open_store(checkpoint: Checkpoint, ram: int, way: str | None = None) -> Store | None:
    """Return a `Store`, or None where all fits into `ram` bytes, or lies in memory already.

    way  of reading, direct or cached; None: the quicker one
    """
    if sum(t.nbytes for t in checkpoint.tensors.values()) <= ram:
        return None
    if all(reader.in_memory(f) for f in {t.file for t in checkpoint.tensors.values()}):
        return None
    return Store(checkpoint, ram, way)


def describe_store(store: Store) -> dict[str, Any]:
    """Return, for programs, what was read, how much of it was there, and the time waited."""
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


def format_store(store: Store) -> str:
    """Return a line for people: what was read, how much of it was there, and the time waited."""
    c = store.counters
    parts = [f"{c.bytes_read / 1e9:.2f} GB read ({c.dense_bytes / 1e9:.2f} always-active)"]
    if c.hit_rate is not None:
        parts.append(f"{c.hit_rate:.1%} of {c.asked} experts there when asked for")
    if c.guess_rate is not None:
        parts.append(f"{c.guess_rate:.1%} of guesses right")
    parts.append(f"waited {c.stalled:.2f} s")
    parts.append(f"at most {reader.high_water() / 1e9:.2f} GB resident")
    return f"[{', '.join(parts)}]"


class StreamedLayers(Sequence[LayerWeights]):
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


class StreamedExperts:
    """One layer's `Experts`, read from files into the arena."""

    streamed = True

    def __init__(self, store: Store, layer: int):
        self.store, self.layer = store, layer

    def __call__(self, e: int) -> MlpWeights:
        """Return the matrices of expert e, valid until another is asked for."""
        arena, key = self.store.arena, (self.layer, e)
        arena.note_choice(self.layer, [e])
        while not arena.ask(key):
            arena.wait_for_room()
        try:
            arena.wait(key)
            return arena.matrices(key)
        finally:
            arena.release([key])  # a place is taken only by the next that is asked for

    def batches(self, chosen: Sequence[int], x: np.ndarray) -> Iterator[dict[int, MlpWeights]]:
        """Yield the chosen experts in order, as many at a time as have been read.

        A batch is valid until the next is asked for. The next layer's choice is guessed from
        x [T, D], if it has few rows, while these are computed.
        """
        arena, i = self.store.arena, self.layer
        arena.note_choice(i, chosen)
        todo = list(reversed(chosen))
        asked: list[int] = []
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
                count = self._count_ready(asked)
                batch, asked = asked[:count], asked[count:]
                try:
                    yield {e: arena.matrices((i, e)) for e in batch}
                finally:
                    arena.release((i, e) for e in batch)
        finally:
            arena.release((i, e) for e in asked)

    def _count_ready(self, asked: Sequence[int]) -> int:
        """Return how many of the experts asked for, the first of which is there, make a batch.

        They are the first ones up to one that is not there, and take half of the places at most.
        Each is looked at once: reads end at any moment, and one that was passed over must not be
        followed by one that has come in since.
        """
        most = max(1, self.store.budget.slots // 2)
        count = 1
        while count < min(most, len(asked)) and self.store.arena.is_there(
            (self.layer, asked[count])
        ):
            count += 1
        return count

    def _guess(self, x: np.ndarray) -> None:
        """Guess the next layer's choice from this layer's input to its mixture, renormed."""
        store, nx, following = self.store, self.store.numerics, self.layer + 1
        cfg: Config = store.checkpoint.cfg
        if nx is None or len(x) > FEW or following >= cfg.num_hidden_layers:
            return
        here, there = store.stage.get_if_ready(self.layer), store.stage.get_if_ready(following)
        if here is None or there is None or not isinstance(there.mlp, MoeWeights):
            return
        norms = [dequantize(w.post_attention_layernorm, nx.dtype) for w in (here, there)]
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            h = np.nan_to_num(x / norms[0] * norms[1])
        routing = route(h, there.mlp.gate, cfg, replace(nx, stop_at_nonfinite=False))
        store.arena.guess(following, np.unique(routing.experts).tolist())


def _read_tensor(t: TensorEntry) -> np.ndarray:
    """Return a copy of a tensor's bytes."""
    with t.file.open("rb") as f:
        f.seek(t.start)
        return np.frombuffer(f.read(t.nbytes), np.uint8)


def _file_size(file: Path) -> int:
    return file.stat().st_size
