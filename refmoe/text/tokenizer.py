"""Turn text into tokens and back: `tiktoken.model` and `tokenizer_config.json`, as K2 has them.

Text is cut into pieces by one regular expression, each piece's bytes are merged by rank. Behind
the ranks come 256 reserved ids: the named special tokens of tokenizer_config.json, the others
print as `<|reserved_token_ID|>`. No BOS or EOS is ever added. Long text is cut first: every
400,000 characters, and within runs of more than 25,000 characters that are all white space or all
not (so that no piece is too long for the merger; a cut can change merges, in Moonshot's too).

Sources: Moonshot's `tokenization_kimi.py` for the pattern, the reserved ids and the cutting;
openai/tiktoken splits and merges. Its own file loader caches by path and can return stale bytes,
so the file is parsed here. K2: 163,584 ranks, [BOS] 163584, <|im_end|> 163586.
"""

import base64
import binascii
import codecs
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from refmoe.files import InputError, read_object

if TYPE_CHECKING:
    import tiktoken

RESERVED = 256  # ids behind the ranks, for special tokens
CHUNK = 400_000  # characters that are encoded at once, as in Moonshot's tokenizer
RUN = 25_000  # characters of a run that are encoded at once, as in Moonshot's tokenizer

# K2's pattern: && is the intersection of classes, which tiktoken's engine knows.
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join(
    (
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
_LONG_RUN = re.compile(rf"\s{{{RUN + 1},}}|\S{{{RUN + 1},}}")


def byte_alphabet() -> list[str]:
    """Return the character that stands for each byte: itself if it prints, or one from U+0100 on.

    Source: openai/gpt-2 encoder.py, `bytes_to_unicode`.
    """
    prints = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(b) if b in prints else chr(next(others)) for b in range(256)]


_BYTES = {c: b for b, c in enumerate(byte_alphabet())}


class Tokenizer:
    """A vocabulary of K2's kind: ranks for merging, and special tokens behind them.

    `special` maps the named and reserved special tokens to their ids, `size` is how many ids there
    are, and `stop_ids` are those that end an answer. Raises `InputError` for special tokens outside
    the reserved ids, without a name, or twice the same.
    """

    def __init__(self, ranks: dict[bytes, int], names: dict[int, str], eos: str | None = None):
        first = len(ranks)
        outside = [i for i in names if not first <= i < first + RESERVED]
        if outside:
            raise InputError(
                f"special token {names[outside[0]]!r} has id {outside[0]}, "
                f"the reserved ids are {first} to {first + RESERVED - 1}"
            )
        for name in names.values():
            if not name or not name.isprintable():
                raise InputError(f"special token {name!r}: expected a name of printable characters")
        reserved = range(first, first + RESERVED)
        self.special = {names.get(i, f"<|reserved_token_{i}|>"): i for i in reserved}
        if len(self.special) != RESERVED:
            raise InputError("tokenizer_config.json gives two ids to one special token")
        self.size = first + RESERVED
        stops = (eos, "<|im_end|>")
        self.stop_ids = tuple(self.special[name] for name in stops if name in self.special)
        self._ranks = ranks

    @cached_property
    def _encoding(self) -> "tiktoken.Encoding":
        """Return tiktoken's encoder, made when text is first encoded or decoded."""
        import tiktoken  # a library that computing with token ids does without

        return tiktoken.Encoding(
            "k2", pat_str=PATTERN, mergeable_ranks=self._ranks, special_tokens=self.special
        )

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Read the vocabulary in a checkpoint's folder.

        Raises `InputError` if `tiktoken.model` or `tokenizer_config.json` is missing or damaged.
        """
        folder = Path(folder)
        vocabulary, config = folder / "tiktoken.model", folder / "tokenizer_config.json"
        for file in (vocabulary, config):
            if not file.is_file():
                raise InputError(f"{file}: no such file; text needs it, --tokens works without")
        raw = read_object(config)
        try:
            added = raw.get("added_tokens_decoder", {})
            names = {int(i): str(token["content"]) for i, token in added.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise InputError(f"{config}: added_tokens_decoder is not one ({e!r})") from None
        try:
            return cls(read_ranks(vocabulary), names, _text(raw.get("eos_token")))
        except InputError as e:
            raise InputError(f"{folder}: {e}") from None

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> "Tokenizer":
        """Read a GGUF's metadata: its tokens in order are the ranks, the last 256 are reserved.

        A GGUF has merges instead of ranks (each token longer than a byte is made of two earlier
        ones); tokens are written in GPT-2's alphabet of printable stand-ins for bytes. Raises
        `InputError` for metadata without such a vocabulary.
        """
        tokens, eos = metadata.get("tokenizer.ggml.tokens"), None
        if not isinstance(tokens, list) or len(tokens) <= RESERVED:
            raise InputError("the GGUF has no vocabulary (tokenizer.ggml.tokens)")
        if not all(isinstance(token, str) for token in tokens):
            raise InputError("tokenizer.ggml.tokens: expected strings; damaged")
        first = len(tokens) - RESERVED
        try:
            ranks = {bytes(_BYTES[c] for c in token): i for i, token in enumerate(tokens[:first])}
        except KeyError as e:
            raise InputError(f"tokenizer.ggml.tokens: {e.args[0]!r} stands for no byte") from None
        if len(ranks) != first or sum(len(token) == 1 for token in ranks) != 256:
            raise InputError("tokenizer.ggml.tokens: twice the same token, or not all 256 bytes")
        names = {first + n: token for n, token in enumerate(tokens[first:])}
        if isinstance(number := metadata.get("tokenizer.ggml.eos_token_id"), int):
            eos = names.get(number)
        return cls(ranks, names, eos)

    def encode(
        self, text: str, allowed_special: Literal["all"] | Collection[str] = "all"
    ) -> list[int]:
        """Return the text's token ids; special tokens in it count as such if they are allowed.

        Moonshot's tokenizer allows all by default; text from strangers wants `allowed_special=()`.
        """
        allowed: Any = allowed_special if allowed_special == "all" else set(allowed_special)
        return [
            i
            for piece in cut(text)
            for i in self._encoding.encode(piece, allowed_special=allowed, disallowed_special=())
        ]

    def pieces(self, text: str) -> list[str]:
        """Return the pieces into which K2's pattern cuts text without special tokens."""
        import regex  # knows the intersection of classes; only `tok` asks for pieces

        return [p for part in cut(text) for p in regex.findall(PATTERN, part, flags=regex.V1)]

    def token_bytes(self, i: int) -> bytes:
        """Return the bytes that a token stands for. Raises `InputError` for an id out of range."""
        if not 0 <= i < self.size:
            raise InputError(f"token {i}: the vocabulary has ids 0 to {self.size - 1}")
        return self._encoding.decode_single_token_bytes(i)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes(i) for i in ids).decode("utf-8", "replace")

    def stream(self) -> "StreamDecoder":
        """Return a decoder that takes tokens one by one."""
        return StreamDecoder(self)


class StreamDecoder:
    """Decode tokens one by one into text, never into half a character."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """Return the characters that this token completes."""
        return self._utf8.decode(self._tokenizer.token_bytes(token))

    def finish(self) -> str:
        """Return what is left of an unfinished character: U+FFFD, or nothing."""
        return self._utf8.decode(b"", final=True)


def read_ranks(file: Path) -> dict[bytes, int]:
    """Read a `tiktoken.model` → rank of each token.

    Each line is a token in base64, a space and its rank, in order from 0. Raises `InputError`, with
    the line, for anything else, and for a file without all 256 single bytes.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines()):
        try:
            token, rank = line.split(b" ")
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise InputError(
                f"{file}:{number + 1}: {line[:40]!r}, expected a token in base64, a space, its rank"
            ) from None
        if int(rank) != number or len(ranks) != number + 1:
            raise InputError(f"{file}:{number + 1}: rank {int(rank)} or token seen before")
    if not ranks:
        raise InputError(f"{file}: empty")
    single = sum(len(token) == 1 for token in ranks)
    if single != 256:
        raise InputError(f"{file}: {single} of the 256 single bytes; not every text can be encoded")
    return ranks


def cut(text: str) -> Iterator[str]:
    """Yield the text in pieces that are encoded apart, as Moonshot's tokenizer cuts it."""
    for start in range(0, len(text), CHUNK):
        chunk = text[start : start + CHUNK]
        at = 0
        for run in _LONG_RUN.finditer(chunk):
            for end in range(run.start() + RUN, run.end(), RUN):
                yield chunk[at:end]
                at = end
        yield chunk[at:]


def _text(token: Any) -> str | None:
    """Return the text of a token that is a string, or an object that holds it as `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
