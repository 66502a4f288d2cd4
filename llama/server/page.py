"""The web page at /, and headers that restrict it to its own script and this server."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

PAGE = Path(__file__).with_name("page.html").read_bytes()


def sources(tag: str) -> str:
    """The hashes of the page's inline blocks, in a Content-Security-Policy's format."""
    blocks = re.findall(rb"<%b>(.*?)</%b>" % ((tag.encode(),) * 2), PAGE, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(block).digest()).decode()}'" for block in blocks)


POLICY = {
    "default-src": "'none'",
    "script-src": sources("script"),
    "style-src": sources("style"),
    "img-src": "data:",  # the icon
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",  # innerHTML and the like are errors
    "trusted-types": "'none'",
}
HEADERS = {
    "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in POLICY.items()),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


async def page(request: Request) -> Response:
    return Response(PAGE, headers=HEADERS, media_type="text/html")
