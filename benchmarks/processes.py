"""HTTP servers in processes of their own."""

from __future__ import annotations

import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from common import ROOT


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
        return port


@contextmanager
def running(*command: str, port: int) -> Iterator[int]:
    """Run a server's command and wait until it has loaded its model. Yields the id of its process."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    try:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                break
            except OSError:
                if process.poll() is not None:
                    raise RuntimeError(f"{command[0]} has ended") from None
                time.sleep(0.1)
        yield process.pid
    finally:
        process.terminate()
        process.wait()
