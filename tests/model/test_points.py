"""The table of points is what a pass shows: names, order, shapes, and what is never rounded."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import refmoe
from refmoe.model.decoder import Decoder
from refmoe.model.points import (
    BY_NAME,
    FORMS,
    POINTS,
    kind,
    numbers_per_row,
    parents,
    parse,
    points,
    shape,
    table,
)
from refmoe.oracle.trace import Recorder
from tests.networks import network

TOKENS = [3, 1, 4, 1, 5, 9, 2]
ROOT = Path(__file__).resolve().parents[2]
SHAPES = [
    {},
    {"q_lora_rank": None},
    {"n_shared_experts": 0},
    {"first_k_dense_replace": 0},
]


def seen(decoder: Decoder, form: str) -> dict[str, np.ndarray]:
    recorder = Recorder()
    nx = replace(decoder.nx.watching(recorder), attention=form)
    decoder.using(nx).logits(TOKENS)
    return recorder.seen


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_the_table_is_what_a_pass_shows(form, changes):
    decoder = network(7, **changes)
    cfg, shown = decoder.cfg, seen(network(7, **changes), form)
    chosen = {p.partition("#rows")[0] for p in shown if p.endswith("#rows")}

    def computed(path: str) -> bool:  # an expert that no token chose has no points
        at = parse(path)
        return at.expert is None or f"model.layers.{at.layer}.mlp.experts.{at.expert}" in chosen

    assert list(shown) == [p for p in points(cfg, (form,)) if computed(p)]
    for path, x in shown.items():
        at = parse(path)
        rows = 0
        if at.expert is not None:
            rows = len(shown[f"model.layers.{at.layer}.mlp.experts.{at.expert}#rows"])
        assert x.shape == shape(path, cfg, len(TOKENS), len(TOKENS), rows), path


def test_a_tap_is_never_rounded_and_a_point_always():
    decoder = network(7)
    marked: list[float] = []

    def rounding(x: np.ndarray) -> np.ndarray:
        marked.append(float(x.sum()))
        return x

    def watch(path: str, x: np.ndarray) -> np.ndarray:
        point = parse(path).point
        assert point is not None
        assert point.tap == (not marked), path
        marked.clear()
        return x

    decoder.using(replace(decoder.nx, round=rounding, watch=watch)).logits(TOKENS)


def test_a_path_is_taken_apart_and_put_together():
    cfg = network(7).cfg
    for path in points(cfg, FORMS):
        at = parse(path)
        assert at.name in BY_NAME
        assert at.segment is None
        assert parse(f"{path}@2") == at._replace(segment=2)
    at = parse("model.layers.12.mlp.experts.7.act")
    assert (at.layer, at.expert, at.name) == (12, 7, "model.layers.L.mlp.experts.E.act")
    assert parse("model.layers.12.mlp.experts").expert is None
    assert parse("model.layers.3").name == "model.layers.L"
    assert parse("model.layers.3.nonsense").point is None
    assert parse("nonsense").point is None
    assert kind("model.layers.12.mlp.experts.7.act") == "model.layers.mlp.experts.act"


def test_parents_come_before_their_children():
    for changes in SHAPES:
        cfg = network(7, **changes).cfg
        order = list(points(cfg, FORMS))
        for n, path in enumerate(order):
            there = [p for p in parents(path, cfg) if p in order]
            assert all(order.index(p) < n for p in there), path
            assert there or path == "model.embed_tokens", path


def test_experts_have_their_share_of_the_rows():
    cfg = refmoe.load().cfg
    share = cfg.num_experts_per_tok / cfg.n_routed_experts
    at = "model.layers.1.mlp.experts.3"
    assert numbers_per_row(f"{at}#rows", cfg) == share
    assert numbers_per_row(f"{at}.act", cfg) == pytest.approx(cfg.moe_intermediate_size * share)
    assert numbers_per_row("model.layers.1.self_attn#scores", cfg) == cfg.num_attention_heads
    with pytest.raises(KeyError, match=r"nonsense is no point"):
        numbers_per_row("nonsense", cfg)


def test_the_page_is_the_table():
    page = (ROOT / "docs" / "points.md").read_text("utf-8")
    assert page == table()
    assert all(f"`{p.name}`" in page for p in POINTS)
