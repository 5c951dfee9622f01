"""Judge the rows that followed a cached prefix whose tokens nobody gives.

Their positions are solved from the rotation of their own keys; that the rows attended to something
before them shows in the first one, which else would return its own value. What rests on the tokens
before (attention's weighted sum, and what is judged together with it) cannot be judged; everything
else can.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from refmoe.model.cache import LatentCache
from refmoe.model.decoder import Decoder
from refmoe.model.matrix import dequantize
from refmoe.model.rope import inv_freq
from refmoe.oracle.readers.adapt import fit
from refmoe.oracle.readers.base import Arrays

LIKE = 0.99  # of the largest sum of cosines: turned by one angle a position, and only rounded
ACROSS = ("#scores", "#probs", "#context", "#context_latent")  # points that rest on earlier tokens


@dataclass(frozen=True)
class After(Decoder):
    """A decoder whose prompts follow this many tokens that are not known."""

    before: int = 0

    def caches(self) -> list[LatentCache]:
        """Return the caches of a prompt, each with the unknown rows as zeros."""
        caches, cfg = super().caches(), self.cfg
        for cache in caches:
            latent = np.zeros((self.before, cfg.kv_lora_rank), self.nx.dtype)
            cache.append(latent, np.zeros((self.before, cfg.qk_rope_head_dim), self.nx.dtype))
        return caches


def after(decoder: Decoder, before: int) -> Decoder:
    """Return the decoder for a prompt that follows this many tokens."""
    if not before:
        return decoder
    own = {name: getattr(decoder, name) for name in Decoder.__dataclass_fields__}
    return After(**own, before=before)


def prefix_of(decoder: Decoder) -> int:
    """Return how many unknown tokens the decoder's prompts follow."""
    return decoder.before if isinstance(decoder, After) else 0


def find_prefix(arrays: Arrays, decoder: Decoder, tokens: int) -> int:
    """Return how many tokens were before these rows; 0 where none were, or nothing tells."""
    cfg = decoder.cfg
    for i in range(cfg.num_hidden_layers):
        at = f"model.layers.{i}.self_attn"
        k_pe = _rows(arrays, f"{at}#k_pe", (tokens, cfg.qk_rope_head_dim), decoder)
        kv = _rows(
            arrays,
            f"{at}.kv_a_proj_with_mqa",
            (tokens, cfg.kv_lora_rank + cfg.qk_rope_head_dim),
            decoder,
        )
        if k_pe is None or kv is None:
            continue
        before = _offset(kv[:, cfg.kv_lora_rank :], k_pe, decoder)
        if not before:
            return 0
        if (alone := _attends_to_itself(arrays, decoder, i, tokens)) is not None:
            return 0 if alone else before
    return 0


def _rows(arrays: Arrays, name: str, shape: tuple[int, ...], decoder: Decoder) -> np.ndarray | None:
    """Return an array as this point has it; None where it is absent, of another shape, or NaN."""
    raw = arrays.get(name)
    x = None if raw is None else fit(name, raw, shape, decoder.nx.conventions)
    return x.astype(np.float64) if x is not None and np.isfinite(x).all() else None


def _offset(x: np.ndarray, turned: np.ndarray, decoder: Decoder) -> int:
    """Return o of x turned by (o + row) · frequency; 0 where no o fits.

    Each pair is a complex number; their quotients, freed of the row's own angle, are e^{i o f}.
    """
    freq = inv_freq(decoder.cfg, decoder.nx.conventions.yarn_betas)
    a, b = (z[:, 0::2] + 1j * z[:, 1::2] for z in (x, turned))
    rows = np.arange(len(x))[:, None]
    pairs = (b * a.conj() * np.exp(-1j * rows * freq)).sum(axis=0)  # [R/2]
    most = float((np.abs(a) * np.abs(b)).sum())
    room = decoder.cfg.max_position_embeddings
    best, offset = 0.0, 0
    for start in range(0, room, 1 << 14):
        o = np.arange(start, min(start + (1 << 14), room))
        score = (np.exp(-1j * o[:, None] * freq) @ pairs).real
        if score.max() > best:
            best, offset = float(score.max()), int(o[np.argmax(score)])
    return offset if best > LIKE * most else 0


def _attends_to_itself(arrays: Arrays, decoder: Decoder, i: int, tokens: int) -> bool | None:
    """Tell whether the first row's context is its own value; None where the dump lacks either."""
    cfg, at = decoder.cfg, f"model.layers.{i}.self_attn"
    H, N, V = cfg.num_attention_heads, cfg.qk_nope_head_dim, cfg.v_head_dim
    latent = _rows(arrays, f"{at}.kv_a_layernorm", (tokens, cfg.kv_lora_rank), decoder)
    context = _rows(arrays, f"{at}#context", (tokens, H * V), decoder)
    if latent is None or context is None:
        return None
    w = dequantize(decoder.layers[i].self_attn.kv_b_proj, np.float64)
    value = (w @ latent[0]).reshape(H, N + V)[:, N:].reshape(-1)
    size = float(np.sqrt((value @ value) * (context[0] @ context[0])))
    return bool(value @ context[0] > LIKE * size)


def rests_on_prefix(path: str, through: Iterable[str]) -> bool:
    """Tell whether a point is a sum over earlier tokens, or is judged together with one."""
    return path.endswith(ACROSS) or any(p.endswith(ACROSS) for p in through)
