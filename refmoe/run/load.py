"""Load a model: from a folder or a GGUF to a `Model` that computes logits and knows its words."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from refmoe.config import Config
from refmoe.engines import Conventions
from refmoe.fast.reproducible import reproducible_policy
from refmoe.fast.threads import single_blas_thread
from refmoe.files import InputError, read_object
from refmoe.model.decoder import Decoder
from refmoe.model.numerics import Numerics
from refmoe.text.tokenizer import Tokenizer
from refmoe.weights.checkpoint import Checkpoint
from refmoe.weights.gguf import Gguf
from refmoe.weights.open import open_checkpoint

if TYPE_CHECKING:
    from refmoe.fast.gpu.card import Card
    from refmoe.fast.gpu.device import Device
    from refmoe.fast.gpu.placement import Request
    from refmoe.text.template import ChatTemplate
    from refmoe.weights.streaming.store import Store

DENSE = ("exact", "q8")  # how what every token uses is held
LLAMACPP_BOS = 11  # llama.cpp's default, where a GGUF asks for a BOS and names none
PACKAGE = Path(__file__).resolve().parents[1]


def golden_folder() -> Path:
    """Return `golden/`: inside the installed package, or beside it in a working tree."""
    inside = PACKAGE / "golden"
    return inside if inside.is_dir() else PACKAGE.parent / "golden"


@dataclass(frozen=True)
class Model:
    """A checkpoint, and the decoder over its weights; `load` makes one."""

    checkpoint: Checkpoint
    decoder: Decoder
    reference: bool = False  # computed by the definition in model/ alone
    store: "Store | None" = None  # reads the weights under a budget of memory
    card: "Card | None" = None  # the CUDA card that a part of the weights lives on

    @property
    def cfg(self) -> Config:
        """The config of the network."""
        return self.decoder.cfg

    @property
    def nx(self) -> Numerics:
        """The numerics that it computes in."""
        return self.decoder.nx

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's vocabulary, read when text is first needed.

        A checkpoint without one still computes. Raises `InputError` if it is missing or damaged.
        """
        if isinstance(self.checkpoint, Gguf):
            return Tokenizer.from_gguf(self.checkpoint.metadata)
        return Tokenizer.load(self.checkpoint.path)

    @property
    def template(self) -> "ChatTemplate":
        """The checkpoint's own chat template. Raises `InputError` if it has none."""
        from refmoe.text.template import ChatTemplate

        if isinstance(self.checkpoint, Gguf):
            return ChatTemplate.from_gguf(self.checkpoint.metadata)
        return ChatTemplate.load(self.checkpoint.path)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Every token id that some file of the checkpoint calls an end."""
        own = (*self.cfg.eos_token_id, *self.checkpoint.generation_eos)
        words = self.tokenizer.stop_ids if self.checkpoint.has_words else ()
        return frozenset(own + words)

    @cached_property
    def bos(self) -> int | None:
        """The token id that llama.cpp puts before a text, or None; K2's vocabularies ask for none.

        A vocabulary asks for it by `add_bos_token`, in tokenizer_config.json or a GGUF's metadata.
        Raises `InputError` where it then names no token. Source: ggml-org/llama.cpp,
        src/llama-vocab.cpp (`special_bos_id` of a BPE vocabulary).
        """
        if isinstance(self.checkpoint, Gguf):
            metadata = self.checkpoint.metadata
            if metadata.get("tokenizer.ggml.add_bos_token") is not True:
                return None
            number = metadata.get("tokenizer.ggml.bos_token_id", LLAMACPP_BOS)
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
        """Return the model with other numerics over the same weights; nothing is opened again."""
        return replace(self, decoder=self.decoder.using(nx))

    def logits(self, tokens: Any) -> np.ndarray:
        """Return the logits [T, Z] of T token ids, in the numerics' dtype.

        Raises `InputError` for an empty list, ids outside the vocabulary, or more than the context.
        """
        with single_blas_thread():
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
    reference    True: the definition in `model/` alone; False: with the quicker twins of `fast/`
    conventions  whose choices to follow where correct engines differ: refmoe, moonshot,
                 transformers, vllm, sglang, llama.cpp, mlx
    dense        exact: as stored; q8: attention, shared experts, dense MLP and head in 8 bits
    ram          bytes that weights may take; None: all mapped, the system keeps what it likes
    reads        with `ram`: direct or cached (by the system); None: whichever is quicker
    gpu          what goes onto a CUDA card: as much of what every token uses as its budget holds

    Raises `InputError` for whatever does not fit: config, names, shapes, dtypes, missing tensors.
    """
    device = None if gpu is None else _open_device(numerics, reference)
    nx = choose_numerics(numerics, conventions, reference)
    checkpoint = open_checkpoint(golden_folder() / "tiny-k2" if path is None else path)
    if dense not in DENSE:
        raise InputError(f"dense {dense!r}; supported: {', '.join(DENSE)}")
    if ram is not None and dense == "q8":
        from refmoe.weights.dense import checkpoint_q8

        checkpoint = checkpoint_q8(checkpoint, nx)  # what streams is read from a file
    if gpu is None or device is None:
        decoder, store = _place_in_memory(checkpoint, nx, dense, ram, reads)
        return Model(checkpoint, decoder, reference, store)
    from refmoe.fast.gpu.placement import most_used_experts, plan_gpu, upload
    from refmoe.weights.placement import count_parts
    from refmoe.weights.streaming.usage import read_usage

    parts = count_parts(checkpoint, dense)
    plan = plan_gpu(checkpoint.cfg, parts, gpu, device)  # refuses before anything is read
    decoder, store = _place_in_memory(checkpoint, nx, dense, ram, reads)
    experts = most_used_experts(read_usage(checkpoint), parts, plan.share.experts)
    decoder = upload(decoder, plan, experts, conventions)
    return Model(checkpoint, decoder, reference, store, plan.card)


def choose_numerics(name: str, conventions: Conventions | str, reference: bool) -> Numerics:
    """Return the definition's numerics, or those with the quicker twins of `fast/`.

    Raises `InputError` for an unknown name of numerics or conventions.
    """
    if reference:
        return reproducible_policy(name, conventions)
    from refmoe.fast.engine import engine

    return engine(name, conventions)


def _open_device(numerics: str, reference: bool) -> "Device":
    """Open the CUDA card; `InputError` if there is none, or if it cannot compute as asked."""
    from refmoe.fast.gpu.device import open_device

    if numerics != "float32" or reference:
        what = "reference" if reference else numerics
        raise InputError(f"--gpu computes in float32 with its own kernels, not {what}")
    return open_device()


def _place_in_memory(
    checkpoint: Checkpoint, nx: Numerics, dense: str, ram: int | None, reads: str | None
) -> "tuple[Decoder, Store | None]":
    """Map the weights, or stream them within `ram` bytes where they take more → decoder, store."""
    if ram is not None:
        from refmoe.weights.streaming.store import open_store

        store = open_store(checkpoint, ram, reads)
        if store is not None:
            return store.decoder(nx), store
    decoder = checkpoint.decoder(nx)
    if dense == "q8" and ram is None:
        from refmoe.weights.dense import dense_q8

        decoder = dense_q8(checkpoint, decoder)
    return decoder, None
