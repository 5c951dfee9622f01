"""Turn the texts and bytes of a response into token ids, where exactly one token can be meant.

A token's bytes tell it. A text tells it unless it has U+FFFD, which stands for any bytes that are
no UTF-8, or is what is left of another token whose last bytes were dropped: some servers write a
token's text without the bytes that are no UTF-8.
"""

from collections import Counter
from collections.abc import Iterable

from refmoe.oracle.listing.base import Entry
from refmoe.text.tokenizer import Tokenizer

LOST = "\ufffd"


class Vocabulary:
    """The tokens of a model by their bytes, and which texts may stand for several."""

    def __init__(self, words: Tokenizer):
        self.words = words
        every = [words.token_bytes(i) for i in range(words.size)]
        self._ids = {raw: i for i, raw in enumerate(every)}
        twice = [raw for raw, n in Counter(every).items() if n > 1]
        self._unsure = {"", *(raw.decode("utf-8", "ignore") for raw in twice)}
        for raw in every:
            text = raw.decode("utf-8", "ignore")
            if text.encode() != raw:
                self._unsure.add(text)

    def find(self, entry: Entry, whole: bool = True) -> int | None:
        """Return the id of an entry; None where no token, or more than one, can be meant.

        whole  False: the token follows one that ends within a character, so that a server may have
               written the character under this token; then only bytes that are no UTF-8 tell it
        """
        if entry.id is not None:
            return entry.id
        if entry.raw is not None:
            own = LOST in entry.raw.decode("utf-8", "replace") and LOST.encode() not in entry.raw
            made = LOST.encode() in entry.raw or not (whole or own)  # bytes made of the text
            return None if made else self._ids.get(entry.raw)
        if not whole or entry.text is None or LOST in entry.text or entry.text in self._unsure:
            return None
        return self._ids.get(entry.text.encode("utf-8", "surrogatepass"))

    def ends_whole(self, ids: Iterable[int]) -> bool:
        """Tell whether these tokens end with a whole character."""
        last = b"".join(self.words.token_bytes(i) for i in list(ids)[-4:])[-4:]
        for back in range(1, len(last) + 1):
            byte = last[-back]
            if byte < 0x80:
                return True
            if byte >= 0xC0:  # begins a character of so many bytes
                return back >= (2 if byte < 0xE0 else 3 if byte < 0xF0 else 4)
        return True
