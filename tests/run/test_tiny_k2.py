"""tiny-k2 is a real K2: trained, every expert in use, its router bias at work."""

import json

import numpy as np
import pytest

import refmoe
from refmoe.model.decoder import policy
from refmoe.model.matrix import dequantize
from refmoe.model.router import route
from refmoe.run.load import golden_folder
from refmoe.weights.checkpoint import Checkpoint

PASSAGE = """O, she doth teach the torches to burn bright!
It seems she hangs upon the cheek of night
Like a rich jewel in an Ethiope's ear;
Beauty too rich for use, for earth too dear!
So shows a snowy dove trooping with crows,
As yonder lady o'er her fellows shows.
The measure done, I'll watch her place of stand,
And, touching hers, make blessed my rude hand.
Did my heart love till now? forswear it, sight!
For I ne'er saw true beauty till this night.

TYBALT:
This, by his voice, should be a Montague.
Fetch me my rapier, boy. What dares the slave
Come hither, cover'd with an antic face,
To fleer and scorn at our solemnity?
Now, by the stock and honour of my kin,
To strike him dead, I hold it not a sin.
"""
MODEL = refmoe.load(numerics="float64")
TOKENS = MODEL.tokenizer.encode(PASSAGE)
SEEN = refmoe.trace(MODEL, TOKENS, ["lm_head", "*.post_attention_layernorm", "*.mlp.gate#experts"])
MIXTURES = [i for i in range(MODEL.cfg.num_hidden_layers) if MODEL.cfg.is_moe(i)]


def test_the_shape_is_the_one_that_real_engines_hard_code():
    cfg = MODEL.cfg
    heads = (cfg.kv_lora_rank, cfg.qk_rope_head_dim, cfg.qk_nope_head_dim, cfg.v_head_dim)
    assert heads == (512, 64, 128, 128)
    assert cfg.vocab_size == MODEL.tokenizer.size == 2304
    files = sorted(p.name for p in (golden_folder() / "tiny-k2").glob("*.safetensors"))
    assert files == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    formats = {t.dtype for t in MODEL.checkpoint.tensors.values()}
    assert formats == {"BF16", "I32", "F32"}


@pytest.mark.parametrize("layer", MIXTURES)
def test_all_experts_are_used(layer):
    chosen = np.unique(SEEN[f"model.layers.{layer}.mlp.gate#experts"])
    assert len(chosen) == MODEL.cfg.n_routed_experts


@pytest.mark.parametrize("layer", MIXTURES)
def test_the_router_bias_changes_choices(layer):
    gate = MODEL.decoder.layers[layer].mlp.gate
    x = SEEN[f"model.layers.{layer}.post_attention_layernorm"]
    bias = dequantize(gate.e_score_correction_bias, np.float64)
    with_bias = route(x, gate, MODEL.cfg, policy("float64")).experts
    without = route(
        x, gate._replace(e_score_correction_bias=0 * bias), MODEL.cfg, policy("float64")
    ).experts
    assert np.abs(bias).max() > 0.01
    changed = (np.sort(with_bias) != np.sort(without)).any(axis=1)
    assert changed.mean() > 0.1


def test_it_has_learnt_the_text():
    """Far better than the best guess without context, on a passage of the language it learnt."""
    logits = SEEN["lm_head"][:-1]
    logits = logits - logits.max(axis=1, keepdims=True)
    nats = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(TOKENS) - 1), TOKENS[1:]]
    counts = np.bincount(TOKENS, minlength=MODEL.cfg.vocab_size)[TOKENS[1:]]
    assert nats.mean() < -np.log(counts / len(TOKENS)).mean()


def test_the_training_report_holds():
    report = json.loads((golden_folder() / "tiny-k2" / "training.json").read_text())
    held_out = report["held_out_packed"]
    assert held_out < report["held_out_bigram"] - 0.2
    assert report["held_out_bigram"] < report["held_out_unigram"]
    assert abs(held_out - report["held_out_fake_quantised"]) < 1e-3


def test_every_code_and_scale_is_one_the_quantiser_makes():
    """scale = max|w|/7 in bf16: some code of each group is ±7, or 8 by the scale's rounding."""
    checkpoint = Checkpoint.open(golden_folder() / "tiny-k2")
    for e in range(checkpoint.cfg.n_routed_experts):
        for m in checkpoint.expert(2, e):
            two = m.packed.view(np.uint8)
            q = np.stack((two & 15, two >> 4), axis=-1).reshape(*m.scale.shape, 32).astype(int) - 8
            assert set(np.unique(np.abs(q).max(axis=-1))) <= {7, 8}
