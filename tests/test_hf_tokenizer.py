"""A converted tokenizer encodes identically for all settings of its SentencePiece model, or is refused."""

import io
import json
import os
import struct
import unicodedata

import pytest
import sentencepiece
from small import GQA, ROOT, TOKENIZER, save_random

from llama.checkpoint import hf_tokenizer
from llama.checkpoint.convert import convert
from llama.checkpoint.hf_tokenizer import tokenizer_files

LLAMA = {  # as Llama 2's was trained
    "model_type": "bpe",
    "byte_fallback": True,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "required_chars": "jkqz",
}
SYMBOLS = ["<X>", "<|im_end|>", "▁▁", "ox", "["]
TEXTS = [
    "",
    " ",
    "   ",
    "\n",
    " the",
    "the  fox ",
    "a\tb\r\n\n c",
    "▁the▁",
    "3.14",
    "<0x41>",
    "x<X>y",
    "<X>",
    "<X> y",
    " <X><0x41>",
]
TEXTS += [
    "box[0]<|im_end|>\n",
    "    indented",
    "naïve ﬁ ①Ａ～",
    "Å ½ 한국어 ｶﾞ が",
    "שָׁלוֹם مُحَمَّد",
    "\u0634\u0651\u064e",
    "a\u200bb",
    "\ufefftext",
    "🙂",
]
TEXTS += ["ﬁ\u0301", "é\u0323", "™\u0301", "ê\u0301", "か\u3099", "ｶ\u3099"]
TEXTS += [unicodedata.normalize("NFD", text) for text in TEXTS]


def train(**settings):
    """Train a SentencePiece model on this repository's README."""
    found = io.BytesIO()
    lines = (ROOT / "README.md").read_text(encoding="utf-8").split("\n")
    options = {"sentence_iterator": iter(lines), "model_writer": found, "vocab_size": 380, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(**options, **{**LLAMA, **settings})
    return found.getvalue()


def append(model, *pieces, kind=1):
    """A model with additional pieces of these texts and scores: serialized protobuf messages can be concatenated."""
    for text, score in pieces:
        piece = b"\x0a" + bytes([len(text.encode())]) + text.encode() + b"\x15" + struct.pack("<f", score)
        piece += bytes([0x18, kind])
        model += b"\x0a" + bytes([len(piece)]) + piece
    return model


def auto_tokenizer(folder, model):
    """The tokenizer that transformers loads from the files."""
    from transformers import AutoTokenizer

    for name, content in tokenizer_files(sentencepiece.SentencePieceProcessor(model_proto=model)).items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder)


SETTINGS = {
    "as Llama 2": {},
    "no dummy prefix": {"add_dummy_prefix": False},
    "extra spaces removed": {"remove_extra_whitespaces": True},
    "extra spaces removed, no dummy prefix": {"remove_extra_whitespaces": True, "add_dummy_prefix": False},
    "NFKC": {"normalization_rule_name": "nfkc"},
    "NFKC and more, SentencePiece's default": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "user-defined pieces": {"user_defined_symbols": SYMBOLS},
    "user-defined pieces, no dummy prefix": {"user_defined_symbols": SYMBOLS, "add_dummy_prefix": False},
    "a user-defined piece that NFKC would change": {"user_defined_symbols": "①", "normalization_rule_name": "nfkc"},
    "no bytes": {"byte_fallback": False},
    "other ids": {"unk_id": 3, "bos_id": 0, "eos_id": 1, "pad_id": 2, "control_symbols": ["<|sep|>"]},
    "no BOS": {"bos_id": -1},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_is_converted(tmp_path, name):
    """Regression: tokenizer.json had Llama 2's settings whatever the model's, which gave other ids and no error."""
    model = train(**SETTINGS[name])
    ours, theirs = sentencepiece.SentencePieceProcessor(model_proto=model), auto_tokenizer(tmp_path, model)
    for text in TEXTS:
        ids = ours.encode(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids, repr(text)
        assert theirs(text)["input_ids"] == [ours.bos_id()] * (ours.bos_id() >= 0) + ids
        if ours.unk_id() not in ids:
            assert theirs.decode(ids) == ours.decode(ids), repr(text)
    for role in ("unk", "bos", "eos", "pad"):
        id = getattr(ours, f"{role}_id")()
        assert getattr(theirs, f"{role}_token_id") == (id if id >= 0 else None)


@pytest.mark.parametrize(
    "pieces",
    [
        [("he f", 0.0), ("th", 0.0)],
        [("kz", -5000.0), ("jk", -5000.0), ("zq", -5000.0), ("jkz", -5000.0)],
        [("zqj", -7.5), ("zq", -1e9), ("qj", -1e9)],
        [(piece, -5000.0) for piece in ("jz", "qq", "qz", "kj", "qzj")],  # regression: an error
    ],
)
def test_appended_pieces_of_equal_score(tmp_path, pieces):
    """Of two that overlap in a text, SentencePiece takes the left one, and tokenizer.json the first in its list."""
    model = append(train(), *pieces)
    ours, theirs = sentencepiece.SentencePieceProcessor(model_proto=model), auto_tokenizer(tmp_path, model)
    for text in [*TEXTS, "the fox", "jkzqjk", "zqj", "qjkz", "jkzq jkjkzz", "zqjzqqj", "qzjzqkj kjzjqqzj"]:
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text), repr(text)


def overlap():
    """Whichever of the two comes first, SentencePiece takes the other in "jkj" or in "kjk"."""
    return append(train(), ("jk", -1e9), ("kj", -1e9))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: train(model_type="unigram"), "it is not of type BPE"),
        (lambda: train(treat_whitespace_as_suffix=True), "treat_whitespace_as_suffix is set"),
        (lambda: train(normalization_rule_name="nmt_nfkc_cf"), "its normalization is 'nmt_nfkc_cf'"),
        (lambda: append(train(), ("fox", -1e9), kind=5), r"it has unused pieces: \['fox'\]"),
        (lambda: append(train(), ("你好", 0.0)), "its piece '你好' contains '你', which is not a piece"),
        (overlap, "'(jkj|kjk)' would be .* instead of"),
    ],
)
def test_settings_that_cannot_be_converted_are_named(model, message):
    with pytest.raises(ValueError, match=f"tokenizer.json cannot express this SentencePiece model: {message}"):
        tokenizer_files(sentencepiece.SentencePieceProcessor(model_proto=model()))


def test_ids_are_checked_before_anything_is_written(tmp_path, monkeypatch):
    save_random(tmp_path / "from", {**GQA, "n_layers": 1})
    monkeypatch.setattr(hf_tokenizer, "leftmost_first", lambda merges: [])
    with pytest.raises(ValueError, match="cannot express this SentencePiece model: .* would be .* instead of"):
        convert(tmp_path / "from", tmp_path / "to", "hf", 1, None, TOKENIZER)
    assert os.listdir(tmp_path) == ["from"]


def test_a_model_with_other_bos_and_eos_ids(tmp_path):
    """Regression: config.json had 1 and 2, whatever the tokenizer's BOS and EOS."""
    (tmp_path / "tokenizer.model").write_bytes(train(unk_id=0, bos_id=2, eos_id=1))
    save_random(tmp_path / "from", {**GQA, "n_layers": 1}, vocab_size=380)
    convert(tmp_path / "from", tmp_path / "to", "hf", 1, None, tmp_path / "tokenizer.model")
    for name in ("config.json", "generation_config.json"):
        content = json.loads((tmp_path / "to" / name).read_text())
        assert (content["bos_token_id"], content["eos_token_id"]) == (2, 1)
