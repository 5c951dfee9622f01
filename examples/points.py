"""Which tensors can be watched, and what shape has each of them?

    python examples/points.py

This runs a small random network in which no two axes have the same size, and prints every point of
a dense layer and of a layer with experts, with sizes turned back into the letters of their axes.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import refmoe

TAPS = ("#scores", "#probs", ".gate", "#experts", "#weights", "#rows")
TOKENS = [3, 1, 4, 1, 5, 9, 2]


def letters(cfg: refmoe.Config) -> dict[int, str]:
    """Return the letter of each axis by its size, products and sums of axes included."""
    H, N, R, V, C = (
        cfg.num_attention_heads,
        cfg.qk_nope_head_dim,
        cfg.qk_rope_head_dim,
        cfg.v_head_dim,
        cfg.kv_lora_rank,
    )
    own = {cfg.hidden_size: "D", H: "H", N: "N", R: "R", V: "V", C: "C", cfg.q_lora_rank or 0: "A"}
    own |= {cfg.n_routed_experts: "E", cfg.num_experts_per_tok: "K", cfg.vocab_size: "Z"}
    own |= {cfg.moe_intermediate_size: "F", cfg.intermediate_size: "dense width"}
    own |= {cfg.moe_intermediate_size * cfg.n_shared_experts: "n_shared·F"}
    return own | {H * (N + R): "H(N+R)", H * (N + V): "H(N+V)", H * V: "HV", C + R: "C+R"}


with tempfile.TemporaryDirectory() as tmp:
    folder = Path(tmp) / "model"
    command = [sys.executable, "-m", "refmoe", "tiny", folder, "--seed", "0"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    model = refmoe.load(folder)
    axes = letters(model.cfg)
    points = refmoe.trace(model, TOKENS)

print("| point | shape | shown |")
print("|---|---|---|")
expert = None
for name, x in points.items():
    parts = name.split(".")
    if "layers" in parts and parts[2][0] not in "01":
        continue  # layers 2 and 3 are mixtures like layer 1
    if ".mlp.experts." in name:
        number = name.split(".mlp.experts.")[1].split(".")[0].split("#")[0]
        if number != (expert := expert or number):
            continue  # the experts are alike
        name = name.replace(f".experts.{number}", ".experts.E")
    if x.ndim == 3 and x.shape[2] == len(TOKENS):
        shape = "T, H, S"
    else:
        first = "rows of E" if ".experts.E" in name else "T"
        if name.endswith("kv_b_proj"):
            first = "S"
        shape = ", ".join([first, *(axes[n] for n in x.shape[1:])])
    shown = "as computed" if name.endswith(TAPS) else "rounded by the policy"
    print(f"| `{name}` | [{shape}] | {shown} |")
