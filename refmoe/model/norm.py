"""RMSNorm: each row to unit root mean square, then a gain per channel.

    y = w · x / sqrt(mean(x²) + eps)                                          [T, D]

Source: Zhang and Sennrich, arXiv:1910.07467, eq. 4. Checkpoint: `*_layernorm.weight`,
`model.norm.weight`. `eps` is `rms_norm_eps`, but for the two norms inside attention see mla.py.
"""

import numpy as np

from refmoe.model.matrix import Matrix, array_module, dequantize


def rms_norm(x: np.ndarray, w: Matrix, eps: float) -> np.ndarray:
    """Return w · x / sqrt(mean(x²) + eps): x [T, D], w [D] → [T, D], in x's own precision."""
    xp = array_module(x)
    mean = (x * x).mean(axis=-1, keepdims=True)  # [T, 1]
    gain = dequantize(w, x.dtype)  # [D]
    return x / xp.sqrt(mean + x.dtype.type(eps)) * gain
