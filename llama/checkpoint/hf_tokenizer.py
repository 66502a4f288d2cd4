"""A SentencePiece model -> the files that Hugging Face's AutoTokenizer loads, with the same ids, or an error."""

from __future__ import annotations

import graphlib
import itertools
import json
import random
import re
import struct
import unicodedata
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

from sentencepiece import SentencePieceProcessor

from ..pre_tokenizer import added_token, byte_pair_json, post_processor, tokenizer_config

SPACE = "▁"
# Field numbers of ModelProto, TrainerSpec and NormalizerSpec, and types of pieces, in sentencepiece_model.proto.
PIECE, TRAINER, NORMALIZER, DENORMALIZER = 1, 2, 3, 5
MODEL_TYPE, TYPE_BPE, SUFFIX, BYTE_FALLBACK = 3, 2, 24, 35
NAME, CHARSMAP, DUMMY_PREFIX, REMOVE_SPACES, ESCAPE_SPACES = 1, 2, 3, 4, 5
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5


class Piece(NamedTuple):
    text: str
    score: float
    type: int


class Model(NamedTuple):
    """A parsed SentencePiece model; the values of a spec are by field number."""

    pieces: list[Piece]
    trainer: dict[int, Any]
    normalizer: dict[int, Any]
    denormalizer: dict[int, Any]

    @staticmethod
    def of(serialized: bytes) -> Model:
        parts: dict[int, list[bytes]] = defaultdict(list)
        for number, value in fields(serialized):
            parts[number].append(value)
        entries = [dict(fields(entry)) for entry in parts[PIECE]]
        pieces = [Piece(e[1].decode(), struct.unpack("<f", e.get(2, bytes(4)))[0], e.get(3, NORMAL)) for e in entries]
        return Model(pieces, *(dict(fields(parts.get(i, [b""])[0])) for i in (TRAINER, NORMALIZER, DENORMALIZER)))

    @property
    def adds_space(self) -> bool:
        """Whether a text is encoded with a space before it."""
        return bool(self.normalizer.get(DUMMY_PREFIX, True))

    @property
    def removes_spaces(self) -> bool:
        """Whether spaces around a text, and all but one of several, are removed."""
        return bool(self.normalizer.get(REMOVE_SPACES, True))

    def problem(self, *normalizations: str) -> str | None:
        """What no other format can express: it is not BPE, or has a normalization that is not among these."""
        if self.trainer.get(MODEL_TYPE, 1) != TYPE_BPE:
            return "it is not of type BPE"
        if self.trainer.get(SUFFIX):
            return "treat_whitespace_as_suffix is set"
        name = self.normalizer.get(NAME, b"").decode()
        return (
            f"its normalization is {name!r}" if self.normalizer.get(CHARSMAP) and name not in normalizations else None
        )


def fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The numbers and values of a protobuf message's fields: ints, or bytes of messages, strings and floats."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte, at = message[at], at + 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
        else:
            size = {1: 8, 5: 4}.get(key & 7) or varint()
            yield key >> 3, message[at : at + size]
            at += size


def tokenizer_files(sp: SentencePieceProcessor) -> dict[str, dict[str, Any]]:
    """tokenizer.json and tokenizer_config.json for a SentencePiece model, compared with it on generated texts.
    ValueError names what tokenizer.json cannot express. Only texts with control pieces, such as <s>, get other ids, as
    AutoTokenizer recognizes these."""
    model = Model.of(sp.serialized_model_proto())
    texts = [piece.text for piece in model.pieces]
    if problem := model.problem("nfkc", "nmt_nfkc"):
        refuse(problem)
    if model.denormalizer.get(CHARSMAP):
        refuse("it normalizes what it decodes")
    if unused := [piece.text for piece in model.pieces if piece.type == UNUSED]:
        refuse(f"it has unused pieces: {unused[:3]}")
    merges = merges_of(model.pieces)
    symbols = [piece.text for piece in model.pieces if piece.type == USER_DEFINED]
    roles = {"unk_token": sp.unk_id(), "bos_token": sp.bos_id(), "eos_token": sp.eos_id(), "pad_token": sp.pad_id()}
    names = {role: texts[id] for role, id in roles.items() if id >= 0}
    special = [i for i, piece in enumerate(model.pieces) if piece.type in (UNKNOWN, CONTROL)]
    content = byte_pair_json(
        {text: i for i, text in enumerate(texts)},
        [[merge.left, merge.right] for merge in merges],
        [added_token(i, texts[i]) for i in special],
        {
            "normalizer": {"type": "Sequence", "normalizers": normalizers(sp, model)},
            "pre_tokenizer": pre_tokenizer(symbols) if symbols else None,
            "post_processor": post_processor(texts[sp.bos_id()], sp.bos_id()) if sp.bos_id() >= 0 else None,
            "decoder": {"type": "Sequence", "decoders": decoders(model)},
        },
        unk_token=names["unk_token"],
        fuse_unk=True,
        byte_fallback=bool(model.trainer.get(BYTE_FALLBACK)),
        ignore_merges=bool(symbols),  # a user-defined piece has no merges
    )
    samples = (text for text in generated(model) if not any(texts[i] in text for i in special))
    if problem := difference(content, samples, sp.encode):
        refuse(problem)
    return {"tokenizer.json": content, "tokenizer_config.json": tokenizer_config(**names, model_max_length=4096)}


def refuse(problem: str) -> NoReturn:
    raise ValueError(f"tokenizer.json cannot express this SentencePiece model: {problem}")


class Merge(NamedTuple):
    score: float
    id: int
    left: str
    right: str


def merges_of(pieces: Sequence[Piece]) -> list[Merge]:
    """All ways to merge two pieces into a third, in SentencePiece's order: by falling score, and for equal scores the
    leftmost in the text first."""
    normal = {piece.text for piece in pieces if piece.type == NORMAL}
    symbols = {piece.text for piece in pieces if piece.type == USER_DEFINED}  # are never merged
    found = []
    for i, piece in enumerate(pieces):
        for cut in range(1, len(piece.text) if piece.type == NORMAL else 0):
            halves = piece.text[:cut], piece.text[cut:]
            missing = [half for half in halves if half not in normal]
            if not missing:
                found.append(Merge(piece.score, i, *halves))
            elif all(len(half) == 1 and half not in symbols for half in missing):
                refuse(f"its piece {piece.text!r} contains {missing[0]!r}, which is not a piece")
    found.sort(key=lambda merge: -merge.score)
    groups = (list(group) for _, group in itertools.groupby(found, key=lambda merge: merge.score))
    return [merge for group in groups for merge in leftmost_first(group)]


def leftmost_first(merges: list[Merge]) -> list[Merge]:
    """Sort merges of equal score so that each comes before those whose left half is its right half: in the text a b d,
    SentencePiece merges a b before b d. If no such order exists, or for more than 10,000 merges, as where all scores
    are equal, the order stays."""
    if len(merges) > 10_000:
        return merges
    ending = defaultdict[str, list[Merge]](list)
    for merge in merges:
        ending[merge.right].append(merge)
    # It keeps the order of the merges where it can.
    graph: graphlib.TopologicalSorter[Merge] = graphlib.TopologicalSorter(dict.fromkeys(merges, ()))
    for merge in merges:
        graph.add(merge, *(other for other in ending[merge.left] if other.id != merge.id))
    try:
        return [*graph.static_order()]
    except graphlib.CycleError:
        return merges


def replace(pattern: str, content: str, regex: bool = True) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex" if regex else "String": pattern}, "content": content}


def normalizers(sp: SentencePieceProcessor, model: Model) -> list[dict[str, Any]]:
    """The steps that normalize a text as SentencePiece does."""
    space = SPACE if model.normalizer.get(ESCAPE_SPACES, True) else " "
    found = nfkc(sp) if model.normalizer.get(CHARSMAP) else []
    if model.removes_spaces:
        if normalized(sp, [f"{SPACE} "]) == [" "]:  # if the normalization treats ▁ as a space
            found.append(replace(SPACE, " ", regex=False))
        found += [replace(rf"\A +|[ {space}]+\z", ""), replace(" {2,}", " ")]
    found.append(replace(" ", space, regex=False))
    return [*found, {"type": "Prepend", "prepend": space}] if model.adds_space else found


def normalized(sp: SentencePieceProcessor, texts: list[str]) -> list[str]:
    """Each text as SentencePiece normalizes it within a longer one."""
    found = (text.replace(SPACE, " ") for text in sp.normalize([f"0{text}0" for text in texts]))
    return [text[text.index("0") + 1 : text.rindex("0")] for text in found]


def nfkc(sp: SentencePieceProcessor) -> list[dict[str, Any]]:
    """NFKC with SentencePiece's exceptions, which are found by normalizing every character. Hugging Face's Precompiled
    normalizer, which takes SentencePiece's table, misses or drops characters with combining marks."""
    assigned = (c for c in map(chr, range(1, 0x110000)) if unicodedata.category(c) not in ("Cn", "Co", "Cs"))
    every = [character for character in assigned if character != SPACE]
    before: dict[str, str] = defaultdict(str)  # new text -> characters that it replaces before NFKC
    kept: dict[str, str] = {}  # character that NFKC would change in another way -> new text
    for character, wanted in zip(every, normalized(sp, every), strict=True):
        usual = unicodedata.normalize("NFKC", character)
        if wanted != usual == character:
            before[wanted] += character
        elif wanted != usual:
            kept[character] = wanted
    places = {character: chr(0x100000 + i) for i, character in enumerate(kept)}  # private-use characters
    marks: dict[int, str] = defaultdict(str)
    for character in filter(unicodedata.combining, every):
        marks[unicodedata.combining(character)] += character
    # NFKC sorts marks and joins them to characters that are joined already. SentencePiece does neither, and a
    # noncharacter before the mark prevents both.
    pairs = [("".join(marks[high] for high in marks if high > low), marks[low]) for low in marks if low < max(marks)]
    joined = "".join(character for character in every if len(unicodedata.normalize("NFKD", character)) > 1)
    pairs.append((joined, "".join(marks.values())))
    apart = "|".join(f"(?<={char_class(first)})(?={char_class(second)})" for first, second in pairs)
    return [
        *(replace(char_class(found), wanted) for wanted, found in before.items()),
        *(replace(character, place, regex=False) for character, place in places.items()),
        replace(apart, "\ufdd0"),
        {"type": "NFKC"},
        replace("\ufdd0", "", regex=False),
        *(replace(place, kept[character], regex=False) for character, place in places.items()),
    ]


def char_class(characters: str) -> str:
    """A regular expression's class of characters, in ranges."""
    ranges: list[list[int]] = []
    for code in sorted(map(ord, characters)):
        if ranges and code == ranges[-1][1] + 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "[" + "".join(f"\\x{{{first:X}}}-\\x{{{last:X}}}" for first, last in ranges) + "]"


def pre_tokenizer(symbols: Sequence[str]) -> dict[str, Any]:
    """Split off user-defined pieces, and the < of a text that is spelled like a byte piece, such as <0x41>."""
    either = "|".join(re.escape(symbol) for symbol in sorted(symbols, key=len, reverse=True))
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    patterns = (either, r"\A<(?=0x[0-9A-F]{2}>\z)")
    return {"type": "Sequence", "pretokenizers": [{**split, "pattern": {"Regex": regex}} for regex in patterns]}


def decoders(model: Model) -> list[dict[str, Any]]:
    """The steps that turn tokens into text. The first space is stripped if encoding adds one, and all leading spaces if
    it removes them."""
    count = 1000 if model.removes_spaces else int(model.adds_space)
    first = {"type": "Strip", "content": " ", "start": count, "stop": 0}
    return [replace(SPACE, " ", regex=False), {"type": "ByteFallback"}, {"type": "Fuse"}, *([first] if count else [])]


WORDS = (
    "the fox naïve Ångström Việt Nam ﬁne ①② Ⅳ ½ ㎏ x² ™ Ｆｕｌｌ～ ｶﾞｷﾞ がぎ 한국어 你好 مُحَمَّد ش\u0651\u064e שָׁלוֹם ज़रा น้ำ"
    " й Ελλάδα ß ﬁ\u0301 é\u0323 <0x41> [INST] <<SYS>> 12 3.14 don't 🙂 👩‍👩‍👧 a\u200bb \ufeffx … “q” – \u00a0 \u3000z"
)
SPACES = ["", "", " ", " ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", SPACE]


def generated(model: Model) -> Iterator[str]:
    """Texts on which two tokenizers may differ: each piece, alone and after another, overlapping pieces of equal score,
    and random sequences of pieces, words of several scripts and spaces."""
    rng = random.Random(0)
    symbols = [piece.text for piece in model.pieces if piece.type == USER_DEFINED]
    pieces = [piece.text for piece in model.pieces if piece.type in (NORMAL, USER_DEFINED)]
    for text in pieces:
        yield text.replace(SPACE, " ")
        yield rng.choice(symbols or pieces) + text
    by_score: dict[float, list[str]] = defaultdict(list)
    for piece in model.pieces:
        if piece.type == NORMAL and len(piece.text) > 1:
            by_score[piece.score].append(piece.text)
    for equal in by_score.values():
        some = rng.sample(equal, min(len(equal), 100))
        for first, second in itertools.permutations(some, 2):
            yield from (first + second[i:] for i in range(1, len(second)) if first.endswith(second[:i]))
    words = WORDS.split(" ") + symbols * 9
    words += [unicodedata.normalize(form, word) for word in words for form in ("NFC", "NFD", "NFKC", "NFKD")]
    for _ in range(3000):
        parts = [rng.choice(rng.choice((words, words, pieces))) + rng.choice(SPACES) for _ in range(rng.randrange(9))]
        yield rng.choice(SPACES) + "".join(parts)


def difference(tokenizer: dict[str, Any], texts: Iterable[str], encode: Callable[[str], list[int]]) -> str | None:
    """An error message with the first text to which tokenizer.json gives other ids than `encode`; None if there is
    none, or, with a warning, if the package tokenizers is missing."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        warnings.warn("tokenizer.json is not compared with the original: pip install tokenizers", stacklevel=2)
        return None
    theirs = Tokenizer.from_str(json.dumps(tokenizer))
    for text in texts:
        ours, found = encode(text), theirs.encode(text, add_special_tokens=False).ids
        if ours != found:
            return f"{text!r} would be {found} instead of {ours}"
    return None
