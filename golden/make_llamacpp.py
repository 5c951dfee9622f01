"""llama.cpp as a witness: its logits on exports of tiny-k2, written to golden/llamacpp.

    pip install -e '.[gguf]' llama-cpp-python      (builds llama.cpp, some ten minutes)
    python golden/make_llamacpp.py

    f32             every weight F32, cache F32, the model's own YaRN betas given by hand
    f32-ignored     the same, betas left to llama.cpp, whose deepseek2 uses 32 and 1 for the file's
    q8_0            as people run it: experts Q4_0, the rest Q8_0, cache F16; betas by hand
    q8_0-ignored    the same, betas left to llama.cpp

Each file has the logits [T, Z] of the tokens in its metadata, and who wrote it, how, and from what.
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import llama_cpp
import numpy as np
from safetensors.numpy import save_file

import refmoe
from refmoe.run.export import to_gguf

HERE = Path(__file__).resolve().parent
TEXT = (
    "GLOUCESTER:\nNow is the winter of our discontent\nMade glorious summer by this sun of York;\n"
)


def logits(
    file: Path, tokens: list[int], cache: int, betas: tuple[float, float] | None
) -> np.ndarray:
    by_hand = {"yarn_beta_fast": betas[0], "yarn_beta_slow": betas[1]} if betas else {}
    engine = llama_cpp.Llama(
        str(file),
        n_ctx=512,
        n_batch=512,
        logits_all=True,
        flash_attn=False,
        type_k=cache,
        type_v=cache,
        verbose=False,
        **by_hand,
    )
    engine.eval(tokens)
    return np.array(engine.scores[: len(tokens)], np.float32)


def main() -> None:
    model = refmoe.load()
    tokens = model.tokenizer.encode(TEXT)[:32]
    yarn = model.cfg.rope_scaling
    out = HERE / "llamacpp"
    out.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as tmp:
        for name, kinds, cache in (
            ("f32", {"dense": "f32", "experts": "f32"}, llama_cpp.GGML_TYPE_F32),
            ("q8_0", {"dense": "q8_0", "experts": "q4_0"}, llama_cpp.GGML_TYPE_F16),
        ):
            file = Path(tmp) / f"{name}.gguf"
            to_gguf(model, file, **kinds)
            for end, betas in (("", (yarn.beta_fast, yarn.beta_slow)), ("-ignored", None)):
                metadata = {
                    "engine": f"llama.cpp, llama-cpp-python {llama_cpp.__version__}",
                    "command": " ".join(["python", *sys.argv]),
                    "model": f"tiny-k2, {kinds}",
                    "gguf_sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
                    "betas": json.dumps(betas),
                    "tokens": json.dumps(tokens),
                }
                arrays = {"lm_head": logits(file, tokens, cache, betas)}
                file_ = out / f"{name}{end}.safetensors"
                save_file(arrays, file_, metadata)
                file_.chmod(0o644)
                print(f"{out.name}/{name}{end}.safetensors: {arrays['lm_head'].shape}")


if __name__ == "__main__":
    main()
