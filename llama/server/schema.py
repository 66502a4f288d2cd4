"""Parses and checks request bodies: JSON -> prompts and settings for the engine."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from reprlib import repr as shorten
from typing import Any, NamedTuple, TypeVar

from ..generation import Llama
from ..options import Settings

T = TypeVar("T")
MAX_CHOICES = 2048  # prompts times n, and inputs of embeddings


class ApiError(Exception):
    """An error response, in OpenAI's format."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, retry_after: int = 0
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    @property
    def body(self) -> dict[str, Any]:
        kinds = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class Work(NamedTuple):
    """An HTTP request, read and checked: a request to the engine for each prompt, and how the client wants the reply.
    It is sent to all ranks."""

    prompts: list[list[int]]  # each repeated n times, with settings
    settings: list[Settings] = []  # noqa: RUF012 - one for each; empty for embeddings
    logprobs: bool = False
    top_logprobs: int = 0
    echo: bool = False
    chat: bool = False
    continues: bool = True  # the answer continues the prompt's text
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    base64: bool = False  # of embeddings


Test = Callable[[Any], bool]


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_list_of(kind: type) -> Test:
    return lambda value: isinstance(value, list) and all(type(item) is kind for item in value)


def is_bias(value: Any) -> bool:
    return isinstance(value, dict) and all(
        key.isascii() and key.isdecimal() and len(key) < 10 and is_number(bias) for key, bias in value.items()
    )


def is_format(value: Any) -> bool:
    kind = value.get("type") if isinstance(value, dict) else None
    inner = value.get("json_schema") if kind == "json_schema" else None
    return kind in ("text", "json_object") or (isinstance(inner, dict) and isinstance(inner.get("schema"), dict))


NUMBER = is_number, "a number"
COUNT = (lambda v: type(v) is int and v >= 0), "an int of at least 0"
BOOL = (lambda v: isinstance(v, bool)), "true or false"
PENALTIES = ("repetition_penalty", "frequency_penalty", "presence_penalty")
FIELDS: dict[str, tuple[Test, str]] = {
    "model": ((lambda v: isinstance(v, str)), "a string"),
    **dict.fromkeys(("temperature", "top_p", "min_p", *PENALTIES), NUMBER),
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "min_tokens"), COUNT),
    **dict.fromkeys(("stream", "echo", "ignore_eos", "add_generation_prompt", "continue_final_message"), BOOL),
    "top_k": ((lambda v: type(v) is int and v >= -1), "an int, -1 or 0 for all"),
    "seed": ((lambda v: type(v) is int), "an int of 64 bits"),
    "n": ((lambda v: type(v) is int and 1 <= v <= 128), "an int from 1 to 128"),
    "best_of": ((lambda v: type(v) is int and v >= 1), "an int of at least 1"),
    "stop": ((lambda v: isinstance(v, str) or is_list_of(str)(v)), "a string or a list of strings"),
    "stop_token_ids": (is_list_of(int), "a list of token ids"),
    "logit_bias": (is_bias, "an object of numbers by token id"),
    **dict.fromkeys(("stream_options", "structured_outputs"), ((lambda v: isinstance(v, dict)), "an object")),
    "response_format": (
        is_format,
        "an object of type text, json_object or json_schema, which needs json_schema.schema",
    ),
}
LOGPROBS = (lambda v: type(v) is int and 0 <= v <= 20), "an int from 0 to 20"
OF_TEXT: dict[str, tuple[Test, str]] = {**FIELDS, "logprobs": LOGPROBS}
OF_CHAT: dict[str, tuple[Test, str]] = {**FIELDS, "logprobs": BOOL, "top_logprobs": LOGPROBS}
FORMAT = (lambda v: v in ("float", "base64")), "float or base64"
OF_EMBEDDINGS: dict[str, tuple[Test, str]] = {"model": FIELDS["model"], "encoding_format": FORMAT}
# Fields that this server does not support, and tests for values that are allowed because they request nothing.
REFUSED: dict[str, Test] = {
    **dict.fromkeys(("tools", "functions"), lambda v: v == []),
    **dict.fromkeys(("tool_choice", "function_call"), lambda v: v in ("none", "auto")),
    "modalities": lambda v: v == ["text"],
    "suffix": lambda v: v == "",
    "use_beam_search": lambda v: v is False,
    **dict.fromkeys(("audio", "prediction", "web_search_options", "prompt_logprobs"), lambda v: False),
    **dict.fromkeys(("guided_grammar", "structural_tag"), lambda v: False),
}
# Fields that are options of the library -> their names there.
OPTIONS = {name: name for name in ("temperature", "top_p", "top_k", "min_p", *PENALTIES, "stop", "stop_token_ids")}
OPTIONS["min_tokens"] = "min_gen_len"

# vLLM's kinds of structured output: tests of their values, and the equivalent options of the library. They are fields
# `guided_KIND` of a body, or fields of its structured_outputs.
STRUCTURES: dict[str, tuple[Test, Callable[[Any], dict[str, Any]]]] = {
    "json": (lambda v: isinstance(v, (str, dict)), lambda v: {"json_schema": v}),
    "json_object": (lambda v: v is True, lambda v: {"json_schema": {"type": "object"}}),
    "regex": (lambda v: isinstance(v, str), lambda v: {"regex": v}),
    "choice": (lambda v: v and is_list_of(str)(v), lambda v: {"regex": "|".join(map(re.escape, v))}),
}


def parse(text: bytes, name: str = "the body") -> dict[str, Any]:
    """A JSON object without its null fields."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"{name} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ApiError(400, f"{name} must be a JSON object")
    return {name: value for name, value in found.items() if value is not None}


def read_with(read: Callable[[Llama, Mapping[str, Any]], T], llama: Llama, body: Mapping[str, Any]) -> T:
    """read(llama, body), where a ValueError becomes an ApiError with status 400."""
    try:
        return read(llama, body)
    except ValueError as error:
        named = re.match(r"(?:message \d+ of )?(\w*)", str(error))
        raise ApiError(400, str(error), named[1] if named and named[1] in body else None) from error


def check_fields(body: Mapping[str, Any], fields: Mapping[str, tuple[Test, str]]) -> None:
    """ApiError for a field with a value of the wrong kind, or that this server does not support."""
    for name, value in body.items():
        if name in REFUSED and not REFUSED[name](value):
            raise ApiError(400, f"this server does not support {name} {shorten(value)}", name)
        if name in fields and not fields[name][0](value):
            raise ApiError(400, f"{name} is {shorten(value)}; it must be {fields[name][1]}", name)


def read_completion(llama: Llama, body: Mapping[str, Any]) -> Work:
    check_fields(body, OF_TEXT)
    if body.get("best_of", 1) > body.get("n", 1):
        raise ApiError(400, "this server does not support best_of larger than n", "best_of")
    most = body.get("max_tokens", 16)
    prompts = read_prompts(llama, body, "prompt", most)
    if body.get("echo") and "logprobs" in body:  # clients that score a prompt expect one token after it, not EOS
        body = {**body, "min_tokens": max(1, body.get("min_tokens", 0))}
    work = Work(prompts, [], "logprobs" in body, body.get("logprobs", 0), body.get("echo", False))
    return with_settings(llama, body, work, most)


def read_chat(llama: Llama, body: Mapping[str, Any]) -> Work:
    check_fields(body, OF_CHAT)
    if body.get("echo"):
        raise ApiError(400, "this server does not support echo in chats", "echo")
    wanted, top = body.get("logprobs", False), body.get("top_logprobs", 0)
    if top and not wanted:
        raise ApiError(400, "top_logprobs needs logprobs to be true", "top_logprobs")
    prompts = [encode_chat(llama, body)]
    most = body.get("max_completion_tokens", body.get("max_tokens", llama.model.params.max_seq_len))
    check_prompts(llama, prompts, "messages", most)
    work = Work(prompts, [], wanted, top, chat=True, continues=continues(body))
    return with_settings(llama, body, work, most)


def continues(body: Mapping[str, Any]) -> bool:
    """Whether the answer continues the last message, which is the assistant's."""
    final: bool = body.get("continue_final_message", False)
    if body.get("add_generation_prompt", not final) == final:
        text = "add_generation_prompt is false if, and only if, continue_final_message is true"
        raise ApiError(400, text, "add_generation_prompt")
    return final


def with_settings(llama: Llama, body: Mapping[str, Any], work: Work, most: int) -> Work:
    """Repeat each prompt n times, and add settings for answers of at most `most` tokens. As everywhere in this library,
    answers end where the context does, even if `most` is larger."""
    n = body.get("n", 1)
    if len(work.prompts) * n > MAX_CHOICES:
        raise ApiError(400, f"{len(work.prompts)} prompts times n {n} are more than {MAX_CHOICES} choices", "n")
    prompts = [prompt for prompt in work.prompts for _ in range(n)]
    options: dict[str, Any] = {"temperature": 1, "top_p": 1, "max_gen_len": min(most, llama.model.params.max_seq_len)}
    options |= {OPTIONS[name]: value for name, value in body.items() if name in OPTIONS}
    options["top_k"] = max(0, options.get("top_k", 0))
    options["logit_bias"] = {int(id): bias for id, bias in body.get("logit_bias", {}).items()}
    structure, field = read_structure(body)
    if body.get("ignore_eos") and not structure:  # EOS is never sampled, unless it is in stop_token_ids
        ends = {*llama.tokenizer.eos_ids} - {*body.get("stop_token_ids", ())}
        options["logit_bias"] |= dict.fromkeys(ends, -math.inf)
    if (seed := body.get("seed")) is not None:  # each choice has its own 64-bit seed, the first one the request's
        others = [(seed + k + 2**63) % 2**64 - 2**63 for k in range(1, n)]
        options["seed"] = [seed, *others] * len(work.prompts)
    try:
        settings = llama.inputs.settings(len(prompts), {**options, **structure}, work.continues)
    except ValueError as error:
        if str(error).startswith(tuple(structure) or " "):
            raise ApiError(400, str(error), field) from error
        raise
    include_usage = body.get("stream_options", {}).get("include_usage") is True
    stream = body.get("stream", False)
    return work._replace(prompts=prompts, settings=settings, n=n, stream=stream, include_usage=include_usage)


def read_structure(body: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The option for structured output, if any, and the field that requests it."""
    wanted = [(f"guided_{kind}", kind, body[f"guided_{kind}"]) for kind in STRUCTURES if f"guided_{kind}" in body]
    inner = body.get("structured_outputs", {})
    wanted += [("structured_outputs", kind, value) for kind, value in inner.items() if value is not None]
    form = body.get("response_format", {"type": "text"})
    if form["type"] != "text":
        schema = form["json_schema"]["schema"] if form["type"] == "json_schema" else {"type": "object"}
        wanted.append(("response_format", "json", schema))
    if len(wanted) > 1:
        text = f"{wanted[0][0]} and {wanted[1][0]} both say what an answer matches; give one of them"
        raise ApiError(400, text, wanted[1][0])
    if not wanted:
        return {}, ""
    field, kind, value = wanted[0]
    if kind not in STRUCTURES:
        raise ApiError(400, f"this server does not support {kind} in {field}", field)
    valid, option = STRUCTURES[kind]
    if not valid(value):
        raise ApiError(400, f"{field} has the {kind} {shorten(value)}, which is not valid", field)
    return option(value), field


def read_embeddings(llama: Llama, body: Mapping[str, Any]) -> Work:
    check_fields(body, OF_EMBEDDINGS)
    dim = llama.model.params.dim
    if body.get("dimensions", dim) != dim:
        raise ApiError(400, f"this model's embeddings have {dim} dimensions", "dimensions")
    text = body.get("input")
    if "" in (text if isinstance(text, list) else [text]):
        raise ApiError(400, "input has an empty string", "input")
    return Work(read_prompts(llama, body, "input", 0), base64=body.get("encoding_format") == "base64")


def read_prompts(llama: Llama, body: Mapping[str, Any], name: str, most: int) -> list[list[int]]:
    """The ids of one or several prompts, given as texts or as ids, for answers of at most `most` tokens."""
    if (value := body.get(name)) is None:
        raise ApiError(400, f"{name} is missing", name)
    several = value if isinstance(value, list) and not is_list_of(int)(value) else [value]
    if not several or len(several) > MAX_CHOICES:
        raise ApiError(400, f"{name} has {len(several)} items; it must have 1 to {MAX_CHOICES}", name)
    if is_list_of(str)(several):
        several = llama.inputs.encode(several)
    elif not all(is_list_of(int)(ids) for ids in several):
        wanted = "a string, a list of strings, token ids or a list of these"
        raise ApiError(400, f"{name} is {shorten(value)}; it must be {wanted}", name)
    check_prompts(llama, several, name, most)
    return several


def check_prompts(llama: Llama, prompts: Sequence[Sequence[int]], name: str, most: int) -> None:
    """ApiError for a prompt that leaves no space for a token of its answer, unless `most` is 0; ValueError for an empty
    prompt or an invalid id."""
    limit = llama.model.params.max_seq_len
    for i, prompt in enumerate(prompts):
        if len(prompt) + (most > 0) > limit:
            text = f"{name} has {len(prompt)} tokens, but the context is of {limit}, prompt and answer together"
            raise ApiError(400, text, name, "context_length_exceeded")
        llama.inputs.check(prompt, f"{name} {i}")


def encode_chat(llama: Llama, body: Mapping[str, Any]) -> list[int]:
    final = continues(body)
    return llama.inputs.encode_dialog(read_dialog(body), "messages", answered=final, unfinished=final)


def read_dialog(body: Mapping[str, Any]) -> Any:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages must be a list with at least one message", "messages")
    return [read_message(i, message) for i, message in enumerate(messages)]


def read_message(i: int, message: Any) -> dict[str, str]:
    """A message in the library's format: a role and a text."""
    name = f"messages[{i}]"
    if not isinstance(message, dict):
        raise ApiError(400, f"{name} is {shorten(message)}; it must be an object", name)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise ApiError(400, f"{name} has the role {shorten(role)}; it must be a string", f"{name}.role")
    for field in ("tool_calls", "function_call", "audio"):
        if message.get(field):
            raise ApiError(400, f"this server does not support {field}", f"{name}.{field}")
    if content is None and role == "assistant":
        content = message.get("refusal") or ""
    if isinstance(content, list):
        content = "".join(read_part(part, f"{name}.content[{k}]") for k, part in enumerate(content))
    if not isinstance(content, str):
        raise ApiError(400, f"{name} has the content {shorten(content)}; it must be a string", f"{name}.content")
    return {"role": "system" if role == "developer" else role, "content": content}


def read_part(part: Any, name: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else part
    text = part.get(kind) if isinstance(part, dict) and kind in ("text", "refusal") else None
    if not isinstance(text, str):
        raise ApiError(400, f"this server takes parts of type text, not {shorten(kind)}", name)
    return text
