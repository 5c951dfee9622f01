"""Each recipe of CONTRIBUTING.md works on a copy of the package."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.test_readme import is_shown

PAGE = ROOT / "CONTRIBUTING.md"
PLACE = re.compile(r"(New file|At the end of|Below the line) `([^`]+)`(?: of `([^`]+)`)?:")
STEP = re.compile(rf"^{PLACE.pattern}\n\n```python\n(.*?)^```|^```console\n(.*?)^```", re.M | re.S)
RECIPES = dict(re.findall(r"^## (Add .*?)\n(.*?)(?=^## |\Z)", PAGE.read_text("utf-8"), re.M | re.S))


def copy_package(folder: Path) -> Path:
    """Copy the package, with its compiled kernels, and link what it reads."""
    shutil.copytree(ROOT / "refmoe", folder / "refmoe")
    (folder / "golden").symlink_to(ROOT / "golden")
    return folder


def apply(place: str, where: str, file: str, code: str, folder: Path) -> None:
    """Do what a recipe says with one block of Python."""
    if place == "New file":
        assert not (folder / where).exists(), f"{where} is there already"
        (folder / where).write_text(code)
    elif place == "At the end of":
        path = folder / where
        path.write_text(f"{path.read_text('utf-8')}\n\n{code}")
    else:
        path = folder / file
        text = path.read_text("utf-8")
        assert text.count(f"{where}\n") == 1, f"{file} has no single line {where!r}"
        path.write_text(text.replace(f"{where}\n", f"{where}\n{code}"))


def run(command: str, folder: Path) -> str:
    """Run one command of a recipe in the copy and return what it prints."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        shell=True,
        cwd=folder,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, f"$ {command}\n{done.stdout}"
    return done.stdout


def follow(recipe: str, folder: Path) -> list[tuple[str, str, str]]:
    """Follow a recipe in a copy; return each command with the output shown and printed."""
    out = []
    for place, where, file, code, session in STEP.findall(recipe):
        if place:
            apply(place, where, file, code, folder)
            continue
        parts = re.split(r"^\$ (.*)\n", session, flags=re.M)[1:]
        for command, shown in zip(parts[::2], parts[1::2], strict=True):
            out.append((command, shown, run(command, folder)))
    return out


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_works(name, tmp_path):
    commands = follow(RECIPES[name], copy_package(tmp_path))
    assert commands
    for command, shown, printed in commands:
        assert is_shown(shown, printed), f"$ {command}\n{printed}"


def test_each_thing_that_there_are_many_of_has_a_recipe():
    names = "fault", "lint rule", "reader of dumps", "engine", "stored format", "member"
    for name, recipe in zip(names, RECIPES, strict=True):
        assert name in recipe


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_touches_one_file_of_the_package(name):
    """A kernel is one entry more: a format has two files."""
    files = {m[1] if m[0] != "Below the line" else m[2] for m in PLACE.findall(RECIPES[name])}
    inside = {file for file in files if file.startswith("refmoe/")}
    assert len(inside) == (2 if name == "Add a stored format" else 1)
