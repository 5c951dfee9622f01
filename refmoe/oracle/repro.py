"""Write a script of one operation on one token, the smallest thing that shows a fault.

It is for a report to the engine's authors. `write` puts a script of some twenty lines beside an
.npz with the engine's inputs of that operation, the matrices it needs, and what the engine computed
from them. The script needs NumPy alone, computes the operation in float64, prints both, and exits
with 1 while the engine is wrong. The .npz holds hidden states of the prompt, but not its tokens,
and of the weights the matrices of one operation.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refmoe.fast.threads import single_blas_thread
from refmoe.files import InputError, write_atomically
from refmoe.model.decoder import Decoder, LayerWeights
from refmoe.model.experts import MlpWeights, MoeWeights
from refmoe.model.matrix import Matrix, dequantize
from refmoe.model.rope import cos_sin, inv_freq, softmax_scale
from refmoe.oracle.judge import Judgement
from refmoe.oracle.noise import rms
from refmoe.oracle.replay import Replay
from refmoe.version import __version__

HEAD = '''"""{point}, token {token}: {reason}.

{engine}, profile {profile}. Written by refmoe {version}; needs NumPy alone:

    python {name}.py
"""

import numpy as np

with np.load("{name}.npz") as file:  # the engine's own inputs and result, the checkpoint's weights
    d = {{k: x if x.dtype.kind == "i" else x.astype(float) for k, x in file.items()}}
'''
TAIL = """
error = np.sqrt(np.mean((d["engine"] - expected) ** 2) / np.mean(expected**2))
print("expected", expected[:4], "...")
print("engine  ", d["engine"][:4], "...")
print(f"relative error {{error:.2e}}; rounding explains {explained:.2e}")
raise SystemExit(int(not error <= {explained:.2e}))  # 1 while the engine is wrong
"""
SILU = "silu = lambda z: z / (1 + np.exp(-z))\n"
NORM = 'expected = d["x"] / np.sqrt(np.mean(d["x"] ** 2) + {eps}) * d["w"]\n'
PRODUCT = 'expected = d["W"] @ d["x"]\n'
TURN = """
def turn(x, position):  # pairs of adjacent channels, by position · inv_freq
    angle, out = position * d["inv_freq"], x.copy()
    cos, sin = d["gain"] * np.cos(angle), d["gain"] * np.sin(angle)
    out[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
    out[..., 1::2] = x[..., 0::2] * sin + x[..., 1::2] * cos
    return out

"""
CONTEXT = """q_nope, q_pe = d["q"][:, :{N}], {q_pe}  # [H, N], [H, R]
k_pe = {k_pe}  # [S, R]
kv = (d["c_kv"] @ d["W_kvb"].T).reshape(-1, {H}, {N} + {V})  # [S, H, N+V]
scores = np.einsum("hn,shn->hs", q_nope, kv[..., :{N}]) + q_pe @ k_pe.T
p = np.exp({scale} * (scores - scores.max(axis=1, keepdims=True)))
p /= p.sum(axis=1, keepdims=True)
expected = np.einsum("hs,shv->hv", p, kv[..., {N}:]).ravel()
"""
CHOICE = """score = 1 / (1 + np.exp(-d["logits"])) + d["bias"]
{groups}expected = np.sort(np.argsort(-score, kind="stable")[:{K}]).astype(float)
"""
GROUPS = """two = np.sort(score.reshape({G}, -1))[:, -2:].sum(axis=1)  # its two best
refused = np.argsort(-two, kind="stable")[{M}:]
score.reshape({G}, -1)[refused] = {masked}
"""
WEIGHTS = """s = 1 / (1 + np.exp(-d["logits"][d["experts"]]))
expected = {scale} * s{normalised}
"""
EXPERTS = """expected = np.zeros({D})
for weight, gate, up, down in zip(d["weights"], d["gate"], d["up"], d["down"]):
    expected += {scale}weight * (down @ (silu(gate @ d["x"]) * (up @ d["x"])))
"""
SHARED = 'd_s = d["down_s"] @ (silu(d["gate_s"] @ d["x"]) * (d["up_s"] @ d["x"]))\n'


class Recipe(NamedTuple):
    """The code that computes `expected` from the arrays `d`, and these arrays."""

    arrays: dict[str, np.ndarray]
    code: str


class Dumped:
    """The engine's tensors of one token; a missing one raises an `InputError` that names it."""

    def __init__(self, replay: Replay, token: int):
        self.replay, self.token = replay, token

    def __contains__(self, path: str) -> bool:
        lens = self.replay.lenses.get(path)
        return lens is not None and lens.goes_on and not lens.narrow

    def __call__(self, *paths: str, upto: bool = False) -> np.ndarray:
        """Return the token's row of the first of these points that the dump has.

        `upto`: the rows of all tokens so far. Raises `InputError` where the dump has none of them.
        """
        for path in paths:
            if path in self:
                x, at = self.replay.theirs[path], self.replay.positions(path)
                found = x[at <= self.token] if upto else x[at == self.token]
                if len(found) == (self.token + 1 if upto else 1):
                    return found if upto else found[0]
        raise InputError(f"a repro needs the operation's inputs; dump {' or '.join(paths)} as well")


@single_blas_thread()
def write(case: Judgement, file: str | Path, point: str | None = None) -> list[Path]:
    """Write script and arrays for a point, by default the one that the report names.

    Returns both paths. Raises `InputError` where there is no fault, or its inputs are not dumped.
    """
    point = point or case.report.point
    if point is None:
        raise InputError("there is no fault to reproduce")
    if point not in case.exact.theirs:
        raise InputError(f"{point}: {case.report.reason}; there is no result to reproduce")
    script = Path(file).with_suffix(".py")
    row = _worst_row(case, point)
    token = int(case.exact.positions(point)[row])
    recipe = _recipe(case.decoder, Dumped(case.exact, token), point)
    theirs = case.exact.theirs[point][row].ravel()
    if point.endswith("#experts"):
        theirs = np.sort(theirs)
    found = next((p for p in case.report.points if p.name == point), None)
    texts = {
        "point": point,
        "token": token,
        "reason": case.report.reason if point == case.report.point else "within its rounding",
        "engine": f"conventions of {case.engine}",
        "profile": case.profile.name,
        "version": __version__,
        "name": script.stem,
    }
    tail = TAIL.format(explained=max(found.envelope, 1e-12) if found else 1e-12)
    arrays: dict[str, Any] = {name: _narrow(np.asarray(x)) for name, x in recipe.arrays.items()}
    with write_atomically(script.with_suffix(".npz")) as part, part.open("wb") as file_:
        np.savez(file_, engine=theirs.astype(float), **arrays)
    with write_atomically(script) as part:
        part.write_text(HEAD.format(**texts) + recipe.code + tail, "utf-8")
    return [script, script.with_suffix(".npz")]


def _narrow(x: np.ndarray) -> np.ndarray:
    """Return x in float32 where that loses nothing, else x itself."""
    return x.astype(np.float32) if (x.astype(np.float32) == x).all() and x.dtype.kind == "f" else x


def _worst_row(case: Judgement, point: str) -> int:
    """Return the row with the largest relative error, or the first with other experts."""
    ours, theirs = case.exact.ours[point], case.exact.theirs[point]
    if point.endswith("#experts"):
        wrong = [set(a.tolist()) != set(b.tolist()) for a, b in zip(ours, theirs, strict=True)]
        return int(np.argmax(wrong))
    error = rms(theirs - ours) / np.maximum(rms(ours), 1e-300)
    return int(np.argmax(np.where(np.isfinite(error), error, np.inf)))


def _recipe(decoder: Decoder, dumped: Dumped, point: str) -> Recipe:
    """Return the recipe of any point; raise `InputError` where there is none."""
    if point == "model.embed_tokens":
        raise InputError("an embedding is a row of a table: there is no operation to reproduce")
    last = f"model.layers.{decoder.cfg.num_hidden_layers - 1}"
    if point == "model.norm":
        return _norm(dumped(last), decoder.norm, decoder.cfg.rms_norm_eps)
    if point == "lm_head":
        return _product(dumped("model.norm"), decoder.lm_head, decoder)
    number, _, rest = point.removeprefix("model.layers.").partition(".")
    number, _, mark = number.partition("#")
    i = int(number)
    at, w = f"model.layers.{i}", decoder.layers[i]
    before = f"model.layers.{i - 1}" if i else "model.embed_tokens"
    if mark == "attn_residual":
        return _sum(dumped(before), dumped(f"{at}.self_attn", f"{at}.self_attn.o_proj"))
    if not rest:
        return _sum(dumped(f"{at}#attn_residual"), dumped(f"{at}.mlp", f"{at}.mlp.down_proj"))
    if rest == "input_layernorm":
        return _norm(dumped(before), w.input_layernorm, decoder.cfg.rms_norm_eps)
    if rest == "post_attention_layernorm":
        x = dumped(f"{at}#attn_residual")
        return _norm(x, w.post_attention_layernorm, decoder.cfg.rms_norm_eps)
    if rest.startswith("self_attn"):
        return _attention(decoder, w, dumped, at, rest.removeprefix("self_attn"))
    return _mlp(decoder, i, dumped, f"{at}.mlp", rest.removeprefix("mlp").removeprefix("."))


def _exact(m: Matrix, decoder: Decoder) -> np.ndarray:
    """Return a stored matrix in float64, under the engine's conventions."""
    return dequantize(m, np.float64, decoder.nx.conventions.rounded_products)


def _product(x: np.ndarray, m: Matrix, decoder: Decoder) -> Recipe:
    """Return the recipe of W x."""
    return Recipe({"x": x, "W": _exact(m, decoder)}, PRODUCT)


def _norm(x: np.ndarray, w: Matrix, eps: float) -> Recipe:
    """Return the recipe of an RMS norm with gain w."""
    return Recipe({"x": x, "w": dequantize(w, np.float64)}, NORM.format(eps=eps))


def _sum(x: np.ndarray, y: np.ndarray) -> Recipe:
    """Return the recipe of x + y."""
    return Recipe({"x": x, "y": y}, 'expected = d["x"] + d["y"]\n')


def _attention(decoder: Decoder, w: LayerWeights, dumped: Dumped, at: str, end: str) -> Recipe:
    """Return the recipe of a point of attention, `end` behind `self_attn`."""
    cfg, a = decoder.cfg, w.self_attn
    own, x = f"{at}.self_attn", f"{at}.input_layernorm"
    eps = decoder.nx.conventions.latent_norm_eps or cfg.rms_norm_eps
    H, N, C, V = (
        cfg.num_attention_heads,
        cfg.qk_nope_head_dim,
        cfg.kv_lora_rank,
        cfg.v_head_dim,
    )
    gain = cos_sin(np.zeros(1), cfg, decoder.nx)[0][0, 0]  # of YaRN's mscale; 1 for K2
    turning = {"inv_freq": inv_freq(cfg, decoder.nx.conventions.yarn_betas), "gain": gain}
    q = f"{own}.q_proj" if a.q_a_proj is None else f"{own}.q_b_proj"
    match end:
        case ".q_a_proj" | ".q_proj" | ".kv_a_proj_with_mqa":
            return _product(dumped(x), getattr(a, end[1:]), decoder)
        case ".q_a_layernorm":
            assert a.q_a_layernorm is not None
            return _norm(dumped(f"{own}.q_a_proj"), a.q_a_layernorm, eps)
        case ".q_b_proj":
            assert a.q_b_proj is not None
            return _product(dumped(f"{own}.q_a_layernorm"), a.q_b_proj, decoder)
        case ".kv_a_layernorm":
            return _norm(dumped(f"{own}.kv_a_proj_with_mqa")[:C], a.kv_a_layernorm, eps)
        case ".kv_b_proj":
            return _product(dumped(f"{own}.kv_a_layernorm"), a.kv_b_proj, decoder)
        case "#q_pe" | "#k_pe":
            code = TURN + f'expected = turn(d["x"], {dumped.token}).ravel()\n'
            if end == "#q_pe":
                part = dumped(q).reshape(H, -1)[:, N:]
            else:
                part = dumped(f"{own}.kv_a_proj_with_mqa")[C:]
            return Recipe({"x": part, **turning}, code)
        case "#context":
            arrays = {
                "q": dumped(q).reshape(H, -1),
                "c_kv": dumped(f"{own}.kv_a_layernorm", upto=True),
                "W_kvb": _exact(a.kv_b_proj, decoder),
                **turning,
            }
            q_pe, k_pe = f'turn(d["q"][:, {N}:], {dumped.token})', 'd["k_pe"]'
            if f"{own}#q_pe" in dumped:
                arrays["q_pe"], q_pe = dumped(f"{own}#q_pe"), 'd["q_pe"]'
            if f"{own}#k_pe" in dumped:
                arrays["k_pe"] = dumped(f"{own}#k_pe", upto=True)
            else:
                arrays["k_pe"] = dumped(f"{own}.kv_a_proj_with_mqa", upto=True)[:, C:]
                k_pe = 'turn(d["k_pe"], np.arange(len(d["k_pe"]))[:, None])'
            sizes = {"H": H, "N": N, "V": V, "scale": softmax_scale(cfg)}
            return Recipe(arrays, TURN + CONTEXT.format(q_pe=q_pe, k_pe=k_pe, **sizes))
        case ".o_proj" | "":
            return _product(dumped(f"{own}#context"), a.o_proj, decoder)
    raise InputError(f"{own}{end}: there is no recipe for this point; take one that follows it")


def _mlp(decoder: Decoder, i: int, dumped: Dumped, at: str, end: str) -> Recipe:
    """Return the recipe of a point of the MLP of layer i, `end` behind `mlp.`."""
    cfg, w = decoder.cfg, decoder.layers[i].mlp
    x = f"{at.removesuffix('.mlp')}.post_attention_layernorm"
    if not isinstance(w, MoeWeights):
        return _swiglu(decoder, w, dumped, at, x, end)
    if end == "gate":
        return _product(dumped(x), w.gate.weight, decoder)
    if end in ("gate#experts", "gate#weights"):
        return _routing(decoder, w, dumped, at, x, end)
    if end.startswith("shared_experts"):
        assert w.shared_experts is not None
        inner = end.removeprefix("shared_experts").removeprefix(".")
        return _swiglu(decoder, w.shared_experts, dumped, f"{at}.shared_experts", x, inner)
    if end == "" and f"{at}.experts" in dumped and f"{at}.shared_experts" in dumped:
        return _sum(dumped(f"{at}.experts"), dumped(f"{at}.shared_experts"))
    if end in ("", "experts"):
        chosen = dumped(f"{at}.gate#experts").astype(int)
        experts = [decoder.experts[i](e) for e in chosen.tolist()]
        arrays = {"x": dumped(x), "weights": dumped(f"{at}.gate#weights")}
        for name in ("gate", "up", "down"):
            stack = [_exact(getattr(m, f"{name}_proj"), decoder) for m in experts]
            arrays[name] = np.stack(stack)
        on_sum = decoder.nx.conventions.routed_scale == "sum"
        scale = f"{cfg.routed_scaling_factor} * " if on_sum else ""
        code = SILU + EXPERTS.format(D=cfg.hidden_size, scale=scale)
        if end == "" and w.shared_experts is not None:
            if f"{at}.shared_experts" in dumped:
                arrays["shared"] = dumped(f"{at}.shared_experts")
                code += 'expected += d["shared"]\n'
            else:
                for name in ("gate", "up", "down"):
                    m = getattr(w.shared_experts, f"{name}_proj")
                    arrays[f"{name}_s"] = _exact(m, decoder)
                code += SHARED + "expected += d_s\n"
        return Recipe(arrays, code)
    number, _, inner = end.removeprefix("experts.").partition(".")
    raise InputError(f"{at}.{end}: rows of expert {number}; reproduce {at}.experts instead")


def _swiglu(decoder: Decoder, w: MlpWeights, dumped: Dumped, at: str, x: str, end: str) -> Recipe:
    """Return the recipe of a point of an MLP with these matrices."""
    match end:
        case "gate_proj" | "up_proj":
            return _product(dumped(x), getattr(w, end), decoder)
        case "act":
            arrays = {"gate": dumped(f"{at}.gate_proj"), "up": dumped(f"{at}.up_proj")}
            return Recipe(arrays, SILU + 'expected = silu(d["gate"]) * d["up"]\n')
        case _ if f"{at}.act" in dumped:
            return _product(dumped(f"{at}.act"), w.down_proj, decoder)
    arrays = {"x": dumped(x)}
    for name in ("gate", "up", "down"):
        arrays[f"{name}_s"] = _exact(getattr(w, f"{name}_proj"), decoder)
    return Recipe(arrays, SILU + SHARED + "expected = d_s\n")


def _routing(decoder: Decoder, w: MoeWeights, dumped: Dumped, at: str, x: str, end: str) -> Recipe:
    """Return the recipe of the router's choice or weights."""
    cfg, conventions = decoder.cfg, decoder.nx.conventions
    if f"{at}.gate" in dumped:
        logits = dumped(f"{at}.gate")
    else:
        logits = _exact(w.gate.weight, decoder) @ dumped(x)
    if end == "gate#experts":
        bias = dequantize(w.gate.e_score_correction_bias, np.float64)
        groups = {"G": cfg.n_group, "M": cfg.topk_group, "masked": conventions.masked_groups}
        text = "" if cfg.n_group == cfg.topk_group else GROUPS.format(**groups)
        text = text.replace("= -inf", "= -np.inf")
        code = CHOICE.format(K=cfg.num_experts_per_tok, groups=text)
        return Recipe({"logits": logits, "bias": bias}, code)
    scale = 1.0 if conventions.routed_scale == "sum" else cfg.routed_scaling_factor
    normalised = {"sum": " / s.sum()", "sum + 1e-20": " / (s.sum() + 1e-20)"}.get(
        conventions.normaliser, " / max(s.sum(), 2.0**-14)"
    )
    code = WEIGHTS.format(scale=scale, normalised=normalised if cfg.norm_topk_prob else "")
    return Recipe({"logits": logits, "experts": dumped(f"{at}.gate#experts").astype(int)}, code)
