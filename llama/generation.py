"""Llama: a loaded model with its tokenizer, and its methods that generate, score, embed and classify."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Generator, Sequence
from reprlib import repr as shorten
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch
from torch import Tensor

from . import devices, parallel
from .chat import ChatFormat, Dialog, Message, get_chat_format
from .engine import Engine
from .grammar import Grammars
from .loading import load_model
from .model import Transformer
from .options import Options, plain_arguments
from .processor import InputProcessor
from .request import Event
from .sampling import SamplingParams
from .scoring import Scores, classify, embed, exp, score
from .stream import InputFilter, OutputFilter, Stream, check_verdict, drains, filtered, pop_filters
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _Tokens(TypedDict, total=False):
    finish_reason: str | None  # "eos", "stop", "length" or "refused"
    tokens: list[str]  # the text that each token adds; joined, the whole text
    logprobs: list[float]  # natural log probability of each token


class CompletionPrediction(_Tokens):
    generation: str


class ChatPrediction(_Tokens):
    generation: Message


class Scored(TypedDict):
    """Scores of a text, token by token. Log probabilities are natural."""

    tokens: list[str]  # the text that each token adds
    token_ids: list[int]
    logprobs: list[float]
    top_logprobs: list[list[tuple[str, float]]]  # of the most probable tokens at each position
    sum: float
    perplexity: float  # exp of the mean negative log probability


class Llama:
    """Text and chat completion for any number of prompts: those beyond max_batch_size wait for a slot of the cache.

    On one rank threads may call concurrently, and streams may be open during other calls: all share the passes of one
    engine. Under torchrun all ranks make the same calls in the same order, and the arguments of rank 0 count.

    copy.deepcopy copies the weights and makes a new cache; quantized matrices, which nothing writes to, are shared. A
    Llama cannot be pickled. Another process calls `build`, which shares the pages of the files; or it is forked from
    this one, uses the same weights, and computes on one thread.
    """

    @plain_arguments
    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, seed: int = 1, chat_format: str | ChatFormat | None = None
    ) -> None:
        SamplingParams(seed=seed)  # ValueError for a bad seed
        self.engine = Engine.of(model)  # first, so that pickling raises the engine's error
        self.model = model
        self.labels = [f"LABEL_{i}" for i in range(model.params.n_labels)]
        self.pad_id: int | None = None  # the padding token, which `classify` skips
        chat_format = get_chat_format(tokenizer, chat_format)
        generator, grammars = torch.Generator().manual_seed(seed), Grammars(tokenizer, model.vocab_size)
        self.inputs = InputProcessor(model.params, tokenizer, chat_format, generator, grammars)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.inputs.tokenizer

    @property
    def chat_format(self) -> ChatFormat:
        return self.inputs.chat_format

    def __deepcopy__(self, memo: dict[int, Any]) -> Llama:
        with devices.own_context(inference=False), self.engine.lock:
            twin = Llama(copy.deepcopy(self.model, memo), self.tokenizer, chat_format=self.chat_format)
        twin.inputs.generator.set_state(self.inputs.generator.get_state())
        twin.engine.compile, twin.labels, twin.pad_id = self.engine.compile, [*self.labels], self.pad_id
        return twin

    @staticmethod
    @plain_arguments
    @devices.own_context(inference=False)
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
        group_size: int | None = None,
        compile: bool | None = None,
        chat_format: str | None = None,
        lora: str | os.PathLike[str] | Sequence[Any] | None = None,
    ) -> Llama:
        """Load the checkpoint `ckpt_dir`: a folder in Meta's layout or Hugging Face's, with any number of shards, or a
        GGUF file.

        `max_seq_len` counts the tokens of prompt and answer together; with `max_batch_size` it sizes the cache.
        `tokenizer_path` defaults to tokenizer.model or tokenizer.json in the folder, or tokenizer.model in its parent;
        `device` to CUDA, then MPS, then CPU; `dtype` to the checkpoint's, or float32 where that is faster in PyTorch.
        `quantize` rounds the matrices to int8 or int4, in groups of `group_size` columns (int4: 32; int8: 128, or whole
        rows, 0, on GPUs); a checkpoint that is quantized already needs neither. `chat_format` is
        llama2, llama3 or template: the folder's own, which is the default if there is one; else the tokenizer decides.
        `lora` is the folder of a PEFT LoRA adapter, which is merged into the weights, or a list of folders or of pairs
        (folder, weight).
        On a CPU, models of more than 50 MB are computed by C++ that is compiled once, in about ten seconds; `compile`
        is whether to do so for a model of any size.
        Raises ValueError, FileNotFoundError or RuntimeError naming the file and what is wrong with it, on every rank.
        Raises MemoryError before anything is allocated if weights, cache and activations will not fit, unless
        `check_memory` is False.
        """
        SamplingParams(seed=seed)  # ValueError for a bad seed, before anything is loaded
        parallel.init_model_parallel(model_parallel_size)
        loaded = load_model(
            ckpt_dir, tokenizer_path, max_seq_len, max_batch_size, device, dtype, check_memory,
            quantize, group_size, compile, chat_format, lora,
        )  # fmt: skip
        llama = Llama(loaded.model, loaded.tokenizer, seed, loaded.chat_format)
        llama.engine.compile, llama.labels, llama.pad_id = loaded.native, loaded.labels, loaded.pad_id
        return llama

    @parallel.as_first_rank
    @plain_arguments
    def generate_stream(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        max_gen_len: int | Sequence[int],
        temperature: float | Sequence[float] = 0.6,
        top_p: float | Sequence[float] = 0.9,
        logprobs: bool = False,
        echo: bool = False,
        **options: Unpack[Options],
    ) -> Stream:
        """`generate` as a stream. It has made its first pass when this returns, and ends when it is closed."""
        return self._stream(
            prompt_tokens, logprobs, echo, max_gen_len=max_gen_len, temperature=temperature, top_p=top_p, **options
        )

    @drains(generate_stream)
    def generate(self, stream: Stream) -> tuple[list[list[int]], list[list[float]] | None]:
        """The ids that follow each prompt, up to `max_gen_len` or EOS, which is not included; and with `logprobs` their
        log probabilities, else None.

        `temperature` 0 takes the argmax; otherwise a token is sampled from the nucleus of probability `top_p`. With
        `echo` a result begins with its prompt, whose first token has log probability 0. Log probabilities are natural
        logarithms of the softmax at temperature 1. For the rest see `Options`; a stop string ends a row with the token
        that completes it. Raises ValueError for a bad argument or a prompt that does not fit.
        """
        rows = stream.drain()
        return [row.tokens for row in rows], [row.logprobs for row in rows] if stream.logprobs else None

    @parallel.as_first_rank
    @plain_arguments
    def text_stream(
        self,
        prompts: Sequence[str],
        temperature: float | Sequence[float] = 0.6,
        top_p: float | Sequence[float] = 0.9,
        max_gen_len: int | Sequence[int] | None = None,
        logprobs: bool = False,
        echo: bool = False,
        **options: Unpack[Options],
    ) -> Stream:
        """`text_completion` as a stream; see `generate_stream`."""
        prompt_tokens = self.inputs.encode(prompts)
        return self._stream(
            prompt_tokens, logprobs, echo, max_gen_len=max_gen_len, temperature=temperature, top_p=top_p, **options
        )

    @drains(text_stream)
    def text_completion(self, stream: Stream) -> list[CompletionPrediction]:
        """The text that continues each prompt, with a leading space if there is one; with `logprobs` also the text and
        log probability of each token. `max_gen_len` defaults to all that max_seq_len leaves. See `generate` and
        `Options` for the rest."""
        return [{"generation": row.text, **self._tokens(row, stream)} for row in stream.drain()]

    @parallel.as_first_rank
    @plain_arguments
    def chat_stream(
        self,
        dialogs: Sequence[Dialog],
        temperature: float | Sequence[float] = 0.6,
        top_p: float | Sequence[float] = 0.9,
        max_gen_len: int | Sequence[int] | None = None,
        logprobs: bool = False,
        *,
        input_filter: InputFilter | None = None,
        output_filter: OutputFilter | None = None,
        **options: Unpack[Options],
    ) -> Stream:
        """`chat_completion` as a stream; see `generate_stream`. With `output_filter` each answer is a single event, and
        comes once it has been filtered."""
        steps = self._chat(
            dialogs,
            logprobs,
            max_gen_len=max_gen_len,
            temperature=temperature,
            top_p=top_p,
            input_filter=input_filter,
            output_filter=output_filter,
            **options,
        )
        return Stream(steps, len(dialogs), logprobs)

    @drains(chat_stream)
    def chat_completion(self, stream: Stream) -> list[ChatPrediction]:
        """The assistant's answer to each dialog. A dialog with a tag of the chat format in a message is answered with
        an error text, and one for which `input_filter` returns a text with that text; neither reaches the model. A text
        that `output_filter` returns replaces the answer. Filters return None to change nothing. Raises ValueError for a
        dialog whose roles are out of order. See `Options` for the rest."""
        return [
            {"generation": {"role": "assistant", "content": row.text}, **self._tokens(row, stream)}
            for row in stream.drain()
        ]

    @parallel.as_first_rank
    @plain_arguments
    def score(
        self, prompts: Sequence[str], continuations: Sequence[str] | None = None, top_logprobs: int = 0
    ) -> list[Scored]:
        """The log probability of each token of each prompt, after BOS; or of each continuation, given its prompt. With
        `top_logprobs` = k also the texts and log probabilities of the k most probable tokens at each position.

        A continuation's tokens are those of prompt + continuation from the first that is not wholly the prompt's, whose
        white space at the end counts as the continuation's. The perplexity of a text with nothing to score is NaN.
        Raises ValueError for a prompt that has no token, not even BOS, or is longer than max_seq_len, and for a
        continuation that adds nothing to its prompt."""
        if type(top_logprobs) is not int or not 0 <= top_logprobs <= self.model.vocab_size:
            raise ValueError(f"top_logprobs is {top_logprobs!r}; it must be an int from 0 to {self.model.vocab_size}")
        if continuations is None:
            rows = self.inputs.encode(prompts)
            begins = [1] * len(rows)
        else:
            rows, begins = self.inputs.encode_continuations(prompts, continuations)
        self.inputs.check_all(rows, "prompt")
        return [self._scored(scores) for scores in score(self.engine, rows, begins, top_logprobs)]

    def _scored(self, scores: Scores) -> Scored:
        total, ids = math.fsum(scores.logprobs), scores.ids[scores.begin :]
        return {
            "tokens": self.tokenizer.decode_pieces(scores.ids)[scores.begin :],
            "token_ids": list(ids),
            "logprobs": scores.logprobs,
            "top_logprobs": [[(self.tokenizer.piece(id), p) for id, p in row] for row in scores.top_logprobs],
            "sum": total,
            "perplexity": exp(-total / len(ids)) if ids else math.nan,
        }

    @parallel.as_first_rank
    @plain_arguments
    def embed(self, texts: Sequence[str], pooling: Literal["mean", "last"] = "mean") -> Tensor:
        """The last hidden states of each text, with BOS before it, after the final norm: their mean, or the last
        token's; float32 (len(texts), dim)."""
        if pooling not in ("mean", "last"):
            raise ValueError(f"pooling is {pooling!r}; it must be 'mean' or 'last'")
        rows = self.inputs.encode(texts, "texts")
        self.inputs.check_all(rows, "text")
        return embed(self.engine, rows, pooling)

    @parallel.as_first_rank
    @plain_arguments
    def classify(self, inputs: Sequence[str] | Sequence[Dialog]) -> Tensor:
        """The score head's logits, float32 (len(inputs), n_labels) in the order of `labels`: for each text, with BOS
        before it; or for each dialog, in the chat format, which must end with the assistant's message. As in
        transformers they are those of the last token that is not padding. Raises ValueError for a model without a score
        head, and for an input that is longer than max_seq_len."""
        if not self.model.params.n_labels:
            raise ValueError("the model has no score head, as LlamaForSequenceClassification has; classify needs one")
        if isinstance(inputs, list) and inputs and not any(isinstance(item, str) for item in inputs):
            rows = [self.inputs.encode_dialog(d, f"dialog {i}", answered=True) for i, d in enumerate(inputs)]
        else:
            rows = self.inputs.encode(inputs, "inputs")
        self.inputs.check_all(rows, "input")
        return classify(self.engine, rows, self.pad_id)

    def _stream(self, prompts: Sequence[Sequence[int]], logprobs: bool, echo: bool, /, **options: Any) -> Stream:
        if not isinstance(prompts, list) or not all(isinstance(row, list) for row in prompts):
            raise ValueError(f"prompt_tokens is {shorten(prompts)}; it must be a list of lists of token ids")
        self.inputs.check_all(prompts, "prompt")
        settings = self.inputs.settings(len(prompts), options)
        requests = self.inputs.requests(prompts, settings, logprobs, echo)
        before = [() if echo else prompt for prompt in prompts]
        return Stream(self.engine.run(requests), len(prompts), logprobs, before)

    def _chat(self, dialogs: Any, logprobs: bool, /, **options: Any) -> Generator[list[Event], None, None]:
        if not isinstance(dialogs, list):
            raise ValueError(f"dialogs is {shorten(dialogs)}; it must be a list of dialogs")
        for i, dialog in enumerate(dialogs):
            self.chat_format.check(dialog, f"dialog {i}")
        input_filter, output_filter = pop_filters(options)
        refusals: dict[int, str] = {}
        prompts: dict[int, list[int]] = {}
        for i, dialog in enumerate(dialogs):
            verdict = self.chat_format.refusal(dialog)
            if verdict is None and input_filter is not None:
                verdict = parallel.ask_first_rank(input_filter, dialog)
            if verdict is not None:
                refusals[i] = check_verdict(verdict)
                continue
            prompts[i] = self.chat_format.encode(self.tokenizer, dialog)
            self.inputs.check(prompts[i], f"dialog {i}")
        settings = self.inputs.settings(len(dialogs), options, continues=False)
        allowed = [settings[i] for i in prompts]
        requests = self.inputs.requests([*prompts.values()], allowed, logprobs, continues=False)
        return filtered(self.engine.run(requests), [*prompts], refusals, output_filter)

    def _tokens(self, row: Event, stream: Stream) -> _Tokens:
        scored: _Tokens = {"finish_reason": row.finish_reason}
        if stream.logprobs:
            pieces, left = self.tokenizer.decode_pieces(row.tokens, stream.before[row.row]), len(row.text)
            scored["tokens"], scored["logprobs"] = [], row.logprobs
            for piece in pieces:  # cut like the text, which ends before a stop string
                scored["tokens"].append(piece[:left])
                left -= len(scored["tokens"][-1])
        return scored
