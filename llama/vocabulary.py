"""The contents of tokenizer files: how text becomes token ids, and the text of each id."""

from __future__ import annotations

import base64
import binascii
import codecs
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sentencepiece import SentencePieceProcessor

from . import gguf_tokenizer
from .gguf import read_gguf
from .pre_tokenizer import LLAMA3, LLAMA3_PATTERN, steps_of, unicode_to_bytes
from .textfile import read_json, read_optional_json

EACH = "llama.each"  # U+FFFD for each byte, as SentencePiece has it; "replace" has one for several
codecs.register_error(EACH, lambda error: ("\ufffd" * (error.end - error.start), error.end))  # type: ignore[attr-defined]

# The special tokens of Llama 3.1 to 3.3, whose ids follow the ranks; Llama 3 has three of them reserved.
RESERVED = [f"<|reserved_special_token_{i}|>" for i in range(248)]
LLAMA3_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", *RESERVED[:2], "<|finetune_right_pad_id|>", RESERVED[2]]
LLAMA3_SPECIAL += ["<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"]
LLAMA3_SPECIAL += RESERVED[3:]
EOS_TOKENS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")  # end a text, a message before a tool's result, a turn
INFILLING_END = "▁<EOT>"  # ends Code Llama's infilling
BLOCK, RUN = 400_000, 25_000  # most characters of one call of the regular expression, and of one run of a kind


class Vocabulary:
    """A tokenizer's file, opened."""

    n_words: int
    bos_id: int  # -1 if there is none
    eos_id: int
    pad_id = -1
    eos_ids: set[int]  # all that end an answer
    adds_bos = True  # whether BOS goes before a text
    special: dict[str, int]  # tokens that no text is encoded to
    added: Mapping[int, str] = MappingProxyType({})  # other tokens that text is split at before it is encoded
    errors = "replace"  # error handler for bytes that are not UTF-8
    drops = 0  # leading spaces that decoding removes: 0 none, 1 one, 2 all

    def encode(self, text: str) -> list[int]:
        """The ids of a text. Text that spells a special token stays text."""
        raise NotImplementedError

    def encode_special(self, text: str) -> list[int]:
        """See `Tokenizer.encode_special`. Here each text between special or added tokens is encoded alone."""
        ids = self.ids()
        parts = re.split(f"({any_of(ids).pattern})", text)
        return [id for part in parts for id in ([ids[part]] if part in ids else self.encode(part))]

    def ids(self) -> dict[str, int]:
        """The ids by name of special and added tokens."""
        return {**self.special, **{name: id for id, name in self.added.items()}}

    def id_to_piece(self, id: int) -> str | bytes:
        """Text, in which ▁ is a space; or bytes, which may be part of a character."""
        raise NotImplementedError


def any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the names, the longest that fits."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")


class SentencePieceVocabulary(Vocabulary):
    """tokenizer.model of Llama 2: BPE of characters with byte fallback, so that any text can be encoded."""

    errors = EACH

    def __init__(self, model: SentencePieceProcessor) -> None:
        self.model = model
        self.n_words, self.pad_id = model.vocab_size(), model.pad_id()
        self.bos_id, self.eos_id = model.bos_id(), model.eos_id()
        end = model.piece_to_id(INFILLING_END)
        self.eos_ids = ({self.eos_id} if end == model.unk_id() else {self.eos_id, end}) - {-1}
        special = [id for id in range(self.n_words) if model.is_control(id) or model.is_unknown(id)]
        self.special = {model.id_to_piece(id): id for id in special}
        # SentencePiece does not expose how it decodes, so it is tried: the text of <unk>, and how many of two leading
        # spaces are dropped. 1: the space that encoding adds to a first word; 2: all; 0: none.
        self.unknown: str = model.decode([model.unk_id()])
        ids, piece = [model.piece_to_id("▁"), *range(self.n_words)], model.id_to_piece
        space = next((id for id in ids if piece(id).startswith("▁")), None)
        self.drops = 0 if space is None else 2 * len(piece(space)) - len(model.decode([space, space]))

    @staticmethod
    def from_file(path: Path) -> SentencePieceVocabulary:
        try:
            return SentencePieceVocabulary(SentencePieceProcessor(model_file=str(path)))
        except (RuntimeError, OSError) as error:
            size = path.stat().st_size
            kinds = "a SentencePiece model, or ranks as tiktoken reads them, or tokenizer.json"
            raise ValueError(f"{path} ({size} bytes) is not {kinds}: {error}") from error

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text)

    def id_to_piece(self, id: int) -> str | bytes:
        piece: str = self.model.id_to_piece(id)
        if self.model.is_byte(id):
            return bytes([int(piece[1:-1], 16)])  # <0xE4>
        if self.model.is_control(id):
            return ""
        return self.unknown if self.model.is_unknown(id) else piece


class TiktokenVocabulary(Vocabulary):
    """Llama 3's tokenizer: BPE of bytes, which merges in the order of ids."""

    def __init__(
        self, ranks: Mapping[bytes, int], special: Mapping[str, int], names: Mapping[str, str] | None = None
    ) -> None:
        import tiktoken

        self.ranks, self.special = dict(ranks), dict(special)
        self.encoding = tiktoken.Encoding(
            "llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=self.ranks, special_tokens=self.special
        )
        self.n_words = len(self.ranks) + len(self.special)
        bos, eos = ((names or {}).get(role, "") for role in ("bos_token", "eos_token"))  # named by the folder's files
        self.bos_id = self.special.get(bos, self.special["<|begin_of_text|>"])
        self.eos_id = self.special.get(eos, self.special["<|end_of_text|>"])
        self.eos_ids = {self.eos_id, *(self.special[name] for name in EOS_TOKENS if name in self.special)}
        self.bytes = {id: token for token, id in self.ranks.items()}

    @staticmethod
    def from_file(path: Path) -> TiktokenVocabulary:
        """tokenizer.model: a line for each token, its bytes in base64 and its rank, which is its id."""
        ranks: dict[bytes, int] = {}
        for number, line in enumerate(path.read_bytes().split(b"\n")):
            try:
                if line:
                    token, rank = line.split()
                    ranks[base64.b64decode(token, validate=True)] = int(rank)
            except (ValueError, binascii.Error) as error:
                raise ValueError(f"{path}: line {number + 1} is not a token in base64 and its rank") from error
        if not are_complete(ranks):
            raise ValueError(
                f"{path} must have every byte, and every rank from 0 to {len(ranks) - 1} once; download it again"
            )
        return TiktokenVocabulary(ranks, {name: len(ranks) + i for i, name in enumerate(LLAMA3_SPECIAL)})

    def encode(self, text: str) -> list[int]:
        return [id for part in parts(text) for id in self.encoding.encode_ordinary(part)]

    def id_to_piece(self, id: int) -> bytes:
        return self.bytes.get(id, b"")


def parts(text: str) -> Iterator[str]:
    """Split a text into parts that are encoded alone, as Meta does: the regular expression fails on very long runs."""
    for begin in range(0, len(text), BLOCK):
        block, start = text[begin : begin + BLOCK], 0
        for run in re.finditer(rf"\s{{{RUN + 1},}}|\S{{{RUN + 1},}}", block):
            for cut in range(run.start() + RUN, run.end(), RUN):
                yield block[start:cut]
                start = cut
        yield block[start:]


def tokenizer_json(
    path: Path, content: Mapping[str, Any], names: Mapping[str, str], vocab_size: Any = None
) -> Vocabulary:
    """The vocabulary of a tokenizer.json's content. Llama 3's is read as tiktoken's, since the ids of its tokens are
    their ranks; any other needs Hugging Face's package tokenizers. `names` is from `special_names`. Added padding
    tokens with ids from `vocab_size` on, for which the weights have no rows, are left out. ValueError if the content is
    not that of a tokenizer.json."""
    try:
        vocab, added = content["model"]["vocab"], content.get("added_tokens") or []
        if type(vocab_size) is int:
            added = [token for token in added if token["id"] < vocab_size or "pad" not in token["content"].lower()]
        content = {**content, "added_tokens": added}
        special = {token["content"]: token["id"] for token in added}
        if not all(type(name) is str and type(id) is int for name, id in special.items()):
            raise TypeError("an added token without a text or an id")
        ranks = llama3_ranks(content, {name: id for name, id in vocab.items() if name not in special})
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a tokenizer.json: {error!r}") from error
    if ranks and {"<|begin_of_text|>", "<|end_of_text|>"} <= {*special} and all(token["special"] for token in added):
        found = TiktokenVocabulary(ranks, special, names)
        begins = '"SpecialToken"' in json.dumps(content.get("post_processor"))
        found.adds_bos = begins or names.get("add_bos_token") != "False"
        return found
    return TokenizersVocabulary(path, content, names)


def llama3_ranks(content: Mapping[str, Any], vocab: Mapping[str, int]) -> dict[bytes, int] | None:
    """The ranks in a tokenizer.json of Llama 3's form; None for any other."""
    if steps_of(content.get("pre_tokenizer")) != steps_of({"pretokenizers": LLAMA3}):
        return None
    bytes_of = unicode_to_bytes()
    if content.get("normalizer") or not content["model"].get("ignore_merges") or not {*"".join(vocab)} <= {*bytes_of}:
        return None
    ranks = {bytes(map(bytes_of.__getitem__, text)): id for text, id in vocab.items()}
    return ranks if are_complete(ranks) else None


def are_complete(ranks: Mapping[bytes, int]) -> bool:
    """Whether every byte has a rank, and every rank from 0 on occurs once."""
    return sorted(ranks.values()) == [*range(len(ranks))] and all(bytes([i]) in ranks for i in range(256))


class TokenizersVocabulary(Vocabulary):
    """Any other tokenizer.json, encoded by the package tokenizers. Ids are decoded by this class, piece by piece."""

    def __init__(self, path: Path, content: Mapping[str, Any], names: Mapping[str, str]) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise ValueError(f"{path} needs the package tokenizers: pip install tokenizers") from error
        roles = {names.get("bos_token"), names.get("eos_token")}  # are special, whatever the file says
        tokens = [t | {"special": t["special"] or t["content"] in roles} for t in content["added_tokens"]]
        # Truncation and padding are set for training, and saved in the file.
        content = {**content, "added_tokens": tokens, "truncation": None, "padding": None}
        try:  # two, as threads may encode a text and a template at once
            self.tokenizer, self.parsing = (tokenizers.Tokenizer.from_str(json.dumps(content)) for _ in range(2))
        except Exception as error:  # the package raises no other type
            raise ValueError(f"{path} is not a tokenizer.json: {error}") from error
        self.tokenizer.encode_special_tokens = True  # text that spells <s> stays text
        self.n_words = self.tokenizer.get_vocab_size()
        decoder = json.dumps(content.get("decoder"))
        self.characters = unicode_to_bytes() if '"ByteLevel"' in decoder else None
        self.errors = EACH if '"ByteFallback"' in decoder else "replace"
        self.drops = int('"Strip"' in decoder or ('"Metaspace"' in decoder and '"never"' not in decoder))
        # Where the file leaves ids out, the package numbers the tokens behind them anew.
        added = [(t["content"], self._id(t["content"]), t["special"]) for t in tokens]
        self.special = {name: id for name, id, special in added if special}
        self.added = {id: name for name, id, special in added if not special}
        self.bos_id = self._id(names.get("bos_token"), "<s>", "<|begin_of_text|>")
        self.eos_id = self._id(names.get("eos_token"), "</s>", "<|end_of_text|>", "<|endoftext|>")
        ends = {self.special[name] for name in (*EOS_TOKENS, INFILLING_END) if name in self.special}
        self.eos_ids = {self.eos_id, *ends} - {-1}
        begins = self.tokenizer.encode("").ids[:1] == [self.bos_id]  # by the file's post-processor
        self.adds_bos = begins or names.get("add_bos_token", "") == "True"

    def json(self) -> dict[str, Any]:
        """The content of the file."""
        found: dict[str, Any] = json.loads(self.tokenizer.to_str())
        return found

    def _id(self, *names: str | None) -> int:
        ids = (self.tokenizer.token_to_id(name) for name in names if name)
        return next((id for id in ids if id is not None), -1)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_special(self, text: str) -> list[int]:
        return self.parsing.encode(text, add_special_tokens=False).ids

    def id_to_piece(self, id: int) -> str | bytes:
        piece = self.tokenizer.id_to_token(id)
        if piece is None or piece in self.special:
            return b"" if self.characters else ""
        if id in self.added:
            return self.added[id]
        if self.characters and {*piece} <= {*self.characters}:
            return bytes(self.characters[character] for character in piece)
        if self.errors == EACH and re.fullmatch("<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[1:-1], 16)])
        return piece


def special_names(folder: Path) -> dict[str, str]:
    """bos_token, eos_token, unk_token, pad_token and add_bos_token ("True" or "False"), where the files beside
    tokenizer.json have them."""
    found = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        content = read_optional_json(folder / name)
        for role in ("bos_token", "eos_token", "unk_token", "pad_token"):
            token = content.get(role)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str) and token:
                found[role] = token
        usual = True if "Llama" in str(content.get("tokenizer_class")) else None
        if (adds := content.get("add_bos_token", usual)) is not None:
            found["add_bos_token"] = str(adds)
    return found


def gguf_vocabulary(path: Path) -> Vocabulary:
    """The tokenizer in a GGUF file. ValueError names what is missing or not supported."""
    keys = read_gguf(path).keys
    try:
        kind = keys.get("tokenizer.ggml.model")
        tokens, types = gguf_tokenizer.tokens_of(keys)
        ids = {role: gguf_tokenizer.id_of(keys, role) for role in gguf_tokenizer.ROLES}
        if kind == "llama":
            model = gguf_tokenizer.sentencepiece_model(keys, tokens, types)
            found: Vocabulary = SentencePieceVocabulary(SentencePieceProcessor(model_proto=model))
        elif kind == "gpt2":
            names = {f"{role}_token": tokens[id] for role, id in ids.items() if id >= 0}
            found = tokenizer_json(path, gguf_tokenizer.byte_pair_tokenizer(keys, tokens, types), names)
        else:
            raise ValueError(f"tokenizer.ggml.model is {kind!r}; llama and gpt2 are supported")
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: {error}") from error
    found.bos_id, found.eos_id, found.adds_bos = ids["bos"], ids["eos"], gguf_tokenizer.adds_bos(keys)
    named = {found.special[name] for name in gguf_tokenizer.ENDS if name in found.special}
    found.eos_ids = (named | {ids["eos"], ids["eot"], ids["eom"]}) - {-1}
    if kind == "llama":  # SentencePiece does not expose them
        found.added = {id: token for id, token in enumerate(tokens) if types[id] == gguf_tokenizer.USER_DEFINED}
    return found


def open_vocabulary(path: Path) -> Vocabulary:
    """The tokenizer in a file of any kind, recognized by how it begins."""
    with path.open("rb") as file:
        start = file.read(200).removeprefix(codecs.BOM_UTF8).lstrip()
    if start.startswith(b"GGUF"):
        return gguf_vocabulary(path)
    if start.startswith(b"{"):
        size = read_optional_json(path.with_name("config.json")).get("vocab_size")
        return tokenizer_json(path, read_json(path), special_names(path.parent), size)
    tiktoken = re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", start)
    found = TiktokenVocabulary.from_file(path) if tiktoken else SentencePieceVocabulary.from_file(path)
    found.adds_bos = special_names(path.parent).get("add_bos_token") != "False"
    return found
