"""A server and its users."""

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from download.server import BASH, HASHER, TOOLS, Server, User


@pytest.fixture
def server() -> Iterator[Server]:
    if not BASH:
        pytest.skip("bash is not installed")
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(params=["curl", "wget"])
def user(request: pytest.FixtureRequest, tmp_path: Path, server: Server) -> User:
    if shutil.which(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    return User(tmp_path, server, (request.param, *HASHER, *TOOLS))


@pytest.fixture
def any_user(tmp_path: Path, server: Server) -> User:
    """For tests in which it does not matter whether curl or wget is installed."""
    if not (shutil.which("curl") or shutil.which("wget")):
        pytest.skip("neither curl nor wget is installed")
    return User(tmp_path, server, ("curl", "wget", *HASHER, *TOOLS))
