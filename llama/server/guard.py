"""Middleware for every route: API keys, request ids and log lines; and JSON responses."""

from __future__ import annotations

import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .schema import ApiError

log = logging.getLogger("llama.server")
OPEN = {"/", "/health"}  # paths that need no key
POLLED = {"/health", "/metrics"}  # paths that are requested so often that they are logged at level DEBUG
ID = re.compile(r"[\x21-\x7e]{1,128}")  # request ids that clients may choose
to_json = json.JSONEncoder(separators=(",", ":")).encode  # in ASCII, which can represent any str


class Guard:
    """Checks the API key, if the server has any, gives each request an id, and logs it with the fields that routes put
    into `request.state.fields`."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self.app, self.keys = app, [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began, status = time.monotonic(), 499  # nginx's code for a client that disconnects before the response begins
        state = scope.setdefault("state", {})
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        id = given if ID.fullmatch(given) else uuid.uuid4().hex

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).append("x-request-id", id)
            await send(message)

        try:
            if scope["path"] in OPEN or self.has_key(headers.get("authorization", "")):
                await self.app(scope, receive, send_with_id)
            else:
                text = "the key is missing or wrong; send the header Authorization: Bearer KEY"
                await error_response(ApiError(401, text, code="invalid_api_key"))(scope, receive, send_with_id)
        except Exception:
            status = 500
            raise
        finally:
            fields = {"method": scope["method"], "path": scope["path"], "status": status}
            fields |= {"seconds": round(time.monotonic() - began, 4), "request_id": id}
            access(fields | state.get("fields", {}))

    def has_key(self, authorization: str) -> bool:
        if not self.keys:
            return True
        kind, _, key = authorization.encode("latin-1").partition(b" ")  # the bytes that were sent
        matches = [hmac.compare_digest(key.strip(), own) for own in self.keys]  # all, so that the time reveals nothing
        return kind.lower() == b"bearer" and any(matches)


def access(fields: Mapping[str, Any]) -> None:
    """Log a request."""
    text = "{method} {path!r} {status}".format_map(fields)
    if "prompt_tokens" in fields:
        text += ", {prompt_tokens} tokens of prompts ({cached_tokens} cached), {completion_tokens} new".format_map(
            fields
        )
        first = fields["first_token_seconds"]
        text += f", first after {first:.3f} s" if first is not None else ", first never"
    text += ", {seconds:.3f} s, {request_id}".format_map(fields)
    if "prompt" in fields:
        text += f", {json.dumps(fields['prompt'])}"
    level = logging.DEBUG if fields["path"] in POLLED else logging.INFO
    log.log(level, "%s", text, extra={"fields": fields})


def json_response(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(to_json(value), status, headers, "application/json")


def error_response(error: ApiError) -> Response:
    headers = {"Retry-After": str(error.retry_after)} if error.retry_after else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status in (408, 413):  # the rest of the body is not read
        headers["Connection"] = "close"
    return json_response(error.body, error.status, headers)
