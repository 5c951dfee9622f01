"""What a start loads: nothing that the command does not need. No time is asserted here."""

import json
import subprocess
import sys

import pytest

import refmoe
from tests.conftest import ROOT

HEAVY = ("numba", "jinja2", "tqdm", "torch", "gguf", "safetensors")
SHARED = ("verbs", "parser", "options", "inputs", "models", "show")
LIST = "import json, sys; print(json.dumps(sorted(sys.modules)))"


def loaded(code: str) -> set[str]:
    """Modules that a fresh interpreter holds after this code."""
    command = [sys.executable, "-c", f"{code}\n{LIST}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return set(json.loads(done.stdout.splitlines()[-1]))


def after_main(*argv: str) -> set[str]:
    """Modules after `refmoe …`, whether it returns or leaves as --version does."""
    return loaded(
        f"import sys\nfrom refmoe.cli import main\n"
        f"try:\n    main({list(argv)!r})\nexcept SystemExit:\n    pass"
    )


def ours(modules: set[str]) -> set[str]:
    return {m for m in modules if m.startswith("refmoe")}


def test_importing_refmoe_loads_its_version_alone():
    modules = loaded("import refmoe")
    assert ours(modules) == {"refmoe", "refmoe.version"}
    assert "numpy" not in modules


@pytest.mark.parametrize("argv", [["--version"], ["--help"], ["nosuch"]])
def test_what_no_verb_is_needed_for_loads_no_verb(argv):
    modules = after_main(*argv)
    assert "numpy" not in modules
    rooms = {m for m in ours(modules) if not m.startswith("refmoe.cli")}
    assert rooms <= {"refmoe", "refmoe.ctrl_c", "refmoe.version", "refmoe.files"}
    assert ours(modules) - rooms == {"refmoe.cli", "refmoe.cli.parser", "refmoe.cli.verbs"}


def test_a_verb_loads_no_other_verb_and_not_what_it_does_not_need():
    modules = after_main("generate", "ROMEO:", "--max-new-tokens", "1")
    verbs = {m for m in modules if m.startswith("refmoe.cli.")}
    shared = {f"refmoe.cli.{name}" for name in SHARED}
    assert verbs - shared == {"refmoe.cli.generate"}
    for heavy in (*HEAVY, "refmoe.oracle", "refmoe.lint", "numpy.random"):
        assert heavy not in modules


def test_tok_and_inspect_need_no_kernels():
    for argv in (["tok", "My lord"], ["inspect"]):
        assert not after_main(*argv) & {"numba", "jinja2", "tqdm", "torch", "refmoe.oracle"}


@pytest.mark.parametrize("name", refmoe.__all__)
def test_public_names_are_imported_on_use(name):
    modules = loaded(f"from refmoe import {name}")
    assert "torch" not in modules
    assert getattr(refmoe, name) is not None
    assert name in dir(refmoe)


def test_public_names_are_what_they_are_where_they_are_defined():
    from refmoe.oracle.check import check
    from refmoe.run.generate import generate
    from refmoe.run.load import load

    assert (refmoe.check, refmoe.generate, refmoe.load) == (check, generate, load)
    assert set(refmoe._HOMES) | {"__version__"} == set(refmoe.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'refmoe' has no attribute 'nosuch'"):
        refmoe.nosuch  # noqa: B018


def test_a_star_import_gives_the_public_names():
    names: dict[str, object] = {}
    exec("from refmoe import *", names)
    assert set(refmoe.__all__) <= set(names)
