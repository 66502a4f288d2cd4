"""A folder's own chat template, in Jinja, rendered as transformers does."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from .chat import FORMATS, ChatFormat, Dialog, Message, get_chat_format, is_answered
from .gguf import is_gguf, read_gguf
from .textfile import read_optional_json, read_text
from .tokenizer import Tokenizer
from .vocabulary import any_of, special_names

PRIVATE_USE = range(0xF0000, 0xFFFFE)  # Unicode's Supplementary Private Use Area-A: code points without a meaning


class TemplateFormat(ChatFormat):
    """A chat template. `named` maps unk_token and pad_token to tokens, for the template. Special tokens come from the
    template alone: a message's text that spells one stays text, unless the template changes the message. ValueError if
    the package jinja2 is missing, or cannot read the template."""

    name = "template"

    def __init__(self, source: str, tokenizer: Tokenizer, named: Mapping[str, str] = MappingProxyType({})) -> None:
        try:
            from jinja2 import TemplateError
            from jinja2.ext import Extension, loopcontrols
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as error:
            raise ValueError("the folder's chat template needs the package jinja2: pip install jinja2") from error

        class Generation(Extension):
            """{% generation %}, which marks the assistant's text for training."""

            tags = {"generation"}  # noqa: RUF012, as the library wants it

            def parse(self, parser: Any) -> Any:
                next(parser.stream)
                return parser.parse_statements(["name:endgeneration"], drop_needle=True)

        def fail(message: str) -> NoReturn:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
        )
        environment.filters["tojson"] = tojson
        environment.globals |= {
            "raise_exception": fail,
            "strftime_now": lambda form: datetime.now().strftime(form),
        }
        try:
            self.template = environment.from_string(source)
        except TemplateError as error:
            raise ValueError(f"the folder's chat template cannot be read: {error}") from error
        self.ids = tokenizer.vocabulary.ids()
        names = {id: name for name, id in tokenizer.special.items()}
        self.tokens = {role: named[role] for role in ("unk_token", "pad_token") if role in named}
        self.tokens |= {"bos_token": names.get(tokenizer.bos_id, ""), "eos_token": names.get(tokenizer.eos_id, "")}
        self.names = any_of(self.ids)

    def _render(self, dialog: Dialog) -> str:
        given = {**self.tokens, "messages": dialog, "add_generation_prompt": not is_answered(dialog)}
        try:
            return self.template.render(given, tools=None, documents=None)
        except Exception as error:  # a template is a program
            raise ValueError(f"the chat template refuses the dialog: {error}") from error

    def _encode(self, tokenizer: Tokenizer, dialog: Dialog, unfinished: bool) -> list[int]:
        said = "".join(message["content"] for message in dialog)
        # While the template is rendered, placeholders stand for the special tokens that messages spell.
        spelled, unused = sorted({*self.names.findall(said)}), (c for c in map(chr, PRIVATE_USE) if c not in said)
        cut, hidden = next(unused), dict(zip(spelled, unused, strict=False))
        messages: list[Message] = [
            {**message, "content": self.names.sub(lambda name: hidden[name[0]], message["content"])}
            for message in dialog
        ]
        text = self._render(messages)
        if unfinished:
            marked: list[Message] = [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + cut}]
            text = cut_behind(text, self._render(marked), cut)
        if not spelled:
            return tokenizer.encode_special(text)
        ids = list[int]()
        for part in re.split(f"({self.names.pattern})", text):
            if part in self.ids:
                ids.append(self.ids[part])
                continue
            for name, character in hidden.items():  # in two pieces, so that the tokenizer finds no special token
                part = part.replace(character, name[:1] + cut + name[1:])
            for piece in filter(None, part.split(cut)):
                ids += tokenizer.encode(piece, bos=False, eos=False)
        return ids


def cut_behind(text: str, marked: str, mark: str) -> str:
    """A rendered dialog cut after its last message, with the spaces that end it if the template keeps them. `marked` is
    the dialog rendered with `mark` at the end of that message, whose words may occur elsewhere too."""
    begin, found, end = marked.rpartition(mark)
    shown = text[: len(text) - len(end)]
    if not found or not text.endswith(end) or shown.rstrip() != begin.rstrip():
        raise ValueError("the chat template does not show the last message, so that it cannot go on")
    return shown


def choose_format(folder: Path, tokenizer: Tokenizer, chat_format: str | None) -> ChatFormat:
    """The chat format of a folder, or the one named. A Hugging Face folder without a template usually has a base model:
    a warning is logged at the first use. ValueError for an unknown format."""
    source = template_of(folder)
    if chat_format == "template" and source is None:
        raise ValueError(f"{folder} has no chat template; chat_format may be {' or '.join(FORMATS)}")
    if source is not None and chat_format in (None, "template"):
        try:
            return TemplateFormat(source, tokenizer, {} if is_gguf(folder) else special_names(folder))
        except ValueError as error:
            if chat_format is not None:
                raise
            why = str(error)
    else:
        base = chat_format is None and (folder / "config.json").is_file() and not (folder / "params.json").is_file()
        why = f"{folder} has no chat template, as a base model has none" if base else ""
    chosen = get_chat_format(tokenizer, chat_format)
    chosen.note = why and f"{why}; dialogs are in the format {chosen.name}"
    return chosen


def template_of(folder: Path) -> str | None:
    """The template in a Hugging Face folder (a file, or the default entry of tokenizer_config.json) or a GGUF file."""
    alone = folder / "chat_template.jinja"
    found: Any
    if is_gguf(folder):
        found = read_gguf(folder).keys.get("tokenizer.chat_template")
    elif alone.is_file():
        found = read_text(alone)
    else:
        found = read_optional_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):
        entries = [entry for entry in found if isinstance(entry, dict) and entry.get("name") == "default"]
        found = entries[0].get("template") if entries else None
    return found if isinstance(found, str) and found else None


def tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """transformers' filter, whose options may be given by position. json.dumps has others, which call functions."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
