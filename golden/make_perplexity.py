"""llama-perplexity as a witness: its file of base logits, and what it prints of two models.

    cmake -S vendor/llama.cpp -B build -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF \\
        -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_TESTS=OFF
    cmake --build build --target llama-perplexity      (five minutes on two cores)
    python golden/make_perplexity.py build/bin/llama-perplexity

in the unpacked source distribution of llama-cpp-python, which has llama.cpp under vendor/.

    perplexity.base    tiny-k2, every weight F32, cache F32, the model's own YaRN betas given by
                       hand: two chunks of 64 tokens, as `--kl-divergence-base` writes them
    perplexity.json    who wrote it, how, from what; the text; and of --kl-divergence against that
                       file the last line of chunks: the same model (f32), and the same with the
                       betas left to llama.cpp (f32-ignored)
"""

import hashlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import refmoe
from refmoe.run.export import to_gguf

HERE = Path(__file__).resolve().parent / "llamacpp"
N_CTX, CHUNKS = 64, 2
KINDS = {"dense": "f32", "experts": "f32"}
F32 = ["-c", str(N_CTX), "-t", "2", "-fa", "off", "-ctk", "f32", "-ctv", "f32", "--no-warmup"]
TEXT = """GLOUCESTER:
Now is the winter of our discontent
Made glorious summer by this sun of York;
And all the clouds that lour'd upon our house
In the deep bosom of the ocean buried.
Now are our brows bound with victorious wreaths;
Our bruised arms hung up for monuments;
Our stern alarums changed to merry meetings,
Our dreadful marches to delightful measures.
Grim-visaged war hath smooth'd his wrinkled front;
And now, instead of mounting barded steeds
To fright the souls of fearful adversaries,
He capers nimbly in a lady's chamber
To the lascivious pleasing of a lute.
"""
NUMBER = r"(-?[\d.]+) ± +\S+ +"
LINE = re.compile(rf"^ +{CHUNKS} +{NUMBER * 4}%? *([\d.]+) ±", re.MULTILINE)


def run(command: list[str], where: Path) -> str:
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def main() -> None:
    program = str(Path(sys.argv[1]).resolve())
    model = refmoe.load()
    yarn = model.cfg.rope_scaling
    assert yarn is not None
    betas = ["--yarn-beta-fast", f"{yarn.beta_fast:g}", "--yarn-beta-slow", f"{yarn.beta_slow:g}"]
    with tempfile.TemporaryDirectory() as tmp:
        where = Path(tmp)
        (where / "text.txt").write_text(TEXT, "utf-8")
        to_gguf(model, where / "f32.gguf", **KINDS)
        base = ["-m", "f32.gguf", "--kl-divergence-base", "perplexity.base", *F32]
        write = [*base, "-f", "text.txt", "--chunks", str(CHUNKS), *betas]
        run([program, *write], where)
        raw = (where / "perplexity.base").read_bytes()
        printed = {}
        for name, more in (("f32", betas), ("f32-ignored", [])):
            said = run([program, *base, "--kl-divergence", *more], where)
            found = LINE.search(said)
            assert found is not None, said
            fields = "ppl", "ln_ppl_ratio", "kl_mean", "p_diff_rms_percent", "same_top_percent"
            printed[name] = dict(zip(fields, found.groups(), strict=True))
        version = run([program, "--version"], where).strip()
        document = {
            "engine": "llama.cpp, of llama-cpp-python 0.3.36's source distribution",
            "version": version,
            "command": " ".join(["llama-perplexity", *write]),
            "model": f"tiny-k2, {KINDS}",
            "gguf_sha256": hashlib.sha256((where / "f32.gguf").read_bytes()).hexdigest(),
            "base_sha256": hashlib.sha256(raw).hexdigest(),
            "text": TEXT,
            "printed": printed,
        }
    (HERE / "perplexity.base").write_bytes(raw)
    (HERE / "perplexity.json").write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    print(json.dumps(printed, indent=1))


if __name__ == "__main__":
    main()
