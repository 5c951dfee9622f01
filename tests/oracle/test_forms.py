"""The forms in which engines hand out tensors: each is placed, and none is passed over unjudged.

The tensors are those of a real vLLM run of tiny-k2 in bfloat16 (golden/vllm), cut, padded, joined
and reordered as servers and hooks do.
"""

from dataclasses import replace

import numpy as np
import pytest

import refmoe
from refmoe.oracle.check import check, judge_dump
from refmoe.oracle.forms.rows import NONE, align, distances, ranges, visits
from refmoe.oracle.readers.adapt import adapt
from refmoe.oracle.readers.arrays import dump_of_arrays
from refmoe.oracle.readers.base import Dump, read_prompts
from refmoe.oracle.readers.dump import read_dump
from tests.conftest import ROOT

HEALTHY = ROOT / "golden" / "vllm" / "bfloat16-healthy.safetensors"
WRONG = ROOT / "golden" / "vllm" / "bfloat16-scaling-dropped.safetensors"


@pytest.fixture(scope="module")
def model(tiny_k2):
    return refmoe.load(tiny_k2, "float64", reference=True)


@pytest.fixture(scope="module")
def healthy():
    return read_dump(HEALTHY)


@pytest.fixture(scope="module")
def second(model):
    """Another prompt as a rounding engine has it: float64 at every point, stored in bfloat16."""
    return refmoe.trace(refmoe.load(model.checkpoint.path, "bfloat16"), SECOND)


SECOND = [7, 301, 12, 455, 99, 530, 2, 410, 31, 267]


def few(dump: Dump, *ends: str) -> Dump:
    """Return a dump of fewer tensors, so that a test is quick."""
    return replace(dump, arrays={n: x for n, x in dump.arrays.items() if n.endswith(ends)})


ENDS = ("embed_tokens", "input_layernorm", "q_b_proj", "lm_head", "norm", "#residual", ".mlp")


def changed(dump: Dump, change) -> Dump:
    return replace(dump, arrays={n: change(n, x) for n, x in dump.arrays.items()})


def judged(model, dump: Dump, tokens=None):
    return check(model, dump, tokens, engine="vllm")


FORMS = {
    "the last rows, after a cached prefix": lambda n, x: x[len(x) // 3 :],
    "the first rows, a chunk": lambda n, x: x[: len(x) // 2],
    "rows in the middle": lambda n, x: x[1:-2],
    "one row": lambda n, x: x[-1:],
    "the head of the last row": lambda n, x: x[-1:] if n == "lm_head" else x,
    "padding behind": lambda n, x: np.concatenate([x, 0 * x[:5]]),
    "padding in front": lambda n, x: np.concatenate([0 * x[:3], x]),
    "padding at both ends": lambda n, x: np.concatenate([0 * x[:3], x, 0 * x[:1]]),
    "chunks that overlap": lambda n, x: np.concatenate([x[:4], x[2:]]),
    "the first rows twice": lambda n, x: np.concatenate([x[:3], x]),
    "chunks in another order": lambda n, x: np.concatenate([x[4:], x[:4]]),
    "a batch of one": lambda n, x: x[None],
    "a batch of the same prompt": lambda n, x: np.stack([x, x, x]),
    "a batch of which the head has last rows": lambda n, x: (
        np.stack([x[-1], x[-1]]) if n == "lm_head" else np.stack([x, x])
    ),
}


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_healthy_dump_passes_in_any_form(model, healthy, form):
    report = judged(model, changed(few(healthy, *ENDS), FORMS[form]))
    assert report.verdict == "pass", report.reason
    assert report.coverage.unfitted == {}


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_wrong_dump_is_wrong_in_any_form(model, form):
    dump = few(read_dump(WRONG), *ENDS)
    report = judged(model, changed(dump, FORMS[form]))
    assert report.verdict == "fault", report.reason
    if "one row" not in form:
        assert report.point == "model.layers.1.mlp"


DAMAGE = {
    "reversed": lambda x: x[..., ::-1].copy(),
    "zeros": lambda x: 0 * x,
    "rows exchanged": lambda x: np.roll(x, 1, axis=0),
    "of half the columns": lambda x: x[:, : x.shape[1] // 2 + 1],
    "of no shape": lambda x: x.ravel()[:-1],
    "not finite": lambda x: np.where(np.arange(x.shape[-1]) == 3, np.nan, x),
    "empty": lambda x: x[:0],
}


@pytest.mark.parametrize("name", ["lm_head", "model.layers.1.self_attn.q_b_proj"])
@pytest.mark.parametrize("damage", DAMAGE, ids=str)
def test_what_is_damaged_is_never_passed_over(model, healthy, name, damage):
    """Nor in another form: only the last row of the head, as servers dump it."""
    dump = few(healthy, *ENDS)
    for form in ("whole", "last rows"):
        rows = slice(None) if form == "whole" else slice(-3, None)
        arrays = {n: x[rows] if n == name else x for n, x in dump.arrays.items()}
        arrays[name] = DAMAGE[damage](arrays[name])
        report = judged(model, replace(dump, arrays=arrays))
        assert report.verdict != "pass", (form, report.reason)
        if report.verdict == "undecidable":
            assert name in report.coverage.unfitted
            assert name in report.reason


def test_a_single_row_of_the_head_is_the_last_or_no_pass(model, healthy):
    """A server that answers one row early hands out a row that is healthy elsewhere."""
    dump = few(healthy, *ENDS)
    early = replace(dump, arrays=dump.arrays | {"lm_head": dump.arrays["lm_head"][-2:-1]})
    report = judged(model, early)
    assert report.verdict == "undecidable"
    assert "positions 14" in report.coverage.unfitted["lm_head"]


@pytest.mark.parametrize("row", [3, -1])
def test_a_row_that_is_wrong_in_every_tensor_is_no_padding(model, healthy, row):
    """Neither between rows of a prompt, nor at its end, where a row of it is missing then."""
    arrays = {}
    for seed, (n, x) in enumerate(sorted(few(healthy, *ENDS).arrays.items())):
        arrays[n] = x[4:].copy()
        noise = np.random.default_rng(seed).standard_normal(x[0].shape)
        arrays[n][row] = -x[4:][row] + np.abs(x).mean() * noise
    report = judged(model, replace(healthy, arrays=arrays))
    assert report.verdict != "pass", report.notes


def test_columns_beyond_the_vocabulary_are_cut_and_told(model, healthy):
    """An engine pads the head so that ranks share it evenly; what is cut is said."""
    dump = few(healthy, *ENDS)
    padded = np.pad(dump.arrays["lm_head"], ((0, 0), (0, 64)))
    report = judged(model, replace(dump, arrays=dump.arrays | {"lm_head": padded}))
    assert report.verdict == "pass", report.reason
    assert "lm_head has 64 columns beyond the vocabulary, which are not compared" in report.notes


def test_a_known_point_that_is_not_computed_here_forbids_a_pass(model, healthy):
    dump = few(healthy, *ENDS)
    for name in (
        "model.layers.61.mlp",
        "model.layers.0.mlp.gate",
        "model.layers.0.self_attn#probs",
    ):
        extra = {name: np.ones((16, 3), np.float32)}
        report = judged(model, replace(dump, arrays=dump.arrays | extra))
        assert report.verdict == "undecidable"
        assert list(report.coverage.unfitted) == [name]
    report = judged(model, replace(dump, arrays=dump.arrays | {"rotary.cos": np.ones((16, 3))}))
    assert report.verdict == "pass"  # no point's name
    assert "rotary.cos" in report.unmatched


def test_coverage_counts_what_is_judged_alone_together_and_not_at_all(model, healthy):
    layers = model.cfg.num_hidden_layers
    until = few(healthy, "embed_tokens", "layers.0.input_layernorm", "layers.1.input_layernorm")
    c = judged(model, until).coverage
    # embedding, two norms; the layer between is judged together with the norm after it
    assert (c.tensors, c.alone) == (3, 3)
    assert c.together > 10
    assert c.alone + c.together < c.operations
    assert c.layers == tuple(range(2, layers))
    assert c.positions == (16, 16)
    last = changed(few(healthy, "lm_head"), lambda n, x: x[-1:])
    c = judged(model, last).coverage
    assert c.alone + c.together == c.operations
    assert c.positions == (1, 16)
    assert c.parts == {"lm_head": "rows 15 of 16"}


# --- tokens


def test_a_wrong_list_of_tokens_is_told_as_that(model, healthy):
    dump, tokens = few(healthy, *ENDS), healthy.tokens
    wrong = {
        "1 row ahead of": [1, *tokens[:-1]],
        "2 rows behind": [*tokens[2:], 5, 6],
        "another text": [(7 * t + 3) % 500 for t in tokens[::-1]],
        "16 tokens, the list 12": tokens[:12],
    }
    for said, given in wrong.items():
        report = judged(model, dump, given)
        assert report.verdict == "undecidable", given
        assert "wrong list of tokens" in report.reason
        assert said in report.reason
        assert ", ".join(map(str, tokens[:6])) in report.reason
    dump = few(read_dump(WRONG), *ENDS)
    report = judged(model, dump, [1, *dump.tokens[:-1]])
    assert (report.verdict, report.point) == ("fault", "model.layers.1.mlp")
    assert any("wrong list of tokens" in n for n in report.notes)


def test_a_lookup_of_other_rows_is_the_engines_fault(model, healthy):
    """One less than each id, as an engine with an offset reads: the list is right."""
    table = refmoe.trace(model, [t - 1 for t in healthy.tokens], ["model.embed_tokens"])
    report = judged(model, replace(healthy, arrays=table))
    assert (report.verdict, report.point) == ("fault", "model.embed_tokens")


def test_rows_of_the_embedding_name_the_tokens(model, healthy):
    for ends in (ENDS, tuple(e for e in ENDS if e != "embed_tokens")):
        dump = replace(few(healthy, *ends), tokens=None)
        report = judged(model, dump)
        assert report.verdict == "pass", report.reason
        assert any("rows of the embedding name" in n for n in report.notes)
    with pytest.raises(refmoe.InputError, match="--tokens"):
        judged(model, replace(few(healthy, "lm_head"), tokens=None))


# --- several prompts


def pair(healthy: Dump, second, join) -> Dump:
    """Join the rows of two prompts, of the points that both have."""
    arrays = {n: join(n, x, second[n]) for n, x in healthy.arrays.items() if n in second}
    return replace(few(replace(healthy, arrays=arrays), *ENDS), tokens=None)


def in_turns(n, a, b):
    """Two prefills, then a token of each in turn."""
    rest = [x[i : i + 1] for i in range(8, 10) for x in (a, b)]
    return np.concatenate([a[:8], b[:8], *rest, a[10:]])


PAIRS = {
    "one after the other": lambda n, a, b: np.concatenate([a, b]),
    "in turns": in_turns,
    "padded on the left": lambda n, a, b: np.stack([a, np.concatenate([0 * a[:6], b])]),
    "padded on the right": lambda n, a, b: np.stack([a, np.concatenate([b, 0 * a[:6]])]),
    "the head of last rows": lambda n, a, b: (
        np.stack([a[-1], b[-1]]) if n == "lm_head" else np.concatenate([a, b])
    ),
}


@pytest.mark.parametrize("form", PAIRS, ids=str)
def test_two_prompts_of_one_dump_are_judged_each(model, healthy, second, form):
    dump = pair(healthy, second, PAIRS[form])
    report = judge_dump(model, dump, [healthy.tokens, SECOND], "refmoe", "bfloat16").report
    assert report.verdict == "pass", report.reason
    assert [p.label for p in report.prompts] == ["prompt 1 of 2", "prompt 2 of 2"]
    name = "model.layers.2.self_attn.q_b_proj"

    def spoilt(n, a, b):
        return PAIRS[form](n, a, b + 0.5 * (n == name))

    report = judge_dump(model, pair(healthy, second, spoilt), [healthy.tokens, SECOND]).report
    assert (report.verdict, report.point) == ("fault", name)
    assert "prompt 2 of 2" in report.reason


def test_ids_masks_and_positions_tell_the_prompts(healthy):
    a, b = healthy.tokens, SECOND
    padded = np.array([a, [0] * 6 + b])
    mask = np.array([[1] * 16, [0] * 6 + [1] * 10])
    assert read_prompts("x", padded, mask) == [a, b]
    assert read_prompts("x", [a, b]) == [a, b]
    row = np.array(a + b)
    positions = np.array([*range(16), *range(10)])
    assert read_prompts("x", row, None, positions) == [a, b]
    turns = np.array([*a[:8], *b[:8], a[8], b[8], a[9], b[9], *a[10:]])
    positions = np.array([*range(8), *range(8), 8, 8, 9, 9, *range(10, 16)])
    assert read_prompts("x", turns, None, positions) == [a, b]
    assert read_prompts("x", row, None, np.arange(26)) == [a + b]
    dump = dump_of_arrays(HEALTHY, {"input_ids": padded, "attention_mask": mask})
    assert dump.prompts == (a, b)


# --- several passes of one prompt


def test_passes_under_numbered_names_are_one_prompt(model, healthy):
    """A hook's lists, dicts of each pass, a prefill in chunks and single tokens after it."""
    dump = few(healthy, *ENDS)
    spans = (slice(0, 9), slice(9, 14), slice(14, 15), slice(15, 16))
    ids = np.array(healthy.tokens)
    lists = {f"{n}.{i}": x[s] for n, x in dump.arrays.items() for i, s in enumerate(spans)}
    lists |= {f"input_ids.{i}": ids[None, s] for i, s in enumerate(spans)}
    dicts = {
        f"step_{i}.{n}": x[None, s] for n, x in dump.arrays.items() for i, s in enumerate(spans)
    }
    dicts |= {f"step_{i}.input_ids": ids[s] for i, s in enumerate(spans)}
    for arrays in (lists, dicts):
        joined = dump_of_arrays(HEALTHY, arrays)
        assert joined.tokens == healthy.tokens
        assert any("4 passes, joined" in n for n in joined.notes)
        report = judged(model, joined)
        assert report.verdict == "pass", report.reason
        assert report.coverage.tensors == len(adapt(dump.arrays, model.cfg))
        name = "model.layers.2.self_attn.q_b_proj"
        key = next(n for n in arrays if n.endswith(f"{name}.3") or n == f"step_3.{name}")
        spoilt = dump_of_arrays(HEALTHY, arrays | {key: arrays[key][..., ::-1]})
        report = judged(model, spoilt)
        assert (report.verdict, report.point) == ("fault", name)


def test_a_modules_tuple_is_its_output_and_the_sum(model, healthy):
    arrays = {}
    for n, x in few(healthy, *ENDS).arrays.items():
        if n + "#residual" in healthy.arrays:
            arrays |= {f"{n}.0": x, f"{n}.1": healthy.arrays[n + "#residual"]}
        elif not n.endswith("#residual"):
            arrays[n] = x
    dump = dump_of_arrays(HEALTHY, arrays | {"input_ids": np.array(healthy.tokens)})
    assert dump.arrays.keys() == few(healthy, *ENDS).arrays.keys()
    assert judged(model, dump).verdict == "pass"


def test_rows_after_a_prefix_that_nobody_gives_are_judged_where_they_can_be(model, healthy):
    """The rows' own tokens alone: positions are solved, what rests on the others is not judged."""
    arrays = {n: x[6:] for n, x in adapt(healthy.arrays, model.cfg).items() if x.shape[0] == 16}
    arrays = {n: x for n, x in arrays.items() if ".experts." not in n}
    dump = replace(healthy, arrays=arrays, tokens=healthy.tokens[6:])
    report = judged(model, dump)
    layers = [f"model.layers.{i}" for i in range(model.cfg.num_hidden_layers)]
    assert report.verdict == "undecidable", report.reason
    assert list(report.coverage.unfitted) == [f"{at}.self_attn#context" for at in layers]
    assert "6 tokens before" in report.reason
    assert any("positions 6 to 15" in n for n in report.notes)
    for name in ("model.layers.2.self_attn.q_b_proj", "model.layers.1.self_attn#k_pe"):
        wrong = replace(dump, arrays=arrays | {name: np.roll(arrays[name], 1, -1)})
        report = judged(model, wrong)
        assert (report.verdict, report.point) == ("fault", name)


def test_positions_off_by_one_without_a_prefix_stay_a_fault(model):
    report = judged(model, read_dump(HEALTHY.with_name("bfloat16-rope-off-by-one.safetensors")))
    assert report.verdict == "fault"
    assert report.cause.id == "rope-from-one"


# --- the parts


def test_rows_are_aligned_by_what_they_hold():
    rng = np.random.default_rng(0)
    ours = rng.standard_normal((12, 40))
    noisy = ours + 0.05 * rng.standard_normal(ours.shape)
    for rows in ([*range(5, 12)], [0, 1, 2, 1, 2, 3], [11], [3, 2, 1, 0]):
        d = distances([noisy[rows]], [ours])
        np.testing.assert_array_equal(align(d), rows)
    padded = np.concatenate([np.zeros((2, 40)), noisy, rng.standard_normal((2, 40))])
    found = align(distances([padded], [ours]))
    np.testing.assert_array_equal(found, [NONE, NONE, *range(12), NONE, NONE])
    assert align(distances([rng.standard_normal((4, 40))], [ours])) is None
    assert [v.tolist() for v in visits(np.array([0, 1, NONE, 1, 2]))] == [[0, 1, 4], [3]]
    assert ranges([0, 1, 2, 5, 7, 8]) == "0 to 2, 5, 7 to 8"
