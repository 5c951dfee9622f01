"""`refmoe golden verify`: other engines' numbers, with provenance, and how far refmoe is from them.

A *golden* is a file of points that another engine, the *witness*, computed. For each of them
golden/vectors/manifest.json names the engine and its version, the conventions it follows, the
tokens and the file; for each model, the sha256 of every file that the witness read. golden/make.py
writes them with transformers and mlx-lm; refmoe never does. A checkpoint of random weights is made
anew from shape (or member) and seed; its sha256 tells that it is the one the witness read.

    rel_error   max over rows of  max|ours - theirs| / max|theirs|  in that row
    bound       float64 numerics, float64 witness    1e-10
                float32 numerics, float64 witness    2e-5
                float32 numerics, float32 witness    2e-5 + its own distance from the float64 one;
                                                     3e-5 for another engine's
                chosen experts                       0: the same sets
                greedy                               0: the same token wherever the witness's margin
                                                     exceeds twice the bound on the largest logit

1e-10 leaves four decimal places to the order of float64 sums; 2e-5 is some 170 float32 units
(2^-23), which the K2 graph stays below in a few layers.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.numpy

from refmoe.files import InputError
from refmoe.oracle.trace import trace
from refmoe.run.generate import generation_decoder, prefill, step
from refmoe.run.load import Model, golden_folder, load
from refmoe.weights.synthetic.members import write_member
from refmoe.weights.synthetic.random import write_random

if TYPE_CHECKING:
    from refmoe.fast.gpu.placement import Request

VERSION = 2  # of the manifest
BOUNDS = {"float64": 1e-10, "float32": 2e-5}
OTHER_ENGINE = 3e-5


@dataclass(frozen=True)
class Row:
    """One point of one golden, compared."""

    model: str  # model and sequence
    witness: str
    numerics: str
    point: str
    rel_error: float
    bound: float
    ok: bool


def verify(
    folder: Path | None = None, reference: bool = False, gpu: "Request | None" = None
) -> Iterator[Row]:
    """Compare every golden with what refmoe computes now, and yield a row for each point.

    reference  compute with the definition in `model/` alone
    gpu        compute on a card, in float32
    Raises `InputError` if a file is missing, of another version, or not the one the witness read.
    """
    folder = folder or golden_folder() / "vectors"
    manifest = read_manifest(folder)
    with tempfile.TemporaryDirectory() as tmp:
        for name, spec in manifest["models"].items():
            path = folder.parent / spec["folder"] if "folder" in spec else Path(tmp) / name
            if "random" in spec:
                write_random(path, **spec["random"])
            elif "member" in spec:
                write_member(path, **spec["member"])
            for file, wanted in spec["sha256"].items():
                _check_sha256(path / file, wanted)
            cases = [case for case in manifest["cases"] if case["model"] == name]
            for numerics in BOUNDS if gpu is None else ("float32",):
                for case in cases:
                    if case["witness"] == "float64" or numerics == "float32":
                        model = load(path, numerics, reference, case["conventions"], gpu=gpu)
                        yield from _compare(model, case, cases, folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a folder of goldens; raise `InputError` for another version."""
    file = folder / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; run: python golden/make.py") from None
    if manifest.get("version") != VERSION:
        raise InputError(
            f"{file} is version {manifest.get('version')}, this refmoe reads {VERSION}; "
            "run: python golden/make.py"
        )
    return manifest


def rel_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return the largest of all rows' max|ours - theirs| / max|theirs|.

    It is infinite where shapes differ, or one is finite and the other is not.
    """
    if ours.shape != theirs.shape:
        return float("inf")
    a = ours.reshape(len(ours), -1).astype(np.float64)
    b = theirs.reshape(len(theirs), -1).astype(np.float64)
    distance, size = np.abs(a - b).max(axis=1), np.abs(b).max(axis=1)
    ratio = np.divide(distance, size, out=np.where(distance > 0, np.inf, 0.0), where=size > 0)
    return float(ratio.max()) if np.isfinite(ratio).all() else float("inf")


def _compare(
    model: Model, case: dict[str, Any], cases: list[dict[str, Any]], folder: Path
) -> Iterator[Row]:
    """Yield a row for each point of one case, and one for its greedy continuation."""
    name, numerics = f"{case['model']}/{case['sequence']}", model.nx.name
    witness = f"{case['engine']} {case['witness']}"
    theirs = points(folder, case)
    ours = trace(model, case["tokens"], theirs)
    wider: dict[str, np.ndarray] = {}
    if case["witness"] != "float64":
        same = {key: case[key] for key in ("sequence", "engine")} | {"witness": "float64"}
        for other in cases:
            if same.items() <= other.items():
                wider = points(folder, other)
    for point, value in theirs.items():
        mine = _like_witness(point, ours, case["positions"])
        bound = BOUNDS[numerics] if case["witness"] == "float64" or wider else OTHER_ENGINE
        if point in wider:
            bound += rel_error(value, wider[point])
        if point.endswith("#experts"):
            bound = 0.0
            error = float((mine != value).any(axis=-1).mean())
        else:
            error = rel_error(mine, value)
        yield Row(name, witness, numerics, point, error, bound, error <= bound)
    if "greedy" in case:
        error = _greedy(model, case["tokens"], case["greedy"])
        yield Row(name, witness, numerics, "greedy", error, 0.0, error == 0)


def points(folder: Path, case: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return the witness's points of one case; those stored once for two names have both."""
    _check_sha256(folder / case["file"], case["sha256"])
    points = safetensors.numpy.load_file(folder / case["file"])
    return points | {name: points[twin] for name, twin in case["same"].items()}


def _like_witness(
    point: str, ours: dict[str, np.ndarray], positions: Sequence[int] | None
) -> np.ndarray:
    """Return our point at the kept positions; choices are kept as sets, by expert index."""
    mine = ours[point]
    base, mark, kind = point.rpartition("#")
    if mark and kind in ("experts", "weights"):
        order = ours[f"{base}#experts"].argsort(axis=-1)
        mine = np.take_along_axis(mine, order, axis=-1)
    return mine if positions is None else mine[list(positions)]


def _greedy(model: Model, prompt: Sequence[int], wanted: dict[str, Any]) -> float:
    """Return the share of the witness's tokens that we would not choose, where its margin decides.

    Our tokens are generated one by one over the cache, each after the witness's tokens before it.
    """
    decoder = generation_decoder(model)
    memory = decoder.caches()
    tie = 2 * BOUNDS[model.nx.name] * wanted["largest_logit"]
    logits = prefill(decoder, prompt, memory)
    wrong = 0
    for token, margin in zip(wanted["tokens"], wanted["margins"], strict=True):
        wrong += margin > tie and int(logits.argmax()) != token
        logits = step(decoder, token, memory)
    return wrong / len(wanted["tokens"])


def _check_sha256(file: Path, wanted: str) -> None:
    """Raise `InputError` unless a file is there and has this sha256."""
    if not file.is_file():
        raise InputError(f"{file}: no such file; run: python golden/make.py")
    found = sha256(file)
    if found != wanted:
        raise InputError(
            f"{file}: sha256 {found[:12]}…, the manifest says {wanted[:12]}…; "
            "not the file the witness saw or wrote; run: python golden/make.py"
        )


def sha256(file: Path) -> str:
    """Return the sha256 of a file in hexadecimal digits."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def as_json(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the rows as plain data, and whether all are within their bounds."""
    return {"rows": [asdict(row) for row in rows], "ok": all(row.ok for row in rows)}
