"""README is a tour whose commands run, and print what it says they print.

python tests/test_readme.py        writes what they print now into README.md
"""

import doctest
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
SETTING_UP = ("pip ", "pytest", "git ")  # what brought us here


def sessions(text: str) -> Iterator[list[tuple[str, str]]]:
    """Each console block as (command, output) pairs."""
    for block in re.findall(r"```console\n(.*?)```", text, flags=re.DOTALL):
        parts = re.split(r"^\$ (.*)\n", block, flags=re.MULTILINE)[1:]
        yield list(zip(parts[::2], parts[1::2], strict=True))


def run(command: str, folder: Path) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        shell=True,
        cwd=folder,
        env={**os.environ, "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout


def stable(output: str) -> str:
    """Without what a machine may change: measured numbers, and which point is the worst."""
    output = re.sub(r"\d+\.\d+(e[-+]\d+)?", "#", output)
    output = re.sub(r"#  \S+, bound", "#  POINT, bound", output)
    output = re.sub(r"^ *# +# +#  \S+\n", "", output, flags=re.MULTILINE)  # the worst points
    return re.sub(r"^(.*/)?golden/tiny-k2$", "FOLDER", output, flags=re.MULTILINE)


def workplace(folder: Path) -> Path:
    for name in ("examples", "golden"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def test_the_tour_runs_and_prints_what_it_says(tmp_path):
    workplace(tmp_path)
    ran = 0
    for session in sessions(README.read_text("utf-8")):
        for command, printed in session:
            if not command.startswith(SETTING_UP):
                assert stable(run(command, tmp_path)) == stable(printed), command
                ran += 1
    assert ran >= 6


def test_the_python_of_the_tour_does_what_it_says():
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), flags=re.DOTALL)
    test = parser.get_doctest("".join(blocks), {}, "README.md", "README.md", 0)
    assert len(test.examples) >= 5
    result = runner.run(test)
    assert result.failed == 0


# the dumpers need a peer engine; tests/oracle/test_check.py runs them
EXAMPLES = sorted(p.name for p in (ROOT / "examples").glob("*.py") if "dump_" not in p.name)


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_run(example, tmp_path):
    assert run(f"python examples/{example}", workplace(tmp_path))


def test_every_file_that_the_readme_names_exists():
    for name in re.findall(r"\]\(([^)#:]+)\)", README.read_text("utf-8")):
        assert (ROOT / name).exists(), name


def rewrite() -> None:
    text = README.read_text("utf-8")
    with tempfile.TemporaryDirectory() as tmp:
        folder = workplace(Path(tmp))
        for session in sessions(text):
            for command, printed in session:
                if not command.startswith(SETTING_UP):
                    shown = run(command, folder).replace(str(ROOT) + "/", "")
                    text = text.replace(f"$ {command}\n{printed}", f"$ {command}\n{shown}")
    README.write_text(text, "utf-8")


if __name__ == "__main__":
    rewrite()
