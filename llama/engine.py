"""Tokens in, tokens out, one step at a time. Every way to generate drains `steps`; there is no second loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from .cpp import likeliest
from .decode import Decode, Native, decoder, fastest
from .lookup import Lookup
from .model import Transformer
from .parallel import broadcast, world_size
from .sampling import Sampler, Sampling, token_logprobs

AHEAD = {"cuda"}  # devices that begin a step before the host has read what the last one chose
LOGITS_AT_ONCE = 2**25  # float32 values held while a prompt is scored: 128 MiB
WORTH_SHARING = 32  # tokens; fewer are computed for each prompt, as a pass of their own would read all weights again


@dataclass
class Row:
    """What one row of a batch is to do, and how far it is."""

    prompt: Sequence[int]  # at least one token
    limit: int  # of prompt and answer together, at most max_seq_len
    sampling: Sampling = field(default_factory=Sampling)
    eos_id: int = -1  # none
    stop_ids: Sequence[int] = ()
    min_new: int = 0  # neither EOS nor stop_ids before so many tokens
    lookup: int = 0  # guesses, from the text so far, that are tried with each step
    ends: Callable[[int], bool] | None = None  # asked of every token that is gained: whether it is the last

    def __post_init__(self) -> None:
        self.text = list(self.prompt)
        self.finish: Literal["eos", "stop", "length"] | None = None if len(self.text) < self.limit else "length"

    @property
    def new(self) -> int:
        return len(self.text) - len(self.prompt)

    def take(self, id: int) -> bool:
        """Whether a token becomes part of the text; either way it may be the end."""
        if id == self.eos_id or id in self.stop_ids:
            self.finish = "eos" if id == self.eos_id else "stop"
            return False
        self.text.append(id)
        if self.ends and self.ends(id):
            self.finish = "stop"
        elif len(self.text) == self.limit:
            self.finish = "length"
        return True


class Token(NamedTuple):
    id: int
    logprob: float = math.nan  # where nobody asked


class Gain(NamedTuple):
    """What a step has brought a row: tokens, and once, at its end, why it ended."""

    tokens: list[Token]
    finish: str | None = None


Step = list[Gain]


@torch.inference_mode()
def steps(
    model: Transformer,
    rows: Sequence[Row],
    logprobs: bool = False,
    echo: bool = False,
    cached: int = 0,
) -> Generator[Step, None, None]:
    """Prefill all prompts in one pass, then yield a step per pass over the model until every row has ended.

    What is chosen on the first rank holds for all; when its caller closes the iterator, it ends on all ranks. With
    `echo` the first step holds the prompts themselves. Of a single prompt, `cached` tokens may be in the cache already.
    Guesses change no token, but for what rounding does, as several positions take other kernels than one. Raises
    FloatingPointError naming the first layer that was not finite.
    """
    prompts, device = [row.prompt for row in rows], model.norm.weight.device
    again: Callable[[], Iterable[Tensor]] = partial(prefill, model, prompts, cached)
    compute = fastest(model)
    step: Step = [Gain([], row.finish) for row in rows]
    if echo or not all(row.finish for row in rows):
        found = prefill(compute(sum(map(len, prompts)) - cached), prompts, cached)
        if echo:
            scores = [[math.nan] * len(prompt) for prompt in prompts]
            if logprobs:
                scores = [prompt_logprobs(model, prompt, row) for prompt, row in zip(prompts, found, strict=True)]
                if not all(math.isfinite(score) for row in scores for score in row):
                    raise not_finite(model, again)
            step = [Gain([*map(Token, *told)], row.finish) for *told, row in zip(prompts, scores, rows, strict=True)]
        # (B, T, V), here of each row's last token
        logits = compute(len(rows)).logits(torch.stack([row[-1:] for row in found]))
        del found
    sampler = Sampler([row.sampling for row in rows], prompts, model.vocab_size, device)
    lookup, lookups = any(row.lookup for row in rows), [Lookup(row.lookup) for row in rows]
    guesses: list[list[int]] = [[] for _ in rows]
    native = compute(len(rows))
    decode: Decode | None = native if isinstance(native, Native) else None
    # What one operator in C++ chooses.
    simple = decode and sampler.plain and not lookup and not any(row.min_new for row in rows)
    closed = False
    while True:
        if not closed and any(gain.tokens or gain.finish for gain in step):
            try:
                yield step
            except GeneratorExit:
                if world_size() == 1:
                    raise
                closed = True  # the first rank says so in its next message; another goes on until the first does
        if all(row.finish for row in rows):
            return
        # One message and one synchronization a step: the ids, whether they can be trusted (1) and were the last (2).
        # After a small step each operation here takes a hundredth of it.
        if simple:
            message = likeliest(logits[:, 0])
        else:
            chosen = choose(logits, rows, sampler, guesses)
            state = logits.sum().isfinite()[None]  # what is not finite makes the sum so, and it is quicker to look at
            message = broadcast(torch.cat((chosen.flatten(), state + 2 if closed else state)))
        chosen = message[:-1].view(len(rows), -1)  # (B, T)
        chances = token_logprobs(logits, chosen) if logprobs else None
        # A row that has ended goes through the motions at its last position.
        following: tuple[Tensor, Sequence[int]] = chosen, [len(row.text) - bool(row.finish) for row in rows]
        early: Tensor | None = None
        going = any(not row.finish and len(row.text) + 1 < row.limit for row in rows)
        if going and not lookup and device.type in AHEAD:
            decode = decode or decoder(model, len(rows))
            early = decode(*following)
        *ids, state = message.tolist()
        if not state & 1:
            raise not_finite(model, again)
        if state & 2:
            return
        T = chosen.shape[1]
        told = [[math.nan] * T] * len(rows) if chances is None else chances.tolist()
        step = [gain(row, ids[i * T : (i + 1) * T], told[i], guesses[i]) for i, row in enumerate(rows)]
        if all(row.finish for row in rows):
            continue
        if lookup:
            for guesser, gained in zip(lookups, step, strict=True):
                guesser.judge(len(gained.tokens) - 1)
            guesses = guess(lookups, rows, model.params.max_seq_len)
            # A row that has ended may have no room behind its end, and nobody reads its cache any more.
            starts = [0 if row.finish and guesses[0] else len(row.text) - 1 for row in rows]
            tokens = [[row.text[-1], *guessed] for row, guessed in zip(rows, guesses, strict=True)]
            following = torch.tensor(tokens, device=device), starts
        if early is not None:
            logits = early
        elif following[0].shape[1] > 1:
            logits = compute(following[0].numel())(*following)
        else:
            decode = decode or decoder(model, len(rows))
            logits = decode(*following)
        again = partial(model.hidden, *following)


def choose(logits: Tensor, rows: Sequence[Row], sampler: Sampler, guesses: Sequence[Sequence[int]]) -> Tensor:
    """Tokens (B, T) chosen at each position of logits (B, T, V). Position t > 0 follows guess t - 1 of `guesses`
    (B, T - 1), and counts only where all guesses before it were right."""
    chosen: list[Tensor] = []
    right: Tensor | None = None
    for t in range(logits.shape[1]):
        if t:
            same = chosen[-1] == torch.tensor([row[t - 1] for row in guesses], device=logits.device)
            right = same if right is None else right & same
        which = [row.new + t for row in rows]
        chosen.append(sampler(forbid(logits[:, t], rows, which), which))
        sampler.saw(chosen[t], right)
    return torch.stack(chosen, 1)


def forbid(logits: Tensor, rows: Sequence[Row], which: Sequence[int]) -> Tensor:
    """Logits (B, V) without the ends of rows whose `which[b]`-th new token comes too early for one."""
    early = [
        (i, id) for i, row in enumerate(rows) if which[i] < row.min_new for id in (row.eos_id, *row.stop_ids) if id >= 0
    ]
    if not early:
        return logits
    return logits.index_put(tuple(torch.tensor(early, device=logits.device).t()), logits.new_tensor(-math.inf))


def gain(row: Row, ids: Sequence[int], logprobs: Sequence[float], guesses: Sequence[int]) -> Gain:
    """What `row` takes of the ids (T,) that were chosen for it: all up to the first that was not guessed."""
    if row.finish:
        return Gain([])
    tokens: list[Token] = []
    for id, logprob, guessed in zip(ids, logprobs, [*guesses, -1], strict=True):
        if row.take(id):
            tokens.append(Token(id, logprob))
        if row.finish or id != guessed:
            break
    return Gain(tokens, row.finish)


def guess(lookups: Sequence[Lookup], rows: Sequence[Row], max_seq_len: int) -> list[list[int]]:
    """Guesses (B, n), as many as the longest, of what follows each row. What fills up the others may be right too."""
    found = [[] if row.finish else lookup.guess(row.text) for lookup, row in zip(lookups, rows, strict=True)]
    room = min(max_seq_len - len(row.text) for row in rows if not row.finish)
    n = min(room, max(map(len, found)))
    return [(ids + [0] * n)[:n] for ids in found]


def prefill(model: Transformer | Native, prompts: Sequence[Sequence[int]], cached: int = 0) -> list[Tensor]:
    """The last layer's output (T, dim) for the tokens of each prompt, all in one pass. A long beginning that they share
    is computed once. The first `cached` tokens of a single prompt are in the cache, and left out."""
    if cached:
        return [model.packed([prompts[0][cached:]], [cached])]
    lengths = [len(prompt) for prompt in prompts]
    differ = (i for i, ids in enumerate(zip(*prompts, strict=False)) if len({*ids}) > 1)
    shared = min(next(differ, max(lengths)), min(lengths) - 1)  # each needs a last token of its own
    if len(prompts) == 1 or shared < WORTH_SHARING:
        return list(model.packed(prompts, [0] * len(prompts)).split(lengths))
    start = model.packed([prompts[0][:shared]], [0])
    model.copy_cache(shared, len(prompts))
    own = model.packed([prompt[shared:] for prompt in prompts], [shared] * len(prompts))
    return [torch.cat((start, rest)) for rest in own.split([length - shared for length in lengths])]


def prompt_logprobs(model: Transformer, prompt: Sequence[int], hidden: Tensor) -> list[float]:
    """Log probabilities of a prompt's tokens given those before them, from `hidden` (T, dim); 0 for the first, which
    nothing predicts."""
    return [0.0, *torch.cat([chances for chances, _, _ in prompt_scores(model, prompt, hidden, 0)]).tolist()]


def prompt_scores(
    model: Transformer, prompt: Sequence[int], hidden: Tensor, top: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For a few of a prompt's positions at a time, so that the logits of a long one fit: log probabilities (n,) of the
    tokens behind them, the `top` highest (n, top) and whose they are (n, top)."""
    targets = torch.tensor(prompt[1:], device=hidden.device)  # position t predicts token t + 1
    chunk = max(1, LOGITS_AT_ONCE // model.vocab_size)
    for part, ids in zip(hidden[:-1].split(chunk), targets.split(chunk), strict=True):
        logits = model.logits(part)
        yield token_logprobs(logits, ids), *torch.log_softmax(logits, -1).topk(top)


def not_finite(model: Transformer, again: Callable[[], Iterable[Tensor]]) -> FloatingPointError:
    """The error that names the first layer that gives NaN or infinity when the rows (T, dim) of a step are computed
    again. The cache is emptied."""
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda module, args, output: None if output.isfinite().all() else found.append(name)

    named: dict[str, nn.Module] = {"tok_embeddings": model.tok_embeddings, "norm": model.norm, "output": model.output}
    named |= {f"layers.{i}": layer for i, layer in enumerate(model.layers)}
    hooks = [module.register_forward_hook(watch(name)) for name, module in named.items()]
    try:
        model.logits(torch.stack([row[-1] for row in again()]))
    finally:
        for hook in hooks:
            hook.remove()
    for kept in model.buffers():  # a masked NaN is still NaN times 0: it would break the next batch too
        kept.zero_()
    where = f"the first layer to give such values is {found[0]}" if found else "computed again, they were not"
    return FloatingPointError(f"the logits are NaN or infinite; {where}")
