"""Streamed text: pieces join to the whole, and stop strings are never part of it."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small import TOKENIZER, cases

from llama import Tokenizer
from llama.text import Text

OURS = Tokenizer(TOKENIZER)

# Emoji with joiners and skin tones, flags, combining marks, right-to-left with marks of direction, Han, rare scripts
# (which are bytes to this vocabulary), spaces of all kinds, and the mark by which SentencePiece writes a space.
ODD = "🙂|👩‍👩‍👧|👍🏽|🇳🇴|e\u0301|a\u0308\u0323|שלום|\u202eעברית\u202c|مرحبا|漢字|𐍈𐍉|ꙮ| |  |\t|\n"
odd = st.sampled_from(
    [*ODD.split("|"), "\u00a0", "▁", "\u200d", "\ufeff", "\ufffd", "\x00", "<s>", "</s>", "<0xE4>", "[INST]"]
)
texts = st.lists(st.one_of(odd, st.text(max_size=6)), max_size=12).map("".join)
ids = st.lists(st.one_of(st.integers(0, OURS.n_words - 1), st.integers(0, 258)), max_size=20)


def streamed(ids, stops=(), least=0):
    """The text read after each token and at the end, and the number of tokens."""
    text, pieces, taken = Text(OURS, stops, least), [], 0
    for id in ids:
        taken += 1
        stopped = text.add(id)
        pieces.append(text.read())
        if stopped:
            break
    return [*pieces, text.read(end=True)], taken


@settings(max_examples=cases(2000), deadline=None)
@given(st.one_of(texts.map(lambda text: OURS.encode(text, bos=True, eos=False)), ids))
def test_pieces_join_to_the_whole_text(ids):
    pieces, _ = streamed(ids)
    assert "".join(pieces) == OURS.decode(ids)
    assert all(piece.encode() for piece in pieces if piece)  # not half of a surrogate pair


def cut(text, stops):
    ends = [(text.index(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
    return text[: sum(min(ends))] if ends else text


@settings(max_examples=cases(1000), deadline=None)
@given(st.data(), texts.filter(bool))
@example(None, "the end")
def test_text_ends_before_the_first_stop_string(data, text):
    """Stop strings are substrings of the text and others, so that they overlap, share prefixes and cross token
    borders."""
    ids = OURS.encode(text, bos=True, eos=False)
    stops = ["e e", " en"]
    if data:
        parts = st.tuples(st.integers(0, len(text) - 1), st.integers(1, 9)).map(lambda t: text[t[0] : sum(t)])
        stops = data.draw(st.lists(st.one_of(parts, st.text(min_size=1, max_size=4)), min_size=1, max_size=4))
    pieces, taken = streamed(ids, stops)
    assert "".join(pieces) == cut(OURS.decode(ids), stops)
    if any(stop in OURS.decode(ids) for stop in stops):
        before = OURS.decode(ids[: taken - 1]).rstrip("\ufffd")  # without the bytes of an incomplete character
        assert all(stop not in before for stop in stops)  # the text ends at once


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_a_stop_string_of_several_tokens_is_held_back(count):
    """The text read lags behind only as long as a stop string may still be completed."""
    tokens = [OURS.encode(c, bos=False, eos=False)[-1] for c in "Hello"[:count]]
    before = OURS.encode("x", bos=False, eos=False)
    stop = OURS.decode(before + tokens)[1:]
    pieces, _ = streamed(before + tokens, [stop])
    assert "".join(pieces[: len(before)]) == "x"
    assert not any(pieces[len(before) :])
    if count > 1:
        pieces, _ = streamed([*before, *tokens[:-1], *before], [stop])
        assert not any(pieces[len(before) : len(before) + count - 1])
        assert "".join(pieces) == OURS.decode([*before, *tokens[:-1], *before])


def test_a_long_stop_string_is_compared_only_as_far_as_the_text_reaches():
    """Regression: each token was compared with all of its beginnings, which took minutes for one of a few megabytes."""
    compared = []

    class Stop(str):
        def __getitem__(self, part):
            compared.append(part.stop)
            return str(self)[part]

    pieces, _ = streamed(OURS.encode("Hello", bos=False, eos=False), [Stop("lo" * 1000)])
    assert "".join(pieces) == OURS.decode(OURS.encode("Hello", bos=False, eos=False))
    assert max(compared) <= len("Hello")


def test_stop_strings_match_whole_characters_only():
    """The last byte of 🙂 is also that of other characters: only the character itself is a match."""
    smile, other = (OURS.encode(c, bos=False, eos=False)[-4:] for c in "🙂🚂")
    assert smile[-1] == other[-1] and smile != other
    assert "".join(streamed(other + smile, ["🙂"])[0]) == "🚂"
    assert "".join(streamed(smile[:3], ["🙂"])[0]) == "\ufffd" * 3


def test_of_overlapping_stop_strings_the_first_complete_one_counts():
    tokens = OURS.encode("a b c d", bos=False, eos=False)
    assert "".join(streamed(tokens, ["b c d", "c"])[0]) == "a b "
    assert "".join(streamed(tokens, ["b c", " c"])[0]) == "a "


def test_stop_strings_are_ignored_before_the_minimum_length():
    tokens = [OURS.encode("x", bos=False, eos=False)[-1]] * 6
    assert "".join(streamed(tokens, ["x"], 3)[0]).count("x") == 2
