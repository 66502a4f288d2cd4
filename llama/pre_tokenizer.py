"""What tokenizer.json and tokenizer_config.json hold: pre-tokenization of published tokenizers, byte pairs, tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

LLAMA3_PATTERN = (  # in the syntax of the package regex
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Steps as tokenizer.json has them.
SPLIT = {"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated", "invert": False}
GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
BYTES = {**GPT2, "use_regex": False}
LLAMA3 = [SPLIT, BYTES]
DEFAULT = [
    *({**SPLIT, "pattern": {"Regex": pattern}} for pattern in (
        r"[\p{P}\$\+<=>\^~\|]+",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
        r"\p{N}+",
        r"[0-9][0-9][0-9]",
    )),
    BYTES,
]  # fmt: skip
# GGUF's tokenizer.ggml.pre -> the steps.
PRE_TOKENIZERS = {
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "gpt-2": [GPT2],
    "default": DEFAULT,
    "smollm": [DIGITS, GPT2],
    "starcoder": [DIGITS, GPT2],
    "refact": [DIGITS, GPT2],
}


def steps_of(pre_tokenizer: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a tokenizer.json's pre_tokenizer, without trim_offsets, which does not change tokens."""
    found = pre_tokenizer or {}
    steps = found.get("pretokenizers") or [found]
    return [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]


def unicode_to_bytes() -> dict[str, int]:
    """The characters that stand for bytes in GPT-2's files: a printable byte's own, else one from U+0100 on."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def added_token(id: int, content: str, special: bool = True) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id, "content": content, **flags, "special": special}


def post_processor(bos: str, id: int) -> dict[str, Any]:
    """BOS before each text."""
    first, second = (
        [{"SpecialToken": {"id": bos, "type_id": i}}, {"Sequence": {"id": name, "type_id": i}}]
        for i, name in enumerate("AB")
    )
    special = {bos: {"id": bos, "ids": [id], "tokens": [bos]}}
    return {"type": "TemplateProcessing", "single": first, "pair": first + second, "special_tokens": special}


def byte_pair_json(
    vocab: Mapping[str, int],
    merges: Sequence[Sequence[str]],
    added: Sequence[Mapping[str, Any]],
    steps: Mapping[str, Any],
    **settings: Any,
) -> dict[str, Any]:
    """A tokenizer.json of byte pairs. `steps` has what is done before and after, `settings` are the model's."""
    usual = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    none = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    model = {"type": "BPE", **dict.fromkeys(none), **usual, **settings, "vocab": vocab, "merges": merges}
    parts = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return {"version": "1.0", **parts, **steps, "added_tokens": added, "model": model}


def tokenizer_config(**entries: Any) -> dict[str, Any]:
    """The content of tokenizer_config.json."""
    inputs = ["input_ids", "attention_mask"]
    fixed = {"clean_up_tokenization_spaces": False, "model_input_names": inputs}
    return {"tokenizer_class": "PreTrainedTokenizerFast", **entries, **fixed}
