"""The routes of the server, their limits and errors."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ..generation import Llama
from . import replies, schema
from .filters import Filters
from .guard import Guard, error_response, json_response, to_json
from .loop import Loop, Ticket
from .metrics import Metrics
from .page import page
from .protocol import BODY
from .schema import ApiError, Work, encode_chat, parse, read_dialog, read_with

T = TypeVar("T")
JSON = {"Content-Type": "application/json"}
EVENTS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class Config(NamedTuple):
    model: str  # its name in the API
    any_model: bool = False  # accept every name
    keys: tuple[str, ...] = ()  # API keys; without any, clients need none
    max_waiting: int = 64  # requests that may wait for a slot
    max_body: int = 2**22  # bytes
    allow_origins: tuple[str, ...] = ()
    max_wait: float = 60.0  # seconds that a request may wait for a slot
    max_time: float = 600.0  # seconds that it may then run
    log_prompts: bool = False
    filters: Filters = Filters()


class Service:
    """The routes and what they share. `loop` is set once the model is loaded."""

    def __init__(self, config: Config) -> None:
        self.config, self.metrics = config, Metrics(config.model)
        self.loop: Loop | None = None
        self.draining = False
        self.reading = asyncio.Lock()  # one thread tokenizes, which takes long for long texts
        self.created = int(time.time())

    def app(self) -> Starlette:
        routes = [
            Route("/", page, middleware=[Middleware(GZipMiddleware)]),
            Route("/health", self.get_health),
            Route("/metrics", self.get_metrics),
            Route("/v1/models", self.get_models),
            Route("/v1/models/{name:path}", self.get_models),
            Route("/v1/completions", partial(self.generate, read=schema.read_completion), methods=["POST"]),
            Route("/v1/chat/completions", partial(self.generate, read=schema.read_chat), methods=["POST"]),
            Route("/v1/embeddings", self.embed, methods=["POST"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
        ]
        origins = [*self.config.allow_origins]
        cors = [Middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])]
        app = Starlette(
            routes=routes,
            middleware=[*(cors if origins else []), Middleware(Guard, keys=self.config.keys)],
            exception_handlers=dict.fromkeys((ApiError, HTTPException, Exception), on_error),
        )
        app.router.redirect_slashes = False
        return app

    def ready(self) -> Loop:
        """The engine's loop. ApiError while the model is loaded, and while the server ends."""
        if self.loop is None or self.draining:
            why = "the server is ending" if self.draining else "the model is being loaded"
            raise ApiError(503, why, retry_after=5)
        return self.loop

    async def read(
        self, request: HttpRequest, read: Callable[[Llama, Mapping[str, Any]], T]
    ) -> tuple[dict[str, Any], T]:
        """The JSON body of a request, which names a model of this server, and the result of `read`."""
        llama, body = self.ready().llama, await self._body(request)
        if self.config.log_prompts:
            prompt = next((body[name] for name in ("messages", "prompt", "input") if name in body), None)
            request.state.fields = {"prompt": prompt}
        self.check_model(body.setdefault("model", self.config.model))
        async with self.reading:
            return body, await asyncio.to_thread(read_with, read, llama, body)

    async def _body(self, request: HttpRequest) -> dict[str, Any]:
        try:
            return parse(await asyncio.wait_for(self._bytes(request), BODY))
        except ClientDisconnect as error:
            raise ApiError(499, "the client has gone") from error
        except asyncio.TimeoutError as error:
            raise ApiError(408, f"the body took longer than {BODY:g} seconds") from error

    async def _bytes(self, request: HttpRequest) -> bytes:
        data, limit = bytearray(), self.config.max_body
        async for part in request.stream():
            data += part
            if len(data) > limit:
                raise ApiError(413, f"the body is longer than {limit} bytes")
        return bytes(data)

    def check_model(self, name: object) -> None:
        if not isinstance(name, str):
            raise ApiError(400, f"model is {name!r}; it must be a string", "model")
        if name != self.config.model and not self.config.any_model:
            text = f"there is no model {name!r}; this server has {self.config.model!r}"
            raise ApiError(404, text, "model", "model_not_found")

    def submit(self, work: Work) -> Ticket:
        loop = self.ready()
        limit = len(loop.llama.engine.slots) + self.config.max_waiting
        if loop.open and loop.open + len(work.prompts) > limit:
            raise ApiError(429, f"{loop.open} requests run or wait already; try again", retry_after=1)
        return loop.submit(work)

    # -----------------------------------------------------------------------------------------------------------------
    # Routes

    async def generate(self, request: HttpRequest, read: Callable[[Llama, Mapping[str, Any]], Work]) -> Response:
        body, work = await self.read(request, read)
        refusal, loop = await self.refused(work, body), self.ready()
        ticket = self.submit(work) if refusal is None else loop.refuse(work, refusal)
        self.metrics.observe("request_params_n", work.n)
        reply = replies.Reply(loop.llama.tokenizer, body["model"], ticket)
        if work.stream:
            return JobResponse(self.stream(reply, ticket), ticket, EVENTS)
        return JobResponse(self.whole(reply, ticket), ticket)

    async def refused(self, work: Work, body: Mapping[str, Any]) -> str | None:
        """The text that an input filter returns instead of an answer. The prompt of a completion counts as a user's
        message; if one of several prompts is refused, all are."""
        filters, tokenizer = self.config.filters, self.ready().llama.tokenizer
        if not filters.input_filters:
            return None
        if work.chat:
            dialogs = [read_dialog(body)]
        else:
            prompts = work.prompts[:: work.n]
            texts = await asyncio.to_thread(lambda: [*map(tokenizer.decode, prompts)])
            dialogs = [[{"role": "user", "content": text}] for text in texts]
        return await filters.filter_inputs(dialogs)

    async def whole(self, reply: replies.Reply, ticket: Ticket) -> AsyncIterator[str]:
        events = self.config.filters.filter_outputs(ticket.events(), whole=True)
        yield to_json(reply.whole([event async for event in events if event]))

    async def stream(self, reply: replies.Reply, ticket: Ticket) -> AsyncIterator[str]:
        await ticket.started.wait()
        if ticket.late and not ticket.began:  # it never got a slot: 503
            raise ticket.cancelled()
        yield ""  # the response begins
        for chunk in reply.first_chunks():
            yield data(chunk)
        try:
            async for event in self.config.filters.filter_outputs(ticket.events(), whole=False):
                if event is None:
                    yield ": keepalive\n\n"
                    continue
                for chunk in reply.chunks(event):
                    yield data(chunk)
            if reply.work.include_usage:
                yield data(reply.usage_chunk())
        except ApiError as error:
            yield data(error.body)
        yield "data: [DONE]\n\n"

    async def embed(self, request: HttpRequest) -> Response:
        body, work = await self.read(request, schema.read_embeddings)
        ticket = self.submit(work)

        async def whole() -> AsyncIterator[str]:
            async for _ in ticket.events():
                pass
            yield to_json(replies.embeddings(body["model"], ticket))

        return JobResponse(whole(), ticket)

    async def tokenize(self, request: HttpRequest) -> Response:
        _, ids = await self.read(request, read_tokens)
        limit = self.ready().llama.model.params.max_seq_len
        return json_response({"count": len(ids), "max_model_len": limit, "tokens": ids})

    async def detokenize(self, request: HttpRequest) -> Response:
        _, text = await self.read(request, read_text)
        return json_response({"prompt": text})

    async def get_models(self, request: HttpRequest) -> Response:
        limit = self.ready().llama.model.params.max_seq_len
        about = {"created": self.created, "owned_by": "llama", "max_model_len": limit}
        card = {"id": self.config.model, "object": "model", **about}
        if (name := request.path_params.get("name")) is None:
            return json_response({"object": "list", "data": [card]})
        self.check_model(name)
        return json_response(card)

    async def get_health(self, request: HttpRequest) -> Response:
        self.ready()
        return json_response({"status": "ok"})

    async def get_metrics(self, request: HttpRequest) -> Response:
        text = self.metrics.render(self.loop.gauges() if self.loop else {})
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


def data(value: object) -> str:
    return f"data: {to_json(value)}\n\n"


class JobResponse(StreamingResponse):
    """Sends the chunks of a reply. The response begins with the first chunk, so that an error before it has its own
    status. The ticket is cancelled when the client disconnects, even before the first chunk."""

    def __init__(self, chunks: AsyncIterator[str], ticket: Ticket, headers: Mapping[str, str] = JSON) -> None:
        super().__init__(chunks, headers=headers)
        self.chunks, self.ticket = chunks, ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:  # StreamingResponse listens for a disconnect while chunks are made, but not from ASGI version 2.4 on
            await super().__call__({**scope, "asgi": {"spec_version": "2.3"}}, receive, send)
        finally:
            self.ticket.cancel()
            scope["state"]["fields"] = scope["state"].get("fields", {}) | self.ticket.log_fields()

    async def stream_response(self, send: Send) -> None:
        first = await anext(self.chunks)
        if self.headers["Content-Type"] == JSON["Content-Type"]:  # it has one chunk, in ASCII
            self.headers["Content-Length"] = str(len(first))
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": first.encode(), "more_body": True})
        async for chunk in self.chunks:
            await send({"type": "http.response.body", "body": chunk.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def read_tokens(llama: Llama, body: Mapping[str, Any]) -> list[int]:
    if "messages" in body:
        return encode_chat(llama, body)
    if not isinstance(text := body.get("prompt"), str):
        raise ApiError(400, "prompt must be a string", "prompt")
    return llama.tokenizer.encode(text, bos=body.get("add_special_tokens") is not False, eos=False)


def read_text(llama: Llama, body: Mapping[str, Any]) -> str:
    ids, size = body.get("tokens"), llama.model.vocab_size
    if not isinstance(ids, list) or not all(type(id) is int and 0 <= id < size for id in ids):
        raise ApiError(400, f"tokens must be a list of ids from 0 to {size - 1}", "tokens")
    return llama.tokenizer.decode(ids)


async def on_error(request: HttpRequest, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        text = f"{error.detail}: {request.method} {request.url.path}"
        response = error_response(ApiError(error.status_code, text))
        response.headers.update(error.headers or {})
        return response
    return error_response(error if isinstance(error, ApiError) else ApiError(500, "the server has failed; see its log"))
