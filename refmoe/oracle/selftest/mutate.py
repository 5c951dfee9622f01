"""`refmoe mutate`: plant every fault of the dictionary and see whether `check` finds it.

A mutant is an engine that really rounds (power.py), with one fault in one layer (faults/), and its
dump of every point but the experts' own. It is

    detected    where the verdict is fault
    placed      where the first wrong point is one at which that fault shows, in that layer
    named       where the cause is that fault, or one that these numbers cannot tell from it

A fault is *inert* on a checkpoint under a profile if it is not detected and either changes no bit
of the dump or, computed in float64, moves no point by more than `EFFECT` times what rounding
explains there and flips no choice that noise does not. It is then listed, and is no mutant. No
fault may be inert everywhere: four checkpoints have what faults need, tiny-k2, random ones with
INT4, with FP8 and groups, and one that is *loud*, with router biases that bf16 rounds coarsely and
values beyond float16.

A fault is planted in every layer of each checkpoint under one profile (`QUICK`), and under all the
others in the first layer where it has an effect; each layer has a prompt of its own. A quick run
is the first layers of the former.
"""

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from refmoe.engines import PROFILES, Profile
from refmoe.fast.threads import single_blas_thread
from refmoe.model.decoder import Decoder
from refmoe.model.points import kind, parse
from refmoe.oracle.cause import judged_points
from refmoe.oracle.check import judge_dump
from refmoe.oracle.faults.base import Fault, altered
from refmoe.oracle.faults.dictionary import BY_ID, same_as, select
from refmoe.oracle.judge import Judgement
from refmoe.oracle.readers.base import Dump
from refmoe.oracle.selftest.power import really_rounding
from refmoe.oracle.trace import Recorder
from refmoe.run.load import Model, load
from refmoe.weights.checkpoint import Checkpoint
from refmoe.weights.synthetic.members import write_member
from refmoe.weights.synthetic.random import write_random

EFFECT = 3.0  # times what rounding explains: a smaller effect need not be detected
TOKENS = 24  # of a prompt
LEAST = 2.0**-12  # strength that is tried
CHECKPOINTS = ("tiny-k2", "int4", "deepseek-v3", "loud")
NAMES = ("float32", "bfloat16", "float16", "fp8-block", "llama.cpp-q8", "vllm")
QUICK = (  # one profile of each checkpoint, under which every layer is tried
    ("tiny-k2", "bfloat16"),
    ("int4", "float32"),
    ("deepseek-v3", "float32"),
    ("loud", "float32"),
)


@dataclass
class Score:
    """How many mutants of one fault were detected, placed and named."""

    id: str
    runs: int = 0
    detected: int = 0
    placed: int = 0
    named: int = 0
    inert_on: set[str] = field(default_factory=set)
    missed: list[str] = field(default_factory=list)
    smallest: dict[str, float] = field(default_factory=dict)  # profile → strength still detected

    def as_json(self) -> dict[str, Any]:
        """Return the score as plain data."""
        return {**vars(self), "inert_on": sorted(self.inert_on)}


@dataclass(frozen=True)
class Mutant:
    """An engine with one fault, and how it was judged."""

    fault: Fault
    checkpoint: str
    profile: str
    layer: int | None
    case: Judgement

    @property
    def detected(self) -> bool:
        """Whether the verdict is fault."""
        return self.case.report.verdict == "fault"

    @property
    def placed(self) -> bool:
        """Whether the first wrong point is one at which the fault shows, in its layer."""
        point = self.case.report.point or ""
        found = (point, *judged_points(point, self.case.report.judged_with(point)))
        here = [p for p in found if self.layer is None or parse(p).layer == self.layer]
        return any(kind(p).endswith(self.fault.points) for p in here)

    @property
    def named(self) -> bool:
        """Whether the cause is the fault, or one that these numbers cannot tell from it."""
        cause = self.case.report.cause
        same = same_as(self.fault.id)
        return cause is not None and bool({cause.id, *cause.equivalent} & set(same))

    def __str__(self) -> str:
        report = self.case.report
        found = report.cause.id if report.cause else None
        where = "all" if self.layer is None else self.layer
        return f"{self.checkpoint}, {self.profile}, layer {where}: {report.point}, {found}"


def checkpoints(folder: Path) -> dict[str, Model]:
    """Return the four checkpoints in float64; random weights are written into the folder."""
    write_random(folder / "int4", "int4", seed=2)
    write_member(folder / "deepseek-v3", "deepseek-v3", seed=4)
    groups = {"n_routed_experts": 12, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}
    write_random(folder / "loud", "bf16", seed=5, shape=groups)
    make_loud(folder / "loud")
    return {name: _load(folder, name) for name in CHECKPOINTS}


def _load(folder: Path, name: str) -> Model:
    """Return one of the four checkpoints in float64."""
    return load(None if name == "tiny-k2" else folder / name, "float64", reference=True)


def make_loud(folder: Path) -> None:
    """Lower the router's biases by 34.5 and scale embeddings by 2¹⁷.

    bf16 holds such biases coarsely, and float16 does not hold such embeddings.
    """
    tensors = Checkpoint.open(folder).tensors
    for name, t in tensors.items():
        if name.endswith("e_score_correction_bias"):
            bias = np.memmap(t.file, np.float32, "r+", t.start, t.shape)
            bias -= 34.5
        elif name.endswith("embed_tokens.weight"):
            bits = np.memmap(t.file, np.uint16, "r+", t.start, t.shape)
            bits[(bits & 0x7FFF) != 0] += 17 << 7  # of a bf16's exponent


def mutate(
    folder: Path, quick: bool = False, ids: Sequence[str] = (), seeds: int = 1, jobs: int = 1
) -> Iterator[tuple[Fault, Score]]:
    """Yield each fault with its score, in the dictionary's order.

    quick  one profile of each checkpoint, the first layer with an effect, one prompt
    ids    these faults only; raises `InputError` for one that is not in the dictionary
    seeds  prompts of each mutant
    jobs   processes of one thread each that share the faults
    """
    wanted = select(ids)
    models = checkpoints(folder)
    if jobs == 1:
        mutator = Mutator(models, quick)
        for fault in wanted:
            yield fault, mutator.judge(fault, seeds)
        return
    with _one_thread_each(), ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        work = partial(_judge, folder, quick, seeds)
        yield from zip(wanted, pool.map(work, [f.id for f in wanted]), strict=True)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Give processes that are started meanwhile one thread, as they share the processors."""
    names = ("REFMOE_THREADS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@cache
def _mutator(folder: Path, quick: bool) -> "Mutator":
    """Return the mutator of this process."""
    models = {name: _load(folder, name) for name in CHECKPOINTS}
    return Mutator(models, quick)


def _judge(folder: Path, quick: bool, seeds: int, id: str) -> Score:
    """Return the score of one fault, in a process of its own."""
    return _mutator(folder, quick).judge(BY_ID[id], seeds)


def _makes_sense(checkpoint: str, profile: str) -> bool:
    """Tell whether a profile can be that of a checkpoint.

    FP8 activations need FP8 matrices, and float16 must not overflow.
    """
    if profile == "fp8-block":
        return checkpoint == "deepseek-v3"
    return not (checkpoint == "loud" and profile in ("float16", "llama.cpp-q8"))


class Mutator:
    """Makes mutants on all checkpoints and has them judged; envelopes are shared, on disk."""

    def __init__(self, models: dict[str, Model], quick: bool):
        every = [(m, p) for m in CHECKPOINTS for p in NAMES if _makes_sense(m, p)]
        self.models, self.quick, self.pairs = models, quick, QUICK if quick else every

    @single_blas_thread()
    def judge(self, fault: Fault, seeds: int) -> Score:
        """Return how many mutants of a fault were found."""
        score = Score(fault.id)
        for checkpoint in self.models:
            for mutant in self.mutants(fault, checkpoint, seeds, score):
                score.runs += 1
                score.detected += mutant.detected
                score.placed += mutant.detected and mutant.placed
                score.named += mutant.detected and mutant.named
                if not (mutant.detected and mutant.placed and mutant.named):
                    score.missed.append(str(mutant))
        if not self.quick:
            self.grade(fault, score)
        return score

    def tokens(self, checkpoint: str, seed: int = 0) -> list[int]:
        """Return a random prompt for this checkpoint."""
        rng = np.random.default_rng([seed, 9])
        vocabulary = min(500, self.models[checkpoint].cfg.vocab_size)
        return [int(t) for t in rng.integers(0, vocabulary, TOKENS)]

    def dump(self, checkpoint: str, profile: Profile, fault: Fault | None, **where: Any) -> Dump:
        """Return the dump of a run with the fault, or of a healthy one.

        `where` are arguments of `altered`, and `seed` for prompt and rounding.
        """
        seed = where.pop("seed", 0)
        model, tokens = self.models[checkpoint], self.tokens(checkpoint, seed)
        recorder = Recorder()
        engine = really_rounding(model.decoder, profile, seed, recorder)
        wrong = altered(engine, fault, **where) if fault else engine
        with np.errstate(all="ignore"):
            _without_stop(wrong).logits(tokens)
        seen = {n: x for n, x in recorder.seen.items() if ".experts." not in n and "#rows" not in n}
        return Dump(model.checkpoint.path, seen, tokens, profile.storage)

    def mutants(self, fault: Fault, checkpoint: str, seeds: int, score: Score) -> Iterator[Mutant]:
        """Yield mutants: the fault in every layer, or only in the first where it has an effect.

        Each is made with `seeds` prompts. Where the fault is inert, `score` is told.
        """
        model = self.models[checkpoint]
        for name in (p for m, p in self.pairs if m == checkpoint):
            everywhere = not self.quick and (checkpoint, name) in QUICK
            effective = False
            for layer in self.layers(fault, model):
                first = seeds * (layer or 0)  # layers have their own prompts
                for seed in range(first, first + seeds):
                    mutant = self.mutant(fault, checkpoint, name, layer, seed)
                    if mutant is not None:
                        effective = True
                        yield mutant
                if effective and not everywhere:
                    break
            if not effective:
                score.inert_on.add(f"{checkpoint}, {name}")

    def mutant(
        self, fault: Fault, checkpoint: str, name: str, layer: int | None, seed: int
    ) -> Mutant | None:
        """Return a mutant; None where the fault is inert (above)."""
        model, profile = self.models[checkpoint], PROFILES[name]
        dump = self.dump(checkpoint, profile, fault, layer=layer, seed=seed)
        case = judge_dump(model, dump, engine="refmoe", profile=profile)
        if case.report.verdict != "fault":
            same = self.dump(checkpoint, profile, None, seed=seed).arrays
            if all(np.array_equal(x, same[name]) for name, x in dump.arrays.items()):
                return None  # in this run it changed no bit
            exact = self.dump(checkpoint, PROFILES["float64"], fault, layer=layer, seed=seed)
            effect = judge_dump(model, exact, engine="refmoe", profile=profile).report
            most = max((p.multiple for p in effect.points), default=0.0)
            if most < EFFECT and not effect.router["unexplained"]:
                return None
        return Mutant(fault, checkpoint, name, layer, case)

    def layers(self, fault: Fault, model: Model) -> list[int | None]:
        """Return the layers the fault could be in, the ends first; [None] if it is in no layer."""
        if not fault.where(model.cfg):
            return []
        ends = ("embed_tokens", "model.norm", "lm_head")
        if all(point.endswith(ends) for point in fault.points):
            return [None]
        count = model.cfg.num_hidden_layers
        return [0, count - 1, *range(1, count - 1)]

    def grade(self, fault: Fault, score: Score) -> None:
        """Note the smallest strength that is still detected on tiny-k2, in quarters from 1."""
        if fault.strength is None or not score.detected:
            return
        for name in ("float32", "bfloat16"):
            profile, model = PROFILES[name], self.models["tiny-k2"]
            made = (
                self.mutant(fault, "tiny-k2", name, layer, 0) for layer in self.layers(fault, model)
            )
            first = next((m for m in made if m is not None and m.detected), None)
            if first is None:
                continue
            strength = 1.0
            while strength > LEAST:
                where = {"layer": first.layer, "strength": strength / 4}
                dump = self.dump("tiny-k2", profile, fault, **where)
                found = judge_dump(model, dump, engine="refmoe", profile=profile, explain=False)
                if found.report.verdict != "fault":
                    break
                strength /= 4
            score.smallest[name] = strength


def _without_stop(decoder: Decoder) -> Decoder:
    """Return the decoder without its stop at the first value that is not finite."""
    return decoder.using(replace(decoder.nx, stop_at_nonfinite=False))


def summary(scores: Sequence[Score]) -> dict[str, Any]:
    """Return the scores and their shares of all mutants as plain data."""
    runs = max(1, sum(s.runs for s in scores))
    return {
        "faults": [s.as_json() for s in scores],
        "runs": sum(s.runs for s in scores),
        **{
            key: sum(getattr(s, key) for s in scores) / runs
            for key in ("detected", "placed", "named")
        },
        "inert_everywhere": [s.id for s in scores if not s.runs],
    }


def run(quick: bool, ids: Sequence[str], seeds: int, jobs: int, show: Any) -> dict[str, Any]:
    """Score all faults in a temporary folder, and call show(fault, score, seconds) after each."""
    scores = []
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as tmp:
        for fault, score in mutate(Path(tmp), quick, ids, seeds, jobs):
            scores.append(score)
            show(fault, score, time.perf_counter() - began)
    return {**summary(scores), "seconds": time.perf_counter() - began}
