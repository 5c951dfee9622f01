"""The page of a report: what it says, that it is well-formed, that no dump can write into it."""

import json
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest

import refmoe
from refmoe import files
from refmoe.oracle.check import judge_dump
from refmoe.oracle.judge import Judgement, flips
from refmoe.oracle.readers.base import Dump
from refmoe.oracle.readers.dump import read_dump
from refmoe.oracle.report import chart as charts
from refmoe.oracle.report import map as maps
from refmoe.oracle.report import page as report
from refmoe.weights.synthetic.members import write_member
from tests.conftest import ROOT

VOID = {"meta", "link", "br", "img", "hr", "input"}
HOSTILE = [
    "<script>alert(1)</script>",
    "a\u202eb\x00\ud800",
    '"><img src=x onerror=y>',
    "{{ 7*7 }}",
]
ISSUE = re.compile(r"https://github\.com/[\w.-]+/[\w.-]+/issues/\d+")


class Page(HTMLParser):
    """A page as a tree's outline: fails where tags do not balance."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.within: list[tuple[str, ...]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"<{tag}> has an attribute twice"
        self.tags.append((tag, dict(attrs)))
        self.within.append(tuple(self.open))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def all(self, attribute: str) -> list[str]:
        return [a[attribute] or "" for _, a in self.tags if attribute in a]


@pytest.fixture(scope="module")
def tiny():
    return refmoe.load(numerics="float64", reference=True)


@pytest.fixture(scope="module")
def of_vllm(tiny):
    def case(name: str) -> Judgement:
        file = ROOT / "golden" / "vllm" / f"bfloat16-{name}.safetensors"
        return judge_dump(tiny, read_dump(file), engine="vllm")

    return case


@pytest.fixture(scope="module")
def cases(of_vllm, random_bf16, tmp_path_factory):
    """One of each kind, by name."""
    model = refmoe.load(random_bf16, "float64", reference=True)
    tokens = [1, 2, 3, 4, 5]
    traced = refmoe.trace(refmoe.load(random_bf16), tokens)

    def random(arrays: dict[str, np.ndarray], notes: tuple[str, ...] = ()) -> Judgement:
        return judge_dump(model, Dump(ROOT, arrays, tokens, "float32", notes=notes))

    nan, shapeless, broken = ({n: x.copy() for n, x in traced.items()} for _ in range(3))
    nan["model.layers.1.mlp"][3, 2] = np.nan
    noise = np.random.default_rng(0).standard_normal(shapeless["model.layers.1.mlp"].shape)
    shapeless["model.layers.1.mlp"] += 0.05 * noise * shapeless["model.layers.1.mlp"].std()
    broken["model.layers.1.mlp.gate#experts"][2, 0] = -1
    hostile = {name: np.zeros((5, 3), np.float32) for name in HOSTILE}
    folder = tmp_path_factory.mktemp("members") / "v3"
    return {
        "pass": of_vllm("healthy"),
        "fault": of_vllm("scaling-dropped"),
        "flips": of_vllm("bias-ignored"),
        "whole": random(traced),
        "nan": random(nan),
        "unknown": random(shapeless),
        "broken": random(broken),
        "groups": wrong_group(folder),
        "undecidable": random(hostile, ("<i>a note</i>",)),
    }


def wrong_group(folder) -> Judgement:
    """Another group's experts for every token, and none of the scores."""
    write_member(folder, "deepseek-v3", seed=1)
    model = refmoe.load(folder, "float64", reference=True)
    tokens = [i * 11 % 500 for i in range(6)]
    arrays = refmoe.trace(model, tokens, ["*.post_attention_layernorm", "*.mlp.gate*"])
    gate = "model.layers.3.mlp.gate"
    arrays[gate + "#experts"] = (arrays[gate + "#experts"] + 16) % 32
    del arrays[gate + "#weights"]
    return judge_dump(model, Dump(ROOT, arrays, tokens, "float32"))


@pytest.fixture(scope="module")
def pages(cases):
    return {name: Page(report.render(case)) for name, case in cases.items()}


KINDS = [
    *("pass", "fault", "flips", "whole", "nan", "unknown", "broken", "groups"),
    "undecidable",
]


# --- what it says


def test_a_pass_says_so_and_what_it_rests_on(pages, cases):
    text = pages["pass"].text
    assert "✓ PASS" in text
    assert "All 92 operations compared lie within what rounding explains, in bfloat16" in text
    assert "Of 11 operations the dump has no result." in text
    assert "In 3 layers every token went to the same experts as in float64." in text
    assert "The operation nearest to its limit" in text
    assert "Cause" not in text
    assert cases["pass"].dump.path.name in text


def test_a_fault_says_where_why_and_how_sure(pages, cases):
    text, r = pages["fault"].text, cases["fault"].report
    times = next(int(p.multiple) for p in r.points if p.name == r.point)
    said = "✗ FAULT at model.layers.1.mlp Here the engine first goes wrong: its error is"
    assert f"{said} {times}" in text
    assert "The dump lacks model.layers.1.mlp.experts , so it is judged together with it" in text
    assert "Cause routed_scaling_factor is not applied scaling-dropped" in text
    assert r.cause.fitted in text
    assert f"fits {r.cause.times_worse:.3g} times worse: " in text
    assert f" {r.cause.runner_up} " in text
    links = pages["fault"].all("href")
    assert "https://github.com/vllm-project/vllm/issues/43769" in links
    assert sum(link.startswith("https:") for link in links) == len(r.cause.references)
    assert "6 of 6 tokens outside what noise explains of one alone" in text
    assert "router_logits activations wide" in text  # a convention, its side, ours
    assert "mlp.shared_experts.down_proj layers 2–3" in text  # missing, by operation
    assert "nominally 0.001" in text


def test_undecidable_says_why_and_what_could_not_be_compared(pages):
    text = pages["undecidable"].text
    assert "? UNDECIDABLE" in text
    assert "no tensor of the dump is a point of this model" in text
    assert "In the dump, not compared: 4 names" in text
    assert "Nothing was compared that could be shown." in text
    assert "<i>a note</i>" in text


def test_other_faults_have_their_evidence(pages):
    assert "numbers that are not finite" in pages["nan"].text
    assert re.search(r"1 of \d+ numbers are not finite, in 1 row: 3\.", pages["nan"].text)
    assert "No known fault fits." in pages["unknown"].text
    assert "no expert's index" in pages["broken"].text
    assert "another group," in pages["groups"].text


@pytest.mark.parametrize("name", KINDS)
def test_a_report_of_any_kind_is_a_json_document(cases, name):
    report = cases[name].report
    document = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert document["verdict"] == report.verdict
    assert document["router"] == report.router


@pytest.mark.parametrize("name", KINDS)
def test_flips_are_those_that_the_report_counts(cases, name):
    case, counted = cases[name], cases[name].report.router
    found = list(flips(case.decoder, case.exact, case.envelope, case.profile))
    assert len(found) == counted["flips"]
    assert sum(f.explained for f in found) == counted["explained"]
    wrong = [f for f in found if not f.explained]
    r = cases[name].report
    if wrong and (r.point or "").endswith("#experts") and "chose" in r.reason:
        first = next(f for f in wrong if f.layer == int(r.point.split(".")[2]))
        said = f"token {first.token} chose {first.taken} over {first.lost}, whose scores are"
        assert r.reason == f"{said} {first.gap:.3g} better; noise explains {first.tie:.1g}"


def test_every_flip_is_a_row(pages):
    text = pages["flips"].text
    assert "4 choices in 1 layer differ from float64's: 0 explained by noise, 4 not." in text
    assert re.search(r"1 0 8 20 0\.29\d* [\d.]+ ✗ not explained", text)
    assert "Gap of the scores that changed places by token" in text


# --- the map


@pytest.mark.parametrize("name", KINDS)
def test_every_point_of_a_layer_is_in_the_map(cases, pages, name):
    case, titles = cases[name], pages[name].all("title")
    told = {t.split(": ")[-2 if t.startswith("worst of") else 0] for t in titles if ": " in t}
    for point in dict.fromkeys(case.exact.order):
        if point.startswith("model.layers.") and ".experts." not in point:
            assert point in told, point


def test_cells_say_in_words_what_they_show_in_colour(cases, pages):
    p = next(p for p in cases["fault"].report.points if p.name == "model.layers.1.mlp")
    said = f"{p.name}: relative error {p.rel_error:.1e}, explained {p.envelope:.1e}, "
    said += f"{p.multiple:.3g} times, outside"
    cell = next(a for t, a in pages["fault"].tags if t == "td" and a.get("title") == said)
    assert (cell["class"] or "").split()[:3] == ["s6", "outside", "first"]
    assert said in pages["fault"].text  # for those who do not see the title
    lacking = "model.layers.1.mlp.experts: not in the dump, judged together with model.layers.1.mlp"
    titles = pages["fault"].all("title")
    assert lacking in titles
    assert "model.layers.3.mlp.experts: not in the dump" in titles
    singles = r"worst of \d+ points of single experts: model\.layers\.\d+\.mlp\.experts\.\d+\."
    assert any(re.match(singles, title) for title in pages["whole"].all("title"))


def test_columns_keep_the_order_of_every_kind_of_layer():
    dense, sparse = ["a", "b", "gate_proj", "mlp", ""], ["a", "b", "gate", "experts", "mlp", ""]
    merged = ["a", "b", "gate_proj", "gate", "experts", "mlp", ""]
    assert maps.merge_orders([dict.fromkeys(dense), dict.fromkeys(sparse)]) == merged


@pytest.mark.parametrize(
    ("m", "text", "shade"),
    [
        (0.0, "0", "s0"),
        (0.004, "0", "s0"),
        (0.414, ".41", "s1"),
        (0.999, "1", "s3"),
        (1.0, "1", "s3"),
        (1.04, "1.0×", "s4"),
        (9.96, "10×", "s5"),
        (40.2, "40×", "s6"),
        (999.7, "1e3×", "s7"),
        (2.56e4, "3e4×", "s7"),
        (1e12, "1e12×", "s7"),
    ],
)
def test_a_multiple_is_short_and_its_mark_says_outside(m, text, shade):
    assert (maps.multiple(m), maps.shade(m)) == (text, shade)
    assert ("×" in text) == (m > 1)


def test_missing_points_are_told_by_operation():
    names = [f"model.layers.{i}.mlp.experts" for i in (1, 2, 3, 7)] + ["model.layers.2", "lm_head"]
    assert report.layer_ranges(names) == [
        ("lm_head", "of the model"),
        ("mlp.experts", "layers 1–3, 7"),
        ("the layer's output", "layer 2"),
    ]


def test_a_chart_of_many_tokens_shows_the_worst_of_each_bin():
    marks = [charts.Mark(i, 2.0 if i == 777 else 0.5, 0.3, 1.0) for i in range(1000)]
    chart = charts.Chart("c", "p", "Relative error", "token", marks)
    assert len(chart.shown) <= charts.BINS
    assert [m.row for m in chart.shown if m.outside] == [777]
    assert "1 of 1,000 tokens outside" in chart.text
    assert "Furthest is token 777, 2 where 1 is explained." in chart.text


def test_a_chart_stays_in_its_box_whatever_the_values():
    for values in ([0.0], [0.0, 1e30], [1e-30, 1.0], [1.0] * 3):
        marks = [charts.Mark(i, v, 1e-3, 1e-2) for i, v in enumerate(values)]
        chart = charts.Chart("c", "p", "Relative error", "token", marks)
        assert all(0 < chart.y(m.value) <= chart.floor for m in chart.shown)
        assert 2 <= len(chart.ticks) <= 7


# --- the page


@pytest.mark.parametrize("name", KINDS)
def test_it_is_well_formed_and_can_be_heard(pages, name):
    page = pages[name]
    tags = Counter(tag for tag, _ in page.tags)
    titles = [w for (tag, _), w in zip(page.tags, page.within, strict=True) if tag == "title"]
    assert tags["h1"] == tags["main"] == titles.count(("html", "head")) == 1
    assert dict(page.tags)["html"]["lang"] == "en"
    ids = page.all("id")
    assert len(set(ids)) == len(ids)
    targets = [h[1:] for h in page.all("href") if h.startswith("#")]
    targets += page.all("aria-labelledby") + page.all("aria-describedby")
    assert set(targets) <= set(ids)
    assert tags["caption"] == tags["table"] > 0
    assert all("scope" in a for t, a in page.tags if t == "th")
    assert all(a.get("aria-label") for t, a in page.tags if a.get("role") == "region")
    levels = [int(t[1]) for t, _ in page.tags if re.fullmatch("h[1-6]", t)]
    assert all(b <= a + 1 for a, b in pairwise(levels))


@pytest.mark.parametrize("name", KINDS)
def test_it_asks_nothing_of_the_network_and_runs_nothing(cases, pages, name):
    tags = {tag for tag, _ in pages[name].tags}
    assert not tags & {"script", "link", "img", "iframe", "object", "form", "base"}
    assert not pages[name].all("src")
    assert not [k for _, a in pages[name].tags for k in a if k.startswith("on")]
    text = report.render(cases[name])
    urls = re.findall(r"\bhttps?:[^\s\"<]*", text)
    assert all(ISSUE.fullmatch(u) for u in urls)
    assert "url(" not in text
    assert "@import" not in text


def test_what_a_dump_calls_itself_is_shown_and_not_obeyed(cases, tmp_path):
    case = cases["undecidable"]
    file = report.write(case, tmp_path / "r.html", title="<script>\u202e&amp;")
    text = file.read_text("utf-8")
    assert "<script" not in text
    assert "<img" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert r"a\u202eb\x00\ud800" in text
    assert "{{ 7*7 }}" in text
    assert r"<title>UNDECIDABLE: &lt;script&gt;\u202e&amp;amp;</title>" in text


def test_long_lists_are_cut_and_say_so(cases, monkeypatch):
    monkeypatch.setattr(report, "MOST", 2)
    assert "The first 2 names of the dump" in report.render(cases["undecidable"])
    assert "The first 2 of 4 flips" in report.render(cases["flips"])
    text = report.render(cases["fault"])
    assert "the first 2 of 6" in text
    assert "the first 2 of 41; refmoe check --json has all" in text


def test_a_reference_that_is_none_is_no_link():
    assert report._link("ggml-org/llama.cpp#18980") == (
        "https://github.com/ggml-org/llama.cpp/issues/18980"
    )
    assert report._link("javascript:alert(1)#1") is None


def test_it_is_whole_or_not_there(cases, tmp_path, monkeypatch):
    file = tmp_path / "r.html"
    assert report.write(cases["pass"], file) == file
    before = file.read_bytes()
    assert before.startswith(b"<!DOCTYPE html>\n<html")
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        report.write(cases["fault"], file)
    assert file.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


def test_the_same_case_gives_the_same_page(cases):
    assert report.render(cases["fault"]) == report.render(cases["fault"])


@pytest.mark.browser
def test_a_browser_opens_it(cases, tmp_path):
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(names)} is installed")
    file = report.write(cases["fault"], tmp_path / "r.html")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'own'}"]
    done = subprocess.run(
        [browser, *options, "--dump-dom", file.as_uri()], capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr.decode()
    dom = Page(done.stdout.decode()).text
    assert "✗ FAULT at model.layers.1.mlp" in dom
    assert "routed_scaling_factor is not applied" in dom
