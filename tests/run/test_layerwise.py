"""The layer-first schedule: the decoder's bits, each weight once, no expert that no row chose."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

import refmoe
from refmoe.run.layerwise import MemoryGroup, run_layer

PROMPTS = [[5, 17, 30, 44], [9], [7, 12, 8, 41, 22, 3]]


class Counted(Sequence):
    """Layers, or their experts, that count how often each is asked for."""

    def __init__(self, inner):
        self.inner, self.asked = inner, []

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, i):
        self.asked.append(i)
        return self.inner[i]


class CountedExperts:
    """One layer's experts, one of which at a time is lent."""

    streamed = True

    def __init__(self, inner):
        self.inner, self.asked = inner, []

    def __call__(self, e):
        raise AssertionError("experts are asked for in batches")

    def batches(self, chosen, x):
        assert len(x) == 0  # nothing to guess from
        for e in chosen:
            self.asked.append(e)
            yield {e: self.inner(e)}


def through(decoder, groups):
    for i in range(decoder.cfg.num_hidden_layers):
        run_layer(i, decoder, groups)


@pytest.mark.parametrize("numerics", ["float32", "bfloat16"])
def test_rows_in_memory_are_what_the_decoder_computes(random_int4, numerics):
    decoder = refmoe.load(random_int4, numerics, reference=True).decoder
    group = MemoryGroup(decoder, PROMPTS)
    through(decoder, [group])
    wanted = decoder.hidden(PROMPTS, [decoder.caches() for _ in PROMPTS])
    assert np.array_equal(group.x, wanted)


def test_each_weight_is_asked_for_once_and_no_expert_that_nobody_chose(random_bf16):
    plain = refmoe.load(random_bf16, reference=True).decoder
    layers, experts = Counted(plain.layers), [CountedExperts(e) for e in plain.experts]
    decoder = replace(plain, layers=layers, experts=experts)
    groups = [MemoryGroup(decoder, [[5]]), MemoryGroup(decoder, [[9]])]
    chosen = []
    for i in range(decoder.cfg.num_hidden_layers):
        run_layer(i, decoder, groups)
        here = [g.routing.experts for g in groups if g.routing is not None]
        chosen.append(sorted(set().union(*(e.ravel().tolist() for e in here))))
    assert layers.asked == list(range(decoder.cfg.num_hidden_layers))
    assert [e.asked for e in experts] == chosen
    assert 0 < len(chosen[-1]) < decoder.cfg.n_routed_experts


def test_a_group_computes_beside_others_what_it_computes_alone(random_bf16):
    decoder = refmoe.load(random_bf16, reference=True).decoder
    together = [MemoryGroup(decoder, PROMPTS[:1]), MemoryGroup(decoder, PROMPTS[1:])]
    through(decoder, together)
    for group, prompts in zip(together, (PROMPTS[:1], PROMPTS[1:]), strict=True):
        alone = MemoryGroup(decoder, prompts)
        through(decoder, [alone])
        assert np.array_equal(group.x, alone.x)
