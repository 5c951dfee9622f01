"""A few thousand of tests/fuzz.py's damaged checkpoints."""

from tests.fuzz import cases, gguf_cases


def test_damaged_files_raise_only_our_own_error(tmp_path):
    foreign = [(case, name, repr(e)) for case, name, e in cases(tmp_path / "model", 3000, 0)]
    assert foreign == []


def test_damaged_ggufs_raise_only_our_own_error(tmp_path):
    """More, up to 10⁵, by hand: python tests/fuzz.py gguf."""
    found = gguf_cases(tmp_path / "model", 1000, 0)
    assert [(case, name, repr(e)) for case, name, e in found] == []
