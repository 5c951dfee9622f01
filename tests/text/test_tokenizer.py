"""Tokens: the published encodings, round trips, and a stream without half characters."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refmoe.files import InputError
from refmoe.run.load import golden_folder
from refmoe.text.tokenizer import CHUNK, RUN, Tokenizer, cut, read_ranks

WORDS = Tokenizer.load(golden_folder() / "tiny-k2")


@given(st.text())
def test_decoding_undoes_encoding(text):
    assert WORDS.decode(WORDS.encode(text)) == text


@given(st.text(alphabet=st.sampled_from("<|im_end|>[EOS]ab ")))
def test_special_tokens_are_plain_text_where_not_allowed(text):
    ids = WORDS.encode(text, allowed_special=())
    assert all(i < WORDS.size - 256 for i in ids)
    assert WORDS.decode(ids) == text


def test_special_tokens_keep_k2s_order_behind_the_ranks():
    ranks = WORDS.size - 256
    ids = WORDS.encode("[BOS][EOS]<|im_end|><|im_user|><|im_assistant|><|im_system|><|im_middle|>")
    assert [i - ranks for i in ids] == [0, 1, 2, 3, 4, 10, 17]
    assert WORDS.encode("<|im_end|>x", allowed_special={"[EOS]"})[0] < ranks
    assert WORDS.decode([ranks + 5]) == f"<|reserved_token_{ranks + 5}|>"
    assert WORDS.encode(f"<|reserved_token_{ranks + 5}|>") == [ranks + 5]


@given(st.text(), st.data())
def test_a_stream_prints_whole_characters_and_all_of_them(text, data):
    stream, shown = WORDS.stream(), []
    for i in WORDS.encode(text, allowed_special=()):
        piece = stream.feed(i)
        assert "\ufffd" not in piece or "\ufffd" in text
        shown.append(piece)
    assert "".join(shown) + stream.finish() == text


def test_a_stream_marks_what_never_becomes_a_character():
    stream = WORDS.stream()
    euro = WORDS.encode("€", allowed_special=())
    assert len(euro) == 3  # a byte each: no such token in Shakespeare
    assert [stream.feed(i) for i in euro] == ["", "", "€"]
    assert stream.feed(euro[0]) == ""
    assert stream.finish() == "\ufffd"


@given(st.integers(0, 3), st.sampled_from("a \n"), st.integers(RUN - 1, 2 * RUN + 2))
def test_long_runs_are_cut_and_nothing_is_lost(before, character, length):
    text = "x " * before + character * length + "end"
    pieces = list(cut(text))
    assert "".join(pieces) == text
    assert not any(re.search(rf"\S{{{RUN + 1}}}|\s{{{RUN + 1}}}", piece) for piece in pieces)


def test_text_is_cut_every_400_000_characters():
    text = "ab " * CHUNK
    assert [len(p) for p in cut(text)] == [CHUNK, CHUNK, CHUNK]
    assert list(cut("")) == []
    assert WORDS.encode("") == []


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"IQ== 0\nIg==\n", ":2: b'Ig=='"),
        (b"IQ== 0\n!!! 1\n", ":2:"),
        (b"IQ== 0\nIg== 2\n", ":2: rank 2"),
        (b"IQ== 0\nIQ== 1\n", ":2: rank 1 or token seen before"),
        (b"IQ== 0\nIg== 1\n", "2 of the 256 single bytes"),
    ],
)
def test_a_broken_vocabulary_is_refused_with_its_line(tmp_path, content, says):
    (tmp_path / "tiktoken.model").write_bytes(content)
    with pytest.raises(InputError, match=re.escape(says)):
        read_ranks(tmp_path / "tiktoken.model")


def test_a_special_token_outside_the_reserved_ids_is_refused():
    ranks = {bytes([b]): b for b in range(256)}
    with pytest.raises(InputError, match="'<x>' has id 512, the reserved ids are 256 to 511"):
        Tokenizer(ranks, {512: "<x>"})
    with pytest.raises(InputError, match="two ids"):
        Tokenizer(ranks, {256: "<x>", 257: "<x>"})


def test_a_token_outside_the_vocabulary_is_refused():
    with pytest.raises(InputError, match=f"0 to {WORDS.size - 1}"):
        WORDS.decode([WORDS.size])


def test_a_folder_without_a_vocabulary_says_what_it_lacks(tmp_path):
    with pytest.raises(InputError, match=r"tiktoken\.model: no such file"):
        Tokenizer.load(tmp_path)


def test_the_published_encodings_hold(kimi):
    words = Tokenizer.load(kimi / "k2.6")
    first, *rest = json.loads((kimi / "chat_vectors.json").read_text("utf-8"))
    for text, ids in first["texts"]:
        assert words.encode(text) == ids
        assert words.decode(ids) == text
    for vector in rest:
        assert words.encode(vector["text"]) == vector["ids"]
    assert len(rest) == 28
    assert set(words.stop_ids) == {163585, 163586}
    # two encodings published beside the vectors
    assert words.encode("你好，世界") == [33845, 378, 2243]
    assert words.encode("1234567") == [6694, 12972, 22]


@pytest.mark.parametrize("name", ["", "\ud800", "a\nb"])
def test_a_special_token_without_a_proper_name_is_refused(name):
    """An empty one would be found between all characters, for ever."""
    ranks = {bytes([b]): b for b in range(256)}
    with pytest.raises(InputError, match="expected a name of printable characters"):
        Tokenizer(ranks, {256: name})
