"""Every fault of the dictionary changes something, first where it says, and nothing else."""

import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import refmoe
from refmoe.files import InputError
from refmoe.model.decoder import Decoder, layer
from refmoe.model.matrix import round_bf16
from refmoe.model.mla import Segment
from refmoe.model.points import kind
from refmoe.model.rope import cos_sin, inv_freq, softmax_scale
from refmoe.oracle.faults import base as faults_base
from refmoe.oracle.faults.base import Fault, altered
from refmoe.oracle.faults.dictionary import BY_ID, FAULTS, candidates, equivalent, page, select
from refmoe.oracle.trace import Recorder
from refmoe.weights.synthetic.members import write_member
from refmoe.weights.synthetic.random import write_random
from tests.conftest import ROOT
from tests.networks import network

TOKENS = [5, 17, 2, 44, 9, 30, 11, 3, 52, 8, 21, 40]
Values = dict[str, np.ndarray]


def loud() -> Decoder:
    """Values beyond float16, negative scores in groups, a bias that bf16 rounds coarsely."""
    decoder = network(3, n_group=4, topk_group=2)
    layers = list(decoder.layers)
    moe = layers[1].mlp
    bias = moe.gate.e_score_correction_bias - 34.5
    layers[1] = layers[1]._replace(
        mlp=moe._replace(gate=moe.gate._replace(e_score_correction_bias=bias))
    )
    return replace(decoder, embed_tokens=1e5 * decoder.embed_tokens, layers=layers)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Decoder]:
    """float64 decoders that between them have all that a fault can need."""
    folder = tmp_path_factory.mktemp("models")
    write_random(folder / "int4", "int4", seed=2)
    for member in ("deepseek-v3", "moonlight"):
        write_member(folder / member, member, seed=4)

    def load(path: Path | None) -> Decoder:
        return refmoe.load(path, "float64", reference=True).decoder

    names = ("int4", "deepseek-v3", "moonlight")
    return {
        "tiny-k2": load(None),
        **{name: load(folder / name) for name in names},
        "loud": loud(),
    }


def recorded(decoder: Decoder) -> Values:
    recorder = Recorder()
    quiet = replace(decoder.nx, watch=recorder, stop_at_nonfinite=False)
    decoder.using(quiet).logits(TOKENS)
    return recorder.seen


def injected(
    decoder: Decoder, values: Values, alter: Callable[[Decoder], Decoder]
) -> tuple[list[str], Values]:
    """What the altered decoder makes at each point of these values, which it goes on with."""
    made: Values = {}

    def replay(path: str, x: np.ndarray) -> np.ndarray:
        made[path] = x
        value = values.get(path)
        return value if value is not None and value.shape == x.shape else x

    watched = decoder.using(replace(decoder.nx, watch=replay, stop_at_nonfinite=False))
    alter(watched).logits(TOKENS)
    return list(made), made


def departures(decoder: Decoder, values: Values, alter: Callable[[Decoder], Decoder]) -> list[str]:
    """Points at which the altered decoder departs from these values, in order."""
    order, made = injected(decoder, values, alter)
    wanted = [p for p in order if not p.endswith("#rows")]
    return [p for p in wanted if p not in values or differ(made[p], values[p])]


def differ(a: np.ndarray, b: np.ndarray) -> bool:
    if a.shape != b.shape or a.dtype.kind == "i":
        return a.shape != b.shape or bool((np.sort(a) != np.sort(b)).any())
    return not np.linalg.norm(a - b) <= 1e-9 * np.linalg.norm(b)


@pytest.fixture(scope="module")
def healthy(models: dict[str, Decoder]) -> dict[str, Values]:
    return {name: recorded(decoder) for name, decoder in models.items()}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.id)
def test_a_fault_shows_first_at_its_points_and_only_there(fault, models, healthy):
    """Each operation is given the healthy inputs, so that the wrong operations alone depart."""
    found = [
        kind(p)
        for name, decoder in models.items()
        for p in departures(decoder, healthy[name], lambda d: altered(d, fault))
    ]
    assert found
    assert [k for k in found if not k.endswith(fault.points)] == []


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.id)
def test_a_fault_can_be_confined_to_one_layer(fault, models, healthy):
    """The last one; the ends of the network are in no layer."""
    found = []
    for name, decoder in models.items():
        if fault.where(decoder.cfg):
            last = len(decoder.layers) - 1
            there = departures(decoder, healthy[name], lambda d, i=last: altered(d, fault, i))
            found += [p for p in there]
            assert [p for p in there if kind(p).startswith("model.layers")] == [
                p for p in there if p.startswith(f"model.layers.{last}")
            ]
    assert found


def test_no_two_faults_do_the_same_unless_it_is_said(models, healthy):
    """Of what most engines dump, the first point that departs tells faults apart."""
    common = ("embed_tokens", "model.layers", ".self_attn", ".mlp", "mlp.experts")
    common += ("shared_experts", "model.norm", "lm_head")
    first: dict[str, dict[str, tuple[str, np.ndarray]]] = {}
    for name, decoder in models.items():
        values = {p: x for p, x in healthy[name].items() if kind(p).endswith(common)}
        last = len(decoder.layers) - 1
        for fault in FAULTS:
            order, made = injected(decoder, values, lambda d, f=fault, i=last: altered(d, f, i))
            for p in order:
                if p in values and differ(made[p], values[p]):
                    first.setdefault(fault.id, {})[name] = p, made[p]
                    break
    assert set(BY_ID) - set(first) == {"rope-from-one"}

    def same(a: str, b: str) -> bool:
        shared = first[a].keys() & first[b].keys()
        return bool(shared) and all(
            first[a][n][0] == first[b][n][0] and not differ(first[a][n][1], first[b][n][1])
            for n in shared
        )

    pairs = {(a, b) for a in first for b in first if a < b and same(a, b)}
    said = {(a, b) for group in equivalent for a in group for b in group if a < b}
    assert pairs == said


def test_a_fault_in_part(models, healthy):
    """At strength 1 it is the fault; a part of it is found by least squares, and the constant."""
    decoder, values = models["tiny-k2"], healthy["tiny-k2"]
    for fault in FAULTS:
        if fault.strength is None or not fault.where(decoder.cfg):
            continue
        whole = injected(decoder, values, lambda d, f=fault: altered(d, f))[1]
        part = injected(decoder, values, lambda d, f=fault: altered(d, f, strength=0.25))[1]
        for p in values:
            if fault.id.startswith(("norm", "rope", "scaling", "scale", "act")) and differ(
                whole[p], values[p]
            ):
                wanted = pytest.approx(0.25, rel=1e-6)
                assert faults_base.strength_of(part[p], values[p], whole[p]) == wanted
    scaling = BY_ID["scaling-dropped"]
    assert scaling.fitted.at(decoder.cfg, 1) == pytest.approx(1 / 2.827)
    weights = next(p for p in values if p.endswith("gate#weights"))
    part = injected(decoder, values, lambda d: altered(d, scaling, strength=0.25))[1][weights]
    assert part / values[weights] == pytest.approx(scaling.fitted.at(decoder.cfg, 0.25))
    with pytest.raises(ValueError, match="int4-swapped has no strength"):
        altered(decoder, BY_ID["int4-swapped"], strength=0.5)


@pytest.mark.parametrize("name", ["int4-swapped", "act-gelu", "experts-missing"])
def test_a_fault_can_be_confined_to_one_expert(name, models, healthy):
    decoder, values = models["tiny-k2"], healthy["tiny-k2"]
    e = int(values["model.layers.2.mlp.gate#experts"][0, 0])
    found = departures(decoder, values, lambda d: altered(d, BY_ID[name], 2, e))
    assert found
    for p in found:
        assert p.startswith((f"model.layers.2.mlp.experts.{e}.", "model.layers.2.mlp.experts"))
        assert ".experts." not in p or f".experts.{e}." in p
    for other in ("top-k-too-few", "head-tied", "norm-sum"):
        with pytest.raises(ValueError, match="no fault of a single expert"):
            altered(decoder, BY_ID[other], 2, e)


def test_a_fault_can_be_confined_to_one_matrix(models, healthy):
    decoder, values = models["tiny-k2"], healthy["tiny-k2"]
    e = int(values["model.layers.2.mlp.gate#experts"][0, 0])
    swapped = BY_ID["int4-swapped"]
    found = departures(decoder, values, lambda d: altered(d, swapped, 2, e, "up_proj"))
    assert found == [f"model.layers.2.mlp.experts.{e}.up_proj"]
    found = departures(decoder, values, lambda d: altered(d, swapped, None, e, "down_proj"))
    assert {kind(p) for p in found} == {"model.layers.mlp.experts.down_proj"}
    with pytest.raises(ValueError, match="act-gelu is no fault of a single up_proj"):
        altered(decoder, BY_ID["act-gelu"], 2, e, "up_proj")


def test_a_layer_can_be_run_alone(models, healthy):
    """What enters it is shown to the watcher, and is not taken for a result of the fault."""
    decoder, values = models["tiny-k2"], healthy["tiny-k2"]
    for name in ("residual-twice", "layer-dropped", "layer-twice"):
        made = {}
        watched = decoder.using(decoder.nx.watching(lambda p, x, m=made: m.setdefault(p, x)))
        faulty = altered(watched, BY_ID[name])
        x = faulty.nx.tap("model.layers.1", values["model.layers.1"])
        segments = [Segment(slice(0, len(x)), faulty.caches()[2])]
        nx, experts = faulty.nx.within("model.layers.2."), partial(faulty.experts, 2)
        layer(x, faulty.layers[2], experts, segments, faulty.cfg, nx)
        assert not differ(made["model.layers.1"], values["model.layers.1"])
        wanted = injected(decoder, values, lambda d, n=name: altered(d, BY_ID[n]))[1]
        assert not differ(made["model.layers.2"], wanted["model.layers.2"])


def test_the_watcher_inside_sees_what_is_written_and_not_how_it_is_misread(models, healthy):
    decoder, values = models["int4"], healthy["int4"]
    at = "model.layers.0.self_attn"
    written = recorded_with(decoder, BY_ID["norm-kv-skipped"])
    assert differ(written[f"{at}.kv_a_layernorm"], values[f"{at}.kv_a_layernorm"])
    assert differ(written[f"{at}.kv_b_proj"], values[f"{at}.kv_b_proj"])
    misread = recorded_with(decoder, BY_ID["cache-latent-unnormed"])
    assert not differ(misread[f"{at}.kv_a_layernorm"], values[f"{at}.kv_a_layernorm"])
    assert not differ(misread[f"{at}.kv_b_proj"], written[f"{at}.kv_b_proj"])
    few = Recorder(["lm_head"])  # what it does not want, it is not shown
    altered(decoder.using(decoder.nx.watching(few)), BY_ID["act-relu"]).logits(TOKENS)
    assert set(few.seen) == {"lm_head"}


def recorded_with(decoder: Decoder, fault: Fault) -> Values:
    recorder = Recorder()
    altered(decoder.using(decoder.nx.watching(recorder)), fault).logits(TOKENS)
    return recorder.seen


def test_nothing_is_changed_in_place(models, healthy):
    decoder = models["tiny-k2"]
    before = decoder.logits(TOKENS)
    for fault in FAULTS:
        if fault.where(decoder.cfg) and fault.predicts:
            altered(decoder, fault).logits(TOKENS)
    np.testing.assert_array_equal(decoder.logits(TOKENS), before)
    assert decoder.nx.watch is None


def test_what_an_emulated_engine_writes_is_rounded(random_int4):
    decoder = refmoe.load(random_int4, "bfloat16", reference=True).decoder
    seen = recorded_with(decoder, BY_ID["act-gelu"])
    for path, x in seen.items():
        if path.endswith((".act", "input_layernorm")):
            np.testing.assert_array_equal(round_bf16(x), x, err_msg=path)


def test_an_engine_that_forgets_to_permute_queries(random_bf16):
    """transformers brings pairs into halves before it rotates; the fault forgets it for queries."""
    model = refmoe.load(random_bf16, "float64", reference=True)
    decoder, cfg = model.decoder, model.cfg
    values = recorded_with(decoder, BY_ID["rope-unpermuted-q"])
    at = "model.layers.0.self_attn"
    H, N, R = cfg.num_attention_heads, cfg.qk_nope_head_dim, cfg.qk_rope_head_dim
    q = values[f"{at}.q_b_proj"].reshape(len(TOKENS), H, -1)
    k = values[f"{at}.kv_a_proj_with_mqa"][:, None, cfg.kv_lora_rank :]
    kv = values[f"{at}.kv_b_proj"].reshape(len(TOKENS), H, -1)
    angle = np.arange(len(TOKENS))[:, None] * inv_freq(cfg)  # [T, R/2]

    def rotate_half(x: np.ndarray) -> np.ndarray:
        half = np.concatenate((-x[..., R // 2 :], x[..., : R // 2]), axis=-1)
        cos, sin = (np.tile(f(angle), 2)[:, None] for f in (np.cos, np.sin))
        return x * cos + half * sin

    permuted = np.concatenate((k[..., 0::2], k[..., 1::2]), axis=-1)
    gain = cos_sin(np.zeros(1), cfg, decoder.nx)[0][0, 0]  # YaRN's, of both sides
    q_pe, k_pe = gain * rotate_half(q[..., N:]), gain * rotate_half(permuted)[:, 0]
    rotated = np.einsum("thr,sr->ths", q_pe, k_pe)
    scores = np.einsum("thn,shn->ths", q[..., :N], kv[..., :N]) + rotated
    np.testing.assert_allclose(values[f"{at}#scores"], scores * softmax_scale(cfg), rtol=1e-9)


def test_candidates_are_those_of_a_point_and_of_what_is_judged_with_it(models):
    tiny, groups = models["tiny-k2"].cfg, models["deepseek-v3"].cfg

    def ids(*args) -> set[str]:
        return {f.id for f in candidates(*args)}

    weights = ids("model.layers.2.mlp.gate#weights", ())
    assert {"scaling-dropped", "weights-biased", "softmax-router"} <= weights
    assert "bias-ignored" not in weights
    assert "bias-ignored" in ids("model.layers.2.mlp", ("model.layers.2.mlp.gate#experts",))
    choice = "model.layers.2.mlp.gate#experts"
    assert "groups-maximum" in ids(choice, (), groups)
    assert "groups-maximum" not in ids(choice, (), tiny)
    assert ids("model.layers.3", ()) >= {"layer-dropped", "residual-twice"}
    assert "layer-dropped" not in ids("model.layers.3#attn_residual", ())
    assert ids("model.layers.2.mlp.experts", (), tiny) >= {"int4-swapped", "gate-up-swapped"}
    assert "fp8-fnuz" not in ids("model.layers.2.mlp.experts", (), tiny)


def test_entries_are_well_formed():
    assert len(BY_ID) == len(FAULTS) >= 40
    for fault in FAULTS:
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", fault.id)
        assert fault.text
        assert not fault.text.endswith(".")
        assert fault.points
        for reference in fault.references:
            assert re.fullmatch(r"[\w.-]+/[\w.-]+(#\d+|@[0-9a-f]{7,})", reference)
    assert {i for group in equivalent for i in group} <= set(BY_ID)


def test_a_fault_is_added_in_ten_lines(models, healthy):
    """The example at the head of the file, from its own text."""
    text = re.search(r"    LAYERS \+= written\(\n.*?\n    \)\n", faults_base.__doc__, re.DOTALL)
    assert text is not None
    assert len(text[0].splitlines()) <= 10
    family = faults_base.Family("layers")
    exec(textwrap.dedent(text[0]), {**vars(faults_base), "LAYERS": family})
    (fault,) = family
    assert fault.references == ("owner/repo#123", "owner/another#45")
    found = departures(models["loud"], healthy["loud"], lambda d: altered(d, fault))
    assert found == ["lm_head"]


def test_a_fault_is_added_in_one_file(tmp_path):
    """An entry at the end of a family's file, in a copy, is in the dictionary and on its page."""
    package = tmp_path / "refmoe"
    shutil.copytree(ROOT / "refmoe", package, ignore=shutil.ignore_patterns("__pycache__"))
    text = re.search(r"    LAYERS \+= written\(\n.*?\n    \)\n", faults_base.__doc__, re.DOTALL)
    mine = textwrap.dedent(text[0]).replace("logits-softcap", "logits-squashed")
    with (package / "oracle" / "faults" / "layers.py").open("a", encoding="utf-8") as file:
        file.write(f"\n{mine}")
    code = (
        "from refmoe.oracle.faults.dictionary import BY_ID, page, select\n"
        "(fault,) = select(['logits-squashed'])\n"
        "assert fault is BY_ID['logits-squashed'] and '`logits-squashed`' in page()\n"
        f"assert len(BY_ID) == {len(FAULTS) + 1}\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_page_of_faults_is_generated_from_the_dictionary():
    assert (ROOT / "docs" / "faults.md").read_text("utf-8") == page()


def test_an_unknown_fault_is_refused_with_the_nearest():
    assert [f.id for f in select(["norm-sum", "act-gelu"])] == ["act-gelu", "norm-sum"]
    assert select([]) == list(FAULTS)
    with pytest.raises(InputError, match=r"'scaling-droped.* did you mean scaling-drop"):
        select(["norm-sum", "scaling-droped"])
    with pytest.raises(InputError, match=r"docs/faults\.md lists them"):
        select(["zzzzzz"])


def test_runs_of_several_prompts_are_refused(models):
    decoder = altered(models["int4"], BY_ID["act-relu"])
    with pytest.raises(ValueError, match="faults are planted in runs of one prompt"):
        decoder.hidden([[1, 2], [3]], [decoder.caches(), decoder.caches()])
