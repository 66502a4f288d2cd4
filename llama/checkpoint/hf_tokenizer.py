"""The files that Hugging Face's AutoTokenizer loads, for a SentencePiece model."""

from __future__ import annotations

from typing import Any

NORMALIZER = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
}
DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
}
BPE = {
    "type": "BPE",
    "dropout": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": True,
    "byte_fallback": True,
    "ignore_merges": False,
}
FLAGS = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def post_processor(bos: str) -> dict[str, Any]:
    """BOS before each text."""
    first, second = (
        [{"SpecialToken": {"id": bos, "type_id": i}}, {"Sequence": {"id": name, "type_id": i}}]
        for i, name in enumerate("AB")
    )
    special = {bos: {"id": bos, "ids": [1], "tokens": [bos]}}
    return {"type": "TemplateProcessing", "single": first, "pair": first + second, "special_tokens": special}


def tokenizer_files(pieces: list[str]) -> dict[str, dict[str, Any]]:
    """tokenizer.json and tokenizer_config.json of a SentencePiece BPE model with Llama 2's settings. `pieces` are in
    the order of ids: unk, bos, eos, 256 bytes, merged pieces from the first merge on, and single characters."""
    unk, bos, eos = pieces[:3]
    ids = {piece: i for i, piece in enumerate(pieces)}
    # A merge is any division of a piece into two others; SentencePiece joins the pair whose result has the lowest id.
    merges = [
        [piece[:i], piece[i:]]
        for piece in pieces[259:]
        for i in range(1, len(piece))
        if piece[:i] in ids and piece[i:] in ids
    ]
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": pieces[i], **FLAGS} for i in range(3)],
        "normalizer": NORMALIZER,
        "pre_tokenizer": None,
        "post_processor": post_processor(bos),
        "decoder": DECODER,
        "model": {**BPE, "unk_token": unk, "vocab": ids, "merges": merges},
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": unk,
        "bos_token": bos,
        "eos_token": eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": config}
