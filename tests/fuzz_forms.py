"""Dumps in random forms, some of them damaged: none of these may pass, none of the others fail.

    python tests/fuzz_forms.py [--cases 2000] [--seed 0]

takes a healthy run of a real engine (golden/vllm), leaves out random tensors, cuts, pads, repeats
or splits the rest as engines do, and damages a random tensor of it, or none. Of a damaged dump the
verdict must be a fault or undecidable; of a healthy one a pass, or undecidable where a tensor that
is left says too little of its place. Each case is made from its seed alone; those that are wrong
are printed, and make the exit code 1. CI runs a few dozen through tests/test_fuzz.py.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np

import refmoe
from refmoe.engines import CONVENTIONS
from refmoe.model.matrix import dequantize
from refmoe.oracle.check import judge_dump
from refmoe.oracle.readers.adapt import adapt
from refmoe.oracle.readers.base import Arrays, Dump
from refmoe.oracle.readers.dump import read_dump
from refmoe.run.load import Model, golden_folder
from tests.conftest import ROOT

ENGINE = ROOT / "golden" / "vllm" / "bfloat16-healthy.safetensors"
SPLIT = ("q_b_proj", "#context", "#q_pe", "gate_proj", "up_proj", "act", "lm_head")
TOKENS = 8  # of the sixteen: causality makes the first rows a dump of their own


class Case(NamedTuple):
    """A dump, and what was done to make it."""

    dump: Dump
    form: str
    damage: str  # empty: none
    name: str  # of the tensor that was damaged


def base(model: Model) -> Dump:
    """Return the first rows of the engine's run, which are those of a shorter prompt."""
    dump = read_dump(ENGINE)
    assert dump.tokens is not None
    arrays = {n: x[:TOKENS] for n, x in adapt(dump.arrays, model.cfg).items() if x.ndim > 1}
    arrays = {n: x for n, x in arrays.items() if ".experts." not in n}
    return replace(dump, arrays=arrays, tokens=dump.tokens[:TOKENS])


def open_dequantized() -> Model:
    """Open tiny-k2 with every matrix in float64, as vLLM reads it: a case is ten times quicker."""
    model = refmoe.load(golden_folder() / "tiny-k2", "float64", reference=True)
    rounded = CONVENTIONS["vllm"].rounded_products

    def wide(w: Any) -> Any:
        if w is None:
            return None
        stored = isinstance(w, np.ndarray) or hasattr(w, "dequantize")
        return dequantize(w, np.float64, rounded) if stored else type(w)(*map(wide, w))

    d = model.decoder
    layers = [wide(w) for w in d.layers]
    experts = cache(lambda i, e: wide(d.experts[i](e)))
    tables = {n: wide(getattr(d, n)) for n in ("embed_tokens", "norm", "lm_head")}
    decoder = replace(d, layers=layers, **tables).with_experts(experts)
    return replace(model, decoder=decoder)


def cut(x: Arrays, rng: np.random.Generator) -> Arrays:
    at = int(rng.integers(1, TOKENS))
    return {n: a[at:] for n, a in x.items()}


def first(x: Arrays, rng: np.random.Generator) -> Arrays:
    at = int(rng.integers(1, TOKENS))
    return {n: a[:at] for n, a in x.items()}


def padded(x: Arrays, rng: np.random.Generator) -> Arrays:
    before, after = rng.integers(0, 4, 2)
    return {
        n: np.concatenate([0 * a[:1].repeat(before, 0), a, 0 * a[:1].repeat(after, 0)])
        for n, a in x.items()
    }


def overlapping(x: Arrays, rng: np.random.Generator) -> Arrays:
    at = int(rng.integers(2, TOKENS - 1))
    return {n: np.concatenate([a[:at], a[at - 2 :]]) for n, a in x.items()}


def batch(x: Arrays, rng: np.random.Generator) -> Arrays:
    return {n: np.stack([a] * 2) for n, a in x.items()}


def last_row(x: Arrays, rng: np.random.Generator) -> Arrays:
    return {n: a[-1:] if n in ("lm_head", "model.norm") else a for n, a in x.items()}


def one_rank(x: Arrays, rng: np.random.Generator) -> Arrays:
    of = int(rng.choice([2, 4]))
    rank = int(rng.integers(of))
    return {n: np.split(a, of, 1)[rank] if n.endswith(SPLIT) else a for n, a in x.items()}


FORMS: dict[str, Callable[[Arrays, np.random.Generator], Arrays]] = {
    "whole": lambda x, rng: x,
    "last rows": cut,
    "first rows": first,
    "padding": padded,
    "chunks that overlap": overlapping,
    "a batch": batch,
    "the head's last row": last_row,
    "one rank": one_rank,
}

DAMAGE: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "zeros": lambda x, rng: 0 * x,
    "reversed": lambda x, rng: x[..., ::-1].copy(),
    "times 1.3": lambda x, rng: x * np.float32(1.3),
    "noise": lambda x, rng: x * (1 + 0.3 * rng.standard_normal(x.shape)).astype(np.float32),
    "columns rolled": lambda x, rng: np.roll(x, 1, -1),
    "halves exchanged": lambda x, rng: np.roll(x, x.shape[-1] // 2, -1),
    "not finite": lambda x, rng: np.where(rng.random(x.shape) < 0.05, np.nan, x),
    "a column too few": lambda x, rng: x[..., 1:],
    "no rows": lambda x, rng: x[:0],
    "infinite": lambda x, rng: x + np.inf,
}

ORDER = ("reversed", "columns rolled", "halves exchanged")  # these change nothing else


def case(healthy: Dump, seed: int) -> Case:
    """Return the case of this seed."""
    rng = np.random.default_rng(seed)
    names = list(healthy.arrays)
    kept = sorted(rng.choice(names, int(rng.integers(1, len(names) + 1)), replace=False))
    form = str(rng.choice(list(FORMS)))
    arrays = FORMS[form]({n: healthy.arrays[n] for n in kept}, rng)
    damage = str(rng.choice(["", *DAMAGE])) if seed % 4 else ""
    name = str(rng.choice(kept))
    if name.endswith(("#experts", "#weights")) and damage in ORDER:
        damage = "zeros"  # engines order a token's experts as they like
    if damage:
        arrays[name] = DAMAGE[damage](arrays[name], rng)
    return Case(replace(healthy, arrays=arrays), form, damage, name)


def wrong_cases(model: Model, seeds: range) -> Iterator[tuple[int, Case, str]]:
    """Yield the seed, case and verdict where the verdict is wrong; count the others."""
    healthy = base(model)
    for seed in seeds:
        c = case(healthy, seed)
        report = judge_dump(
            model, c.dump, engine="vllm", profile="vllm", keep=False, explain=False
        ).report
        counted[c.form, "damaged" if c.damage else "healthy", report.verdict] += 1
        forbidden = "pass" if c.damage else "fault"
        if report.verdict == forbidden:
            yield seed, c, f"{report.verdict} at {report.point}: {report.reason}"


counted: Counter[tuple[str, str, str]] = Counter()


def main() -> int:
    """Run the cases and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = open_dequantized()
    found = 0
    for seed, c, said in wrong_cases(model, range(args.seed, args.seed + args.cases)):
        found += 1
        print(f"seed {seed}: {c.form}, {c.damage or 'healthy'} {c.name}: {said}", flush=True)
    for (form, state, verdict), count in sorted(counted.items()):
        print(f"{form:22} {state:8} {verdict:12} {count}")
    print(f"{args.cases} cases, {found} wrong")
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
