"""Remember how often each expert was used in earlier runs."""

import os
from pathlib import Path

import numpy as np

from refmoe.weights.checkpoint import Checkpoint


def usage_file(checkpoint: Checkpoint) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "refmoe" / "usage" / f"{checkpoint.identity}.npy"


def usage(checkpoint: Checkpoint) -> np.ndarray | None:
    """How much experts were used in earlier runs under a budget, [layers, experts] float32."""
    try:
        use: np.ndarray = np.load(usage_file(checkpoint), allow_pickle=False)
    except (OSError, ValueError, EOFError):  # none yet, or damaged: it only saves reads
        return None
    cfg = checkpoint.cfg
    right = use.shape == (cfg.num_hidden_layers, cfg.n_routed_experts) and use.dtype == np.float32
    return use if right and np.isfinite(use).all() else None
