"""A checkpoint -> a model in memory, with its tokenizer and its chat format; on every rank."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from . import backends, devices, parallel
from .chat import ChatFormat
from .chat_template import choose_format
from .checkpoint import Checkpoint, check_fits, check_same, find_folder, find_tokenizer, footprint, load, with_lora
from .model import Transformer
from .tokenizer import Tokenizer


class Loaded(NamedTuple):
    model: Transformer  # this rank's part, ready to compute
    tokenizer: Tokenizer
    chat_format: ChatFormat
    native: bool  # whether native.cpp computes it
    labels: list[str]  # of a score head
    pad_id: int | None


def load_model(
    ckpt_dir: str | os.PathLike[str],
    tokenizer_path: str | os.PathLike[str] | None,
    max_seq_len: int,
    max_batch_size: int,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    check_memory: bool,
    quantize: str | None,
    group_size: int | None,
    compile: bool | None,
    chat_format: str | None,
    lora: Any,
) -> Loaded:
    """Load a checkpoint. Arguments and errors are those of `Llama.build`; an error is raised on every rank."""
    with parallel.all_or_none():
        target = devices.choose_device(device)
        devices.use(target)
        folder = find_folder(ckpt_dir, "ckpt_dir")
        checkpoint = Checkpoint(folder)
        tokenizer_file = find_tokenizer(folder, tokenizer_path)
        tokenizer = Tokenizer(tokenizer_file)
        chosen = choose_format(folder, tokenizer, chat_format)
        weights, args, adapters = with_lora(checkpoint, checkpoint.args(tokenizer.n_words), lora)
        args = replace(args, max_seq_len=max_seq_len, max_batch_size=max_batch_size)
        tokenizer.eos_ids |= checkpoint.eos_ids(tokenizer.n_words)
        if max_batch_size == 0:
            raise ValueError("max_batch_size is 0; it must be positive")
        with torch.device("meta"):
            model = Transformer(args)
        scheme, ranks = checkpoint.scheme_for(quantize, group_size, device=target), parallel.world_size()
        size = footprint(args, ranks, weights.dtype(), scheme).weights
        native = backends.native(args, target, size, compile)
        final = devices.choose_dtype(dtype, target, weights.dtype(), native)
        if check_memory:
            check_fits(args, ranks, target, final, scheme)
        plan: dict[str, object] = {"device": target.type, "dtype": final, "quantize": scheme}
        plan |= {"max_seq_len": max_seq_len, "max_batch_size": max_batch_size}
        labels, pad_id = checkpoint.labels(), checkpoint.pad_id(tokenizer.n_words)
        if args.n_labels:
            plan |= {"labels": labels, "pad_token_id": pad_id}
        if ranks > 1:  # nodes may have different files
            plan |= checkpoint.fingerprint(args, tokenizer_file)
            plan["lora"] = [adapter.fingerprint() for adapter in adapters]
    check_same(plan)
    with parallel.all_or_none():
        load(model, weights, args, target, final, scheme, native)
        model.allocate_cache()
    return Loaded(model.eval().requires_grad_(False), tokenizer, chosen, native, labels, pad_id)
