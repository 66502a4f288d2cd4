"""The engine's events -> completions, chat completions and their chunks, in OpenAI's format."""

from __future__ import annotations

import base64
import math
import struct
import time
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..request import Event
from ..tokenizer import Decoder, Tokenizer
from .loop import REASONS, Job

NEVER = -9999.0  # in place of minus infinity, which JSON lacks


class Token(NamedTuple):
    text: str  # that it adds
    bytes: list[int]
    logprob: float | None  # None for a prompt's first token
    top: list[tuple[int, float]] | None
    offset: int  # in characters, of its text


class Choice:
    """An answer while it is generated. With log probabilities, tokens are held back until their text is final, so that
    streams never contain part of a stop string."""

    def __init__(self, tokenizer: Tokenizer, job: Job, row: int) -> None:
        self.tokenizer, self.job, self.row, self.work = tokenizer, job, row, job.work
        prompt = self.work.prompts[row]
        self.decoder = Decoder(tokenizer, prompt if self.work.continues and not self.work.echo else ())
        self.held: list[Token] = []
        self.echo = self.work.echo  # the next event begins with the prompt
        self.characters = self.final = 0  # of the tokens so far, and of the text that is final

    def take(self, event: Event) -> list[Token]:
        """The tokens whose text this event makes final, if the request has `logprobs`."""
        self.final += len(event.text)
        if not self.work.logprobs or event.finish_reason == "refused":
            return []
        self._hold(event)
        return self._release(event.finish_reason is not None)

    def _hold(self, event: Event) -> None:
        logprobs: list[float | None] = [*event.logprobs]
        tops: list[list[tuple[int, float]] | None] = [*event.top_logprobs]
        if self.echo:
            scores: Any = self.job.requests[self.row].observe  # scoring.Scores
            tops = [None, *scores.top_logprobs, *tops]
            logprobs[0], self.echo = None, False
        tops += [[]] * (len(event.tokens) - len(tops))  # without top_logprobs
        for id, logprob, top in zip(event.tokens, logprobs, tops, strict=True):
            text = self.decoder.push(id)
            self.held.append(Token(text, bytes_of(self.tokenizer, id, text), logprob, top, self.characters))
            self.characters += len(text)

    def _release(self, end: bool) -> list[Token]:
        """The tokens whose text is final. At the end all tokens are, cut where the text ends."""
        if end:
            if self.held and (rest := self.decoder.flush()):
                last = self.held[-1]
                self.held[-1] = last._replace(text=last.text + rest)
            cut = [token._replace(text=token.text[: max(0, self.final - token.offset)]) for token in self.held]
            self.held = []
            return cut
        # A token without text may be part of a character, and is released with the character's last token.
        final = [i for i, t in enumerate(self.held) if t.text and t.offset + len(t.text) <= self.final]
        count = final[-1] + 1 if final else 0
        released, self.held = self.held[:count], self.held[count:]
        return released


class Reply:
    """A job's reply as JSON, whole or in chunks."""

    def __init__(self, tokenizer: Tokenizer, model: str, job: Job) -> None:
        self.tokenizer, self.model, self.job, self.work = tokenizer, model, job, job.work
        self.chat, self.created = self.work.chat, int(time.time())
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.choices = [Choice(tokenizer, job, row) for row in range(len(self.work.prompts))]

    def head(self, chunk: bool = False) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "system_fingerprint": None}

    def whole(self, answers: Sequence[Event]) -> dict[str, Any]:
        """The reply to a request without `stream`: each answer is one event."""
        choices = []
        for event in sorted(answers):  # by row
            message = {"role": "assistant", "content": event.text, "refusal": None}
            choice: dict[str, Any] = {"index": event.row}
            choice |= {"message": message} if self.chat else {"text": event.text}
            choice["logprobs"] = self.logprobs(self.choices[event.row].take(event))
            choices.append({**choice, "finish_reason": REASONS[event.finish_reason]})
        return {**self.head(), "choices": choices, "usage": self.job.usage()}

    def first_chunks(self) -> list[dict[str, Any]]:
        roles: dict[str, Any] = {"role": "assistant", "content": ""}
        return [self.chunk(i, roles) for i in range(self.work.n)] if self.chat else []

    def chunks(self, event: Event) -> list[dict[str, Any]]:
        """The chunks of an event: its text, and in chats a separate one for the finish reason."""
        index, text, reason = event.row, event.text, REASONS[event.finish_reason]
        tokens = self.choices[index].take(event)
        if not self.chat:
            return [self.chunk(index, text, tokens, reason)] if text or tokens or reason else []
        content = [self.chunk(index, {"content": text}, tokens)] if text or tokens else []
        return content + ([self.chunk(index, {}, [], reason)] if reason else [])

    def chunk(
        self, index: int, new: Any, tokens: Sequence[Token] = (), finish_reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta" if self.chat else "text": new}
        choice |= {"logprobs": self.logprobs(tokens) if tokens else None, "finish_reason": finish_reason}
        return {**self.head(True), "choices": [choice], **({"usage": None} if self.work.include_usage else {})}

    def usage_chunk(self) -> dict[str, Any]:
        return {**self.head(True), "choices": [], "usage": self.job.usage()}

    def logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self.work.logprobs:
            return None
        if self.chat:
            return {"content": [self._of_chat(token) for token in tokens], "refusal": None}
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [finite(token.logprob) for token in tokens],
            "top_logprobs": [self._of_text(token) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }

    def _of_chat(self, token: Token) -> dict[str, Any]:
        top = []
        for id, logprob in token.top or []:
            text = self.tokenizer.piece(id)
            top.append({"token": text, "logprob": finite(logprob), "bytes": bytes_of(self.tokenizer, id, text)})
        return {"token": token.text, "logprob": finite(token.logprob), "bytes": token.bytes, "top_logprobs": top}

    def _of_text(self, token: Token) -> dict[str, float | None] | None:
        """Log probabilities of the most probable tokens and of the chosen one, by text; of tokens with the same text,
        that of the most probable."""
        if token.top is None:
            return None
        found: dict[str, float | None] = {}
        for id, logprob in token.top:
            found.setdefault(self.tokenizer.piece(id), finite(logprob))
        found.setdefault(token.text, finite(token.logprob))
        return found


def bytes_of(tokenizer: Tokenizer, id: int, text: str) -> list[int]:
    """The bytes of a token, whose `text` lacks those of an incomplete character."""
    piece = tokenizer.vocabulary.id_to_piece(id)
    return [*(piece if isinstance(piece, bytes) else text.encode())]


def finite(logprob: float | None) -> float | None:
    return NEVER if logprob == -math.inf else logprob


def embeddings(model: str, job: Job) -> dict[str, Any]:
    """The reply to a request for embeddings; base64 is of float32, little-endian, as clients expect."""
    rows = [] if job.embeddings is None else job.embeddings.tolist()
    data = []
    for index, row in enumerate(rows):
        packed = base64.b64encode(struct.pack(f"<{len(row)}f", *row)).decode() if job.work.base64 else row
        data.append({"object": "embedding", "index": index, "embedding": packed})
    usage = job.usage()
    counts = {name: usage[name] for name in ("prompt_tokens", "total_tokens")}
    return {"object": "list", "data": data, "model": model, "usage": counts}
