"""Truth without the model: its bytes, what passes against it, and what is found by it."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

import refmoe
from refmoe.config import Config
from refmoe.engines import CONVENTIONS, PROFILES
from refmoe.fast import reproducible
from refmoe.files import InputError
from refmoe.model.decoder import policy
from refmoe.model.experts import ExpertsFrom
from refmoe.oracle.readers.base import Dump
from refmoe.oracle.readers.dump import read_dump
from refmoe.oracle.selftest.power import rounded_run
from refmoe.oracle.trace import write
from refmoe.oracle.truth import envelope as truth_envelope
from refmoe.oracle.truth import forward as truth_forward
from refmoe.oracle.truth import layout as truth_layout
from refmoe.oracle.truth import make as truth_make
from refmoe.oracle.truth.check import check_truth
from refmoe.oracle.truth.file import read_truth
from refmoe.oracle.truth.layout import judged_points, layout, size
from refmoe.oracle.truth.make import make
from refmoe.run.load import golden_folder
from refmoe.weights.streaming.store import Store
from refmoe.weights.synthetic.members import HERE as MEMBERS
from refmoe.weights.synthetic.members import write_member
from refmoe.weights.synthetic.random import write_random
from tests.conftest import ROOT
from tests.run.test_tiny_k2 import PASSAGE

VLLM = golden_folder() / "vllm"
TOKENS = [i * 7 % 270 for i in range(20)]
KINDS = ("self_attn", "mlp", "gate#experts", "gate#weights")


@pytest.fixture(scope="module")
def model(random_bf16):
    return refmoe.load(random_bf16, "float64", reference=True)


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    told = []
    out = tmp_path_factory.mktemp("truth") / "t.safetensors"
    assert make(model, TOKENS, out, progress=lambda *done: told.append(done)) == out
    assert told == [(i + 1, 18) for i in range(18)]  # 3 layers, the truth and five profiles
    return out


@pytest.fixture(scope="module")
def truth(file):
    return read_truth(file)


@pytest.fixture(scope="module")
def text(tiny_k2, tmp_path_factory):
    """tiny-k2 on words, as it is used."""
    trained = refmoe.load(tiny_k2, "float64", reference=True)
    tokens = trained.tokenizer.encode(PASSAGE)[:32]
    out = tmp_path_factory.mktemp("truth") / "text.safetensors"
    return read_truth(make(trained, tokens, out, profiles=["float32", "bfloat16"]))


@pytest.fixture(scope="module")
def vllm(tiny_k2, tmp_path_factory):
    """tiny-k2 as vLLM has it: bfloat16 rounds its INT4 products, the float32 twin does not."""
    out = {}
    exact = replace(CONVENTIONS["vllm"], rounded_products=())
    for precision, sides in (("bfloat16", CONVENTIONS["vllm"]), ("float32", exact)):
        path = tmp_path_factory.mktemp("truth") / "vllm.safetensors"
        tokens = read_dump(VLLM / f"{precision}-healthy.safetensors").tokens
        kept = ["float32"] if precision == "float32" else ["fp8-block"]
        trained = refmoe.load(tiny_k2, "float64", True, sides)
        out[precision] = read_truth(make(trained, tokens, path, profiles=kept))
    return out


def run(truth, folder, numerics, patterns=("model.layers.*", "model.norm", "lm_head")):
    """An engine's dump: what hooks on modules see."""
    arrays = refmoe.trace(refmoe.load(folder, numerics), truth.tokens, patterns)
    kept = {n: x for n, x in arrays.items() if n.endswith(KINDS) or n.count(".") < 3}
    return Dump(ROOT, kept, list(truth.tokens), numerics)


def logprobs(logits):
    logits = logits.astype(np.float64)
    return logits - truth_forward.logsumexp(logits)


def listed(dump, k, temperature=1.0):
    """The k likeliest, as a server returns them."""
    x = logprobs(dump.arrays["lm_head"] / temperature)
    ids = np.argsort(-x, axis=-1, kind="stable")[:, :k]
    top = (ids, np.take_along_axis(x, ids, axis=-1))
    return Dump(ROOT, {}, dump.tokens, "bfloat16", top=top)


def only(dump, *names):
    return replace(dump, arrays={n: x for n, x in dump.arrays.items() if n in names})


# --- the file


class Once:
    """Layers and experts of a decoder, and how often each was asked for."""

    def __init__(self, decoder):
        self.decoder, self.layers, self.experts = decoder, [], []
        self.of_layer = [ExpertsFrom(partial(self.expert, i)) for i in range(len(decoder.layers))]

    def __len__(self):
        return len(self.decoder.layers)

    def __getitem__(self, i):
        self.layers.append(i)
        return self.decoder.layers[i]

    def expert(self, i, e):
        self.experts.append((i, e))
        return self.decoder.experts[i](e)


def one_after_another(model, tokens, profiles, runs=12, top=64):
    """Each pass by itself, as the decoder makes it: the definition of what `make` does at once."""

    def whole(p):
        x = p.decoder.hidden(p.prompts, [p.decoder.caches() for _ in p.prompts])
        p.decoder.head(x)

    class Alone(truth_forward.Seen):
        def scores(self, path, x):
            self.gate = self.decoder.layers[int(path.split(".")[2])].mlp.gate
            return super().scores(path, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(truth_envelope, "Seen", Alone)
        exact = Alone(model.decoder, top, lambda: None)
        decoder = model.decoder.using(model.nx.watching(exact))
        whole(truth_forward.Pass(decoder, [tokens], exact))
        truth = exact.values()
        arrays = truth_make._columns(truth, model.cfg)
        plain = model.decoder.using(policy("float64", model.nx.conventions))
        for name in profiles:
            noisy = truth_envelope.emulation(plain, PROFILES[name], tokens, exact, runs)
            whole(noisy)
            each = truth_envelope.each_run(noisy.seen, runs)
            arrays |= truth_envelope.sample(PROFILES[name], each, truth, model.cfg)
    return arrays


def test_weights_under_a_budget_make_the_same_truth(tiny_k2, tmp_path):
    """With tiles of matrices, too, whose products may be summed in another order: levels of noise
    are kept to 5 %, so that a step of one level is the least that can be seen."""
    model = refmoe.load(tiny_k2, "float64")
    smallest = Store(model.checkpoint, 10**12, "cached")
    store = Store(model.checkpoint, smallest.least, "cached")
    lent = replace(model, decoder=store.decoder(model.nx), store=store)
    how = {"profiles": ["bfloat16"], "runs": 4}
    made = make(lent, TOKENS[:5], tmp_path / "lent", **how)
    assert made.read_bytes() == make(model, TOKENS[:5], tmp_path / "t", **how).read_bytes()
    assert store.counters.asked == store.counters.missed > 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reproducible, "TILE", 1 << 13)
        tiled = read_truth(make(model, TOKENS[:5], tmp_path / "tiled", **how))
    whole = read_truth(tmp_path / "t")
    for name, x in whole.arrays.items():
        if x.dtype == np.uint8:
            assert np.abs(tiled.arrays[name].astype(int) - x).max() <= 1
    store.close()
    smallest.close()


@pytest.mark.parametrize("which", ["tiny-k2", "groups"])
def test_all_passes_at_once_are_each_by_itself_to_the_bit(which, tiny_k2, tmp_path):
    folder = tiny_k2
    if which == "groups":
        folder = tmp_path / "groups"
        shape = {"n_group": 4, "topk_group": 2, "n_routed_experts": 16, "n_shared_experts": 0}
        write_random(folder, "bf16", seed=5, shape=shape)
    model = refmoe.load(folder, "float64", reference=True)
    once = Once(model.decoder)
    counted = replace(model, decoder=replace(model.decoder, layers=once, experts=once.of_layer))
    profiles = ["float32", "llama.cpp-q8"]
    made = read_truth(make(counted, TOKENS[:9], tmp_path / "t", profiles=profiles))
    assert once.layers == list(range(model.cfg.num_hidden_layers))
    assert len(set(once.experts)) == len(once.experts) > 0
    wanted = one_after_another(model, TOKENS[:9], profiles)
    for name, x in made.arrays.items():
        np.testing.assert_array_equal(x, wanted[name].astype(x.dtype).reshape(x.shape))


def test_what_is_written_is_what_the_model_computes(truth, model):
    seen = refmoe.trace(model, TOKENS)
    assert truth.tokens == TOKENS
    assert (truth.numerics, truth.conventions) == ("float64", CONVENTIONS["refmoe"])
    np.testing.assert_array_equal(truth.arrays["model.norm"], seen["model.norm"].astype(np.float32))
    sketch = refmoe.trace(model, TOKENS, sketched=True)
    for i in range(3):
        at = f"model.layers.{i}"
        for name, point, width in (
            ("layers", at, 65),
            ("self_attn", f"{at}.self_attn", 8),
            ("mlp", f"{at}.mlp", 8),
        ):
            wanted = sketch[f"{point}#sketch"][:, :width].astype(np.float32)
            np.testing.assert_array_equal(truth.arrays[f"{name}#sketch"][:, i], wanted)
    logits = seen["lm_head"]
    ids = truth.arrays["lm_head#ids"]
    total = truth.arrays["lm_head#logsumexp"][:, None]
    theirs = np.take_along_axis(logits, ids, axis=-1)
    np.testing.assert_allclose(truth.arrays["lm_head#logprobs"] + total, theirs, atol=1e-5)
    assert (np.sort(theirs, axis=-1)[:, ::-1] == theirs).all()
    assert np.isclose(np.exp(logits - total).sum(axis=-1), 1).all()
    assert theirs.min() >= np.sort(logits, axis=-1)[:, -64].min()


def test_margins_are_those_of_the_scores(truth, model):
    seen = refmoe.trace(model, TOKENS, ["*.mlp.gate*"])
    for m, i in enumerate((1, 2)):
        gate = f"model.layers.{i}.mlp.gate"
        bias = model.decoder.layers[i].mlp.gate.e_score_correction_bias
        score = np.sort(1 / (1 + np.exp(-seen[gate])) + bias, axis=-1)[:, ::-1]
        np.testing.assert_allclose(truth.margin[:, m], score[:, 3] - score[:, 4], atol=1e-6)
        chosen = truth.arrays["gate#experts"][:, m]
        np.testing.assert_array_equal(chosen[:, :4], seen[gate + "#experts"])
        np.testing.assert_allclose(truth.arrays["gate#scores"][:, m], score[:, :8], rtol=1e-6)


def test_levels_survive_a_byte_to_five_percent():
    level = np.geomspace(1e-9, 10, 500)
    assert np.abs(np.log(truth_layout.decode(truth_layout.encode(level)) / level)).max() < np.log(
        1.051
    )
    assert np.isnan(truth_layout.decode(truth_layout.encode(np.array([np.nan])))).all()


def test_the_same_inputs_give_the_same_bytes(file, tmp_path, random_bf16):
    code = (
        "import sys, refmoe; from refmoe.oracle.truth.make import make; "
        "make(refmoe.load(sys.argv[1], 'float64', True), [i * 7 % 270 for i in range(20)], "
        "sys.argv[2])"
    )
    for name in "ab":  # each in a process of its own, with hashes of its own
        args = [sys.executable, "-c", code, str(random_bf16), str(tmp_path / name)]
        subprocess.run(args, check=True, cwd=ROOT)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_provenance(file, model, random_int4, tmp_path):
    facts = read_truth(file).facts
    assert facts["producer"] == "refmoe golden make"
    assert facts["refmoe"] == refmoe.__version__
    assert json.loads(facts["config"])["hidden_size"] == 96
    shard = model.checkpoint.path / facts["shards"][0]["name"]
    assert facts["shards"] == [{"name": shard.name, "size": shard.stat().st_size}]
    out = make(refmoe.load(random_int4), [1, 2, 3], tmp_path / "t", profiles=[], hash_shards=True)
    other = read_truth(out)
    assert other.numerics == "float32"
    assert len(other.facts["shards"]) == 3
    assert all(len(s["sha256"]) == 64 for s in other.facts["shards"])


def test_sixty_kilobytes_a_token_at_the_size_of_k2(file, truth):
    """By arithmetic from the layout; and a small file obeys the same arithmetic."""
    cfg = Config.load(MEMBERS / "k2-instruct.json")
    assert (cfg.num_hidden_layers, cfg.hidden_size, cfg.num_experts_per_tok) == (61, 7168, 8)
    assert len(judged_points(cfg, 64)) == 309
    one, two = size(layout(cfg, 1)), size(layout(cfg, 2))
    assert two - one == 58_586 <= 60_000
    assert one - (two - one) == 24_720  # spreads
    assert size(layout(cfg, 64)) <= 64 * 60_000
    tensors = size(layout(truth.cfg, len(TOKENS)))
    header = file.stat().st_size - tensors
    assert header == 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert header < 7_000  # a config and a shard; K2's 62 shards take 4 kB more, and its tokens 7 B
    assert {n: x.shape for n, x in truth.arrays.items()} == {
        n: shape for n, (_, shape) in layout(truth.cfg, len(TOKENS)).items()
    }


# --- healthy


@pytest.mark.parametrize("numerics", ["float32", "bfloat16", "float16"])
def test_a_healthy_engine_passes_whatever_it_shows(truth, random_bf16, numerics):
    dump = run(truth, random_bf16, numerics)
    report = check_truth(truth, dump)
    assert report.verdict == "pass", report.reason
    assert report.profile == numerics
    assert report.missing == ()
    assert "without the model" in report.reason
    layers = only(dump, *(f"model.layers.{i}" for i in range(3)))
    logits = only(dump, "lm_head")
    sketched = refmoe.trace(
        refmoe.load(random_bf16, numerics), TOKENS, ["model.layers.?"], sketched=True
    )
    part = replace(dump, arrays={n: x[:9] for n, x in dump.arrays.items()}, tokens=TOKENS[:9])
    for some in (layers, logits, replace(dump, arrays=sketched), part):
        report = check_truth(truth, some)
        assert report.verdict == "pass", report.reason
    json.dumps(report.as_json(), allow_nan=False)


@pytest.mark.parametrize("profile", truth_layout.KEPT)
def test_engines_that_really_round_pass_in_every_profile(truth, model, profile):
    for seed in range(6):
        dump = rounded_run(model, PROFILES[profile], TOKENS, seed)
        report = check_truth(truth, dump, profile=profile)
        assert report.verdict == "pass", report.reason


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_running_vllm_passes(vllm, precision):
    report = check_truth(vllm[precision], read_dump(VLLM / f"{precision}-healthy.safetensors"))
    assert report.verdict == "pass", report.reason
    assert report.engine == "vllm"
    assert report.compared == 21


def test_flips_inside_the_noise_are_explained_and_their_rows_left_out(text, tiny_k2):
    """A choice near a tie is made the other way: what follows is another network, and healthy."""
    near = [(t, m) for t, m in np.argwhere(text.margin[:, :2] > 0) if 4 < t < 28]
    t, m = min(near, key=lambda at: text.margin[at[0], at[1]])
    gate = f"model.layers.{m + 1}.mlp.gate#experts"
    first_refused = int(text.arrays["gate#experts"][t, m, 6])

    class Flip:
        def __init__(self):
            self.seen = {}

        def __call__(self, path, x):
            if path == gate:
                x = x.copy()
                x[t, 5] = first_refused
            self.seen[path] = x
            return x

    engine = refmoe.load(tiny_k2, "bfloat16")
    flip = Flip()
    engine.using(engine.nx.watching(flip)).logits(text.tokens)
    arrays = {n: x for n, x in flip.seen.items() if n.endswith(KINDS) or n.count(".") < 3}
    report = check_truth(text, Dump(ROOT, arrays, text.tokens, "bfloat16"))
    assert report.verdict == "pass", report.reason
    assert report.router["flips"] >= report.router["explained"] >= 1
    assert report.router["unexplained"] == 0
    assert "rows left out of the later points" in report.reason
    # in float32 the same flip is none that rounding explains
    report = check_truth(text, Dump(ROOT, arrays, text.tokens, "bfloat16"), profile="float32")
    assert report.verdict == "fault"


# --- spoilt


@pytest.mark.parametrize("numerics", ["float32", "bfloat16"])
@pytest.mark.parametrize("layer", [0, 2])
def test_a_scaled_mlp_is_found_in_its_layer(truth, random_bf16, numerics, layer):
    bad = f"model.layers.{layer}.mlp"

    class Scale:
        def __init__(self):
            self.seen = {}

        def __call__(self, path, x):
            self.seen[path] = x = x * 1.1 if path == bad else x
            return x

    engine, scale = refmoe.load(random_bf16, numerics), Scale()
    engine.using(engine.nx.watching(scale)).logits(TOKENS)
    dump = Dump(ROOT, scale.seen, TOKENS, numerics)
    report = check_truth(truth, dump)
    assert (report.verdict, report.point) == ("fault", bad), report.reason
    if layer:
        assert f"within its rounding is {bad}.gate#weights" in report.reason
    if numerics == "float32":  # from less
        layers = only(dump, *(f"model.layers.{i}" for i in range(3)))
        assert check_truth(truth, layers).point == f"model.layers.{layer}"
        assert check_truth(truth, only(dump, "lm_head")).point == "lm_head"
        assert check_truth(truth, listed(dump, 20), profile="float32").point == "lm_head"


def test_a_wrong_expert_is_found(truth, random_bf16):
    dump = run(truth, random_bf16, "bfloat16")
    path = "model.layers.1.mlp.gate#experts"
    chosen = dump.arrays[path].copy()
    known = truth.arrays["gate#experts"][3, 0]
    chosen[3, 0] = next(e for e in range(11) if e not in known)  # none of the four best refused
    report = check_truth(truth, replace(dump, arrays=dump.arrays | {path: chosen}))
    assert (report.verdict, report.point) == ("fault", path)
    assert f"token 3 chose [{chosen[3, 0]}] over" in report.reason
    assert report.router["unexplained"] == 1
    for wrong, words in ((-1, "no expert's index"), (chosen[3, 1], "token 3 chose")):
        chosen[3, 0] = wrong  # a padded row; the same expert twice
        report = check_truth(truth, replace(dump, arrays=dump.arrays | {path: chosen}))
        assert (report.verdict, report.point) == ("fault", path)
        assert words in report.reason


def test_temperature_is_found_in_logits_and_in_lists(text, tiny_k2):
    for numerics, wrong in (("float32", 1.0001), ("bfloat16", 1.3)):
        dump = run(text, tiny_k2, numerics, ("lm_head",))
        assert check_truth(text, dump).verdict == "pass"
        spoilt = replace(dump, arrays={"lm_head": dump.arrays["lm_head"] / wrong})
        report = check_truth(text, replace(spoilt, rounded=numerics))
        assert (report.verdict, report.point) == ("fault", "lm_head"), report.reason
        for k in (1, 5, 20):
            healthy = check_truth(text, listed(dump, k), profile=numerics)
            assert healthy.verdict == "pass", healthy.reason
        report = check_truth(text, listed(dump, 20, wrong), profile=numerics)
        assert (report.verdict, report.point) == ("fault", "lm_head"), report.reason


def test_a_shift_of_all_logits_shows_in_the_logsumexp_alone(truth, random_bf16):
    dump = run(truth, random_bf16, "float32", ("lm_head",))
    report = check_truth(truth, replace(dump, arrays={"lm_head": dump.arrays["lm_head"] + 0.1}))
    assert (report.verdict, report.point) == ("fault", "lm_head#logsumexp")


def test_lists_of_other_tokens_are_no_pass(text, tiny_k2):
    """The truth's ids are not listed: they can be no likelier than what is."""
    dump = listed(run(text, tiny_k2, "float32", ("lm_head",)), 20)
    ids, values = dump.top
    report = check_truth(text, replace(dump, top=((ids + 900) % 2304, values)), profile="float32")
    assert report.verdict == "fault"
    alone = (ids[:, -1:] * 0 + 2300, values[:, -1:])  # one id that says nothing of the truth's
    report = check_truth(text, replace(dump, top=alone), profile="float32")
    assert report.verdict == "undecidable"


def test_what_is_not_finite_is_a_fault(truth, random_bf16):
    dump = run(truth, random_bf16, "float32")
    for path in ("model.layers.1.mlp", "model.norm", "lm_head"):
        spoilt = dump.arrays[path].copy()
        spoilt[2, 0] = np.nan
        report = check_truth(truth, replace(dump, arrays=dump.arrays | {path: spoilt}))
        assert (report.verdict, report.point) == ("fault", path)
        assert report.reason.startswith("not finite")
        json.dumps(report.as_json(), allow_nan=False)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "point"),
    [
        ("scaling-dropped", "model.layers.1.mlp"),
        ("scaling-twice", "model.layers.1.mlp"),
        ("bias-ignored", "model.layers.1.mlp.gate#experts"),
        ("not-renormalised", "model.layers.1.mlp.gate#weights"),
        ("biased-weights", "model.layers.1.mlp.gate#weights"),
        ("mscale-missing", "model.layers.0.self_attn"),
        ("kv-a-norm-skipped", "model.layers.0.self_attn"),
        ("rope-halves", "model.layers.0.self_attn"),
        ("gate-up-swapped-shared", "model.layers.1.mlp"),
        ("rope-off-by-one", None),  # of query and key alike: the same network
    ],
)
def test_faults_of_a_running_vllm_are_found(vllm, precision, name, point):
    """The dumps are of six of the sixteen tokens, and of two layers."""
    report = check_truth(vllm[precision], read_dump(VLLM / f"{precision}-{name}.safetensors"))
    assert (report.verdict, report.point) == ("fault" if point else "pass", point), report.reason


# --- undecidable, refused


def test_too_little_is_undecidable(truth, random_bf16):
    dump = run(truth, random_bf16, "float32")
    report = check_truth(truth, replace(dump, arrays={"model.embed_tokens": np.zeros((20, 96))}))
    assert report.verdict == "undecidable"
    assert "1 tensors of the dump are of points that a truth lacks" in report.reason
    narrow = replace(dump, arrays={"model.layers.1": np.zeros((20, 95))})
    report = check_truth(truth, narrow)
    assert report.verdict == "undecidable"
    assert report.unmatched == {"model.layers.1": "it is [20, 95], this point is [20, 96]"}


def test_other_tokens_profiles_and_engines_are_refused(truth, random_bf16, tmp_path):
    dump = run(truth, random_bf16, "float32")
    with pytest.raises(InputError, match="other tokens"):
        check_truth(truth, replace(dump, tokens=[1, *TOKENS[1:]]))
    with pytest.raises(InputError, match="make a truth under --conventions vllm"):
        check_truth(truth, dump, engine="vllm")
    assert check_truth(truth, dump, engine="transformers").verdict == "pass"  # the same network
    with pytest.raises(InputError, match="none serves for bfloat16-router"):
        check_truth(truth, dump, profile="bfloat16-router")
    assert check_truth(truth, dump, profile="llama.cpp").profile == "llama.cpp-q8"
    coarse = refmoe.load(random_bf16, "bfloat16")
    rough = read_truth(make(coarse, [1, 2, 3, 4], tmp_path / "t", profiles=["float32"]))
    with pytest.raises(InputError, match="numerics bfloat16; none serves for float32"):
        check_truth(rough, Dump(ROOT, {}, [1, 2, 3, 4], "float32"))
    for wrong in ({"profiles": ["int3"]}, {"runs": 1}, {"top": 0}):
        with pytest.raises(InputError):
            make(coarse, [1, 2, 3], tmp_path / "t", **wrong)
    with pytest.raises(InputError, match="the prompt is empty"):
        make(coarse, [], tmp_path / "t")


def test_groups(tmp_path):
    """DeepSeek-V3's: masked scores are -inf, a flip may be of a whole group."""
    write_member(tmp_path / "v3", "deepseek-v3", seed=1)
    grouped = refmoe.load(tmp_path / "v3", "float64", reference=True)
    tokens = [i * 11 % 500 for i in range(12)]
    made = read_truth(make(grouped, tokens, tmp_path / "t.safetensors", profiles=["float32"]))
    assert "gate#groups" in made.arrays
    dump = run(made, tmp_path / "v3", "float32")
    report = check_truth(made, dump)
    assert report.verdict == "pass", report.reason


def damaged(raw, change):
    """The same file with other facts."""
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    facts = json.loads(header["__metadata__"][truth_layout.KEY])
    change(header, facts)
    header["__metadata__"] = {truth_layout.KEY: json.dumps(facts)}
    whole = json.dumps(header).encode()
    return len(whole).to_bytes(8, "little") + whole + raw[8 + length :]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h, f: f.update(version=2), "is version 2, this refmoe reads 1"),
        (lambda h, f: f.update(tokens=[1, 2]), "layers#sketch is missing, or not"),
        (lambda h, f: f.update(tokens=[10**9] * 20), "the vocabulary has ids"),
        (lambda h, f: f.update(tokens="many"), "no list of integers"),
        (lambda h, f: f.update(top=-1), "top = -1"),
        (lambda h, f: f.update(numerics="int8"), "numerics 'int8'"),
        (lambda h, f: f.update(config="{}"), "sha256"),
        (lambda h, f: f.update(profiles=[{"name": "x"}]), "makes no sense"),
        (lambda h, f: f.update(profiles=[]), "expected None"),
        (lambda h, f: f.update(conventions={"sides": 1}), "makes no sense"),
        (lambda h, f: f["conventions"].update(rounded_products=7), "makes no sense"),
        (lambda h, f: f["conventions"].update(name=7), "conventions named 7"),
        (lambda h, f: f.pop("tokens"), "makes no sense"),
        (lambda h, f: h["layers#sketch"].update(shape=[20, 65, 3]), "layers#sketch is missing"),
        (lambda h, f: h["gate#experts"].update(dtype="U16"), "gate#experts is"),
        (lambda h, f: h.update(other=h.pop("gate#weights")), "gate#weights is None"),
    ],
)
def test_damaged_facts_are_refused(file, tmp_path, change, words):
    path = tmp_path / "t.safetensors"
    path.write_bytes(damaged(file.read_bytes(), change))
    with pytest.raises(InputError, match=words) as refused:
        read_truth(path)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.norm", np.nan),
        ("gate#scores", np.nan),
        ("gate#experts", 11),
        ("gate#experts", -1),
        ("lm_head#ids", 1 << 20),
        ("lm_head#logprobs", 1.0),
        ("lm_head#logsumexp", np.inf),
        ("float32#spread", np.inf),
    ],
)
def test_numbers_that_cannot_be_are_refused(file, tmp_path, name, value):
    truth = read_truth(file)
    arrays = {n: x.copy() for n, x in truth.arrays.items()}
    arrays[name].flat[0] = value
    write(tmp_path / "t", arrays, {truth_layout.KEY: json.dumps(truth.facts)})
    with pytest.raises(InputError, match=name):
        read_truth(tmp_path / "t")


def test_other_files_are_refused(file, tmp_path, random_bf16):
    raw = file.read_bytes()
    path = tmp_path / "t.safetensors"
    for part in (raw[:100], raw[:-1], raw + b"x", b""):
        path.write_bytes(part)
        with pytest.raises(InputError, match=r"t\.safetensors"):
            read_truth(path)
    shard = next(random_bf16.glob("*.safetensors"))
    with pytest.raises(InputError, match="no truth"):
        read_truth(shard)
    with pytest.raises(InputError, match="no such file"):
        read_truth(tmp_path / "none")


@pytest.mark.parametrize("rows", [18, 3])
@pytest.mark.parametrize("damage", ["none", "reversed", "of no shape"])
def test_the_last_rows_of_the_head_are_judged_or_forbid_a_pass(truth, random_bf16, damage, rows):
    """A server computes the logits of a prompt's last row alone."""
    arrays = refmoe.trace(refmoe.load(random_bf16, "bfloat16"), truth.tokens, ["model.layers.?"])
    logits = refmoe.trace(refmoe.load(random_bf16, "bfloat16"), truth.tokens, ["lm_head"])
    last = logits["lm_head"][-rows:]
    if damage != "none":
        last = last[:, ::-1] if damage == "reversed" else last[:, :-1]
    dump = Dump(ROOT, arrays | {"lm_head": last}, list(truth.tokens), "bfloat16")
    report = check_truth(truth, dump)
    expected = {"none": "pass", "reversed": "fault", "of no shape": "undecidable"}[damage]
    expected = expected if rows == 18 else "undecidable"
    assert report.verdict == expected, report.reason
    assert damage != "of no shape" or "lm_head" in report.reason
