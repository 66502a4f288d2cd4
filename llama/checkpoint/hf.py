"""Hugging Face's layout <-> Meta's: config.json, files and names of weights, and the order of rows."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..args import ModelArgs, RopeScaling, check_layers
from ..textfile import read_json
from .paths import NO_WEIGHTS, advice, listed

# The names of weights in Meta's layout, Hugging Face's, and GGUF files, whose rows of wq and wk are in Meta's order.
IN_LAYOUTS = (
    ("tok_embeddings", "model.embed_tokens", "token_embd"),
    ("norm", "model.norm", "output_norm"),
    ("output", "lm_head", "output"),
    ("score", "score", None),
    ("layers.{}.attention.wq", "model.layers.{}.self_attn.q_proj", "blk.{}.attn_q"),
    ("layers.{}.attention.wk", "model.layers.{}.self_attn.k_proj", "blk.{}.attn_k"),
    ("layers.{}.attention.wv", "model.layers.{}.self_attn.v_proj", "blk.{}.attn_v"),
    ("layers.{}.attention.wo", "model.layers.{}.self_attn.o_proj", "blk.{}.attn_output"),
    ("layers.{}.feed_forward.w1", "model.layers.{}.mlp.gate_proj", "blk.{}.ffn_gate"),
    ("layers.{}.feed_forward.w2", "model.layers.{}.mlp.down_proj", "blk.{}.ffn_down"),
    ("layers.{}.feed_forward.w3", "model.layers.{}.mlp.up_proj", "blk.{}.ffn_up"),
    ("layers.{}.attention_norm", "model.layers.{}.input_layernorm", "blk.{}.attn_norm"),
    ("layers.{}.ffn_norm", "model.layers.{}.post_attention_layernorm", "blk.{}.ffn_norm"),
)
NAMES = {meta: theirs for meta, theirs, _ in IN_LAYOUTS}
# Keys of a Llama's config.json, and the values that this library can compute with, besides null.
SUPPORTED = {
    "model_type": ("llama",),
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
}
# Keys of a RoPE scaling that are ignored where its type does not need them.
UNSCALED = {
    *("rope_theta", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    *("beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
}
SCORE_HEAD = "LlamaForSequenceClassification"
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.(safetensors|bin)")
BY_FACTOR = ("linear", "dynamic", "yarn", "llama3")  # types of RoPE scaling that change nothing if their factor is 1


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights. safetensors files are preferred to torch's; of each, files that an index names,
    then a single file, then numbered parts, then a variant. FileNotFoundError names what is missing."""
    for stem, kind in (("model", "safetensors"), ("gptq_model", "safetensors"), ("pytorch_model", "bin")):
        for files in weight_file_sets(folder, stem, kind):
            if files and all((folder / file).is_file() for file in files):
                return [folder / file for file in files]
    indexed = files_in_index(folder / "model.safetensors.index.json") or ["model.safetensors"]
    missing = [file for file in indexed if not (folder / file).is_file()]
    again = "download it again"
    do = again if len(missing) < len(indexed) else advice(folder, NO_WEIGHTS, again)
    raise FileNotFoundError(f"{folder} lacks {listed(missing)}; {do}")


def weight_file_sets(folder: Path, stem: str, kind: str) -> Iterator[list[str]]:
    """The names of files that may together hold all weights, in order of preference."""
    yield files_in_index(folder / f"{stem}.{kind}.index.json")
    yield [f"{stem}.{kind}"]
    present = sorted(path.name for path in folder.glob(f"{stem}[.-]*.{kind}"))
    parts: dict[tuple[str, str], list[str]] = {}
    for name in present:
        if match := PART.fullmatch(name):
            parts.setdefault((match[1], match[3]), []).append(name)
    whole = {first: names for (first, count), names in parts.items() if len(names) == int(count)}
    if stem in whole:
        yield whole.pop(stem)
    alone = {name: [name] for name in present if not PART.fullmatch(name) and name != f"{stem}.{kind}"}
    variants = [*whole.values(), *alone.values()]
    if len(variants) > 1:
        raise ValueError(f"{folder} has several variants of the weights: {listed(v[0] for v in variants)}; keep one")
    yield from variants


def files_in_index(index: Path) -> list[str]:
    """The files that an index names; [] without an index."""
    if not index.is_file():
        return []
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(file, str) for file in found.values()):
        raise ValueError(f"{index} has no weight_map from the names of weights to files; download it again")
    return sorted(set(found.values()))


def names(n_layers: int, table: Mapping[str, str] = NAMES) -> dict[str, str]:
    """Meta's name of every parameter -> the name in another layout, by default Hugging Face's."""
    layers = range(n_layers)
    return {f"{a.format(i)}.weight": f"{b.format(i)}.weight" for a, b in table.items() for i in layers}


def is_permuted(name: str) -> bool:
    """Whether a weight (by Meta's name) has its rows in another order in Hugging Face's layout: wq and wk, for RoPE."""
    return name.split(".")[-2] in ("wq", "wk")


def to_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of whole heads of q_proj or k_proj, in the order of wq and wk. RoPE rotates elements i and i + D/2 together
    there, 2i and 2i + 1 here: for D = 6, the result has rows 0 3 1 4 2 5."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def to_halves(weight: Tensor, head_dim: int) -> Tensor:
    """The reverse of `to_pairs`."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def params(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json -> the content of params.json. ValueError names what is not supported."""
    for key, allowed in SUPPORTED.items():
        if (value := config.get(key)) not in (None, *allowed):
            raise ValueError(f"{key} {value!r} is not supported; only {allowed[0]!r} is")
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    if missing := [key for key in needed if key not in config]:
        raise ValueError(f"lacks the keys {listed(missing)}")
    for key in (*needed, "num_key_value_heads"):
        value = config.get(key)
        if (type(value) is not int or value < 1) and (key in needed or value is not None):
            raise ValueError(f"{key} is {value!r}, not a positive whole number")
    dim, layers, heads, hidden, vocab = (config[key] for key in needed)
    kv_heads, eps = config.get("num_key_value_heads") or heads, config.get("rms_norm_eps", 1e-6)
    theta, scaling = rope(config)
    result = params_of(dim, layers, heads, kv_heads, config.get("head_dim"), hidden, eps, theta) | {"vocab_size": vocab}
    if SCORE_HEAD in (config.get("architectures") or ()):
        result["n_labels"] = len(labels(config))
    return result if scaling is None else {**result, "rope_scaling": scaling}


def params_of(
    dim: int, layers: int, heads: int, kv_heads: int, head_dim: Any, hidden: int, eps: float, theta: float
) -> dict[str, Any]:
    """The content of params.json, without keys that have their default."""
    check_layers(layers)
    result = {"dim": dim, "n_layers": layers, "n_heads": heads, **ffn_params(dim, hidden), "norm_eps": eps}
    result |= {} if head_dim in (None, dim / heads) else {"head_dim": head_dim}
    result |= {} if kv_heads == heads else {"n_kv_heads": kv_heads}
    return result | ({} if theta == 10000.0 else {"rope_theta": theta})


def labels(config: Mapping[str, Any], count: int = 2) -> list[str]:
    """The names of a score head's labels, in order; LABEL_0 and so on where config.json has none, as in transformers.
    ValueError for labels that are not numbered from 0."""
    named, count = config.get("id2label"), config.get("num_labels", count)
    if named is None and type(count) is int and count > 0:
        return [f"LABEL_{i}" for i in range(count)]
    if not isinstance(named, Mapping) or not named or {*named} != {str(i) for i in range(len(named))}:
        raise ValueError(f"id2label {named!r} with num_labels {count!r} does not name the labels 0, 1, ...")
    return [str(named[str(i)]) for i in range(len(named))]


def rope(config: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """RoPE's theta and scaling, in any of the spellings of config.json. ValueError names what is not supported."""
    theta, scaling = None, None
    nested = {key: config.get(key) or {} for key in ("rope_parameters", "rope_scaling")}
    flat = {
        k: v for k, v in config.items() if k.startswith(("rope_", "rotary_", "partial_rotary_")) and k not in nested
    }
    for place, found in {"config": flat, **nested}.items():  # the last theta counts, as in transformers
        if not isinstance(found, Mapping):
            raise ValueError(f"{place} {found!r} is not an object of keys and values")
        theta = found.get("rope_theta") or theta
        kind, ignored = found.get("rope_type", found.get("type")), [None, False, 1, "default"]
        if kind in ("linear", "llama3") and place != "config" and found.get("factor") != 1:
            scaling = scaling_of(found, kind, place)
            ignored += kind, scaling["factor"]
        elif found.get("factor") == 1:
            ignored += BY_FACTOR
        odd = [f"{k} {v!r}" for k, v in found.items() if k not in UNSCALED and (v is True or v not in ignored)]
        if odd:
            raise ValueError(f"{place} with {listed(odd)} is not supported; only linear and llama3 scaling of RoPE is")
    return 10000.0 if theta is None else theta, scaling


def scaling_of(found: Mapping[str, Any], kind: str, place: str) -> dict[str, Any]:
    """A scaling as the fields of RopeScaling. ValueError names a missing one."""
    names = RopeScaling._fields[:4] if kind == "llama3" else ("factor",)
    if missing := [name for name in names if found.get(name) is None]:
        raise ValueError(f"{place}: {kind} scaling of RoPE lacks {listed(missing)}")
    return {**{name: found[name] for name in names}, "rope_type": kind}


# multiple_of and ffn_dim_multiplier of published models.
PUBLISHED = ((256, None), (4096, 1.3), (1024, 1.3), (4096, 1.2), (256, 1.5))


def ffn_params(dim: int, hidden: int) -> dict[str, Any]:
    """multiple_of and ffn_dim_multiplier that give the feed-forward layer `hidden` units: those of a published model,
    if they fit."""
    base = int(2 * 4 * dim / 3)
    for multiple, factor in (*PUBLISHED, (hidden, None), (hidden, hidden / base)):
        width = base if factor is None else int(factor * base)
        if multiple * math.ceil(width / multiple) == hidden:
            return {"multiple_of": multiple} | ({} if factor is None else {"ffn_dim_multiplier": factor})
    raise AssertionError("the last pair always fits")


def config(args: ModelArgs, dtype: str, positions: int | None = None) -> dict[str, Any]:
    """The content of config.json. `positions` is max_position_embeddings, if the source has it."""
    shown = None if args.rope_scaling is None else args.rope_scaling._asdict()
    if shown and shown["rope_type"] == "linear":
        shown = {"rope_type": "linear", "factor": shown["factor"]}
    usual = 131072 if args.rope_scaling else {10000.0: 4096, 1e6: 16384}.get(args.rope_theta, 8192)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": args.dim,
        "intermediate_size": args.ffn_hidden,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.kv_heads,
        "head_dim": args.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "rope_scaling": shown,
        "max_position_embeddings": positions or usual,
        "vocab_size": args.vocab_size,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": args.tie_word_embeddings,
        "pad_token_id": None,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": dtype,
    }
