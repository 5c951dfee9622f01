"""A few thousand of tests/fuzz.py's damaged checkpoints, a few of tests/fuzz_forms.py's dumps."""

from tests.fuzz import cases, gguf_cases
from tests.fuzz_forms import open_dequantized, wrong_cases


def test_damaged_files_raise_only_our_own_error(tmp_path):
    foreign = [(case, name, repr(e)) for case, name, e in cases(tmp_path / "model", 3000, 0)]
    assert foreign == []


def test_damaged_ggufs_raise_only_our_own_error(tmp_path):
    """More, up to 10⁵, by hand: python tests/fuzz.py gguf."""
    found = gguf_cases(tmp_path / "model", 1000, 0)
    assert [(case, name, repr(e)) for case, name, e in found] == []


def test_no_damaged_dump_passes_in_any_form_and_no_healthy_one_fails():
    """More, 2,000 by default, by hand: python tests/fuzz_forms.py."""
    found = wrong_cases(open_dequantized(), range(12))
    assert [(seed, c.form, c.damage, c.name, said) for seed, c, said in found] == []
