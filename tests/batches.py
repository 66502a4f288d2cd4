"""Batch files and the options of `python -m llama batch`."""

import json

from llama.cli.batch import answer_lines
from llama.cli.batch_files import Files

CHAT, TEXT, EMBED = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
HELLO = [{"role": "user", "content": "Hello"}]
STORY = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tell me a story about a fox."}]
FLAGS = ["--max_seq_len", "256", "--max_batch_size", "4", "--device", "cpu", "--dtype", "float32", "--nocompile"]


def write(path, items):
    lines = [item if isinstance(item, str) else json.dumps(item) for item in items]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def read(path):
    """Answers by id; each id occurs once."""
    lines = path.read_bytes().split(b"\n")
    assert lines.pop() == b""
    items = [json.loads(line) for line in lines]
    ids = [item.get("custom_id", item["id"]) for item in items]
    keys = [id if id is not None else ("line", item["line"]) for id, item in zip(ids, items, strict=True)]
    assert len({*keys}) == len(keys)
    return dict(zip(keys, items, strict=True))


def run(llama, folder, items, seed=1):
    files = Files(write(folder / "in", items), folder / "out")
    with files.answers:
        answer_lines(llama, files, seed, "small-chat")
    return read(folder / "out")


def openai(id, body, url=CHAT, **rest):
    return {"custom_id": id, "method": "POST", "url": url, "body": body, **rest}
