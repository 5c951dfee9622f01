"""plan: sizes are those of the checkpoints, placements lose nothing, and more never slows down."""

import json
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refmoe import cli
from refmoe.config import Quantization
from refmoe.files import InputError, parse_size
from refmoe.run.export import to_gguf
from refmoe.run.load import load
from refmoe.run.plan import hardware as plan_hardware
from refmoe.run.plan import measure as plan_measure
from refmoe.run.plan import time as plan_time
from refmoe.run.plan import units as plan_units
from refmoe.run.plan import validate as plan_validate
from refmoe.run.plan.plan import format_plan, plan
from refmoe.weights.checkpoint import Checkpoint, tensor_class
from refmoe.weights.dense import sizes
from refmoe.weights.open import open_checkpoint
from refmoe.weights.placement import (
    CARD_RESERVE,
    TILE,
    Parts,
    Tier,
    count_parts,
    on_card,
    place,
    smallest_budget,
)
from refmoe.weights.synthetic.members import MEMBERS, write_member

K2 = Parts.of(plan_time.model_config())
Q8 = Parts.of(plan_time.model_config(), "q8")
UNIT = plan_time.Constants(1.0, 1.0, 0.0, 0.0, 1.0, 0.0)  # nothing lost anywhere


def hardware(
    *tiers: plan_hardware.Memory, split: str = "pipeline", count: int = 1
) -> plan_hardware.Hardware:
    return plan_hardware.Hardware(
        "test", (plan_hardware.Machine(tiers, cores=8, count=count),), split
    )


def ram(capacity: float = 1e12, bandwidth: float = 100e9) -> plan_hardware.Memory:
    return plan_hardware.Memory("RAM", "ram", capacity, bandwidth)


def disk(bandwidth: float = 5e9) -> plan_hardware.Memory:
    return plan_hardware.Memory("disk", "disk", 1e15, bandwidth)


def card(capacity: float = 12e9, bandwidth: float = 360e9) -> plan_hardware.Memory:
    return plan_hardware.Memory("card", "vram", capacity, bandwidth, reserve=CARD_RESERVE)


def rate(case: plan_time.Placed) -> float:
    return 1 / case.work().total(plan_validate.fitted_constants())


# --- sizes


def test_k2_has_its_published_sizes():
    """Totals that others have published: 1.026 T numbers, 31.7 B active, one INT4 expert 24.8 MB.

    The expert to the byte: 3 x (7168 x 2048 / 2 packed + 2 / 32 of that number of scales + 8 of
    shape); the rest in bf16 is 23.4 GB; the cache 576 numbers a layer and token.
    """
    numbers = 7168 * 2048
    total = sum(p.numbers for p in K2.always) + K2.all_experts * K2.expert_numbers
    assert total == 1_026_408_232_448
    assert round(K2.routed_numbers / 1e9, 2) == 21.14
    assert round(K2.always_numbers / 1e9, 2) == 10.55
    assert round((K2.routed_numbers + K2.always_numbers) / 1e9, 1) == 31.7
    assert K2.expert == 3 * (numbers // 2 + numbers // 32 * 2 + 8) == 24_772_632
    assert round(sum(p.nbytes for p in K2.always) / 1e9, 1) == 23.4
    assert round(K2.always_bytes / 1e9, 1) == 21.1
    assert K2.cache_bytes(1, 2) * K2.layers == 61 * 576 * 2 == 70_272


def test_eight_bits_are_half_of_bf16_but_for_the_router():
    for exact, q8 in zip(K2.always, Q8.always, strict=True):
        if exact.kind in ("router", "embedding"):
            assert q8 == exact
        else:  # 34 bytes for 32 numbers; norms stay
            assert exact.nbytes * 34 / 64 <= q8.nbytes < exact.nbytes * 35 / 64


@pytest.mark.parametrize("name", sorted(MEMBERS))
def test_parts_are_those_of_the_tensors_and_of_the_config(name, tmp_path):
    write_member(tmp_path / name, name, seed=1)
    checkpoint = Checkpoint.open(tmp_path / name)
    cfg = checkpoint.cfg
    parts = count_parts(checkpoint)
    assert sorted(parts.always) == sorted(Parts.of(cfg).always)
    assert parts == replace(Parts.of(cfg), always=parts.always)
    stored = sum(t.nbytes for n, t in checkpoint.tensors.items() if tensor_class(n, cfg) != "other")
    assert parts.total_bytes == stored
    exact, q8 = sizes(checkpoint)
    assert parts.always_bytes - count_parts(checkpoint, "q8").always_bytes == exact - q8


def test_a_gguf_is_counted_from_its_tensors(tmp_path):
    model = load()
    to_gguf(model, tmp_path / "tiny.gguf")
    there = open_checkpoint(tmp_path / "tiny.gguf")
    parts, plain = count_parts(there), count_parts(model.checkpoint)
    assert parts.total_bytes == sum(t.nbytes for t in there.tensors.values())
    assert parts.expert_numbers == plain.expert_numbers
    assert [p.name for p in sorted(parts.always)] == [p.name for p in sorted(plain.always)]


def test_an_unknown_quantisation_is_refused():
    nvfp4 = Quantization.from_dict({"quant_method": "modelopt", "format": "NVFP4"})
    cfg = replace(plan_time.model_config(), quantization=nvfp4)
    with pytest.raises(InputError, match="NVFP4"):
        Parts.of(cfg)


def test_the_smallest_budget_is_its_sum():
    """K2: eight experts, the dense first layer, which stays, and two of the other layers."""
    first, *others = (sum(p.nbytes for p in K2.always if p.layer == i) for i in range(K2.layers))
    assert len(set(others)) == 1
    assert 2 * first > first + 2 * others[0] > first + 2 * TILE
    assert smallest_budget(K2) == 8 * K2.expert + first + 2 * others[0]


def test_where_the_head_is_largest_two_tiles_of_it_pass():
    wide = replace(plan_time.model_config(), hidden_size=64, intermediate_size=64, q_lora_rank=32)
    parts = Parts.of(replace(wide, vocab_size=4 << 20, moe_intermediate_size=32))
    layer = max(sum(p.nbytes for p in parts.always if p.layer == i) for i in range(61))
    assert layer < TILE
    assert smallest_budget(parts) == 8 * parts.expert + 2 * TILE


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("64GB", 64e9),
        ("64GiB", 64 * 2**30),
        ("1.5T", 1.5e12),
        ("512", 512),
        ("12 gb", 12e9),
        ("1e3MB", 1e9),
    ],
)
def test_sizes(text, value):
    assert parse_size(text) == value


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0GB", "7GB/s", "4iB", "nanGB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(InputError, match="expected bytes"):
        parse_size(text, "--ram")


def test_rates_and_counts():
    assert plan_units.parse_rate("7GB/s") == 7e9
    assert plan_units.parse_rate("2.5GiB/s") == 2.5 * 2**30
    assert plan_units.parse_count("8k") == 8192
    assert plan_units.parse_count("1M") == 1 << 20
    for wrong in ("fast", "7GB/m", ""):
        with pytest.raises(InputError, match="50GB/s"):
            plan_units.parse_rate(wrong)
    for wrong in ("0", "-1", "8.5k", "k"):
        with pytest.raises(InputError, match="8k"):
            plan_units.parse_count(wrong)


# --- placement


GB = st.floats(0, 700).map(lambda x: x * 1e9)


@given(vram=GB, memory=GB, pmem=GB, disked=st.booleans(), context=st.integers(1, 1 << 17))
def test_everything_has_exactly_one_place_and_no_tier_is_overfull(
    vram, memory, pmem, disked, context
):
    tiers = [Tier("c", "vram", vram, 1, CARD_RESERVE), Tier("m", "ram", memory, 1)]
    tiers.append(Tier("p", "pmem", pmem, 1))
    if disked:
        tiers.append(Tier("d", "disk", 1e15, 1))
    found = place(K2, tiers, context)
    cache = K2.cache_bytes(context)
    held = [p.name for s in found.shares for p in s.parts]
    caches = [i for s in found.shares for i in s.caches]
    experts = sum(s.experts for s in found.shares)
    assert len(held) == len(set(held))
    assert len(caches) == len(set(caches))
    lost = sum(p.nbytes for p in K2.always if p.name not in held)
    lost += (K2.layers - len(caches)) * cache + (K2.all_experts - experts) * K2.expert
    assert lost == found.homeless
    for s in found.shares:
        if s.tier.kind != "disk" and not found.needed:
            assert s.nbytes <= s.tier.room
        if s.tier.kind == "vram":  # a layer's attention and its cache are never parted
            assert s.caches == s.layers("attention")
            assert not s.has("model.embed_tokens")


def test_a_card_of_12_gb_holds_what_every_token_uses_in_8_bits():
    """The preset, and a card given by hand, agree: everything but embedding and experts."""
    preset = plan_measure.load_preset("rtx3060-optane768")
    there = plan_time.Placed.of(Q8, preset).placement.on("vram")
    by_hand = on_card(Q8, 12e9, preset.context, plan_units.NUMBER_BYTES[preset.cache], 0)
    assert there == replace(by_hand, tier=there.tier)
    assert {p.name for p in there.parts} == {p.name for p in Q8.always if p.kind != "embedding"}
    assert there.caches == tuple(range(61))
    assert there.nbytes <= 12e9 - CARD_RESERVE
    exact = plan_time.Placed.of(K2, preset).placement.on("vram")
    assert 0 < len(exact.layers("attention")) < 61  # 21 GB do not fit


def test_a_stream_needs_the_smallest_budget():
    cache = K2.cache_bytes(2048) * K2.layers
    least = smallest_budget(K2) + cache
    streamed = [Tier("m", "ram", least, 1), Tier("d", "disk", 1e15, 1)]
    assert place(K2, streamed, 2048).fits
    missing = place(K2, [streamed[0]._replace(capacity=least - 1), streamed[1]], 2048)
    assert missing.needed == 1
    assert not missing.fits
    assert not place(K2, streamed[:1], 2048).fits
    assert place(K2, [Tier("m", "ram", K2.total_bytes + cache, 1)], 2048).fits
    assert place(K2, [Tier("m", "ram", K2.total_bytes + cache - 1, 1)], 2048).homeless


def test_experts_on_the_card_can_be_limited():
    tiers = [Tier("c", "vram", 96e9, 1, CARD_RESERVE), Tier("m", "ram", 1e12, 1)]
    for most in (0, 7):
        share = place(K2, tiers, 1024, card_experts=most).on("vram")
        assert share is not None
        assert share.experts == most


# --- time


def test_a_token_takes_its_bytes_over_the_bandwidth():
    """Memory alone: routed and always bytes and the half full caches, all read at 100 GB/s."""
    case = plan_time.Placed.of(K2, hardware(ram()), 2048)
    nbytes = K2.routed_bytes + K2.always_bytes + K2.layers * K2.cache_bytes(1024)
    assert case.work().total(UNIT) == pytest.approx(nbytes / 100e9, rel=1e-12)
    half = UNIT._replace(efficiency=0.5)
    assert case.work().total(half) == pytest.approx(nbytes / 50e9, rel=1e-12)


def test_misses_are_read_from_disk():
    """A hit rate divides the choice; without one it is the share of experts in memory."""
    row = next(p.read for p in K2.always if p.kind == "embedding")  # never in memory here
    for told in (None, 0.35, 1.0):
        case = plan_time.Placed.of(K2, hardware(ram(64e9), disk(5e9)), 2048, hit_rate=told)
        hits = case.placement.on("ram").experts / K2.all_experts if told is None else told
        missed = case.work().seconds["disk"] * 5e9 - row
        assert missed == pytest.approx((1 - hits) * K2.routed_bytes, rel=1e-9, abs=1)
    with pytest.raises(InputError, match="disk"):
        plan_time.Placed.of(K2, hardware(ram()), hit_rate=0.5)


def test_machines_work_at_the_same_time_or_in_turn():
    one = plan_time.Placed.of(K2, hardware(ram(1e12)), 2048).work().total(UNIT)
    turn = plan_time.Placed.of(K2, hardware(ram(5e11), count=2), 2048).work()
    both = plan_time.Placed.of(K2, hardware(ram(5e11), count=2, split="tensor"), 2048).work()
    assert turn.total(UNIT) == pytest.approx(one, rel=1e-12)
    assert both.total(UNIT) == pytest.approx(one / 2, rel=1e-12)
    assert (turn.exchanges, both.exchanges) == (1, 2 * 61)


def test_hand_overs_are_layers_that_a_card_only_begins():
    assert plan_time.Placed.of(K2, hardware(ram()), 2048).work().handovers == 0
    assert plan_time.Placed.of(K2, hardware(card(1e12)), 2048).work().handovers == 0
    dense = plan_time.Placed.of(K2, hardware(card(40e9), ram()), 2048, card_experts=0)
    assert dense.work().handovers == 60  # the first layer is dense, and whole on the card


def test_a_long_prompt_reads_everything_once_and_a_short_one_its_choice():
    slow = hardware(ram(1e12, 1e6))  # so slow that only bytes count
    case = plan_time.Placed.of(K2, slow, 2048)
    weights = sum(p.nbytes for p in K2.always if p.kind != "embedding")
    row = next(p.read for p in K2.always if p.kind == "embedding")
    assert case.prompt(1, UNIT) == pytest.approx((weights + row + K2.routed_bytes) / 1e6)
    table = sum(p.nbytes for p in K2.always if p.kind == "embedding")  # of which rows are read
    everything = (K2.total_bytes - table + 5000 * row) / 1e6
    assert case.prompt(5000, UNIT) == pytest.approx(everything, rel=1e-6)
    fast = plan_time.Placed.of(K2, hardware(ram(1e12, 1e18)), 2048)
    flops = 2 * 100 * (K2.always_numbers + K2.routed_numbers)
    assert fast.prompt(100, UNIT) == pytest.approx(flops / (8 * 96e9), rel=1e-6)


BANDWIDTH = st.floats(1e8, 1e13)


@given(
    capacity=st.floats(4e9, 1.2e12),
    more=st.floats(1, 10),
    a=BANDWIDTH,
    b=st.floats(1e8, 1e10),
    faster=st.floats(1, 10),
)
def test_more_bandwidth_and_more_memory_never_slow_it_down(capacity, more, a, b, faster):
    """Bytes of a tier are whole: two tiers, rounded in both plans, make up to two bytes."""
    b = min(a, b)  # memory is not slower than the disk behind it

    def total(capacity: float, a: float, b: float) -> float:
        return plan_time.Placed.of(K2, hardware(ram(capacity, a), disk(b)), 2048).work().total(UNIT)

    base = total(capacity, a, b)
    limit = base * (1 + 1e-12) + 2 / b
    assert total(capacity, a * faster, b) <= limit
    assert total(capacity, a, min(a, b * faster)) <= limit
    assert total(capacity * more, a, b) <= limit


@given(
    deviation=st.floats(0, 10),
    tok_s=st.floats(1e-3, 1e6),
)
def test_the_range_is_never_wider_than_two(deviation, tok_s):
    lo, hi = UNIT._replace(deviation=deviation).range(tok_s)
    assert lo < tok_s < hi
    assert 1.5 < hi / lo <= 2 * (1 + 1e-12)


# --- the document


@pytest.mark.parametrize("name", [n for n in plan_measure.PRESETS if n != "this"])
def test_presets_give_a_document(name, capsys):
    assert cli.main(["plan", "--preset", name, "--json"]) == 0
    d = json.loads(capsys.readouterr().out)
    assert d["fits"] is True
    for key in ("decode_tok_s", "prefill_tok_s", "sweep_s"):
        lo, hi = d[key]
        assert 0 < lo < hi <= 2 * lo * (1 + 1e-12)
    names = [t["name"] for t in d["tiers"]]
    assert d["binds"] in [*names, "link", "hand-over"]
    for t in d["tiers"]:
        assert {"name", "holds", "bytes_per_token"} <= t.keys()
    times = [t["seconds_per_token"] for t in d["tiers"]] + list(d["overhead_s"].values())
    lo, hi = d["decode_tok_s"]
    assert lo < 1 / sum(times) < hi
    assert d["advice_factor"] > 1
    assert cli.main(["plan", "--preset", name]) == 0
    out = capsys.readouterr().out
    assert "bound by" in out
    assert "helps most" in out


def test_this_machine_is_measured(capsys):
    assert cli.main(["plan", "--preset", "this", "--model", str(tiny()), "--json"]) == 0
    d = json.loads(capsys.readouterr().out)
    assert d["fits"] is True
    assert d["tiers"][0]["kind"] == "ram"
    assert d["tiers"][0]["seconds_per_token"] > 0
    assert any("disk" in note for note in d["notes"])


def tiny():
    from refmoe.run.load import golden_folder

    return golden_folder() / "tiny-k2"


def test_what_does_not_fit_has_no_rates(capsys):
    assert cli.main(["plan", "--ram", "64GB", "--json"]) == 1
    d = json.loads(capsys.readouterr().out)
    assert d["fits"] is False
    assert d["decode_tok_s"] is d["prefill_tok_s"] is d["binds"] is d["sweep_s"] is None
    assert d["missing_bytes"] > 500e9
    assert "disk" in d["advice"]
    assert cli.main(["plan", "--ram", "64GB"]) == 1
    assert "fits: no" in capsys.readouterr().out


def test_flags_change_a_preset(capsys):
    def rates(*more: str) -> float:
        argv = ["plan", "--preset", "laptop-64gb-nvme", "--json", *more]
        assert cli.main(argv) == 0
        return json.loads(capsys.readouterr().out)["decode_tok_s"][0]

    base = rates()
    assert rates("--disk", "14GB/s") > 1.5 * base
    assert rates("--hit-rate", "0.6") > 1.5 * base
    assert rates("--dense", "q8", "--vram", "16GB") > base
    assert rates("--ctx", "128k") < base


@pytest.mark.parametrize(
    "argv",
    [
        ["--ram", "64XB"],
        ["--ram-bandwidth", "fast", "--ram", "64GB"],
        ["--ram", "64GB", "--vram-bandwidth", "360GB/s"],
        ["--ram", "64GB", "--ctx", "none"],
        ["--ram", "64GB", "--cores", "0"],
        ["--ram", "64GB", "--hit-rate", "0.5"],
        ["--ram", "64GB", "--card-experts", "-1"],
        ["--hardware", "/no/such/file.toml"],
        ["--ram", "64GB", "--config", "/no/such/config.json"],
        ["--ram", "64GB", "--model", "/no/such/folder"],
    ],
)
def test_bad_use_is_told(argv, capsys):
    assert cli.main(["plan", *argv]) == 2
    assert capsys.readouterr().err.startswith("refmoe: ")


GOOD = """
[[machine]]
cores = 8
tiers = [{ name = "DDR5", kind = "ram", capacity = "64GB", bandwidth = "80GB/s" }]
"""


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("cores = 8", "cores = ", "not TOML"),
        ("cores = 8", "cores = 0", "whole number"),
        ("cores = 8", 'cores = "many"', "whole number"),
        ("cores = 8", "colour = 8", "'colour' is not known"),
        ("[[machine]]", "[machine]", "at least one table"),
        ("[[machine]]", "[[machines]]", "machine"),
        ('kind = "ram"', 'kind = "tape"', "one of vram, ram, pmem, disk"),
        ('"64GB"', "64", "expected a text"),
        ('"64GB"', '"64 elephants"', "64GiB"),
        ('"80GB/s"', '"80 knots"', "50GB/s"),
        ("cores = 8", "cores = 8\ncore_gflops = -1", "number from 0"),
        ("cores = 8", "cores = 8\ncore_gflops = nan", "number from 0"),
        ("tiers = [{", "tiers = [3, {", "expected a table"),
        (
            "}]",
            '}, { kind = "ram", capacity = "1GB", bandwidth = "1GB/s" }]',
            "two tiers of one kind",
        ),
    ],
)
def test_a_wrong_description_says_what_was_expected(old, new, expected):
    plan_hardware.parse_hardware(GOOD, "good.toml")
    assert old in GOOD
    with pytest.raises(InputError, match=r"^rig\.toml") as e:
        plan_hardware.parse_hardware(GOOD.replace(old, new), "rig.toml")
    assert expected in str(e.value)


def test_a_description_is_read(tmp_path, capsys):
    file = tmp_path / "rig.toml"
    file.write_text(GOOD.replace("64GB", "1TB"))
    assert cli.main(["plan", "--hardware", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tiers"][0]["name"] == "DDR5"


NUMBERS = st.one_of(
    st.none(), st.floats(), st.floats(0, 1e3), st.floats(1e5, 1e13), st.integers(-1, 10**30)
)


@given(flags=st.tuples(*[NUMBERS] * len(plan_measure.Flags._fields)), rig=st.booleans())
def test_absurd_numbers_are_refused_in_words(flags, rig):
    """Whatever the flags say: a sentence, or a document of finite numbers above zero."""
    base = plan_measure.load_preset("laptop-64gb-nvme") if rig else None
    try:
        there = plan_measure.with_flags(base, plan_measure.Flags(*flags))
        document = plan(plan_time.Placed.of(K2, there), Q8)
    except InputError as e:
        if not re.search("expected|give --", str(e)):
            raise
        return
    json.dumps(document, allow_nan=False)
    if document["fits"]:
        assert 0 < document["decode_tok_s"][0] < document["decode_tok_s"][1]
    format_plan({"model": "K2", **document})


@given(
    context=st.integers(-1, 10**30),
    hit_rate=NUMBERS,
    experts=st.one_of(st.none(), st.integers(-1, 10**30)),
    tokens=st.integers(-1, 10**30),
)
def test_absurd_questions_are_refused_in_words(context, hit_rate, experts, tokens):
    there = plan_measure.load_preset("laptop-64gb-nvme")
    try:
        placed = plan_time.Placed.of(K2, there, context, None, hit_rate, experts)
        document = plan(placed, Q8, tokens, tokens)
    except InputError as e:
        if "expected" not in str(e):
            raise
        return
    json.dumps(document, allow_nan=False)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--ram", "5"], "--ram = 5, expected 1MB or more; write the unit, like 64GB"),
        (["--ram", "64GB", "--disk", "7"], "--disk = 7, expected 1MB/s or more"),
        (["--ram", "64GB", "--cores", "9M"], r"--cores = 9.43718e\+06, expected 1 to 1e\+06"),
        (["--ram", "64GB", "--ctx", "100000M"], "context = .*, expected 1 to"),
        (["--ram", "9" * 400], "expected bytes like 64GB"),
        (["--ram", "64GB", "--prompt", "9" * 400], "expected a number like 8192"),
    ],
)
def test_a_forgotten_unit_is_told(argv, says, capsys):
    assert cli.main(["plan", *argv]) == 2
    assert re.search(says, capsys.readouterr().err)


# --- validation


def test_four_of_five_public_reports_are_inside(capsys):
    assert cli.main(["plan", "--validate", "--json"]) == 0
    d = json.loads(capsys.readouterr().out)
    assert d["inside"] == sum(r["inside"] for r in d["rows"])
    assert d["total"] == len(d["rows"]) >= 12
    assert d["inside"] >= 0.8 * d["total"]
    for r in (*d["rows"], *d["prefill"]):
        assert r["inside"] == (r["lo"] <= r["reported"] <= r["hi"])
        assert r["hi"] <= 2 * r["lo"] * (1 + 1e-12)
        assert r["source"]
    assert all(r["reason"] and r["source"] for r in d["excluded"])
    assert cli.main(["plan", "--validate"]) == 0
    assert "excluded" in capsys.readouterr().out


def test_no_report_takes_part_in_its_own_prediction():
    """Each row's figure times five: its own range stays, to the last bit; others' move."""
    text = plan_hardware.read_data("reports.toml")
    base = plan_validate.validate(text)["rows"]
    lines = text.splitlines()
    at = [i for i, line in enumerate(lines) if line.startswith("decode = ")]
    assert len(at) == len(base)
    moved = 0
    for k, i in enumerate(at):
        figure = lines[i].split()[2]
        changed = [*lines[:i], f"decode = {5 * float(figure)}", *lines[i + 1 :]]
        rows = plan_validate.validate("\n".join(changed))["rows"]
        assert rows[k]["reported"] == pytest.approx(5 * base[k]["reported"])
        assert (rows[k]["lo"], rows[k]["hi"]) == (base[k]["lo"], base[k]["hi"])
        moved += sum(r["lo"] != b["lo"] for r, b in zip(rows, base, strict=True))
    assert moved > 0
