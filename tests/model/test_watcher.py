"""The watcher records, replaces and is believed; the policies round as their formats do."""

from dataclasses import replace

import numpy as np
import pytest

import refmoe
from refmoe.engines import CONVENTIONS
from refmoe.model.decoder import Decoder, policy
from refmoe.model.matrix import round_bf16
from refmoe.model.numerics import PRECISIONS
from refmoe.oracle.trace import Recorder
from refmoe.weights.synthetic.random import write_random
from tests.networks import network, row_by_row

TOKENS = [5, 17, 2, 44, 9, 30]


def record(decoder: Decoder, tokens=TOKENS) -> dict[str, np.ndarray]:
    recorder = Recorder()
    decoder.using(decoder.nx.watching(recorder)).logits(tokens)
    return recorder.seen


def points(**changes) -> list[str]:
    decoder = network(7, row_by_row(policy("float64")), **changes)
    seen = record(decoder)
    return [p for p in seen if not p.endswith("#rows")]


def test_every_point_of_the_design_is_there():
    seen = record(network(7))
    attention = [
        "q_a_proj",
        "q_a_layernorm",
        "q_b_proj",
        "kv_a_proj_with_mqa",
        "kv_a_layernorm",
        "#q_pe",
        "#k_pe",
        "kv_b_proj",
        "#scores",
        "#probs",
        "#context",
        "o_proj",
    ]
    block = ["input_layernorm", "self_attn", "#attn_residual", "post_attention_layernorm", "mlp"]
    dense = ["gate_proj", "up_proj", "act", "down_proj"]
    moe = ["gate", "gate#experts", "gate#weights", "experts", "shared_experts"]
    wanted = {"model.embed_tokens", "model.norm", "lm_head"}
    for i in range(2):
        layer = f"model.layers.{i}"
        inside = [f"self_attn{'' if a[0] == '#' else '.'}{a}" for a in attention]
        mlp = dense if i == 0 else [*moe, *(f"shared_experts.{d}" for d in dense)]
        names = [*block, *inside, *(f"mlp.{m}" for m in mlp)]
        wanted |= {layer} | {f"{layer}{'' if n[0] == '#' else '.'}{n}" for n in names}
    chosen = np.unique(seen["model.layers.1.mlp.gate#experts"])
    for e in chosen:
        at = f"model.layers.1.mlp.experts.{e}"
        wanted |= {f"{at}#rows", *(f"{at}.{d}" for d in dense)}
        rows = seen[f"{at}#rows"]
        np.testing.assert_array_equal(
            rows, (seen[f"{at[: -len(str(e)) - 9]}.gate#experts"] == e).any(1).nonzero()[0]
        )
        assert len(seen[f"{at}.act"]) == len(rows)
    assert set(seen) == wanted


def test_absorbed_attention_has_its_own_points():
    decoder = network(7)
    seen = record(decoder.using(replace(decoder.nx, attention="absorbed")))
    assert "model.layers.0.self_attn.kv_b_proj" not in seen
    assert seen["model.layers.0.self_attn#q_latent"].shape == (6, 3, 19)
    assert seen["model.layers.0.self_attn#context_latent"].shape == (6, 3, 19)


def test_several_prompts_show_their_attention_apart():
    decoder, recorder = network(7), Recorder(["*#probs*", "*kv_b_proj*"])
    watched = decoder.using(decoder.nx.watching(recorder))
    watched.hidden([[1, 2], [3, 4, 5]], [decoder.caches(), decoder.caches()])
    assert recorder.seen["model.layers.0.self_attn#probs@0"].shape == (2, 3, 2)
    assert recorder.seen["model.layers.0.self_attn#probs@1"].shape == (3, 3, 3)


@pytest.mark.parametrize("point", points())
def test_replacing_a_point_changes_what_follows_and_only_that(point):
    """Spoil one row of one point: everything before it, and every earlier row, keeps its bits."""
    decoder = network(7, row_by_row(policy("float64")))
    before, row = record(decoder), 3
    recorder, spoiled = Recorder(), []

    def spoil(path: str, x: np.ndarray) -> np.ndarray:
        if path == point and not spoiled:
            x = x.copy()
            at = min(row, len(x) - 1)
            x[at] = (x[at] + 1) % 12 if x.dtype.kind == "i" else 1.5 * x[at] + 0.1
            spoiled.append(at)
        return recorder(path, x)

    logits = decoder.using(decoder.nx.watching(spoil)).logits(TOKENS)
    assert spoiled
    order = list(before)
    for path in order[: order.index(point)]:
        np.testing.assert_array_equal(recorder.seen[path], before[path], err_msg=path)
    assert (recorder.seen[point] != before[point]).any()
    changed = (logits != before["lm_head"]).any(axis=1)
    at = spoiled[0]
    if ".experts." in point:  # its rows are those that chose the expert
        at = before[point.rpartition(".")[0] + "#rows"][at]
    assert changed[at]
    assert not changed[:at].any()


def test_a_replaced_tensor_must_keep_its_shape():
    decoder = network(7)
    cut = decoder.using(decoder.nx.watching(lambda path, x: x[:1]))
    with pytest.raises(ValueError, match=r"model\.embed_tokens: the watcher returned \(1, 23\)"):
        cut.logits(TOKENS)


def test_injecting_every_point_of_another_run_reproduces_it():
    """What the oracle stands on: given another engine's tensors, we go on with them."""
    ours, theirs = network(7), network(8)
    wanted = record(theirs)
    # routing of the other run decides which experts run at all
    fields = {p: x for p, x in wanted.items() if "experts." not in p}
    got = ours.using(ours.nx.watching(lambda path, x: fields.get(path, x))).logits(TOKENS)
    np.testing.assert_array_equal(got, wanted["lm_head"])


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_emulated_points_are_representable_and_taps_stay_wide(random_int4, name):
    seen = refmoe.trace(refmoe.load(random_int4, name, reference=True), TOKENS)
    rounding = PRECISIONS[name].round
    assert rounding is not None
    wide = ("#scores", "#probs", ".mlp.gate", "#weights", "#experts", "#rows")
    for path, x in seen.items():
        if path.endswith(wide):
            continue
        np.testing.assert_array_equal(rounding(x), x, err_msg=path)
    probs = seen["model.layers.0.self_attn#probs"]
    assert (round_bf16(probs) != probs).any()


@pytest.mark.parametrize(("name", "unit"), [("bfloat16", 2.0**-8), ("float16", 2.0**-11)])
def test_emulation_differs_from_float32_by_what_its_rounding_explains(random_bf16, name, unit):
    """A rounded run lies among runs rounded at random to the same unit, and is no closer than
    one rounding of the logits alone."""
    wide = refmoe.load(random_bf16, "float64", reference=True)
    exact = wide.logits(TOKENS)
    spread = []
    for seed in range(8):
        rng = np.random.default_rng(seed)

        def disturb(x, rng=rng):
            return x * (1 + rng.uniform(-unit, unit, x.shape))

        spread.append(
            np.abs(wide.using(replace(wide.nx, round=disturb)).logits(TOKENS) - exact).max()
        )
    got = np.abs(refmoe.load(random_bf16, name, reference=True).logits(TOKENS) - exact).max()
    float32 = np.abs(
        refmoe.load(random_bf16, "float32", reference=True).logits(TOKENS) - exact
    ).max()
    assert unit / 16 * np.abs(exact).max() < got < 2 * max(spread)
    assert float32 < unit / 16 * np.abs(exact).max()


def differ(folder: str | None, name: str, numerics: str = "float64") -> bool:
    ours, theirs = (
        refmoe.load(folder, numerics, conventions=c).logits(TOKENS) for c in ("refmoe", name)
    )
    return bool((ours != theirs).any())


def test_conventions_change_what_they_name_and_nothing_else(random_bf16, random_int4, tmp_path):
    """eps of the latent norms, INT4 and FP8 products, betas, normaliser: each where it shows."""
    write_random(tmp_path / "fp8", "fp8", seed=3)
    # rms_norm_eps is 1e-5 in these, the latent norms' 1e-6; llama.cpp has other betas, too
    assert {n: differ(random_bf16, n) for n in CONVENTIONS} == {
        "refmoe": False,
        "moonshot": False,
        "transformers": False,
        "vllm": True,
        "sglang": True,
        "llama.cpp": True,
        "mlx": False,  # the sum of the weights is far above 1e-20
    }
    assert differ(random_int4, "transformers")
    assert not differ(random_int4, "mlx")
    assert differ(tmp_path / "fp8", "mlx")
    assert not differ(tmp_path / "fp8", "transformers")
    # a router in the activations' precision shows only where activations are rounded
    assert differ(random_bf16, "mlx", "bfloat16")
    assert not differ(random_bf16, "mlx", "float32")
