"""The tasks of a comparison: a file of JSON, or one of JSON lines, checked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from reprlib import repr as shorten
from typing import Any, NamedTuple

from ..chat import Message
from ..textfile import read_json, read_json_lines, read_text

DEFAULT = Path(__file__).parent / "tasks.jsonl"
KINDS: dict[str, tuple[type, str]] = {
    "name": (str, "a text"),
    "prompt": (str, "a text"),
    "messages": (list, "a list of messages"),
    "system": (str, "a text"),
    "completion": (bool, "true or false"),
    "expected": (str, "a text"),
    "facts": (list, "a list of texts"),
    "labels": (list, "a list of texts"),
    "label": (str, "a text"),
    "max_tokens": (int, "a whole number"),
}


class Task(NamedTuple):
    """A prompt, and the right answer if it is known."""

    name: str
    messages: list[Message]
    completion: bool = False  # continue the text of the only message, without a chat format
    expected: str = ""
    facts: tuple[str, ...] = ()  # texts that a right answer contains; "a|b" is either of two
    labels: tuple[str, ...] = ()
    label: str = ""  # the right label
    max_tokens: int | None = None

    @property
    def reference(self) -> str:
        return self.label or self.expected

    @property
    def text(self) -> str:
        return "\n\n".join(message["content"] for message in self.messages)


def read_tasks(source: str | os.PathLike[str] | Sequence[Any] | None = None) -> list[Task]:
    """The tasks in a file or a list, by default those of this package. ValueError names the line, or the number of the
    task in a list, and the field that is wrong."""
    if source is None or isinstance(source, (str, os.PathLike)):
        file = DEFAULT if source is None else Path(os.path.expanduser(source))
        if not file.exists():
            raise FileNotFoundError(f"tasks {source} does not exist")
        origin = str(file)
        if read_text(file).lstrip().startswith("["):
            places = [(f"{file}, task {i}", item) for i, item in enumerate(read_json(file, list), 1)]
        else:
            places = read_json_lines(file)
    else:
        origin, places = "tasks", [(f"task {i}", item) for i, item in enumerate(source, 1)]
    tasks = [to_task(item, place) for place, item in places]
    if not tasks:
        raise ValueError(f"{origin} has no tasks")
    names = [task.name for task in tasks]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{origin} has the name {twice[0]!r} twice; each task needs one of its own")
    return tasks


def to_task(item: Any, place: str) -> Task:
    """A task from its fields; ValueError names `place` and the field."""
    if not isinstance(item, dict):
        raise ValueError(f"{place} is {shorten(item)}; a task is an object with a name and a prompt")
    for field, value in item.items():
        if field not in KINDS:
            raise ValueError(f"{place} has the field {field!r}; fields are {', '.join(KINDS)}")
        kind, words = KINDS[field]
        texts: Any = value if isinstance(value, list) and field != "messages" else []
        if type(value) is not kind or not all(isinstance(text, str) and text for text in texts):
            raise ValueError(f"{place}: {field} is {shorten(value)}; it must be {words}")
    if not item.get("name"):
        raise ValueError(f"{place} has no name")
    if ("prompt" in item) == ("messages" in item):
        raise ValueError(f"{place}: give either prompt or messages")
    messages: Any = item.get("messages") or [{"role": "user", "content": item.get("prompt", "")}]
    for message in messages:
        texts = isinstance(message, dict) and all(isinstance(value, str) for value in message.values())
        if not texts or {*message} != {"role", "content"}:
            raise ValueError(f'{place}: messages has {shorten(message)}; it must be {{"role": ..., "content": ...}}')
    if system := item.get("system"):
        messages = [{"role": "system", "content": system}, *messages]
    if item.get("completion") and (len(messages) > 1 or "messages" in item):
        raise ValueError(f"{place}: completion needs a prompt, without messages and system")
    labels, label = item.get("labels", []), item.get("label", "")
    if (labels or label) and (len({*labels}) < 2 or label not in labels):
        raise ValueError(f"{place}: label is {label!r}; it must be one of at least two labels, {shorten(labels)}")
    if labels and item.get("expected"):
        raise ValueError(f"{place}: give either expected or labels")
    if item.get("max_tokens", 1) < 1:
        raise ValueError(f"{place}: max_tokens is {item['max_tokens']}; it must be at least 1")
    known = {key: item[key] for key in ("completion", "expected", "max_tokens") if key in item}
    facts = tuple(item.get("facts", ()))
    return Task(item["name"], messages, facts=facts, labels=tuple(labels), label=label, **known)
