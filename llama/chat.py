"""Dialogs -> token ids: the chat formats of Llama 2 and 3, and the rules for what a dialog may hold."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal, TypedDict, get_args

from .tokenizer import Tokenizer

log = logging.getLogger(__name__)
Role = Literal["system", "user", "assistant", "ipython", "tool"]
ROLES: tuple[str, ...] = get_args(Role)


class Message(TypedDict):
    role: Role
    content: str


Dialog = Sequence[Message]

INST, END_INST = "[INST]", "[/INST]"
SYS, END_SYS = "<<SYS>>", "<</SYS>>"
TAGS = (INST, END_INST, SYS, END_SYS)
START_HEADER, END_HEADER, END_TURN = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
REFUSAL = f"Error: a message may not contain the tags {' '.join(TAGS)}."


class ChatFormat:
    """How a dialog becomes ids, and which dialogs are allowed. Subclasses define `_render` and `_encode`."""

    name = ""
    note = ""  # logged when a dialog is first encoded
    roles = ROLES  # that messages may have

    def check(self, dialog: Dialog, name: str = "the dialog", answered: bool = False) -> None:
        """ValueError for a dialog that the format does not allow."""
        if isinstance(dialog, (str, bytes)) or not isinstance(dialog, Sequence) or not dialog:
            raise ValueError(f"{name} is {dialog!r}; it must be a list of messages")
        for i, message in enumerate(dialog):
            if not isinstance(message, dict) or set(message) != {"role", "content"}:
                raise ValueError(f'message {i} of {name} is {message!r}; it must be {{"role": ..., "content": ...}}')
            role, content = message["role"], message["content"]
            if role not in self.roles:
                raise ValueError(f"message {i} of {name} has the role {role!r}; roles are {', '.join(self.roles)}")
            if not isinstance(content, str):
                raise ValueError(f"message {i} of {name} has the content {content!r}, which is not a str")
            content.encode()  # raises UnicodeEncodeError, a ValueError, for half a surrogate pair
        self.check_order([message["role"] for message in dialog], name, answered)

    def check_order(self, roles: list[Role], name: str, answered: bool) -> None:
        """The last message must be the assistant's if `answered`, and must not be otherwise."""
        if roles[-1] == "assistant" and not answered:
            raise ValueError(f"{name} ends with the role assistant; there is nothing to answer")
        if answered and roles[-1] != "assistant":
            raise ValueError(f"{name} ends with the role {roles[-1]}; its last message must be the assistant's")

    def refusal(self, dialog: Dialog) -> str | None:
        """What to answer, without asking the model, to a dialog with a message that could pass for another role's."""
        return None

    def cleaned(self, answer: str) -> str:
        """An answer without what no message of a dialog may contain."""
        return answer

    def encode(
        self, tokenizer: Tokenizer, dialog: Dialog, answered: bool = False, unfinished: bool = False
    ) -> list[int]:
        """The ids of a dialog, with the header of the answer to come; or of an `answered` dialog, to the end of the
        assistant's message, or only of its text if `unfinished`. ValueError for a malformed one."""
        self.check(dialog, answered=answered)
        if self.note:
            log.warning(self.note)
            self.note = ""
        return self._encode(tokenizer, dialog, unfinished)

    def render(self, dialog: Dialog) -> str:
        """The text that `encode` encodes, for people to read."""
        self.check(dialog)
        return self._render(dialog)

    def _render(self, dialog: Dialog) -> str:
        raise NotImplementedError

    def _encode(self, tokenizer: Tokenizer, dialog: Dialog, unfinished: bool) -> list[int]:
        raise NotImplementedError


def is_answered(dialog: Dialog) -> bool:
    return dialog[-1]["role"] == "assistant"


class Llama2Format(ChatFormat):
    """Each pair of messages is encoded separately:

        BOS "[INST] u1 [/INST] a1 " EOS  BOS "[INST] u2 [/INST]"

    where a system message is part of the user's first one, u1 = "<<SYS>>\\n" system "\\n<</SYS>>\\n\\n" u1. Text that
    spells BOS or EOS stays text. The tags are plain text to the tokenizer, so no message may contain them."""

    name = "llama2"
    roles = ("system", "user", "assistant")

    def check_order(self, roles: list[Role], name: str, answered: bool) -> None:
        """User and assistant alternate after an optional system message, the user first, and last unless `answered`."""
        turns = roles[1:] if roles[0] == "system" else roles
        if turns != ["user", "assistant"] * (len(turns) // 2) + ["user"] * (not answered):
            raise ValueError(
                f"{name} has the roles {roles}; an optional system message must be followed by user and "
                f"assistant in turn, beginning with user and ending with {'assistant' if answered else 'user'}"
            )
        super().check_order(roles, name, answered)  # a system message alone

    def refusal(self, dialog: Dialog) -> str | None:
        return REFUSAL if has_tags(dialog) else None

    def cleaned(self, answer: str) -> str:
        while any(tag in answer for tag in TAGS):  # again, as removing a tag may join the parts of another
            for tag in TAGS:
                answer = answer.replace(tag, "")
        return answer

    def _encode(self, tokenizer: Tokenizer, dialog: Dialog, unfinished: bool) -> list[int]:
        *turns, (last, ended) = self._turns(dialog)
        turns.append((last.rstrip(), False) if unfinished else (last, ended))
        return [id for text, ended in turns for id in tokenizer.encode(text, bos=True, eos=ended)]

    def _render(self, dialog: Dialog) -> str:
        return "\n".join(f"<s>{text}{'</s>' * ended}" for text, ended in self._turns(dialog))

    def _turns(self, dialog: Dialog) -> list[tuple[str, bool]]:
        """The text of each pair of messages, and whether EOS follows."""
        if has_tags(dialog):
            raise ValueError(REFUSAL)
        contents = [message["content"].strip() for message in dialog]
        if dialog[0]["role"] == "system":
            system, user, *rest = contents
            contents = [f"{SYS}\n{system}\n{END_SYS}\n\n{user}", *rest]
        pairs = zip(contents[::2], contents[1::2], strict=False)
        turns = [(f"{INST} {user} {END_INST} {answer} ", True) for user, answer in pairs]
        return turns if is_answered(dialog) else [*turns, (f"{INST} {contents[-1]} {END_INST}", False)]


class Llama3Format(ChatFormat):
    """BOS, and each message after a header that names its role; roles may follow each other in any order:

        <|start_header_id|> role <|end_header_id|> "\\n\\n" content <|eot_id|>

    and last the assistant's header. Text never becomes a special token, so a message may contain any text."""

    name = "llama3"

    def _encode(self, tokenizer: Tokenizer, dialog: Dialog, unfinished: bool) -> list[int]:
        ids = [tokenizer.bos_id]
        try:
            for text, special in self._parts(dialog)[: -1 if unfinished else None]:
                ids += [tokenizer.special[text]] if special else tokenizer.encode(text, bos=False, eos=False)
        except KeyError as error:
            raise ValueError(f"the tokenizer has no token {error}, which the chat format llama3 needs") from error
        return ids

    def _render(self, dialog: Dialog) -> str:
        return "<|begin_of_text|>" + "".join(text for text, _ in self._parts(dialog))

    def _parts(self, dialog: Dialog) -> list[tuple[str, bool]]:
        """What follows BOS: texts, and whether each is a special token."""

        def header(role: str) -> list[tuple[str, bool]]:
            return [(START_HEADER, True), (role, False), (END_HEADER, True), ("\n\n", False)]

        parts: list[tuple[str, bool]] = []
        for message in dialog:
            role = "ipython" if message["role"] == "tool" else message["role"]
            parts += [*header(role), (message["content"].strip(), False), (END_TURN, True)]
        return parts if is_answered(dialog) else parts + header("assistant")


FORMATS: dict[str, type[ChatFormat]] = {"llama2": Llama2Format, "llama3": Llama3Format}


def get_chat_format(tokenizer: Tokenizer | None, chat_format: str | ChatFormat | None = None) -> ChatFormat:
    """A chat format by name, or itself; by default the one whose tokens the tokenizer has. ValueError for another."""
    if isinstance(chat_format, ChatFormat):
        return chat_format
    if chat_format is None and tokenizer is not None:
        chat_format = "llama3" if START_HEADER in tokenizer.special else "llama2"
    if chat_format == "template":
        raise ValueError("chat_format 'template' needs the checkpoint's folder; use Llama.build")
    if not isinstance(chat_format, str) or chat_format not in FORMATS:
        raise ValueError(f"chat_format is {chat_format!r}; it must be {', '.join(FORMATS)} or template")
    return FORMATS[chat_format]()


def has_tags(dialog: Dialog) -> bool:
    """Whether a message contains one of Llama 2's tags, which could pass text off as another role's."""
    return any(tag in message["content"] for message in dialog for tag in TAGS)


def encode_dialog(tokenizer: Tokenizer, dialog: Dialog, chat_format: str | ChatFormat | None = None) -> list[int]:
    """The ids of a dialog that asks for an answer, in a format by name, by default the tokenizer's. Raises ValueError
    for a malformed dialog, or one with tags of the format in a message of any role."""
    return get_chat_format(tokenizer, chat_format).encode(tokenizer, dialog)


def render_dialog(dialog: Dialog, chat_format: str = "llama2") -> str:
    """The text that `encode_dialog` encodes, for people to read. In Llama 2's format "<s>" and "</s>" stand for BOS and
    EOS, and each pair of messages has a line."""
    return get_chat_format(None, chat_format).render(dialog)
