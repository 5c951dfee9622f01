"""Remember how often each expert was used in earlier runs."""

from pathlib import Path

import numpy as np

from refmoe.files import cache_folder
from refmoe.weights.checkpoint import Checkpoint


def usage_file(checkpoint: Checkpoint) -> Path:
    """Return the file in which a checkpoint's usage of experts is kept."""
    return cache_folder("usage") / f"{checkpoint.identity}.npy"


def read_usage(checkpoint: Checkpoint) -> np.ndarray | None:
    """Return how much experts were used in earlier runs under a budget, [layers, experts] float32.

    None if no run kept it, or if the file is damaged.
    """
    try:
        use: np.ndarray = np.load(usage_file(checkpoint), allow_pickle=False)
    except (OSError, ValueError, EOFError):  # none yet, or damaged: it only saves reads
        return None
    cfg = checkpoint.cfg
    right = use.shape == (cfg.num_hidden_layers, cfg.n_routed_experts) and use.dtype == np.float32
    return use if right and np.isfinite(use).all() else None
