"""The command line's grammar: help, examples, refusals with the nearest names, nested parts."""

import argparse
import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator

import pytest

from refmoe import cli
from refmoe.cli.parser import WIDTH, Parser
from refmoe.cli.verbs import VERBS, make_parser
from tests.conftest import ROOT


def parsers(parser: Parser | None = None) -> Iterator[Parser]:
    """Every parser: of `refmoe`, of each verb, of each part of a verb."""
    parser = make_parser() if parser is None else parser
    yield parser.filled()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from parsers(below)


ALL = {p.prog: p for p in parsers()}


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What is said when this is refused, before anything was printed."""
    assert cli.main(argv) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("refmoe: ")
    return told.err


def test_every_verb_has_a_file_and_every_file_a_verb():
    files = {p.stem for p in (ROOT / "refmoe" / "cli").glob("*.py")}
    shared = {"__init__", "verbs", "parser", "options", "inputs", "models", "show"}
    assert files - shared == set(VERBS)
    assert {prog.split()[1] for prog in ALL if " " in prog} == set(VERBS)


@pytest.mark.parametrize("columns", ["80", "200"])
@pytest.mark.parametrize("prog", ALL)
def test_help_fits_and_ends_with_examples_that_parse(prog, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    text = ALL[prog].format_help()
    assert max(map(len, text.splitlines())) <= WIDTH
    assert text.count("example") == 1
    examples = text.partition("example")[2].splitlines()[1:]
    assert examples
    for line in examples:
        command = line.strip().rpartition("| ")[2]
        command = re.split(" [<>] ", command)[0]
        name, *argv = shlex.split(command)
        assert name == "refmoe"
        args = make_parser().parse_args(argv)
        assert callable(args.run)
        ours = line.strip().startswith((prog, "echo"))
        assert ours or prog == "refmoe"


@pytest.mark.parametrize("prog", ALL)
def test_every_option_is_explained(prog):
    for action in ALL[prog]._actions:
        if isinstance(action, argparse._SubParsersAction):
            assert all(choice.help for choice in action._choices_actions)
        elif action.help != argparse.SUPPRESS:
            assert action.help, f"{prog} {action.dest}"
            assert len(action.help) > 10


def test_every_option_is_read():
    """An option that nobody reads would be taken in silence."""
    read: dict[str, set[str]] = {}
    for file in (ROOT / "refmoe" / "cli").glob("*.py"):
        tree = ast.walk(ast.parse(file.read_text("utf-8")))
        read[file.stem] = {
            node.attr if isinstance(node, ast.Attribute) else str(node.args[1].value)  # type: ignore[attr-defined]
            for node in tree
            if (isinstance(node, ast.Attribute) and ast.unparse(node.value) == "args")
            or (isinstance(node, ast.Call) and ast.unparse(node).startswith("getattr(args, '"))
        }
    by_name = {"bench": set(["experts", "vocab", "layers"]), "plan": set()}
    by_name["plan"] = {
        f"{kind}{end}" for kind in ("ram", "vram", "pmem") for end in ("", "_bandwidth")
    }
    by_name["plan"] |= {"disk"}
    for prog, parser in ALL.items():
        verb = prog.split()[1] if " " in prog else None
        for action in parser._actions:
            if verb is None or action.dest in ("help", "part"):
                continue
            known = read[verb] | read["models"] | read["options"] | by_name.get(verb, set())
            known |= read["generate"] if verb == "chat" else set()  # `sampling` is shared
            assert action.dest in known, f"{prog} --{action.dest}"


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        (["genrate", "x"], "did you mean generate?"),
        (["bench", "decod"], "did you mean decode?"),
        (["golden", "verfy"], "did you mean verify?"),
        (["quant", "expct"], "did you mean expect?"),
        (["generate", "x", "--numerics", "float33"], "did you mean float32"),
        (["generate", "x", "--conventions", "vlm"], "did you mean vllm?"),
        (["generate", "x", "--temprature", "1"], "did you mean --temperature?"),
        (["check", "x.npz", "--engine", "sg-lang"], "did you mean sglang?"),
        (["check", "x.npz", "--profile", "bfloat"], "did you mean bfloat16"),
        (["plan", "--preset", "laptop-64gb"], "did you mean laptop-64gb-nvme?"),
        (["plan", "--member", "k2-thinkin"], "did you mean k2-thinking?"),
        (["tiny", "x", "--like", "deepseek"], "did you mean deepseek-v3?"),
        (["tiny", "x", "--format", "int"], "did you mean int4?"),
        (["mutate", "scaling-droped"], "did you mean scaling-dropped"),
        (["bench", "kernels", "--formats", "int4-fas"], "did you mean int4-fast"),
        (["export", "--to", "ggu", "--out", "x"], "did you mean gguf?"),
        (["export", "--to", "int4", "--out", "x", "--quantiser", "amax/8"], "did you mean amax/7"),
        (["quant", "expect", "--to", "q4"], "did you mean q4_"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(argv, meant, capsys):
    assert meant in refusal(capsys, *argv)


def test_an_unknown_name_without_likeness_is_refused_with_all_if_they_are_few(capsys):
    assert "Known: verify, make" in refusal(capsys, "golden", "xyz")
    assert "Known: direct, cached" in refusal(
        capsys, "generate", "x", "--ram", "1GB", "--reads", "z"
    )
    said = "refmoe: fault 'xyz' is not in the dictionary; docs/faults.md lists them\n"
    assert refusal(capsys, "mutate", "xyz") == said


TOKENS = ["--tokens", "t.json"]


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        # an option of another part
        (["quant", "verify", "A", "B", "--to", "int4"], "--to is for `refmoe quant expect`"),
        (["quant", "verify", "A", "B", "--ctx", "3"], "--ctx is for `refmoe quant base`"),
        (["quant", "kl", "--base", "b", *TOKENS], "--tokens is for `refmoe quant expect`"),
        (["golden", "verify", *TOKENS], "--tokens is for `refmoe golden make`"),
        (
            ["golden", "make", *TOKENS, "--out", "o", "--reference"],
            "--reference is for `refmoe golden verify`",
        ),
        (["bench", "oracle", "--model", "x"], "--model is for `refmoe bench decode`"),
        (["bench", "kernels", "--quick"], "--quick is for `refmoe bench oracle`"),
        (["bench", "decode", "--ram", "4GB"], "--ram is for `refmoe bench store`"),
        (["bench", "store", "--gpu"], "--gpu is for `refmoe bench decode`"),
        (["bench", "sweep", "--int4", "fast"], "--int4 is for `refmoe bench decode`"),
        (["bench", "gpu", "--gpu"], "--gpu is for `refmoe bench decode`"),
        (["bench", "peers", "--dense", "q8"], "--dense is for `refmoe bench decode`"),
        # without the option that it needs
        (["generate", "x", "--vram", "1GB"], "--vram is for --gpu"),
        (["generate", "x", "--gpu-experts", "1"], "--gpu-experts is for --gpu"),
        (["generate", "x", "--ctx", "8k"], "--ctx is for --gpu"),
        (["chat", "--vram", "1GB"], "--vram is for --gpu"),
        (["sweep", *TOKENS, "--out", "o", "--ctx", "8k"], "--ctx is for --gpu"),
        (["golden", "verify", "--vram", "1GB"], "--vram is for --gpu"),
        (["bench", "decode", "--ctx", "8k"], "--ctx is for --gpu"),
        (["generate", "x", "--reads", "direct"], "--reads is for --ram BYTES"),
        (["trace", "--text", "x", "--out", "o", "--reads", "cached"], "--reads is for --ram"),
        (["golden", "make", *TOKENS, "--out", "o", "--reads", "cached"], "--reads is for --ram"),
        (["bench", "sweep", "--reads", "cached"], "--reads is for --ram"),
        (["bench", "decode", "--layers", "3"], "--layers is for --shape k2-slice"),
        (["bench", "decode", "--folder", "d"], "--folder is for --shape k2-slice"),
        (["bench", "decode", "--shape", "k2-slice"], "--folder DIR"),
        (["bench", "store"], "--ram BYTES"),
        (["check", "d.npz", "--against-engine", "vllm"], "--against-engine is for --against"),
        (["check", "d.npz", "--against-profile", "vllm"], "--against-profile is for --against"),
        (["tok", "x", "--tools", "t.json"], "--tools is for --messages"),
        (["tok", "x", "--no-generation-prompt"], "--no-generation-prompt is for --messages"),
        # beside an option that makes it void
        (["generate", "x", *TOKENS], "prompt and --tokens: give one"),
        (["generate", "x", "--top-p", "0.9"], "--top-p needs a --temperature above 0"),
        (["chat", "--temperature", "0", "--min-p", "0.1"], "--min-p needs a --temperature"),
        (["generate", "x", "--reference", "--int4", "fast"], "--int4 fast needs the kernels"),
        (["generate", "x", "--numerics", "float64", "--int4", "fast"], "not in --numerics float64"),
        (["tok", "--messages", "m.json", "--decode"], "--decode is for a TEXT"),
        (["tok", "--messages", "m.json", "--special"], "--special is for a TEXT"),
        (["tok", "1", "--decode", "--special"], "--special reads special tokens in a text"),
        (["tok", "x", "--messages", "m.json"], "give a TEXT or --messages"),
        (
            ["sweep", *TOKENS, "--out", "o", "--logits", "none", "--positions", "last"],
            "--positions",
        ),
        (["check", "d.npz", "--truth", "t", "--model", "m"], "--model needs the model"),
        (["check", "d.npz", "--truth", "t", "--html", "h"], "--html needs the model"),
        (["check", "d.npz", "--truth", "t", "--repro", "r"], "--repro needs the model"),
        (["check", "d.npz", "--truth", "t", "--against", "d"], "--against needs the model"),
        (["check", "d.npz", "--against", "e.npz", "--all"], "--all lists the points of one"),
        (["plan", "--validate", "--ram", "64GB"], "--ram does not go with --validate"),
        (["plan", "--validate", "--dense", "q8"], "--dense does not go with --validate"),
        (["plan", "--validate", "--card-experts", "3"], "--card-experts does not go with"),
        (["plan", "--model", "m", "--member", "k2.5"], "not allowed with argument --model"),
        (["plan", "--preset", "this", "--hardware", "h"], "not allowed with argument --preset"),
        (["bench", "decode", "--model", "m", "--shape", "k2-slice"], "not allowed with argument"),
        (
            ["export", "--to", "int4", "--out", "o", "--experts", "q4_0"],
            "--experts is for --to gguf",
        ),
        (["export", "--to", "bf16", "--out", "o", "--otherwise", "f32"], "--otherwise is for --to"),
        (
            ["export", "--to", "bf16", "--out", "o", "--dense", "q8_0"],
            "--dense q8_0 is for --to gguf",
        ),
        (["export", "--to", "gguf", "--out", "o", "--quantiser", "amax/7"], "--quantiser is for"),
        (["export", "--to", "bf16", "--out", "o", "--quantiser", "amax/7"], "--quantiser is for"),
        (
            ["export", "--to", "gguf", "--out", "o", "--experts", "bf16", "--otherwise", "f32"],
            "--otherwise is for --experts q4_0",
        ),
        (["tiny", "d", "--like", "k2.5", "--format", "bf16"], "--format does not go with --like"),
        (
            ["tiny", "d", "--like", "k2.5", "--shape", "n_group=2"],
            "--shape does not go with --like",
        ),
        (["tiny", "d", "--shape", "k2-full", "--shards", "2"], "--shards does not go with --shape"),
        # numbers and counts
        (["mutate", "--jobs", "0"], "--jobs: '0', expected a whole number from 1"),
        (["mutate", "--seeds", "-1"], "--seeds: '-1', expected a whole number from 1"),
        (["bench", "decode", "--prompt", "0"], "--prompt: '0', expected"),
        (["generate", "x", "--seed", "-1"], "--seed: '-1', expected a whole number from 0"),
        (["tiny", "d", "--seed", "a"], "--seed: 'a', expected a whole number from 0"),
        (["tiny", "d", "--shards", "0"], "--shards: '0', expected"),
        (["plan", "--hit-rate", "2"], "--hit-rate: '2', expected a number from 0 to 1"),
        (["plan", "--hit-rate", "much"], "--hit-rate: 'much', expected a number from 0 to 1"),
        (["generate", "x", "--ram", "4XB"], "--ram: a size = '4XB', expected bytes like 64GB"),
        # arguments that are missing or too many
        ([], "required: VERB"),
        (["golden"], "required: verify|make"),
        (["bench"], "required: oracle|kernels|"),
        (["check"], "required: DUMP"),
        (["quant", "verify", "A"], "required: B"),
        (["quant", "expect"], "required: --to"),
        (["golden", "make", "--out", "o"], "required: --tokens"),
        (["generate", "a", "b"], "'b' is one argument too many"),
        (["inspect", "folder"], "'folder' is one argument too many"),
    ],
)
def test_what_does_not_act_is_refused_with_a_sentence(argv, why, capsys):
    assert why in refusal(capsys, *argv)


def test_a_refusal_says_where_to_read_more(capsys):
    told = refusal(capsys, "quant", "expect", "--to", "q9")
    assert told.splitlines()[1] == "Try: refmoe quant expect --help"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["golden", "--json", "verify"], {"part": "verify", "json": True}),
        (["golden", "verify", "--json"], {"part": "verify", "json": True}),
        (["golden", "verify"], {"json": False}),
        (["bench", "decode", "--model", "m", "--json"], {"part": "decode", "prompt": 128}),
        (["bench", "sweep"], {"prompt": 8, "ram": None}),
        (["bench", "store", "--ram", "4GB"], {"tokens": 12, "ram": 4 * 10**9}),
        (["quant", "kl", "A", "--base", "B"], {"part": "kl"}),
        (["chat", "--no-thinking"], {"thinking": False, "temperature": 0.6}),
        (["generate", "--temp", "1", "x"], {"temperature": 1.0, "prompt": "x"}),
    ],
)
def test_what_is_meaningful_parses(argv, expected):
    args = vars(make_parser().parse_args(argv))
    assert {key: args[key] for key in expected} == expected


def test_a_clash_of_words_is_refused_in_a_process_too():
    """As a user meets it: exit code 2, one sentence on standard error, no usage block."""
    command = [sys.executable, "-m", "refmoe", "quant", "verify", "A", "B", "--to", "int4"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "refmoe: quant verify: --to is for `refmoe quant expect`\nTry: refmoe quant verify --help\n"
    )
