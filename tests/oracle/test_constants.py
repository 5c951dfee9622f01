"""Constants of the model that an engine has at any value are solved for, and nothing else is."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

import refmoe
from refmoe.config import Config
from refmoe.engines import PROFILES, Conventions
from refmoe.fast.threads import single_blas_thread
from refmoe.model.decoder import Decoder
from refmoe.model.rope import inv_freq
from refmoe.oracle.check import check, judge_dump
from refmoe.oracle.constants import measured, plain
from refmoe.oracle.faults.constants import CONSTANTS, known_values
from refmoe.oracle.faults.dictionary import BY_ID
from refmoe.oracle.judge import Cause, Report
from refmoe.oracle.readers.base import Dump
from refmoe.oracle.readers.dump import read_dump
from refmoe.oracle.selftest.power import really_rounding
from refmoe.oracle.trace import Recorder
from refmoe.run.load import Model
from tests.conftest import ROOT

TOKENS = [int(t) for t in np.random.default_rng(1).integers(0, 500, 24)]
Change = Callable[[str, np.ndarray], np.ndarray]


@cache
def tiny() -> Model:
    return refmoe.load(None, "float64", reference=True)


def configured(**changes: object) -> Decoder:
    """The decoder under another config; names with `yarn_` are YaRN's."""
    cfg = tiny().cfg
    own = {k: v for k, v in changes.items() if not k.startswith("yarn_")}
    of_yarn = {k.removeprefix("yarn_"): v for k, v in changes.items() if k.startswith("yarn_")}
    assert cfg.rope_scaling is not None
    yarn = replace(cfg.rope_scaling, **of_yarn)
    return replace(tiny().decoder, cfg=replace(cfg, rope_scaling=yarn, **own))


def with_latent_eps(eps: float) -> Decoder:
    decoder = tiny().decoder
    sides: Conventions = replace(decoder.nx.conventions, latent_norm_eps=eps)
    return decoder.using(replace(decoder.nx, conventions=sides))


@single_blas_thread()
def engine(
    precision: str,
    decoder: Decoder | None = None,
    change: Change = lambda path, x: x,
    keep: Callable[[str], bool] = lambda path: True,
    seed: int = 1,
) -> Dump:
    """The dump of an engine that really rounds, whose points are changed before it stores them."""
    recorder = Recorder()
    own = really_rounding(decoder or tiny().decoder, PROFILES[precision], seed, recorder)
    if decoder is not None:
        own = own.using(replace(own.nx, conventions=decoder.nx.conventions))
    stored = own.nx.watch
    assert stored is not None
    watch = own.nx.watching(lambda path, x: stored(path, change(path, x)))
    own.using(watch).logits(TOKENS)
    kept = {p: x for p, x in recorder.seen.items() if "#rows" not in p and ".experts." not in p}
    kept = {p: x for p, x in kept.items() if keep(p)}
    return Dump(tiny().checkpoint.path, kept, TOKENS, precision)


def modules_only(path: str) -> bool:
    """Points that forward hooks see of most engines."""
    return "#" not in path and "kv_b_proj" not in path


def judged(dump: Dump, precision: str) -> Report:
    return check(tiny(), dump, profile=precision)


def cause_of(dump: Dump, precision: str) -> Cause:
    report = judged(dump, precision)
    assert report.verdict == "fault"
    assert report.cause is not None, report.shape
    return report.cause


def turned(offset: int, *ends: str) -> Change:
    """Rotation as if these stood so many positions further on."""
    turn = np.exp(1j * offset * inv_freq(tiny().cfg))

    def change(path: str, x: np.ndarray) -> np.ndarray:
        if not path.endswith(ends):
            return x
        z = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
        return np.stack((z.real, z.imag), axis=-1).reshape(x.shape).astype(x.dtype)

    return change


def hidden(window: int, first: int) -> Change:
    """Probabilities of a mask that shows the last positions, and the first."""
    t = np.arange(len(TOKENS))
    seen = (t[:, None] - t < window) | (t < first)

    def change(path: str, x: np.ndarray) -> np.ndarray:
        if not path.endswith("#probs"):
            return x
        kept = x * seen[:, None]
        return (kept / kept.sum(axis=-1, keepdims=True)).astype(x.dtype)

    return change


def times(factor: float, end: str) -> Change:
    return lambda path, x: (x * factor).astype(x.dtype) if path.endswith(end) else x


CONFIGS = {
    "theta": (123456.0, {"rope_theta": 123456.0}),
    "yarn-factor": (17.0, {"yarn_factor": 17.0}),
    "mscale": (0.83, {"yarn_mscale": 0.83, "yarn_mscale_all_dim": 0.83}),
    "mscale-all-dim": (0.83, {"yarn_mscale_all_dim": 0.83}),
    "mscale-alone": (0.83, {"yarn_mscale": 0.83}),
    "routed-scaling": (1.9, {"routed_scaling_factor": 1.9}),
    "eps": (3e-4, {"rms_norm_eps": 3e-4}),
}


PRECISIONS = ["bfloat16", pytest.param("float32", marks=pytest.mark.long)]
KEPT = [
    pytest.param(lambda path: True, id="all", marks=pytest.mark.long),
    pytest.param(modules_only, id="modules"),
]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_with_another_value_is_named_with_that_value(name, precision):
    value, changes = CONFIGS[name]
    cause = cause_of(engine(precision, configured(**changes)), precision)
    assert f"constant-{name}" in (cause.id, *cause.equivalent)
    assert cause.solved is not None
    if cause.id == f"constant-{name}":
        assert abs(cause.solved.value - value) <= 4 * cause.solved.uncertainty
        assert cause.solved.uncertainty < 0.1 * value
        assert cause.solved.expected == pytest.approx(constant(name, tiny().cfg))
    else:  # one that is the same thing in other words, which the answer then has too
        assert name == "mscale"
        assert cause.id == "constant-softmax-scale"
        assert "mscale_all_dim) 0.83" in (cause.fitted or "")


def constant(name: str, cfg: Config) -> float:
    own = next(c for c in CONSTANTS if c.name == name)
    return own.value(cfg, tiny().decoder.nx.conventions)


def test_the_eps_of_the_inner_norms_is_solved_for():
    cause = cause_of(engine("float32", with_latent_eps(3e-4)), "float32")
    assert cause.id == "constant-eps-latent"
    assert cause.solved is not None
    assert abs(cause.solved.value - 3e-4) <= 4 * cause.solved.uncertainty < 1e-5


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("keep", KEPT)
def test_any_softmax_scale_is_solved_for(precision, keep):
    """A fault of the dictionary that is nearly as large, 1.2247 times, is not named."""
    right = constant("softmax-scale", tiny().cfg)
    cause = cause_of(engine(precision, None, times(1.21, "#scores"), keep), precision)
    assert cause.id in ("constant-softmax-scale", "constant-mscale")
    assert "constant-softmax-scale" in (cause.id, *cause.equivalent)
    if cause.id == "constant-softmax-scale":
        assert cause.solved is not None
        assert abs(cause.solved.value - 1.21 * right) <= 4 * cause.solved.uncertainty


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("name", "offset", "ends"),
    [
        ("offset", 24, ("#q_pe", "#k_pe")),
        ("offset-queries", 24, ("#q_pe",)),
        ("offset-keys", -1077, ("#k_pe",)),
    ],
)
def test_an_offset_of_positions_is_read_from_the_phases(name, offset, ends, precision):
    cause = cause_of(engine(precision, None, turned(offset, *ends)), precision)
    assert cause.id == f"constant-{name}"
    assert cause.solved is not None
    assert cause.solved.value == offset


def test_an_offset_shows_in_the_attention_of_a_dump_without_rotated_channels():
    dump = engine("bfloat16", None, turned(-3, "#k_pe"), modules_only)
    cause = cause_of(dump, "bfloat16")
    assert {cause.id, *cause.equivalent} == {"constant-offset-queries", "constant-offset-keys"}
    assert "of the keys alone -3" in (cause.fitted or "")
    assert "of the queries alone 3" in (cause.fitted or "")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("keep", KEPT)
@pytest.mark.parametrize(("window", "first"), [(5, 0), (9, 4)])
def test_the_length_of_a_window_is_found(window, first, keep, precision):
    cause = cause_of(engine(precision, None, hidden(window, first), keep), precision)
    assert cause.id == "constant-window"
    assert cause.solved is not None
    assert (cause.solved.value, cause.solved.expected) == (window, None)
    kept = f" and the first {first}" if first else ""
    assert cause.text == f"a token sees the last {window}{kept} positions, expected all"


def test_a_value_that_a_fault_of_the_dictionary_has_is_that_fault():
    dump = engine("bfloat16", configured(rope_theta=10000.0))
    cause = cause_of(dump, "bfloat16")
    assert cause.id == "rope-theta"
    assert cause.solved is not None
    assert cause.solved.whose == ("DeepSeek-V3",)
    assert "DeepSeek-V3 has 10000" in (cause.fitted or "")
    dump = engine("float32", None, turned(1, "#q_pe"))
    assert cause_of(dump, "float32").id == "rope-q-late"


def test_the_value_of_another_model_is_told_as_its():
    cause = cause_of(engine("bfloat16", configured(routed_scaling_factor=2.446)), "bfloat16")
    assert cause.id == "constant-routed-scaling"
    assert cause.text == "routed_scaling_factor is 2.446, expected 2.827, as Moonlight has it"
    cause = cause_of(engine("bfloat16", configured(rope_theta=1e6)), "bfloat16")
    assert cause.solved is not None
    assert cause.solved.whose == ("Qwen2.5",)


REAL = ROOT / "golden" / "vllm" / "bfloat16-healthy.safetensors"


@pytest.mark.parametrize(
    ("name", "changes", "right"),
    [
        ("theta", {"rope_theta": 40000.0}, 50000.0),
        ("yarn-factor", {"yarn_factor": 20.0}, 32.0),
        ("routed-scaling", {"routed_scaling_factor": 2.0}, 2.827),
        ("eps-every", {"rms_norm_eps": 1e-3}, 1e-5),  # vLLM gives the inner norms the config's
    ],
)
def test_of_a_running_vllm_the_value_it_has_is_told_where_the_config_has_another(
    name, changes, right
):
    """The engine is right, and what it is held to is not: it is named for what it has."""
    model = replace(tiny(), decoder=configured(**changes))
    report = check(model, read_dump(REAL), engine="vllm", keep=False)
    assert report.verdict == "fault"
    assert report.cause is not None
    assert report.cause.id == f"constant-{name}"
    assert report.cause.solved is not None
    assert abs(report.cause.solved.value - right) <= 4 * report.cause.solved.uncertainty


# --- what is no constant


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_healthy_engine_has_no_cause(precision):
    report = judged(engine(precision), precision)
    assert (report.verdict, report.cause) == ("pass", None)


def halves(path: str, x: np.ndarray) -> np.ndarray:
    return np.roll(x, x.shape[-1] // 2, axis=-1) if path.endswith("q_b_proj") else x


def one_row(path: str, x: np.ndarray) -> np.ndarray:
    if not path.endswith(("#q_pe", "#scores", "mlp.experts")):
        return x
    y = x.copy()
    y[7] *= 1.3
    return y


def one_head(path: str, x: np.ndarray) -> np.ndarray:
    if not path.endswith("#scores"):
        return x
    y = x.copy()
    y[:, 1] *= 1.1
    return y


def first_pairs(path: str, x: np.ndarray) -> np.ndarray:
    """The fastest eight pairs turn a tenth of a radian a position too far."""
    if not path.endswith(("#q_pe", "#k_pe")):
        return x
    z = x[..., 0::2] + 1j * x[..., 1::2]
    at = np.arange(len(x)).reshape(-1, *(1,) * (x.ndim - 1))
    z[..., :8] *= np.exp(0.1j * at)
    return np.stack((z.real, z.imag), axis=-1).reshape(x.shape).astype(x.dtype)


def noisy(path: str, x: np.ndarray) -> np.ndarray:
    if not path.endswith((".1.self_attn.o_proj", "#weights")):
        return x
    rng = np.random.default_rng(len(path))
    return (x * (1 + 0.03 * rng.standard_normal(x.shape))).astype(x.dtype)


@pytest.mark.parametrize("keep", KEPT)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("change", [halves, one_row, one_head, first_pairs, noisy])
def test_what_is_no_constant_gets_no_constants_name(change, precision, keep):
    dump = engine(precision, None, change, keep)
    case = judge_dump(tiny(), dump, profile=precision)
    assert case.report.verdict == "fault"
    cause = case.report.cause
    assert cause is None or cause.id in BY_ID


# --- the table


def test_every_constant_names_faults_of_the_dictionary():
    for c in CONSTANTS:
        assert set(c.faults) <= set(BY_ID), c.name
        assert c.id not in BY_ID, c.name


def test_published_values_are_those_of_the_members():
    by_name = {c.name: known_values(c) for c in CONSTANTS}
    assert by_name["theta"]["DeepSeek-V3"] == 10000
    assert by_name["theta"]["K2-Thinking"] == 50000
    assert by_name["yarn-factor"]["K2.5"] == 64
    assert by_name["routed-scaling"]["Moonlight"] == 2.446
    assert by_name["eps"]["K2-Instruct"] == 1e-6


def test_values_are_written_to_the_first_uncertain_digit():
    assert measured(123449.7, 52.0) == "123450 ± 50"
    assert measured(2.82718, 0.00028) == "2.8272 ± 0.0003"
    assert measured(2.994e-4, 3.2e-7) == "2.994e-04 ± 3e-07"
    assert measured(24.0, None) == "24"
    assert plain(10002.3, 4.0) == 10000
    assert plain(0.8302, 0.0003) == 0.83


@pytest.mark.parametrize("change", [halves, pytest.param(first_pairs, marks=pytest.mark.long)])
def test_from_logits_alone_no_value_is_made_up(change):
    dump = engine("float32", None, change, lambda path: path == "lm_head")
    report = judged(dump, "float32")
    assert report.verdict == "fault"
    assert report.cause is None or report.cause.id in BY_ID


@pytest.mark.long
def test_from_logits_alone_another_models_value_is_named():
    dump = engine("float32", configured(rope_theta=1e6), keep=lambda path: path == "lm_head")
    cause = cause_of(dump, "float32")
    assert cause.id == "constant-theta"
    assert cause.solved is not None
    assert cause.solved.whose == ("Qwen2.5",)
