"""What a dump is held to: declared, guessed, or found to be another side than the engine's."""

import json
from dataclasses import replace

import numpy as np
import pytest

import refmoe
from refmoe import cli
from refmoe.engines import CONVENTIONS, MATTERS, PROFILES, published_side, read_conventions
from refmoe.files import InputError
from refmoe.oracle.check import check
from refmoe.oracle.faults.dictionary import BY_ID
from refmoe.oracle.profiles import guess_profiles, read_profile, type_of
from refmoe.oracle.readers.base import Dump
from refmoe.oracle.readers.dump import read_dump
from refmoe.oracle.selftest.power import rounded_run
from refmoe.oracle.trace import write
from refmoe.oracle.words import report_lines
from tests.conftest import ROOT

TOKENS = [i * 7 % 500 for i in range(16)]


@pytest.fixture(scope="module")
def model(random_bf16):
    return refmoe.load(random_bf16, "float64", reference=True)


def traced(folder, numerics="float32", conventions="refmoe", points=None):
    """Return the points of an engine of these conventions, in these numerics."""
    return refmoe.trace(refmoe.load(folder, numerics, conventions=conventions), TOKENS, points)


def dump_of(arrays, rounded="float32"):
    return Dump("", arrays, TOKENS, rounded)


# --- conventions


def test_each_convention_is_set_alone():
    sides = read_conventions(
        "llama.cpp", ["yarn_betas=config", "rope_layout=halves", "latent_norm_eps=2e-6"]
    )
    assert sides == replace(
        CONVENTIONS["llama.cpp"], yarn_betas=None, rope_layout="halves", latent_norm_eps=2e-6
    )
    assert read_conventions("vllm", ["int4=exact"]).rounded_products == ()
    assert read_conventions("vllm", ["fp8=rounded"]).rounded_products == ("fp8", "int4")
    assert read_conventions("refmoe", ["yarn_betas=32/1"]).yarn_betas == (32.0, 1.0)
    for engine, theirs in CONVENTIONS.items():  # an engine is the sum of its sides
        settings = [f"{m.key}={m.side(theirs)}" for m in MATTERS]
        assert replace(read_conventions("refmoe", settings), name=engine) == theirs


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("rope=halves", r"convention 'rope'; known names: latent_norm_eps, int4"),
        ("halves", r"'halves' is no NAME=VALUE; known names"),
        ("rope_layout=neox", r"rope_layout=neox: known values are pairs, halves"),
        ("yarn_betas=32", r"known values are config, 32/1, or FAST/SLOW"),
        ("latent_norm_eps=nan", r"known values are config, 1e-6, or a number"),
        ("latent_norm_eps=-1e-6", r"known values are config"),
    ],
)
def test_an_unknown_convention_is_refused_with_those_that_are_known(setting, said):
    with pytest.raises(InputError, match=said):
        read_conventions("vllm", [setting])
    with pytest.raises(InputError, match="given twice"):
        read_conventions("vllm", ["fp8=exact", "fp8=rounded"])


def test_departures_have_a_published_side_and_a_fault_of_the_dictionary():
    assert {m.key: published_side(m) for m in MATTERS if m.departs} == {
        "latent_norm_eps": "1e-6",
        "yarn_betas": "config",
    }
    assert {m.fault for m in MATTERS if m.fault} <= set(BY_ID)


def test_the_published_side_of_a_departure_passes_and_is_told(model, random_bf16):
    """An engine of the kind that takes the config's eps, mended so that it takes the file's."""
    mended = read_conventions("vllm", ["latent_norm_eps=1e-6"])
    dump = dump_of(traced(random_bf16, conventions=mended))
    report = check(model, dump, engine="vllm", profile="float32")
    assert report.verdict == "pass", report.reason
    assert report.seen == {"latent_norm_eps": "1e-6"}
    assert "  convention: latent_norm_eps = 1e-6 seen (vllm: config)" in report_lines(report)
    pinned = check(
        model, dump, engine="vllm", profile="float32", conventions=["latent_norm_eps=config"]
    )
    assert pinned.verdict == "fault"
    assert pinned.seen == {}


def test_a_departure_that_no_engine_was_declared_for_is_a_fault_with_its_remedy(model, random_bf16):
    report = check(model, dump_of(traced(random_bf16, conventions="vllm")))
    assert (report.verdict, report.cause.id) == ("fault", "norm-eps-latent")
    assert report.passes_under == (
        "--convention latent_norm_eps=config --convention routed_scale=sum",
    )
    assert any("nothing would be wrong under --convention" in line for line in report_lines(report))


def in_halves(arrays):
    """Return the arrays with rotated channels in halves, as transformers keeps them."""
    return {
        n: np.concatenate((x[..., 0::2], x[..., 1::2]), axis=-1)
        if n.endswith(("#q_pe", "#k_pe"))
        else x
        for n, x in arrays.items()
    }


def test_a_free_choice_is_undecided_unless_it_is_declared(model, random_bf16):
    dump = dump_of(in_halves(traced(random_bf16)))
    report = check(model, dump)
    assert report.verdict == "undecidable"
    assert report.passes_under == ("--convention rope_layout=halves",)
    assert report.cause is None
    assert "moonshot, transformers" in report.reason
    for declared in ({"engine": "transformers"}, {"conventions": ["rope_layout=halves"]}):
        assert check(model, dump, **declared).verdict == "pass"
    other = check(model, dump, engine="sglang", conventions=["latent_norm_eps=1e-6"])
    assert (other.verdict, other.cause) == ("fault", None)
    assert other.passes_under == ("--convention rope_layout=halves",)


def test_behind_a_free_choice_a_fault_is_found_where_it_is(model, random_bf16):
    """The layout is seen and told; the fault of a later layer keeps its place and its name."""
    arrays = in_halves(traced(random_bf16))
    arrays["lm_head"] = np.roll(arrays["lm_head"], 1, axis=-1)
    report = check(model, dump_of(arrays))
    assert (report.verdict, report.point) == ("fault", "lm_head")
    assert report.cause.id == "logits-shifted"
    assert report.seen == {"rope_layout": "halves"}


def test_the_options_are_read_on_the_command_line(random_bf16, tmp_path, capsys):
    arrays = in_halves(traced(random_bf16))
    write(tmp_path / "d.safetensors", arrays, {"tokens": json.dumps(TOKENS)})
    args = ["check", str(tmp_path / "d.safetensors"), "--model", str(random_bf16)]
    assert cli.main(args) == 2
    assert (
        "has to be declared if it is so: --convention rope_layout=halves" in capsys.readouterr().out
    )
    assert cli.main([*args, "--convention", "rope_layout=halves"]) == 0
    out = capsys.readouterr().out
    assert "profile float32 (guessed)" in out
    assert cli.main([*args, "--convention", "rope_layout=halves", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["profile_guessed"] is True
    assert document["profile_from"].endswith("are float32")
    for wrong, said in (
        (["--convention", "x=1"], "known names"),
        (["--profile", "bf16"], "profile 'bf16'; did you mean bfloat16? known: float64"),
        (["--cache", "fp4"], "cache 'fp4'; known: float32"),
    ):
        assert cli.main([*args, *wrong]) == 2
        assert said in capsys.readouterr().err


# --- profiles


def test_a_profile_is_read_with_types_of_its_own():
    profile = read_profile("bfloat16,lm_head=float32,logits=bfloat16,cache=f16")
    assert profile.points == (("lm_head", "float32"),)
    assert (profile.storage, profile.logits, profile.cache) == ("bfloat16", "bfloat16", "float16")
    assert read_profile(profile.name) == profile
    assert read_profile("bfloat16") is PROFILES["bfloat16"]
    for text, said in (
        ("bf16", "profile 'bf16'; did you mean bfloat16"),
        ("bfloat16,lm_head", "is no SETTING=TYPE"),
        ("bfloat16,lm_head=int3", "lm_head is 'int3'; known: bfloat16"),
        ("bfloat16,lm_haed=float32", "'lm_haed' is no setting"),
        ("bfloat16,cache=fp4", "cache is 'fp4'"),
    ):
        with pytest.raises(InputError, match=said):
            read_profile(text)


def test_the_type_of_a_tensor_is_the_narrowest_that_holds_it():
    x = np.random.default_rng(1).normal(size=100)
    assert type_of(x) == "float64"
    assert type_of(x.astype(np.float32)) == "float32"
    assert type_of(x.astype(np.float16).astype(np.float32)) == "float16"
    assert type_of((x * 8).astype(np.int8).astype(np.float32)) == "bfloat16"
    assert type_of(np.zeros(100)) is None
    assert type_of(np.arange(100)) is None


def test_a_guess_follows_the_products_and_not_the_majority(random_bf16):
    """Norms and the residual stream outnumber the few products that show how layers compute."""
    arrays = traced(random_bf16, "bfloat16")
    wide = traced(random_bf16, "float32")
    mixed = {n: x for n, x in wide.items() if n.endswith(("layernorm", "residual"))}
    mixed |= {n: arrays[n] for n in arrays if n.endswith("q_a_proj")}
    guess, coarse = guess_profiles(dump_of(mixed), None, CONVENTIONS["refmoe"])
    assert guess.profile.storage == coarse.profile.storage == "bfloat16"
    assert guess.profile.activations == "bfloat16"
    assert dict(guess.profile.points) == {"norms": "float32", "residual": "float32"}
    assert coarse.profile.points == ()
    (alone,) = guess_profiles(dump_of(wide), "vllm", CONVENTIONS["vllm"])
    assert alone.profile.storage == alone.profile.logits == "float32"


def test_layers_whose_precision_nothing_shows_are_undecided(model, random_bf16):
    """A bf16 engine with a float32 head: of its layers, the logits alone say nothing."""
    arrays = traced(random_bf16, "bfloat16", points=["model.norm", "lm_head"])
    head = model.decoder.lm_head
    logits = arrays["model.norm"] @ refmoe.model.matrix.dequantize(head, np.float32).T
    dump = dump_of({"lm_head": logits.astype(np.float32)})
    report = check(model, dump, engine="refmoe")
    assert report.verdict == "undecidable"
    assert report.profile_guessed
    assert report.passes_under == ("--profile bfloat16",)
    assert check(model, dump, profile="bfloat16").verdict == "pass"
    declared = check(model, dump, profile="float32")
    assert (declared.verdict, declared.profile_guessed) == ("fault", False)
    shown = dump_of({"model.norm": arrays["model.norm"], "lm_head": logits.astype(np.float32)})
    assert check(model, shown, engine="refmoe").verdict == "pass"


def test_a_declared_float32_is_not_left_for_a_dump_in_bfloat16(model, random_bf16):
    dump = dump_of(traced(random_bf16, "bfloat16"), "bfloat16")
    assert check(model, dump, profile="float32").verdict == "fault"
    report = check(model, dump)
    assert (report.verdict, report.profile) == ("pass", "bfloat16")


def test_types_of_points_are_noise_of_those_points_only(model):
    profile = read_profile("float32,self_attn.o_proj=bfloat16")
    dump = rounded_run(model, profile, TOKENS, seed=2)
    assert check(model, dump, profile=profile).verdict == "pass"
    report = check(model, dump, profile="float32")
    assert (report.verdict, report.point) == ("fault", "model.layers.0.self_attn.o_proj")
    guessed = check(model, dump)
    assert (guessed.verdict, guessed.profile) == ("pass", f"{profile.name},self_attn=bfloat16")


def test_a_fault_is_no_precision(model, random_bf16):
    """In float32 a thousandth is a fault wherever products inside the layers show the type."""
    arrays = traced(random_bf16)
    arrays["lm_head"] = arrays["lm_head"] * np.float32(1.001)
    report = check(model, dump_of(arrays), engine="refmoe")
    assert (report.verdict, report.point, report.passes_under) == ("fault", "lm_head", ())


def test_vllm_in_float32_rounds_no_product():
    """Its kernels round code times scale to the activations' type; the recorded run is healthy."""
    model = refmoe.load(None, "float64", reference=True)
    dump = read_dump(ROOT / "golden" / "vllm" / "float32-healthy.safetensors")
    report = check(model, dump, engine="vllm")
    assert report.verdict == "pass", report.reason
    assert "rounded_products" not in report.conventions
    report = check(model, dump, engine="vllm", conventions=["int4=rounded"])
    assert (report.verdict, report.point) == ("fault", "model.layers.1.mlp")
