"""Broken GGUFs, for tests/fuzz.py: one file or two parts, damaged where a GGUF can be.

A header is taken to pieces, each with its meaning (a count, a length, a type, a value, a name, a
size, a place); a piece is replaced by an odd one of its kind or width, left out, doubled or moved,
a value by one of another type; else bytes anywhere are damaged, the file is cut, or parts are
swapped, renamed, doubled or left out.
"""

import random
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refmoe.lint.lint import lint
from refmoe.model.decoder import policy
from refmoe.model.numerics import NonFinite
from refmoe.run.export import to_gguf
from refmoe.run.load import Model, golden_folder, load
from refmoe.text.template import ChatTemplate
from refmoe.weights.gguf import Gguf
from refmoe.weights.open import open_checkpoint
from refmoe.weights.synthetic.random import FIXED, write_random

LAYERS = 2
SHAPE = {
    "num_hidden_layers": LAYERS,
    "n_routed_experts": 5,
    "num_experts_per_tok": 3,
    "hidden_size": 64,
    "rope_scaling": {**FIXED["rope_scaling"], "mscale_all_dim": 1.0},  # a GGUF has one mscale
}
WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
ODD = (0, 1, 2, 3, 7, 8, 31, 32, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62)
ODD += (2**63 - 1, 2**63, 2**64 - 1, 10**12)
FLOATS = (0.0, -0.0, -1.0, 0.5, 1e-45, 1e30, float("nan"), float("inf"), float("-inf"))


class Piece(NamedTuple):
    what: str  # magic, version, count, length, type, value, name, dims, size, place
    raw: bytes


class Entry(NamedTuple):
    """A metadata entry or a tensor's, in pieces."""

    pieces: list[Piece]

    @property
    def raw(self) -> bytes:
        return b"".join(p.raw for p in self.pieces)


class Header(NamedTuple):
    head: list[Piece]  # magic, version, both counts
    metadata: list[Entry]
    tensors: list[Entry]
    data: bytes

    def joined(self) -> bytes:
        """The tensors' data begins at the next multiple of 32, as the reader has it."""
        parts = [*(p.raw for p in self.head), *(e.raw for e in (*self.metadata, *self.tensors))]
        raw = b"".join(parts)
        return raw + bytes(-len(raw) % 32) + self.data


def taken_apart(raw: bytes) -> Header:
    at = 0

    def take(what: str, n: int) -> Piece:
        nonlocal at
        at += n
        return Piece(what, raw[at - n : at])

    def number(p: Piece) -> int:
        return int.from_bytes(p.raw, "little")

    def text(what: str) -> list[Piece]:
        length = take("length", 8)
        return [length, take(what, number(length))]

    def value(kind: int) -> list[Piece]:
        if kind == 8:
            return text("value")
        if kind != 9:
            return [take("value", WIDTHS[kind])]
        inner, count = take("type", 4), take("count", 8)
        items = [p for _ in range(number(count)) for p in value(number(inner))]
        if number(inner) != 8:
            items = [Piece("value", b"".join(p.raw for p in items))]
        return [inner, count, *items]

    head = [take("magic", 4), take("version", 4), take("count", 8), take("count", 8)]
    metadata, tensors = [], []
    for _ in range(number(head[3])):
        key, kind = text("name"), take("type", 4)
        metadata.append(Entry([*key, kind, *value(number(kind))]))
    for _ in range(number(head[2])):
        name, dims = text("name"), take("dims", 4)
        sizes = [take("size", 8) for _ in range(number(dims))]
        tensors.append(Entry([*name, dims, *sizes, take("type", 4), take("place", 8)]))
    return Header(head, metadata, tensors, raw[-(-at // 32) * 32 :])


def odd_value(rng: random.Random) -> tuple[int, bytes]:
    """A whole value of any type, its type first."""
    kind = rng.choice([*WIDTHS, 8, 9, 9])
    if kind in (6, 12):
        return kind, struct.pack("<f" if kind == 6 else "<d", rng.choice(FLOATS))
    if kind in WIDTHS:
        return kind, (rng.choice(ODD) % 2 ** (8 * WIDTHS[kind])).to_bytes(WIDTHS[kind], "little")
    if kind == 8:
        text = rng.choice([b"", b"x", b"yarn", b"deepseek2", b"\xff\xfe", b"{{ x", b"\x00" * 9])
        return kind, struct.pack("<Q", len(text)) + text
    inner = rng.choice([0, 4, 5, 6, 8, 9, 10])
    count = rng.choice([0, 1, 3])
    items = b"".join(struct.pack("<Q", 1) + b"a" for _ in range(count))
    body = items if inner == 8 else bytes(rng.randrange(256) for _ in range(count * 8))
    return kind, struct.pack("<IQ", inner, count) + body


def odd_piece(p: Piece, rng: random.Random) -> Piece:
    n = len(p.raw)
    if p.what in ("name", "magic") or n not in (1, 2, 4, 8):
        changed = bytearray(p.raw or b"x")
        i = rng.randrange(len(changed))
        if rng.random() < 0.5:
            changed[i] = rng.randrange(256)
        else:
            del changed[i]
        return p._replace(raw=bytes(changed))
    old = int.from_bytes(p.raw, "little")
    near = (old + 1, old - 1, old * 2, old // 2, old ^ (1 << rng.randrange(8 * n)))
    new = rng.choice([*near, rng.choice(ODD), rng.randrange(40)])
    return p._replace(raw=(new % 2 ** (8 * n)).to_bytes(n, "little"))


def damage_header(raw: bytes, rng: random.Random) -> bytes:
    head, metadata, tensors, data = taken_apart(raw)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        entries = metadata if rng.random() < 0.6 else tensors
        if not entries:
            continue
        kind, i = rng.random(), rng.randrange(len(entries))
        if kind < 0.06:
            n = rng.randrange(len(head))
            head[n] = odd_piece(head[n], rng)
        elif kind < 0.16:
            del entries[i]
            _counted(head, metadata, tensors, rng)
        elif kind < 0.24:
            entries.insert(rng.randrange(len(entries) + 1), entries[i])
            _counted(head, metadata, tensors, rng)
        elif kind < 0.3:
            j = rng.randrange(len(entries))
            pieces = entries[i].pieces.copy()
            pieces[:2] = entries[j].pieces[:2]  # another's name
            entries[i] = Entry(pieces)
        elif kind < 0.6 and entries is metadata:
            new, value = odd_value(rng)
            kept = entries[i].pieces[:2]
            entries[i] = Entry(
                [*kept, Piece("type", struct.pack("<I", new)), Piece("value", value)]
            )
        else:
            pieces = entries[i].pieces.copy()
            few = min(
                len(pieces), rng.choice([4, 8, len(pieces)])
            )  # of long arrays mostly the head
            n = rng.randrange(few)
            pieces[n] = odd_piece(pieces[n], rng)
            text = n and pieces[n - 1].what == "length"
            if text and rng.random() < 0.8:  # one that is shorter, with its length
                size = struct.pack("<Q", len(pieces[n].raw))
                pieces[n - 1] = pieces[n - 1]._replace(raw=size)
            entries[i] = Entry(pieces)
    return Header(head, metadata, tensors, data).joined()


def _counted(
    head: list[Piece], metadata: list[Entry], tensors: list[Entry], rng: random.Random
) -> None:
    """The counts made true again, mostly."""
    if rng.random() < 0.8:
        for n, entries in ((2, tensors), (3, metadata)):
            head[n] = Piece("count", struct.pack("<Q", len(entries)))


def damage_file(raw: bytes, rng: random.Random) -> bytes:
    kind = rng.random()
    if kind < 0.75:
        return damage_header(raw, rng)
    if kind < 0.85:
        return raw[: rng.randrange(len(raw) + 1)]
    data, end = bytearray(raw), len(raw) if rng.random() < 0.3 else len(raw) // 3
    for _ in range(rng.choice([1, 4, 30])):
        i, n = rng.randrange(end), rng.choice([1, 1, 4, 8])
        data[i : i + n] = rng.randbytes(n)
    return bytes(data)


def split(source: Path, folder: Path) -> None:
    """As llama-gguf-split leaves a model of two parts."""
    whole = taken_apart(source.read_bytes())

    def entry(key: str, kind: int, form: str, value: int) -> Entry:
        name = key.encode()
        pieces = [Piece("length", struct.pack("<Q", len(name))), Piece("name", name)]
        kinds = Piece("type", struct.pack("<I", kind)), Piece("value", struct.pack(form, value))
        return Entry([*pieces, *kinds])

    cut = len(whole.tensors) // 2
    places = [int.from_bytes(t.pieces[-1].raw, "little") for t in whole.tensors]
    for i, (first, last) in enumerate(((0, cut), (cut, len(places)))):
        tensors = []
        for t, place in zip(whole.tensors[first:last], places[first:last], strict=True):
            moved = struct.pack("<Q", place - places[first])
            tensors.append(Entry([*t.pieces[:-1], Piece("place", moved)]))
        metadata = [] if i else list(whole.metadata)
        metadata += [entry("split.no", 2, "<H", i), entry("split.count", 2, "<H", 2)]
        metadata += [entry("split.tensors.count", 5, "<i", len(places))]
        head = whole.head[:2]
        head += [Piece("count", struct.pack("<Q", len(e))) for e in (tensors, metadata)]
        end = places[last] if last < len(places) else len(whole.data)
        part = Header(head, metadata, tensors, whole.data[places[first] : end])
        (folder / f"m-{i + 1:05d}-of-00002.gguf").write_bytes(part.joined())


def damage_parts(parts: dict[str, bytes], rng: random.Random) -> dict[str, bytes]:
    """Two parts, swapped, left out, doubled under another name, or one of them damaged."""
    (a, b), kind = sorted(parts), rng.random()
    if kind < 0.05:
        return {a: parts[b], b: parts[a]}
    if kind < 0.1:
        gone = rng.choice([a, b])
        return {n: raw for n, raw in parts.items() if n != gone}
    if kind < 0.15:
        return {a: parts[a], b: parts[a]}
    if kind < 0.2:
        odd = rng.choice(["m-00001-of-00003.gguf", "m-00000-of-00002.gguf", "x.gguf"])
        return {a: parts[a], odd: parts[b]}
    which = rng.choice([a, b])
    return {**parts, which: damage_file(parts[which], rng)}


def open_gguf(path: Path, rng: random.Random, messages: Any, tools: Any) -> None:
    """What the verbs read before they compute; of some, also lint, and a few tokens."""
    what = rng.random()
    if what < 0.15:
        lint(path)
    checkpoint = open_checkpoint(path)
    assert isinstance(checkpoint, Gguf)
    checkpoint.raw_config()
    decoder = checkpoint.decoder(policy("float32"))
    for layer in filter(decoder.cfg.is_moe, range(decoder.cfg.num_hidden_layers)):
        decoder.experts[layer](0)
    model = Model(checkpoint, decoder)
    words = model.tokenizer
    words.encode("To be, or not")
    _ = model.bos, model.stop_ids, checkpoint.warnings, checkpoint.identity
    ChatTemplate.from_gguf(checkpoint.metadata).encode(words, messages, tools)
    if what > 0.85:
        try:
            logits = decoder.logits([1, 0, 2])
        except NonFinite:
            return
        assert np.isfinite(logits).all()


def damaged(
    folder: Path, count: int, seed: int, messages: Any, tools: Any
) -> Iterator[tuple[int, str, Callable[[], None]]]:
    """Case by case, what is opened and how. Undamaged, both forms open, or none is yielded."""
    source, folder = folder / "source", folder / "files"
    write_random(source, "int4", seed=1, shape=SHAPE)
    template = golden_folder() / "tiny-k2" / "chat_template.jinja"
    (source / template.name).write_bytes(template.read_bytes())
    folder.mkdir()
    single = folder / "x.gguf"
    to_gguf(load(source), single)
    split(single, folder)
    for path in (single, folder / "m-00002-of-00002.gguf"):
        for each in range(20):
            open_gguf(path, random.Random(each), messages, tools)
    parts = {p.name: p.read_bytes() for p in sorted(folder.glob("m-*.gguf"))}
    whole = single.read_bytes()
    for case in range(seed, seed + count):
        rng = random.Random(case)
        for file in folder.iterdir():
            file.unlink()
        if rng.random() < 0.7:
            files = {"x.gguf": damage_file(whole, rng)}
        else:
            files = damage_parts(parts, rng)
        for name, raw in files.items():
            (folder / name).write_bytes(raw)
        first = folder / rng.choice(sorted(files)) if rng.random() < 0.7 else folder
        yield case, first.name, partial(open_gguf, first, rng, messages, tools)
