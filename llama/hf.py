"""Hugging Face's names and layout <-> Meta's. Pure functions; nothing here opens a file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

# Meta's name -> Hugging Face's, of a whole model and of the inside of a layer.
OUTSIDE = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
INSIDE = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
# What a Llama's config.json may say that this library cannot compute, and the values it can.
COMPUTED = {
    "model_type": ("llama",),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "rope_scaling": (None,),
    "quantization_config": (None,),
}


def names(n_layers: int) -> dict[str, str]:
    """Meta's name of every parameter -> Hugging Face's."""
    table = {f"{meta}.weight": f"{theirs}.weight" for meta, theirs in OUTSIDE.items()}
    for i in range(n_layers):
        table |= {f"layers.{i}.{meta}.weight": f"model.layers.{i}.{theirs}.weight" for meta, theirs in INSIDE.items()}
    return table


def is_rotated(name: str) -> bool:
    """Whether a weight (by Meta's name) makes vectors that rotary embedding turns, whose rows are in another order."""
    return name.split(".")[-2] in ("wq", "wk")


def to_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of whole heads of q_proj or k_proj -> wq's or wk's. Rotary embedding turns element i with i + D/2 there and
    2i with 2i + 1 here: for D = 6, rows 0 1 2 3 4 5 are theirs in the order 0 3 1 4 2 5."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def to_halves(weight: Tensor, head_dim: int) -> Tensor:
    """The reverse of `to_pairs`."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def params(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json -> what params.json would say. ValueError names what is not Llama 2's architecture."""
    for key, allowed in COMPUTED.items():
        if (value := config.get(key, allowed[0])) not in allowed:
            raise ValueError(f"{key} {value!r} is not supported; only {allowed[0]!r} is")
    rope = config.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"rope_parameters {rope!r} are not an object of keys and values")
    if (kind := rope.get("rope_type", "default")) != "default":
        raise ValueError(f"rope_parameters with rope_type {kind!r} are not supported; only 'default' is")
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    if missing := [key for key in needed if key not in config]:
        raise ValueError(f"lacks the keys {', '.join(missing)}")
    for key in (*needed, "num_key_value_heads"):
        value = config.get(key)
        if (type(value) is not int or value < 1) and (key in needed or value is not None):
            raise ValueError(f"{key} is {value!r}, not a positive whole number")
    dim, layers, heads, hidden, vocab = (config[key] for key in needed)
    if config.get("head_dim") not in (None, dim / heads):
        raise ValueError(f"head_dim {config['head_dim']} is not hidden_size {dim} / num_attention_heads {heads}")
    result = {"dim": dim, "n_layers": layers, "n_heads": heads}
    if (kv_heads := config.get("num_key_value_heads") or heads) != heads:
        result["n_kv_heads"] = kv_heads
    result |= ffn_params(dim, hidden)
    result |= {"norm_eps": config.get("rms_norm_eps", 1e-6), "vocab_size": vocab}
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    return result if theta == 10000.0 else {**result, "rope_theta": theta}


def ffn_params(dim: int, hidden: int) -> dict[str, Any]:
    """multiple_of and ffn_dim_multiplier that make a feed-forward layer of `hidden` units: those of a published model
    if one fits."""
    base = int(2 * 4 * dim / 3)
    for multiple, factor in ((256, None), (4096, 1.3), (1024, 1.3), (hidden, None), (hidden, hidden / base)):
        width = base if factor is None else int(factor * base)
        if multiple * math.ceil(width / multiple) == hidden:
            return {"multiple_of": multiple} | ({} if factor is None else {"ffn_dim_multiplier": factor})
    raise AssertionError("the last pair always fits")


def config(params: Mapping[str, Any], hidden: int, vocab_size: int, dtype: str) -> dict[str, Any]:
    """params.json -> config.json of a model with `hidden` units in its feed-forward layers."""
    heads = params["n_heads"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": params["dim"],
        "intermediate_size": hidden,
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": params.get("n_kv_heads") or heads,
        "head_dim": params["dim"] // heads,
        "hidden_act": "silu",
        "rms_norm_eps": params["norm_eps"],
        "rope_theta": params.get("rope_theta", 10000.0),
        "rope_scaling": None,
        "max_position_embeddings": 4096,
        "vocab_size": vocab_size,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": dtype,
    }


def tokenizer_files(pieces: list[str]) -> dict[str, dict[str, Any]]:
    """The files that AutoTokenizer loads, for a SentencePiece BPE model with Llama 2's settings whose `pieces` are in
    the order of ids: unk, bos, eos, 256 bytes, merged pieces from the first merge on, and single characters."""
    ids = {piece: i for i, piece in enumerate(pieces)}
    # A merge is any division of a piece into two others; SentencePiece joins the pair whose result has the lowest id.
    merges = [
        (piece[:i], piece[i:])
        for piece in pieces[259:]
        for i in range(1, len(piece))
        if piece[:i] in ids and piece[i:] in ids
    ]
    special = [{"id": i, "content": pieces[i], "special": True} for i in range(3)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    bos, text = {"SpecialToken": {"id": pieces[1], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [token | flags for token in special],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, text],
            "pair": [
                bos,
                text,
                {"SpecialToken": {"id": pieces[1], "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {pieces[1]: {"id": pieces[1], "ids": [1], "tokens": [pieces[1]]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[0],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": ids,
            "merges": [list(pair) for pair in merges],
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": pieces[0],
        "bos_token": pieces[1],
        "eos_token": pieces[2],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": config}
