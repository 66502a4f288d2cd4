"""uvicorn's HTTP/1.1 protocol with time limits for clients that send or read too slowly."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

BODY = 60.0  # seconds for a body, then 408
KEEP_ALIVE = 75  # seconds that an idle connection stays open; longer than clients and proxies keep one
# Seconds that a connection may take for the headers of a request, and for a body that no route reads.
SENDING = {h11.IDLE: float(KEEP_ALIVE), h11.SEND_BODY: BODY + 10}
READING = 60.0  # seconds that a client may take to receive what was sent
LARGEST_HEADERS = 2**15  # bytes


class Http(H11Protocol):
    """A connection, which is closed if its client exceeds these limits."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # writing pauses whenever the system's buffer is full
        self.state: Any = None
        self.sending: asyncio.TimerHandle | None = None
        self.reading: asyncio.TimerHandle | None = None
        self._watch()

    def handle_events(self) -> None:
        super().handle_events()
        self._watch()

    def _watch(self) -> None:
        """Wait for the rest of a request."""
        if self.state is not self.conn.their_state:
            self.state = self.conn.their_state
            stop(self.sending)
            seconds = SENDING.get(self.state)
            self.sending = self.loop.call_later(seconds, self.transport.abort) if seconds else None

    def pause_writing(self) -> None:
        super().pause_writing()
        self.reading = self.loop.call_later(READING, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        stop(self.reading)

    def connection_lost(self, exc: Exception | None) -> None:
        stop(self.sending)
        stop(self.reading)
        super().connection_lost(exc)


def stop(timer: asyncio.TimerHandle | None) -> None:
    if timer:
        timer.cancel()
