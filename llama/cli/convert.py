"""python -m llama convert: writes a checkpoint in another layout, number of shards or dtype."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from .. import devices
from ..checkpoint import Checkpoint, check_path, find_folder, find_tokenizer
from ..checkpoint import convert as checkpoint_convert
from ..checkpoint.calibrate import MOST, WINDOW
from ..generation import Llama
from ..request import Request
from ..sampling import SamplingParams
from ..tokenizer import Tokenizer
from .flags import documented

OWN = MOST  # tokens that a model writes to calibrate with
AT_ONCE = 16  # texts that it writes at a time
SENTENCE_END = re.compile(r"(?<=[.?!])\s|\n")
OPENING = 32  # tokens of a text whose first sentence becomes a user's message


@documented
def convert(
    src: str,
    dst: str,
    to: str = "meta",
    mp: int = 1,
    dtype: str | None = None,
    tokenizer_path: str | None = None,
    quantize: str | None = None,
    group_size: int | None = None,
    symmetric: bool = False,
    search: bool | None = None,
    calibrate: str | None = None,
    lora: str | list | None = None,
) -> None:
    """Write the checkpoint in SRC, in any layout, to the new folder DST.

    Args:
        src: folder in Meta's or Hugging Face's layout, a GGUF file, or an id of the Hugging Face Hub
        dst: the new folder; it gets this name once it is complete
        to: layout to write: meta, hf, or gguf for a folder with model.gguf
        mp: number of shards, for meta
        dtype: bfloat16, float16 or float32; by default as in src
        tokenizer_path: tokenizer.model or tokenizer.json; by default the one in src or one folder up
        quantize: int8 or int4, for meta and for gguf (Q8_0, Q4_0): store the matrices quantized
        symmetric: int4 without a minimum per group, which saves half a bit per weight in groups of 32
        search: search the scale of each group for the least squared error; by default for int4
        calibrate: quantize by GPTQ, which minimizes the change of each layer's outputs on a text, a file in UTF-8 or
            what the model generates (auto, or chat for dialogs in its chat format)
    """
    folder = find_folder(src, "src")
    asked = None if dtype is None else devices.as_dtype(dtype)
    named = {"symmetric": symmetric, "search": search, "calibrate": calibrate}
    if quantize is None and (alone := [name for name, value in named.items() if value]):
        raise ValueError(f"{alone[0]} needs --quantize int8 or int4")
    for name in ("symmetric", "search"):
        if named[name] not in (None, True, False):
            raise ValueError(f"{name} is {named[name]!r}; it must be True or False")
    if calibrate not in (None, "auto", "chat"):
        calibrate = str(check_path(calibrate, "calibrate", "file"))
    tokenizer = find_tokenizer(folder, tokenizer_path)

    def text() -> list[int]:
        if calibrate in ("auto", "chat"):
            llama = Llama.build(folder, tokenizer, WINDOW, AT_ONCE, compile=True, lora=lora)
            llama.model.params.check_output()
            return own_text(llama, OWN, calibrate == "chat")
        return Tokenizer(tokenizer).encode(Path(str(calibrate)).read_text("utf-8"), bos=True, eos=False)

    searched = quantize == "int4" if search is None else search
    target, calibration = Path(dst).expanduser(), text if calibrate else None
    rounding = (quantize, group_size, symmetric, searched, calibration)
    checkpoint_convert.convert(folder, target, to, mp, asked, tokenizer, *rounding, lora)
    written = Checkpoint(find_folder(target, "dst"))
    size = sum(file.stat().st_size for file in target.iterdir())
    precision = written.scheme or devices.dtype_name(written.dtype())
    print(f"written to {target}: {to} in {precision}, {size / 1e6:,.1f} MB")


def own_text(llama: Llama, count: int, chat: bool = False) -> list[int]:
    """At least `count` token ids that the model samples at temperature 1, in texts that begin with BOS; or if `chat`,
    with its answers to first sentences of such texts."""
    tokenizer, chat_format = llama.tokenizer, llama.chat_format
    ids: list[int] = []
    seed, limit = 0, min(WINDOW, llama.model.params.max_seq_len)
    with tqdm(desc="writing", total=count, unit="token", disable=None, leave=False) as bar:
        while len(ids) < count:
            texts = -(-(count - len(ids)) // limit)
            prompts = [[tokenizer.bos_id]] * texts
            if chat:
                openings = [tokenizer.decode(text).strip() for text in written(llama, prompts, OPENING, seed)]
                messages = [chat_format.cleaned(SENTENCE_END.split(opening)[0]) for opening in openings]
                prompts = [chat_format.encode(tokenizer, [{"role": "user", "content": text}]) for text in messages]
                if (longest := max(map(len, prompts))) >= limit:
                    raise ValueError(f"the chat format takes {longest} tokens for a question; at most {limit - 1} fit")
            ids += itertools.chain(*written(llama, prompts, limit, seed, bar.update))
            seed += texts
    return ids


def written(
    llama: Llama, prompts: Sequence[list[int]], limit: int, seed: int, progress: Callable[[int], object] | None = None
) -> list[list[int]]:
    """The prompts, each continued until it ends or has `limit` tokens; `progress` gets the number of new tokens."""
    ends = llama.tokenizer.eos_ids
    requests = [
        Request(prompt, limit, SamplingParams(temperature=1.0, seed=seed + i), ends) for i, prompt in enumerate(prompts)
    ]
    for events in llama.engine.run(requests):
        if progress:
            progress(sum(len(event.tokens) for event in events))
    return [request.ids for request in requests]
