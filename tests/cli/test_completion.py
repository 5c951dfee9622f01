"""`refmoe completion`: the shells complete what the parsers know."""

import shutil
import subprocess
import sys

import pytest

from refmoe import cli

ASK = """
source {script}
COMP_WORDS=(refmoe {words}); COMP_CWORD={last}; COMP_LINE="refmoe {words}"
$(complete -p refmoe | sed -E 's/.*-F ([^ ]+).*/\\1/') refmoe "${{COMP_WORDS[{last}]}}"
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("swe", {"sweep"}),
        ("bench pre", {"prefill"}),
        ("bench decode --de", {"--dense"}),
        ("check x.npz --engine v", {"vllm"}),
        ("plan --preset lap", {"laptop-64gb-nvme"}),
    ],
)
def test_bash_completes_verbs_options_and_names(words, expected, tmp_path, capsys):
    bash = shutil.which("bash")
    assert bash
    assert cli.main(["completion", "bash"]) == 0
    script = tmp_path / "refmoe.bash"
    script.write_text(capsys.readouterr().out)
    ask = ASK.format(script=script, words=words, last=len(words.split()))
    done = subprocess.run([bash, "-c", ask], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == expected


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_a_script_of_all_verbs(shell, capsys):
    assert cli.main(["completion", shell]) == 0
    out = capsys.readouterr().out
    assert "sweep" in out
    assert "laptop-64gb-nvme" in out


def test_an_unknown_shell_is_refused(capsys):
    assert cli.main(["completion", "bsh"]) == 2
    assert "did you mean bash" in capsys.readouterr().err


def test_without_the_library_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 2
    assert "pip install 'refmoe[completion]'" in capsys.readouterr().err
