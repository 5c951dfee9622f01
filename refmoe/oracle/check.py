"""Where does another engine first go wrong, beyond what its rounding explains?

Every operation is computed in float64 on the engine's *own* inputs: the watcher hands each of its
tensors back, so errors do not accumulate and the first wrong operation is the only wrong one. Where
the dump lacks a tensor, the operations around it are judged as one, and the report says which.

    e     = |theirs - ours| / |ours|                    RMS of each row
    noise = the same of emulated runs (noise.py), same inputs, a dozen times
    R, M  = RMS and maximum over rows of e / noise

log R and log M of a healthy engine are spread as those of one emulated run against the others;
the spread is pooled over the layers. SLACK allows for what the profile does not know of the engine.
All points of a report are one family of tests: Holm's correction keeps the chance of any false
alarm below `alpha`. Routing is compared as sets; a flip is explained if the scores that changed
places were nearer than the noise of a score; what follows uses the engine's choice.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import log
from typing import Any

import numpy as np

from refmoe.engines import PROFILES, Profile, profile_of
from refmoe.files import InputError
from refmoe.model.decoder import Decoder, policy
from refmoe.oracle import cause as causes
from refmoe.oracle.judge import Report, _judge
from refmoe.oracle.noise import envelope
from refmoe.oracle.readers.adapt import adapt
from refmoe.oracle.readers.base import Dump
from refmoe.oracle.replay import Replay
from refmoe.oracle.statistics import ALPHA, RUNS
from refmoe.run.load import Model


def check(
    model: Model,
    dump: Dump,
    tokens: Sequence[int] | None = None,
    *,
    engine: str = "refmoe",
    profile: Profile | str | None = None,
    alpha: float = ALPHA,
    runs: int = RUNS,
    keep: bool = True,
) -> Report:
    """Judge a dump of the same tokens and weights.

    engine   whose conventions it is to be held to
    profile  its precision; without one, that of the values in the dump
    keep     False: sample the envelope anew, and leave nothing on disk
    Raises `InputError` where tokens are missing, or a name is unknown.
    """
    return Case(model, dump, tokens, engine, profile, alpha, runs, keep).report


class Case:
    """A dump before its judge: both replays, and what can be asked of them afterwards."""

    def __init__(
        self,
        model: Model,
        dump: Dump,
        tokens: Sequence[int] | None = None,
        engine: str = "refmoe",
        profile: Profile | str | None = None,
        alpha: float = ALPHA,
        runs: int = RUNS,
        keep: bool = True,
        explain: bool = True,
    ):
        if isinstance(profile, str):
            if profile not in PROFILES:
                raise InputError(f"profile {profile!r}; known: {', '.join(PROFILES)}")
            profile = PROFILES[profile]
        tokens = dump.tokens if tokens is None else tokens
        if tokens is None:
            raise InputError(f"{dump.path}: it does not say its tokens; give them (--tokens FILE)")
        self.tokens, self.engine = tokens, engine
        self.decoder = model.decoder.using(policy("float64", engine))  # refuses unknown engines
        self.profile = profile or profile_of(dump.rounded, engine)
        self.dump = replace(dump, arrays=adapt(dump.arrays, model.cfg))
        self.exact = self.replay(self.decoder)
        self.envelope = envelope(
            self.decoder,
            self.profile,
            tokens,
            self.exact.lenses,
            runs,
            model.checkpoint.identity if keep else None,
        )
        self.report, self.rows = _judge(
            self.decoder, self.dump, self.exact, self.envelope, engine, self.profile, alpha
        )
        if explain and self.report.verdict == "fault":
            found = causes.find(self)
            shape = None if found else causes.describe(self)
            self.report = replace(self.report, cause=found, shape=shape)

    def replay(self, decoder: Decoder) -> Replay:
        """This decoder, or an altered one, on the engine's own inputs."""
        seen = Replay(self.dump, decoder)
        watched = decoder.nx.watching(seen)
        decoder.using(replace(watched, stop_at_nonfinite=False)).logits(self.tokens)
        return seen


@dataclass(frozen=True)
class Arbitration:
    """Two engines against float64: which is further, and whether either is at fault by itself.

    Also one engine against itself: prefill and decoding, two chunk sizes, two batch neighbours.
    Both then pass, and `first_difference` is where their bits part, None if they never do.
    """

    a: Report
    b: Report
    shared: int  # points of both
    equal: int  # of these, the same bit for bit
    first_difference: str | None
    ratio: float | None  # geometric mean of a's error over b's, at the points where both err

    @property
    def further(self) -> str:
        """The engine with the larger errors; neither, where they are within a factor of 1.5."""
        if self.ratio is None or 1 / 1.5 < self.ratio < 1.5:
            return "neither"
        return "a" if self.ratio > 1 else "b"

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "further": self.further}


def arbitrate(a: Case, b: Case) -> Arbitration:
    """Both judged on their own inputs, so that one engine's error is not the other's."""
    errors = {p.name: p.rel_error for p in b.report.points}
    pairs = [(p.rel_error, errors[p.name]) for p in a.report.points if p.name in errors]
    logs = [log(x / y) for x, y in pairs if x > 0 and y > 0]
    ratio = float(np.exp(np.mean(logs))) if logs else None
    shared = [p for p in a.exact.theirs if p in b.exact.theirs]
    differ = [p for p in shared if not np.array_equal(a.exact.theirs[p], b.exact.theirs[p])]
    first = differ[0] if differ else None
    return Arbitration(a.report, b.report, len(pairs), len(shared) - len(differ), first, ratio)
