"""The tokenizer against SentencePiece itself."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from small import TOKENIZER, cases, trained

from llama import Tokenizer, infilling_prompt
from llama.tokenizer import Decoder

TEXTS = ["", " ", "Once upon a time", "  two  spaces\n\ttab ", "2023 + 19", "naïve 你好 🙂", "<s> </s> <unk>", "▁ ▁▁x"]
SENTENCEPIECE = SentencePieceProcessor(model_file=str(TOKENIZER))
OURS = Tokenizer(TOKENIZER)


@pytest.mark.parametrize("text", TEXTS)
def test_encodes_as_sentencepiece_between_bos_and_eos(text):
    pieces = SENTENCEPIECE.encode(text)
    assert OURS.encode(text, bos=False, eos=False) == pieces
    assert OURS.encode(text, bos=True, eos=False) == [1, *pieces]
    assert OURS.encode(text, bos=True, eos=True) == [1, *pieces, 2]


def test_special_ids_are_llamas():
    assert (OURS.bos_id, OURS.eos_id, OURS.pad_id) == (1, 2, -1)
    assert OURS.n_words == SENTENCEPIECE.vocab_size()
    assert 1000 <= OURS.n_words <= 4096


def test_settings_are_llamas():
    """Byte fallback, digits split, no normalization, whitespace kept."""
    assert [SENTENCEPIECE.id_to_piece(i) for i in range(3)] == ["<unk>", "<s>", "</s>"]
    assert [SENTENCEPIECE.is_byte(i) for i in (2, 3, 258, 259)] == [False, True, True, False]
    digits = [SENTENCEPIECE.id_to_piece(i) for i in SENTENCEPIECE.encode("1234")]
    assert "".join(digits) == "▁1234"
    assert all(sum(c.isdigit() for c in piece) <= 1 for piece in digits)
    for text in ("ﬁ ① Ａ", "a  b", " a", "a ", "e\u0301 é"):
        assert OURS.decode(OURS.encode(text, bos=False, eos=False)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_text_that_spells_special_tokens_stays_text(text):
    assert not {0, 1, 2} & set(OURS.encode(text, bos=False, eos=False))


ids = st.lists(
    st.one_of(st.integers(0, OURS.n_words - 1), st.integers(0, 258), st.sampled_from([0, 1, 2])), max_size=12
)


@settings(max_examples=cases(1000), deadline=None)
@given(st.one_of(ids, st.tuples(st.text(max_size=8), ids).map(lambda t: OURS.encode(t[0], True, True) + t[1])))
def test_pieces_join_to_what_sentencepiece_decodes(ids):
    """Regression: lost spaces and broken multi-byte characters."""
    pieces = OURS.decode_pieces(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == SENTENCEPIECE.decode(ids) == OURS.decode(ids)


SETTINGS = [
    {},
    {"add_dummy_prefix": False},
    {"remove_extra_whitespaces": True},
    {"remove_extra_whitespaces": True, "add_dummy_prefix": False},
    {"treat_whitespace_as_suffix": True},
    {"model_type": "unigram", "add_dummy_prefix": False, "byte_fallback": False, "unk_surface": "<?>"},
    {"normalization_rule_name": "nmt_nfkc", "user_defined_symbols": ["▁▁", "▁foo", "<x>"], "control_symbols": ["<c>"]},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_streams_of_every_tokenizer_equal_its_decode(settings, tmp_path):
    """Regression: the first space of every text was dropped, whether or not the tokenizer adds a prefix space and drops
    it, and <unk> was decoded in one way only. Also for a text that continues another, from any id."""
    ours, chance = Tokenizer(trained(tmp_path, **settings)), random.Random(0)
    space = ours.sp_model.piece_to_id("▁")
    encoded = [ours.encode(text, bos=True, eos=False) for text in (" the", "the  fox", "def f(): 漢🙂", "  hat")]
    for _ in range(cases(1000)):
        some = [
            chance.choice([chance.randrange(ours.n_words), chance.randrange(min(260, ours.n_words)), space, 0, 1])
            for _ in range(6)
        ]
        ids = [*chance.choice([*encoded, []])[: chance.randrange(9)], *some[: chance.randrange(7)]]
        assert "".join(ours.decode_pieces(ids)) == ours.decode(ids) == ours.sp_model.decode(ids)
        cut = chance.randint(0, len(ids))
        decoder = Decoder(ours)
        before = "".join(map(decoder.push, ids[:cut])) + (decoder.flush() if cut == len(ids) else "")
        assert before + "".join(ours.decode_pieces(ids[cut:], ids[:cut])) == ours.decode(ids)


def test_ids_of_other_libraries_are_decoded():
    ids = OURS.encode("Once upon a 🙂", bos=True, eos=False)
    for same in (np.array(ids), torch.tensor(ids), tuple(ids), [np.int32(id) for id in ids]):
        assert OURS.decode(same) == "".join(OURS.decode_pieces(same)) == "Once upon a 🙂"


def test_a_character_is_decoded_with_its_last_byte():
    ids = OURS.encode("a🙂b", bos=True, eos=True)
    pieces = OURS.decode_pieces(ids)
    assert "🙂" in pieces
    assert "".join(pieces) == "a🙂b"
    last = pieces.index("🙂")
    assert pieces[last - 3 : last] == ["", "", ""]
    assert "".join(OURS.decode_pieces(ids[:last])) == "a" + "\ufffd" * 3  # ends within the character


def test_only_text_is_encoded():
    for value in (None, b"bytes", 3):
        with pytest.raises(ValueError, match="only a str"):
            OURS.encode(value, bos=True, eos=False)


def test_files_that_are_not_a_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        Tokenizer(tmp_path / "tokenizer.model")
    for content in (b"", b"<html>"):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(ValueError, match=rf"\({len(content)} bytes\) is not a SentencePiece model, or ranks"):
            Tokenizer(tmp_path / "tokenizer.model")
    for content, why in {
        b"IQ== 0\nIg== 1\n": "must have every byte",
        b"IQ== 0\nIg==\n": "line 2 is not a token",
    }.items():
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(ValueError, match=why):
            Tokenizer(tmp_path / "tokenizer.model")
    for content in (b"{}", b'{"a": 1', b'{"model": {"vocab": 3}}'):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"is not a tokenizer.json|is not JSON: (?!it is JSON)"):
            Tokenizer(tmp_path / "tokenizer.json")


def test_code_llamas_infilling_in_both_orders(tmp_path):
    names = ["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"]
    code = Tokenizer(trained(tmp_path, user_defined_symbols=names))
    pre, suf, mid, eot = map(code.sp_model.piece_to_id, names)
    assert code.eos_ids == {code.eos_id, eot}
    prefix, suffix = "def f(x):\n    return ", "\n\ndef g(y):\n    return y"
    begin = code.encode(prefix, bos=False, eos=False)
    for order in (False, True):
        ids = infilling_prompt(code, prefix, suffix, suffix_first=order)
        [middle] = [i for i, id in enumerate(ids) if id == mid]
        if order:
            end = ids[3:middle]
            assert ids == [code.bos_id, pre, suf, *end, mid, *begin]
        else:
            end = ids[2 + len(begin) + 1 : middle]
            assert ids == [code.bos_id, pre, *begin, suf, *end, mid]
        assert code.decode([code.sp_model.piece_to_id("x"), *end]) == "x" + suffix  # no space was added
    with pytest.raises(ValueError, match="the tokenizer has no infilling tokens; use a Code Llama"):
        infilling_prompt(OURS, prefix, suffix)
