"""Many prompts, layer by layer: each weight is asked for once, and no expert that nobody chose.

    x  = embed(tokens)                                       rows of all prompts      [T, D]
    for each layer
        h, choice = attend(x), route(norm(h))                prompt by prompt         [T, D], [T, K]
        y  = Σ_e g · E_e(norm(h))                            expert by expert         [T, D]
        x' = mix(h, y)                                       rows in any order        [T, D]
    logits = norm(x) lm_headᵀ                                tile by tile of the head [T, Z]

The formulas are those of model/; here is only the order. Rows go through in chunks of `chunk`, a
long prompt in several, over the latent cache of this layer, which then is dropped. Experts are
asked for in index order, each with all rows that chose it, and the routed sum is added up in that
order, as the definition of the `nx.experts` seam has it: what the chunks are, and whether a sweep
was interrupted, changes no bit but those that BLAS makes depend on how many rows it multiplies.

Hidden states lie in files, mapped where they are worked on. Beside the weights, which are the
decoder's affair, and the tokens, memory is bounded whatever T is. With b bytes a number, c rows a
chunk, S positions of the longest prompt, W the widest of a layer's activations:

    b·(8·c·W  +  S·(C+R) + S·H·(N+V)  +  4·2²⁴  +  2²²)  +  64 MiB
       a chunk   a prompt's latents and keys   scores   tile of the head

`OUT.part/` beside the result holds what a second run goes on from. A layer's hidden states are
written beside those they are made of, and count once all is on the disk and `state.json` has been
replaced; a sweep killed at any moment does the layer again that it was in.

    OUT.part/lock            held by the process at work
    OUT.part/state.json      what is computed, of what; layers done
    OUT.part/x0, x1          hidden states after even and odd layers; h, chosen, weight: of this one
    OUT.part/points/         what the result is made of
"""

import errno
import hashlib
import importlib
import json
import mmap
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from refmoe.config import Config
from refmoe.files import InputError
from refmoe.model import matrix
from refmoe.model.cache import LatentCache
from refmoe.model.decoder import (
    Decoder,
    LayerWeights,
    add_mlp,
    attend,
    check_tokens,
    embed,
    final_norm,
    mix,
    mlp_input,
    vocabulary,
)
from refmoe.model.experts import Experts, Lender, Lent, MlpWeights, MoeWeights, with_shared
from refmoe.model.mla import Segment
from refmoe.model.numerics import NonFinite, Numerics
from refmoe.model.router import Routing, route
from refmoe.run.generate import CHUNK, alone
from refmoe.run.model import Model
from refmoe.version import __version__
from refmoe.weights.checkpoint import summary
from refmoe.weights.stream import Spec, write_stream

VERSION = 1  # of the folder's contents
TILE = 1 << 22  # elements of a tile of the head
BLOCK = 1 << 16  # rows of routing looked through at once
TOGETHER = 16  # experts of a mapped checkpoint in one parallel region
COPIED = 1 << 24  # bytes of the result at once
LOGITS = "lm_head"
LETTERS = {
    "float64": "F64",
    "float32": "F32",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
}


class Swept(NamedTuple):
    out: Path
    tensors: dict[str, tuple[str, tuple[int, ...]]]  # dtype as safetensors spells it, shape
    rows: int
    begun_at: int  # layers that an earlier run had done
    bytes_read: int  # of weights that this run asked for
    seconds: float


def sweep(
    model: Model,
    prompts: Sequence[Sequence[int]],
    out: str | Path,
    *,
    logits: str = "top:64",
    positions: str | Sequence[int] | Sequence[Sequence[int]] | None = None,
    points: Sequence[str] = (),
    chunk: int = CHUNK,
    restart: bool = False,
    how: Mapping[str, Any] | None = None,
) -> Swept:
    """Write what a forward pass over each prompt makes, as `refmoe trace` names it.

    logits     all: `lm_head` [T, Z]; top:K: `lm_head#ids` and `#logprobs` [T, K], likeliest first,
               `#logsumexp` [T, 1], logit = log-probability + this; none
    positions  of which there are logits: all; last; a list for every prompt, from the end where
               negative; or a list for each. Then also `lm_head#positions`
    points     names or patterns, beside hidden states of the last layer, `gate#experts`,
               `gate#weights` and `gate#margin` of all, which are always written; `lm_head` is not
               among them
    chunk      rows at a time. A point that is not of single rows (`#scores`, `#probs`, `kv_b_proj`)
               needs prompts no longer than it
    restart    forget what an earlier run left
    how        what else a second run must have in common with the first

    Names begin with `0/`, `1/` … where prompts are several. Raises `InputError` for a second run
    that is not of the same computation, for a disk that is or becomes too full, for a checkpoint
    that changes, and where another process sweeps to the same file.
    """
    out = Path(out)
    work = _prepared(model, prompts, out, logits, positions, points, chunk, how or {})
    folder = out.with_name(out.name + ".part")
    with _locked(folder, restart), _explained(work, folder), np.errstate(over="ignore"):
        began = time.perf_counter()
        with np.errstate(invalid="ignore"), alone(model.decoder):  # points name what is not finite
            run = _begin(work, folder)
            before, read = run.state["done"], run.state["bytes_read"]
            with run.bar:
                _embedding(run)
                while run.state["done"] < work.cfg.num_hidden_layers:
                    _layer(run, run.state["done"])
                if run.state["done"] == work.cfg.num_hidden_layers:
                    _head(run)
        tensors = _result(run, out)
        _clear(folder)
    seconds = time.perf_counter() - began
    return Swept(out, tensors, work.T, max(0, before), run.state["bytes_read"] - read, seconds)


# --- what is to be done -------------------------------------------------------------------------


class Piece(NamedTuple):
    """Rows of one prompt in a chunk."""

    prompt: int
    begin: int  # rows of all prompts
    end: int
    first: bool  # of the prompt
    last: bool


@dataclass(frozen=True)
class Work:
    """What a sweep computes; nothing of it changes."""

    model: Model
    ids: np.ndarray  # [T]
    starts: list[int]  # row of each prompt's first token, and T
    chunks: list[list[Piece]]
    chunk: int
    logits: str
    picked: np.ndarray | None  # rows whose logits are wanted; None: all
    counts: list[int]  # of them in each prompt
    wanted: frozenset[str]  # points
    needed: int  # bytes on the disk
    facts: dict[str, Any]  # what makes two sweeps the same
    tokens: str  # JSON, for the result

    @property
    def cfg(self) -> Config:
        return self.model.cfg

    @property
    def decoder(self) -> Decoder:
        return self.model.decoder

    @property
    def T(self) -> int:
        return len(self.ids)

    @property
    def top(self) -> int:
        """Likeliest tokens that are kept; 0: whole logits."""
        kind, _, k = self.logits.partition(":")
        return min(int(k), self.cfg.vocab_size) if kind == "top" else 0


def _prepared(
    model: Model,
    prompts: Sequence[Sequence[int]],
    out: Path,
    logits: str,
    positions: str | Sequence[int] | Sequence[Sequence[int]] | None,
    points: Sequence[str],
    chunk: int,
    how: Mapping[str, Any],
) -> Work:
    cfg, nx = model.cfg, model.nx
    if not prompts:
        raise InputError("no prompt; give at least one")
    for n, prompt in enumerate(prompts):
        try:
            check_tokens(prompt, 0, cfg)
        except InputError as e:
            raise InputError(f"prompt {n}: {e}" if len(prompts) > 1 else str(e)) from None
    if chunk < 1:
        raise InputError(f"chunk = {chunk}, expected at least 1")
    kind, _, k = logits.partition(":")
    if logits not in ("all", "none") and (kind != "top" or not k.isdecimal() or int(k) < 1):
        raise InputError(f"logits {logits!r}; expected all, none or top:K")
    lengths = [len(tokens) for tokens in prompts]
    if nx.room is not None and max(lengths) > nx.room:
        raise InputError(
            f"a prompt of {max(lengths)} tokens, and the card's caches have room for {nx.room}"
        )
    chunk = min(chunk, nx.rows or chunk)
    starts = [0, *np.cumsum(lengths).tolist()]
    picked = None if logits == "none" else _picked(positions, lengths)
    counts = lengths if picked is None else [len(rows) for rows in picked]
    wanted = _wanted(cfg, points, max(lengths), chunk)
    tokens = json.dumps([[int(t) for t in p] for p in prompts])
    facts = {
        "version": VERSION,
        "tokens": hashlib.sha256(tokens.encode()).hexdigest(),
        "model": str(model.checkpoint.path.resolve()),
        "checkpoint": model.checkpoint.identity,
        "numerics": nx.name,
        "conventions": asdict(nx.conventions),
        "attention": [nx.attention, nx.cache],
        "reference": model.reference,
        "logits": logits,
        "positions": None if picked is None else [p.tolist() for p in picked],
        "points": sorted(points),
        "chunk": chunk,
        **how,
    }
    rows = None
    if picked is not None:
        rows = np.concatenate([p + s for p, s in zip(picked, starts, strict=False)]).astype(int)
    work = Work(
        model,
        np.concatenate([np.asarray(t, np.intp) for t in prompts]),
        starts,
        list(_chunks(starts, chunk)),
        chunk,
        logits,
        rows,
        counts,
        wanted,
        0,
        json.loads(json.dumps(facts)),
        tokens if len(prompts) > 1 else tokens[1:-1],
    )
    return replace(work, needed=_needed(work))


def _picked(
    positions: str | Sequence[int] | Sequence[Sequence[int]] | None, lengths: list[int]
) -> list[np.ndarray] | None:
    """Of each prompt, the positions whose logits are wanted, in order."""
    if positions is None or positions == "all":
        return None
    if isinstance(positions, str):
        if positions != "last":
            raise InputError(f"positions {positions!r}; expected all, last, or a list of integers")
        positions = [-1]
    each: Any = list(positions)
    if not (each and all(isinstance(p, list | tuple) for p in each)):
        each = [each] * len(lengths)
    if len(each) != len(lengths):
        raise InputError(f"positions for {len(each)} prompts, there are {len(lengths)}")
    out = []
    for n, (own, length) in enumerate(zip(each, lengths, strict=True)):
        if not all(type(p) is int for p in own):
            raise InputError("positions are no list of integers, nor a list of such lists")
        if bad := [p for p in own if not -length <= p < length]:
            raise InputError(f"position {bad[0]} of prompt {n}, which has {length} tokens")
        out.append(np.unique(np.array([p % length for p in own], np.int64)))
    if not any(map(len, out)):
        raise InputError("no position is wanted; for none, logits = none")
    return out


def _chunks(starts: Sequence[int], chunk: int) -> Iterator[list[Piece]]:
    """Rows in order; a prompt is split only if it is longer than a chunk."""
    pieces: list[Piece] = []
    room = chunk
    for n, (begin, end) in enumerate(pairwise(starts)):
        if pieces and end - begin > room:
            yield pieces
            pieces, room = [], chunk
        for at in range(begin, end, chunk):
            stop = min(at + chunk, end)
            pieces.append(Piece(n, at, stop, at == begin, stop == end))
            room -= stop - at
            if not room:
                yield pieces
                pieces, room = [], chunk
    if pieces:
        yield pieces


WHOLE = ("#scores", "#probs", ".kv_b_proj")  # of a prompt, not of a row


def point_sizes(cfg: Config) -> dict[str, float]:
    """Every point but the logits, in some order, and how many numbers it has for each row.

    `#scores` and `#probs` have as many for each pair of rows of a prompt; of experts' points the
    numbers are those of a row on average.
    """
    D, H, A, C = cfg.hidden_size, cfg.num_attention_heads, cfg.q_lora_rank, cfg.kv_lora_rank
    N, R, V, K = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim, cfg.num_experts_per_tok
    F, E = cfg.moe_intermediate_size, cfg.n_routed_experts
    out: dict[str, float] = {"model.embed_tokens": D}

    def mlp(at: str, width: float, D: float) -> None:
        out.update({f"{at}{part}": width for part in ("gate_proj", "up_proj", "act")})
        out[f"{at}down_proj"] = D

    for i in range(cfg.num_hidden_layers):
        at = f"model.layers.{i}"
        a = f"{at}.self_attn"
        out |= {f"{at}.input_layernorm": D}
        if A is None:
            out |= {f"{a}.q_proj": H * (N + R)}
        else:
            out |= {f"{a}.q_a_proj": A, f"{a}.q_a_layernorm": A, f"{a}.q_b_proj": H * (N + R)}
        out |= {f"{a}.kv_a_proj_with_mqa": C + R, f"{a}.kv_a_layernorm": C}
        out |= {f"{a}#q_pe": H * R, f"{a}#k_pe": R}
        out |= {f"{a}.kv_b_proj": H * (N + V), f"{a}#q_latent": H * C}
        out |= {f"{a}#context_latent": H * C}
        out |= {f"{a}#scores": H, f"{a}#probs": H, f"{a}#context": H * V, f"{a}.o_proj": D}
        out |= {a: D, f"{at}#attn_residual": D, f"{at}.post_attention_layernorm": D}
        m = f"{at}.mlp"
        if cfg.is_moe(i):
            out |= {f"{m}.gate": E, f"{m}.gate#experts": K, f"{m}.gate#weights": K}
            for e in range(E):
                out[f"{m}.experts.{e}#rows"] = K / E
                mlp(f"{m}.experts.{e}.", F * K / E, D * K / E)
            out |= {f"{m}.experts": D}
            if cfg.n_shared_experts:
                mlp(f"{m}.shared_experts.", F * cfg.n_shared_experts, D)
                out |= {f"{m}.shared_experts": D}
        else:
            mlp(f"{m}.", cfg.intermediate_size, D)
        out |= {m: D, at: D}
    return out | {"model.norm": D}


def _wanted(cfg: Config, patterns: Sequence[str], longest: int, chunk: int) -> frozenset[str]:
    """Points that the patterns name, and what always is written."""
    last = f"model.layers.{cfg.num_hidden_layers - 1}"
    sizes = point_sizes(cfg) if patterns else {}
    out: set[str] = set()
    for pattern in patterns:
        found = {name for name in sizes if fnmatchcase(name, pattern)}
        if not found:
            hint = "; logits are asked for by themselves" if fnmatchcase(LOGITS, pattern) else ""
            raise InputError(
                f"no point matches {pattern!r}{hint}; points are named like model.norm, "
                "model.layers.0, model.layers.0.self_attn.q_a_proj, model.layers.1.mlp.gate"
            )
        out |= found
    whole = sorted(name for name in out if name.endswith(WHOLE))
    if whole and longest > chunk:
        raise InputError(
            f"{whole[0]} is not of single rows, and the longest prompt has {longest} tokens, a "
            f"chunk {chunk}; make chunks as long, or ask for fewer points"
        )
    out |= {f"{_expert(name)}#rows" for name in out if ".mlp.experts." in name}
    for i in range(cfg.num_hidden_layers):
        if cfg.is_moe(i):
            out |= {f"model.layers.{i}.mlp.gate#{part}" for part in ("experts", "weights")}
    return frozenset(out - {last})


def _expert(name: str) -> str:
    """model.layers.L.mlp.experts.E of one of its points."""
    return name.removesuffix("#rows") if name.endswith("#rows") else name.rpartition(".")[0]


def _needed(work: Work) -> int:
    """Bytes on the disk while it works: its files, and the result beside them."""
    cfg, T = work.cfg, work.T
    b, K = np.dtype(work.decoder.nx.dtype).itemsize, cfg.num_experts_per_tok
    scratch = T * (3 * cfg.hidden_size * b + K * (4 + b))
    n = sum(work.counts) if work.logits != "none" else 0
    head = n * (work.top * (b + 4) + 16 if work.top else b * cfg.vocab_size)
    moe = sum(map(cfg.is_moe, range(cfg.num_hidden_layers)))
    kept = moe * T * (K * (2 + b) + 16) + head
    lengths = np.diff(work.starts)
    sizes = point_sizes(cfg) if len(work.wanted) > 2 * moe else {}
    for name in work.wanted & sizes.keys():
        if name.endswith(("gate#experts", "gate#weights")):
            continue
        pairs = name.endswith(("#scores", "#probs"))
        kept += int(b * sizes[name] * ((lengths**2).sum() if pairs else T))
    return scratch + 2 * kept + T * b * cfg.hidden_size


# --- files --------------------------------------------------------------------------------------


class Rows:
    """A file of rows, mapped while some of them are read or written: its pages are given back."""

    def __init__(self, file: Path, shape: tuple[int, ...], dtype: Any):
        size = prod(shape) * np.dtype(dtype).itemsize
        with file.open("a+b") as raw:
            if os.fstat(raw.fileno()).st_size != size:
                raw.truncate(0)
                _allocate(raw.fileno(), size)
        self.file = file
        self.map = np.memmap(file, dtype, "r+", shape=shape)

    def __len__(self) -> int:
        return len(self.map)

    def __getitem__(self, rows: Any) -> np.ndarray:
        out = np.array(self.map[rows])
        self.release()
        return out

    def __setitem__(self, rows: Any, values: Any) -> None:
        self.map[rows] = values
        self.release()

    def release(self) -> None:
        """Let go of the pages; what is in them stays in the file."""
        pages: Any = self.map._mmap  # type: ignore[attr-defined]
        if hasattr(mmap, "MADV_DONTNEED"):
            pages.madvise(mmap.MADV_DONTNEED)

    def flush(self) -> None:
        """To the disk."""
        self.map.flush()
        with self.file.open("rb+") as raw:
            os.fsync(raw.fileno())


def _allocate(fd: int, size: int) -> None:
    """Place for so many bytes, now: a mapped file that runs out of it later kills the process."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, size)
            return
        except OSError as e:
            if e.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
    zeros = bytes(COPIED)
    for at in range(0, size, COPIED):
        left = memoryview(zeros)[: size - at]
        while left:
            left = left[os.write(fd, left) :]


class Points:
    """A watcher that appends what is wanted to a file for each point, rows in order."""

    def __init__(self, folder: Path, wanted: frozenset[str], experts: int):
        self.folder, self.wanted = folder, wanted
        self.ids = np.int16 if experts <= 1 << 15 else np.int32
        self.kept: dict[str, list[Any]] = {}  # name → dtype, shape of a row
        self.rows: np.ndarray | None = None  # those of an expert's batch among all

    def wants(self, path: str) -> bool:
        return path.partition("@")[0] in self.wanted

    def __call__(self, path: str, x: np.ndarray) -> np.ndarray:
        if self.wants(path):
            name = path.partition("@")[0]
            kept = x
            if name.endswith("gate#experts"):
                kept = x.astype(self.ids)
            elif name.endswith("#rows") and self.rows is not None:
                kept = self.rows[x]
            self.append(name, kept)
        return x

    def append(self, name: str, x: np.ndarray) -> None:
        mode = "ab" if name in self.kept else "wb"
        self.folder.mkdir(exist_ok=True)
        with (self.folder / name).open(mode) as file:  # they may be thousands: none stays open
            file.write(np.ascontiguousarray(x).data)
        self.kept[name] = [x.dtype.name, list(x.shape[1:])]

    def finish(self) -> dict[str, list[Any]]:
        """All to the disk → what they are."""
        for name in self.kept:
            with (self.folder / name).open("rb+") as file:
                os.fsync(file.fileno())
        kept, self.kept = self.kept, {}
        return kept


@contextmanager
def _locked(folder: Path, restart: bool) -> Iterator[None]:
    """One process at a time; `restart` empties the folder."""
    there = folder.is_dir() and any(folder.iterdir())
    if there and not (folder / "lock").is_file():
        raise InputError(f"{folder} is there and no sweep's; move it away, or choose another --out")
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("a+b") as lock:
        try:
            flock: Any = importlib.import_module("fcntl")
            flock.flock(lock, flock.LOCK_EX | flock.LOCK_NB)
        except ImportError:  # Windows
            pass
        except OSError:
            raise InputError(
                f"{folder}: another process is at work there; wait for it, or choose another --out"
            ) from None
        if restart:
            _empty(folder)
        yield


def _empty(folder: Path) -> None:
    """The state first: without it the rest is nothing."""
    (folder / "state.json").unlink(missing_ok=True)
    for file in folder.iterdir():
        if file.is_dir():
            shutil.rmtree(file)
        elif file.name != "lock":
            file.unlink()


def _clear(folder: Path) -> None:
    _empty(folder)
    (folder / "lock").unlink()
    folder.rmdir()


@contextmanager
def _explained(work: Work, folder: Path) -> Iterator[None]:
    """What a person can do about a full disk or a shard that is gone; nothing is lost by them."""
    try:
        yield
    except OSError as e:
        kept = "what is done is kept: the same command goes on from there"
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise InputError(
                f"{folder}: no room left on the disk ({e.strerror}); this sweep takes "
                f"{work.needed / 1e9:.3f} GB there. Make room; {kept}"
            ) from None
        if not work.model.checkpoint.path.exists() or e.errno == errno.ENOENT:
            raise InputError(f"{e}; {kept}") from None
        raise


def _replaced(file: Path, document: Mapping[str, Any]) -> None:
    part = file.with_suffix(".part")
    with part.open("w", encoding="utf-8") as out:
        json.dump(document, out)
        out.flush()
        os.fsync(out.fileno())
    os.replace(part, file)
    _to_disk(file.parent)


def _to_disk(folder: Path) -> None:
    """That names in it have changed."""
    try:
        fd = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folder
        return
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# --- a run --------------------------------------------------------------------------------------


@dataclass
class Run:
    """A sweep under way."""

    work: Work
    folder: Path
    state: dict[str, Any]  # facts, done (-1: not even the embedding), bytes_read, points
    points: Points
    x: tuple[Rows, Rows]
    h: Rows
    chosen: Rows
    weight: Rows
    bar: Any
    guessed: float  # bytes of a layer's experts that the bar counts on
    caches: dict[int, LatentCache] = field(default_factory=dict)

    def read(self, size: float, instead_of: float = 0.0) -> None:
        self.state["bytes_read"] += int(size)
        self.bar.total += size - instead_of
        self.bar.update(size)

    def finish(self, done: int) -> None:
        """So far it counts; what was before may be overwritten."""
        self.state["points"] |= self.points.finish()
        self.state["done"] = done
        _replaced(self.folder / "state.json", self.state)


def _begin(work: Work, folder: Path) -> Run:
    """From the beginning, or from what an earlier run left."""
    file = folder / "state.json"
    state: dict[str, Any] = {"facts": work.facts, "done": -1, "bytes_read": 0, "points": {}}
    if file.exists():
        try:
            old = json.loads(file.read_text("utf-8"))
            state = {key: old[key] for key in state}
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{file} is damaged; --restart begins anew") from None
        names = sorted(work.facts.keys() | state["facts"].keys())
        other = [n for n in names if state["facts"].get(n) != work.facts.get(n)]
        if other:
            raise InputError(
                f"{folder} holds {max(0, state['done'])} layers of another sweep: its "
                f"{', '.join(other)} differ; --restart forgets them and begins anew"
            )
    else:
        _empty(folder)
    for part in folder.glob("*.part"):  # of a write that was interrupted
        part.unlink()
    here = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    free = shutil.disk_usage(folder).free
    if free < work.needed - here:
        raise InputError(
            f"{folder}: {free / 1e9:.3f} GB are free there, this sweep of {work.T} rows takes "
            f"{(work.needed - here) / 1e9:.3f} GB more"
        )
    cfg, dtype = work.cfg, work.decoder.nx.dtype
    shape = work.T, cfg.hidden_size
    choice = work.T, cfg.num_experts_per_tok
    x = Rows(folder / "x0", shape, dtype), Rows(folder / "x1", shape, dtype)
    h = Rows(folder / "h", shape, dtype)
    chosen, weight = (
        Rows(folder / "chosen", choice, np.int32),
        Rows(folder / "weight", choice, dtype),
    )
    points = Points(folder / "points", work.wanted, cfg.n_routed_experts)
    once, guessed = _expected(work)
    bar = tqdm(
        total=once + guessed * sum(map(cfg.is_moe, range(cfg.num_hidden_layers))),
        initial=state["bytes_read"],
        unit="B",
        unit_scale=True,
        desc="sweep",
        disable=None,
    )
    return Run(work, folder, state, points, x, h, chosen, weight, bar, guessed)


def _expected(work: Work) -> tuple[float, float]:
    """Bytes of weights that every row needs, and of those experts of a layer that some row may
    choose, were each as likely as another."""
    cfg = work.cfg
    sizes = summary(work.model.checkpoint)["bytes"]
    once = sum(
        n for kind, n in sizes.items() if kind not in ("routed experts", "embedding", "other")
    )
    moe = sum(map(cfg.is_moe, range(cfg.num_hidden_layers)))
    missed = (1 - cfg.num_experts_per_tok / cfg.n_routed_experts) ** work.T if moe else 1.0
    return once, sizes.get("routed experts", 0) / max(1, moe) * (1 - missed)


def _size(w: Any) -> int:
    """Bytes of weights as they are stored."""
    if w is None:
        return 0
    own = getattr(w, "nbytes", None)
    return int(own) if own is not None else sum(map(_size, w))


@contextmanager
def _at(begin: int) -> Iterator[None]:
    try:
        yield
    except NonFinite as e:
        raise NonFinite(f"{e} of those from row {begin} of all prompts on") from None


def _embedding(run: Run) -> None:
    if run.state["done"] >= 0:
        return
    work, nx = run.work, run.work.decoder.nx.watching(run.points)
    for begin in range(0, work.T, work.chunk):
        with _at(begin):
            ids = work.ids[begin : begin + work.chunk]
            run.x[0][begin : begin + work.chunk] = embed(ids, work.decoder.embed_tokens, nx)
    run.x[0].flush()
    run.finish(0)


def _layer(run: Run, i: int) -> None:
    """Layer i of all rows."""
    work, decoder, cfg = run.work, run.work.decoder, run.work.cfg
    _unchanged(run)
    run.bar.set_description(f"sweep layer {i} of {cfg.num_hidden_layers}", refresh=False)
    nx = decoder.nx.within(f"model.layers.{i}.").watching(run.points)
    old, new = run.x[i % 2], run.x[(i + 1) % 2]
    w, experts = decoder.layers[i], decoder.experts_of(i)
    run.read(_size(w), _size(w))
    for pieces in work.chunks:
        with _at(pieces[0].begin):
            _first_half(run, i, pieces, old, w, nx)
    if isinstance(w.mlp, MoeWeights):
        with _at(0):
            _experts(run, new, w, experts, nx)
    for pieces in work.chunks:
        rows = slice(pieces[0].begin, pieces[-1].end)
        with _at(rows.start):
            new[rows] = _second_half(run.h[rows], new[rows], w, experts, cfg, nx)
    new.flush()
    run.finish(i + 1)


def _unchanged(run: Run) -> None:
    checkpoint = run.work.model.checkpoint
    if checkpoint.identity != run.work.facts["checkpoint"]:
        raise InputError(
            f"{checkpoint.path}: config.json or a shard has changed since the sweep began; "
            f"{run.state['done']} layers are kept for when it is as it was"
        )


def _first_half(
    run: Run, i: int, pieces: list[Piece], old: Rows, w: LayerWeights, nx: Numerics
) -> None:
    """x → h of a chunk; who chooses whom."""
    cfg, start = run.work.cfg, pieces[0].begin
    rows = slice(start, pieces[-1].end)
    for p in pieces:
        if p.first:
            run.caches[p.prompt] = LatentCache(cfg, nx.dtype, nx.cache == "bf16")
    segments = [
        Segment(slice(p.begin - start, p.end - start), run.caches[p.prompt]) for p in pieces
    ]
    h = attend(old[rows], w, segments, cfg, nx)
    run.h[rows] = nx.bring(h, None)
    for p in pieces:
        if p.last:
            del run.caches[p.prompt]
    if isinstance(w.mlp, MoeWeights):
        routing = route(mlp_input(h, w, cfg, nx), w.mlp.gate, cfg, nx.within("mlp."))
        run.chosen[rows], run.weight[rows] = routing.experts, routing.weights
        at = f"model.layers.{i}.mlp.gate"
        run.points.append(f"{at}#margin", routing.margin)
        if cfg.n_group != cfg.topk_group:
            run.points.append(f"{at}#group_margin", routing.group_margin)


def _second_half(
    h: np.ndarray, y: np.ndarray, w: LayerWeights, experts: Experts, cfg: Config, nx: Numerics
) -> np.ndarray:
    """h → x' of a chunk; y is its routed sum, where there is one."""
    if not isinstance(w.mlp, MoeWeights):
        return mix(h, w, experts, cfg, nx)
    x = mlp_input(h, w, cfg, nx.watching(None))  # shown already
    return add_mlp(h, with_shared(x, y, w.mlp, nx.within("mlp.")), nx)


def _experts(run: Run, y: Rows, w: LayerWeights, experts: Experts, nx: Numerics) -> None:
    """y = the routed sum: expert by expert, the seam `nx.experts` being asked for one of each."""
    cfg, silent, inside = run.work.cfg, nx.watching(None), nx.within("mlp.")
    seen = np.zeros(cfg.n_routed_experts, bool)
    for begin in range(0, len(y), run.work.chunk):
        y[begin : begin + run.work.chunk] = 0
    for begin in range(0, len(y), BLOCK):
        seen[run.chosen[begin : begin + BLOCK]] = True
    guessed = run.guessed
    nothing = np.zeros((0, cfg.hidden_size), nx.dtype)  # no guess: it may read what nobody chooses
    for loan in _loans(experts, np.flatnonzero(seen).tolist(), nothing):
        lent = Lent(loan) if isinstance(experts, Lender) else loan.__getitem__
        size = _size(tuple(loan.values()))
        run.read(size, min(size, guessed))
        guessed -= min(size, guessed)
        for which, rows, slots in _pairs(run.chosen, list(loan), run.work.chunk):
            run.points.rows = rows
            weight = run.weight[rows, slots][:, None]
            far = np.full(len(rows), np.inf)
            x = mlp_input(run.h[rows], w, cfg, silent)
            part = nx.experts(x, Routing(which[:, None], weight, far, far), lent, inside)
            for e in np.unique(which):
                own = which == e
                y[rows[own]] = y[rows[own]] + part[own]
    run.bar.total -= guessed


def _loans(experts: Experts, chosen: list[int], x: np.ndarray) -> Iterator[dict[int, MlpWeights]]:
    if isinstance(experts, Lender):
        yield from experts.loans(chosen, x)
        return
    for begin in range(0, len(chosen), TOGETHER):
        yield {e: experts(e) for e in chosen[begin : begin + TOGETHER]}


def _pairs(
    chosen: Rows, experts: Sequence[int], most: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Experts, rows and slots [n], n ≤ `most`: in order of the experts, then of the rows.

    Where the rows of an expert are cut does not depend on what experts are together, and so no bit.
    """
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    count = 0
    for e in experts:
        for rows, slots in _of_expert(chosen, e, most):
            if parts and count + len(rows) > most:
                yield _joined(parts)
                parts, count = [], 0
            parts.append((np.full(len(rows), e), rows, slots))
            count += len(rows)
    if parts:
        yield _joined(parts)


def _of_expert(chosen: Rows, e: int, most: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Its rows and slots, `most` at a time until the last."""
    rows, slots = np.zeros(0, np.intp), np.zeros(0, np.intp)
    for begin in range(0, len(chosen), BLOCK):
        more, where = np.nonzero(chosen[begin : begin + BLOCK] == e)
        rows, slots = np.concatenate((rows, more + begin)), np.concatenate((slots, where))
        while len(rows) >= most:
            yield rows[:most], slots[:most]
            rows, slots = rows[most:], slots[most:]
    if len(rows):
        yield rows, slots


def _joined(
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    which, rows, slots = (np.concatenate(part) for part in zip(*parts, strict=True))
    return which, rows, slots


# --- the head -----------------------------------------------------------------------------------


def _head(run: Run) -> None:
    """Norm of all rows; the wanted logits, each tile of the head with all of them."""
    work, decoder, cfg = run.work, run.work.decoder, run.work.cfg
    _unchanged(run)
    run.bar.set_description("sweep head", refresh=False)
    nx = decoder.nx.watching(run.points)
    x = run.x[cfg.num_hidden_layers % 2]
    for begin in range(0, work.T, work.chunk):
        rows = slice(begin, min(begin + work.chunk, work.T))
        with _at(begin):
            run.h[rows] = final_norm(x[rows], decoder.norm, cfg, nx)
    if work.logits != "none":
        keep = _Top(run) if work.top else _All(run)
        for columns, tile in matrix.tiles(decoder.lm_head, TILE):
            for begin in range(0, keep.n, work.chunk):
                rows = slice(begin, min(begin + work.chunk, keep.n))
                which = rows if work.picked is None else work.picked[rows]
                with _at(begin):
                    keep.take(rows, columns, vocabulary(run.h[which], tile, nx))
            run.read(_size(tile), _size(tile))
        keep.finish()
    run.finish(cfg.num_hidden_layers + 1)


class _All:
    """Logits as they are."""

    def __init__(self, run: Run):
        self.n = sum(run.work.counts)
        Z, dtype = run.work.cfg.vocab_size, run.work.decoder.nx.dtype
        run.points.folder.mkdir(exist_ok=True)
        self.rows = Rows(run.points.folder / LOGITS, (self.n, Z), dtype)
        run.points.kept[LOGITS] = [np.dtype(dtype).name, [Z]]

    def take(self, rows: slice, columns: slice, logits: np.ndarray) -> None:
        self.rows[rows, columns] = logits

    def finish(self) -> None:
        self.rows.flush()


class _Top:
    """The likeliest of what came so far, of equals the lower index; Σ exp(logit - the largest)."""

    def __init__(self, run: Run):
        self.run, self.n, K = run, sum(run.work.counts), run.work.top
        files = [run.folder / name for name in ("top", "ids", "sums")]
        self.best = Rows(files[0], (self.n, K), run.work.decoder.nx.dtype)
        self.ids = Rows(files[1], (self.n, K), np.int32)
        self.sums = Rows(files[2], (self.n, 2), np.float64)  # largest, Σ
        for begin in range(0, self.n, run.work.chunk):
            rows = slice(begin, begin + run.work.chunk)
            self.best[rows], self.ids[rows], self.sums[rows] = -np.inf, -1, (-np.inf, 0)

    def take(self, rows: slice, columns: slice, logits: np.ndarray) -> None:
        best, ids = self.best[rows], self.ids[rows]
        here = np.broadcast_to(np.arange(columns.start, columns.stop, dtype=np.int32), logits.shape)
        best, ids = np.concatenate((best, logits), axis=1), np.concatenate((ids, here), axis=1)
        order = np.argsort(-best, axis=1, kind="stable")[:, : self.best.map.shape[1]]
        self.best[rows] = np.take_along_axis(best, order, axis=1)
        self.ids[rows] = np.take_along_axis(ids, order, axis=1)
        wide, sums = logits.astype(np.float64), self.sums[rows]
        most = np.maximum(sums[:, :1], wide.max(axis=1, keepdims=True))
        total = sums[:, 1:] * np.exp(sums[:, :1] - most)
        total += np.exp(wide - most).sum(axis=1, keepdims=True)
        self.sums[rows] = np.concatenate((most, total), axis=1)

    def finish(self) -> None:
        for begin in range(0, self.n, self.run.work.chunk):
            rows = slice(begin, begin + self.run.work.chunk)
            sums = self.sums[rows]
            total = sums[:, :1] + np.log(sums[:, 1:])
            logprobs = (self.best[rows].astype(np.float64) - total).astype(np.float32)
            self.run.points.append(f"{LOGITS}#ids", self.ids[rows])
            self.run.points.append(f"{LOGITS}#logprobs", logprobs)
            self.run.points.append(f"{LOGITS}#logsumexp", total)


# --- the result ---------------------------------------------------------------------------------


class Part(NamedTuple):
    """A tensor of the result: so many bytes of a file, from there on."""

    spec: Spec
    file: Path
    begin: int
    less: int  # to be taken off each number: rows of a prompt count from its first


def _result(run: Run, out: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The file, under its name only when it is whole."""
    work = run.work
    parts = list(_parts(run))
    metadata = {
        "producer": f"refmoe {__version__}",
        "model": str(work.model.checkpoint.path),
        "numerics": work.decoder.nx.name,
        "conventions": work.decoder.nx.conventions.name,
        "tokens": work.tokens,
    }
    made = run.folder / "result"
    write_stream(made, [p.spec for p in parts], _bytes(parts), metadata=metadata)
    os.replace(made, out)
    _to_disk(out.parent)
    return {p.spec.name: (p.spec.dtype, p.spec.shape) for p in parts}


def _parts(run: Run) -> Iterator[Part]:
    work, cfg = run.work, run.work.cfg
    dtype = np.dtype(work.decoder.nx.dtype).name
    last = f"model.layers.{cfg.num_hidden_layers - 1}"
    files = {last: (run.x[cfg.num_hidden_layers % 2].file, dtype, [cfg.hidden_size])}
    for name, (kind, row) in run.state["points"].items():
        files[name] = run.points.folder / name, kind, row
    lengths = np.diff(work.starts).tolist()
    several = len(lengths) > 1
    of_experts: dict[str, list[int]] = {}
    for name, (file, kind, row) in files.items():
        counts, at = lengths, 0
        if name.startswith(LOGITS):
            counts = work.counts
        elif ".mlp.experts." in name:
            of = _expert(name)
            if of not in of_experts:
                rows = np.fromfile(run.points.folder / f"{of}#rows", np.int64)
                of_experts[of] = np.diff(np.searchsorted(rows, work.starts)).tolist()
            counts = of_experts[of]
        for n, count in enumerate(counts):
            shape = (count, *row)
            if name.endswith(("#scores", "#probs")):
                shape = (count, row[0], count)
            spec = Spec(f"{n}/{name}" if several else name, LETTERS[kind], shape)
            if count:
                yield Part(spec, file, at, work.starts[n] if name.endswith("#rows") else 0)
            at += spec.nbytes
    if work.picked is not None and work.logits != "none":
        yield from _positions(run, several)


def _positions(run: Run, several: bool) -> Iterator[Part]:
    """Which rows' logits are written."""
    work = run.work
    assert work.picked is not None
    file, at = run.folder / "positions", 0
    owner = np.repeat(work.starts[:-1], work.counts)
    (work.picked - owner).astype(np.int32).tofile(file)
    for n, count in enumerate(work.counts):
        prefix = f"{n}/" if several else ""
        spec = Spec(f"{prefix}{LOGITS}#positions", "I32", (count,))
        if count:
            yield Part(spec, file, at, 0)
        at += spec.nbytes


def _bytes(parts: Sequence[Part]) -> Iterator[np.ndarray]:
    for p in parts:
        with p.file.open("rb") as raw:
            raw.seek(p.begin)
            left = p.spec.nbytes
            while left:
                piece = raw.read(min(left, COPIED))
                if not piece:
                    raise InputError(f"{p.file} is shorter than it was; --restart begins anew")
                left -= len(piece)
                if p.less:
                    yield np.frombuffer(piece, np.int64) - p.less
                else:
                    yield np.frombuffer(piece, np.uint8)
