"""Train tiny-k2, the embedded default: a real K2, small enough for git.

    python golden/train_tiny.py TEXT --out golden/tiny-k2 [--steps 1000] [--state FILE]

TEXT is any UTF-8 text. Blank-line-separated blocks of the form "Name:\\nspeech" are also turned
into dialogues in K2's chat format (a speech is the user's turn, the reply the assistant's). What
comes out has the file layout of K2-Thinking: two safetensors shards with an index, bf16 dense
weights, routed experts in compressed-tensors' `pack-quantized` INT4, `tiktoken.model`.

    vocabulary   byte-level BPE over K2's pre-tokeniser                  2,048 ranks + 256 reserved
    experts      fake-quantised while they are trained: group 32, scale max|w|/7 rounded to bf16,
                 straight-through gradient, so that packing loses nothing
    router bias  DeepSeek-V3's (arXiv:2412.19437, §2.1.2): +u for an expert below the mean load,
                 -u above it; no auxiliary loss
    optimiser    Muon (Jordan et al. 2024; update scaled to 0.2 rms as in arXiv:2502.16982) for
                 matrices, AdamW for embedding, head, norms and router
    rows         8 x 256 tokens a step, every eighth step 2 x 1,024; five plain rows to three
                 dialogues

The model is written here a second time, in torch and independent of refmoe, on purpose. The run
resumes from --state; it is the same run for the same seed, torch build and thread count.
"""

import argparse
import base64
import collections
import hashlib
import itertools
import json
import math
import os
import platform
import time
from pathlib import Path

import regex
import safetensors.torch
import tiktoken
import torch
import torch.nn.functional as F

Params = dict[str, torch.Tensor]

RANKS, RESERVED = 2048, 256
CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "kimi_k2",
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 160,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "intermediate_size": 896,
    "moe_intermediate_size": 128,
    "n_routed_experts": 40,
    "num_experts_per_tok": 6,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.827,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "max_position_embeddings": 4096,
    "vocab_size": RANKS + RESERVED,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 0,
    "initializer_range": 0.02,
    "aux_loss_alpha": 0.001,
    "seq_aux": True,
    "pretraining_tp": 1,
    "use_cache": True,
    "bos_token_id": RANKS,
    "eos_token_id": RANKS + 2,
    "pad_token_id": RANKS + 255,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.3",
    "quantization_config": {
        "config_groups": {
            "group_0": {
                "input_activations": None,
                "output_activations": None,
                "targets": ["Linear"],
                "weights": {
                    "actorder": None,
                    "block_structure": None,
                    "dynamic": False,
                    "group_size": 32,
                    "num_bits": 4,
                    "observer": "minmax",
                    "observer_kwargs": {},
                    "strategy": "group",
                    "symmetric": True,
                    "type": "int",
                },
            }
        },
        "format": "pack-quantized",
        "ignore": [
            "lm_head",
            "re:.*self_attn.*",
            "re:.*shared_experts.*",
            "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
        ],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    },
}

# K2's special tokens by their place after the ranks (K2.6's tokenizer_config.json), and whether
# they carry the `special` flag.
SPECIAL = {
    0: ("[BOS]", True),
    1: ("[EOS]", True),
    2: ("<|im_end|>", True),
    3: ("<|im_user|>", True),
    4: ("<|im_assistant|>", True),
    6: ("<|start_header_id|>", True),
    7: ("<|end_header_id|>", True),
    9: ("[EOT]", True),
    10: ("<|im_system|>", True),
    11: ("<|tool_calls_section_begin|>", False),
    12: ("<|tool_calls_section_end|>", False),
    13: ("<|tool_call_begin|>", False),
    14: ("<|tool_call_argument_begin|>", False),
    15: ("<|tool_call_end|>", False),
    17: ("<|im_middle|>", True),
    18: ("<|media_begin|>", True),
    19: ("<|media_content|>", True),
    20: ("<|media_end|>", True),
    21: ("<|media_pad|>", True),
    22: ("<think>", False),
    23: ("</think>", False),
    254: ("[UNK]", True),
    255: ("[PAD]", True),
}
SPECIAL_ID = {name: RANKS + place for place, (name, _) in SPECIAL.items()}
SYSTEM_PROMPT = "You are Kimi, an AI assistant created by Moonshot AI."

_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_TAIL = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_TAIL}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_TAIL}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


# --- vocabulary -------------------------------------------------------------------------------


def train_bpe(text: str, ranks: int) -> list[bytes]:
    """The `ranks` tokens of a byte-level BPE, in rank order.

    Bytes come first, in GPT-2's order; then the most frequent neighbouring pair is merged, again
    and again (ties: the lower ranks), within the pieces of K2's pre-tokeniser.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order = printable + [b for b in range(256) if b not in printable]
    vocabulary = [bytes([b]) for b in order]
    place = {b: i for i, b in enumerate(order)}
    pieces = collections.Counter(regex.findall(PATTERN, text, flags=regex.V1))
    words = [[place[b] for b in piece.encode()] for piece in pieces]
    counts = list(pieces.values())

    pairs: collections.Counter[tuple[int, int]] = collections.Counter()
    where: dict[tuple[int, int], set[int]] = collections.defaultdict(set)
    for i, word in enumerate(words):
        for pair in itertools.pairwise(word):
            pairs[pair] += counts[i]
            where[pair].add(i)
    while len(vocabulary) < ranks:
        best = max(pairs, key=lambda p: (pairs[p], -p[0], -p[1]))
        if pairs[best] < 1:
            raise SystemExit(f"the text is too small for {ranks} ranks: {len(vocabulary)} found")
        new = len(vocabulary)
        vocabulary.append(vocabulary[best[0]] + vocabulary[best[1]])
        for i in where.pop(best):
            word, merged = words[i], []
            for pair in itertools.pairwise(word):
                pairs[pair] -= counts[i]
            j = 0
            while j < len(word):
                if tuple(word[j : j + 2]) == best:
                    merged.append(new)
                    j += 2
                else:
                    merged.append(word[j])
                    j += 1
            words[i] = merged
            for pair in itertools.pairwise(merged):
                pairs[pair] += counts[i]
                where[pair].add(i)
        del pairs[best]
    return vocabulary


class Vocabulary:
    def __init__(self, tokens: list[bytes]):
        self.tokens = tokens
        self.encoding = tiktoken.Encoding(
            "tiny-k2",
            pat_str=PATTERN,
            mergeable_ranks={t: i for i, t in enumerate(tokens)},
            special_tokens=SPECIAL_ID,
        )

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode(text, disallowed_special=())

    def turn(self, role: str, text: str) -> list[int]:
        """One message in K2's chat format; an assistant turn in history has an empty thought."""
        ids = [SPECIAL_ID[f"<|im_{role}|>"], *self.encode(role), SPECIAL_ID["<|im_middle|>"]]
        if role == "assistant":
            ids += [SPECIAL_ID["<think>"], SPECIAL_ID["</think>"]]
        return [*ids, *self.encode(text), SPECIAL_ID["<|im_end|>"]]


# --- data -------------------------------------------------------------------------------------


def speeches(text: str) -> list[str]:
    blocks = [block.split("\n", 1) for block in text.split("\n\n")]
    return [b[1].strip() for b in blocks if len(b) == 2 and b[0].endswith(":") and b[1].strip()]


class Data:
    """Rows of token ids, the same for the same seed and step whatever ran before."""

    def __init__(self, text: str, vocabulary: Vocabulary, seed: int):
        self.plain = torch.tensor(vocabulary.encode(text))
        said = speeches(text)
        self.system = vocabulary.turn("system", SYSTEM_PROMPT)
        self.user = [vocabulary.turn("user", s) for s in said]
        self.assistant = [vocabulary.turn("assistant", s) for s in said]
        self.seed = seed

    def dialogue(self, start: int, length: int) -> list[int]:
        row = list(self.system)
        for i in range(start, len(self.user)):
            row += (self.assistant if (i - start) % 2 else self.user)[i]
            if len(row) >= length:
                return row[:length]
        return self.dialogue(0, length)

    def batch(self, step: int) -> torch.Tensor:
        g = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        rows, length = (2, 1024) if step % 8 == 7 else (8, 256)
        talks = (rows * 3) // 8 if rows == 8 else 1
        if not self.user:
            talks = 0
        out = []
        for r in range(rows):
            if r < talks:
                start = int(torch.randint(len(self.user), (1,), generator=g))
                out.append(torch.tensor(self.dialogue(start, length + 1)))
            else:
                start = int(torch.randint(len(self.plain) - length, (1,), generator=g))
                out.append(self.plain[start : start + length + 1])
        return torch.stack(out)


def windows(ids: torch.Tensor, length: int = 256) -> torch.Tensor:
    """Whole windows of length + 1; neighbours share one token, so each target counts once."""
    return torch.stack([ids[i : i + length + 1] for i in range(0, len(ids) - length, length)])


def ngram_losses(train: torch.Tensor, rows: torch.Tensor) -> tuple[float, float]:
    """Nats per token of a unigram and a smoothed bigram on the targets of `rows`.

    Both are smoothed in their own favour: the bigram backs off to the unigram with the pseudo-count
    that suits these very targets best.
    """
    Z = CONFIG["vocab_size"]
    uni = (torch.bincount(train, minlength=Z).double() + 0.1) / (len(train) + 0.1 * Z)
    pair = torch.bincount(train[:-1] * Z + train[1:], minlength=Z * Z).view(Z, Z).double()
    before, target = rows[:, :-1].flatten(), rows[:, 1:].flatten()
    seen, count = pair[before, target], pair.sum(1)[before]
    bigram = min(
        float(-((seen + k * uni[target]) / (count + k)).log().mean())
        for k in (1, 2, 5, 10, 20, 50, 100, 200, 500)
    )
    return float(-uni[target].log().mean()), bigram


# --- model ------------------------------------------------------------------------------------


class FakeQuant(torch.autograd.Function):
    """w → q·s as INT4 stores it (group 32, s = max|w|/7 in bf16); the gradient passes through."""

    @staticmethod
    def forward(ctx, w: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def]
        q, s = quantize(w)
        return (q * s.float()[..., None]).flatten(-2)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def]
        return grad


def quantize(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """w [..., I] → codes in [-8, 7] [..., I/32, 32] and bf16 scales [..., I/32]."""
    groups = w.unflatten(-1, (-1, 32))
    s = (groups.abs().amax(-1) / 7).clamp_min(1e-5).bfloat16()
    return (groups / s.float()[..., None]).round_().clamp_(-8, 7), s


def initial(seed: int) -> Params:
    """Parameters under checkpoint names; the experts of a layer are stacked [E, O, I]."""
    g = torch.Generator().manual_seed(seed)
    c = CONFIG
    D, L, E, Fw = (
        c["hidden_size"],
        c["num_hidden_layers"],
        c["n_routed_experts"],
        c["moe_intermediate_size"],
    )
    H, N, R, V = (
        c["num_attention_heads"],
        c["qk_nope_head_dim"],
        c["qk_rope_head_dim"],
        c["v_head_dim"],
    )
    A, C = c["q_lora_rank"], c["kv_lora_rank"]
    p: Params = {}

    def matrix(name: str, *shape: int, gain: float = 1.0) -> None:
        p[name] = torch.randn(shape, generator=g) * gain / math.sqrt(shape[-1])

    def swiglu(name: str, width: int, *stack: int) -> None:
        matrix(f"{name}gate_proj.weight", *stack, width, D)
        matrix(f"{name}up_proj.weight", *stack, width, D)
        matrix(f"{name}down_proj.weight", *stack, D, width, gain=1 / math.sqrt(2 * L))

    matrix("model.embed_tokens.weight", c["vocab_size"], D)
    for i in range(L):
        a = f"model.layers.{i}.self_attn."
        matrix(a + "q_a_proj.weight", A, D)
        matrix(a + "q_b_proj.weight", H * (N + R), A)
        matrix(a + "kv_a_proj_with_mqa.weight", C + R, D)
        matrix(a + "kv_b_proj.weight", H * (N + V), C)
        matrix(a + "o_proj.weight", D, H * V, gain=1 / math.sqrt(2 * L))
        p[a + "q_a_layernorm.weight"] = torch.ones(A)
        p[a + "kv_a_layernorm.weight"] = torch.ones(C)
        p[f"model.layers.{i}.input_layernorm.weight"] = torch.ones(D)
        p[f"model.layers.{i}.post_attention_layernorm.weight"] = torch.ones(D)
        m = f"model.layers.{i}.mlp."
        if i < c["first_k_dense_replace"]:
            swiglu(m, c["intermediate_size"])
        else:
            matrix(m + "gate.weight", E, D)
            swiglu(m + "shared_experts.", Fw * c["n_shared_experts"])
            swiglu(m + "experts.", Fw, E)
    p["model.norm.weight"] = torch.ones(D)
    matrix("lm_head.weight", c["vocab_size"], D, gain=0.5)
    return p


def router_biases() -> Params:
    layers = range(CONFIG["first_k_dense_replace"], CONFIG["num_hidden_layers"])
    return {f"model.layers.{i}.mlp.": torch.zeros(CONFIG["n_routed_experts"]) for i in layers}


def yarn(length: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """cos, sin [T, R/2] and the softmax scale (arXiv:2309.00071, §3.2-3.4)."""
    c, y = CONFIG, CONFIG["rope_scaling"]
    R, theta = c["qk_rope_head_dim"], c["rope_theta"]
    base = theta ** (-torch.arange(0, R, 2, dtype=torch.float64) / R)

    def dim(rotations: float) -> float:
        span = y["original_max_position_embeddings"] / (2 * math.pi * rotations)
        return R * math.log(span) / (2 * math.log(theta))

    low = max(math.floor(dim(y["beta_fast"])), 0)
    high = min(math.ceil(dim(y["beta_slow"])), R - 1)
    ramp = ((torch.arange(R // 2) - low) / max(high - low, 0.001)).clamp(0, 1)
    freq = base * (1 - ramp) + base / y["factor"] * ramp
    angle = torch.arange(length, dtype=torch.float64)[:, None] * freq
    mscale = 0.1 * y["mscale_all_dim"] * math.log(y["factor"]) + 1
    return (
        angle.cos().float(),
        angle.sin().float(),
        mscale**2 / math.sqrt(c["qk_nope_head_dim"] + R),
    )


def rms_norm(x: torch.Tensor, w: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), w, eps)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


def attention(x: torch.Tensor, p: Params, name: str, rope) -> torch.Tensor:  # type: ignore[no-untyped-def]
    c = CONFIG
    B, T, _ = x.shape
    H, N, R, V = (
        c["num_attention_heads"],
        c["qk_nope_head_dim"],
        c["qk_rope_head_dim"],
        c["v_head_dim"],
    )
    cos, sin, scale = rope
    q = rms_norm(x @ p[name + "q_a_proj.weight"].T, p[name + "q_a_layernorm.weight"], 1e-6)
    q = (q @ p[name + "q_b_proj.weight"].T).view(B, T, H, N + R).transpose(1, 2)
    q = torch.cat((q[..., :N], rotate(q[..., N:], cos, sin)), -1)
    kv, k_pe = (x @ p[name + "kv_a_proj_with_mqa.weight"].T).split((c["kv_lora_rank"], R), -1)
    kv = rms_norm(kv, p[name + "kv_a_layernorm.weight"], 1e-6)
    kv = (kv @ p[name + "kv_b_proj.weight"].T).view(B, T, H, N + V).transpose(1, 2)
    k_pe = rotate(k_pe, cos, sin)[:, None].expand(B, H, T, R)
    k = torch.cat((kv[..., :N], k_pe), -1)
    v = F.pad(kv[..., N:], (0, N + R - V))  # CPU flash attention wants one head width
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)[..., :V]
    return o.transpose(1, 2).reshape(B, T, H * V) @ p[name + "o_proj.weight"].T


def swiglu(x: torch.Tensor, p: Params, name: str) -> torch.Tensor:
    gate, up = x @ p[name + "gate_proj.weight"].T, x @ p[name + "up_proj.weight"].T
    return (F.silu(gate) * up) @ p[name + "down_proj.weight"].T


def moe(x: torch.Tensor, p: Params, name: str, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """x [T, D] → y [T, D], and the chosen experts [T, K]."""
    K, E = CONFIG["num_experts_per_tok"], CONFIG["n_routed_experts"]
    s = torch.sigmoid(x @ p[name + "gate.weight"].T)
    top = (s.detach() + bias).topk(K).indices
    g = s.gather(1, top)
    g = g / (g.sum(-1, keepdim=True) + 1e-20) * CONFIG["routed_scaling_factor"]
    order = top.flatten().argsort(stable=True)
    rows = order // K
    counts = torch.bincount(top.flatten(), minlength=E).tolist()
    # unbound once: indexing inside the loop would make a full-size gradient per expert
    weights = [
        FakeQuant.apply(p[f"{name}experts.{part}_proj.weight"]).unbind(0)
        for part in ("gate", "up", "down")
    ]
    out = torch.cat(
        [
            (F.silu(rows_e @ w1.T) * (rows_e @ w3.T)) @ w2.T
            for rows_e, w1, w3, w2 in zip(x[rows].split(counts), *weights, strict=True)
        ]
    )
    y = torch.zeros_like(x).index_add(0, rows, out * g.flatten()[order, None])
    return y + swiglu(x, p, name + "shared_experts."), top


def forward(
    ids: torch.Tensor, p: Params, biases: Params, dropout: float = 0.0
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """ids [B, T] → logits [B, T, Z] and the chosen experts of each MoE layer."""
    B, T = ids.shape
    eps = CONFIG["rms_norm_eps"]
    rope = yarn(T)
    x = p["model.embed_tokens.weight"][ids]
    chosen = {}
    for i in range(CONFIG["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        h = rms_norm(x, p[layer + "input_layernorm.weight"], eps)
        x = x + F.dropout(attention(h, p, layer + "self_attn.", rope), dropout)
        h = rms_norm(x, p[layer + "post_attention_layernorm.weight"], eps)
        mlp = layer + "mlp."
        if mlp in biases:
            y, chosen[mlp] = moe(h.view(B * T, -1), p, mlp, biases[mlp])
            y = y.view(B, T, -1)
        else:
            y = swiglu(h, p, mlp)
        x = x + F.dropout(y, dropout)
    x = rms_norm(x, p["model.norm.weight"], eps)
    return x @ p["lm_head.weight"].T, chosen


def held_out_loss(rows: torch.Tensor, p: Params, biases: Params) -> float:
    with torch.no_grad():
        total = sum(
            float(loss_of(forward(part[:, :-1], p, biases)[0], part[:, 1:])) * len(part)
            for part in rows.split(8)
        )
    return total / len(rows)


def loss_of(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


# --- optimiser --------------------------------------------------------------------------------


def orthogonalize(m: torch.Tensor) -> torch.Tensor:
    """UVᵀ of m = UΣVᵀ, nearly: five Newton-Schulz steps of Muon's quintic, on stacks too."""
    tall = m.shape[-2] > m.shape[-1]
    x = m.mT if tall else m
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


def is_matrix(name: str) -> bool:
    return "proj" in name


class Optimizer:
    def __init__(self, params: Params, rate: float):
        self.params, self.rate = params, rate
        self.momentum = {n: torch.zeros_like(t) for n, t in params.items() if is_matrix(n)}
        rest = [t for n, t in params.items() if not is_matrix(n)]
        self.adam = torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.95), weight_decay=0.1)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        for name, m in self.momentum.items():
            w, grad = self.params[name], self.params[name].grad
            m.lerp_(grad, 0.05)
            update = orthogonalize(grad.lerp(m, 0.95))  # Nesterov
            w.mul_(1 - rate * 0.1).add_(update, alpha=-rate * 0.2 * math.sqrt(max(w.shape[-2:])))

    def state(self) -> dict:
        return {"momentum": self.momentum, "adam": self.adam.state_dict()}

    def load(self, state: dict) -> None:
        self.momentum = state["momentum"]
        self.adam.load_state_dict(state["adam"])


def rate_at(step: int, steps: int, peak: float) -> float:
    return peak * min(1, (step + 1) / 40) * max(0.02, 1 - step / steps)


def train(args: argparse.Namespace, data: Data, rows: torch.Tensor) -> tuple[Params, Params, dict]:
    torch.manual_seed(args.seed)
    params, biases = initial(args.seed), router_biases()
    for t in params.values():
        t.requires_grad_()
    opt, step, log, spent = Optimizer(params, args.rate), 0, {}, 0.0
    if args.state and args.state.exists():
        saved = torch.load(args.state)
        with torch.no_grad():
            for name, t in params.items():
                t.copy_(saved["params"][name])
        biases, step, log, spent = (saved[k] for k in ("biases", "step", "log", "spent"))
        opt.load(saved["opt"])
        print(f"resumed at step {step}", flush=True)
    began = time.time() - spent
    while step < args.steps:
        batch = data.batch(step)
        torch.manual_seed(args.seed + step)  # dropout, too, is the same after a resume
        logits, chosen = forward(batch[:, :-1], params, biases, args.dropout)
        loss = loss_of(logits, batch[:, 1:])
        for t in params.values():
            t.grad = None
        loss.backward()
        torch.nn.utils.clip_grad_norm_([t for n, t in params.items() if not is_matrix(n)], 1.0)
        opt.step(rate_at(step, args.steps, args.rate))
        for name, top in chosen.items():
            load = torch.bincount(top.flatten(), minlength=len(biases[name])).float()
            biases[name] += args.bias_rate * (load.mean() - load).sign()
        step += 1
        if step % 20 == 0 or step == args.steps:
            pace = (time.time() - began) / step
            line = f"step {step} loss {float(loss.detach()):.4f} {pace:.2f} s/step"
            if step % 100 == 0 or step == args.steps:
                log[step] = held_out_loss(rows, params, biases)
                line += f" held-out {log[step]:.4f}"
                if args.state:
                    part = args.state.with_suffix(".part")
                    state = {"params": params, "biases": biases, "step": step, "log": log}
                    torch.save({**state, "spent": time.time() - began, "opt": opt.state()}, part)
                    os.replace(part, args.state)
            print(line, flush=True)
    return {n: t.detach() for n, t in params.items()}, biases, {"held_out": log, "began": began}


# --- files ------------------------------------------------------------------------------------


def pack(w: torch.Tensor) -> dict[str, torch.Tensor]:
    """One matrix as compressed-tensors' pack-quantized: offset-binary nibbles, lowest first."""
    q, s = quantize(w)
    nibbles = (q.flatten(-2).to(torch.int64) + 8).unflatten(-1, (-1, 8))
    words = (nibbles << torch.arange(0, 32, 4)).sum(-1)
    return {
        "weight_packed": (words - ((words >> 31) << 32)).to(torch.int32),
        "weight_scale": s,
        "weight_shape": torch.tensor(w.shape, dtype=torch.int32),
    }


def tensors_of(params: Params, biases: Params) -> Params:
    out: Params = {}
    for name, t in params.items():
        head, _, tail = name.partition(".experts.")
        if not tail:
            out[name] = t.bfloat16()
            continue
        part = tail.removesuffix(".weight")
        for e, w in enumerate(t):
            for kind, value in pack(w).items():
                out[f"{head}.experts.{e}.{part}.{kind}"] = value
    for name, b in biases.items():
        out[name + "gate.e_score_correction_bias"] = b
    return out


def unpack(tensors: Params) -> tuple[Params, Params]:
    """The packed files back to float32 parameters: what the loss after packing is taken of."""
    params: Params = {}
    biases: Params = {}
    stacks: dict[str, dict[int, torch.Tensor]] = collections.defaultdict(dict)
    for name, t in tensors.items():
        if name.endswith("e_score_correction_bias"):
            biases[name.removesuffix("gate.e_score_correction_bias")] = t
        elif name.endswith("weight_packed"):
            s = tensors[name.replace("weight_packed", "weight_scale")].float()
            q = (t[..., None].to(torch.int64) >> torch.arange(0, 32, 4)) & 15
            w = ((q - 8).float().view(*s.shape, 32) * s[..., None]).flatten(-2)
            head, tail = name.split(".experts.")
            e, part, _ = tail.split(".")
            stacks[f"{head}.experts.{part}.weight"][int(e)] = w
        elif name.endswith(".weight"):
            params[name] = t.float()
    for name, parts in stacks.items():
        params[name] = torch.stack([parts[e] for e in range(len(parts))])
    return params, biases


def write(out: Path, params: Params, biases: Params, vocabulary: Vocabulary) -> None:
    out.mkdir(parents=True, exist_ok=True)
    tensors = tensors_of(params, biases)
    half = CONFIG["num_hidden_layers"] // 2
    shards: list[Params] = [{}, {}]
    for name, t in tensors.items():
        parts = name.split(".")
        late = int(parts[2]) >= half if parts[1] == "layers" else "embed" not in name
        shards[late][name] = t.contiguous()
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": {}}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        safetensors.torch.save_file(shard, out / file, metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(shard, file)
    index["weight_map"] = dict(sorted(index["weight_map"].items()))

    def dump(name: str, value: object) -> None:
        (out / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")

    dump("model.safetensors.index.json", index)
    dump("config.json", CONFIG)
    dump("generation_config.json", {"eos_token_id": CONFIG["eos_token_id"], "max_length": 4096})
    lines = (f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(vocabulary.tokens))
    (out / "tiktoken.model").write_text("".join(lines), "ascii")
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    dump(
        "tokenizer_config.json",
        {
            "added_tokens_decoder": {
                str(RANKS + place): {"content": name, **flags, "special": special}
                for place, (name, special) in SPECIAL.items()
            },
            "bos_token": "[BOS]",
            "eos_token": "[EOS]",
            "unk_token": "[UNK]",
            "pad_token": "[PAD]",
            "clean_up_tokenization_spaces": False,
            "model_max_length": CONFIG["max_position_embeddings"],
            "tokenizer_class": "TikTokenTokenizer",
        },
    )


def main() -> None:
    ap = argparse.ArgumentParser(description="Train tiny-k2.")
    ap.add_argument("text", type=Path)
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--state", type=Path, help="resume from and save to this file")
    ap.add_argument("--steps", type=int, default=1000)
    ap.add_argument("--seed", type=int, default=2)
    ap.add_argument("--rate", type=float, default=4e-3)
    ap.add_argument("--bias-rate", type=float, default=1e-3)
    ap.add_argument("--dropout", type=float, default=0.2)
    args = ap.parse_args()
    torch.set_flush_denormal(True)

    text = args.text.read_text("utf-8")
    cut = text.index("\n\n", int(len(text) * 0.95)) + 2  # the last twentieth is held out
    vocabulary = Vocabulary(train_bpe(text[:cut], RANKS))
    data = Data(text[:cut], vocabulary, args.seed)
    held = torch.tensor(vocabulary.encode(text[cut:]))
    rows = windows(held)
    unigram, bigram = ngram_losses(data.plain, rows)
    print(
        f"{len(data.plain)} tokens to train on, {len(data.user)} speeches, {len(held)} held out; "
        f"unigram {unigram:.4f}, bigram {bigram:.4f} nats a token",
        flush=True,
    )
    params, biases, run = train(args, data, rows)
    before = held_out_loss(rows, params, biases)
    write(args.out, params, biases, vocabulary)
    files = sorted(args.out.glob("*.safetensors"))
    packed = {n: t for f in files for n, t in safetensors.torch.load_file(f).items()}
    after = held_out_loss(rows, *unpack(packed))
    report = {
        "made_by": "golden/train_tiny.py",
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "steps": args.steps,
        "seed": args.seed,
        "peak_learning_rate": args.rate,
        "router_bias_rate": args.bias_rate,
        "dropout": args.dropout,
        "training_tokens": len(data.plain),
        "held_out_tokens": rows[:, 1:].numel(),
        "held_out_unigram": unigram,
        "held_out_bigram": bigram,
        "held_out_fake_quantised": before,
        "held_out_packed": after,
        "held_out_by_step": run["held_out"],
        "hours": round((time.time() - run["began"]) / 3600, 2),
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    (args.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
