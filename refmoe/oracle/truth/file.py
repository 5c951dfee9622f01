"""Read a truth file."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refmoe.config import Config
from refmoe.engines import Conventions, Profile
from refmoe.files import InputError
from refmoe.model.decoder import (
    check_tokens,
)
from refmoe.model.numerics import PRECISIONS
from refmoe.oracle.noise import UNIT
from refmoe.oracle.truth.layout import (
    COLUMNS,
    KEY,
    LOGITS,
    TOTAL,
    VERSION,
    WIDTH,
    Values,
    layout,
    mixtures,
    network_conventions,
)
from refmoe.weights.checkpoint import DTYPES, read_header


@dataclass(frozen=True)
class Truth:
    """A truth file as read: where it comes from, and its tensors."""

    path: Path
    cfg: Config
    tokens: list[int]
    numerics: str
    conventions: Conventions
    profiles: dict[str, Profile]
    arrays: dict[str, np.ndarray]
    facts: dict[str, Any]  # all that the file says of itself

    @property
    def top(self) -> int:
        return int(self.arrays["lm_head#ids"].shape[1])

    @property
    def margin(self) -> np.ndarray:
        """Score of the last expert taken minus that of the first refused, [T, M]; inf: none was."""
        score, K = self.arrays["gate#scores"].astype(np.float64), self.cfg.num_experts_per_tok
        if score.shape[2] == K:
            return np.full(score.shape[:2], np.inf)
        out: np.ndarray = score[:, :, K - 1] - score[:, :, K]
        return out

    def values(self, T: int) -> Values:
        """Return the points of the first T tokens."""
        a = {name: x[:T] for name, x in self.arrays.items()}
        out = {"model.norm": a["model.norm"], "lm_head#ids": a["lm_head#ids"]}
        out |= {LOGITS: a["lm_head#logprobs"], TOTAL: a["lm_head#logsumexp"][:, None]}
        for name, end in COLUMNS.items():
            layers = mixtures(self.cfg) if "gate" in name else range(self.cfg.num_hidden_layers)
            x = a.get(name, np.full((T, len(layers)), np.inf))  # groups, where there are none
            out |= {f"model.layers.{i}{end}": x[:, m] for m, i in enumerate(layers)}
        return {n: x.astype(np.float64) if x.dtype.kind == "f" else x for n, x in out.items()}


def read_truth(path: str | Path) -> Truth:
    """Read what `make` wrote; raise `InputError` that says what is wrong with the file."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    stored = read_header(path)
    raw = path.read_bytes()
    try:
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        facts = json.loads(header["__metadata__"][KEY])
        version = facts["version"]
    except (KeyError, TypeError, ValueError, RecursionError):
        raise InputError(f"{path}: no truth of refmoe's; golden make writes one") from None
    if version != VERSION:
        raise InputError(f"{path} is version {version}, this refmoe reads {VERSION}; make it anew")
    try:
        cfg, tokens, conventions, profiles = _parse_facts(facts)
        check_tokens(tokens, 0, cfg)
        sketches = stored.get("layers#sketch")
        rows = (len(tokens), cfg.num_hidden_layers, WIDTH)
        if sketches is None or sketches.shape != rows:  # before anything is as long as it claims
            raise InputError(f"layers#sketch is missing, or not {list(rows)}")
        wanted = layout(cfg, len(tokens), facts["top"], list(profiles))
        found = {name: (t.dtype, t.shape) for name, t in stored.items()}
        if found != wanted:
            odd = min(n for n in found | wanted if found.get(n) != wanted.get(n))
            raise InputError(f"{odd} is {found.get(odd)}, expected {wanted.get(odd)}")
        arrays = {}
        for name, t in stored.items():
            x = np.frombuffer(raw[t.start : t.start + t.nbytes], DTYPES[t.dtype])
            arrays[name] = x.reshape(t.shape)
        _check_arrays(arrays, cfg)
    except InputError as e:
        raise InputError(f"{path}: {e}") from None
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as e:
        raise InputError(f"{path}: what it says of itself makes no sense ({e!r})") from None
    return Truth(path, cfg, tokens, facts["numerics"], conventions, profiles, arrays, facts)


def _parse_facts(
    facts: dict[str, Any],
) -> tuple[Config, list[int], Conventions, dict[str, Profile]]:
    """Return config, tokens, conventions and profiles of the metadata; raise if one is wrong."""
    if hashlib.sha256(facts["config"].encode()).hexdigest() != facts["config_sha256"]:
        raise InputError("its config.json has not the sha256 beside it")
    cfg = Config.from_dict(json.loads(facts["config"]))
    tokens, top = facts["tokens"], facts["top"]
    if not isinstance(tokens, list) or not all(type(t) is int for t in tokens):
        raise InputError("tokens are no list of integers")
    if type(top) is not int or not 0 < top <= cfg.vocab_size:
        raise InputError(f"top = {top!r}, expected 1 to {cfg.vocab_size}")
    if facts["numerics"] not in PRECISIONS:
        raise InputError(f"numerics {facts['numerics']!r}; known: {', '.join(PRECISIONS)}")
    tuples = {k: tuple(v) for k, v in facts["conventions"].items() if isinstance(v, list)}
    profiles = [Profile(**p) for p in facts["profiles"]]
    for p in profiles:
        types = {p.storage, p.sums, p.logits, p.weights, p.angles, p.cache or p.storage}
        if not types <= set(UNIT) or not isinstance(p.name, str):
            raise InputError(f"profile {p.name!r} has types {sorted(types)}; known: {list(UNIT)}")
    conventions = Conventions(**facts["conventions"] | tuples)
    if not isinstance(conventions.name, str):
        raise InputError(f"conventions named {conventions.name!r}")
    network_conventions(conventions, cfg)
    return cfg, tokens, conventions, {p.name: p for p in profiles}


def _check_arrays(arrays: Mapping[str, np.ndarray], cfg: Config) -> None:
    """Raise `InputError` for NaN where numbers must be, for indices outside and for bad spreads."""
    for name, x in arrays.items():
        least = {"gate#scores": -np.inf, "gate#groups": np.inf}.get(name)  # refused; none was
        bad = ~np.isfinite(x) if x.dtype.kind == "f" else np.zeros(1, bool)
        if name.endswith("#spread"):
            bad = np.isinf(x) | (x[..., 1] < 0)[..., None]
        elif least is not None:
            bad &= x != least
        elif name == "lm_head#logprobs":
            bad |= x > 1e-3
        if bad.any():
            raise InputError(f"{name} has {int(bad.sum())} values that cannot be")
    for name, end in (("gate#experts", cfg.n_routed_experts), ("lm_head#ids", cfg.vocab_size)):
        x = np.sort(arrays[name], axis=-1)
        if x.size and (x.min() < 0 or x.max() >= end or (np.diff(x, axis=-1) == 0).any()):
            raise InputError(f"{name} has indices outside 0 to {end - 1}, or one twice")
