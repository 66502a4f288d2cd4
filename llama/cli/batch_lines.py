"""An input line of a batch, and its output line. A line in OpenAI's format is answered with the body that the server
would send; a line in the plain format has the library's option names and defaults."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..generation import Llama
from ..options import DEFAULTS
from ..server import replies, schema
from ..server.loop import Job
from ..server.schema import ApiError
from ..stream import whole

Key = str | int | tuple[str, int]
TEXT, CHAT, EMBED = "/v1/completions", "/v1/chat/completions", "/v1/embeddings"
RENAMED = {"max_gen_len": "max_tokens", "min_gen_len": "min_tokens"}  # the library's options -> fields of a body
RENAMED |= {"json_schema": "guided_json", "regex": "guided_regex"}


class Line(NamedTuple):
    number: int  # in its file, from 1
    openai: bool = False  # its format
    id: str | int | None = None  # None if there is an error
    fields: Mapping[str, Any] = {}  # without those that are null
    error: ApiError | None = None

    @property
    def key(self) -> Key:
        return ("line", self.number) if self.id is None else self.id


def parse_line(number: int, content: bytes) -> Line:
    openai = False
    try:
        fields = schema.parse(content, f"line {number}")
        openai = not fields.keys().isdisjoint(("custom_id", "url", "body"))
        id = fields.get("custom_id") if openai else fields.get("id", number)
        if openai and type(id) is not str:
            raise ApiError(400, f"line {number} needs a custom_id, a string", "custom_id")
        if type(id) not in (str, int):
            raise ApiError(400, f"the id of line {number} must be a string or an int", "id")
        return Line(number, openai, id, fields)
    except ApiError as error:
        return Line(number, openai, error=error)


class Task(Job):
    """The job of a line. Raises ApiError, which says what is wrong, if the line cannot be answered."""

    def __init__(self, llama: Llama, line: Line, seed: int, model: str) -> None:
        if line.error:
            raise line.error
        self.line, self.llama = line, llama
        url, body = openai_body(line) if line.openai else plain_body(line, llama.model.params.max_seq_len)
        self.model = body.get("model", model)
        # Neither other lines nor how many of them are answered already change an answer.
        super().__init__(schema.read_with(READ[url], llama, {"seed": own_seed(seed, line.number), **body}))
        if self.work.stream:
            raise ApiError(400, "a batch does not support stream", "stream")
        if not line.openai and len(self.work.prompts) != 1:
            raise ApiError(400, "a line has one prompt, and n is 1")

    def answer(self) -> tuple[bytes, int, bool]:
        """The answer, once all requests have ended; the number of new tokens; and whether it is an error."""
        tokens = self.usage()["completion_tokens"]
        try:
            for request in self.requests:
                self.check(request.outputs[-1])
            return self._reply(), tokens, False
        except ApiError as error:
            return failed(self.line, error), tokens, True

    def _reply(self) -> bytes:
        if not self.work.settings:
            return openai_answer(self.line, 200, replies.embeddings(self.model, self))
        reply = replies.Reply(self.llama.tokenizer, self.model, self)
        body = reply.whole([whole(request.outputs) for request in self.requests])
        if self.line.openai:
            return openai_answer(self.line, 200, body)
        choice = {name: value for name, value in body["choices"][0].items() if name != "index" and value is not None}
        if "message" in choice:
            del choice["message"]["refusal"]
        return dump({"id": self.line.id, **choice, "usage": body["usage"]})


READ = {TEXT: schema.read_completion, CHAT: schema.read_chat, EMBED: schema.read_embeddings}


def openai_body(line: Line) -> tuple[str, dict[str, Any]]:
    url, method, body = (line.fields.get(name) for name in ("url", "method", "body"))
    if not isinstance(url, str) or url not in READ:
        raise ApiError(404, f"url is {schema.shorten(url)}; it must be one of {', '.join(READ)}", "url")
    if method not in ("POST", None):
        raise ApiError(405, f"method is {schema.shorten(method)}; it must be POST", "method")
    if not isinstance(body, dict):
        raise ApiError(400, f"body is {schema.shorten(body)}; it must be an object", "body")
    return url, {name: value for name, value in body.items() if value is not None}


def plain_body(line: Line, most: int) -> tuple[str, dict[str, Any]]:
    """The equivalent request body of a plain line, with the library's defaults."""
    body = {RENAMED.get(name, name): value for name, value in line.fields.items() if name != "id"}
    if ("prompt" in body) == ("messages" in body):
        raise ApiError(400, "a line needs either prompt or messages")
    url, fields = (TEXT, schema.OF_TEXT) if "prompt" in body else (CHAT, schema.OF_CHAT)
    known = {"prompt", "messages", *fields, *schema.REFUSED, *(f"guided_{kind}" for kind in schema.STRUCTURES)}
    if unknown := [name for name in body if name not in known]:
        raise ApiError(400, f"there is no option {schema.shorten(unknown[0])}")
    return url, {**{name: DEFAULTS[name] for name in ("temperature", "top_p")}, "max_tokens": most, **body}


def own_seed(seed: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:8], "big") >> 1


def failed(line: Line, error: ApiError) -> bytes:
    """The output line, with an error, for a line that cannot be answered."""
    if line.openai:
        return openai_answer(line, error.status, error.body)
    return dump({"id": line.id, **unnamed(line), "error": str(error)})


def openai_answer(line: Line, status: int, body: Mapping[str, Any]) -> bytes:
    response = {"status_code": status, "request_id": uuid.uuid4().hex, "body": body}
    ids = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": line.id, **unnamed(line)}
    return dump({**ids, "response": response, "error": None})


def unnamed(line: Line) -> dict[str, int]:
    """The field `line` that identifies a line without an id."""
    return {} if line.id is not None else {"line": line.number}


def dump(answer: Mapping[str, Any]) -> bytes:
    return json.dumps(answer).encode() + b"\n"
