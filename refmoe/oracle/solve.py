"""Solve for a constant that is no engine's in particular: a factor, a limit, a position.

The fault is computed with one value after another in the place of the failing operation, and the
value that leaves least of the error is taken. A factor or limit is sought among powers of two and
then by golden section on its logarithm, to a millionth; a position among those at which the
engine's rows begin to be wrong.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from refmoe.oracle.faults.base import Fault

NEAR = (0.5, 0.1, 0.03, 0.01, 0.001)  # powers of two beside 1, as a factor may be almost right
POWERS = sorted([*map(float, range(-12, 13)), *NEAR, *(-x for x in NEAR)])
STEPS = 30  # of golden section
GOLDEN = (5**0.5 - 1) / 2
GAIN = 0.9  # of the error must be left at most by a power of two, or nothing is refined


def solve(
    fault: Fault, left: Callable[[Fault], float], error: float, begins: Sequence[int]
) -> tuple[Fault, str] | None:
    """Return the fault with the value that explains most, and what is said of it.

    left    what a fault leaves of the error at the failing point
    error   what no fault leaves
    begins  positions at which the engine's rows begin to be wrong
    Returns None where no value explains anything.
    """
    free = fault.free
    assert free is not None

    def leaves(value: float) -> float:
        return left(_with(fault, value))

    if free.sort == "position":
        tried = {t: leaves(t) for t in begins}
        if not tried or min(tried.values()) >= error:
            return None
        best = float(min(tried, key=lambda t: tried[int(t)]))
    else:
        by_power = {k: leaves(2.0**k) for k in POWERS}
        power = min(by_power, key=lambda k: by_power[k])
        if by_power[power] > GAIN * error:
            return None
        i = POWERS.index(power)
        low, high = POWERS[max(i - 1, 0)], POWERS[min(i + 1, len(POWERS) - 1)]
        best = 2.0 ** golden_section(lambda k: leaves(2.0**k), low, high, STEPS)
        if by_power[power] <= leaves(best):
            best = 2.0**power
    return _with(fault, best), f"{free.name} {best:.5g}"


def _with(fault: Fault, value: float) -> Fault:
    """Return the fault with this value of its constant."""
    assert fault.free is not None
    return replace(fault, alter=fault.free.alter(value))


def golden_section(f: Callable[[float], float], low: float, high: float, steps: int) -> float:
    """Return where f is least between low and high, to 0.618^steps of their distance.

    Source: Kiefer, Proceedings of the American Mathematical Society 4, 1953.
    """
    a, b = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    at_a, at_b = f(a), f(b)
    for _ in range(steps):
        if at_a < at_b:
            high, b, at_b = b, a, at_a
            a = high - GOLDEN * (high - low)
            at_a = f(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + GOLDEN * (high - low)
            at_b = f(b)
    return (low + high) / 2
