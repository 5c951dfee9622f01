"""Faults of layers and loading, and of the ends of the network: embedding and head."""

from dataclasses import replace

import numpy as np

from refmoe.model import matrix
from refmoe.model.cache import LatentCache
from refmoe.model.decoder import Decoder, LayerWeights
from refmoe.model.decoder import layer as run_layer
from refmoe.model.experts import MlpWeights
from refmoe.model.mla import Segment
from refmoe.oracle.faults.base import LAYER, ROUTED, Family, Here, changed, scaled, written
from refmoe.oracle.faults.common import experts

# --- what several of these faults use


LAYERS = Family("layers and loading")

LAYERS += written(
    "residual-attention-missing",
    "attention replaces the residual stream",
    {"#attn_residual": lambda x, here: here["self_attn"]},
)

LAYERS += written(
    "residual-mlp-missing",
    "the MLP replaces the residual stream",
    {"model.layers": lambda x, here: here["mlp"]},
)

LAYERS += written(
    "residual-attention-normed",
    "attention is added to the normed input",
    {"#attn_residual": lambda x, here: here["input_layernorm"] + here["self_attn"]},
)

LAYERS += written(
    "residual-mlp-normed",
    "the MLP is added to its normed input",
    {"model.layers": lambda x, here: here["post_attention_layernorm"] + here["mlp"]},
)

LAYERS += written(
    "residual-twice",
    "the residual stream is added twice",
    {"model.layers": lambda x, here: x + here["#attn_residual"]},
)

LAYERS += written(
    "layer-dropped",
    "a layer is dropped",
    {"model.layers": lambda x, here: here.x},
    "lablup/mlxcel#618",
)


def run_layer_again(x: np.ndarray, here: Here) -> np.ndarray:
    """Run the layer on its own output."""
    segment = Segment(slice(0, len(x)), LatentCache(here.cfg, here.nx.dtype))
    expert = here.decoder.experts[here.layer]
    return run_layer(x, here.w, expert, [segment], here.cfg, here.nx)


LAYERS += written("layer-twice", "a layer is run twice", {"model.layers": run_layer_again})


def with_previous_weights(decoder: Decoder, layer: int | None) -> Decoder:
    """Give a layer the weights of the layer before; the first has those of the second."""

    def other(i: int) -> int:
        return i - 1 if i else min(1, len(decoder.layers) - 1)

    def neighbour(i: int, w: LayerWeights) -> LayerWeights:
        its = decoder.layers[other(i)]
        return its if type(its.mlp) is type(w.mlp) else its._replace(mlp=w.mlp)

    def expert(d: Decoder, i: int, e: int) -> MlpWeights:
        return d.experts[other(i) if d.cfg.is_moe(other(i)) else i](e)

    layers = [neighbour(i, w) if layer in (None, i) else w for i, w in enumerate(decoder.layers)]
    return replace(experts(expert)(decoder, layer), layers=layers)


LAYERS += changed(
    "layer-of-neighbour",
    "a layer has the weights of the layer before it",
    "",
    LAYER,
    with_previous_weights,
)


def clip_to_float16(x: np.ndarray, here: Here) -> np.ndarray:
    """Clip to the largest float16."""
    return np.clip(x, -65504, 65504)


LAYERS += written(
    "float16-clip",
    "values beyond 65504 are clipped",
    dict.fromkeys(
        ("model.embed_tokens", "#attn_residual", "model.layers", ROUTED, ".mlp"), clip_to_float16
    ),
    "vllm-project/vllm#13232 ikawrakow/ik_llama.cpp#292 lablup/mlxcel#618",
    strength=None,
)


def make_last_token_nan(x: np.ndarray, here: Here) -> np.ndarray:
    """Replace the last row by NaN."""
    y = x.copy()
    y[-1] = np.nan
    return y


LAYERS += written(
    "not-finite",
    "the experts of a token give NaN",
    {ROUTED: make_last_token_nan},
    "vllm-project/vllm#42426 sgl-project/sglang#28378 sgl-project/sglang#15306",
    predicts=False,
    strength=None,
)


ENDS = Family("embedding and head")


def shift_embedding(decoder: Decoder, layer: int | None) -> Decoder:
    """Give each token the embedding of the next id."""
    shifted = (np.arange(decoder.cfg.vocab_size) + 1) % decoder.cfg.vocab_size
    return replace(decoder, embed_tokens=matrix.rows(decoder.embed_tokens, shifted))


ENDS += changed(
    "embedding-shifted",
    "each token has the embedding of the next id",
    "",
    ("model.embed_tokens",),
    shift_embedding,
)

ENDS += scaled(
    "embedding-scaled",
    "embeddings are multiplied by the root of hidden_size",
    "model.embed_tokens",
    "factor on the embeddings",
    lambda cfg: cfg.hidden_size**0.5,
)


def tie_head(decoder: Decoder, layer: int | None) -> Decoder:
    """Use the embedding as lm_head."""
    return replace(decoder, lm_head=decoder.embed_tokens)


ENDS += changed("head-tied", "the embedding takes the place of lm_head", "", ("lm_head",), tie_head)

ENDS += written(
    "logits-shifted",
    "each logit stands one id too far",
    {"lm_head": lambda x, here: np.roll(x, 1, axis=-1)},
)

ENDS += scaled(
    "logits-scaled",
    "logits are divided by the root of hidden_size",
    "lm_head",
    "factor on the logits",
    lambda cfg: cfg.hidden_size**-0.5,
)

ENDS += written(
    "logits-softcap",
    "logits are squashed by 30·tanh(x/30)",
    {"lm_head": lambda x, here: 30 * np.tanh(x / 30)},
)
