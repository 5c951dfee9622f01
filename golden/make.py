"""Rewrite golden/vectors: what other engines compute, for refmoe to be checked against.

    python golden/make.py [--out golden/vectors]

needs the `peers` extra. refmoe writes none of these numbers and is not used to make them: weights
are dequantised here by torch code of its own into an exact twin (float64 holds q·s exactly), the
twin is loaded as `deepseek_v3` (under `kimi_k2` this transformers leaves the routed experts
random), and no key may be missing or unexpected. For the float64 witness every upcast inside
transformers that says `torch.float32` is made to say `torch.float64`, in norms, router, softmax
and rotary frequencies; the hooks check that nothing narrower passes. The float32 witness is
transformers as it is.

The second witness, of the family's members, is mlx-lm on the CPU in float32, from the checkpoint's
own bytes: its quantised products, its FP8 decoding (rounded to bf16) and its absorbed attention
are its own. It does not know DeepSeek-V3's prediction layer at another depth than 61, so that
layer is left out of the files it reads.

Only the random checkpoints are remade by `refmoe.weights`, from shape or member and seed; the
manifest keeps the sha256 of every file read.
"""

import argparse
import contextlib
import hashlib
import json
import platform
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import mlx.core as mx
import mlx_lm
import mlx_lm.models.deepseek_v3 as mlx_model
import mlx_lm.utils
import safetensors.torch
import torch
import transformers
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as hf

from refmoe.text.tokenizer import Tokenizer
from refmoe.weights.synthetic.members import MEMBERS, write_member
from refmoe.weights.synthetic.random import write_random

HERE = Path(__file__).resolve().parent
Tensors = dict[str, torch.Tensor]

MODELS: dict[str, dict] = {
    "tiny-k2": {"folder": "tiny-k2"},
    "random-bf16": {"random": {"format": "bf16", "seed": 11}},
    "random-int4": {"random": {"format": "int4", "seed": 12, "shards": 2}},
    **{name: {"member": {"like": name, "seed": 21 + i}} for i, name in enumerate(MEMBERS)},
}
TEXT = (
    "My lord, the king hath sent to know your mind,\n"
    "And what you purpose in this weighty cause: Speak, or be silent."
)
SPEECH = "What is thy name?"
EVERYTHING, OUTLINE = "everything", "outline"  # outline: logits, layer outputs, routing


def sequences(model: str, folder: Path) -> dict[str, tuple[list[int], str, list[int] | None]]:
    """name → tokens, how much is kept, and of which positions (None: all)."""
    if model != "tiny-k2":
        mixed = [(i * i * 7 + 3 * i) % 530 for i in range(1, 25)]
        return {"mixed": (mixed[:8] if model in MEMBERS else mixed, EVERYTHING, None)}
    words = Tokenizer.load(folder)
    dialogue = (
        f"<|im_user|>user<|im_middle|>{SPEECH}<|im_end|><|im_assistant|>assistant<|im_middle|>"
    )
    text = words.encode(TEXT)
    long = [(i * i * 31 + i * 17 + 5) % words.size for i in range(1500)]
    long[::2] = (text * 750)[:750]  # half words, half noise: attention must reach far
    kept = [0, 1, 127, 128, 129, 255, 256, 511, 512, 1023, 1024, 1497, 1498, 1499]
    return {
        "text": (text[:22], EVERYTHING, None),
        "dialogue": (words.encode(dialogue), OUTLINE, None),
        "one": (text[:1], EVERYTHING, None),
        "long": (long, OUTLINE, kept),
    }


# --- the twin -----------------------------------------------------------------------------------


def text_tensors(folder: Path) -> tuple[Tensors, dict]:
    """The text model's tensors without wrapper prefixes and left-overs, and its config."""
    config = json.loads((folder / "config.json").read_text())
    config = config.get("text_config", config)
    kept: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, t in safetensors.torch.load_file(file).items():
            name = name.removeprefix("language_model.")
            layer = re.match(r"model\.layers\.(\d+)\.", name)
            beyond = layer is not None and int(layer[1]) >= config["num_hidden_layers"]
            if not beyond and not re.match(r"vision_tower|mm_projector|.*inv_freq", name):
                kept[name] = t
    return kept, config


def twin(folder: Path, out: Path, dtype: torch.dtype) -> None:
    """A checkpoint without quantisation, every value exactly the one the stored bytes stand for."""
    stored, config = text_tensors(folder)
    exact: Tensors = {}
    for name, t in stored.items():
        module = name.rpartition(".")[0]
        if name.endswith("_packed"):
            scale, shape = stored[module + ".weight_scale"], stored[module + ".weight_shape"]
            exact[module + ".weight"] = int4(t, scale, shape).to(dtype)
        elif t.dtype == torch.float8_e4m3fn:
            exact[name] = fp8(t, stored[name + "_scale_inv"]).to(dtype)
        elif not name.endswith(("_scale", "_shape", "_scale_inv")):
            # the bias stays as it is stored: rounded to bf16 it would flip experts
            exact[name] = t if name.endswith("e_score_correction_bias") else t.to(dtype)
    safetensors.torch.save_file(exact, out / "model.safetensors", {"format": "pt"})
    config.pop("quantization_config", None)
    config.pop("auto_map", None)
    config["model_type"] = "deepseek_v3"
    config["torch_dtype"] = config["dtype"] = str(dtype).removeprefix("torch.")
    (out / "config.json").write_text(json.dumps(config))


def int4(packed: torch.Tensor, scale: torch.Tensor, shape: torch.Tensor) -> torch.Tensor:
    rows, cols = shape.tolist()
    w = torch.empty(rows, cols, dtype=torch.float64)
    words = packed.to(torch.int64) & 0xFFFFFFFF
    for i in range(8):
        w[:, i::8] = ((words >> (4 * i)) & 0xF).double() - 8
    return w * scale.double().repeat_interleave(cols // scale.shape[1], dim=1)


def fp8(w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    block = scale.double().repeat_interleave(128, 0)[: w.shape[0]]
    return w.double() * block.repeat_interleave(128, 1)[:, : w.shape[1]]


@contextlib.contextmanager
def widened(dtype: torch.dtype) -> Iterator[None]:
    """For float64: what transformers' code reads as `torch.float32` or `torch.float` is float64."""
    if dtype != torch.float64:
        yield
        return
    with (
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(torch, "float", torch.float64),
    ):
        yield


def load(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    with tempfile.TemporaryDirectory() as tmp:
        twin(folder, Path(tmp), dtype)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            tmp, dtype=dtype, attn_implementation="eager", output_loading_info=True
        )
    problems = {k: v for k, v in info.items() if v}
    if problems:
        raise SystemExit(f"{folder}: transformers did not read this checkpoint whole: {problems}")
    model.config._experts_implementation = "eager"
    with widened(dtype):
        model.model.rotary_emb = hf.DeepseekV3RotaryEmbedding(model.config)
    return model.eval()


# --- the hooks ----------------------------------------------------------------------------------


def run(model: torch.nn.Module, tokens: list[int], dtype: torch.dtype) -> Tensors:
    """Every point a forward hook can give, under refmoe's names, rows first."""
    seen: Tensors = {}
    heads = model.config.num_attention_heads

    def keep(name: str, t: torch.Tensor) -> None:
        if t.is_floating_point() and t.dtype != dtype:
            raise SystemExit(f"{name} is {t.dtype} where {dtype} was asked for")
        seen[name] = t.detach().clone()

    def rows(t: torch.Tensor) -> torch.Tensor:
        """[1, T, ...] → [T, ...]; latents come as [1, 1, S, ·]."""
        return t.reshape(-1, t.shape[-1])

    def after(name: str):  # type: ignore[no-untyped-def]
        def hook(_module, inputs, output) -> None:  # type: ignore[no-untyped-def]
            if name.endswith(".mlp.gate"):
                logits, weights, chosen = output
                order = chosen.argsort(-1)  # a set: transformers does not sort it
                keep(name, logits)
                keep(name + "#experts", chosen.gather(1, order))
                keep(name + "#weights", weights.gather(1, order))
            elif name.endswith(".self_attn"):
                keep(name, rows(output[0]))
                keep(name + "#probs", output[1][0].transpose(0, 1))  # [H, T, S] → [T, H, S]
            else:
                keep(name, rows(output))
            if name.endswith(".down_proj"):
                keep(name.removesuffix("down_proj") + "act", rows(inputs[0]))
            elif name.endswith(".o_proj"):
                keep(name.removesuffix(".o_proj") + "#context", rows(inputs[0]))
            elif name.endswith(".post_attention_layernorm"):
                keep(
                    name.removesuffix(".post_attention_layernorm") + "#attn_residual",
                    rows(inputs[0]),
                )

        return hook

    def rotation(layer: int, q: torch.Tensor, k: torch.Tensor) -> None:
        """[1, H, T, R] in halves → [T, H, R] in adjacent pairs, the checkpoint's own order."""
        for name, t in (("q_pe", q), ("k_pe", k)):
            pairs = torch.stack(t[0].chunk(2, -1), -1).flatten(-2).transpose(0, 1)
            pairs = pairs if t.shape[1] == heads else pairs[:, 0]
            keep(f"model.layers.{layer}.self_attn#{name}", pairs)

    names = re.compile(r"(model\.(embed_tokens|norm|layers\.\d+(\..+)?)|lm_head)$")
    skip = re.compile(r"act_fn$|rotary_emb$")
    hooks = [
        module.register_forward_hook(after(name))
        for name, module in model.named_modules()
        if names.match(name) and not skip.search(name)
    ]
    original, layer = hf.apply_rotary_pos_emb_interleave, iter(range(1000))

    def rotate(q, k, *args, **kwargs):  # type: ignore[no-untyped-def]
        q, k = original(q, k, *args, **kwargs)
        rotation(next(layer), q, k)
        return q, k

    try:
        with (
            torch.no_grad(),
            widened(dtype),
            mock.patch.object(hf, "apply_rotary_pos_emb_interleave", rotate),
        ):
            model(torch.tensor([tokens]), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def same_tensors(seen: Tensors) -> dict[str, str]:
    """Modules whose output is that of their last projection: kept once, under its name."""
    last = {".self_attn": ".o_proj", ".mlp": ".down_proj", ".shared_experts": ".down_proj"}
    pairs = {n: n + p for n in seen for end, p in last.items() if n.endswith(end)}
    pairs = {n: twin for n, twin in pairs.items() if twin in seen}
    different = [n for n, twin in pairs.items() if not torch.equal(seen[n], seen[twin])]
    if different:
        raise SystemExit(f"{different}: not the output of the last projection")
    return pairs


def kept(seen: Tensors, how: str, positions: list[int] | None) -> Tensors:
    if how == OUTLINE:
        wanted = re.compile(r"lm_head$|model\.layers\.\d+$|.*\.mlp\.gate#(experts|weights)$")
        seen = {n: t for n, t in seen.items() if wanted.match(n)}
    if positions is not None:
        seen = {n: t[positions] for n, t in seen.items()}
    narrow = {n: t.to(torch.int16) if n.endswith("#experts") else t for n, t in seen.items()}
    return {n: t.contiguous() for n, t in narrow.items()}


def greedy(model: torch.nn.Module, tokens: list[int], dtype: torch.dtype, n: int) -> dict:
    """n tokens, each the likeliest, and by how much its logit exceeds the second."""
    made, margins, largest, past = [], [], 0.0, None
    with torch.no_grad(), widened(dtype):
        for _ in range(n):
            new = torch.tensor([made[-1:] or tokens])
            out = model(new, past_key_values=past, use_cache=True)
            past, logits = out.past_key_values, out.logits[0, -1]
            top = logits.topk(2).values
            margins.append(float(top[0] - top[1]))
            largest = max(largest, float(logits.abs().max()))
            made.append(int(logits.argmax()))
    return {"tokens": made, "margins": margins, "largest_logit": largest}


# --- mlx ----------------------------------------------------------------------------------------


def mlx_run(folder: Path, tokens: list[int]) -> Tensors:
    """Logits and layer outputs of mlx-lm, on the CPU, in float32."""
    mx.set_default_device(mx.cpu)
    with tempfile.TemporaryDirectory() as tmp:
        own = Path(tmp)
        if json.loads((folder / "config.json").read_text()).get("num_nextn_predict_layers"):
            stored, config = text_tensors(folder)
            safetensors.torch.save_file(stored, own / "model.safetensors", {"format": "pt"})
            (own / "config.json").write_text(json.dumps(config))
        else:
            own = folder
        model, _ = mlx_lm.utils.load_model(own)
    model.set_dtype(mx.float32)
    seen: Tensors = {}
    original = mlx_model.DeepseekV3DecoderLayer.__call__

    def layer(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        out = original(self, *args, **kwargs)
        seen[f"model.layers.{len(seen)}"] = as_torch(out[0])
        return out

    with mock.patch.object(mlx_model.DeepseekV3DecoderLayer, "__call__", layer):
        logits = model(mx.array([tokens]))
    seen["lm_head"] = as_torch(logits[0])
    return seen


def as_torch(x: mx.array) -> torch.Tensor:
    if x.dtype != mx.float32:
        raise SystemExit(f"mlx computed in {x.dtype} where float32 was asked for")
    return torch.tensor(x.tolist(), dtype=torch.float32)


# --- files --------------------------------------------------------------------------------------


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def make(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    manifest: dict = {
        "version": 2,
        "command": "python golden/make.py",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "models": {},
        "cases": [],
    }
    with tempfile.TemporaryDirectory() as tmp:
        for name, spec in MODELS.items():
            folder = HERE / spec["folder"] if "folder" in spec else Path(tmp) / name
            if "random" in spec:
                write_random(folder, **spec["random"])
            elif "member" in spec:
                write_member(folder, **spec["member"])
            files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
            manifest["models"][name] = {**spec, "sha256": {f.name: sha256(f) for f in files}}
            manifest["cases"] += list(cases(name, folder, out))
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def cases(name: str, folder: Path, out: Path) -> Iterator[dict]:
    """Run every witness of one model, write its points, yield what the manifest says of them."""
    dtypes = (torch.float64,) if name in MEMBERS else (torch.float64, torch.float32)
    for dtype in dtypes:
        model = load(folder, dtype)
        width = str(dtype).removeprefix("torch.")
        for sequence, (tokens, how, positions) in sequences(name, folder).items():
            how = how if dtype == torch.float64 else OUTLINE
            seen = run(model, tokens, dtype)
            same = same_tensors(seen) if how == EVERYTHING else {}
            points = kept({n: t for n, t in seen.items() if n not in same}, how, positions)
            case = {
                "model": name,
                "sequence": sequence,
                "engine": f"transformers {transformers.__version__}",
                "witness": width,
                "conventions": "refmoe",
                "tokens": tokens,
                "positions": positions,
                "same": same,
                **save(points, out / f"{name}.{sequence}.{width}.safetensors"),
            }
            if dtype == torch.float64 and positions is None and name not in MEMBERS:
                case["greedy"] = greedy(model, tokens, dtype, 64)
            yield case
    if name in MEMBERS:
        for sequence, (tokens, _, _) in sequences(name, folder).items():
            points = mlx_run(folder, tokens)
            yield {
                "model": name,
                "sequence": sequence,
                "engine": f"mlx-lm {mlx_lm.__version__}",
                "witness": "float32",
                "conventions": "mlx",
                "tokens": tokens,
                "positions": None,
                "same": {},
                **save(points, out / f"{name}.{sequence}.mlx.safetensors"),
            }


def save(points: Tensors, file: Path) -> dict[str, str]:
    safetensors.torch.save_file(points, file)
    file.chmod(0o644)
    print(f"{file.name}: {file.stat().st_size / 1e6:.2f} MB", flush=True)
    return {"file": file.name, "sha256": sha256(file)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Rewrite the golden vectors with transformers.")
    parser.add_argument("--out", type=Path, default=HERE / "vectors")
    make(parser.parse_args().out)
    sys.exit(0)
