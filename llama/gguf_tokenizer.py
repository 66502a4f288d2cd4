"""The tokenizer in a GGUF file's keys <-> what its own file holds: a SentencePiece model, or a tokenizer.json."""

from __future__ import annotations

import logging
import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from .pre_tokenizer import GPT2, LLAMA3, PRE_TOKENIZERS, added_token, byte_pair_json, post_processor, steps_of

log = logging.getLogger(__name__)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of tokens, as SentencePiece numbers them too

USUAL_IDS = {"unknown": 0, "bos": 1, "eos": 2}  # of SentencePiece models, where the file has no key
ROLES = ("bos", "eos", "eot", "eom")
MARKER = re.compile(r"<\|.+\|>|</?s>")  # tokens that mark parts of a dialog or of a text
# Tokens that end a message in the formats of one model or another.
ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>")


def tokens_of(keys: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """The tokens and their types. ValueError where they are missing or damaged."""
    tokens, given = keys.get("tokenizer.ggml.tokens"), keys.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise ValueError("it has no tokens under tokenizer.ggml.tokens")
    if given is None:
        given = [BYTE if re.fullmatch("<0x[0-9A-F]{2}>", token) else NORMAL for token in tokens]
    if not isinstance(given, list) or len(given) != len(tokens) or not {*given} <= {*range(1, 7)}:
        raise ValueError(f"tokenizer.ggml.token_type must be a type from 1 to 6 of each of {len(tokens)} tokens")
    # Converters disagree on the type of markers, which text must never become: they are control tokens here.
    roles = {id_of(keys, role) for role in ROLES}
    types = [
        CONTROL if id in roles or kind == UNKNOWN or (kind == USER_DEFINED and MARKER.fullmatch(token)) else kind
        for id, (kind, token) in enumerate(zip(given, tokens, strict=True))
    ]
    if (unknown := id_of(keys, "unknown")) >= 0:
        types[unknown] = UNKNOWN
    return tokens, types


def id_of(keys: Mapping[str, Any], role: str) -> int:
    """The id of a special token such as bos; -1 if there is none. ValueError for an id outside the vocabulary."""
    key, count = f"tokenizer.ggml.{role}_token_id", len(keys["tokenizer.ggml.tokens"])
    usual = USUAL_IDS if keys.get("tokenizer.ggml.model") == "llama" else {}
    id = keys.get(key, usual.get(role, -1))
    if type(id) is not int or not -1 <= id < count:
        raise ValueError(f"{key} is {id!r}; there are {count} tokens")
    return id


def sentencepiece_model(keys: Mapping[str, Any], pieces: Sequence[str], types: Sequence[int]) -> bytes:
    """A SentencePiece model file (a protobuf message) of pieces, their types, and the scores in `keys`."""
    scores = keys.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(pieces) or not {*map(type, scores)} <= {int, float}:
        raise ValueError(f"tokenizer.ggml.scores must be a number for each of {len(pieces)} tokens")
    parts = [
        field(1, field(1, piece.encode()) + field(2, float(score)) + field(3, kind))
        for piece, score, kind in zip(pieces, scores, types, strict=True)
    ]
    trainer = field(3, 2) + field(4, len(pieces)) + field(35, int(BYTE in types))  # BPE, and whether bytes are pieces
    for i, role in enumerate(("unknown", "bos", "eos", "padding")):
        id = id_of(keys, role)
        trainer += field(40 + i, id) + (field(45 + i, pieces[id].encode()) if id >= 0 else b"")
    space = bool(keys.get("tokenizer.ggml.add_space_prefix", True))
    normalizer = field(1, b"identity") + field(3, int(space)) + field(4, 0) + field(5, 1)
    return b"".join(parts) + field(2, trainer) + field(3, normalizer)


def field(number: int, value: int | float | bytes) -> bytes:
    """A field of a protobuf message: an int, a float, or the bytes of a string or of a message."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value % 2**64)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def byte_pair_tokenizer(keys: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> dict[str, Any]:
    """The content of a tokenizer.json of byte pairs in GPT-2's spelling. ValueError for an unknown pre-tokenizer."""
    bos = id_of(keys, "bos")
    pre, merges = keys.get("tokenizer.ggml.pre"), keys.get("tokenizer.ggml.merges")
    if pre is None:
        log.warning("the file does not say how its tokenizer splits text: ids may be others than the model knows")
        pre = "default"
    if not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
        raise ValueError(f"tokenizer.ggml.pre is {pre!r}; known are {', '.join(PRE_TOKENIZERS)}")
    if not isinstance(merges, list) or not all(isinstance(merge, str) and merge.count(" ") == 1 for merge in merges):
        raise ValueError("tokenizer.ggml.merges must be pairs of tokens")
    vocab = {token: id for id, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        raise ValueError("tokenizer.ggml.tokens has a token twice")
    added = [(id, kind) for id, kind in enumerate(types) if kind in (UNKNOWN, CONTROL, USER_DEFINED)]
    steps = {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[pre]},
        "post_processor": post_processor(tokens[bos], bos) if bos >= 0 and adds_bos(keys) else None,
        "decoder": GPT2,
    }
    return byte_pair_json(
        vocab,
        [merge.split(" ") for merge in merges],
        [added_token(id, tokens[id], kind != USER_DEFINED) for id, kind in added],
        steps,
        ignore_merges=PRE_TOKENIZERS[pre] is LLAMA3,
    )


def adds_bos(keys: Mapping[str, Any]) -> bool:
    """Whether BOS goes before a text; without a key that says so, llama.cpp's default."""
    llama2, pre = keys.get("tokenizer.ggml.model") == "llama", keys.get("tokenizer.ggml.pre", "")
    return bool(keys.get("tokenizer.ggml.add_bos_token", llama2 or PRE_TOKENIZERS.get(pre) is LLAMA3))


def sentencepiece_keys(pieces: Sequence[tuple[str, float, int]], space: bool) -> dict[str, Any]:
    """The GGUF keys of a SentencePiece model, from the text, score and type of each piece, and whether it adds a space
    before a text."""
    texts, scores, types = ([*part] for part in zip(*pieces, strict=True))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_space_prefix": space,
    }


def byte_pair_keys(content: Mapping[str, Any], n_words: int) -> dict[str, Any]:
    """The GGUF keys of a tokenizer.json. ValueError for one that GGUF cannot describe."""
    model, steps, normalizer = content["model"], steps_of(content.get("pre_tokenizer")), content.get("normalizer")
    names = [name for name, known in PRE_TOKENIZERS.items() if steps == steps_of({"pretokenizers": known})]
    added = {token["id"]: token for token in content["added_tokens"]}
    odd = [t["content"] for t in added.values() if t.get("lstrip") or t.get("rstrip") or t.get("single_word")]
    whole_words, ignores = bool(names) and PRE_TOKENIZERS[names[0]] is LLAMA3, bool(model.get("ignore_merges"))
    problems = {
        f"it is of type {model.get('type')}": model.get("type") != "BPE",
        f"its normalizer is {normalizer}": normalizer and normalizer.get("normalizers") != [],
        f"it splits text by {steps}": not names,
        f"ignore_merges is {'set' if ignores else 'not set'}": ignores != whole_words,
        f"tokens such as {odd[:1]} take in spaces": odd,
    }
    if found := [problem for problem, holds in problems.items() if holds]:
        raise ValueError(f"a GGUF file cannot hold this tokenizer: {found[0]}")
    texts = {id: text for text, id in model["vocab"].items()} | {id: token["content"] for id, token in added.items()}
    types = {id: CONTROL if token["special"] else USER_DEFINED for id, token in added.items()}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": names[0],
        "tokenizer.ggml.tokens": [texts.get(id, f"[PAD{id}]") for id in range(n_words)],
        "tokenizer.ggml.token_type": [types.get(id, NORMAL if id in texts else UNUSED) for id in range(n_words)],
        "tokenizer.ggml.merges": merges,
    }
