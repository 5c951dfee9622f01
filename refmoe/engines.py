"""The engines that run Kimi K2, one entry each: where they differ although all are right.

An entry (`Engine`) says which conventions the engine follows where correct engines compute
different numbers, in which precision it is usually run, how it reads YaRN's settings, and from
which repository and file each of these is known. Everything else is derived from the entries:

    CONVENTIONS          by name; `--conventions` and `check --engine` take one
    PROFILES             precisions by name, each engine's among them; `check --profile` takes one
    YARN_READINGS        how each engine reads a config's YaRN; lint lists them
    docs/conventions.md  is `page()`, which `python -m refmoe.engines` writes; a test compares them

To add an engine, add an entry to `ENGINES`.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from refmoe.files import InputError


@dataclass(frozen=True)
class Conventions:
    """One choice for each matter in which correct engines compute different numbers.

    docs/conventions.md explains every matter, with sources.
    """

    name: str
    latent_norm_eps: float | None = 1e-6  # q_a/kv_a norms; None: config.rms_norm_eps
    rounded_products: tuple[str, ...] = ()  # formats whose q·s is rounded to bf16: int4, fp8
    router_logits: Literal["wide", "activations"] = "wide"  # float32 at least, or as activations
    normaliser: Literal["sum + 1e-20", "sum", "max(sum, 2^-14)"] = "sum + 1e-20"
    routed_scale: Literal["weights", "sum"] = "weights"  # what γ multiplies: decides what is dumped
    masked_groups: float = float("-inf")  # choice score of experts in groups not chosen
    rope_layout: Literal["pairs", "halves"] = "pairs"  # of q_pe, k_pe in memory and in dumps
    yarn_betas: tuple[float, float] | None = None  # (fast, slow); None: the config's


@dataclass(frozen=True)
class Profile:
    """The precision of an engine: the floating-point type of each thing it computes or stores.

    Types are the keys of `refmoe.oracle.noise.UNIT`, which has their unit roundoffs.
    """

    name: str
    storage: str  # of every point
    sums: str = "float32"  # accumulation in matrix products
    logits: str = "float32"  # of the router
    weights: str = "float32"  # of the router
    angles: str = "float32"  # position · frequency
    cache: str | None = None  # latent and rotated key, where narrower than storage
    # before products: "int8/32", every one; "fp8/128", those of FP8 matrices; "bfloat16" and
    # "float16", both operands of every one, as torch.autocast does
    activations: str | None = None
    points: tuple[tuple[str, str], ...] = ()  # (end of a point's name, type) where not `storage`

    def __post_init__(self) -> None:
        """Take `points` as JSON has them, as lists."""
        object.__setattr__(self, "points", tuple((end, type) for end, type in self.points))


@dataclass(frozen=True)
class YarnReading:
    """How an engine takes YaRN's settings from config.json."""

    name: str  # of the engine, as lint prints it
    source: str
    one_mscale: bool = False  # takes mscale to be mscale_all_dim
    short: bool = False  # the softmax scale has mscale² only where the allocated length is longer
    betas: tuple[float, float] | None = None  # used whatever the config says: a convention


@dataclass(frozen=True)
class Engine:
    """One engine, and all that is known of it."""

    name: str
    conventions: Conventions | None = None  # None: known for its reading of YaRN alone
    profile: Profile | None = None  # as it is usually run
    yarn: YarnReading | None = None
    sources: Mapping[str, str] = field(default_factory=dict)  # by the key of a `Matter`
    rounds_as_activations: bool = False  # its rounded products: to nothing, where these are float32


ENGINES = (
    Engine(
        "refmoe",
        Conventions("refmoe"),
        yarn=YarnReading(
            "refmoe, transformers",
            "huggingface/transformers models/deepseek_v3/modeling_deepseek_v3.py",
        ),
    ),
    Engine(
        "moonshot",
        Conventions(
            "moonshot", rounded_products=("int4",), masked_groups=0.0, rope_layout="halves"
        ),
        Profile("moonshot", "bfloat16"),
        YarnReading(
            "Moonshot", "modeling_deepseek.py of K2-Instruct, as in mfarisadip/Kimi-K2-Mini"
        ),
        {"latent_norm_eps": "moonshotai/Kimi-K2-Instruct `modeling_deepseek.py`"},
    ),
    Engine(
        "transformers",
        Conventions("transformers", rounded_products=("int4",), rope_layout="halves"),
        Profile("transformers", "bfloat16"),
        sources={
            "latent_norm_eps": "huggingface/transformers `modeling_deepseek_v3.py`",
            "int4": "vllm-project/compressed-tensors `quantization/lifecycle/forward.py`",
            "masked_groups": "huggingface/transformers#45441",
            "rope_layout": "huggingface/transformers `apply_rotary_pos_emb_interleave`",
        },
    ),
    Engine(
        "deepseek",
        yarn=YarnReading("DeepSeek", "deepseek-ai/DeepSeek-V3 inference/model.py", short=True),
        sources={
            "router_logits": "deepseek-ai/DeepSeek-V3 `inference/model.py`",
            "masked_groups": "deepseek-ai/DeepSeek-V3 1398800",
        },
    ),
    Engine(
        "vllm",
        Conventions(
            "vllm",
            latent_norm_eps=None,
            rounded_products=("int4",),
            router_logits="activations",
            normaliser="sum",
            routed_scale="sum",
        ),
        Profile("vllm", "bfloat16", logits="bfloat16"),
        YarnReading(
            "vLLM",
            "vllm-project/vllm layers/rotary_embedding/deepseek_scaling_rope.py, "
            "models/deepseek_v2.py",
        ),
        {
            "latent_norm_eps": "vllm-project/vllm `deepseek_v2.py`",
            "int4": "vLLM's Marlin kernels multiply the dequantised code by the scale in the "
            "activations' dtype",
            "router_logits": "vllm-project/vllm `gate_linear.py`",
            "routed_scale": "vllm-project/vllm `deepseek_v2.py` (`apply_routed_scale_to_output`)",
        },
        rounds_as_activations=True,
    ),
    Engine(
        "sglang",
        Conventions(
            "sglang",
            latent_norm_eps=None,
            rounded_products=("int4",),
            router_logits="activations",
            masked_groups=0.0,
        ),
        Profile("sglang", "bfloat16", logits="bfloat16"),
        YarnReading("SGLang", "sgl-project/sglang srt/models/deepseek_v2.py"),
        {
            "normaliser": "sgl-project/sglang#31017",
            "routed_scale": "sgl-project/sglang `layers/moe/topk.py`",
        },
    ),
    Engine(
        "llama.cpp",
        Conventions(
            "llama.cpp",
            latent_norm_eps=None,
            normaliser="max(sum, 2^-14)",
            yarn_betas=(32.0, 1.0),  # its converter writes the betas, its loader never reads them
        ),
        Profile("llama.cpp", "float32", cache="float16", activations="int8/32"),
        YarnReading(
            "llama.cpp",
            "ggml-org/llama.cpp src/llama-context.cpp, src/models/deepseek2.cpp, #18013",
            one_mscale=True,
        ),
        {
            "latent_norm_eps": "ggml-org/llama.cpp `src/models/deepseek2.cpp`",
            "normaliser": "ggml-org/llama.cpp `src/llama-graph.cpp`",
            "yarn_betas": "ggml-org/llama.cpp#18013 and its deepseek2 loader",
        },
    ),
    Engine(
        "ktransformers",
        yarn=YarnReading(
            "KTransformers",
            "kvcache-ai/ktransformers operators/RoPE.py, models/modeling_deepseek_v3.py",
        ),
    ),
    Engine(
        "mlx",
        Conventions(
            "mlx",
            rounded_products=("fp8",),
            router_logits="activations",
            normaliser="sum",
            masked_groups=0.0,
        ),
        Profile("mlx", "bfloat16", logits="bfloat16"),
        YarnReading("mlx-lm", "ml-explore/mlx-lm mlx_lm/models/deepseek_v3.py"),
        {
            "latent_norm_eps": "ml-explore/mlx-lm `deepseek_v3.py`",
            "fp8": "ml-explore/mlx-lm `deepseek_v3.py`",
        },
    ),
)

CONVENTIONS = {e.name: e.conventions for e in ENGINES if e.conventions is not None}

GENERAL_PROFILES = (
    Profile("float64", "float64", "float64", "float64", "float64", "float64"),
    Profile("float32", "float32"),
    Profile("bfloat16", "bfloat16"),
    Profile("bfloat16-router", "bfloat16", logits="bfloat16", weights="bfloat16"),
    Profile("float16", "float16"),
    # DeepSeek's FP8: activations in e4m3, a scale for 128 (deepseek-ai/DeepSeek-V3 kernel.py)
    Profile("fp8-block", "bfloat16", logits="bfloat16", activations="fp8/128"),
    # Q8_0 activations before every product, f16 cache (ggml-org/llama.cpp ggml-cpu, defaults)
    Profile("llama.cpp-q8", "float32", cache="float16", activations="int8/32"),
)
PROFILES = {p.name: p for p in GENERAL_PROFILES}
PROFILES |= {e.name: e.profile for e in ENGINES if e.profile is not None}
YARN_READINGS = tuple(
    replace(e.yarn, betas=e.conventions.yarn_betas if e.conventions else None)
    for e in ENGINES
    if e.yarn is not None
)


def find_conventions(name: str) -> Conventions:
    """Return the conventions of the engine of this name; raise `InputError` for an unknown one."""
    if name not in CONVENTIONS:
        raise InputError(f"engine {name!r}; known: {', '.join(CONVENTIONS)}")
    return CONVENTIONS[name]


def in_precision(sides: Conventions, engine: str | None, profile: Profile) -> Conventions:
    """Return an engine's sides in this precision: whether it rounds products may depend on it."""
    rounds = any(e.rounds_as_activations for e in ENGINES if e.name == engine)
    wide = profile.storage in ("float32", "float64")
    return replace(sides, rounded_products=()) if rounds and wide else sides


def find_profile(name: str) -> Profile:
    """Return the precision profile of this name; raise `InputError` for an unknown one."""
    if name not in PROFILES:
        from difflib import get_close_matches  # only needed for a mistake

        near = get_close_matches(name, PROFILES, 2)
        meant = f"; did you mean {' or '.join(near)}?" if near else ""
        raise InputError(f"profile {name!r}{meant or ';'} known: {', '.join(PROFILES)}")
    return PROFILES[name]


def profile_of(rounded: str, engine: str) -> Profile:
    """Return the profile of an engine whose dumped values are of the type `rounded`.

    An engine that rounds activations before products does so whatever type it dumps: its own
    profile applies. For the others the type of the values is that of storage, and of the router's
    logits too where the engine's conventions say so.
    """
    own = next((e.profile for e in ENGINES if e.name == engine), None)
    if own is not None and own.activations is not None:
        return own
    if find_conventions(engine).router_logits == "activations":
        return replace(PROFILES[rounded], logits=rounded)
    return PROFILES[rounded]


# --- docs/conventions.md


@dataclass(frozen=True)
class Matter:
    """One row of docs/conventions.md: something on which correct engines differ."""

    key: str  # of `Engine.sources`, and the name that `--convention NAME=VALUE` takes
    title: str
    shown: Callable[[Conventions], str]
    why: str  # it matters
    values: Mapping[str, Any]  # by the text of a side: what the convention's field then is
    points: tuple[str, ...]  # ends of the names of points whose values depend on it
    departs: bool = False  # a side other than the published file's is a departure from the model
    fault: str | None = None  # what the dictionary of faults calls the taking of another side

    @property
    def field(self) -> str:
        """The field of `Conventions` that holds it."""
        return "rounded_products" if self.key in STORED else self.key

    def side(self, sides: Conventions) -> str:
        """Return the text of the side that these conventions take."""
        value = getattr(sides, self.field)
        if self.key in STORED:
            return "rounded" if self.key in value else "exact"
        known = [text for text, v in self.values.items() if v == value]
        return known[0] if known else _plain(value)

    def take(self, sides: Conventions, text: str) -> Conventions:
        """Return the conventions with this matter's side as the text says.

        Raises `InputError` for a side that is none of this matter's.
        """
        value = self.values[text] if text in self.values else self._number(text)
        if self.key in STORED:
            others = [f for f in sides.rounded_products if f != self.key]
            value = tuple(sorted([*others, *([self.key] if value else [])]))
        return replace(sides, **{self.field: value})

    def _number(self, text: str) -> Any:
        """Read a side that is a number, or two with a slash between."""
        parts = text.split("/")
        if self.key in NUMBERS and len(parts) == NUMBERS[self.key]:
            try:
                found = tuple(float(part) for part in parts)
            except ValueError:
                found = ()
            if found and all(isfinite(x) and x > 0 for x in found):
                return found if len(found) > 1 else found[0]
        form = (
            {1: ", or a number", 2: ", or FAST/SLOW"}[NUMBERS[self.key]]
            if (self.key in NUMBERS)
            else ""
        )
        known = ", ".join(f"{v!r}" if " " in v else v for v in self.values)
        raise InputError(f"convention {self.key}={text}: known values are {known}{form}")


STORED = ("int4", "fp8")  # matters that are members of `Conventions.rounded_products`
NUMBERS = {"latent_norm_eps": 1, "yarn_betas": 2}  # how many numbers such a side is
ATTENTION = ("#scores", "#probs", "#context", "#context_latent", "o_proj", "self_attn")


def _plain(value: Any) -> str:
    """Return a side that has no name as numbers."""
    return "/".join(f"{x:g}" for x in value) if isinstance(value, tuple) else f"{value:g}"


def _product(stored_format: str) -> Callable[[Conventions], str]:
    """Return how a stored code times its scale is shown: exact, or rounded to bf16."""
    return lambda c: "rounded to bf16" if stored_format in c.rounded_products else "exact"


def _or_config(value: Any, text: str) -> str:
    """Return `text`, or "config" where the convention is to take config.json's value."""
    return "config" if value is None else text


MATTERS = (
    Matter(
        "latent_norm_eps",
        "ε of `q_a_layernorm` and `kv_a_layernorm`",
        lambda c: _or_config(c.latent_norm_eps, "1e-6"),
        "K2-Thinking and later models have `rms_norm_eps` 1e-5, and the two inner norms of "
        "Moonshot's file never receive it. It shows in latents of small norm.",
        {"config": None, "1e-6": 1e-6},
        ("q_a_layernorm", "kv_a_layernorm"),
        True,
        "norm-eps-latent",
    ),
    Matter(
        "int4",
        "INT4 code times scale",
        _product("int4"),
        "Rounding changes a weight by up to 2⁻⁹, and the logits by 1e-3. The kernels of llama.cpp "
        "and MLX are exact.",
        {"exact": False, "rounded": True},
        ("_proj", ".act", "mlp.experts"),
    ),
    Matter(
        "fp8",
        "FP8 code times scale",
        _product("fp8"),
        "As for INT4. mlx-lm stores the weight as bf16 once it is scaled.",
        {"exact": False, "rounded": True},
        ("_proj", "kv_a_proj_with_mqa", ".act", "mlp.experts", *ATTENTION),
    ),
    Matter(
        "router_logits",
        "type of the router's logits",
        lambda c: {"wide": "float32 or wider", "activations": "as the activations"}[
            c.router_logits
        ],
        "A near tie in score + bias picks another expert, and that is another network.",
        {"wide": "wide", "activations": "activations"},
        ("mlp.gate", "#experts"),
    ),
    Matter(
        "normaliser",
        "divisor of the chosen experts' weights",
        lambda c: c.normaliser.replace("2^-14", "2⁻¹⁴"),
        "It makes no difference to a healthy token. Where all chosen sigmoids underflow, it "
        "decides whether the result is 0/0.",
        {"sum + 1e-20": "sum + 1e-20", "sum": "sum", "max(sum, 2^-14)": "max(sum, 2^-14)"},
        ("#weights",),
    ),
    Matter(
        "routed_scale",
        "what `routed_scaling_factor` multiplies",
        lambda c: {"weights": "each weight", "sum": "the routed sum"}[c.routed_scale],
        "A sum is linear, so only the dumped weights differ, by 2.827 in K2. SGLang does either, "
        "depending on its backend.",
        {"weights": "weights", "sum": "sum"},
        ("#weights", "mlp.experts"),
        fault="scaling-dropped",
    ),
    Matter(
        "masked_groups",
        "score of experts in refused groups",
        lambda c: "−∞" if c.masked_groups == float("-inf") else f"{c.masked_groups:g}",
        "It matters with more than one group only (DeepSeek-V3): with 0, an expert of a refused "
        "group wins where the others' biased scores are negative.",
        {"-inf": float("-inf"), "0": 0.0},
        ("#experts",),
    ),
    Matter(
        "rope_layout",
        "rotated channels in memory",
        lambda c: c.rope_layout,
        "The products q·k are the same. Dumps and caches cannot be compared element by element.",
        {"pairs": "pairs", "halves": "halves"},
        ("#q_pe", "#k_pe"),
    ),
    Matter(
        "yarn_betas",
        "YaRN's betas",
        lambda c: _or_config(c.yarn_betas, " / ".join(f"{b:g}" for b in c.yarn_betas or ())),
        "K2-Instruct, 0905 and Thinking say 1/1: with 32/1, 11 of 32 frequencies are wrong.",
        {"config": None, "32/1": (32.0, 1.0)},
        ("#q_pe", "#k_pe"),
        True,
        "yarn-betas",
    ),
)

MATTER = {m.key: m for m in MATTERS}


def read_conventions(engine: str, settings: Iterable[str] = ()) -> Conventions:
    """Return an engine's conventions with some set otherwise, each setting being NAME=VALUE.

    Raises `InputError` for an unknown engine, name or value, and where one is given twice.
    """
    sides, given = find_conventions(engine), set[str]()
    for setting in settings:
        name, is_set, text = setting.partition("=")
        known = ", ".join(MATTER)
        if not is_set or name not in MATTER:
            found = f"convention {name!r}" if is_set else f"{setting!r} is no NAME=VALUE"
            raise InputError(f"{found}; known names: {known}")
        if name in given:
            raise InputError(f"convention {name} is given twice")
        given.add(name)
        sides = MATTER[name].take(sides, text.strip())
    return sides


def other_sides(matter: Matter, sides: Conventions) -> dict[str, list[str]]:
    """Return the sides of a matter that these conventions do not take: text → who takes it."""
    out: dict[str, list[str]] = {}
    for name, theirs in CONVENTIONS.items():
        out.setdefault(matter.side(theirs), []).append(name)
    out.pop(matter.side(sides), None)
    return out


def published_side(matter: Matter) -> str:
    """Return the side of the modelling file that is published with the weights."""
    return matter.side(CONVENTIONS["moonshot"])


PAGE = """# Where correct engines differ

Each row is a matter on which engines that are right in themselves compute different numbers. The
first column of values is the definition here; `--conventions NAME` follows another engine in all
of them. `moonshot` is the modelling file that Moonshot publishes with the weights. This page is
[refmoe/engines.py](../refmoe/engines.py), written by `python -m refmoe.engines
docs/conventions.md`.

{table}

{reasons}

`check --convention NAME=VALUE` sets one of them alone, `--engine` the others. An engine that takes
another side than the published file in a matter marked *departs* computes another model: a dump
that takes the published side instead passes, too, and the report says which it saw.

{names}

The softmax scale is (nope + rope)^-½ · mscale_all_dim² from the config alone in all of them;
DeepSeek's own `inference/model.py` applies the mscale term only where the allocated length exceeds
the original one. Equal router scores go to the lower index here; elsewhere the order is
unspecified.

## Precision

`check --profile NAME` allows for the rounding of the engine as it is usually run:

{profiles}
"""


def page() -> str:
    """Return docs/conventions.md."""
    engines = [(e, e.conventions) for e in ENGINES if e.conventions is not None]
    table = [
        ["matter", *(e.name for e, _ in engines)],
        *([m.title, *(m.shown(c) for _, c in engines)] for m in MATTERS),
    ]
    reasons = [["matter", "why it matters", "sources"]]
    for m in MATTERS:
        sources = "; ".join(e.sources[m.key] for e in ENGINES if m.key in e.sources)
        reasons.append([m.title, m.why, sources])
    named = [["name", "values", "departs"]]
    for m in MATTERS:
        more = {1: ["a number"], 2: ["FAST/SLOW"]}.get(NUMBERS.get(m.key, 0), [])
        allowed = ", ".join([*(f"`{v}`" for v in m.values), *more])
        named.append([f"`{m.key}`", allowed, "departs" if m.departs else ""])
    columns = ["storage", "sums", "logits", "weights", "angles", "cache", "activations"]
    profiles = [["engine", "points", "sums", "router logits", "router weights", "angles"]]
    profiles[0] += ["cache", "activations before a product"]
    for e in ENGINES:
        if e.profile is not None:
            values = [getattr(e.profile, c) or "as stored" for c in columns]
            profiles.append([e.name, *values])
    return PAGE.format(
        table=_markdown(table),
        reasons=_markdown(reasons),
        names=_markdown(named),
        profiles=_markdown(profiles),
    )


def _markdown(rows: list[list[str]]) -> str:
    """Return rows as a Markdown table; the first is its head."""

    def lines() -> Iterator[str]:
        for i, row in enumerate(rows):
            yield f"| {' | '.join(row)} |"
            if i == 0:
                yield "|---" * len(row) + "|"

    return "\n".join(lines())


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
