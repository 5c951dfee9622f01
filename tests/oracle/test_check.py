"""The oracle against real engines: healthy ones pass, planted faults are found where they are."""

import json
import pickle
import re
import subprocess
import sys
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy

import refmoe
from refmoe import cli
from refmoe.engines import CONVENTIONS
from refmoe.files import InputError
from refmoe.oracle.check import check
from refmoe.oracle.profiles import read_profile, type_of
from refmoe.oracle.readers.adapt import fit
from refmoe.oracle.readers.base import Dump
from refmoe.oracle.readers.dump import read_dump
from refmoe.oracle.selftest import power as bench
from refmoe.run.load import golden_folder
from refmoe.weights.synthetic.members import write_member
from tests.conftest import ROOT
from tests.run.test_tiny_k2 import PASSAGE

torch = pytest.importorskip("torch", reason="the peers extra is not installed")
pytestmark = pytest.mark.peers


engines = bench.engines()
make, dumper = engines.make, engines.dumper
MODEL = refmoe.load()
TOKENS = MODEL.tokenizer.encode(PASSAGE)[:32]


def test_mlx_passes_in_float32_from_logits_and_layers_alone():
    """Another engine, another attention, most points missing: judged as whole layers."""
    points = make.mlx_run(golden_folder() / "tiny-k2", TOKENS)
    dump = Dump(ROOT, {n: t.numpy() for n, t in points.items()}, TOKENS, "float32")
    report = check(MODEL, dump, engine="mlx")
    assert report.verdict == "pass", report.reason
    assert set(report.conventions) == {
        "rounded_products",
        "router_logits",
        "normaliser",
    }
    assert "model.layers.1.mlp.experts" in report.points[1].through


def test_logits_alone_are_judged_end_to_end(tmp_path):
    points = make.mlx_run(golden_folder() / "tiny-k2", TOKENS)
    logits = points["lm_head"].numpy()
    np.savez(tmp_path / "healthy.npz", lm_head=logits, tokens=np.array(TOKENS))
    report = check(MODEL, read_dump(tmp_path / "healthy.npz"), engine="mlx")
    assert (report.verdict, report.compared) == ("pass", 1)
    assert len(report.points[0].through) > 80
    off = logits * (1 + 1e-3)
    np.savez(tmp_path / "off.npz", lm_head=off, tokens=np.array(TOKENS))
    report = check(MODEL, read_dump(tmp_path / "off.npz"), engine="mlx", profile="float32")
    assert (report.verdict, report.point) == ("fault", "lm_head")
    report = check(MODEL, read_dump(tmp_path / "off.npz"), engine="mlx")
    assert report.verdict == "undecidable"
    assert "--profile bfloat16" in report.passes_under


def test_conventions_explain_what_is_no_fault(random_bf16):
    """An engine that takes the config's eps is at fault under our sides, and none under its own."""
    model = refmoe.load(random_bf16)
    tokens = [i * 7 % 500 for i in range(24)]
    theirs = refmoe.load(random_bf16, "float32", conventions="vllm")
    arrays = refmoe.trace(theirs, tokens)
    dump = Dump(ROOT, arrays, tokens, "float32")
    ours = check(model, dump)
    assert ours.verdict == "fault"
    assert ours.point == "model.layers.0.self_attn.q_a_layernorm"
    own = check(model, dump, engine="vllm")
    assert own.verdict == "pass", own.reason
    assert "latent_norm_eps" in own.conventions


def test_the_first_value_that_is_not_finite_is_a_fault(random_bf16):
    tokens = [1, 2, 3, 4]
    arrays = refmoe.trace(refmoe.load(random_bf16), tokens, ["model.layers.*", "lm_head"])
    arrays["model.layers.1.mlp"][2, 0] = np.nan
    report = check(refmoe.load(random_bf16), Dump(ROOT, arrays, tokens, "float32"))
    assert (report.verdict, report.point) == ("fault", "model.layers.1.mlp")
    assert report.reason == "not finite"

    json.dumps(report.as_json(), allow_nan=False)  # what the NaN spoilt downstream is left out


def test_scores_count_only_where_they_are_not_masked(random_bf16):
    tokens = [1, 2, 3, 4]
    arrays = refmoe.trace(refmoe.load(random_bf16), tokens)
    for name in (n for n in arrays if n.endswith("#scores")):
        arrays[name][~np.tri(4, dtype=bool)[:, None].repeat(5, axis=1)] = -np.inf
    report = check(refmoe.load(random_bf16), Dump(ROOT, arrays, tokens, "float32"))
    assert report.verdict == "pass", report.reason


def test_a_choice_is_judged_also_without_the_routers_logits(random_bf16):
    """One token swaps a chosen expert for one far below: caught from the router's input."""
    tokens = [1, 2, 3, 4, 5]
    arrays = refmoe.trace(refmoe.load(random_bf16), tokens)
    logits = arrays["model.layers.1.mlp.gate"]
    for name in [n for n in arrays if n.endswith(".mlp.gate") or "gate#weights" in n]:
        del arrays[name]
    for name in [n for n in arrays if ".experts" in n or n.endswith((".mlp", ".layers.1"))]:
        del arrays[name]
    model = refmoe.load(random_bf16)
    assert check(model, Dump(ROOT, arrays, tokens, "float32")).verdict == "pass"
    chosen = arrays["model.layers.1.mlp.gate#experts"]
    chosen[2, 0] = logits[2].argmin()
    report = check(model, Dump(ROOT, arrays, tokens, "float32"))
    assert (report.verdict, report.point) == ("fault", "model.layers.1.mlp.gate#experts")
    assert "token 2 chose" in report.reason
    chosen[2, 0] = -1  # as a padded row leaves it
    report = check(model, Dump(ROOT, arrays, tokens, "float32"))
    assert (report.verdict, report.point) == ("fault", "model.layers.1.mlp.gate#experts")
    assert "no expert's index" in report.reason


def test_a_wrong_group_is_no_tie(tmp_path):
    """Max instead of the sum of the two best (vLLM#13474): another group, whatever the scores."""
    write_member(tmp_path / "v3", "deepseek-v3", seed=1)
    model = refmoe.load(tmp_path / "v3")
    tokens = [i * 11 % 500 for i in range(12)]
    arrays = refmoe.trace(model, tokens, ["*.post_attention_layernorm", "*.mlp.gate*"])
    healthy = check(model, Dump(ROOT, arrays, tokens, "float32"))
    assert healthy.verdict == "pass", healthy.reason
    gate = "model.layers.3.mlp.gate"
    bias = model.decoder.layers[3].mlp.gate.e_score_correction_bias
    score = 1 / (1 + np.exp(-arrays[gate])) + bias
    best = score.reshape(len(tokens), 8, -1).max(axis=-1)
    kept = np.argsort(-best, axis=-1)[:, :4]
    masked = np.where((np.arange(32) // 4)[None, :, None] == kept[:, None], score[..., None], -9)
    arrays[gate + "#experts"] = np.argsort(-masked.max(axis=-1), axis=-1)[:, :8]
    del arrays[gate + "#weights"]
    report = check(model, Dump(ROOT, arrays, tokens, "float32"))
    assert (report.verdict, report.point) == ("fault", gate + "#experts")
    assert report.router["unexplained"] > 0


def test_a_tensor_of_another_shape_is_named(random_bf16):
    arrays = refmoe.trace(refmoe.load(random_bf16), [1, 2, 3], ["lm_head"])
    report = check(refmoe.load(random_bf16), Dump(ROOT, arrays, [1, 2], "float32"))
    assert report.verdict == "undecidable"
    said = "its rows 2 of 3 are of none of the 2 tokens"
    assert report.unmatched == {"lm_head": said}
    assert report.coverage.unfitted == {"lm_head": said}
    assert said in report.reason


def test_nothing_compared_is_undecidable_and_names_are_suggested(random_bf16, tmp_path, capsys):
    arrays = {"model.layers.0.self_attn.q_a_prj": np.zeros((4, 40), np.float32)}
    metadata = {"tokens": "[1, 2, 3, 4]"}
    safetensors.numpy.save_file(arrays, tmp_path / "d.safetensors", metadata)
    args = ["check", str(tmp_path / "d.safetensors"), "--model", str(random_bf16)]
    assert cli.main(args) == 2
    out = capsys.readouterr().out
    assert "no such point; the nearest is model.layers.0.self_attn.q_a_proj" in out
    assert "UNDECIDABLE: no tensor of the dump is a point of this model" in out
    safetensors.numpy.save_file(arrays, tmp_path / "d.safetensors")
    assert cli.main(args) == 2
    assert "it does not say its tokens" in capsys.readouterr().err


def test_the_cli_reports_a_fault_and_the_promised_json(random_bf16, tmp_path, capsys):
    tokens = [5, 6, 7, 8]
    arrays = refmoe.trace(refmoe.load(random_bf16), tokens)
    arrays["model.layers.1.mlp.experts"] *= 1 / 2.827
    safetensors.numpy.save_file(arrays, tmp_path / "d.safetensors", {"tokens": str(tokens)})
    args = ["check", str(tmp_path / "d.safetensors"), "--model", str(random_bf16)]
    assert cli.main(args) == 1
    out = capsys.readouterr().out
    assert "FAULT: model.layers.1.mlp.experts, " in out
    assert cli.main([*args, "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    for field in ("verdict", "point", "conventions", "compared", "missing", "alpha"):
        assert field in document
    assert set(document["points"][0]) == {"name", "rel_error", "envelope", "multiple", "through"}
    assert set(document["router"]) == {"flips", "explained", "unexplained"}


def test_of_two_engines_the_one_that_drifts_is_named(random_bf16, tmp_path, capsys):
    """float32 and its bf16 emulation are both healthy, and some ten thousand times apart."""
    for name in ("float32", "bfloat16"):
        arrays = refmoe.trace(refmoe.load(random_bf16, name), [5, 6, 7, 8])
        safetensors.numpy.save_file(arrays, tmp_path / name, {"tokens": "[5, 6, 7, 8]"})
        (tmp_path / name).rename(tmp_path / f"{name}.safetensors")
    a, b = (str(tmp_path / f"{n}.safetensors") for n in ("bfloat16", "float32"))
    args = ["check", a, "--against", b, "--model", str(random_bf16)]
    assert cli.main(args) == 0
    assert f"further from float64: {a}" in capsys.readouterr().out
    assert cli.main([*args, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["further"], document["a"]["verdict"], document["b"]["verdict"]) == (
        "a",
        "pass",
        "pass",
    )
    assert 1e3 < document["ratio"] < 1e6  # 2^-8 against 2^-24
    assert cli.main(["check", a, "--against", a, "--model", str(random_bf16)]) == 0
    assert "further from float64: neither" in capsys.readouterr().out


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """tiny-k2 without quantisation, as transformers opens it."""
    folder = tmp_path_factory.mktemp("twin")
    make.twin(golden_folder() / "tiny-k2", folder, torch.float32)
    return folder


def opened(folder, dtype):
    model = engines.planted.hf.DeepseekV3ForCausalLM.from_pretrained(folder, dtype=dtype)
    model.config._experts_implementation = "eager"
    return model.eval()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("engine", ["transformers", None])
def test_a_run_under_autocast_passes_and_its_profile_is_guessed(twin, dtype, engine):
    """Products in bf16, norms and residual stream in float32 where the weights are."""
    live = opened(twin, getattr(torch, dtype))
    seen = dumper.watch(live)
    with torch.autocast("cpu", torch.bfloat16):
        dump = engines.transformers_run(live, seen, TOKENS)
    report = check(MODEL, dump, engine=engine)
    assert report.verdict == "pass", report.reason
    assert report.profile_guessed
    guess = {"storage": "bfloat16", "logits": "bfloat16", "weights": "bfloat16"}
    profile = read_profile(report.profile)
    assert guess.items() <= vars(profile).items()
    wide = dtype == "float32"
    assert dict(profile.points) == ({"norms": "float32", "residual": "float32"} if wide else {})
    assert profile.activations == ("bfloat16" if wide else None)
    assert ("norms float32" in report.profile_from) == wide
    assert check(MODEL, dump, engine=engine, profile="bfloat16").verdict == "fault"


def test_under_autocast_a_fault_of_a_norm_is_not_hidden_by_its_products(twin):
    """The norm's float32 is part of the guess: a thousandth is seen, a third of bf16's rounding."""
    live = opened(twin, torch.float32)
    seen = dumper.watch(live)
    with torch.autocast("cpu", torch.bfloat16):
        dump = engines.transformers_run(live, seen, TOKENS)
    at = "model.layers.2.input_layernorm"
    dump.arrays[at] = dump.arrays[at] * np.float32(1.001)
    report = check(MODEL, dump, engine="transformers")
    assert report.verdict == "pass"  # as an engine that rounds inside the norm would
    assert f"{at} would be wrong" in report.profile_from
    declared = check(MODEL, dump, engine="transformers", profile=FINE)
    assert (declared.verdict, declared.point) == ("fault", at)


FINE = (
    "bfloat16,logits=bfloat16,weights=bfloat16,activations=bfloat16,norms=float32,residual=float32"
)


@pytest.mark.parametrize("normed", [False, True])
def test_a_bfloat16_engine_with_a_float32_head_passes(twin, normed):
    live = opened(twin, torch.bfloat16)
    live.lm_head.float()
    if normed:
        live.model.norm.float()
    live.lm_head.register_forward_pre_hook(lambda module, args: (args[0].float(),))
    dump = engines.transformers_run(live, dumper.watch(live), TOKENS)
    assert type_of(dump.arrays["lm_head"]) == "float32"
    report = check(MODEL, dump, engine="transformers")
    assert (report.verdict, report.profile) == ("pass", "bfloat16"), report.reason
    assert check(MODEL, dump, engine="transformers", profile="float32").verdict == "fault"
    alone = replace(dump, arrays={"lm_head": dump.arrays["lm_head"]}, rounded="float32")
    report = check(MODEL, alone, engine="transformers")
    assert report.verdict == "undecidable"
    assert "--profile bfloat16" in report.passes_under


def test_experts_left_random_by_a_loader_are_caught(tmp_path):
    """This transformers warns, and no more, when it opens a `kimi_k2` config by that name."""
    make.twin(golden_folder() / "tiny-k2", tmp_path, torch.float32)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "kimi_k2"}))
    model, info = engines.planted.hf.DeepseekV3ForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert info["missing_keys"], "this transformers reads the experts: the trap is gone"
    seen = dumper.watch(model)
    dump = engines.transformers_run(model.eval(), seen, TOKENS)
    report = check(MODEL, dump)
    assert (report.verdict, report.point) == ("fault", "model.layers.1.mlp.experts")
    assert report.cause is not None
    assert report.cause.id == "experts-random"


def test_the_dumping_example_runs_as_a_script(tmp_path):
    make.twin(golden_folder() / "tiny-k2", tmp_path, torch.float32)
    (tmp_path / "t.json").write_text(json.dumps(TOKENS[:8]))
    script_ = ROOT / "examples" / "dump_transformers.py"
    args = [
        tmp_path,
        tmp_path / "d.safetensors",
        "--dtype",
        "float32",
        "--tokens",
        tmp_path / "t.json",
        "--check",
    ]
    command = [sys.executable, script_, *args]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert re.fullmatch(r"pass, \d+ points within their rounding\n", done.stdout)
    dump = read_dump(tmp_path / "d.safetensors")
    assert dump.tokens == TOKENS[:8]
    assert check(MODEL, dump).verdict == "pass"


# --- readers


def test_a_torch_file_is_read_without_torch_and_as_torch_reads_it(tmp_path):
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {
        "f": base,
        "strided": base.T[1:3],
        "bf16": base.bfloat16() / 3,
        "half": base.half(),
        "long": torch.arange(5),
        "parameter": torch.nn.Parameter(base[0].clone()),
        "not a tensor": 3,
    }
    torch.save(tensors, tmp_path / "d.pt")
    arrays = read_dump(tmp_path / "d.pt").arrays
    assert set(arrays) == set(tensors) - {"not a tensor"}
    for name, x in arrays.items():
        np.testing.assert_array_equal(x, tensors[name].detach().float().numpy().astype(x.dtype))


class Bomb:
    def __reduce__(self):  # type: ignore[no-untyped-def]
        return print, ("executed",)


@pytest.mark.parametrize("value", [Bomb(), {"x": Bomb()}])
def test_a_pickle_is_never_executed(tmp_path, value, capsys):
    with zipfile.ZipFile(tmp_path / "d.pt", "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(value))
    with pytest.raises(InputError, match=r"asks for builtins\.print, which is not read"):
        read_dump(tmp_path / "d.pt")
    np.save(tmp_path / "x.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as file:
        file.write(tmp_path / "x.npy", "x.npy")
    with pytest.raises(InputError, match=r"not an \.npz of plain arrays"):
        read_dump(tmp_path / "d.npz")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["d.pt", "d.npz", "d.safetensors", "d.txt"])
def test_a_broken_dump_is_refused(tmp_path, name):
    with pytest.raises(InputError, match="no such file"):
        read_dump(tmp_path / name)
    (tmp_path / name).write_bytes(b"PK\x03\x04 nothing of use")
    with pytest.raises(InputError, match=name):
        read_dump(tmp_path / name)


def test_arrays_fit_points_whatever_the_engines_axes():
    hf, ours = CONVENTIONS["transformers"], CONVENTIONS["refmoe"]
    q = np.arange(2 * 3 * 4.0).reshape(2, 3, 4)  # [T, H, R]
    name = "model.layers.0.self_attn#q_pe"
    halves = np.concatenate((q[..., 0::2], q[..., 1::2]), axis=-1)
    for x in (halves[None], halves.transpose(1, 0, 2)[None], halves.reshape(1, 2, 12)):
        np.testing.assert_array_equal(fit(name, x, q.shape, hf), q)
    np.testing.assert_array_equal(fit(name, q, q.shape, ours), q)
    assert fit(name, q[:1], q.shape, ours) is None
    square = np.arange(2 * 2 * 4.0).reshape(2, 2, 4)  # as many rows as heads
    np.testing.assert_array_equal(fit(name, square, square.shape, ours), square)
    first = square.transpose(1, 0, 2)[None]
    np.testing.assert_array_equal(fit(name, first, square.shape, ours), square)
