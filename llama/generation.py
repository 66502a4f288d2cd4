"""Llama: a loaded model and its tokenizer, and what one asks of them."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from reprlib import repr as shorten
from typing import Any, TypedDict

import torch

from . import parallel
from .chat import REFUSAL, Dialog, Message, check_dialog, encode_dialog, has_tags
from .checkpoint import Checkpoint, check_path, find_tokenizer, load
from .engine import Token, steps
from .memory import available, footprint, shortage
from .model import Transformer
from .sampling import sample
from .tokenizer import Tokenizer

_one_at_a_time = threading.Lock()  # a model has one cache


class _Scored(TypedDict, total=False):
    tokens: list[str]  # the text that each token adds; joined, the whole text
    logprobs: list[float]  # natural log probability of each token


class CompletionPrediction(_Scored):
    generation: str


class ChatPrediction(_Scored):
    generation: Message


class Llama:
    """Text and chat completion. Under torchrun all ranks make the same calls; what rank 0 asks for is served."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, seed: int = 1) -> None:
        check_seed(seed)
        self.model = model
        self.tokenizer = tokenizer
        self.broken = False  # the ranks have lost step
        self.generator = torch.Generator(model.norm.weight.device).manual_seed(seed)

    @staticmethod
    def build(
        ckpt_dir: str | os.PathLike[str],
        tokenizer_path: str | os.PathLike[str] | None = None,
        max_seq_len: int = 512,
        max_batch_size: int = 4,
        model_parallel_size: int | None = None,
        seed: int = 1,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        check_memory: bool = True,
        quantize: str | None = None,
        group_size: int = 64,
    ) -> Llama:
        """Load the checkpoint in `ckpt_dir`, in Meta's layout or Hugging Face's, whatever number of shards it has.

        `max_seq_len` counts the tokens of prompt and answer together; with `max_batch_size` it sizes the cache.
        `tokenizer_path` defaults to tokenizer.model in the folder or one up. `device` defaults to CUDA, then MPS, then
        CPU; `dtype` to the checkpoint's, or float32 where the CPU has no instructions for it. `quantize` rounds the
        matrices to int8, or to int4 in groups of `group_size` columns; a checkpoint that was saved so needs neither.
        Raises ValueError, FileNotFoundError or RuntimeError naming the file and what is wrong with it, on every rank,
        and MemoryError before anything is allocated when weights, cache and activations will not fit;
        `check_memory=False` tries.
        """
        check_seed(seed)
        parallel.init_model_parallel(model_parallel_size)
        with parallel.all_or_none():
            where = parallel.choose_device(device)
            parallel.use(where)
            folder = check_path(ckpt_dir, "ckpt_dir", "folder")
            tokenizer = Tokenizer(find_tokenizer(folder, tokenizer_path))
            weights = Checkpoint(folder)
            args = replace(weights.args(tokenizer.n_words), max_seq_len=max_seq_len, max_batch_size=max_batch_size)
            if args.max_batch_size == 0:
                raise ValueError("max_batch_size is 0; it must be positive")
            with torch.device("meta"):
                model = Transformer(args)
            kind = parallel.choose_dtype(dtype, where, weights.dtype())
            rounding = weights.scheme_for(quantize, group_size)
            needed, free = footprint(args, parallel.world_size(), kind, rounding), available(where)
            if check_memory and (problem := shortage(needed, free, where, parallel.world_size())):
                raise MemoryError(problem)
        plans = parallel.gather_objects((where.type, kind, rounding, max_seq_len, max_batch_size))
        if len(set(plans)) > 1:
            raise ValueError(f"the ranks differ in (device, dtype, quantize, max_seq_len, max_batch_size): {plans}")
        with parallel.all_or_none():
            load(model, weights, args, where, kind, rounding)
            model.allocate_cache()
        return Llama(model.eval().requires_grad_(False), tokenizer, seed)

    @parallel.as_first_rank
    def generate(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        max_gen_len: int,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """The ids that follow each prompt, up to `max_gen_len` of them and before EOS, and their log probabilities.

        `temperature` 0 takes the likeliest token; otherwise one is drawn from the nucleus of probability `top_p`. With
        `echo` a result begins with its prompt, whose first token has log probability 0. Log probabilities are natural
        logarithms of the softmax at temperature 1. Raises ValueError for a bad argument or a prompt that does not fit.
        """
        rows = self._generate(prompt_tokens, max_gen_len, temperature, top_p, logprobs, echo)
        ids = [[token.id for token in row] for row in rows]
        return ids, [[token.logprob for token in row] for row in rows] if logprobs else None

    @parallel.as_first_rank
    def text_completion(
        self,
        prompts: Sequence[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
    ) -> list[CompletionPrediction]:
        """The text that continues each prompt; with `logprobs` also the text and log probability of each token.
        `max_gen_len` defaults to all that max_seq_len leaves. See `generate` for the rest."""
        if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Sequence):
            raise ValueError(f"prompts is {shorten(prompts)}; it must be a list of str")
        for i, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                raise ValueError(f"prompt {i} is {shorten(prompt)}, which is not a str")
        prompt_tokens = [self.tokenizer.encode(prompt, bos=True, eos=False) for prompt in prompts]
        rows = self._generate(prompt_tokens, max_gen_len, temperature, top_p, logprobs, echo)
        return [{"generation": self._text(row), **self._scored(row, logprobs)} for row in rows]

    @parallel.as_first_rank
    def chat_completion(
        self,
        dialogs: Sequence[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
    ) -> list[ChatPrediction]:
        """The assistant's answer to each dialog. A dialog whose messages hold a tag of the chat format is answered with
        an error text and never reaches the model. Raises ValueError for a dialog whose roles are out of order."""
        if isinstance(dialogs, (str, bytes)) or not isinstance(dialogs, Sequence):
            raise ValueError(f"dialogs is {shorten(dialogs)}; it must be a list of dialogs")
        for i, dialog in enumerate(dialogs):
            check_dialog(dialog, f"dialog {i}")
        allowed = [i for i, dialog in enumerate(dialogs) if not has_tags(dialog)]
        prompt_tokens = [encode_dialog(self.tokenizer, dialogs[i]) for i in allowed]
        names = [f"dialog {i}" for i in allowed]
        answers = self._generate(prompt_tokens, max_gen_len, temperature, top_p, logprobs, names=names)
        rows = dict(zip(allowed, answers, strict=True))
        return [
            {
                "generation": {"role": "assistant", "content": self._text(rows[i]) if i in rows else REFUSAL},
                **self._scored(rows.get(i, []), logprobs),
            }
            for i in range(len(dialogs))
        ]

    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_gen_len: int | None,
        temperature: float,
        top_p: float,
        logprobs: bool,
        echo: bool = False,
        names: Sequence[str] = (),
    ) -> list[list[Token]]:
        max_seq_len = self.model.params.max_seq_len
        if max_gen_len is None:
            max_gen_len = max_seq_len - 1
        self._check(prompts, max_gen_len, temperature, top_p, names)
        rows: list[list[Token]] = [[] for _ in prompts]
        if not rows:
            return rows
        limits = [min(max_seq_len, len(prompt) + max_gen_len) for prompt in prompts]
        if self.broken:
            raise RuntimeError("an earlier call failed on this rank and left the others behind; start the job again")
        draw = partial(sample, temperature=temperature, top_p=top_p, generator=self.generator)
        with _one_at_a_time:
            try:
                for step in steps(self.model, prompts, limits, [self.tokenizer.eos_id], draw, logprobs, echo):
                    for row, gained in zip(rows, step, strict=True):
                        row += gained
            except FloatingPointError:  # all ranks agree on that
                raise
            except BaseException:
                self.broken = parallel.world_size() > 1
                raise
        return rows

    def _check(self, prompts: Any, max_gen_len: Any, temperature: Any, top_p: Any, names: Sequence[str]) -> None:
        params = self.model.params
        if not isinstance(prompts, (list, tuple)) or not all(isinstance(prompt, (list, tuple)) for prompt in prompts):
            raise ValueError(f"prompt_tokens is {shorten(prompts)}; it must be a list of lists of token ids")
        if len(prompts) > params.max_batch_size:
            raise ValueError(
                f"{len(prompts)} prompts exceed max_batch_size {params.max_batch_size}; "
                "pass fewer at a time or build with a larger max_batch_size"
            )
        for prompt, name in zip(prompts, names or [f"prompt {i}" for i in range(len(prompts))], strict=True):
            if not prompt:
                raise ValueError(f"{name} is empty; it needs at least one token, such as bos_id")
            if odd := [id for id in prompt if type(id) is not int or not 0 <= id < params.vocab_size]:
                raise ValueError(f"{name} holds {shorten(odd[0])}, which is no int from 0 to {params.vocab_size - 1}")
            if len(prompt) > params.max_seq_len:
                raise ValueError(
                    f"{name} has {len(prompt)} tokens, more than max_seq_len {params.max_seq_len}; "
                    "shorten it or build with a larger max_seq_len"
                )
        if type(max_gen_len) is not int or max_gen_len < 0:
            raise ValueError(f"max_gen_len is {max_gen_len!r}; it must be an int of at least 0")
        if not _is_number(temperature) or not 0 <= temperature <= sys.float_info.max:
            raise ValueError(f"temperature is {temperature!r}; it must be a number of at least 0 (0: greedy)")
        if not _is_number(top_p) or not 0 < top_p <= 1:
            raise ValueError(f"top_p is {top_p!r}; it must be a number above 0 and up to 1 (1: no cut)")

    def _text(self, row: list[Token]) -> str:
        return self.tokenizer.decode([token.id for token in row])

    def _scored(self, row: list[Token], logprobs: bool) -> _Scored:
        if not logprobs:
            return {}
        pieces = self.tokenizer.decode_pieces([token.id for token in row])
        return {"tokens": pieces, "logprobs": [token.logprob for token in row]}


def check_seed(seed: Any) -> None:
    if type(seed) is not int or not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed is {shorten(seed)}; it must be an int of 64 bits")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
