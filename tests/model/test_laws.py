"""Laws of the whole network, in float64, within the envelope its own rounding explains."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from refmoe.files import InputError
from refmoe.model import experts
from refmoe.model.decoder import Decoder, policy
from refmoe.model.numerics import NonFinite
from refmoe.oracle.trace import Recorder
from tests.networks import envelope, network, row_by_row

seeds = st.integers(0, 2**32 - 1)
prompts = st.lists(st.integers(0, 60), min_size=2, max_size=24)
shapes = st.sampled_from(
    [
        {},
        {"q_lora_rank": None, "n_shared_experts": 2},
        {"n_group": 4, "topk_group": 2},
        {"rope_scaling": None, "n_shared_experts": 0},
    ]
)


def far_from_a_flip(decoder: Decoder, tokens: list[int]) -> bool:
    """A choice nearer to a tie than 1e-9 may fall either way; then the law says nothing."""
    margins = []
    original = experts.route

    def spy(*args):  # type: ignore[no-untyped-def]
        routing = original(*args)
        margins.append(min(routing.margin.min(), routing.group_margin.min()))
        return routing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts, "route", spy)
        decoder.logits(tokens)
    return min(margins) > 1e-9


@given(seeds, prompts, shapes)
def test_absorbed_equals_expanded(seed, tokens, shape):
    decoder = network(seed, **shape)
    assume(far_from_a_flip(decoder, tokens))
    absorbed = decoder.using(replace(decoder.nx, attention="absorbed"))
    difference = np.abs(absorbed.logits(tokens) - decoder.logits(tokens)).max()
    assert difference <= envelope(decoder, tokens)


@given(seeds, prompts, shapes, st.sampled_from(["expanded", "absorbed", "auto"]), st.data())
def test_chunks_over_a_cache_equal_the_whole(seed, tokens, shape, form, data):
    decoder = network(seed, **shape)
    assume(far_from_a_flip(decoder, tokens))
    formed = decoder.using(replace(decoder.nx, attention=form))
    memory, parts, start = formed.caches(), [], 0
    while start < len(tokens):
        size = data.draw(st.integers(1, len(tokens) - start))
        parts.append(formed.logits(tokens[start : start + size], memory))
        start += size
    assert [m.length for m in memory] == [len(tokens)] * decoder.cfg.num_hidden_layers
    difference = np.abs(np.concatenate(parts) - decoder.logits(tokens)).max()
    assert difference <= envelope(decoder, tokens)


@given(seeds, prompts, shapes)
def test_one_token_at_a_time_equals_all_at_once(seed, tokens, shape):
    decoder = network(seed, **shape)
    assume(far_from_a_flip(decoder, tokens))
    memory = decoder.caches()
    one_by_one = np.concatenate([decoder.logits([t], memory) for t in tokens])
    assert np.abs(one_by_one - decoder.logits(tokens)).max() <= envelope(decoder, tokens)


@given(seeds, st.lists(prompts, min_size=2, max_size=3), shapes)
def test_segments_equal_separate_runs(seed, several, shape):
    decoder = network(seed, **shape)
    assume(all(far_from_a_flip(decoder, tokens) for tokens in several))
    together = decoder.head(decoder.hidden(several, [decoder.caches() for _ in several]))
    start = 0
    for tokens in several:
        part = together[start : start + len(tokens)]
        assert np.abs(part - decoder.logits(tokens)).max() <= envelope(decoder, tokens)
        start += len(tokens)


@given(seeds, prompts, shapes, st.data())
def test_the_future_does_not_matter(seed, tokens, shape, data):
    decoder = network(seed, row_by_row(policy("float64")), **shape)
    keep = data.draw(st.integers(1, len(tokens) - 1))
    other = tokens[:keep] + [(t + 1) % 61 for t in tokens[keep:]]
    assume(far_from_a_flip(decoder, tokens))
    mine, theirs = decoder.logits(tokens), decoder.logits(other)
    # the shapes are the same and rows are multiplied alone: not one bit of the past changes
    np.testing.assert_array_equal(mine[:keep], theirs[:keep])
    assert (mine[keep:] != theirs[keep:]).any(axis=1).all()


def test_float64_means_float64_everywhere():
    decoder = network(3, n_group=4, topk_group=2)
    recorder = Recorder()
    decoder.using(decoder.nx.watching(recorder)).logits([1, 2, 3])
    kinds = {p: x.dtype for p, x in recorder.seen.items() if x.dtype.kind == "f"}
    assert kinds
    assert set(kinds.values()) == {np.dtype(np.float64)}


def test_a_constant_shift_of_all_positions_changes_only_rounding():
    """Nothing but the difference of positions enters: a window moved by a cached prefix of
    another prompt's length would differ, a window at other absolute positions does not."""
    decoder = network(5, rope_scaling=None)
    tokens = [3, 1, 4, 1, 5]
    shifted = decoder.caches()
    for cache in shifted:
        # 40 keys so negative that no query looks at them leave only their positions behind
        cache.append(np.zeros((40, decoder.cfg.kv_lora_rank)), np.zeros((40, 4)))

    def blind(path, x):
        if path.endswith("#scores"):
            x = x.copy()
            x[..., :40] = -1e30
        return x

    moved = decoder.using(decoder.nx.watching(blind)).logits(tokens, shifted)
    difference = np.abs(moved - decoder.logits(tokens)).max()
    assert difference <= 50 * envelope(decoder, tokens)  # angles are 50 times larger, and err so


@pytest.mark.parametrize(
    ("tokens", "says"),
    [([], "empty"), ([61], "vocabulary"), ([-1], "vocabulary"), ([1] * 129, "max_position")],
)
def test_bad_tokens_are_refused(tokens, says):
    with pytest.raises(InputError, match=says):
        network(0).logits(tokens)


def test_a_failed_step_leaves_no_rows_behind():
    decoder = network(1)
    memory = decoder.caches()
    decoder.logits([1, 2], memory)

    def fail(path, x):
        if path == "model.layers.1.mlp":
            raise KeyboardInterrupt
        return x

    with pytest.raises(KeyboardInterrupt):
        decoder.using(decoder.nx.watching(fail)).logits([3], memory)
    assert [m.length for m in memory] == [2, 2]
    np.testing.assert_array_equal(decoder.logits([4], memory), _fresh(decoder, [1, 2], [4]))


def _fresh(decoder: Decoder, before: list[int], then: list[int]) -> np.ndarray:
    memory = decoder.caches()
    decoder.logits(before, memory)
    return decoder.logits(then, memory)


def test_the_first_nonfinite_point_is_named():
    decoder = network(2, nx=policy("float32"))

    def spoil(path, x):
        if path == "model.layers.1.self_attn.q_a_proj":
            x = x.copy()
            x[1, 0] = np.inf
        return x

    with pytest.raises(NonFinite, match=r"layers\.1\.self_attn\.q_a_layernorm.*row 1"):
        decoder.using(decoder.nx.watching(spoil)).logits([1, 2])
