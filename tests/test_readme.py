"""The commands of README and of the pages in docs/ run, and print what the pages say they print.

    python tests/test_readme.py [PAGE ...]              write what they print now into the pages
    python tests/test_readme.py --figures [PAGE ...]    also where only measured figures differ

A block fenced as `console` is executed: each line that begins with `$ ` is a command, what follows
is its output. A block fenced as `sh` or `text` is not executed. An HTML comment on the line above a
block, which a reader does not see, says what is special about it:

    <!-- needs torch transformers -->    skipped, with a reason, where one of these is missing
    <!-- exit 1 -->                      the exit code of the block's last command

In an output, a line with `...` alone stands for any number of lines. All pages share one folder,
and a command that several of them have runs once.
"""

import doctest
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
LONGEST = 180  # lines of README
INSTALLING = ("pip ", "pytest", "git ")  # what brought us here is not done again
BLOCK = re.compile(r"^(?:<!-- ([a-z0-9_ -]+) -->\n)?```console\n(.*?)^```", re.M | re.S)
FILE = re.compile(r"[\w./-]+\.(?:json|safetensors|npz|gguf|html|py|base)\b")
MADE = re.compile(r"(?:>|--out|--repro|--html|dump_\w+\.py \S+) (\S+)")


@dataclass(frozen=True)
class Block:
    """The commands of one fenced block with the output that the page shows."""

    page: Path
    steps: list[tuple[str, str]]
    needs: tuple[str, ...]
    exit: int


def blocks(page: Path) -> Iterator[Block]:
    for said, text in BLOCK.findall(page.read_text("utf-8")):
        parts = re.split(r"^\$ (.*)\n", text, flags=re.MULTILINE)[1:]
        steps = list(zip(parts[::2], parts[1::2], strict=True))
        verb, *rest = said.split() or [""]
        needs = tuple(rest) if verb == "needs" else ()
        yield Block(page, steps, needs, int(rest[0]) if verb == "exit" else 0)


@dataclass
class Shell:
    """A folder in which commands run, each of them once."""

    folder: Path
    printed: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("examples", "golden"):
            (self.folder / name).symlink_to(ROOT / name)

    def run(self, command: str, code: int = 0) -> str:
        if command not in self.printed:
            path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
            done = subprocess.run(
                command,
                shell=True,
                cwd=self.folder,
                env={**os.environ, "PATH": path},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            assert done.returncode == code, f"{command}\n{done.stdout}"
            self.printed[command] = done.stdout
        return self.printed[command]

    def run_block(self, block: Block) -> Iterator[tuple[str, str, str]]:
        """Yield each command with the output shown and the output printed."""
        for i, (command, shown) in enumerate(block.steps, 1):
            if not command.startswith(INSTALLING):
                code = block.exit if i == len(block.steps) else 0
                yield command, shown, self.run(command, code)


def stable(output: str) -> str:
    """Return the output without what a machine may change: measurements, and the worst points."""
    output = re.sub(r"^refmoe: compiling kernels.*\n", "", output, flags=re.MULTILINE)
    output = re.sub(r"^.*\r(?!\n)", "", output, flags=re.MULTILINE)  # a progress bar
    output = re.sub(r"^refmoe: .*: step \d+ of \d+, \d+ s\n", "", output, flags=re.MULTILINE)
    output = re.sub(r"\d+\.\d+(e[-+]\d+)?", "#", output)
    output = re.sub(r"#  \S+, bound", "#  POINT, bound", output)
    output = re.sub(r"^ *# +# +#  \S+\n", "", output, flags=re.MULTILINE)  # the worst points
    return re.sub(r"^(.*/)?golden/tiny-k2$", "FOLDER", output, flags=re.MULTILINE)


def is_shown(shown: str, printed: str) -> bool:
    """Whether a page shows what was printed, lines with `...` standing for any lines."""
    lines = stable(shown).splitlines()
    pattern = "".join(r"(?:.*\n)*?" if x == "..." else re.escape(x) + "\n" for x in lines)
    return re.fullmatch(pattern, stable(printed)) is not None


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    return Shell(tmp_path_factory.mktemp("pages"))


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def runs(page: Path) -> bool:
    return any(not block.needs for block in blocks(page))


@pytest.mark.parametrize("page", list(filter(runs, PAGES)), ids=name_of)
def test_the_commands_of_a_page_print_what_it_shows(page, shell):
    for block in blocks(page):
        if not block.needs:
            for command, shown, printed in shell.run_block(block):
                assert is_shown(shown, printed), f"$ {command}\n{printed}"


NEEDY = [block for page in PAGES for block in blocks(page) if block.needs]


@pytest.mark.peers
@pytest.mark.parametrize("block", NEEDY, ids=lambda b: f"{name_of(b.page)}-{'-'.join(b.needs)}")
def test_the_commands_that_need_a_peer_print_what_the_page_shows(block, shell):
    absent = [name for name in block.needs if importlib.util.find_spec(name) is None]
    if absent:
        pytest.skip(f"{', '.join(absent)} not installed; pip install -e '.[test,peers]'")
    for command, shown, printed in shell.run_block(block):
        assert is_shown(shown, printed), f"$ {command}\n{printed}"


PYTHON = {page: re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.S) for page in PAGES}


@pytest.mark.parametrize("page", [p for p in PAGES if PYTHON[p]], ids=name_of)
def test_the_python_of_a_page_does_what_it_says(page, shell, monkeypatch):
    monkeypatch.chdir(shell.folder)
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    test = parser.get_doctest("".join(PYTHON[page]), {}, page.name, str(page), 0)
    assert test.examples
    assert runner.run(test).failed == 0


def test_there_are_commands_to_run():
    assert sum(len(block.steps) for block in blocks(README)) >= 8
    assert PYTHON[ROOT / "docs" / "python.md"]


def test_a_page_can_be_followed_from_its_beginning():
    """A file that a command reads is in the repository, or the page has made it before."""
    makers: dict[str, str] = {}
    for page in PAGES:
        made: set[str] = set()
        for command in (command for block in blocks(page) for command, _ in block.steps):
            made |= set(MADE.findall(command))
            for file in FILE.findall(command):
                known = (ROOT / file).exists() or file in made
                assert known, f"{name_of(page)}: {command}: nothing on the page makes {file}"
            for file in MADE.findall(command):
                assert makers.setdefault(file, command) == command, f"two commands make {file}"


def test_every_example_is_run_by_a_page():
    commands = {command for page in PAGES for block in blocks(page) for command, _ in block.steps}
    for example in (ROOT / "examples").glob("*.py"):
        name = f"examples/{example.name}"
        shown = any(command.startswith(f"python {name}") for command in commands)
        assert shown or example.name == "dump_vllm.py", f"no page runs {name}"  # needs a vLLM


# --- README is short, and links lead somewhere ---------------------------------------------------


def test_readme_is_short():
    assert len(README.read_text("utf-8").splitlines()) <= LONGEST


def anchors(page: Path) -> list[str]:
    """The anchors that GitHub gives to the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_leads_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}"


def test_every_page_is_in_the_index_and_no_term_is_defined_twice():
    index = (ROOT / "docs" / "README.md").read_text("utf-8")
    for page in PAGES[1:]:
        assert page.name == "README.md" or f"({page.name})" in index, page.name
    terms = anchors(ROOT / "docs" / "glossary.md")
    assert len(terms) == len(set(terms))


def test_a_shortened_output_is_recognised():
    printed = "a 1.5\nb\nc\nd\n"
    assert is_shown("a 2.5\n...\nd\n", printed)
    assert is_shown("...\nb\n...\n", printed)
    assert not is_shown("a 2.5\nc\n...\n", printed)
    assert cut(["a 9.5", "...", "d"], printed) == ["a 1.5", "...", "d"]
    assert cut(["a 9.5", "...", "e"], printed) is None


# --- writing the pages anew ----------------------------------------------------------------------


def cut(shown: list[str], printed: str) -> list[str] | None:
    """Return what is printed now, shortened where the page shortens it; None if it cannot be."""
    lines, out, at = printed.splitlines(), [], 0
    parts = re.split(r"^\.\.\.\n", "".join(x + "\n" for x in shown), flags=re.MULTILINE)
    for i, part in enumerate(parts):
        wanted = [stable(x + "\n") for x in part.splitlines()]
        starts = range(at, len(lines) - len(wanted) + 1) if i else range(1)
        if wanted and i == len(parts) - 1:
            starts = starts[-1:]
        same = [i for i in starts if [stable(x + "\n") for x in lines[i:][: len(wanted)]] == wanted]
        if not same:
            return None
        at = same[0] + len(wanted)
        out += [*lines[same[0] : at], "..."]
    return out[:-1]


def rewrite(pages: list[Path], figures: bool) -> None:
    with tempfile.TemporaryDirectory() as tmp:
        shell = Shell(Path(tmp))
        for page in pages:
            text = page.read_text("utf-8")
            for block in blocks(page):
                if any(importlib.util.find_spec(name) is None for name in block.needs):
                    print(f"{name_of(page)}: not run, needs {', '.join(block.needs)}")
                    continue
                for command, shown, printed in shell.run_block(block):
                    if is_shown(shown, printed) and not figures:
                        continue
                    new = re.sub(r"^refmoe: compiling.*\n", "", printed, flags=re.MULTILINE)
                    new = new.replace(str(ROOT) + "/", "")
                    if "..." in shown.splitlines():
                        lines = cut(shown.splitlines(), new)
                        if lines is None:
                            print(f"{name_of(page)}: shorten this by hand\n$ {command}\n{new}")
                            continue
                        new = "".join(line + "\n" for line in lines)
                    text = text.replace(f"$ {command}\n{shown}", f"$ {command}\n{new}")
            page.write_text(text, "utf-8")


if __name__ == "__main__":
    names = [name for name in sys.argv[1:] if name != "--figures"]
    rewrite([Path(name).resolve() for name in names] or PAGES, "--figures" in sys.argv)
