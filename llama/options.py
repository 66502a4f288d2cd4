"""The options of generation: checked, one value for each prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set, ValuesView
from functools import wraps
from inspect import Parameter, signature
from operator import index
from reprlib import repr as shorten
from typing import Any, NamedTuple, ParamSpec, TypedDict, TypeVar

import torch

from .grammar import to_grammar
from .sampling import SamplingParams

T = TypeVar("T")
P = ParamSpec("P")
ATOMS = {int, float, str, bool, bytes, type(None)}
DEFAULTS: dict[str, Any] = {"temperature": 0.6, "top_p": 0.9, "max_gen_len": None}


def plain(value: Any) -> Any:
    """A value in Python's own types: arrays, tensors, columns of a table, tuples and other collections become lists,
    the numbers of other libraries int or float. Any other value is returned as it is."""
    if type(value) in ATOMS or callable(value):
        return value
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    for name in ("tolist", "to_list", "to_pylist"):  # of NumPy, PyTorch and pandas; of Polars; of Arrow
        if hasattr(value, name):
            return plain(getattr(value, name)())
    if isinstance(value, (Sequence, Set, ValuesView)) and not isinstance(value, (str, bytes)):
        return [*value] if {*map(type, value)} <= ATOMS else [*map(plain, value)]
    return index(value) if hasattr(value, "__index__") else value


def plain_arguments(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function to get `plain` arguments, and the default for None."""
    parameters = signature(function).parameters
    defaults = {name: None if p.default is Parameter.empty else p.default for name, p in parameters.items()}

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        known = zip(args, [*defaults.values(), *args], strict=False)
        given = [plain(default if arg is None else arg) for arg, default in known]
        named = {name: plain(defaults.get(name) if arg is None else arg) for name, arg in kwargs.items()}
        return function(*given, **named)

    return call


class Options(TypedDict, total=False):
    """Keyword arguments of all methods that generate: one value for all prompts, or a list of one for each; None is the
    default. See sampling.SamplingParams for those that choose tokens; the default seed is drawn from the Llama's own.
    """

    top_k: int | Sequence[int]
    min_p: float | Sequence[float]
    repetition_penalty: float | Sequence[float]
    frequency_penalty: float | Sequence[float]
    presence_penalty: float | Sequence[float]
    logit_bias: Mapping[int, float] | Sequence[Mapping[int, float]]
    seed: int | Sequence[int | None] | None
    stop: str | Sequence[str] | Sequence[Sequence[str]]  # strings before which a text ends; a list of str is for all
    stop_token_ids: Sequence[int] | Sequence[Sequence[int]]  # ids before which it ends; a list of int is for all
    min_gen_len: int | Sequence[int]  # the least number of new tokens, unless max_gen_len is smaller
    json_schema: str | Mapping[str, Any] | Sequence[Any]  # the answer is JSON that follows it, see `grammar`
    regex: str | Sequence[str]  # the whole answer matches this regular expression
    prompt_lookup: int  # draft tokens of each step, copied from the text so far: the same answer in fewer steps


class Settings(NamedTuple):
    """The options of one prompt."""

    sampling: SamplingParams
    stop: Sequence[str]
    stop_ids: Sequence[int]
    max_new: int
    min_new: int
    lookup: int
    grammar: str = ""  # see `grammar.to_grammar`


def spread_options(
    B: int, vocab_size: int, eos_ids: Iterable[int], most: int, generator: torch.Generator, options: Mapping[str, Any]
) -> list[Settings]:
    """The settings of each of B prompts from `plain` options. None is the default: `most` for max_gen_len, a random one
    for a seed. TypeError for an unknown name, ValueError that names a bad value and its limit."""
    known = {*Options.__annotations__, *DEFAULTS}
    if unknown := [name for name in options if name not in known]:
        raise TypeError(f"there is no option {unknown[0]!r}; there are {', '.join(sorted(known))}")

    def column(name: str, default: Any = None) -> list[Any]:
        return [default if value is None else value for value in spread(name, options.get(name), B)]

    drawn = torch.randint(2**63 - 1, (B,), generator=generator, device="cpu").tolist()
    columns = {name: column(name, DEFAULTS.get(name, own)) for name, own in vars(SamplingParams()).items()}
    columns["seed"] = [new if seed is None else seed for seed, new in zip(column("seed"), drawn, strict=True)]
    sampling = [SamplingParams(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]
    stops = several("stop", options.get("stop"), B, str)
    stop_ids = several("stop_token_ids", options.get("stop_token_ids"), B, int)
    counts = column("max_gen_len", most), column("min_gen_len", 0), column("prompt_lookup", 0)
    grammars = map(to_grammar, column("json_schema"), column("regex"))
    rows = [Settings(*row) for row in zip(sampling, stops, stop_ids, *counts, grammars, strict=True)]
    for row in rows:
        if wrong := [id for id in (*row.sampling.logit_bias, *row.stop_ids) if not 0 <= id < vocab_size]:
            raise ValueError(f"logit_bias or stop_token_ids has the id {wrong[0]}; ids go from 0 to {vocab_size - 1}")
        forbidden = {id for id, bias in row.sampling.logit_bias.items() if bias == -math.inf}
        forbidden |= {*eos_ids, *row.stop_ids} if row.min_new else set()
        if len(forbidden) >= vocab_size:
            raise ValueError(f"logit_bias and min_gen_len leave none of {vocab_size} ids to choose from")
        if "" in row.stop:
            raise ValueError("stop has an empty string, which would end every text at once")
        whole = {"max_gen_len": row.max_new, "min_gen_len": row.min_new, "prompt_lookup": row.lookup}
        for name, value in whole.items():
            if type(value) is not int or value < 0:
                raise ValueError(f"{name} is {shorten(value)}; it must be an int of at least 0")
    return rows


def spread(name: str, value: Any, B: int) -> list[Any]:
    """One value for each of B rows."""
    if not isinstance(value, list):
        return [value] * B
    if len(value) != B:
        raise ValueError(f"{name} has {len(value)} values for {B} rows; give one for all, or one for each")
    return value


def several(name: str, value: Any, B: int, kind: type[T]) -> list[Sequence[T]]:
    """A list of values for each of B rows. A single value, or a flat list, is for all rows; None is an empty list."""
    value = [value] if isinstance(value, kind) else [] if value is None else value
    if not isinstance(value, list):
        raise ValueError(f"{name} is {shorten(value)}; it must be a list of {kind.__name__}, or one for each row")
    rows = [value] * B if all(type(item) is kind for item in value) else spread(name, value, B)
    rows = [[] if row is None else row for row in rows]
    for row in rows:
        if not isinstance(row, list) or not all(type(item) is kind for item in row):
            raise ValueError(f"{name} has {shorten(row)}; it must be a list of {kind.__name__}, or one for each row")
    return rows
