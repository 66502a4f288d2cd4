"""uvicorn's HTTP/1.1 protocol with time limits for clients that send or read too slowly."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

BODY = 60.0  # seconds for a body, then 408
KEEP_ALIVE = 75  # seconds that an idle connection stays open; longer than clients and proxies keep one
# Seconds that a connection may take for the headers of a request, and for a body that no route reads.
SENDING = {h11.IDLE: float(KEEP_ALIVE), h11.SEND_BODY: BODY + 10}
READING = 60.0  # seconds that a client may receive nothing of what was sent
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
        # uvicorn stops reading when a client sends its next request early, and would not notice that it disconnects.
        if self.conn.their_state is h11.DONE and len(self.conn.trailing_data[0]) < LARGEST_HEADERS:
            self.flow.resume_reading()

    def send_400_response(self, msg: str) -> None:
        with suppress(h11.LocalProtocolError):  # it has been answered already
            super().send_400_response(msg)
        self.transport.close()

    def _watch(self) -> None:
        """Wait for the rest of a request."""
        if self.state is not self.conn.their_state:
            self.state = self.conn.their_state
            stop(self.sending)
            seconds = SENDING.get(self.state)
            self.sending = self.loop.call_later(seconds, self.transport.abort) if seconds else None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader(-1)

    def _await_reader(self, left: int) -> None:
        """Wait for the client to receive more; `left` bytes were not sent yet when it was last checked."""
        if left == (size := self.transport.get_write_buffer_size()):
            self.transport.abort()
        else:
            self.reading = self.loop.call_later(READING, self._await_reader, size)

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
