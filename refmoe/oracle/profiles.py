"""Profiles of precision: read from an option's text, and guessed from the values of a dump.

A guess is the widest error that the values allow. Numbers that a type holds may have been stored in
it; numbers that it does not hold were not, but may have been computed from others that it held (a
head whose logits are float32, of products in bfloat16). Hence

    storage       the type that most outputs of matrix products have; without one, the narrowest of
                  any other tensor that is computed
    points        tensors that are all of a narrower type than storage; and the residual stream and
                  its norms of a wider one, which nobody would round on the way. The profile
                  without the latter is a second guess, for those who do
    logits,       of the router: float32, or as storage where the engine's conventions say so, or
    weights       the type of their values where that is narrower
    activations   storage, where norms are wider: both operands of products are rounded before

A declared profile is never guessed at, and never left.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from refmoe.config import Config
from refmoe.engines import ENGINES, PROFILES, Conventions, Profile, find_profile
from refmoe.files import InputError
from refmoe.model.formats.registry import find_scheme
from refmoe.model.points import POINTS, kind, parse
from refmoe.oracle.caches import CACHES, SHORT
from refmoe.oracle.noise import GROUPS, UNIT
from refmoe.oracle.readers.base import Dump

TYPES = ("bfloat16", "float16", "float32", "float64")  # the narrowest first
ACTIVATIONS = ("int8/32", "fp8/128", "bfloat16", "float16")
LEAST = 8  # numbers of which the type of a tensor is told
SHOWN = 4096  # numbers of a tensor that are looked at
WIDE_ANYWAY = (  # they say nothing of how the rest is stored
    *("model.embed_tokens", "mlp.gate", "#weights", "#experts", "#rows", "#scores", "#probs"),
    "lm_head",
)


# --- from text


def read_profile(text: str) -> Profile:
    """Return a profile by its name, with some of its types set: NAME[,SETTING=TYPE ...].

    A setting is a field of `Profile` (sums, logits, weights, angles, cache, activations), a group
    of points (norms, residual) or the end of a point's name (lm_head, mlp.experts). Raises
    `InputError` for one that is none of these, and for an unknown name or type.
    """
    name, *settings = [part.strip() for part in text.split(",")]
    profile = find_profile(name)
    points = dict(profile.points)
    for setting in settings:
        key, is_set, type = setting.partition("=")
        type = SHORT.get(type, type)
        if not is_set:
            raise InputError(f"profile {text!r}: {setting!r} is no SETTING=TYPE, as in {EXAMPLE}")
        if key in SETTINGS:
            _refuse_other(text, key, type, SETTINGS[key])
            profile = _with(profile, key, type)
        elif key in GROUPS or any(_kind_of(p.name).endswith(key) for p in POINTS if key):
            _refuse_other(text, key, type, TYPES)
            points[key] = type
        else:
            known = ", ".join((*SETTINGS, *GROUPS))
            raise InputError(
                f"profile {text!r}: {key!r} is no setting ({known}) and no end of a point's name"
            )
    named = replace(profile, points=tuple(points.items()))
    return replace(named, name=name_of(named, name)) if settings else profile


def _with(profile: Profile, field: str, type: str) -> Profile:
    """Return the profile with one of its types set."""
    changes: dict[str, Any] = {field: type}
    return replace(profile, **changes)


EXAMPLE = "bfloat16,lm_head=float32"
SETTINGS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("storage", "sums", "logits", "weights", "angles"), TYPES),
    "cache": tuple(CACHES),
    "activations": ACTIVATIONS,
}


def _refuse_other(text: str, key: str, type: str, known: Iterable[str]) -> None:
    """Raise `InputError` unless the type is a known one of this setting."""
    if type not in known:
        raise InputError(f"profile {text!r}: {key} is {type!r}; known: {', '.join(known)}")


def _kind_of(name: str) -> str:
    """Return the kind of a row of the table of points."""
    return name.replace(".L", "").replace(".experts.E", ".experts")


def name_of(profile: Profile, base: str) -> str:
    """Return the text that `read_profile` reads as this profile, beginning with a named one."""
    named = find_profile(base)
    said = [base]
    for f in fields(Profile):
        if f.name not in ("name", "points") and getattr(profile, f.name) != getattr(named, f.name):
            said.append(f"{f.name}={getattr(profile, f.name)}")
    said += [f"{end}={type}" for end, type in profile.points]
    return ",".join(said)


# --- from the values of a dump


@dataclass(frozen=True)
class Guess:
    """A profile that the values of a dump suggest, and how."""

    profile: Profile
    source: str


def guess_profiles(dump: Dump, engine: str | None, sides: Conventions) -> list[Guess]:
    """Return the profiles that the values of a dump suggest, the one to be tried first first.

    engine  as declared; one that rounds activations whatever it dumps has its own profile
    """
    own = next((e.profile for e in ENGINES if e.name == engine), None)
    if own is not None and own.activations is not None:
        return [Guess(own, f"{engine} rounds activations before products, whatever it dumps")]
    types = types_of_kinds(dump)
    storage, source = _storage(types, dump.rounded)
    profile = PROFILES[storage]
    if sides.router_logits == "activations":
        profile = replace(profile, logits=storage)
    for end, field in (("mlp.gate", "logits"), ("#weights", "weights")):
        seen = [_widest(types[k]) for k in types if k.endswith(end)]
        if seen and _narrower(seen[0], getattr(profile, field)):
            profile = _with(profile, field, seen[0])
            source += f", those of the router's {field} {seen[0]}"
    known = {k: _widest(t) for k, t in types.items() if not k.endswith(WIDE_ANYWAY)}
    points = [(_end(k), t) for k, t in known.items() if _narrower(t, storage)]
    wide = _wide_groups(known, storage)
    feeds = [k for k, t in known.items() if _feeds_products(k) and _narrower(storage, t)]
    if feeds and storage in ACTIVATIONS:
        profile = replace(profile, activations=storage)
    source += "".join(f", those of the {name} {type}" for name, type in wide)
    coarse = replace(profile, points=tuple(points))
    fine = replace(profile, points=(*points, *wide))
    found = [fine] if fine == coarse else [fine, coarse]
    return [Guess(replace(p, name=name_of(p, storage)), source) for p in found]


def types_of_kinds(dump: Dump) -> dict[str, Counter[str]]:
    """Return for each kind of point how many of its tensors are of which type, by their values.

    Tensors of which single numbers or printed decimals are known say nothing.
    """
    out: dict[str, Counter[str]] = {}
    for name, x in dump.arrays.items():
        if dump.step or name in dump.partial or parse(name).point is None:
            continue
        type = type_of(x)
        if type is not None:
            out.setdefault(kind(name), Counter())[type] += 1
    return out


def type_of(x: np.ndarray) -> str | None:
    """Return the narrowest type that holds these numbers; None where they are too few to tell."""
    if x.dtype.kind != "f":
        return None
    some = x.reshape(-1)
    some = some[:: max(1, len(some) // SHOWN)]
    some = some[np.isfinite(some) & (some != 0)]
    if len(some) < LEAST:
        return None
    if x.dtype == np.float16:
        return "float16"
    with np.errstate(over="ignore"):
        narrow = some.astype(np.float32)
        if (narrow != some).any():
            return "float64"
        if not (narrow.view(np.uint32) & 0xFFFF).any():
            return "bfloat16"
        return "float16" if (narrow.astype(np.float16) == narrow).all() else "float32"


def _storage(types: Mapping[str, Counter[str]], rounded: str) -> tuple[str, str]:
    """Return the type of storage, and how many tensors have it."""
    votes = Counter[str]()
    for k, t in types.items():
        if k.endswith("_proj") or k.endswith("with_mqa"):
            votes += t
    if votes:
        storage = votes.most_common(1)[0][0]
    else:
        others = {t for k, c in types.items() if not k.endswith(WIDE_ANYWAY) for t in c}
        others |= {t for t in types.get("lm_head", ()) if t in TYPES[:2]}
        storage = min(others, key=TYPES.index, default=rounded)
    every = sum(types.values(), Counter[str]())
    if not every:
        return storage, f"the values of the dump are {storage}"
    count = every.total()
    tensors = f"{every[storage]} of {count} tensors" if count > 1 else "its one tensor"
    return storage, f"the values of {tensors} are {storage}"


def shows_storage(dump: Dump) -> bool:
    """Tell whether the dump has an output of a matrix product inside the layers."""
    return any(k.endswith(("_proj", "with_mqa")) for k in types_of_kinds(dump))


def _widest(types: Counter[str]) -> str:
    """Return the type that holds the tensors of all layers."""
    return max(types, key=TYPES.index)


def _narrower(a: str, b: str) -> bool:
    """Tell whether values of type a are coarser than those of type b."""
    return UNIT[a] > UNIT[b]


def _end(k: str) -> str:
    """Return a kind without what all layers begin with."""
    return k.removeprefix("model.layers").lstrip(".") or k


def _wide_groups(known: Mapping[str, str], storage: str) -> list[tuple[str, str]]:
    """Return the groups of norms and residuals all of which are of one type wider than storage."""
    out = []
    for name, ends in GROUPS.items():
        found = {t for k, t in known.items() if k.endswith(ends)}
        if len(found) == 1 and _narrower(storage, type := found.pop()):
            out.append((name, type))
    return out


def _feeds_products(k: str) -> bool:
    """Tell whether tensors of this kind are multiplied by matrices inside the layers."""
    return k.endswith(("layernorm", ".act", "#context"))


# --- what was not declared, and may be


def other_profiles(
    dump: Dump, guess: Profile, engine: str | None, cfg: Config
) -> Iterator[Profile]:
    """Yield profiles that healthy engines have and that the values of this dump do not show.

    Layers in 16 bits where nothing inside them was dumped, activations rounded to 8 bits, a
    router's scores rounded as the rest.
    """
    storage = guess.storage
    if UNIT[storage] < UNIT["float16"] and not shows_storage(dump):
        for narrow in TYPES[:2]:
            yield replace(PROFILES[narrow], logits=narrow)
    if engine is None and storage == "float32" and guess.activations is None:
        yield PROFILES["llama.cpp-q8"]
    if storage in TYPES[:2]:
        coarse = replace(guess, logits=storage, weights=storage)
        if find_scheme(cfg.quantization, "fp8") is not None:
            wide = replace(coarse, weights=guess.weights, activations="fp8/128")
            yield replace(wide, name=name_of(wide, storage))
        if coarse != guess and not any(k.endswith("mlp.gate") for k in types_of_kinds(dump)):
            yield replace(coarse, name=name_of(coarse, storage))
