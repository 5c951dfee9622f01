"""Rules: documented, listed, selected, ignored; the page is theirs; one is one function."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from refmoe.cli import main
from refmoe.files import InputError
from refmoe.lint.base import LEVELS, Found
from refmoe.lint.facts import tensors as tensor_facts
from refmoe.lint.lint import lint
from refmoe.lint.page import render
from refmoe.lint.registry import rule, rules, select
from refmoe.weights.synthetic.random import write_random
from tests.conftest import ROOT

FRAGMENTS = ("The same", "Of ", "What ", "Where ", "So ", "Those ", "Whichever ", "Some ")


@pytest.mark.parametrize("each", rules(), ids=lambda r: r.id)
def test_a_rule_is_documented(each):
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", each.id)
    assert each.level in LEVELS
    assert each.summary.endswith(".")
    assert not each.summary.startswith(FRAGMENTS)
    assert each.why
    assert each.example
    assert each.places


def test_the_page_is_the_rules():
    """`python -m refmoe.lint` writes it."""
    page = (ROOT / "docs" / "lint.md").read_text("utf-8")
    assert page == render()
    for each in rules():
        assert f"### {each.id}\n" in page
        assert f"(#{each.id})" in page


def test_rules_are_chosen_by_id_family_or_beginning():
    every = {r.id for r in rules()}
    assert {r.id for r in select()} == every
    assert [r.id for r in select(["int4-zero-scale"])] == ["int4-zero-scale"]
    assert {r.id for r in select(["int4", "fp8"])} == {
        i for i in every if i.startswith(("int4-", "fp8-"))
    }
    assert {r.id for r in select([], ["tensor"])} == {
        i for i in every if not i.startswith("tensor-")
    }
    chosen = {r.id for r in select(["int4-scale", "yarn"], ["yarn-engines"])}
    assert chosen == {
        "int4-scale-inexact",
        "int4-scale-overflow",
        "yarn-betas",
        "yarn-factor",
        "yarn-mscale",
    }


@pytest.mark.parametrize(
    ("entry", "near"),
    [("int4-zero-scales", "int4-zero-scale"), ("yarns", "yarn"), ("fp9", "fp8"), ("", "--rules")],
)
def test_an_unknown_rule_is_refused_with_the_nearest(entry, near):
    for chosen in (([entry], []), ([], [entry])):
        with pytest.raises(InputError, match=f"no lint rule is called {entry!r}.*{near}"):
            select(*chosen)


def test_the_command_lists_selects_and_ignores(capsys):
    assert main(["lint", "--rules"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == [r.id for r in rules()]
    assert main(["lint", "--select", "yarn-betas,int4-codes", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["findings"]
    assert [f["rule"] for f in found] == ["yarn-betas"] + ["int4-codes"] * 3
    assert set(found[0]) == {"level", "tensor", "text", "rule"}
    assert main(["lint", "--select", "yarn", "--ignore", "yarn-engines", "--select", "gguf"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in out[:-1]] == [["warning", "yarn-betas"]]
    assert main(["lint", "--select", "yarm"]) == 2
    assert "yarn" in capsys.readouterr().err


def test_an_ignored_error_does_not_fail(tmp_path):
    write_random(tmp_path / "m", "bf16")
    (tmp_path / "m" / "generation_config.json").write_text("{")
    assert [f.rule for f in lint(tmp_path / "m") if f.level == "error"] == ["config-file"]
    assert [f for f in lint(tmp_path / "m", ignore=["config-file"]) if f.level == "error"] == []


def test_what_no_chosen_rule_needs_is_not_read(tiny_k2, monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("a tensor was read")

    for name in ("count_numbers", "read_int4", "values_of"):
        monkeypatch.setattr(tensor_facts, name, refuse)
    assert {f.rule for f in lint(tiny_k2, select=["yarn", "config", "shard"])}
    with pytest.raises(AssertionError, match="was read"):
        lint(tiny_k2, select=["tensor-zero"])


def test_two_rules_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two lint rules are called yarn-betas"):

        @rule("note", example="x")
        def yarn_betas(t: tensor_facts.Numbers) -> list[Found]:
            """Say nothing."""
            return []


NEW = '''
"""Judge what this test planted."""

from collections.abc import Iterator

from refmoe.lint.base import Found
from refmoe.lint.facts.tensors import Numbers
from refmoe.lint.registry import rule


@rule("warning", example="lm_head.weight: 530 values", reference="owner/repo#1")
def planted_large(t: Numbers) -> Iterator[Found]:
    """A tensor has more than 50,000 values.

    None should, in this test.
    """
    if t.count > 50_000:
        yield Found(f"{t.count} values", t.tensor)
'''


def test_to_add_a_rule_is_to_add_one_function(tmp_path):
    """In a copy of the package: it is listed, selected, documented and applied."""
    shutil.copytree(
        ROOT / "refmoe", tmp_path / "refmoe", ignore=shutil.ignore_patterns("__pycache__")
    )
    (tmp_path / "refmoe" / "lint" / "rules" / "planted.py").write_text(NEW)
    write_random(tmp_path / "m", "bf16")
    code = (
        "from refmoe.lint.lint import lint; from refmoe.lint.page import render\n"
        "print(sorted(str(f) for f in lint('m', ['planted'])))\n"
        "print('### planted-large' in render())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found, documented = done.stdout.splitlines()
    for name in ("lm_head", "model.embed_tokens"):
        assert f"planted-large          {name}.weight: 50880 values" in found
    assert documented == "True"


def test_facts_have_places_and_names_of_their_own():
    types = {r.facts for r in rules()}
    assert all(facts.places for facts in types)
    assert len({facts.__name__ for facts in types}) == len(types)
