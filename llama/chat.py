"""Dialogs -> token ids in Llama 2's chat format, and the rules for what a dialog may hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict

from .tokenizer import Tokenizer

Role = Literal["system", "user", "assistant"]


class Message(TypedDict):
    role: Role
    content: str


Dialog = Sequence[Message]

INST, END_INST = "[INST]", "[/INST]"
SYS, END_SYS = "<<SYS>>", "<</SYS>>"
TAGS = (INST, END_INST, SYS, END_SYS)
REFUSAL = f"Error: a message may not contain the tags {' '.join(TAGS)}."


def check_dialog(dialog: Dialog, name: str = "the dialog") -> None:
    """ValueError unless user and assistant take turns, the user first and last, after an optional system message."""
    if isinstance(dialog, (str, bytes)) or not isinstance(dialog, Sequence):
        raise ValueError(f"{name} is {dialog!r}; it must be a list of messages")
    for i, message in enumerate(dialog):
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise ValueError(f'message {i} of {name} is {message!r}; it must be {{"role": ..., "content": ...}}')
        if not isinstance(message["content"], str):
            raise ValueError(f"message {i} of {name} has the content {message['content']!r}, which is not a str")
        message["content"].encode()  # raises UnicodeEncodeError, a ValueError, for half a surrogate pair
    roles = [message["role"] for message in dialog]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if len(turns) % 2 == 0 or turns != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise ValueError(
            f"{name} has the roles {roles}; an optional system message must be followed by user and "
            "assistant in turn, beginning and ending with user"
        )


def has_tags(dialog: Dialog) -> bool:
    """Whether a message contains one of the format's tags, which could pass text off as another role's."""
    return any(tag in message["content"] for message in dialog for tag in TAGS)


def encode_dialog(tokenizer: Tokenizer, dialog: Dialog) -> list[int]:
    """The ids of a dialog that asks for an answer. Each pair of turns is encoded separately:

        BOS "[INST] u1 [/INST] a1 " EOS  BOS "[INST] u2 [/INST]"

    where a system message stands inside the first user turn, u1 = "<<SYS>>\\n" system "\\n<</SYS>>\\n\\n" u1. Text that
    spells BOS or EOS stays text. Raises ValueError for a malformed dialog, or one with tags in a message of any role.
    """
    return [id for text, ended in _turns(dialog) for id in tokenizer.encode(text, bos=True, eos=ended)]


def render_dialog(dialog: Dialog) -> str:
    """What `encode_dialog` encodes, for people to look at: "<s>" and "</s>" stand for BOS and EOS; a line a turn."""
    return "\n".join(f"<s>{text}{'</s>' * ended}" for text, ended in _turns(dialog))


def _turns(dialog: Dialog) -> list[tuple[str, bool]]:
    """The text of each pair of turns, and whether it is over."""
    check_dialog(dialog)
    if has_tags(dialog):
        raise ValueError(REFUSAL)
    contents = [message["content"].strip() for message in dialog]
    if dialog[0]["role"] == "system":
        system, user, *rest = contents
        contents = [f"{SYS}\n{system}\n{END_SYS}\n\n{user}", *rest]
    pairs = zip(contents[:-1:2], contents[1::2], strict=True)
    turns = [(f"{INST} {user} {END_INST} {answer} ", True) for user, answer in pairs]
    return [*turns, (f"{INST} {contents[-1]} {END_INST}", False)]
