"""The house: rooms import downwards, the paper needs only NumPy, lint and types are clean."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "refmoe"
ROOMS = [  # ground floor first
    "version",
    "ctrl_c",
    "files",
    "progress",
    "engines",
    "config",
    "model",
    "weights",
    "fast",
    "text",
    "run",
    "lint",
    "oracle",
    "cli",
]
PAPER = [  # the modules of model/ in the order in which they are read
    "formats.base",
    "matrix",
    "formats",
    "points",
    "numerics",
    "norm",
    "rope",
    "cache",
    "mla",
    "router",
    "experts",
    "decoder",
]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of every import, from the syntax tree; nothing is executed."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def chapter(parts: tuple[str, ...]) -> str:
    """The entry of `PAPER` that a module of model/ belongs to."""
    return "formats.base" if parts[:2] == ("formats", "base") else parts[0]


def breaches(package: Path) -> list[str]:
    out = []
    for path in sorted(package.rglob("*.py")):
        here = path.relative_to(package).with_suffix("").parts
        if here[0] not in ROOMS:
            continue
        for line, name in imports(path):
            top, _, rest = name.partition(".")
            there = rest.split(".")[0]
            if top != "refmoe" or there not in ROOMS:
                continue
            if ROOMS.index(there) > ROOMS.index(here[0]):
                out.append(f"{path}:{line}: {here[0]} uses {there}")
            if here[0] == there == "model":
                user, used = chapter(here[1:]), chapter(tuple(rest.split(".")[1:]))
                within = user == used == "formats"
                if used in PAPER and PAPER.index(used) >= PAPER.index(user) and not within:
                    out.append(f"{path}:{line}: {user} uses {used}, which comes after it")
    return out


def test_rooms_import_downwards():
    assert breaches(PACKAGE) == []
    known = {p.stem for p in PACKAGE.iterdir() if p.is_dir() or p.suffix == ".py"}
    assert known - {"__init__", "__main__", "__pycache__", "golden"} == set(ROOMS)


def test_the_rule_notices_a_breach(tmp_path):
    for room in ("model", "run"):
        (tmp_path / room).mkdir()
    (tmp_path / "model" / "norm.py").write_text("from refmoe.run.load import load\n")
    (tmp_path / "model" / "matrix.py").write_text("from refmoe.model import norm\n")
    (tmp_path / "run" / "x.py").write_text("from refmoe.model import norm\n")
    assert [b.split(": ")[1] for b in breaches(tmp_path)] == [
        "matrix uses norm, which comes after it",
        "model uses run",
    ]


def needed_at_once(path: Path, modules: set[str]) -> set[str]:
    """The modules that a module imports while it is loaded, not in functions or for types."""
    left: list[ast.stmt] = list(ast.parse(path.read_text("utf-8")).body)
    found: set[str] = set()
    while left:
        match left.pop():
            case ast.ImportFrom(module=str(module), names=names):
                found |= {f"{module}.{a.name}" for a in names} | {module}
            case ast.If(test=test, body=body, orelse=others) if "TYPE_CHECKING" not in ast.dump(
                test
            ):
                left += [*body, *others]
            case ast.Try(body=body) | ast.With(body=body):
                left += body
    return found & modules


def circle(needs: dict[str, set[str]]) -> list[str]:
    """Some modules that need each other; none if they can be loaded one after another."""
    left = dict(needs)
    while ready := [m for m, others in left.items() if not others & left.keys()]:
        for m in ready:
            del left[m]
    return sorted(left)


def test_no_modules_import_each_other():
    paths = {
        ".".join(("refmoe", *p.relative_to(PACKAGE).with_suffix("").parts)): p
        for p in PACKAGE.rglob("*.py")
        if p.name != "__init__.py"
    }
    assert circle({m: needed_at_once(p, paths.keys() - {m}) for m, p in paths.items()}) == []
    assert circle({"a": {"b"}, "b": {"a"}, "c": {"a"}, "d": set()}) == ["a", "b", "c"]


def test_docstrings_stand_alone():
    """None begins as the end of the one above it."""
    fragments = ("The same ", "Of ", "What ", "Where ", "So ", "Those ", "Whichever ", "Some ")
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                text = ast.get_docstring(node) or ""
                assert not text.startswith(fragments), f"{path}:{node.lineno}: {text}"


def test_files_are_short_enough_to_be_read():
    for path in PACKAGE.rglob("*.py"):
        if path.name != "kernels.py" or path.parent.name != "fast":  # which says why it is one file
            assert len(path.read_text("utf-8").splitlines()) <= 850, path


def test_the_paper_needs_only_numpy():
    allowed = {"numpy", "refmoe"} | set(sys.stdlib_module_names)
    for path in (PACKAGE / "model").rglob("*.py"):
        for line, name in imports(path):
            assert name.split(".")[0] in allowed, f"{path}:{line}: {name}"


def test_importing_refmoe_loads_no_optional_library():
    code = (
        "import sys, refmoe; print([m for m in ('torch', 'numba', 'jinja2') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "command", [["ruff", "check"], ["ruff", "format", "--check"], ["mypy", "--no-error-summary"]]
)
def test_lint_and_types_are_clean(command):
    found = shutil.which(command[0], path=str(Path(sys.executable).parent))
    assert found, f"{command[0]} is not installed; pip install -e '.[test]'"
    done = subprocess.run([found, *command[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_one_loader_serves_a_working_tree_and_an_installed_package(tmp_path):
    """A wheel carries golden/ inside the package; it is found there, with no tree around it."""
    site = tmp_path / "site"
    shutil.copytree(PACKAGE, site / "refmoe", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "golden" / "tiny-k2", site / "refmoe" / "golden" / "tiny-k2")
    code = (
        "import refmoe; m = refmoe.load(); print(m.checkpoint.path); "
        "print(len(''.join(refmoe.generate(m, 'My lord', max_new_tokens=3))) > 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(site)},
    )
    path, made = done.stdout.split()
    assert Path(path) == (site / "refmoe" / "golden" / "tiny-k2").resolve()
    assert made == "True"


def test_the_oldest_dependencies_are_those_that_pyproject_allows():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]["test"]
    wanted = [
        re.match(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", d) for d in project["dependencies"] + extras
    ]
    bounds = {m[1]: m[2] for m in wanted if m}
    lines = (ROOT / ".ci" / "oldest.txt").read_text("utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    tools = {"ruff", "mypy"}  # the newest, for all
    assert set(pinned) == set(bounds) - tools
    for name, version in pinned.items():
        assert version == bounds[name] or version.startswith(bounds[name] + ".0"), name
