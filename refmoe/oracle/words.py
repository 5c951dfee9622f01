"""A report as lines of text, as `refmoe check` prints it."""

from collections.abc import Iterator

from refmoe.engines import CONVENTIONS, MATTER
from refmoe.oracle.check import Arbitration
from refmoe.oracle.forms.rows import ranges
from refmoe.oracle.judge import Coverage, Report

SHOWN = 5  # points, the worst first, unless all are asked for
UNMATCHED = 10  # names of the dump that are no points
THROUGH = 5  # points that are judged with the first wrong one
COLUMNS = (
    "rel error: measured, against float64; explained: the largest error that rounding explains;",
    "multiple: their ratio, over all tokens or for the worst one; above 1 it is more than rounding",
)


def report_lines(report: Report, every: bool = False, truth: bool = False) -> Iterator[str]:
    """Yield the lines of a report.

    every  all points, in the order of computation, instead of the worst
    truth  the report is of `check_truth`, end to end
    """
    how = "end to end" if truth else how_judged(report)
    yield (
        f"{report.compared} tensors compared, {how}; "
        f"profile {report.profile}{' (guessed)' if report.profile_guessed else ''}, "
        f"conventions of {report.engine}"
    )
    if report.profile_guessed:
        yield f"  guessed: {report.profile_from}"
    if report.cache:
        yield f"  cache: {report.cache}"
    if report.form is not None:
        yield f"  {report.form}"
    for note in report.notes:
        yield f"  {note}"
    for name, value in report.conventions.items():
        yield f"  convention: {convention_text(name, value)}"
    for name, side in report.seen.items():
        yield f"  convention: {seen_text(name, side, report.engine)}"
    yield ""
    yield f"{'rel error':>10} {'explained':>10} {'multiple':>9}  point"
    worst = sorted(report.points, key=lambda p: -p.multiple)
    for p in report.points if every else worst[:SHOWN]:
        yield f"{p.rel_error:10.1e} {p.envelope:10.1e} {p.multiple:9.2f}  {p.name}"
    if report.points:
        yield from (f"  {line}" for line in COLUMNS)
    yield ""
    flips = report.router
    yield f"router: {flips['flips']} choices differ, {flips['explained']} explained by noise"
    if report.missing:
        yield f"not in the dump: {len(report.missing)} points, first {report.missing[0]}"
    for name, why in list(report.unmatched.items())[:UNMATCHED]:
        yield f"not compared: {name}: {why}"
    yield ""
    at = f"{report.point}, " if report.point else ""
    yield f"{report.verdict.upper()}: {at}{report.reason}"
    if report.coverage is not None and report.verdict != "undecidable":
        yield coverage_text(report.coverage)
    through = report.judged_with(report.point)
    if through:
        more = f" and {len(through) - THROUGH + 1} more" if len(through) > THROUGH else ""
        first = through[: THROUGH - 1] if more else through
        yield f"judged together with {', '.join(first)}{more}, which the dump lacks"
    if report.passes_under and report.verdict == "fault":
        yield f"nothing would be wrong under {' or '.join(report.passes_under)}"
    yield from cause_lines(report)
    yield f"nominal chance of a false alarm in the whole report: {report.alpha:g}"


def how_judged(report: Report) -> str:
    """Return whose inputs the operations of a report were computed from."""
    across = sum(bool(p.through) for p in report.points)
    if not across:
        return "each operation on the engine's own inputs"
    if any("model.embed_tokens" in p.through for p in report.points) and across == len(
        report.points
    ):
        return "end to end"
    own = len(report.points) - across
    return f"{own} on the engine's own inputs, {across} across operations that the dump lacks"


def coverage_text(c: Coverage) -> str:
    """Return what a report covers: operations of the model, layers, positions."""
    covered = c.alone + c.together
    said = [f"covers {covered} of the model's {c.operations} operations"]
    if c.together:
        said[0] += f": {c.alone} alone, {c.together} judged together with them"
    if c.layers:
        said.append(f"none of layers {ranges(c.layers)}")
    judged, total = c.positions
    if judged < total:
        said.append(f"{judged} of {total} positions")
    return "; ".join(said)


def cause_lines(report: Report) -> Iterator[str]:
    """Yield the lines that name the cause of a fault, or describe an unknown one."""
    cause = report.cause
    if cause is None:
        if report.verdict == "fault" and not report.passes_under:
            yield f"CAUSE: no known fault fits{f'; {report.shape}' if report.shape else ''}"
        return
    yield f"CAUSE: {cause.text} [{cause.id}]"
    if cause.references:
        yield f"  as in {', '.join(cause.references)}"
    if cause.fitted:
        yield f"  {cause.fitted}"
    if cause.equivalent:
        yield f"  cannot be told apart here from: {', '.join(cause.equivalent)}"
    if cause.runner_up:
        worse = f", {cause.times_worse:.3g} times worse" if cause.times_worse else ""
        yield f"  next best: {cause.runner_up}{worse}"


def arbitration_lines(both: Arbitration, a: str, b: str) -> Iterator[str]:
    """Yield the lines that compare two dumps; `a` and `b` are their names."""
    for name, r in ((a, both.a), (b, both.b)):
        where = f" at {r.point}" if r.point else ""
        yield f"{name}: {r.verdict}{where} under profile {r.profile}; {r.reason}"
    if both.ratio is not None:
        yield f"errors of the first over the second: {both.ratio:.3g} at {both.shared} points"
    at = both.first_difference
    yield f"the same bits at {both.equal}{f'; they part at {at}' if at else ''}"
    further = {"a": a, "b": b}.get(both.further, "neither")
    yield f"further from float64: {further}"


def convention_text(name: str, value: str) -> str:
    """Return a convention of a report as a phrase: NAME from config.json (refmoe: 1e-06).

    A report of `check_truth` says the engine's value alone.
    """
    theirs, ours = split_convention(value)
    taken = "from config.json" if theirs in ("the config's", "None") else f"= {theirs}"
    return f"{name} {taken}{f' (refmoe: {ours})' if ours else ''}"


def seen_text(name: str, side: str, engine: str) -> str:
    """Return the side that a dump takes in place of its engine's as a phrase."""
    own = MATTER[name].side(CONVENTIONS[engine])
    taken = "of config.json" if side == "config" else f"= {side}"
    return f"{name} {taken} seen ({engine}: {own})"


def split_convention(value: str) -> tuple[str, str]:
    """Return the engine's value and refmoe's of one of `Report.conventions`."""
    theirs, found, ours = value.rpartition(" (here ")
    return (theirs, ours.removesuffix(")")) if found else (value, "")
