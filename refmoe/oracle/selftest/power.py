"""`refmoe bench oracle`: does `check` find what is planted, and pass what is healthy?

    healthy        real engines as they are: each must pass under its own conventions and profile
    planted        real engines with one fault each: must be a fault, at the point where it begins
    false alarms   for every profile, engines that really round: must pass

The real engines are in golden/engines.py, which needs the `peers` extra and a source tree. Those of
the false alarms are here. Where the envelope draws noise, they store in the type itself, add up in
float32 in a random order split at random places, and quantise activations to the nearest code. They
share the network's definition with refmoe, and no arithmetic with noise.py.
"""

import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from math import comb
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from refmoe.engines import PROFILES, Profile
from refmoe.fast.reproducible import reproducible_policy
from refmoe.fast.threads import single_blas_thread
from refmoe.files import InputError
from refmoe.model.decoder import Decoder
from refmoe.model.formats.fp8_block import E4M3, Fp8Block
from refmoe.model.matrix import Matrix, dequantize, round_bf16
from refmoe.model.numerics import round_float16
from refmoe.oracle.caches import CACHES, reading
from refmoe.oracle.check import check
from refmoe.oracle.judge import Cause, Report
from refmoe.oracle.noise import storage_of
from refmoe.oracle.readers.base import Dump
from refmoe.oracle.trace import Recorder
from refmoe.run.load import Model, golden_folder, load
from refmoe.weights.synthetic.members import write_member
from refmoe.weights.synthetic.random import write_random

ROUND: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "float64": lambda x: x,
    "float32": lambda x: x.astype(np.float32).astype(x.dtype),
    "bfloat16": lambda x: round_bf16(x.astype(np.float32)).astype(x.dtype),
    "float16": round_float16,
}
TOGETHER = 8  # runs that share a prompt, and so an envelope, each in another order of sums


def engines() -> ModuleType:
    """Return golden/engines.py; raise `InputError` where it or what it needs is not there."""
    file = golden_folder() / "engines.py"
    if not file.is_file():
        raise InputError("bench oracle runs other engines; it needs refmoe's source tree")
    spec = importlib.util.spec_from_file_location("engines", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as e:
        raise InputError(f"{e.name} is missing: pip install -e '.[peers]'") from None
    return module


def real_engines(quick: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("healthy" or "planted", row of `--json`) for each run of a real engine."""
    live = engines()
    with tempfile.TemporaryDirectory() as tmp:
        twins = live.Twins(Path(tmp))
        for run in live.healthy(twins, quick):
            report = check(run.model, run.dump, engine=run.conventions)
            worst = max(report.points, key=lambda p: p.multiple)
            row: dict[str, Any] = {
                "engine": f"{run.engine}, {run.checkpoint}, {run.precision}",
                "verdict": report.verdict,
                "compared": report.compared,
                "worst": worst.multiple,
                "at": worst.name,
                "conventions": sorted(report.conventions),
                "reason": report.reason,
            }
            yield "healthy", row
        for run in live.faulty(twins):
            report = check(run.model, run.dump, engine=run.conventions)
            row = {
                "fault": run.fault,
                "engine": run.engine,
                "precision": run.precision,
                "detected": report.verdict == "fault",
                "placed": any(fnmatchcase(report.point or "", p) for p in run.points),
                "named": report.cause is not None and _named(report.cause, run.ids),
                "point": report.point,
                "cause": report.cause.id if report.cause else None,
                "reason": report.reason,
            }
            yield "planted", row


def _named(cause: Cause, ids: tuple[str, ...]) -> bool:
    """Tell whether a cause is one of these ids, or cannot be told from one on the same dump."""
    return bool({cause.id, *cause.equivalent} & set(ids))


def false_alarms(runs: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (profile, {"alarms", "runs", "points"}) for every profile but equals of one before."""
    with tempfile.TemporaryDirectory() as tmp:
        models = {}
        for name in ("random-bf16", "k2-instruct"):
            folder = Path(tmp) / name
            if name == "random-bf16":
                write_random(folder, "bf16", seed=5)
            else:
                write_member(folder, name, seed=6)
            models[name] = load(folder, "float64", reference=True)
        done: list[Profile] = []
        for profile in PROFILES.values():
            alike = [p for p in done if replace(p, name="") == replace(profile, name="")]
            if alike:
                continue
            done.append(profile)
            model = models["k2-instruct" if profile.activations == "fp8/128" else "random-bf16"]
            alarms = [
                report.point
                for report in (_healthy(model, profile, i) for i in range(runs))
                if report.verdict != "pass"
            ]
            yield profile.name, {"alarms": len(alarms), "runs": runs, "points": alarms}


def _healthy(model: Model, profile: Profile, i: int) -> Report:
    """Return the report on healthy run number i."""
    rng = np.random.Generator(np.random.SFC64([i // TOGETHER, 77]))
    tokens = rng.integers(0, model.cfg.vocab_size, 6 + 4 * (i // TOGETHER % 6)).tolist()
    dump = rounded_run(model, profile, tokens, i)
    return check(model, dump, profile=profile)


@single_blas_thread()
def rounded_run(model: Model, profile: Profile, tokens: Sequence[int], seed: int) -> Dump:
    """Return the dump of every point of an engine of this profile that really rounds."""
    recorder = Recorder()
    engine = really_rounding(model.decoder, profile, seed, recorder)
    engine.logits(tokens)
    seen = {n: x for n, x in recorder.seen.items() if not n.endswith("#rows")}
    return Dump(model.checkpoint.path, seen, list(tokens), profile.storage)


def really_rounding(decoder: Decoder, profile: Profile, seed: int, seen: Recorder) -> Decoder:
    """Return the decoder as an engine of this profile computes, with real rounding; `seen` watches.

    seed  of the order in which sums are made
    """
    rng = np.random.Generator(np.random.SFC64(seed))
    nx = reproducible_policy("float64" if profile.sums == "float64" else "float32")

    def linear(x: np.ndarray, m: Matrix) -> np.ndarray:
        if profile.activations == "int8/32":
            x = _nearest_int8(x)
        elif profile.activations == "fp8/128" and isinstance(m, Fp8Block):
            x = _nearest_e4m3(x)
        w = dequantize(m, x.dtype)
        if profile.activations in ROUND:
            x, w = (ROUND[profile.activations](operand) for operand in (x, w))
        order = rng.permutation(x.shape[1])
        cuts = np.sort(rng.integers(0, x.shape[1] + 1, 3))
        y = np.zeros((len(x), len(w)), x.dtype)
        for part in np.split(order, cuts):
            y += x[:, part] @ w[:, part].T
        return y

    def watch(path: str, x: np.ndarray) -> np.ndarray:
        if x.dtype.kind == "f":
            x = ROUND[storage_of(profile, path)](x)
        x = seen(path, x)
        if profile.cache in ROUND and path.endswith(("kv_a_layernorm", "#k_pe")):
            x = ROUND[profile.cache](x)
        return x

    engine = decoder.using(replace(nx, linear=linear, watch=watch))
    if profile.cache is None or profile.cache in ROUND:
        return engine
    form = CACHES[profile.cache][0]
    return reading(engine, lambda i: form)


def _groups(x: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Yield groups of so many columns."""
    for start in range(0, x.shape[1], size):
        yield x[:, start : start + size]


def _nearest_int8(x: np.ndarray) -> np.ndarray:
    """Round as ggml's Q8_0: to codes times a step for each 32, largest/127 in float16."""
    out = []
    for part in _groups(x, 32):
        step = np.abs(part).max(axis=1, keepdims=True) / 127
        codes = np.rint(np.divide(part, step, out=np.zeros_like(part), where=step > 0))
        out.append(codes * round_float16(step))
    return np.concatenate(out, axis=1)


def _nearest_e4m3(x: np.ndarray) -> np.ndarray:
    """Round to the nearest e4m3 times a scale for each 128, largest/448."""
    positive = E4M3[:127].astype(x.dtype)
    out = []
    for part in _groups(x, 128):
        scale = np.abs(part).max(axis=1, keepdims=True) / 448
        size = np.divide(np.abs(part), scale, out=np.zeros_like(part), where=scale > 0)
        above = np.searchsorted(positive, size).clip(1, 126)
        low, high = positive[above - 1], positive[above]
        out.append(np.sign(part) * np.where(size - low < high - size, low, high) * scale)
    return np.concatenate(out, axis=1)


def interval(events: int, runs: int, level: float = 0.95) -> tuple[float, float]:
    """Return Clopper and Pearson's exact interval (Biometrika 26, 1934) for a rate."""
    tail = (1 - level) / 2

    def at_most(k: int, p: float) -> float:
        return sum(comb(runs, i) * p**i * (1 - p) ** (runs - i) for i in range(k + 1))

    def solve(holds: Callable[[float], bool]) -> float:
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if holds(middle) else (low, middle)
        return low

    lower = solve(lambda p: 1 - at_most(events - 1, p) < tail) if events else 0.0
    upper = solve(lambda p: at_most(events, p) > tail) if events < runs else 1.0
    return lower, upper
