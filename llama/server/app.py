"""The routes of the server, and what is around each: keys, limits, errors and a line of the log."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..generation import Llama
from ..request import Event
from . import replies
from .loop import Loop, Ticket
from .metrics import Metrics
from .schema import ApiError, Asked, Work, encode_chat, parse, read_chat, read_completion, read_embeddings

T = TypeVar("T")
log = logging.getLogger("llama.server")
POLL = 0.1  # seconds between two looks at whether a client that waits for a whole reply is still there
POLLED = {"/health", "/metrics"}  # so often that the log has them at its level DEBUG alone
KEEPALIVE = 15.0  # seconds of silence after which a stream gets a comment, so that proxies keep it


class Config(NamedTuple):
    model: str  # the name that clients ask for
    any_model: bool = False  # answer to every name
    keys: tuple[str, ...] = ()  # without one, none is asked for
    max_waiting: int = 64  # requests that may wait for a slot
    max_body: int = 2**22  # bytes
    allow_origins: tuple[str, ...] = ()


class Service:
    """What the routes have in common. `loop` is there once the model is loaded."""

    def __init__(self, config: Config) -> None:
        self.config, self.metrics = config, Metrics(config.model)
        self.loop: Loop | None = None
        self.draining = False
        self.reading = asyncio.Lock()  # tokenizing takes long for long texts; one thread is enough
        self.created = int(time.time())

    def ready(self) -> Loop:
        """The engine's loop; ApiError before it is there, and while the server ends."""
        if self.loop is None or self.draining:
            why = "the server is ending" if self.draining else "the model is being loaded"
            raise ApiError(503, why, retry_after=5)
        return self.loop

    async def body(self, request: HttpRequest) -> dict[str, Any]:
        """The JSON body, with the name of a model that this server has."""
        data, limit = bytearray(), self.config.max_body
        try:
            async for part in request.stream():
                data += part
                if len(data) > limit:
                    raise ApiError(413, f"the body is longer than {limit} bytes")
        except ClientDisconnect as error:
            raise ApiError(499, "the client has gone") from error
        found = parse(bytes(data))
        self.check_model(found.get("model", self.config.model))
        return found

    def check_model(self, name: object) -> None:
        if not isinstance(name, str):
            raise ApiError(400, f"model is {name!r}; it must be a string", "model")
        if name != self.config.model and not self.config.any_model:
            text = f"there is no model {name!r}; this server has {self.config.model!r}"
            raise ApiError(404, text, "model", "model_not_found")

    async def read(self, read: Callable[[Llama, Mapping[str, Any]], T], body: Mapping[str, Any]) -> T:
        """What `read` makes of a body; what the library refuses is the client's error."""
        llama = self.ready().llama
        async with self.reading:
            try:
                return await asyncio.to_thread(read, llama, body)
            except ValueError as error:
                name = re.split(r"[ :]", str(error))[0]
                raise ApiError(400, str(error), name if name in body else None) from error

    def submit(self, work: Work) -> Ticket:
        loop, limit = self.ready(), len(self.ready().llama.engine.slots) + self.config.max_waiting
        if loop.open and loop.open + len(work.prompts) > limit:
            raise ApiError(429, f"{loop.open} requests run or wait already; try again", retry_after=1)
        return loop.submit(work)


def service(request: HttpRequest) -> Service:
    found: Service = request.app.state.service
    return found


async def completions(request: HttpRequest) -> Response:
    return await generate(request, read_completion)


async def chat_completions(request: HttpRequest) -> Response:
    return await generate(request, read_chat)


async def generate(request: HttpRequest, read: Callable[[Llama, Mapping[str, Any]], Asked]) -> Response:
    own = service(request)
    loop, body = own.ready(), await own.body(request)
    asked = await own.read(read, body)
    ticket = own.submit(asked.work)
    reply = replies.Reply(loop.llama.tokenizer, body.get("model", own.config.model), asked, ticket)
    if asked.stream:
        return EventStream(stream(request, reply, ticket), loop, ticket)
    parts: list[list[replies.Part]] = [[] for _ in asked.work.prompts]
    async for event in until_gone(request, loop, ticket):
        parts[event.row].append(reply.take(event))
    note(request, ticket, reply.usage())
    return json_response(reply.whole(parts))


async def stream(request: HttpRequest, reply: replies.Reply, ticket: Ticket) -> AsyncIterator[str]:
    for chunk in reply.first_chunks():
        yield data(chunk)
    try:
        async for events in ticket.events(KEEPALIVE):
            if not events:
                yield ": keepalive\n\n"
            for event in events:
                check(ticket, event)
                for chunk in reply.chunks(event.row, reply.take(event)):
                    yield data(chunk)
        note(request, ticket, reply.usage())
        if reply.asked.include_usage:
            yield data(reply.usage_chunk())
    except ApiError as error:
        yield data(error.body)
    yield "data: [DONE]\n\n"


def data(value: object) -> str:
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n"


class EventStream(StreamingResponse):
    """A stream of events, whose ticket is cancelled when the client has gone, even before the first."""

    def __init__(self, content: AsyncIterator[str], loop: Loop, ticket: Ticket) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.loop, self.ticket = loop, ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.loop.cancel(self.ticket)


async def until_gone(request: HttpRequest, loop: Loop, ticket: Ticket) -> AsyncIterator[Event]:
    """The events of a ticket, which is cancelled where the client has gone."""
    looked = time.monotonic()
    try:
        async for events in ticket.events(POLL):
            for event in events:
                check(ticket, event)
                yield event
            if time.monotonic() - looked >= POLL:
                if await request.is_disconnected():
                    raise ApiError(499, "the client has gone")
                looked = time.monotonic()
    finally:
        loop.cancel(ticket)


def check(ticket: Ticket, event: Event) -> None:
    """ApiError for an event that says that its request failed."""
    if event.finish_reason == "error":
        error = ticket.requests[event.row].error
        # A ValueError is of options that contradict each other, such as a logit_bias that excludes all of a grammar.
        raise ApiError(400 if isinstance(error, ValueError) else 500, str(error))
    if event.finish_reason == "cancelled":
        raise ApiError(503, "the request was cancelled", retry_after=1)


def note(request: HttpRequest, ticket: Ticket, usage: Mapping[str, Any]) -> None:
    """What the log tells of a request: numbers of tokens, and the time to the first; no text."""
    cached = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
    first = f"{ticket.first - ticket.arrived:.3f} s" if ticket.first else "none"
    counts = f"{usage['prompt_tokens']} tokens of prompts ({cached} cached), {usage.get('completion_tokens', 0)} new"
    request.state.note = f", {counts}, first after {first}"


async def embeddings(request: HttpRequest) -> Response:
    own = service(request)
    loop, body = own.ready(), await own.body(request)
    work, base64 = await own.read(read_embeddings, body)
    ticket = own.submit(work)
    async for _ in until_gone(request, loop, ticket):
        pass
    reply = replies.embeddings(body.get("model", own.config.model), ticket, base64)
    note(request, ticket, reply["usage"])
    return json_response(reply)


async def tokenize(request: HttpRequest) -> Response:
    own = service(request)
    body = await own.body(request)
    ids = await own.read(read_tokens, body)
    limit = own.ready().llama.model.params.max_seq_len
    return json_response({"count": len(ids), "max_model_len": limit, "tokens": ids})


def read_tokens(llama: Llama, body: Mapping[str, Any]) -> list[int]:
    if "messages" in body:
        return encode_chat(llama, body)
    if not isinstance(text := body.get("prompt"), str):
        raise ApiError(400, "prompt must be a string", "prompt")
    return llama.tokenizer.encode(text, bos=body.get("add_special_tokens") is not False, eos=False)


async def detokenize(request: HttpRequest) -> Response:
    own = service(request)
    body = await own.body(request)
    return json_response({"prompt": await own.read(read_text, body)})


def read_text(llama: Llama, body: Mapping[str, Any]) -> str:
    ids, size = body.get("tokens"), llama.model.vocab_size
    if not isinstance(ids, list) or not all(type(id) is int and 0 <= id < size for id in ids):
        raise ApiError(400, f"tokens must be a list of ids from 0 to {size - 1}", "tokens")
    return llama.tokenizer.decode(ids)


async def models(request: HttpRequest) -> Response:
    own = service(request)
    limit = own.ready().llama.model.params.max_seq_len
    card = {"id": own.config.model, "object": "model", "created": own.created, "owned_by": "llama"}
    card |= {"max_model_len": limit}
    if (name := request.path_params.get("name")) is None:
        return json_response({"object": "list", "data": [card]})
    own.check_model(name)
    return json_response(card)


async def health(request: HttpRequest) -> Response:
    service(request).ready()
    return json_response({"status": "ok"})


async def metrics(request: HttpRequest) -> Response:
    own = service(request)
    text = own.metrics.render(own.loop.gauges() if own.loop else {})
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


def json_response(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON in ASCII, which holds any text."""
    return Response(json.dumps(value, separators=(",", ":")), status, headers, "application/json")


def error_response(error: ApiError) -> Response:
    headers = {"Retry-After": str(error.retry_after)} if error.retry_after else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return json_response(error.body, error.status, headers)


async def on_error(request: HttpRequest, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        text = f"{error.detail}: {request.method} {request.url.path}"
        response = error_response(ApiError(error.status_code, text))
        response.headers.update(error.headers or {})
        return response
    return error_response(error if isinstance(error, ApiError) else ApiError(500, "the server has failed; see its log"))


class Guard:
    """Around every route: keys, and a line of the log for each request."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self.app, self.keys = app, [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, status = time.monotonic(), 499  # as logs call it when the client goes before the reply begins
        state = scope.setdefault("state", {})

        async def noting(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            if self.allowed(scope):
                await self.app(scope, receive, noting)
            else:
                text = "the key is missing or wrong; send the header Authorization: Bearer KEY"
                await error_response(ApiError(401, text, code="invalid_api_key"))(scope, receive, noting)
        except Exception:
            status = 500
            raise
        finally:
            took = time.monotonic() - began
            level = logging.DEBUG if scope["path"] in POLLED else logging.INFO
            log.log(level, "%s %r %d%s, %.3f s", scope["method"], scope["path"], status, state.get("note", ""), took)

    def allowed(self, scope: Scope) -> bool:
        if not self.keys or scope["path"] == "/health":
            return True
        header = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, key = header.partition(b" ")
        matches = [hmac.compare_digest(key.strip(), own) for own in self.keys]  # all, so that time tells nothing
        return kind.lower() == b"bearer" and any(matches)


ROUTES: dict[str, tuple[str, Callable[[HttpRequest], Any]]] = {
    "/health": ("GET", health),
    "/metrics": ("GET", metrics),
    "/v1/models": ("GET", models),
    "/v1/models/{name:path}": ("GET", models),
    "/v1/completions": ("POST", completions),
    "/v1/chat/completions": ("POST", chat_completions),
    "/v1/embeddings": ("POST", embeddings),
    "/tokenize": ("POST", tokenize),
    "/detokenize": ("POST", detokenize),
}


def make_app(own: Service) -> Starlette:
    origins = [*own.config.allow_origins]
    cors = [Middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])]
    app = Starlette(
        routes=[Route(path, endpoint, methods=[method]) for path, (method, endpoint) in ROUTES.items()],
        middleware=[*(cors if origins else []), Middleware(Guard, keys=own.config.keys)],
        exception_handlers=dict.fromkeys((ApiError, HTTPException, Exception), on_error),
    )
    app.router.redirect_slashes = False
    app.state.service = own
    return app
