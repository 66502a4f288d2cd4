"""Fixtures of the tests of the server."""

import pytest
from serving import build, serving, slow_down


@pytest.fixture(scope="module")
def llama():
    return build()


@pytest.fixture(scope="module")
def client(llama):
    with serving(llama) as client:
        yield client


@pytest.fixture
def slow(llama, monkeypatch):
    slow_down(llama, monkeypatch)
