"""Numeric or prompt? The first difference of two tokenisations, and its cause."""

from hypothesis import given
from hypothesis import strategies as st

from refmoe.run.load import golden_folder
from refmoe.text.explain import explain
from refmoe.text.tokenizer import Tokenizer

WORDS = Tokenizer.load(golden_folder() / "tiny-k2")
DIALOGUE = "<|im_user|>user<|im_middle|>Speak, sirrah!<|im_end|><|im_assistant|>"


@given(st.text())
def test_the_same_ids_have_no_difference(text):
    ids = WORDS.encode(text)
    assert explain(WORDS, ids, list(ids)) is None


def test_a_changed_text_is_the_templates_doing():
    theirs = WORDS.encode(DIALOGUE.replace("<|im_end|>", "<|im_end|>\n"))
    found = explain(WORDS, WORDS.encode(DIALOGUE), theirs)
    assert found is not None
    assert found.cause == "template"
    assert found.byte == DIALOGUE.index("<|im_assistant|>")
    assert r"there b'k, sirrah!<|im_end|>\n<|im_assistant|>'" in found.explanation


def test_an_added_bos_is_named():
    ours = WORDS.encode(DIALOGUE)
    found = explain(WORDS, ours, [WORDS.special["[BOS]"], *ours])
    assert found is not None
    assert (found.byte, found.token, found.cause) == (0, 0, "special tokens")
    assert found.explanation.endswith("stands only there; the rest is the same")
    dropped = explain(WORDS, ours, ours[:-1])
    assert dropped is not None
    assert dropped.explanation == "<|im_assistant|> stands only here; the rest is the same"


def test_a_special_token_spelled_out_is_named():
    ours, theirs = (WORDS.encode(DIALOGUE, allowed) for allowed in ("all", ()))
    found = explain(WORDS, ours, theirs)
    assert found is not None
    assert (found.byte, found.token, found.cause) == (0, 0, "special tokens")
    assert found.explanation == (
        "<|im_user|> is one special token here; there it is spelled out in plain tokens"
    )
    back = explain(WORDS, theirs, ours)
    assert back is not None
    assert "one special token there; here it is spelled out" in back.explanation


def test_a_piece_that_is_cut_elsewhere_is_pre_tokenisation():
    """K2's pattern keeps a leading space with its word; one that does not splits it off."""
    text = "My lord, the king"
    ours = WORDS.encode(text)
    theirs = [
        i for part in ("My", " ", "lord,", " ", "the", " ", "king") for i in WORDS.encode(part)
    ]
    found = explain(WORDS, ours, theirs)
    assert found is not None
    assert (found.byte, found.cause) == (2, "pre-tokenisation")
    assert found.explanation == "they cut the piece b' lord' into b' ' and b'lord'"


def test_a_token_that_crosses_a_piece_is_pre_tokenisation():
    """Digits go in threes here; an engine without that rule may have a token of `12` and `34`."""
    ranks = {bytes([b]): b for b in range(256)} | {b"34": 256}
    words = Tokenizer(ranks, {})
    assert words.pieces("1234") == ["123", "4"]
    found = explain(words, words.encode("1234"), [*b"12", 256])
    assert found is not None
    assert (found.byte, found.token, found.cause) == (2, 2, "pre-tokenisation")
    assert found.explanation == "their token b'34' crosses the end of the piece b'123'"


def test_another_order_of_merges_is_named():
    ours = WORDS.encode(" lord")
    theirs = [WORDS.encode(c)[0] for c in " lord"]
    found = explain(WORDS, ours, theirs)
    assert found is not None
    assert (found.byte, found.cause) == (0, "merges")
    assert "the piece b' lord' is [b' ', b'l', b'o', b'r', b'd'] there" in found.explanation


def test_positions_behind_special_tokens_are_right():
    ours = WORDS.encode(DIALOGUE)
    at = DIALOGUE.index(" sirrah")
    head = WORDS.encode(DIALOGUE[:at])
    tail = WORDS.encode(DIALOGUE[at + len(" sirrah") :])
    theirs = head + WORDS.encode(" ") + WORDS.encode("sirrah") + tail
    found = explain(WORDS, ours, theirs)
    assert found is not None
    assert (found.byte, found.cause) == (at, "pre-tokenisation")


def test_a_bos_in_front_and_a_map_of_special_ids_are_told_as_that():
    ours = WORDS.encode(DIALOGUE)
    bos, end = WORDS.special["[BOS]"], WORDS.special["<|im_end|>"]
    first = min(WORDS.special.values())
    there = explain(WORDS, ours, [bos, *ours])
    assert there is not None
    assert there.explanation == (
        f"the ids differ by a BOS in front: [BOS] ({bos}) stands only there; the rest is the same"
    )
    here = explain(WORDS, [bos, *ours], ours)
    assert here is not None
    assert "a BOS in front: [BOS]" in here.explanation
    assert "stands only here" in here.explanation
    mapped = explain(WORDS, ours, [i + 300 if i == end else i for i in ours])
    assert mapped is not None
    assert mapped.cause == "special tokens"
    assert f"special ids mapped: {end}→{end + 300}; here they are <|im_end|>" in mapped.explanation
    moved = explain(WORDS, ours, [i + 300 if i >= first else i for i in ours])
    assert moved is not None
    assert "special ids mapped, all by +300: " in moved.explanation
    both = explain(WORDS, ours, [bos + 300, *(i + 300 if i >= first else i for i in ours)])
    assert both is not None
    assert "a BOS in front: no token here" in both.explanation
    assert "and special ids mapped, all by +300" in both.explanation
    plain = explain(WORDS, ours, [i if n else 7 for n, i in enumerate(ours)])
    assert plain is not None
    assert "mapped" not in plain.explanation
