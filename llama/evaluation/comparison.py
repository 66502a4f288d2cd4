"""The same prompts over several models: answers, speed, log probabilities of expected answers, and scores."""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import torch

from .. import parallel, scoring
from ..chat import Message
from ..devices import dtype_name
from ..generation import Llama
from .tasks import Task, read_tasks

SUFFIXES = {"int8": "quantize", "int4": "quantize", "float32": "dtype", "bfloat16": "dtype", "float16": "dtype"}
QUESTION = "Does the answer do what the task asks? Answer Yes or No."
ERRORS = (ValueError, ArithmeticError, OSError, RuntimeError, MemoryError)


class Row(TypedDict, total=False):
    """A model's result for a task. Log probabilities are natural, and sums over a text's tokens."""

    task: str
    model: str
    error: str  # instead of all that follows
    answer: str
    tokens: int
    first_token: float  # seconds
    tokens_per_s: float | None  # after the first token
    logprob: float | None  # of the expected answer, or of the right label
    labels: dict[str, float]  # log probability of each
    score: float | None  # 0 to 1: the right label is the most probable, or the share of expected texts in the answer
    reference_logprob: float | None  # of the reference model's answer
    equal: bool  # to the reference model's answer
    judgement: str
    judged: float  # probability of Yes against No


class Model(TypedDict, total=False):
    name: str
    error: str  # why it could not be loaded
    reference: str | None  # the model of another precision that it is compared with
    dtype: str  # or int8, int4, quantized
    weights: int  # bytes
    load: float  # seconds
    chat_format: str


class Comparison(TypedDict):
    """Rows are ordered by task, and within a task by model."""

    models: list[Model]
    tasks: list[dict[str, Any]]
    rows: list[Row]
    judge: str | None


def compare(
    models: Sequence[str],
    tasks: str | os.PathLike[str] | Sequence[dict[str, Any]] | None = None,
    judge: str | None = None,
    reference: str | None = None,
    max_tokens: int = 256,
    temperature: float = 0.0,
    progress: Callable[[str], object] = lambda name: None,
    **options: Any,
) -> Comparison:
    """Answer tasks, from a file or a list, with each model, one in memory at a time. A model is what `Llama.build`
    loads, with an optional suffix for its precision: `:int8`, `:int4` or a dtype. Models that differ only in precision
    are compared with the first of them that is not quantized; with `reference`, all are compared with that one. `judge`
    is a model that grades the answers. A model that cannot be loaded, and a task that does not fit, get an error
    instead of a result. Other options are those of `Llama.build`."""
    if isinstance(models, str) or not models or len({*models}) < len(models):
        raise ValueError(f"models is {models!r}; it must be a list of different models")
    if reference is not None and reference not in models:
        raise ValueError(f"reference is {reference!r}; it must be one of {', '.join(models)}")
    if type(max_tokens) is not int or max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens!r}; it must be a whole number of at least 1")
    chosen = read_tasks(tasks)
    options = {"max_seq_len": 2048, "max_batch_size": 1, **options}
    against = references(models, reference)
    found: dict[tuple[str, str], Row] = {}
    about: dict[str, Model] = {}
    for name in sorted(models, key=lambda name: against[name] is not None):  # references first
        progress(name)
        about[name] = {"name": name, "reference": against[name]}
        try:
            llama = load(name, about[name], options)
        except ERRORS as error:
            about[name]["error"] = described(error)
            found |= {(task.name, name): Row(task=task.name, model=name, error=described(error)) for task in chosen}
            continue
        for task in chosen:
            other = found.get((task.name, against[name] or ""), {})
            found[task.name, name] = run(llama, name, task, other, task.max_tokens or max_tokens, temperature)
        del llama
        free()
    if judge is not None:
        progress(judge)
        grade(judge, chosen, found, options)
    rows = [found[task.name, name] for task in chosen for name in models]
    return {"models": [about[m] for m in models], "tasks": [t._asdict() for t in chosen], "rows": rows, "judge": judge}


def parse(name: str) -> tuple[str, dict[str, str]]:
    """`MODEL:int8` -> what Llama.build loads, and its options."""
    path, _, suffix = name.rpartition(":")
    if path and suffix in SUFFIXES and not os.path.lexists(name):
        return path, {SUFFIXES[suffix]: suffix}
    return name, {}


def references(models: Sequence[str], reference: str | None = None) -> dict[str, str | None]:
    """The model that each model is compared with; None for references, and for models without another precision."""
    first: dict[str, str] = {}
    for name in sorted(models, key=lambda name: "quantize" in parse(name)[1]):
        first.setdefault(parse(name)[0], name)
    chosen = {name: reference or first[parse(name)[0]] for name in models}
    return {name: None if other == name else other for name, other in chosen.items()}


def build(name: str, options: dict[str, Any]) -> Llama:
    """Load a model by its name, which may end with a precision."""
    path, precision = parse(name)
    try:
        return Llama.build(path, **{**options, **precision})
    except FileNotFoundError as error:
        if ":" not in path:
            raise
        known = ", ".join(f":{suffix}" for suffix in SUFFIXES)
        raise FileNotFoundError(f"{error}; the precision behind a model is one of {known}") from error


def load(name: str, about: Model, options: dict[str, Any]) -> Llama:
    began = time.perf_counter()
    llama = build(name, options)
    about["load"] = time.perf_counter() - began
    model = llama.model
    weights: list[Any] = [getattr(module, "weight", None) for module in model.modules()]
    quantized = [weight for weight in weights if weight is not None and not isinstance(weight, torch.Tensor)]
    about["weights"] = sum(weight.nbytes for weight in [*model.parameters(), *quantized])
    dtype = dtype_name(next(model.parameters()).dtype)
    about["dtype"] = parse(name)[1].get("quantize") or ("quantized" if quantized else dtype)  # in its file
    about["chat_format"] = llama.chat_format.name
    llama.generate([[llama.tokenizer.bos_id if llama.tokenizer.bos_id >= 0 else 0]], 2, temperature=0)  # first passes
    return llama


def free() -> None:
    """Free the memory of models without references."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run(llama: Llama, name: str, task: Task, other: Row, max_tokens: int, temperature: float) -> Row:
    """Answer a task with a model, and score the answer. `other` is the reference's row."""
    row = Row(task=task.name, model=name)
    try:
        row |= answer(llama, task, max_tokens, temperature)  # type: ignore[typeddict-item]
        if task.labels:
            row["labels"] = {label: logprob(llama, task, label) for label in task.labels}
        row["logprob"] = logprob(llama, task, task.reference) if task.reference else None
        row["score"] = score(task, row)
        if "answer" in other:
            row["equal"] = row["answer"] == other["answer"]
            row["reference_logprob"] = logprob(llama, task, other["answer"]) if other["answer"].strip() else None
        elif row["answer"].strip():
            row["reference_logprob"] = logprob(llama, task, row["answer"])
    except parallel.RankError:
        raise
    except ERRORS as error:
        return Row(task=task.name, model=name, error=described(error))
    return row


def answer(llama: Llama, task: Task, max_tokens: int, temperature: float) -> dict[str, Any]:
    began = time.perf_counter()
    first, text, tokens = 0.0, "", 0
    if task.completion:
        stream = llama.text_stream([task.text], temperature, max_gen_len=max_tokens)
    else:
        stream = llama.chat_stream([task.messages], temperature, max_gen_len=max_tokens)
    for event in stream:
        if event.finish_reason == "refused":
            raise ValueError(event.text)
        first = first or time.perf_counter()
        text, tokens = text + event.text, tokens + len(event.tokens)
    rest = time.perf_counter() - first
    speed = (tokens - 1) / rest if tokens > 1 else None
    return {"answer": text, "tokens": tokens, "first_token": first - began, "tokens_per_s": speed}


def logprob(llama: Llama, task: Task, text: str) -> float:
    """The log probability of a text as the answer to a task; in a chat format, of the answer's text without its end."""
    if task.completion:
        more = text if text[:1].isspace() or task.text[-1:].isspace() else f" {text}"
        return llama.score([task.text], [more])[0]["sum"]
    return answer_logprob(llama, task.messages, text)


def answer_logprob(llama: Llama, messages: Sequence[Message], text: str) -> float:
    prompt = llama.inputs.encode_dialog(messages, "the dialog")
    reply: Message = {"role": "assistant", "content": llama.chat_format.cleaned(text).strip()}
    ids = llama.inputs.encode_dialog([*messages, reply], "the dialog", answered=True, unfinished=True)
    begin = next((i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), len(prompt))
    llama.inputs.check(ids, "the expected answer")
    [scores] = scoring.score(llama.engine, [ids], [begin])
    return math.fsum(scores.logprobs)


def score(task: Task, row: Row) -> float | None:
    """The score of an answer, 0 to 1; None without an expected answer."""
    if task.labels:
        return float(max(row["labels"], key=row["labels"].__getitem__) == task.label)
    facts = task.facts or ((task.expected,) if task.expected else ())
    said = row["answer"].casefold()
    right = [any(part.strip().casefold() in said for part in fact.split("|")) for fact in facts]
    return sum(right) / len(right) if right else None


def grade(judge: str, tasks: Sequence[Task], found: dict[tuple[str, str], Row], options: dict[str, Any]) -> None:
    """Ask a model whether each answer does what its task asks."""
    by_name = {task.name: task for task in tasks}
    answered = {key: row for key, row in found.items() if "answer" in row}
    try:
        llama = load(judge, Model(), options)
    except ERRORS as error:  # the answers are kept
        for row in answered.values():
            row["judgement"] = f"error: {described(error)}"
        return
    for (name, _), row in answered.items():
        content = f"Task:\n{by_name[name].text}\n\nAnswer:\n{row['answer']}\n\n{QUESTION}"
        dialog: list[Message] = [{"role": "user", "content": llama.chat_format.cleaned(content)}]
        try:
            row["judgement"] = llama.chat_completion([dialog], 0.0, max_gen_len=64)[0]["generation"]["content"]
            yes, no = (answer_logprob(llama, dialog, word) for word in ("Yes", "No"))
            row["judged"] = 1 / (1 + math.exp(min(no - yes, 700)))
        except ValueError as error:
            row["judgement"] = f"error: {described(error)}"


def described(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
