"""Llama 3's tokenizer -> the files of Meta's layout or Hugging Face's."""

from __future__ import annotations

import base64
import random
from collections.abc import Iterator
from typing import Any

from ..pre_tokenizer import BYTES, LLAMA3, added_token, byte_pair_json, post_processor, tokenizer_config
from ..vocabulary import LLAMA3_SPECIAL, TiktokenVocabulary, unicode_to_bytes
from .hf_tokenizer import difference


def has_usual_names(vocabulary: TiktokenVocabulary) -> bool:
    """Whether tokenizer.model suffices, which has no special tokens: they are Llama 3's or reserved ones."""
    usual = {len(vocabulary.ranks) + i: name for i, name in enumerate(LLAMA3_SPECIAL)}
    found = {id: name for name, id in vocabulary.special.items()}
    return usual.keys() == found.keys() and all(
        name == usual[id] or name.startswith("<|reserved_special_token_") for id, name in found.items()
    )


def ranks_file(vocabulary: TiktokenVocabulary) -> bytes:
    """tokenizer.model of Meta's layout."""
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in sorted(vocabulary.bytes.items()))


def merges(vocabulary: TiktokenVocabulary) -> Iterator[tuple[bytes, bytes]]:
    """All pairs of tokens that form a token, in the order in which they are merged."""
    ranks = vocabulary.ranks
    for _, token in sorted(vocabulary.bytes.items()):
        splits = ((token[:i], token[i:]) for i in range(1, len(token)))
        found = [(ranks[left], ranks[right], left, right) for left, right in splits if left in ranks and right in ranks]
        yield from ((left, right) for _, _, left, right in sorted(found))


def byte_pair_files(vocabulary: TiktokenVocabulary) -> dict[str, dict[str, Any]]:
    """tokenizer.json and tokenizer_config.json, compared with the original on generated texts if the package tokenizers
    is installed. ValueError names a text that tokenizer.json encodes to other ids."""
    shown = {byte: character for character, byte in unicode_to_bytes().items()}

    def spell(token: bytes) -> str:
        return "".join(map(shown.__getitem__, token))

    bos, eos = "<|begin_of_text|>", "<|end_of_text|>"
    content = byte_pair_json(
        {spell(token): rank for rank, token in sorted(vocabulary.bytes.items())},
        [[spell(left), spell(right)] for left, right in merges(vocabulary)],
        [added_token(id, name) for name, id in vocabulary.special.items()],
        {
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*LLAMA3]},
            "post_processor": {"type": "Sequence", "processors": [BYTES, post_processor(bos, vocabulary.bos_id)]},
            "decoder": BYTES,
        },
        ignore_merges=True,
    )
    tokens, rng = [*vocabulary.ranks], random.Random(0)
    samples = (b"".join(rng.choices(tokens, k=rng.randrange(12))) for _ in range(2000))
    texts = (sample.decode("utf-8", "ignore") for sample in samples)
    if problem := difference(content, texts, vocabulary.encode):
        raise ValueError(f"tokenizer.json differs from the original: {problem}")
    return {"tokenizer.json": content, "tokenizer_config.json": tokenizer_config(bos_token=bos, eos_token=eos)}
