"""All known faults."""

from collections.abc import Iterable

from refmoe.config import Config
from refmoe.model.points import kind
from refmoe.oracle.faults.attention import ATTENTION
from refmoe.oracle.faults.base import Fault
from refmoe.oracle.faults.experts import EXPERTS
from refmoe.oracle.faults.layers import ENDS, LAYERS
from refmoe.oracle.faults.norms import NORMS
from refmoe.oracle.faults.positions import POSITIONS
from refmoe.oracle.faults.router import ROUTER
from refmoe.oracle.faults.stored import STORED


def candidates(point: str, through: Iterable[str], cfg: Config | None = None) -> list[Fault]:
    """Faults that would show at this point, or at one that is judged with it."""
    return [
        f
        for f in FAULTS
        if any(kind(p).endswith(f.points) for p in (point, *through))
        and (cfg is None or f.where(cfg))
    ]


FAULTS: tuple[Fault, ...] = (
    ROUTER + EXPERTS + STORED + NORMS + POSITIONS + ATTENTION + LAYERS + ENDS
)
BY_ID = {f.id: f for f in FAULTS}

# Sets that give the same numbers, or do unless the points between them are in the dump
equivalent: tuple[tuple[str, ...], ...] = (
    ("scaling-dropped", "normalised-after-scaling"),
    ("gate-up-swapped", "silu-on-up"),  # but for dense and shared MLPs
    ("norm-kv-skipped", "cache-latent-unnormed"),
    ("rope-missing-k", "cache-key-unrotated"),
)
