"""The server's process: HTTP in a thread of the first rank, the engine's loop in the main thread of every rank."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading

import uvicorn

from ..generation import Llama
from .app import Config, Service
from .loop import Loop
from .metrics import Metrics
from .protocol import KEEP_ALIVE, LARGEST_HEADERS, Http

log = logging.getLogger("llama.server")
GRACE = 60  # seconds that running requests have to end after the first signal
MORE = 10  # seconds that responses then have, which say that their requests were cancelled


class Server:
    """HTTP on `host`:`port`; port 0 chooses a free one. It answers 503 until `serve` is called. OSError for an address
    that cannot be used."""

    def __init__(self, config: Config, host: str = "127.0.0.1", port: int = 0) -> None:
        v6 = ":" in host
        family, both = (socket.AF_INET6, socket.has_dualstack_ipv6()) if v6 else (socket.AF_INET, False)
        try:
            self.socket = socket.create_server((host, port), family=family, dualstack_ipv6=both)
        except OSError as error:
            raise OSError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
        # Connections inherit it; asyncio, unlike uvloop, sets it only on sockets that name their protocol. Without it,
        # a part of a response waits until the client has acknowledged the part before, up to 40 ms.
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.port = self.socket.getsockname()[1]
        address = f"[{host}]" if v6 else host
        log.info("serving %s on http://%s:%d/v1 once it is loaded", config.model, address, self.port)
        if host not in ("127.0.0.1", "::1", "localhost") and not config.keys:
            log.warning("anyone who reaches %s can use this server: it has no keys, see --api_key_file", host)
        self.service = Service(config)
        self.http = uvicorn.Server(
            uvicorn.Config(
                self.service.app(),
                http=Http,
                ws="none",
                h11_max_incomplete_event_size=LARGEST_HEADERS,
                loop="auto",  # uvloop if it is installed: a third less CPU time for each event
                lifespan="off",
                access_log=False,
                log_config=None,
                log_level="warning",
                timeout_keep_alive=KEEP_ALIVE,
                timeout_graceful_shutdown=GRACE + MORE,
            )
        )
        self.thread = threading.Thread(target=self._http, name="http", daemon=True)
        self.ended = False
        self.thread.start()

    def _http(self) -> None:
        try:
            self.http.run(sockets=[self.socket])
        finally:
            self.ended = True
            if self.service.loop:
                self.service.loop.stop()

    def serve(self, llama: Llama) -> None:
        """Serve until `drain` is called and the running requests have ended."""
        config = self.service.config
        self.service.loop = Loop(llama, self.service.metrics, config.max_wait, config.max_time)
        if not self.ended:
            log.info("%s is loaded", config.model)
            self.service.loop.run()
        self.thread.join()

    def drain(self) -> None:
        """Accept no new requests, and end when the running ones have ended; cancel them after GRACE seconds. From any
        thread."""
        self.service.draining = self.http.should_exit = True
        if self.service.loop:
            timer = threading.Timer(GRACE, self.service.loop.stop)
            timer.daemon = True
            timer.start()


def serve_rank(llama: Llama, server: Server | None) -> None:
    """Serve on this rank. The first signal drains the server, the second ends the process. Rank 0 has the server."""
    signals = 0

    def on_signal(number: int, frame: object) -> None:
        nonlocal signals
        signals += 1
        if signals > 1:
            os._exit(128 + number)
        if server:
            log.info("ending when the running requests have; a second signal ends at once")
            server.drain()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    if server:
        server.serve(llama)
    else:
        Loop(llama, Metrics("")).run()
