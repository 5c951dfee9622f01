"""`load`: a folder → a `Model` that computes logits and knows its own words."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from refmoe.config import Config
from refmoe.engines import Conventions
from refmoe.files import InputError, read_object
from refmoe.model.decoder import Decoder, policy
from refmoe.model.numerics import Numerics
from refmoe.text.tokenizer import Tokenizer
from refmoe.weights.checkpoint import Checkpoint
from refmoe.weights.dense import checkpoint_q8, dense_q8
from refmoe.weights.gguf import Gguf, opened
from refmoe.weights.placement import parts_of
from refmoe.weights.streaming.store import Store, store
from refmoe.weights.streaming.usage import usage

if TYPE_CHECKING:
    from refmoe.fast.gpu.card import Card
    from refmoe.fast.gpu.placement import Request
    from refmoe.text.chat import ChatTemplate

DENSE = ("exact", "q8")
PACKAGE = Path(__file__).resolve().parents[1]


def golden_folder() -> Path:
    """`golden/`: inside the installed package, or beside it in a working tree."""
    inside = PACKAGE / "golden"
    return inside if inside.is_dir() else PACKAGE.parent / "golden"


@dataclass(frozen=True)
class Model:
    """A checkpoint, and the decoder over its mapped weights."""

    checkpoint: Checkpoint
    decoder: Decoder
    reference: bool = False  # the definition in model/ alone
    store: Store | None = None  # where weights are read under a budget
    card: "Card | None" = None  # where a part of it lives

    @property
    def cfg(self) -> Config:
        return self.decoder.cfg

    @property
    def nx(self) -> Numerics:
        return self.decoder.nx

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Read when text is first needed: a checkpoint without a vocabulary still computes."""
        if isinstance(self.checkpoint, Gguf):
            return Tokenizer.from_gguf(self.checkpoint.metadata)
        return Tokenizer.load(self.checkpoint.path)

    @property
    def template(self) -> "ChatTemplate":
        """The checkpoint's own."""
        from refmoe.text.chat import ChatTemplate  # Jinja, which few verbs need

        if isinstance(self.checkpoint, Gguf):
            return ChatTemplate.from_gguf(self.checkpoint.metadata)
        return ChatTemplate.load(self.checkpoint.path)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Every id that some file of the checkpoint calls an end."""
        own = (*self.cfg.eos_token_id, *self.checkpoint.generation_eos)
        words = self.tokenizer.stop_ids if self.checkpoint.has_words else ()
        return frozenset(own + words)

    @cached_property
    def bos(self) -> int | None:
        """The id that llama.cpp puts before a text, where the vocabulary asks for it; K2's do not.

        `add_bos_token` of tokenizer_config.json, or of a GGUF's metadata, whose default id is 11
        (ggml-org/llama.cpp src/llama-vocab.cpp, `special_bos_id` of a BPE vocabulary).
        """
        if isinstance(self.checkpoint, Gguf):
            metadata = self.checkpoint.metadata
            if metadata.get("tokenizer.ggml.add_bos_token") is not True:
                return None
            number = metadata.get("tokenizer.ggml.bos_token_id", 11)
            if not isinstance(number, int) or not 0 <= number < self.cfg.vocab_size:
                raise InputError(f"tokenizer.ggml.bos_token_id = {number!r} is no token")
            return number
        file = self.checkpoint.path / "tokenizer_config.json"
        raw = read_object(file) if file.is_file() else {}
        if raw.get("add_bos_token") is not True:
            return None
        name = raw.get("bos_token")
        name = name.get("content") if isinstance(name, dict) else name
        if name not in self.tokenizer.special:
            raise InputError(f"{file}: add_bos_token is true, bos_token {name!r} is no token")
        return self.tokenizer.special[name]

    def using(self, nx: Numerics) -> "Model":
        """The same weights under other numerics; nothing is opened again."""
        return replace(self, decoder=self.decoder.using(nx))

    def logits(self, tokens: Any) -> np.ndarray:
        """tokens: T ids → [T, Z] in nx.dtype."""
        return self.decoder.logits(tokens)


def load(
    path: str | Path | None = None,
    numerics: str = "float32",
    reference: bool = False,
    conventions: Conventions | str = "refmoe",
    dense: str = "exact",
    ram: int | None = None,
    reads: str | None = None,
    gpu: "Request | None" = None,
) -> Model:
    """Open a checkpoint's folder or a GGUF; without a path the embedded tiny-k2.

    numerics     float64 (the truth), float32 (working), bfloat16, float16 (emulated)
    reference    True: the definition in `model/` alone; False: with the quicker seams of `fast/`
    conventions  whose sides to take where engines differ: refmoe, moonshot, transformers, vllm,
                 sglang, llama.cpp, mlx
    dense        exact: as stored; q8: attention, shared experts, dense MLP and head in 8 bits
    ram          bytes that weights may take; None: all mapped, the system keeps what it likes
    reads        under a budget: direct or cached (by the system); None: whichever is quicker
    gpu          what every token uses on a CUDA card, as much as its budget holds

    Raises `InputError` for whatever does not fit: config, names, shapes, dtypes, missing tensors.
    """
    if gpu is not None:
        from refmoe.fast.gpu.device import open_device
        from refmoe.fast.gpu.placement import most_used_experts, plan_gpu, upload

        if numerics != "float32" or reference:
            what = "reference" if reference else numerics
            raise InputError(f"--gpu computes in float32 with its own kernels, not {what}")
        device = open_device()
    if reference:
        nx = policy(numerics, conventions)
    else:
        from refmoe.fast.engine import engine  # Numba: half a second that few verbs need

        nx = engine(numerics, conventions)
    checkpoint = opened(golden_folder() / "tiny-k2" if path is None else path)
    if dense not in DENSE:
        raise InputError(f"dense {dense!r}; supported: {', '.join(DENSE)}")
    if ram is not None and dense == "q8":
        checkpoint = checkpoint_q8(checkpoint, nx)
    if gpu is not None:
        parts = parts_of(checkpoint, dense)
        found = plan_gpu(checkpoint.cfg, parts, gpu, device)
    streamed = store(checkpoint, ram, reads)
    if streamed is not None:
        decoder = streamed.decoder(nx)
    else:
        decoder = checkpoint.decoder(nx)
        decoder = dense_q8(checkpoint, decoder) if dense == "q8" and ram is None else decoder
    if gpu is None:
        return Model(checkpoint, decoder, reference, streamed)
    own = most_used_experts(usage(checkpoint), parts, found.share.experts)
    decoder = upload(decoder, found, own, conventions)
    return Model(checkpoint, decoder, reference, streamed, found.card)
