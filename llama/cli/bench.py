"""python -m llama bench: tokens per second of this library, compared with the limits of the machine."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch

from .. import backends, devices, parallel
from ..args import ModelArgs
from ..backends.quantized import Quantization, scheme
from ..checkpoint import Checkpoint, Weights, check_fits, find_folder, find_tokenizer, footprint, with_lora
from ..tokenizer import Tokenizer
from . import measure
from .flags import documented


@documented
def prepare(
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    shape: str = "110M",
    dtype: str | None = None,
    device: str | None = None,
    batches: int | tuple[int, ...] = (1, 8, 32),
    prompts: int | tuple[int, ...] = (128, 512, 2048),
    context: int = 128,
    tokens: int = 32,
    repeats: int = 5,
    quantize: str | None = None,
    group_size: int | None = None,
    compile: bool | None = None,
    lora: str | list | None = None,
) -> tuple[measure.Source, bool, list[measure.Case], int, str]:
    """Measure tokens per second, and the fraction of the machine's limits that is reached (MBU and MFU).

    Args:
        ckpt_dir: a checkpoint in any layout; by default random weights of `shape`
        shape: 110M, 1.1B, 7B, 13B or 70B
        dtype: bfloat16, float16 or float32; by default as Llama.build chooses, for a shape as for bfloat16 weights
        batches: batch sizes for decoding, one or several numbers
        prompts: prompt lengths for prefill, one or several numbers
        context: prompt length before decoding starts
        tokens: number of tokens to decode
        repeats: number of measurements of each case
    """
    sizes = numbers(batches=batches, prompts=prompts, context=context, tokens=tokens, repeats=repeats)
    if shape not in measure.SHAPES:
        raise ValueError(f"shape is {shape!r}; it must be one of {', '.join(measure.SHAPES)}")
    if lora and not ckpt_dir:
        raise ValueError(f"lora is {lora!r}; it needs --ckpt_dir, the folder of its model")
    parallel.init_model_parallel()
    target = devices.choose_device(device)
    devices.use(target)
    cases = [measure.Case(1, length, 1) for length in sizes["prompts"]]
    cases += [measure.Case(batch, context, tokens) for batch in sizes["batches"]]
    if ckpt_dir is None:
        args, saved = ModelArgs(**measure.SHAPES[shape], vocab_size=32000), torch.bfloat16
        named = scheme(quantize, group_size, device=target)
        rounding: Quantization = named
        weights: Weights = measure.RandomWeights(target, named)
    else:
        folder = find_folder(ckpt_dir, "ckpt_dir")
        checkpoint, tokenizer = Checkpoint(folder), Tokenizer(find_tokenizer(folder, tokenizer_path))
        weights, args, _ = with_lora(checkpoint, checkpoint.args(tokenizer.n_words), lora)
        rounding, saved = checkpoint.scheme_for(quantize, group_size, device=target), checkpoint.dtype()
    args.check_output()
    longest = max(case.prompt + case.tokens for case in cases)
    args = replace(args, max_seq_len=longest, max_batch_size=max(case.batch for case in cases))
    ranks = parallel.world_size()
    native = backends.native(args, target, footprint(args, ranks, saved, rounding).weights, compile)
    final = devices.choose_dtype(dtype, target, saved, native)
    check_fits(args, ranks, target, final, rounding)
    return measure.Source(weights, args, target, final, rounding), native, cases, repeats, str(ckpt_dir or shape)


def numbers(**given: int | tuple[int, ...]) -> dict[str, list[int]]:
    """Each argument as a list. Raises ValueError for anything but positive integers; tokens must be at least 2."""
    sizes = {name: [*value] if isinstance(value, (list, tuple)) else [value] for name, value in given.items()}
    for name, values in sizes.items():
        least = 2 if name == "tokens" else 1
        if not all(type(value) is int and value >= least for value in values):
            raise ValueError(f"{name} is {given[name]!r}; it must be of numbers from {least} on")
    return sizes


@functools.wraps(prepare)  # the same flags
def bench(*args: Any, **flags: Any) -> None:
    measure.bench(*prepare(*args, **flags))
