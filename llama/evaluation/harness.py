"""This library as a model of lm-evaluation-harness, which has the tasks, prompts and metrics (extra `eval`)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from .. import parallel
from ..generation import Llama
from ..request import Request
from ..scoring import Scores

NAME = "llama"  # in the harness
QUEUE = 16  # requests per slot that are submitted at a time, because each step looks at all that wait
MAX_GEN_TOKS = 256  # the harness's default
# Options that the harness and this library share. normalize_gen_kwargs has applied others, such as do_sample.
OPTIONS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class Continuations(Scores):
    """Scores of continuations that differ only in their last ids, `ends`: `row` is the model's input, with the common
    ids of the continuations from index `begin` on. It is the `observe` of a request for `row`."""

    def __init__(self, row: Sequence[int], begin: int, ends: Sequence[int]) -> None:
        super().__init__([*row, ends[0]], begin, top=1)
        self.row, self.ends = row, ends
        self.others: list[float] = []  # log probabilities of the ends but the first

    def __call__(self, hidden: Tensor, start: int, logits: Callable[[Tensor], Tensor]) -> bool:
        if len(self.ends) > 1 and start + len(hidden) == len(self.row):
            self.others = torch.log_softmax(logits(hidden[-1:])[0], -1)[[*self.ends[1:]]].tolist()
        return super().__call__(hidden, start, logits) and all(map(math.isfinite, self.others))

    def results(self) -> list[tuple[float, bool]]:
        """For each continuation the sum of its log probabilities, and whether each of its ids is the argmax."""
        *common, first = self.logprobs
        *argmax, best = [row[0][0] for row in self.top_logprobs]
        total, greedy = math.fsum(common), argmax == [*self.row[self.begin :]]
        ends = zip(self.ends, [first, *self.others], strict=True)
        return [(total + logprob, greedy and best == end) for end, logprob in ends]


class HarnessModel(TemplateLM):
    """A `Llama` for lm_eval.simple_evaluate(model=HarnessModel(llama), ...). Under torchrun every rank has one and
    makes the same calls."""

    def __init__(self, llama: Llama, name: str = "llama", progress: bool = True) -> None:
        super().__init__()
        self.llama, self.name = llama, name
        self.hidden_progress = not progress or parallel.rank() > 0

    # -----------------------------------------------------------------------------------------------------------------
    # Texts

    @property
    def eot_token_id(self) -> int:
        return self.llama.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        tokenizer = self.llama.tokenizer
        return tokenizer.bos_id if tokenizer.bos_id >= 0 else tokenizer.eos_id

    @property
    def max_length(self) -> int:
        return self.llama.model.params.max_seq_len

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a text that may spell out special tokens, as chat templates do; with BOS before it, unless it has
        one or `add_special_tokens` is False."""
        ids = self.llama.tokenizer.encode_special(string)
        before = self.llama.tokenizer.encode("", bos=add_special_tokens is not False, eos=False)
        return ids if ids[:1] == before and add_special_tokens is None else before + ids

    @property
    def tokenizer_name(self) -> str:
        return f"{self.name}, {self.llama.chat_format.name}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.llama.chat_format.name if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A dialog in the model's own format, special tokens spelled out."""
        llama, dialog = self.llama, [{"role": m["role"], "content": m["content"]} for m in chat_history]
        ids = llama.inputs.encode_dialog(dialog, "the dialog", answered=not add_generation_prompt)  # type: ignore[arg-type]
        names = {id: name for name, id in llama.tokenizer.special.items()}
        parts = list[str]()
        for special, some in groupby(ids, names.__contains__):  # a special token begins a new text
            run = [*some]
            parts += [names[id] for id in run] if special else [llama.tokenizer.decode(run)]
        return "".join(parts)

    def get_model_info(self) -> dict[str, Any]:
        model = self.llama.model
        counts = sum(p.numel() for p in model.parameters())
        return {"model_num_parameters": counts, "model_dtype": str(next(model.parameters()).dtype), "model": self.name}

    # -----------------------------------------------------------------------------------------------------------------
    # Log likelihoods

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """For each (texts, context ids, continuation ids) the sum of the continuation's log probabilities, and whether
        each of its ids is the argmax. What is too long is truncated on the left."""
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        alike: dict[tuple[tuple[int, ...], int], list[int]] = defaultdict(list)
        ends = list[int]()
        for i, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise ValueError(f"a continuation has {len(continuation)} tokens, more than {self.max_length}")
            ids = [*context, *continuation][-self.max_length - 1 :]
            ends.append(ids[-1])
            if continuation:
                alike[tuple(ids[:-1]), len(ids) - len(continuation)].append(i)
        keys = sorted(alike)  # so that neighbours share prefixes, which are computed once
        observers = [Continuations(row, begin, [ends[i] for i in alike[row, begin]]) for row, begin in keys]
        queued = [Request(o.row, len(o.row), observe=o, compute_from=o.first) for o in observers]
        self._run(queued, disable_tqdm, "log likelihoods")
        for key, observer in zip(keys, observers, strict=True):
            for i, result in zip(alike[key], observer.results(), strict=True):
                found[i] = result
                if (texts := requests[i][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, found[i])
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log probability of each whole text, in windows of `max_length`."""
        texts = [self.tok_encode(request.args[0]) for request in requests]
        windows = [[*get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)] for ids in texts]
        rows = [(None, *make_disjoint_window(window)) for some in windows for window in some]
        parts = iter(self._loglikelihood_tokens(rows, disable_tqdm))
        sums = [math.fsum(next(parts)[0] for _ in some) for some in windows]
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    # -----------------------------------------------------------------------------------------------------------------
    # Generation

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, up to the first of its stop strings."""
        llama, queued = self.llama, list[Request]()
        for request in requests:
            context, given = request.args
            options = normalize_gen_kwargs(given, MAX_GEN_TOKS)
            stop, most = [*filter(None, options["until"])], options["max_gen_toks"]
            if not 0 < most < self.max_length:
                raise ValueError(f"max_gen_toks is {most}; the context of {self.max_length} must be longer")
            prompt = self.tok_encode(context)[most - self.max_length :]
            kept = {name: options[name] for name in OPTIONS if options.get(name) is not None}
            own = {"temperature": 0.0, "top_p": 1.0, **kept, "max_gen_len": most, "stop": stop or None}
            prompt = prompt or [self.prefix_token_id]
            # As in chats, an answer's text does not continue the prompt's.
            settings = llama.inputs.settings(1, own, continues=False)
            queued += llama.inputs.requests([prompt], settings, logprobs=False, continues=False)
        # Longest first, so that the last to end are short.
        order = sorted(range(len(queued)), key=lambda i: (-len(queued[i].prompt), queued[i].prompt))
        texts = self._run([queued[i] for i in order], disable_tqdm, "generation")
        answers = dict(zip(order, texts, strict=True))
        for i, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, answers[i])
        return [answers[i] for i in range(len(requests))]

    def _run(self, requests: Sequence[Request], disable_tqdm: bool, what: str) -> list[str]:
        """Run requests, and return the text of each."""
        hidden = disable_tqdm or self.hidden_progress
        texts, size = [""] * len(requests), QUEUE * len(self.llama.engine.slots)
        with tqdm(total=len(requests), desc=what, disable=hidden) as bar:
            for first in range(0, len(requests), size):
                for events in self.llama.engine.run(requests[first : first + size]):
                    for event in events:
                        texts[first + event.row] += event.text
                        bar.update(event.finish_reason is not None)
        return texts


def register(build: Callable[[], HarnessModel]) -> None:
    """Register a model `NAME`, which the harness's command line creates by `build`."""
    import lm_eval.models  # noqa: F401 - it registers its own models only if no other is registered yet
    from lm_eval.api.registry import register_model

    class Registered(HarnessModel):
        @classmethod
        def create_from_arg_obj(cls, arg_dict: Any, additional_config: Any = None) -> HarnessModel:
            return build()

        create_from_arg_string = create_from_arg_obj

    register_model(NAME)(Registered)
