"""python -m llama serve: an OpenAI-compatible HTTP server, on any number of ranks. Rank 0 listens on the port."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .. import parallel
from ..generation import Llama
from ..server import log
from .flags import documented

KEYS = "LLAMA_API_KEYS"


@documented
def serve(
    ckpt_dir: str, tokenizer_path: str | None = None, host: str = "127.0.0.1", port: int = 8000,
    max_batch_size: int = 8, max_seq_len: int = 2048, model_name: str | None = None, any_model: bool = False,
    api_key_file: str | None = None, allow_origins: str | list | None = None,
    max_waiting: int = 64, max_wait: int = 60, max_time: int = 600, max_body: int = 4,
    filter: str | list | None = None, log_json: bool = False, log_prompts: bool = False,
    seed: int = 1, **options: Any,
) -> None:  # fmt: skip
    """Serve a model with an OpenAI-compatible API; docs/server.md describes what is supported.

    Args:
        host: address to listen on; the default is reachable from this machine only
        port: port to listen on
        model_name: name of the model in the API; by default that of the folder
        any_model: answer requests for models of any name
        api_key_file: file of API keys, one per line; clients must send one of them. The environment variable
            LLAMA_API_KEYS adds more, separated by commas
        allow_origins: origin whose pages may call the server, or a list such as '["https://a.org"]'; * for all
        max_waiting: maximum number of requests that wait; more are answered with 429
        max_wait: seconds that a request may wait for a slot; then it is answered with 503
        max_time: seconds that a request may run once it has a slot; then its answer ends with finish_reason length
        max_body: maximum size of a request body in MiB
        filter: module, or module:object, with functions input_filter and output_filter as for
            Llama.chat_completion; or a list such as '["a", "b"]'
        log_json: log JSON objects, one per line
        log_prompts: also log prompts
        seed: random seed for requests that do not set one
    """
    check_counts(port=port, max_waiting=max_waiting, max_wait=max_wait, max_time=max_time, max_body=max_body)
    check_counts(max_batch_size=max_batch_size, max_seq_len=max_seq_len)
    if port > 65535:
        raise ValueError(f"port is {port}; the largest is 65535")
    try:
        from ..server import app, filters, process
    except ModuleNotFoundError as error:
        raise ValueError(f"serve needs the package {error.name}; pip install 'llama-reference[server]'") from error
    log.set_up(log_json)
    parallel.init_model_parallel()
    server = None
    with parallel.all_or_none():
        if parallel.rank() == 0:  # it listens at once, so that clients learn that the model is being loaded
            config = app.Config(
                model=model_name or Path(os.path.abspath(os.path.expanduser(ckpt_dir))).name, any_model=any_model,
                keys=read_keys(api_key_file), allow_origins=tuple(listed(allow_origins)), max_body=max_body << 20,
                max_waiting=max_waiting, max_wait=max_wait, max_time=max_time,
                log_prompts=log_prompts, filters=filters.load_filters(listed(filter)),
            )  # fmt: skip
            server = process.Server(config, host, port)
    llama = Llama.build(ckpt_dir, tokenizer_path, max_seq_len, max_batch_size, seed=seed, **options)
    process.serve_rank(llama, server)


def listed(value: str | list | None) -> list[str]:
    return [value] if isinstance(value, str) else value or []


def check_counts(**values: Any) -> None:
    """Raise ValueError for a value that is not a non-negative int."""
    for name, value in values.items():
        if type(value) is not int or value < 0:
            raise ValueError(f"{name} is {value!r}; it must be an int of at least 0")


def read_keys(file: str | None) -> tuple[str, ...]:
    """The API keys that clients may use: from a file, one per line, and from the environment."""
    keys = os.environ.get(KEYS, "").split(",")
    if file:
        path = Path(os.path.expanduser(file))
        if not path.exists():  # it may be a pipe
            raise FileNotFoundError(f"api_key_file {file} does not exist")
        keys += path.read_text(encoding="utf-8").splitlines()
    found = tuple(filter(None, map(str.strip, keys)))
    if file and not found:
        raise ValueError(f"{file} has no keys")
    return found
