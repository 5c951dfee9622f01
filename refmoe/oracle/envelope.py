"""Envelopes: how far correct engines of one precision may be from float64 at each point.

An envelope is what a dozen emulated runs (noise.py) err at the points of a dump. Wherever the dump
has a tensor, the next operation of every emulated run gets the exact one, so that an envelope is a
property of checkpoint, tokens, profile and the dump's list of names, and not of the dump's numbers.
It is kept on disk: a second check of the same model samples nothing.
"""

import hashlib
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from refmoe.engines import Profile
from refmoe.files import cache_folder, write_atomically
from refmoe.model.decoder import Decoder
from refmoe.model.numerics import WatchSome
from refmoe.oracle.noise import emulated, rms
from refmoe.progress import Said, say_nothing

KIND = "envelopes"  # of cache folder
KEPT = 64  # envelopes on disk; the oldest are removed
VERSION = 2  # of the emulation: another one forgets what the last one sampled


class Lens(NamedTuple):
    """Which part of a tensor is compared, and whether the engine's value then replaces ours."""

    look: Callable[[np.ndarray], np.ndarray]  # [T, ...] → [T', ...]
    goes_on: bool  # with the engine's value
    step: float = 0.0  # half of the last decimal, where numbers were printed
    key: str = ""  # tells this lens from another one at the same point
    known: np.ndarray | None = None  # which numbers go on, where some do; broadcast to the tensor
    narrow: bool = False  # some columns are unknown: what comes after rests on ours too


@dataclass(frozen=True)
class Envelope:
    """Relative errors of emulated runs, RMS over a row: path → [runs, T']."""

    noise: dict[str, np.ndarray]
    gates: dict[str, float]  # router logits: RMS of the noise, absolute


def sample_envelope(
    decoder: Decoder,
    profile: Profile,
    tokens: Sequence[int],
    lenses: Mapping[str, Lens],
    runs: int,
    identity: str | None = None,
    progress: Said = say_nothing,
) -> Envelope:
    """Return the envelope of these points, read back if it was sampled before.

    identity  of the checkpoint; None: sample, and leave nothing on disk
    progress  is told before each run
    """
    if identity is None:
        return _sample(decoder, profile, tokens, lenses, runs, progress)
    facts: list[Any] = [
        identity,
        asdict(profile),
        asdict(decoder.nx.conventions),
        list(tokens),
        runs,
        VERSION,
    ]
    facts += [[name, lens.goes_on, lens.key] for name, lens in lenses.items()]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    envelope = _recall(key)
    if envelope is None:
        envelope = _sample(decoder, profile, tokens, lenses, runs, progress)
        _remember(key, envelope)
    return envelope


def _sample(
    decoder: Decoder,
    profile: Profile,
    tokens: Sequence[int],
    lenses: Mapping[str, Lens],
    runs: int,
    progress: Said,
) -> Envelope:
    """Run the exact decoder once and the emulated one `runs` times, and keep what these err."""
    exact: dict[str, np.ndarray] = {}

    def record(path: str, x: np.ndarray) -> np.ndarray:
        exact[path] = x
        return x

    nx = replace(decoder.nx, stop_at_nonfinite=False)
    kept = WatchSome(record, lambda path: path in lenses or path.endswith(".mlp.gate"))
    decoder.using(nx.watching(kept)).logits(tokens)
    # an expert that only the engine chose has no exact rows; `row_errors` pools what others have
    lenses = {name: lens for name, lens in lenses.items() if name in exact}
    size = {}
    for name, lens in lenses.items():
        own = rms(lens.look(exact[name]))
        size[name] = np.where(own > 0, own, 1)
    noise: dict[str, list[np.ndarray]] = {name: [] for name in lenses}
    gates: dict[str, list[float]] = {}
    for seed in range(runs):
        progress(f"emulated runs of {profile.name}", seed, runs)
        rng = np.random.default_rng(seed)

        def inject(path: str, x: np.ndarray, rng: np.random.Generator = rng) -> np.ndarray:
            """Note the error of a point, and go on as the replay of the dump does."""
            if path.endswith(".mlp.gate"):
                gates.setdefault(path, []).append(float(((x - exact[path]) ** 2).mean()))
            lens = lenses.get(path)
            if lens is None or x.shape != exact[path].shape:
                return x
            if x.dtype.kind == "f":
                error = lens.look(x) - lens.look(exact[path])
                if lens.step:
                    error = error + rng.uniform(-lens.step, lens.step, error.shape)
                noise[path].append(rms(error) / size[path])
            if not lens.goes_on:
                return x
            return exact[path] if lens.known is None else np.where(lens.known, exact[path], x)

        emulated(decoder.using(nx), profile, len(tokens), rng, inject, lenses).logits(tokens)
    return Envelope(
        {name: np.stack(rows) for name, rows in noise.items() if rows},
        {name: float(np.sqrt(np.mean(squares))) for name, squares in gates.items()},
    )


# --- on disk


def _recall(key: str) -> Envelope | None:
    """Return an envelope that was kept; None if it is absent, or not whole."""
    try:
        path = cache_folder(KIND) / f"{key}.npz"
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            noise = {n[1:]: file[n] for n in file.files if n[0] == "n"}
            return Envelope(noise, {n[1:]: float(file[n]) for n in file.files if n[0] == "g"})
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return None


def _remember(key: str, envelope: Envelope) -> None:
    """Keep an envelope, and remove the oldest.

    A folder that cannot be written to is no error: the next check samples again.
    """
    arrays: dict[str, Any] = {"n" + name: x for name, x in envelope.noise.items()}
    arrays |= {"g" + name: x for name, x in envelope.gates.items()}
    try:
        folder = cache_folder(KIND)
        folder.mkdir(parents=True, exist_ok=True)
        with write_atomically(folder / f"{key}.npz") as part, part.open("wb") as file:
            np.savez(file, **arrays)
        by_age = sorted(folder.glob("*.npz"), key=lambda f: f.stat().st_mtime)
        for old in by_age[:-KEPT]:
            old.unlink(missing_ok=True)
    except OSError:
        pass
