"""Generation with a tiny model: the definition's bits, and nothing to load or to compile."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

import refmoe
from refmoe.fast import threads
from refmoe.fast.tiny import with_tiny_operations
from refmoe.model.decoder import policy
from refmoe.run.generate import generation_decoder, prefill, step

PROMPT = [5, 9, 33, 100, 7, 61, 2, 400, 12]


@pytest.mark.parametrize("attention", ["expanded", "absorbed", "auto"])
@pytest.mark.parametrize("conventions", ["refmoe", "vllm"])
def test_tiny_operations_have_the_definitions_bits(attention, conventions):
    decoder = refmoe.load(reference=True).decoder
    nx = replace(policy("float32", conventions), attention=attention)
    pair = decoder.using(nx), decoder.using(with_tiny_operations(nx, keep=True))
    memory = [d.caches() for d in pair]
    with threads.single_blas_thread():
        a, b = (d.logits(PROMPT, m) for d, m in zip(pair, memory, strict=True))
        assert np.array_equal(a, b)
        for token in (3, 77, 1500):
            a, b = (d.logits([token], m) for d, m in zip(pair, memory, strict=True))
            assert np.array_equal(a, b)


def test_streamed_and_mapped_weights_give_the_same_bits(tiny_k2):
    model = refmoe.load(tiny_k2)
    streamed = refmoe.load(tiny_k2, ram=10_000_000)
    assert streamed.store is not None
    try:
        logits = []
        for decoder in (generation_decoder(model), generation_decoder(streamed)):
            memory = decoder.caches()
            prefill(decoder, PROMPT, memory)
            logits.append(step(decoder, 7, memory))
        assert np.array_equal(*logits)
    finally:
        streamed.store.close()


def test_a_tiny_model_speaks_without_kernels():
    code = (
        "import sys, refmoe\n"
        "text = ''.join(refmoe.generate(refmoe.load(), 'ROMEO:', max_new_tokens=4))\n"
        "assert text\n"
        "print([name for name in ('numba', 'llvmlite') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
