"""Engines: one entry each, from which conventions, profiles, lint's readings and a page follow."""

import shutil
import subprocess
import sys
from dataclasses import fields

from refmoe.engines import CONVENTIONS, ENGINES, MATTERS, PROFILES, Conventions, page
from tests.conftest import ROOT


def test_the_page_of_conventions_is_generated_from_the_entries():
    assert (ROOT / "docs" / "conventions.md").read_text("utf-8") == page()


def test_every_convention_is_a_matter_and_every_source_is_of_one():
    stored = {"int4", "fp8"}  # both are `rounded_products`
    keys = {m.key for m in MATTERS}
    assert keys - stored == {f.name for f in fields(Conventions)} - {"name", "rounded_products"}
    for engine in ENGINES:
        assert engine.sources.keys() <= keys
        for entry in (engine.conventions, engine.profile):
            assert entry is None or entry.name == engine.name


def test_an_engine_is_added_in_one_file(tmp_path):
    """An entry appended to a copy of engines.py is known everywhere."""
    shutil.copytree(
        ROOT / "refmoe", tmp_path / "refmoe", ignore=shutil.ignore_patterns("__pycache__")
    )
    file = tmp_path / "refmoe" / "engines.py"
    entry = """ENGINES = (
    Engine(
        "mine",
        Conventions("mine", normaliser="sum"),
        Profile("mine", "float16"),
        YarnReading("Mine", "owner/mine rope.py"),
        {"normaliser": "owner/mine `router.py`"},
    ),"""
    text = file.read_text("utf-8")
    assert text.count("\nENGINES = (") == 1
    file.write_text(text.replace("ENGINES = (", entry, 1), "utf-8")
    code = (
        "from refmoe.engines import page, find_profile, find_conventions\n"
        "assert find_conventions('mine').normaliser == 'sum'\n"
        "assert find_profile('mine').storage == 'float16'\n"
        "assert '| mine |' in page() and 'owner/mine `router.py`' in page()\n"
        "import refmoe\n"
        "model = refmoe.load(numerics='bfloat16', conventions='mine')\n"
        "assert model.nx.conventions.name == 'mine'\n"
    )
    (tmp_path / "golden").symlink_to(ROOT / "golden")
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    known = {*CONVENTIONS, *PROFILES}
    assert "mine" not in known
