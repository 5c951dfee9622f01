"""Find under which conventions, profile and cache a dump is right, and whether that is enough.

What was declared is binding. What was not is settled so:

    convention   the engine's side. Where that departs from the published model, the published
                 side is as good, and the report says that it saw it. Any other side is named as
                 what would explain the dump: a fault where an engine was declared, or where the
                 side departs; undecided where it is a free choice and no engine was named
    profile      what the values suggest (profiles.py). One that they do not show but allow, and
                 that explains the dump, leaves it undecided
    cache        as wide as the tensors. A narrower one (caches.py) is recomputed from the dump's
                 own latents; if that leaves only rounding, the dump is undecided until it is
                 declared. One that was declared and fits in no known form is allowed for as noise,
                 unless a known fault explains the dump

A change is tried at the first wrong point, in its layer alone, and only where the point depends on
it. It is kept if it mends that point and spoils none.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np

from refmoe.engines import (
    CONVENTIONS,
    MATTERS,
    STORED,
    Conventions,
    Matter,
    Profile,
    in_precision,
    other_sides,
    published_side,
)
from refmoe.fast.reproducible import reproducible_policy
from refmoe.model.decoder import Decoder
from refmoe.model.points import kind, parse
from refmoe.oracle.caches import CACHES, Form, keeping
from refmoe.oracle.cause import find_cause, replay_until
from refmoe.oracle.envelope import Envelope, sample_envelope
from refmoe.oracle.forms.prefix import after
from refmoe.oracle.judge import Cause, Judgement, judge
from refmoe.oracle.profiles import Guess, guess_profiles, other_profiles
from refmoe.oracle.readers.base import Dump
from refmoe.oracle.replay import replay
from refmoe.progress import Said, say_nothing
from refmoe.run.load import Model

MOST_CHANGES = 6
HOPELESS = 0.3  # a relative error that no other precision explains
NARROW = ("e4m3", "e5m2", "int8", "q8_0", "int4", "q4_0", "bfloat16", "float16")


@dataclass(frozen=True)
class Setting:
    """All that a dump is held to."""

    sides: Conventions
    profile: Profile
    forms: Mapping[int, Form] = field(default_factory=dict)  # layer → form of its cache


@dataclass(frozen=True)
class Declared:
    """The settings that a user gave, and that are not searched."""

    engine: str | None = None
    sides: Conventions = CONVENTIONS["refmoe"]
    pinned: frozenset[str] = frozenset()  # matters that were set one by one
    profile: Profile | None = None
    cache: str | None = None


class Bench:
    """Judges one dump under any settings."""

    def __init__(
        self,
        model: Model,
        dump: Dump,
        tokens: Sequence[int],
        engine: str,
        attention: Literal["expanded", "absorbed", "auto"],
        alpha: float,
        runs: int,
        keep: bool,
        before: int = 0,
        progress: Said = say_nothing,
    ):
        self.model, self.dump, self.tokens = model, dump, tokens
        self.engine, self.attention = engine, attention
        self.alpha, self.runs, self.keep = alpha, runs, keep and not before
        self.before = before  # tokens that are not given
        self.progress = progress

    def decoder(self, setting: Setting) -> Decoder:
        """Return the float64 decoder under these settings."""
        nx = replace(reproducible_policy("float64", setting.sides), attention=self.attention)
        return after(keeping(self.model.decoder.using(nx), setting.forms), self.before)

    def judge(self, setting: Setting, envelope: Envelope | None = None) -> Judgement:
        """Judge the dump; by an envelope of other settings where one is given."""
        decoder = self.decoder(setting)
        exact = replay(self.dump, decoder, self.tokens)
        if envelope is None:
            identity = self.model.checkpoint.identity if self.keep else None
            if identity is not None and setting.forms:
                identity += " ".join(f" {i}: {form}" for i, form in setting.forms.items())
            how = self.tokens, exact.lenses, self.runs, identity, self.progress
            envelope = sample_envelope(decoder, setting.profile, *how)
        return judge(
            decoder,
            self.dump,
            self.tokens,
            exact,
            envelope,
            self.engine,
            setting.profile,
            self.alpha,
        )

    def misfit(self, case: Judgement, setting: Setting) -> float:
        """Return how far these settings leave the first wrong point, times what is explained."""
        point = case.report.point
        assert point is not None
        seen = replay_until(case, self.decoder(setting), point)
        ours, theirs = seen.ours.get(point), seen.theirs.get(point)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            return np.inf
        if point not in case.rows:  # choices: judged as a whole
            pairs = zip(ours.tolist(), theirs.tolist(), strict=True)
            return float(any(set(a) != set(b) for a, b in pairs)) * 2
        if not np.isfinite(ours).all():
            return np.inf
        return case.rows[point].multiple_of(ours, theirs)


class Change(NamedTuple):
    """One setting that was tried instead of another."""

    option: str  # that declares it
    sort: Literal["side", "free", "profile", "cache"]
    setting: Setting
    matter: Matter | None = None


@dataclass(frozen=True)
class State:
    """A judgement, the settings that it was made under, and what was changed for it."""

    setting: Setting
    case: Judgement
    changes: tuple[Change, ...] = ()

    @property
    def good(self) -> bool:
        """Whether nothing is wrong."""
        return self.case.report.verdict != "fault"

    def improves(self, other: "State") -> bool:
        """Tell whether this mends the first wrong point of the other and spoils none."""
        mine, before = wrong_points(self.case), wrong_points(other.case)
        return other.case.report.point not in mine and mine < before


def wrong_points(case: Judgement) -> set[str]:
    """Return the points that are outside, not finite, or choices that noise does not explain."""
    found = {p.name for p in case.report.points if p.multiple > 1}
    found |= {p for p, x in case.exact.theirs.items() if not np.isfinite(x).all()}
    return found | ({case.report.point} if case.report.point else set())


def settle(bench: Bench, declared: Declared, explain: bool = True) -> Judgement:
    """Judge a dump under what was declared, and under what else may be where nothing was.

    explain  False: do not look for undeclared settings that would explain a fault
    """
    guesses = (
        [] if declared.profile else guess_profiles(bench.dump, declared.engine, declared.sides)
    )
    profiles = [declared.profile] if declared.profile else [g.profile for g in guesses]
    tried = []
    for profile in profiles:
        state = _under(bench, declared, profile)
        tried.append(state)
        if state.good or _first_error(state.case) > HOPELESS:
            break
    best = tried[-1] if tried[-1].good else tried[0]
    guess = next((g for g in guesses if g.profile is best.setting.profile), None)
    facts = _facts(bench, declared, best, guess, tried[0])
    if best.good or not explain:
        return _telling(best.case, facts)
    return _explained(bench, declared, best, facts)


def _under(bench: Bench, declared: Declared, profile: Profile) -> State:
    """Judge under one profile; follow the published sides of departures, and the cache's forms."""
    sides = declared.sides
    if not declared.pinned & set(STORED):
        sides = in_precision(sides, declared.engine, profile)
    setting = Setting(sides, profile)
    if declared.cache is not None:
        setting = replace(setting, forms=_everywhere(bench, CACHES[declared.cache][0]))
    state = State(setting, bench.judge(setting))
    if not state.good and sides != declared.sides:  # it may round as in its usual precision
        usual = replace(setting, sides=declared.sides)
        other = State(usual, bench.judge(usual))
        state = other if other.good else state
    for change in _sides(state, declared):
        assert change.matter is not None
        if change.matter.departs and change.matter.side(change.setting.sides) == published_side(
            change.matter
        ):
            state = _tried(bench, state, change) or state
    if declared.cache is not None and not state.good:
        state = _in_some_form(bench, state, (declared.cache,)) or state
        if not state.good and cause_of(state.case, bench.progress) is None:
            noisy = replace(state.setting, forms={}, profile=replace(profile, cache=declared.cache))
            other = State(noisy, bench.judge(noisy), state.changes)
            state = other if other.good else state
    return state


def _everywhere(bench: Bench, form: Form) -> dict[int, Form]:
    """Return a form for the caches of all layers."""
    return dict.fromkeys(range(len(bench.model.decoder.layers)), form)


def _tried(bench: Bench, state: State, change: Change) -> State | None:
    """Return the state after a change; None where it does not mend the first wrong point.

    It is tried in the wrong layer first, then in all under the same envelope, then under its own.
    """
    if state.good:
        return None
    narrower = change.sort != "profile"
    if narrower and bench.misfit(state.case, change.setting) > 1:
        return None
    changes = (*state.changes, change)
    if narrower:
        quick = State(change.setting, bench.judge(change.setting, state.case.envelope), changes)
        if not quick.improves(state):
            return None
    new = State(change.setting, bench.judge(change.setting), changes)
    return new if new.good or new.improves(state) else None


# --- what may be changed


def _depends(case: Judgement, ends: tuple[str, ...]) -> bool:
    """Tell whether the first wrong point, or one judged with it, has a name with such an end."""
    point = case.report.point
    if point is None:
        return False
    return any(kind(p).endswith(ends) for p in (point, *case.report.judged_with(point)))


def _sides(state: State, declared: Declared) -> Iterator[Change]:
    """Yield every other side of the matters that the first wrong point depends on."""
    for matter in MATTERS:
        if matter.key in declared.pinned or not _depends(state.case, matter.points):
            continue
        for side in other_sides(matter, state.setting.sides):
            free = declared.engine is None and not matter.departs
            setting = replace(state.setting, sides=matter.take(state.setting.sides, side))
            quoted = f"'{matter.key}={side}'" if " " in side else f"{matter.key}={side}"
            yield Change(f"--convention {quoted}", "free" if free else "side", setting, matter)


ATTENDED = ("kv_b_proj", "#scores", "#probs", "#context", "#context_latent")


def _in_some_form(bench: Bench, state: State, types: Sequence[str]) -> State | None:
    """Return the state under the form of a narrow cache that leaves only rounding; None: none."""
    began = len(state.setting.forms)
    for _ in range(len(bench.model.decoder.layers) + 1):
        point = state.case.report.point
        if state.good or point is None or not _depends(state.case, ATTENDED):
            break
        layer = parse(point).layer
        trials = []
        for form in (f for name in types for f in CACHES[name]):
            forms = {**state.setting.forms, **_everywhere(bench, form)}
            if began and layer is not None:
                forms = {**state.setting.forms, layer: form}
            setting = replace(state.setting, forms=forms)
            if setting.forms != state.setting.forms:
                trials.append((bench.misfit(state.case, setting), form.type, setting))
        least, name, setting = min(trials, key=lambda t: t[0], default=(np.inf, "", state.setting))
        if least > 1:
            return None
        option = (
            ()
            if any(c.sort == "cache" for c in state.changes)
            else (Change(f"--cache {name}", "cache", setting),)
        )
        types, began = (name,), 1
        new = State(setting, bench.judge(setting), (*state.changes, *option))
        if not new.good and point in wrong_points(new.case):
            return None
        state = new
    return state if state.good else None


def _other_changes(bench: Bench, state: State, declared: Declared) -> Iterator[Change]:
    """Yield what might explain the first wrong point and was not declared, narrow caches aside."""
    yield from _sides(state, declared)
    if declared.profile is None and _first_error(state.case) <= HOPELESS:
        profile, cfg = state.setting.profile, bench.model.cfg
        for other in other_profiles(bench.dump, profile, declared.engine, cfg):
            setting = replace(state.setting, profile=other)
            yield Change(f"--profile {other.name}", "profile", setting)


def _first_error(case: Judgement) -> float:
    """Return the relative error of the first wrong point; 0 where it has none."""
    return next((p.rel_error for p in case.report.points if p.name == case.report.point), 0.0)


# --- what is told


def _facts(
    bench: Bench, declared: Declared, state: State, guess: Guess | None, first: State
) -> dict[str, object]:
    """Return what a report says of how its settings came about."""
    facts: dict[str, object] = {"seen": _seen(state)}
    if guess is not None:
        source = guess.source
        if first is not state:
            report = first.case.report
            source += f"; under {report.profile} {report.point} would be wrong: {report.reason}"
        facts |= {"profile_guessed": True, "profile_from": source}
    if declared.cache is not None:
        forms = dict.fromkeys(map(str, state.setting.forms.values()))
        facts["cache"] = " and ".join(forms) or f"{declared.cache}, allowed for as noise"
    return facts


def _seen(state: State) -> dict[str, str]:
    """Return the sides that were seen in place of the engine's own: matter → side."""
    sides = state.setting.sides
    return {c.matter.key: c.matter.side(sides) for c in state.changes if c.matter is not None}


def _telling(case: Judgement, facts: Mapping[str, object]) -> Judgement:
    """Return the judgement with these facts in its report."""
    return replace(case, report=replace(case.report, **facts))  # type: ignore[arg-type]


def _explained(
    bench: Bench, declared: Declared, first: State, facts: dict[str, object]
) -> Judgement:
    """Look for what explains a dump that is wrong under all that was declared or guessed."""
    state = plain = first
    others: list[State] = []  # good ones beside the state: under other profiles
    for _ in range(MOST_CHANGES):
        if state.good:
            break
        found = _next_states(bench, state, declared)
        if not found:
            break
        state, others = found[0], found[1:]
        if all(c.sort == "free" for c in _added(state, first)):
            plain = state  # sides that no engine was declared for: what remains is wrong in them
    if not state.good:
        return _telling(plain.case, {**facts, "seen": _seen(plain)})
    ways = [_added(s, first) for s in (state, *others)]
    facts = {**facts, "passes_under": tuple(" ".join(c.option for c in way) for way in ways)}
    if any(c.sort == "side" for c in ways[0]):
        return _telling(first.case, facts)
    report = first.case.report
    said = (
        f"{report.reason} under profile {report.profile} and the conventions of {bench.engine}; "
        f"{' or '.join(_explaining(s, way) for s, way in zip((state, *others), ways, strict=True))}"
        " leaves only rounding, and has to be declared if it is so: "
        f"{' or '.join(' '.join(c.option for c in way) for way in ways)}"
    )
    undecided = replace(report, verdict="undecidable", reason=said)
    return _telling(replace(first.case, report=undecided), facts)


def _added(state: State, first: State) -> tuple[Change, ...]:
    """Return what was changed since the first state."""
    return state.changes[len(first.changes) :]


def _next_states(bench: Bench, state: State, declared: Declared) -> list[State]:
    """Return the state after the first change that mends the first wrong point.

    If that is another profile, the states under all others that explain the dump follow.
    """
    found: list[State] = []
    for change in _other_changes(bench, state, declared):
        if found and change.sort != "profile":
            continue
        new = _tried(bench, state, change)
        if new is not None and (not found or new.good):
            found.append(new)
        if found and (change.sort != "profile" or not found[0].good):
            break
    if not found and declared.cache is None and not state.setting.forms:
        narrow = _in_some_form(bench, state, NARROW)
        found = [narrow] if narrow else []
    return found


def _explaining(state: State, changes: Sequence[Change]) -> str:
    """Return in words what was changed."""
    said = []
    for change in changes:
        if change.sort == "cache":
            forms = dict.fromkeys(map(str, state.setting.forms.values()))
            said.append(f"a cache in {' and '.join(forms)}")
        elif change.matter is not None:
            side = change.matter.side(change.setting.sides)
            takers = [e for e, sides in CONVENTIONS.items() if change.matter.side(sides) == side]
            said.append(f"the side of {', '.join(takers)}")
        else:
            said.append(f"profile {change.setting.profile.name}")
    return " with ".join(said)


def cause_of(case: Judgement, progress: Said = say_nothing) -> Cause | None:
    """Return the cause of a fault, but where a convention explains it all, no other.

    A dump that is right under another side has no fault but the one that is that side.
    """
    cause = find_cause(case, progress)
    if cause is None or not case.report.passes_under:
        return cause
    ways = " ".join(case.report.passes_under)
    sides = {m.fault for m in MATTERS if f"{m.key}=" in ways}
    return cause if sides & {cause.id, *cause.equivalent} else None
