"""The oracle's parts: what a dump holds in part, what engines fuse, envelopes, one engine twice."""

from dataclasses import replace

import numpy as np
import pytest

import refmoe
from refmoe.engines import PROFILES, profile_of
from refmoe.files import cache_folder
from refmoe.model.points import parents
from refmoe.oracle import envelope
from refmoe.oracle.check import arbitrate, check, judge_dump
from refmoe.oracle.readers.adapt import adapt
from refmoe.oracle.readers.base import Dump
from refmoe.oracle.selftest.power import rounded_run
from refmoe.oracle.trace import DIRECTIONS, sketch, trace
from refmoe.weights.synthetic.members import write_member

TOKENS = [i * 7 % 500 for i in range(12)]


@pytest.fixture(scope="module")
def model(random_bf16):
    return refmoe.load(random_bf16, "float64", reference=True)


# --- known in part


def test_a_sketch_keeps_relative_differences():
    """A length of 64 random products is known to 1/√128 = 9 %, the ratio of two to 12.5 %: six
    deviations are 75 %."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((20, 3, 1000))
    y = x * (1 + 1e-3 * rng.standard_normal(x.shape))
    a, b = sketch("p", x), sketch("p", y)
    assert a.shape == (20, 1 + DIRECTIONS)
    error = np.linalg.norm((b - a)[:, 1:], axis=1) / np.linalg.norm(a[:, 1:], axis=1)
    assert (np.abs(error / 1e-3 - 1) < 0.75).all()
    np.testing.assert_allclose(a[:, 0], np.sqrt((x.reshape(20, -1) ** 2).mean(axis=1)))
    assert (sketch("q", x)[:, 1:] != a[:, 1:]).any()


def test_a_sketched_trace_is_judged_and_small(model, random_bf16):
    engine = refmoe.load(random_bf16, "bfloat16")
    arrays = trace(engine, TOKENS, sketched=True)
    assert all(x.shape[1] == 65 for n, x in arrays.items() if n.endswith("#sketch"))
    dump = Dump(random_bf16, arrays, TOKENS, "bfloat16")
    healthy = check(model, dump, profile="bfloat16")
    assert healthy.verdict == "pass", healthy.reason
    assert healthy.compared > 60

    def scaled(path: str, x: np.ndarray) -> np.ndarray:
        return x / 2.827 if path.endswith("layers.1.mlp.experts") else x

    class Spoilt:
        def __call__(self, path: str, x: np.ndarray) -> np.ndarray:
            y = scaled(path, x)
            seen[path + "#sketch"] = sketch(path, y)
            return y

    seen: dict[str, np.ndarray] = {}
    engine.using(engine.nx.watching(Spoilt())).logits(TOKENS)
    seen = {n: x for n, x in seen.items() if "#rows" not in n and "#experts#" not in n}
    report = check(model, Dump(random_bf16, seen, TOKENS, "bfloat16"), profile="bfloat16")
    assert (report.verdict, report.point) == ("fault", "model.layers.1.mlp.experts")


def printed(x: np.ndarray, digits: int = 4) -> np.ndarray:
    """The corners that a print shows, rounded, and NaN elsewhere."""
    out = np.full(x.shape, np.nan)
    corners = np.ix_(*[sorted({*range(min(3, n)), *range(max(n - 3, 0), n)}) for n in x.shape])
    out[corners] = np.round(x[corners], digits)
    return out


def test_printed_corners_are_judged_as_far_as_they_go(model, random_bf16):
    arrays = refmoe.trace(
        refmoe.load(random_bf16), TOKENS, ["*layernorm", "model.layers.?", "lm_head"]
    )
    shown = {n: printed(x) for n, x in arrays.items()}
    dump = Dump(random_bf16, shown, TOKENS, "float32", partial=frozenset(shown), step=5e-5)
    report = check(model, dump)
    assert report.verdict == "pass", report.reason
    assert report.compared == len(shown)
    wrong = dict(shown)
    wrong["model.layers.1"] = printed(arrays["model.layers.1"] * 1.01)
    report = check(model, replace(dump, arrays=wrong), profile="float32")
    assert (report.verdict, report.point) == ("fault", "model.layers.1")
    report = check(model, replace(dump, arrays=wrong))  # of products nothing shows the precision
    assert (report.verdict, report.point) == ("undecidable", "model.layers.1")
    assert "--profile llama.cpp-q8" in report.passes_under
    last = np.full(arrays["lm_head"].shape, np.nan)
    last[-1, :3] = arrays["lm_head"][-1, :3]  # one row of one tensor is something
    dump = replace(dump, arrays={"lm_head": last}, partial=frozenset(["lm_head"]))
    report = check(model, dump)
    assert (report.verdict, report.compared) == ("pass", 1)
    assert "model.norm" in report.points[0].through


def test_the_likeliest_tokens_are_judged_alone(model, random_bf16):
    logits = refmoe.load(random_bf16, "bfloat16").logits(TOKENS).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    ids = np.argsort(-logprobs, axis=1)[:, :20]
    values = np.take_along_axis(logprobs, ids, axis=1)
    ids[0], values[0] = -1, np.nan  # no data for the first
    ids[1, 5:], values[1, 5:] = -1, np.nan
    dump = Dump(random_bf16, {}, TOKENS, "float32", top=(ids, values))
    report = check(model, dump, profile="bfloat16")
    assert report.verdict == "pass", report.reason
    assert report.compared == 1
    colder = np.where(ids >= 0, values * 1.2, np.nan)  # a temperature of 1/1.2 nobody spoke of
    report = check(model, replace(dump, top=(ids, colder)), profile="bfloat16")
    assert (report.verdict, report.point) == ("fault", "lm_head")
    report = check(model, replace(dump, top=(ids[:5], values[:5])), profile="bfloat16")
    assert report.verdict == "undecidable"
    assert "of 5 positions for 12 tokens" in report.unmatched["top log-probabilities"]


# --- fused and stacked


def test_what_vllm_fuses_is_split(model, random_bf16):
    arrays = refmoe.trace(refmoe.load(random_bf16), TOKENS)
    cfg, fused = model.cfg, dict(arrays)
    for i in range(cfg.num_hidden_layers):
        at = f"model.layers.{i}"
        own = f"{at}.self_attn"
        parts = [fused.pop(f"{own}.q_a_proj"), fused.pop(f"{own}.kv_a_proj_with_mqa")]
        fused[f"{own}.fused_qkv_a_proj"] = np.concatenate(parts, axis=1)
        after = f"{at}.post_attention_layernorm#residual"
        fused[after] = fused.pop(f"{at}#attn_residual")
        following = f"model.layers.{i + 1}.input_layernorm"
        following = "model.norm" if i + 1 == cfg.num_hidden_layers else following
        fused[f"{following}#residual"] = fused[at]
        fused[at] = fused[f"{at}.mlp"]  # what vLLM's layer returns first
        for mlp in (f"{at}.mlp", f"{at}.mlp.shared_experts"):
            if f"{mlp}.act" in fused:
                parts = [fused.pop(f"{mlp}.gate_proj"), fused.pop(f"{mlp}.up_proj")]
                fused[f"{mlp}.gate_up_proj"] = np.concatenate(parts, axis=1)
                fused[f"{mlp}.act_fn"] = fused.pop(f"{mlp}.act")
    back = adapt(fused, cfg)
    assert set(back) == set(arrays)
    for name, x in arrays.items():
        np.testing.assert_array_equal(back[name], x)


def test_rows_of_tokens_and_slots_become_those_of_experts(model, random_bf16):
    arrays = refmoe.trace(refmoe.load(random_bf16), TOKENS)
    at = "model.layers.1.mlp"
    chosen = arrays[f"{at}.gate#experts"]
    for flat in (False, True):
        stacked = {n: x for n, x in arrays.items() if f"{at}.experts." not in n}
        for part in ("gate_proj", "up_proj", "act", "down_proj"):
            width = arrays[f"{at}.experts.{chosen[0, 0]}.{part}"].shape[1]
            rows = np.zeros((*chosen.shape, width))
            for e in np.unique(chosen):
                rows[chosen == e] = arrays[f"{at}.experts.{e}.{part}"]
            stacked[f"{at}.experts.{part}"] = rows.reshape(-1, width) if flat else rows
        dump = Dump(random_bf16, stacked, TOKENS, "float32")
        report = check(model, dump)
        assert report.verdict == "pass", report.reason
        assert report.unmatched == {}
        assert report.compared == len([n for n in arrays if not n.endswith("#rows")])


# --- the graph of names


@pytest.mark.parametrize("member", [None, "moonlight"])
def test_a_point_depends_on_its_parents_and_on_nothing_else(member, random_bf16, tmp_path):
    """With its parents given, a change of one of them reaches a point, and no other does."""
    if member:
        write_member(random_bf16 := tmp_path / member, member, seed=3)
    model = refmoe.load(random_bf16, "float64", reference=True)
    exact = refmoe.trace(model, TOKENS)
    exact = {n: x for n, x in exact.items() if ".experts." not in n}
    at = "model.layers.1"
    for point in [n for n in exact if n.startswith(at) or n in ("model.norm", "lm_head")]:
        makers = set(parents(point, model.cfg))
        reached = set()
        for spoilt in exact:
            if "#experts" in spoilt or point == spoilt:
                continue
            seen = {}

            def watch(path, x, spoilt=spoilt, seen=seen, makers=makers, point=point):  # type: ignore
                seen[path] = x
                if path == point:
                    raise StopIteration  # nothing that comes later can change it
                if path == spoilt:
                    return -exact[path]
                return exact[path] if path in makers and path in exact else x

            with pytest.raises(StopIteration):
                model.using(model.nx.watching(watch)).logits(TOKENS)
            if not np.allclose(seen[point], exact[point], rtol=1e-9, atol=1e-12):
                reached.add(spoilt)
        wanted = {m for m in makers if m in exact and "#experts" not in m}
        assert reached == wanted, point


def test_what_a_dump_lacks_is_named_along_the_way_and_not_beside_it(model, random_bf16):
    """vLLM shows the shared expert's inside and the sum, and never the routed sum alone."""
    arrays = refmoe.trace(refmoe.load(random_bf16), TOKENS)
    del arrays["model.layers.1.mlp.experts"]
    arrays = {n: x for n, x in arrays.items() if ".experts." not in n}
    report = check(model, Dump(random_bf16, arrays, TOKENS, "float32"))
    named = {p.name: p.through for p in report.points if p.through}
    assert named == {"model.layers.1.mlp": ("model.layers.1.mlp.experts",)}


# --- profiles and envelopes


def test_eight_bit_activations_are_noise_of_their_own_profile_only(model):
    dump = rounded_run(model, PROFILES["llama.cpp-q8"], TOKENS, seed=3)
    assert check(model, dump, profile="llama.cpp-q8").verdict == "pass"
    assert check(model, dump, profile="float32").verdict == "fault"
    assert check(model, dump, engine="refmoe", profile="float32").point.endswith("q_a_proj")


def test_fp8_activations_are_noise_of_their_own_profile_only(tmp_path):
    write_member(tmp_path / "m", "k2-instruct", seed=4)
    model = refmoe.load(tmp_path / "m", "float64", reference=True)
    dump = rounded_run(model, PROFILES["fp8-block"], TOKENS, seed=3)
    assert check(model, dump, profile="fp8-block").verdict == "pass"
    assert check(model, dump, profile="bfloat16-router").verdict == "fault"


def test_an_engine_brings_its_own_profile():
    assert profile_of("float32", "llama.cpp").activations == "int8/32"
    assert profile_of("bfloat16", "vllm").logits == "bfloat16"
    assert profile_of("bfloat16", "transformers") == PROFILES["bfloat16"]


def test_an_envelope_is_sampled_once(model, random_bf16, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    arrays = refmoe.trace(refmoe.load(random_bf16), TOKENS, ["*layernorm", "lm_head"])
    dump = Dump(random_bf16, arrays, TOKENS, "float32")
    first = check(model, dump)
    assert len(list(cache_folder("envelopes").glob("*.npz"))) == 1

    def refuse(*_):  # type: ignore[no-untyped-def]
        raise AssertionError("sampled again")

    sampled = envelope._sample
    monkeypatch.setattr(envelope, "_sample", refuse)
    assert check(model, dump) == first
    with pytest.raises(AssertionError, match="sampled again"):
        check(model, dump, [*TOKENS[:-1], 3])
    with pytest.raises(AssertionError, match="sampled again"):
        check(model, dump, profile="bfloat16")
    with pytest.raises(AssertionError, match="sampled again"):
        check(model, dump, keep=False)
    monkeypatch.setattr(envelope, "_sample", sampled)
    (file,) = cache_folder("envelopes").glob("*.npz")
    file.write_bytes(file.read_bytes()[:100])  # half a file is none
    assert check(model, dump) == first


def test_a_cache_that_cannot_be_written_is_no_error(model, random_bf16, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    arrays = refmoe.trace(refmoe.load(random_bf16), TOKENS, ["lm_head"])
    assert check(model, Dump(random_bf16, arrays, TOKENS, "float32")).verdict == "pass"


# --- one engine twice


def test_prefill_and_decoding_of_one_engine_agree(model, random_bf16):
    """All at once, and one token at a time: both pass, and the bits part somewhere."""
    engine = refmoe.load(random_bf16, "bfloat16")
    kept = ["*layernorm", "model.layers.?", "*gate#*", "lm_head"]
    whole = refmoe.trace(engine, TOKENS, kept)
    memory, rows = engine.decoder.caches(), []
    for token in TOKENS:
        recorder = refmoe.oracle.trace.Recorder(kept)
        watched = engine.using(engine.nx.watching(recorder))
        watched.decoder.logits([token], memory)
        rows.append(recorder.seen)
    single = {n: np.concatenate([r[n] for r in rows]) for n in whole}
    cases = [judge_dump(model, Dump(random_bf16, x, TOKENS, "bfloat16")) for x in (whole, single)]
    both = arbitrate(*cases)
    assert (both.a.verdict, both.b.verdict, both.further) == ("pass", "pass", "neither")
    assert both.equal >= 1  # of which the embedding's norm
    again = arbitrate(cases[0], cases[0])
    assert (again.equal, again.first_difference) == (cases[0].report.compared, None)
