"""Sampling and generation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import refmoe
from refmoe.files import InputError
from refmoe.run.generate import generate_tokens, generation_decoder
from refmoe.run.sampler import Sampling, sample
from tests.networks import envelope, gamma

seeds = st.integers(0, 2**32 - 1)


@given(seeds, st.floats(0.1, 3), st.floats(0.05, 1), st.floats(0, 1))
def test_only_kept_tokens_are_drawn(seed, temperature, top_p, min_p):
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal(20) * 3
    p = np.exp(logits / temperature)
    p /= p.sum()
    order = np.argsort(-p)
    inside = [
        int(i)
        for n, i in enumerate(order)
        if n == 0 or (p[order[:n]].sum() < top_p + 1e-12 and p[i] >= min_p * p.max() - 1e-12)
    ]
    for _ in range(20):
        assert sample(logits, Sampling(temperature, top_p, min_p), rng) in inside


def test_draws_follow_the_distribution():
    """Chi-square over 5 tokens and 20,000 seeded draws; 23.5 is exceeded once in 10,000."""
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.06, 0.04])) * 2
    rng, n = np.random.default_rng(1), 20_000
    counts = np.bincount([sample(logits, Sampling(2.0), rng) for _ in range(n)], minlength=5)
    expected = n * np.array([0.4, 0.3, 0.2, 0.06, 0.04])
    assert ((counts - expected) ** 2 / expected).sum() < 23.5


def test_greedy_takes_the_lower_of_equals_and_draws_nothing():
    rng = np.random.default_rng(0)
    state = rng.bit_generator.state
    assert sample(np.array([1.0, 5.0, 5.0]), Sampling(), rng) == 1
    assert rng.bit_generator.state == state


@pytest.mark.parametrize(
    "bad", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"min_p": -0.1}]
)
def test_sampling_out_of_range_is_refused(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        Sampling(**bad)


def test_greedy_generation_is_the_argmax_of_the_whole_at_each_step(random_int4):
    """Over the cache, in chunks, absorbed where cheaper; against no cache at all, in float64."""
    model = refmoe.load(random_int4, "float64")
    prompt = [7, 70, 170, 270, 370, 1, 2]
    made = list(generate_tokens(generation_decoder(model), prompt, max_new_tokens=12, chunk=3))
    tokens = list(prompt)
    for token in made:
        assert int(model.logits(tokens)[-1].argmax()) == token
        tokens.append(token)
    assert len(made) == 12


def test_the_same_seed_gives_the_same_text(random_bf16):
    model = refmoe.load(random_bf16)
    how = {"max_new_tokens": 15, "temperature": 1.0}
    one, two, three = ("".join(refmoe.generate(model, "abc", seed=s, **how)) for s in (1, 1, 2))
    assert one == two != three


def test_generation_stops_at_a_stop_id_of_any_file(random_bf16):
    model = refmoe.load(random_bf16)
    ranks = model.tokenizer.size - 256
    assert {ranks + 1, ranks + 2} <= model.stop_ids
    free = list(generate_tokens(model.decoder, [1, 2, 3], max_new_tokens=10))
    stop = free[4]
    first = free.index(stop)
    assert (
        list(generate_tokens(model.decoder, [1, 2, 3], max_new_tokens=10, stop={stop}))
        == free[:first]
    )


def test_generation_ends_with_the_context(random_bf16):
    model = refmoe.load(random_bf16)
    context = model.cfg.max_position_embeddings
    prompt = [i % 500 for i in range(context - 3)]
    assert (
        len(list(generate_tokens(model.decoder, prompt))) == 4
    )  # the last needs no place of its own
    with pytest.raises(InputError, match="max_position_embeddings"):
        list(generate_tokens(model.decoder, [1] * (context + 1)))


def test_nothing_is_asked_for_nothing_is_made(random_bf16):
    model = refmoe.load(random_bf16)
    assert list(generate_tokens(model.decoder, [1], max_new_tokens=0)) == []
    with pytest.raises(InputError, match="empty"):
        list(refmoe.generate(model, ""))


def test_the_engine_and_the_definition_agree(random_int4):
    """fast/'s seams against model/'s, in the same precision: by rounding only."""
    tokens = [1, 20, 300, 4, 50]
    ours = refmoe.load(random_int4, "float64").logits(tokens)
    definition = refmoe.load(random_int4, "float64", reference=True).logits(tokens)
    bound = envelope(refmoe.load(random_int4, "float64", reference=True).decoder, tokens)
    assert np.abs(ours - definition).max() <= bound


def test_linear_in_tiles_is_linear(monkeypatch):
    from refmoe.fast import linear as fast
    from refmoe.fast import reproducible
    from refmoe.model import matrix
    from refmoe.model.formats.bf16 import BF16
    from refmoe.model.formats.int4 import Int4
    from refmoe.model.matrix import bf16_bits
    from refmoe.weights.synthetic.random import pack_int4

    monkeypatch.setattr(reproducible, "TILE", 200)  # several tiles, the last one short
    rng = np.random.default_rng(0)
    w = rng.standard_normal((23, 64))
    for m in (BF16(bf16_bits(w)), Int4(*pack_int4(w)), w.astype(np.float16), w.astype(np.float32)):
        x = rng.standard_normal((3, 64)).astype(np.float32)
        size = np.abs(x).astype(np.float64) @ np.abs(matrix.dequantize(m, np.float64)).T
        exact = x.astype(np.float64) @ matrix.dequantize(m, np.float64).T
        for got in (fast.linear(x, m), reproducible.linear(x, m), matrix.linear(x, m)):
            assert (np.abs(got - exact) <= gamma(65, np.float32) * size).all()
