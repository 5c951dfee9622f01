"""A file written as a stream is what the library reads, whole or not there."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from refmoe.weights.writer import Spec, write_stream


def test_a_stream_is_what_the_library_reads(tmp_path):
    a, b = np.arange(10, dtype=np.int32), np.ones((3, 5), np.float32)
    specs = [Spec("a", "I32", (10,)), Spec("b", "F32", (3, 5))]
    write_stream(tmp_path / "x.safetensors", specs, [a[:4], a[4:], b])
    read = load_file(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(read["a"], a)
    np.testing.assert_array_equal(read["b"], b)
    with pytest.raises(ValueError, match="40 bytes came for tensors of 100"):
        write_stream(tmp_path / "y.safetensors", specs, [a])
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
