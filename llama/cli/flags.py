"""The flags that several commands share, and their help texts."""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, signature
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])
FLAGS = {
    "ckpt_dir": "folder in Meta's or Hugging Face's layout, a GGUF file, or an id of the Hugging Face Hub",
    "tokenizer_path": "tokenizer.model or tokenizer.json; by default the one in ckpt_dir or one folder up",
    "max_seq_len": "maximum number of tokens of a prompt and its answer",
    "max_batch_size": "maximum number of requests that run at the same time; others wait",
    "device": "cuda, mps or cpu; by default the first of them that is available",
    "dtype": "bfloat16, float16 or float32; by default as Llama.build chooses",
    "check_memory": "refuse a model that does not fit into memory",
    "quantize": "int8 or int4, to quantize the weights while loading",
    "group_size": "columns that share a scale: 16, 32, 64, 128, or with int8 0 for a whole row; by default 32 "
    "for int4, and for int8 128 when loading on a CPU, else 0",
    "compile": "whether to use the C++ backend on a CPU; by default for more than 50 MB of weights",
    "chat_format": "llama2, llama3 or template; by default the folder's template, else the tokenizer's format",
    "lora": "folder of a PEFT LoRA adapter to merge; or a list such as "
    """'["A", "B"]' or '[("A", 0.5), ("B", 1)]'""",
}


def loading(
    device: str | None = None,
    dtype: str | None = None,
    check_memory: bool = True,
    quantize: str | None = None,
    group_size: int | None = None,
    compile: bool | None = None,
    chat_format: str | None = None,
    lora: str | list | None = None,
) -> None:
    """The flags that `**options` of a command stand for: options of Llama.build."""


def documented(command: F) -> F:
    """Put the flags of `loading` in place of a command's `**options`, and the help texts above into its docstring: fire
    reads its signature and its docstring."""
    found = signature(command)
    parameters = {name: p for name, p in found.parameters.items() if p.kind is not Parameter.VAR_KEYWORD}
    if len(parameters) < len(found.parameters):
        more = signature(loading).parameters
        parameters |= {name: more[name].replace(kind=Parameter.KEYWORD_ONLY) for name in more}
        command.__signature__ = found.replace(parameters=[*parameters.values()])  # type: ignore[attr-defined]
        command.__annotations__ |= {name: p.annotation for name, p in more.items()}
    doc = command.__doc__ or ""
    names = [name for name in parameters if name in FLAGS and f"\n        {name}:" not in doc]
    command.__doc__ = "\n".join([doc.rstrip(), *(f"        {name}: {FLAGS[name]}" for name in names), "    "])
    return command
