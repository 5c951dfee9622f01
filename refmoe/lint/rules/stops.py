"""Judge the ids that end a turn, and other special tokens."""

from collections.abc import Iterator

from refmoe.lint.base import Found
from refmoe.lint.facts.settings import Stops, Vocabulary
from refmoe.lint.registry import rule

IM_END = "<|im_end|>"  # ends a turn in every K2 template


@rule(
    "warning",
    example="eos_token_id differs: config.json [163585], generation_config.json [163586]",
    reference="moonshotai/Kimi-K2-Instruct config.json, generation_config.json",
)
def stop_differs(s: Stops) -> Iterator[Found]:
    """The files of a folder name different ids that end a turn.

    Engines read one or the other. K2-Instruct was published so: an engine that reads only its
    config.json never stops at the end of a turn.
    """
    if len({frozenset(ids) for ids in s.stated.values()}) > 1:
        each = ", ".join(f"{where} {list(ids)}" for where, ids in s.stated.items())
        text = f"eos_token_id differs: {each}; an engine that reads one of them may never stop"
        yield Found(f"{text} (K2-Instruct was published so)")


@rule(
    "warning",
    example="<|im_end|> is 163586 and in no eos_token_id ([163585]): turns do not end",
    reference="ggml-org/llama.cpp#15051, ggml-org/llama.cpp#21063",
)
def stop_im_end(s: Stops) -> Iterator[Found]:
    """The token that ends every turn in K2's templates is not among the ids that stop.

    Engines that stop at eos_token_id alone run on into a next turn. llama.cpp ends a turn at the
    token of this name, so the rule does not apply to GGUFs.
    """
    end = s.named.get(IM_END)
    if end is not None and end not in s.ids:
        text = f"{IM_END} is {end} and in no eos_token_id ({sorted(s.ids)}): turns do not end"
        yield Found(f"{text} in engines that stop at those alone")


@rule("error", example="eos_token_id 163845 is outside the vocabulary of 163840")
def stop_outside(s: Stops) -> Iterator[Found]:
    """An id that ends a turn is no row of the embedding.

    It can never be generated, so nothing stops there.
    """
    if s.vocab_size is not None:
        for i in sorted(i for i in s.ids if i >= s.vocab_size):
            yield Found(f"eos_token_id {i} is outside the vocabulary of {s.vocab_size}")


@rule("error", example="eos_token_id = '[EOS]', expected a whole number from 0 to 2^31")
def stop_invalid(s: Stops) -> Iterator[Found]:
    """An eos_token_id is not an id, nor a list of ids.

    Engines refuse the file, or go on without an end of turns.
    """
    for problem in s.invalid:
        yield Found(problem)


@rule(
    "warning",
    example="special token <|extra|> has id 163841, vocab_size is 163840",
    reference="moonshotai/Kimi-K2-Instruct tokenization_kimi.py",
)
def vocab_outside(s: Stops) -> Iterator[Found]:
    """A special token of tokenizer_config.json has an id beyond the embedding.

    K2's first tokenization_kimi.py reserved 258 ids for 256 rows. A prompt with such a token
    reads outside the embedding.
    """
    for name, i in s.named.items():
        if s.vocab_size is not None and i >= s.vocab_size:
            yield Found(f"special token {name} has id {i}, vocab_size is {s.vocab_size}")


@rule(
    "error",
    example="tokenizer.ggml.tokens are 163837, vocab_size is 163840: llama.cpp takes the first "
    "for the second",
)
def gguf_vocabulary_size(v: Vocabulary) -> Iterator[Found]:
    """The GGUF has more or fewer tokens than the embedding has rows.

    llama.cpp takes the number of tokens for the size of the vocabulary, and refuses the embedding.
    """
    if v.tokens is not None and v.tokens != v.size:
        text = f"tokenizer.ggml.tokens are {v.tokens}, vocab_size is {v.size}"
        yield Found(f"{text}: llama.cpp takes the first for the second")


@rule("error", example="pad has id 163840, outside the vocabulary of 163840")
def gguf_special_id(v: Vocabulary) -> Iterator[Found]:
    """A special id in the metadata of a GGUF is no row of the embedding.

    llama.cpp puts another token in its place.
    """
    for name, i in v.ids.items():
        if not 0 <= i < v.size:
            text = f"{name} has id {i}, outside the vocabulary of {v.size}"
            yield Found(f"{text}: llama.cpp puts another in its place")
