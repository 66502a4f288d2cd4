"""Llama: a loaded model and its tokenizer, and what one asks of them."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from reprlib import repr as shorten
from typing import TYPE_CHECKING, Any, Literal, TypedDict
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from . import parallel
from .chat import REFUSAL, Dialog, Message, check_dialog, encode_dialog, has_tags
from .checkpoint import Checkpoint, available, check_path, find_tokenizer, footprint, load, shortage
from .engine import Row, steps
from .model import Transformer
from .options import Ask, Options, asks
from .score import Scores, embed, score
from .stream import Event, JudgeInput, JudgeOutput, Stream, check_verdict, collect, judged
from .text import Text
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _Turn:
    """Whose turn it is to use a model: it has one cache, which a stream needs to its end."""

    def __init__(self) -> None:
        self.lock, self.thread = threading.Lock(), 0
        self.kept: list[int] = []  # tokens whose keys and values the first row of the cache has, but perhaps the last

    def __enter__(self) -> None:
        if not self.lock.acquire(blocking=False):
            if self.thread == threading.get_ident():
                raise RuntimeError("a stream of this model is still open; read it to its end or close it first")
            self.lock.acquire()
        self.thread = threading.get_ident()

    def __exit__(self, *error: object) -> None:
        self.thread = 0
        self.lock.release()


_turns: WeakKeyDictionary[Transformer, _Turn] = WeakKeyDictionary()


class _Scored(TypedDict, total=False):
    finish_reason: str | None  # "eos", "stop", "length" or "refused"
    tokens: list[str]  # the text that each token adds; joined, the whole text
    logprobs: list[float]  # natural log probability of each token


class CompletionPrediction(_Scored):
    generation: str


class ChatPrediction(_Scored):
    generation: Message


class Scored(TypedDict):
    """Of each token that was scored; log probabilities are natural."""

    tokens: list[str]  # the text that each adds
    token_ids: list[int]
    logprobs: list[float]
    top_logprobs: list[list[tuple[str, float]]]  # the likeliest in its place
    sum: float
    perplexity: float  # exp of the mean negative log probability


class Llama:
    """Text and chat completion. Under torchrun all ranks make the same calls; what rank 0 asks for is served."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, seed: int = 1) -> None:
        check_seed(seed)
        self.model = model
        self.tokenizer = tokenizer
        self.broken = False  # the ranks have lost step
        self.generator = torch.Generator().manual_seed(seed)  # where rows without a seed of their own get one
        self.turn = _turns.setdefault(model, _Turn())

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
        compile: bool = False,
    ) -> Llama:
        """Load the checkpoint in `ckpt_dir`, in Meta's layout or Hugging Face's, whatever number of shards it has.

        `max_seq_len` counts the tokens of prompt and answer together; with `max_batch_size` it sizes the cache.
        `tokenizer_path` defaults to tokenizer.model in the folder or one up. `device` defaults to CUDA, then MPS, then
        CPU; `dtype` to the checkpoint's, or float32 where the CPU has no instructions for it. `quantize` rounds the
        matrices to int8, or to int4 in groups of `group_size` columns; a checkpoint that was saved so needs neither.
        `compile` has g++ make all layers for a CPU with AVX-512 VNNI, which takes about twenty seconds, once.
        It changes nothing on a GPU.
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
            load(model, weights, args, where, kind, rounding, compile)
            model.allocate_cache()
        model.compiled = compile
        return Llama(model.eval().requires_grad_(False), tokenizer, seed)

    @parallel.as_first_rank
    def generate(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        max_gen_len: int | Sequence[int],
        temperature: float | Sequence[float] = 0.6,
        top_p: float | Sequence[float] = 0.9,
        logprobs: bool = False,
        echo: bool = False,
        **options: Unpack[Options],
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """The ids that follow each prompt, up to `max_gen_len` of them and before EOS, and their log probabilities.

        `temperature` 0 takes the likeliest token; otherwise one is drawn from the nucleus of probability `top_p`. With
        `echo` a result begins with its prompt, whose first token has log probability 0. Log probabilities are natural
        logarithms of the softmax at temperature 1. For the rest see `Options`; a stop string ends a row with the token
        that completes it. Raises ValueError for a bad argument or a prompt that does not fit.
        """
        asked = self._asked(prompt_tokens, max_gen_len, temperature, top_p, options)
        rows = collect(self._events(prompt_tokens, asked, logprobs, echo), len(prompt_tokens))
        return [row.tokens for row in rows], [row.logprobs for row in rows] if logprobs else None

    @parallel.as_first_rank
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
        """`generate`, as it happens. Prefill is done when this returns. Until the stream has ended or is closed,
        nothing else can be asked of this model."""
        asked = self._asked(prompt_tokens, max_gen_len, temperature, top_p, options)
        return Stream(self._events(prompt_tokens, asked, logprobs, echo))

    @parallel.as_first_rank
    def text_completion(
        self,
        prompts: Sequence[str],
        temperature: float | Sequence[float] = 0.6,
        top_p: float | Sequence[float] = 0.9,
        max_gen_len: int | Sequence[int] | None = None,
        logprobs: bool = False,
        echo: bool = False,
        **options: Unpack[Options],
    ) -> list[CompletionPrediction]:
        """The text that continues each prompt; with `logprobs` also the text and log probability of each token.
        `max_gen_len` defaults to all that max_seq_len leaves. See `generate` and `Options` for the rest."""
        prompt_tokens = self._encode(prompts)
        asked = self._asked(prompt_tokens, max_gen_len, temperature, top_p, options)
        rows = collect(self._events(prompt_tokens, asked, logprobs, echo), len(prompts))
        return [{"generation": row.text, **self._scored(row, logprobs)} for row in rows]

    @parallel.as_first_rank
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
        """`text_completion`, as it happens; see `generate_stream`."""
        prompt_tokens = self._encode(prompts)
        asked = self._asked(prompt_tokens, max_gen_len, temperature, top_p, options)
        return Stream(self._events(prompt_tokens, asked, logprobs, echo))

    @parallel.as_first_rank
    def chat_completion(
        self,
        dialogs: Sequence[Dialog],
        temperature: float | Sequence[float] = 0.6,
        top_p: float | Sequence[float] = 0.9,
        max_gen_len: int | Sequence[int] | None = None,
        logprobs: bool = False,
        *,
        judge_input: JudgeInput | None = None,
        judge_output: JudgeOutput | None = None,
        **options: Unpack[Options],
    ) -> list[ChatPrediction]:
        """The assistant's answer to each dialog. A dialog whose messages hold a tag of the chat format is answered with
        an error text and never reaches the model; so is one for which `judge_input` returns a text rather than None,
        which is then the answer. What `judge_output` returns, if not None, takes the place of an answer. Raises
        ValueError for a dialog whose roles are out of order. See `Options` for the rest."""
        steps = self._chat(dialogs, temperature, top_p, max_gen_len, logprobs, judge_input, judge_output, **options)
        return [
            {"generation": {"role": "assistant", "content": row.text}, **self._scored(row, logprobs)}
            for row in collect(steps, len(dialogs))
        ]

    @parallel.as_first_rank
    def chat_stream(
        self,
        dialogs: Sequence[Dialog],
        temperature: float | Sequence[float] = 0.6,
        top_p: float | Sequence[float] = 0.9,
        max_gen_len: int | Sequence[int] | None = None,
        logprobs: bool = False,
        *,
        judge_input: JudgeInput | None = None,
        judge_output: JudgeOutput | None = None,
        **options: Unpack[Options],
    ) -> Stream:
        """`chat_completion`, as it happens; see `generate_stream`. With `judge_output` an answer comes as a whole, when
        it has been judged."""
        steps = self._chat(dialogs, temperature, top_p, max_gen_len, logprobs, judge_input, judge_output, **options)
        return Stream(steps)

    @parallel.as_first_rank
    def score(
        self, prompts: Sequence[str], continuations: Sequence[str] | None = None, top_logprobs: int = 0
    ) -> list[Scored]:
        """How likely each prompt is, token by token after BOS; or, given its prompt, each continuation. With
        `top_logprobs` also the texts and log probabilities of so many of the likeliest tokens in the place of each.

        A continuation's tokens are those of prompt + continuation behind as many as the prompt alone has; there may be
        none, and then perplexity is NaN. Prompts may be more than max_batch_size. Raises ValueError for one that is
        longer than max_seq_len."""
        self._texts("prompts", prompts)
        if type(top_logprobs) is not int or not 0 <= top_logprobs <= self.model.vocab_size:
            raise ValueError(f"top_logprobs is {top_logprobs!r}; it must be an int from 0 to {self.model.vocab_size}")
        rows, begins = self._encode(prompts), [1] * len(prompts)
        if continuations is not None:
            self._texts("continuations", continuations)
            if len(continuations) != len(prompts):
                raise ValueError(f"there are {len(continuations)} continuations for {len(prompts)} prompts")
            begins = [len(row) for row in rows]
            rows = self._encode([prompt + more for prompt, more in zip(prompts, continuations, strict=True)])
        self._fit(rows, [f"prompt {i}" for i in range(len(rows))])
        with self._using():
            return [
                self._told(row, begin, scores)
                for row, begin, scores in zip(rows, begins, score(self.model, rows, top_logprobs), strict=True)
            ]

    def _told(self, row: Sequence[int], begin: int, scores: Scores) -> Scored:
        logprobs = scores.logprobs[begin - 1 :]
        total = math.fsum(logprobs)
        tops = zip(scores.top_ids[begin - 1 :], scores.top_logprobs[begin - 1 :], strict=True)
        return {
            "tokens": self.tokenizer.decode_pieces(row)[begin:],
            "token_ids": list(row[begin:]),
            "logprobs": logprobs,
            "top_logprobs": [[(self.tokenizer.piece(i), p) for i, p in zip(*top, strict=True)] for top in tops],
            "sum": total,
            "perplexity": math.exp(-total / len(logprobs)) if logprobs else math.nan,
        }

    @parallel.as_first_rank
    def embed(self, texts: Sequence[str], pooling: Literal["mean", "last"] = "mean") -> Tensor:
        """The last hidden states of each text with BOS before it, normalized as before the output layer: their mean, or
        the last token's; float32 (len(texts), dim)."""
        if pooling not in ("mean", "last"):
            raise ValueError(f"pooling is {pooling!r}; it must be 'mean' or 'last'")
        rows = self._encode(texts, "texts")
        self._fit(rows, [f"text {i}" for i in range(len(rows))])
        with self._using():
            return (
                embed(self.model, rows, pooling)
                if rows
                else torch.empty(0, self.model.params.dim, device=self.model.norm.weight.device)
            )

    def _texts(self, name: str, texts: Any) -> None:
        if isinstance(texts, (str, bytes)) or not isinstance(texts, Sequence):
            raise ValueError(f"{name} is {shorten(texts)}; it must be a list of str")
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(f"{name.removesuffix('s')} {i} is {shorten(text)}, which is not a str")

    def _encode(self, prompts: Sequence[str], name: str = "prompts") -> list[list[int]]:
        self._texts(name, prompts)
        return [self.tokenizer.encode(prompt, bos=True, eos=False) for prompt in prompts]

    def _chat(
        self,
        dialogs: Sequence[Dialog],
        temperature: Any = 0.6,
        top_p: Any = 0.9,
        max_gen_len: Any = None,
        logprobs: bool = False,
        judge_input: JudgeInput | None = None,
        judge_output: JudgeOutput | None = None,
        keep: bool = False,
        **options: Unpack[Options],
    ) -> Generator[list[Event], None, None]:
        if isinstance(dialogs, (str, bytes)) or not isinstance(dialogs, Sequence):
            raise ValueError(f"dialogs is {shorten(dialogs)}; it must be a list of dialogs")
        for i, dialog in enumerate(dialogs):
            check_dialog(dialog, f"dialog {i}")
        for name, judge in (("judge_input", judge_input), ("judge_output", judge_output)):
            if judge is not None and not callable(judge):
                raise ValueError(f"{name} is {shorten(judge)}; it must be a function")
        refusals = {i: REFUSAL for i, dialog in enumerate(dialogs) if has_tags(dialog)}
        if judge_input is not None:
            for i in sorted({*range(len(dialogs))} - {*refusals}):
                if (refusal := parallel.ask_first_rank(judge_input, dialogs[i])) is not None:
                    refusals[i] = check_verdict(refusal)
        allowed = [i for i in range(len(dialogs)) if i not in refusals]
        prompts = [encode_dialog(self.tokenizer, dialogs[i]) for i in allowed]
        self._check(prompts, [f"dialog {i}" for i in allowed])
        asked = self._asked(dialogs, max_gen_len, temperature, top_p, options, check=False)
        events = self._events(prompts, [asked[i] for i in allowed], logprobs, keep=keep)
        return judged(events, allowed, refusals, judge_output)

    def _asked(
        self, prompts: Any, max_gen_len: Any, temperature: Any, top_p: Any, options: Options, check: bool = True
    ) -> list[Ask]:
        """What is asked of each prompt; ValueError where it cannot be done."""
        if check:
            if not isinstance(prompts, (list, tuple)) or not all(isinstance(row, (list, tuple)) for row in prompts):
                raise ValueError(f"prompt_tokens is {shorten(prompts)}; it must be a list of lists of token ids")
            self._check(prompts, [f"prompt {i}" for i in range(len(prompts))])
        most = self.model.params.max_seq_len if max_gen_len is None else max_gen_len
        every = {"temperature": temperature, "top_p": top_p, **options}
        return asks(len(prompts), self.model.params.vocab_size, self.tokenizer.eos_id, most, self.generator, every)

    def _check(self, prompts: Sequence[Sequence[int]], names: Sequence[str]) -> None:
        params = self.model.params
        if len(prompts) > params.max_batch_size:
            raise ValueError(
                f"{len(prompts)} prompts exceed max_batch_size {params.max_batch_size}; "
                "pass fewer at a time or build with a larger max_batch_size"
            )
        for prompt, name in zip(prompts, names, strict=True):
            if not prompt:
                raise ValueError(f"{name} is empty; it needs at least one token, such as bos_id")
            if odd := [id for id in prompt if type(id) is not int or not 0 <= id < params.vocab_size]:
                raise ValueError(f"{name} holds {shorten(odd[0])}, which is no int from 0 to {params.vocab_size - 1}")
        self._fit(prompts, names)

    def _fit(self, rows: Sequence[Sequence[int]], names: Sequence[str]) -> None:
        limit = self.model.params.max_seq_len
        for row, name in zip(rows, names, strict=True):
            if len(row) > limit:
                raise ValueError(
                    f"{name} has {len(row)} tokens, more than max_seq_len {limit}; "
                    "shorten it or build with a larger max_seq_len"
                )

    @contextmanager
    def _using(self) -> Iterator[list[int]]:
        """The model, for nobody else; and the tokens that its cache was left with."""
        if self.broken:
            raise RuntimeError("an earlier call failed on this rank and left the others behind; start the job again")
        with self.turn:
            kept, self.turn.kept = self.turn.kept, []
            try:
                yield kept
            except GeneratorExit:
                raise
            except BaseException as error:
                self.turn.kept = []
                self.broken = parallel.world_size() > 1 and not isinstance(error, FloatingPointError)  # all agree on it
                raise

    def _events(
        self,
        prompts: Sequence[Sequence[int]],
        asked: Sequence[Ask],
        logprobs: bool,
        echo: bool = False,
        keep: bool = False,
    ) -> Generator[list[Event], None, None]:
        """What every row gains, step by step. To `keep` the cache of a single row is to begin with what was kept."""
        if not prompts:
            return
        texts = [Text(self.tokenizer, ask.stop, ask.min_new) for ask in asked]
        eos, longest = self.tokenizer.eos_id, self.model.params.max_seq_len
        with self._using() as kept:
            rows = [
                Row(
                    prompt,
                    min(longest, len(prompt) + ask.max_new),
                    ask.sampling,
                    eos,
                    ask.stop_ids,
                    ask.min_new,
                    ask.lookup,
                    text.add,
                )
                for prompt, ask, text in zip(prompts, asked, texts, strict=True)
            ]
            with closing(steps(self.model, rows, logprobs, echo, common(kept, prompts[0]) if keep else 0)) as run:
                for step in run:
                    events = []
                    for i, (gain, text) in enumerate(zip(step, texts, strict=True)):
                        ids, chances = [token.id for token in gain.tokens], [token.logprob for token in gain.tokens]
                        if echo:
                            text.preface(ids)
                        new = text.read(bool(gain.finish))
                        events.append(Event(i, new, ids, chances if logprobs else [], gain.finish))
                    echo = False
                    if keep:
                        self.turn.kept = rows[0].text
                    yield [event for event in events if event.tokens or event.finish_reason]
                    self.turn.thread = threading.get_ident()  # it may have passed from one thread to another

    def _scored(self, row: Event, logprobs: bool) -> _Scored:
        scored: _Scored = {"finish_reason": row.finish_reason}
        if logprobs:
            pieces, left = self.tokenizer.decode_pieces(row.tokens), len(row.text)
            scored["tokens"], scored["logprobs"] = [], row.logprobs
            for piece in pieces:  # of a text that was cut before a stop string
                scored["tokens"].append(piece[:left])
                left -= len(scored["tokens"][-1])
        return scored


def common(kept: Sequence[int], prompt: Sequence[int]) -> int:
    """How many tokens of a prompt, but its last, are those that were kept, of which the last is not sure to be."""
    pairs = zip(kept[:-1], prompt[:-1], strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), max(0, min(len(kept), len(prompt)) - 1))


def check_seed(seed: Any) -> None:
    if type(seed) is not int or not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed is {shorten(seed)}; it must be an int of 64 bits")
