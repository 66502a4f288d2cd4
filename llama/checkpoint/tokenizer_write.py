"""A tokenizer -> its files in Meta's layout or Hugging Face's, or the keys of a GGUF file."""

from __future__ import annotations

import base64
import logging
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..chat_template import template_of
from ..gguf_tokenizer import byte_pair_keys, sentencepiece_keys
from ..pre_tokenizer import (
    BYTES,
    LLAMA3,
    added_token,
    byte_pair_json,
    post_processor,
    tokenizer_config,
    unicode_to_bytes,
)
from ..tokenizer import Tokenizer
from ..vocabulary import LLAMA3_SPECIAL, SentencePieceVocabulary, TiktokenVocabulary, TokenizersVocabulary
from .hf_tokenizer import Model, difference, tokenizer_files
from .paths import listed

log = logging.getLogger(__name__)


def files_of(tokenizer: Tokenizer, path: Path, source: Path, to: str) -> dict[str, Any]:
    """Names and contents (bytes or JSON) of the tokenizer's files in a layout. ValueError if it cannot hold them."""
    if to == "gguf":  # which holds the tokenizer itself
        return {}
    kind, template = tokenizer.vocabulary, template_of(source)
    files: dict[str, Any] = {} if template is None else {"chat_template.jinja": template.encode()}
    if isinstance(kind, SentencePieceVocabulary):
        files["tokenizer.model"] = kind.model.serialized_model_proto()
        files |= {} if to == "meta" else tokenizer_files(kind.model)
    elif isinstance(kind, TiktokenVocabulary) and to == "meta" and has_usual_names(kind):
        files["tokenizer.model"] = ranks_file(kind)
    elif path.suffix == ".json":  # as it is
        beside = [path.with_name(name) for name in ("tokenizer_config.json", "special_tokens_map.json")]
        files |= {file.name: file.read_bytes() for file in beside if file.is_file()}
        return files | {"tokenizer.json": path.read_bytes()}
    elif isinstance(kind, TiktokenVocabulary):
        files |= byte_pair_files(kind)
    elif isinstance(kind, TokenizersVocabulary):
        names = {id: name for name, id in tokenizer.special.items()}
        ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        roles = {role: names[id] for role, id in ids.items() if id in names}
        config = tokenizer_config(**roles, add_bos_token=kind.adds_bos)
        return files | {"tokenizer.json": kind.json(), "tokenizer_config.json": config}
    if not kind.adds_bos:
        files["tokenizer_config.json"] = files.get("tokenizer_config.json", {}) | {"add_bos_token": False}
        if "tokenizer.json" in files:
            files["tokenizer.json"]["post_processor"] = None
    return files


def tokenizer_keys(tokenizer: Tokenizer, ends: Iterable[int]) -> dict[str, Any]:
    """The keys of a tokenizer. `ends` are the ids that end an answer. ValueError for a tokenizer that a GGUF file
    cannot hold."""
    kind, special = tokenizer.vocabulary, tokenizer.special
    if isinstance(kind, SentencePieceVocabulary):
        model = Model.of(kind.model.serialized_model_proto())
        if problem := model.problem() or ("it removes extra spaces" if model.removes_spaces else None):
            raise ValueError(f"a GGUF file cannot hold this SentencePiece model: {problem}")
        found = sentencepiece_keys(model.pieces, model.adds_space)
    elif isinstance(kind, TiktokenVocabulary):
        found = byte_pair_keys(byte_pair_files(kind)["tokenizer.json"], tokenizer.n_words)
    else:
        assert isinstance(kind, TokenizersVocabulary)
        found = byte_pair_keys(kind.json(), tokenizer.n_words)
    others = sorted({*ends} - {tokenizer.eos_id}, key=lambda id: id != special.get("<|eot_id|>"))
    if len(others) > 2:
        log.warning("a GGUF file cannot hold all ids that end an answer: it lacks %s", listed(others[2:]))
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "padding": tokenizer.pad_id}
    ids |= {"unknown": special.get("<unk>", -1), **dict(zip(("eot", "eom"), others, strict=False))}
    found |= {f"tokenizer.ggml.{role}_token_id": id for role, id in ids.items() if id >= 0}
    return found | {"tokenizer.ggml.add_bos_token": kind.adds_bos and tokenizer.bos_id >= 0}


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
