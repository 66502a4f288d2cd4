"""`llama` and `llama_chat` for notebooks, with the signatures of a well-known course on prompts, and local models."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from ..chat import Message
from ..generation import Llama
from .comparison import build, free

DEFAULT = "chat"
aliases: dict[str, str] = {DEFAULT: "smollm2"}  # names, of any case -> what compare takes as a model
options: dict[str, Any] = {"max_seq_len": 2048, "max_batch_size": 1}  # of Llama.build
most_loaded = 2
loaded: OrderedDict[str, Llama] = OrderedDict()  # the last used one is last


def get(model: str) -> Llama:
    """A model by its alias or its name for `compare`, loaded on first use. The least recently used model is dropped if
    `most_loaded` are loaded already, or if memory is short."""
    lower = {name.lower(): path for name, path in aliases.items()}
    name = lower.get(model.lower(), model)
    while name not in loaded:
        if len(loaded) < max(most_loaded, 1):
            try:
                loaded[name] = build(name, options)
                break
            except MemoryError:
                if not loaded:
                    raise
        loaded.popitem(last=False)
        free()
    loaded.move_to_end(name)
    return loaded[name]


def llama(
    prompt: str,
    add_inst: bool = True,
    model: str = DEFAULT,
    temperature: float = 0.0,
    max_tokens: int = 1024,
    verbose: bool = False,
    url: object = None,
    headers: object = None,
    base: object = None,
    max_tries: object = None,
) -> str:
    """The answer to a prompt in the model's own chat format; with add_inst=False the text that continues it, as a base
    model does. The last four arguments, of requests to a service, change nothing."""
    if add_inst:
        return llama_chat([prompt], [], model, temperature, max_tokens, verbose)
    if verbose:
        print(f"Prompt:\n{prompt}\n\nmodel: {model}")
    return get(model).text_completion([prompt], temperature, max_gen_len=max_tokens)[0]["generation"]


def llama_chat(
    prompts: Sequence[str],
    responses: Sequence[str],
    model: str = DEFAULT,
    temperature: float = 0.0,
    max_tokens: int = 1024,
    verbose: bool = False,
    url: object = None,
    headers: object = None,
    base: object = None,
    max_tries: object = None,
) -> str:
    """The answer to the last of several prompts; each earlier one has its response."""
    if len(prompts) != len(responses) + 1:
        raise ValueError(f"there are {len(prompts)} prompts and {len(responses)} responses; there must be one fewer")
    own = get(model)
    dialog: list[Message] = []
    for prompt, response in zip(prompts, responses, strict=False):
        dialog.append({"role": "user", "content": prompt})
        dialog.append({"role": "assistant", "content": own.chat_format.cleaned(response)})
    dialog.append({"role": "user", "content": prompts[-1]})
    if verbose:
        print(f"Prompt:\n{own.chat_format.render(dialog)}\n\nmodel: {model}")
    return own.chat_completion([dialog], temperature, max_gen_len=max_tokens)[0]["generation"]["content"]
