"""Logs of llama.cpp's llama-eval-callback on exports of tiny-k2, in golden/llamacpp.

    pip download llama-cpp-python==0.3.36 --no-binary llama-cpp-python --no-deps
    tar xzf llama_cpp_python-0.3.36.tar.gz
    cmake -S llama_cpp_python-0.3.36/vendor/llama.cpp -B build -DBUILD_SHARED_LIBS=OFF \\
        -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_SERVER=OFF
    cmake --build build --target llama-eval-callback -j2
    python golden/make_eval_callback.py build/bin/llama-eval-callback 0.3.36

    f32.txt          standard output alone, which has no tokens
    f32.log          2>&1
    f32-own.log      llama.cpp's own YaRN betas, 32 and 1, in place of the file's
    f32-chunks.log   -ub 4: the prompt in chunks of 4
    f32-verbose.log  -v
    f32-json.log     --log-jsonl
    q8_0.log         as people run it: experts Q4_0, the rest Q8_0, cache F16, flash attention auto
    q8_0-own.log     the same with llama.cpp's own betas

The tool ends without waiting for the thread that prints: most logs lack their end, at a place that
is another each time. It runs again until the log is whole, but for q8_0-own.log, kept as it first
came out cut.
"""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import refmoe
from refmoe.run.export import to_gguf

HERE = Path(__file__).resolve().parent
PROMPT = "Now is the winter of our discontent made glorious"
BETAS = ["--yarn-beta-fast", "1", "--yarn-beta-slow", "1"]
PLAIN = ["-ctk", "f32", "-ctv", "f32", "-fa", "off"]
LOGS = {
    "f32.txt": ("f32", [*BETAS, *PLAIN]),
    "f32.log": ("f32", [*BETAS, *PLAIN]),
    "f32-own.log": ("f32", PLAIN),
    "f32-chunks.log": ("f32", [*BETAS, *PLAIN, "-ub", "4"]),
    "f32-verbose.log": ("f32", [*BETAS, *PLAIN, "-v"]),
    "f32-json.log": ("f32", [*BETAS, *PLAIN, "--log-jsonl"]),
    "q8_0.log": ("q8_0", BETAS),
    "q8_0-own.log": ("q8_0", []),
}
KINDS = {"f32": ("f32", "f32"), "q8_0": ("q8_0", "q4_0")}  # dense, experts
CUT = "q8_0-own.log"


def whole(text: str) -> bool:
    """Tell whether the logits were printed to their end."""
    return "sum =" in text.rpartition("result_output")[2] and "result_output = (f32)" in text


def log_of(tool: Path, file: Path, options: list[str], name: str) -> tuple[str, list[str]]:
    command = [str(tool), "-m", str(file), "-p", PROMPT, "-c", "512", "-t", "1", *options]
    for _ in range(200):
        errors = subprocess.DEVNULL if name.endswith(".txt") else subprocess.STDOUT
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, check=True)
        text = done.stdout.decode()
        if whole(text) != (name == CUT):
            return text, [Path(command[0]).name, "-m", file.name, *command[3:]]
    raise SystemExit(f"{name}: no log in 200 runs is what it should be")


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit(
            "give llama-eval-callback and the version of the sources it was built from"
        )
    model = refmoe.load()
    about = {
        "engine": f"llama.cpp's llama-eval-callback, as llama-cpp-python {sys.argv[2]} bundles it",
        "prompt": PROMPT,
        "tokens": model.tokenizer.encode(PROMPT),
        "logs": {},
    }
    out = HERE / "llamacpp" / "eval-callback.tar.xz"
    with tempfile.TemporaryDirectory() as tmp, tarfile.open(out, "w:xz", preset=9) as tar:
        for name, (dense, experts) in KINDS.items():
            to_gguf(model, Path(tmp) / f"{name}.gguf", dense=dense, experts=experts)
        for name, (kind, options) in LOGS.items():
            file = Path(tmp) / f"{kind}.gguf"
            text, command = log_of(Path(sys.argv[1]), file, options, name)
            data = text.replace(tmp, "").encode()
            about["logs"][name] = {
                "command": command,
                "model": f"tiny-k2, {dict(zip(('dense', 'experts'), KINDS[kind], strict=True))}",
                "gguf_sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            }
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
            print(f"{name}: {len(data)} bytes")
    (HERE / "llamacpp" / "eval-callback.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
