"""Code Llama's infilling: the prompt whose answer belongs between a prefix and a suffix."""

from __future__ import annotations

from .text import encode_inside
from .tokenizer import Tokenizer

NAMES = ("▁<PRE>", "▁<SUF>", "▁<MID>")  # ▁<EOT> ends the middle, and is among the tokenizer's eos_ids


def infilling_prompt(tokenizer: Tokenizer, prefix: str, suffix: str, suffix_first: bool = False) -> list[int]:
    """The ids for `Llama.generate`, in the order prefix, suffix, middle or suffix, prefix, middle (Rozière et al. 2023,
    "Code Llama", arXiv 2308.12950, section 2.3):

        BOS <PRE> prefix <SUF> suffix <MID>        BOS <PRE> <SUF> suffix <MID> prefix

    The suffix is encoded without the space that marks a first word. Raises ValueError for a tokenizer without these
    tokens.
    """
    model, special = tokenizer.sp_model, tokenizer.special
    ids = [model.piece_to_id(name) for name in NAMES] if model else [special[name] for name in NAMES if name in special]
    if len(ids) < len(NAMES) or (model and model.unk_id() in ids):
        raise ValueError("the tokenizer has no infilling tokens; use a Code Llama model that supports infilling")
    pre, suf, mid = ids
    begin, end = tokenizer.encode(prefix, bos=False, eos=False), encode_inside(tokenizer, suffix)
    if suffix_first:
        return [tokenizer.bos_id, pre, suf, *end, mid, *begin]
    return [tokenizer.bos_id, pre, *begin, suf, *end, mid]
