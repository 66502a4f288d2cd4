"""python -m llama convert: writes a checkpoint in another layout, number of shards or dtype."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from tqdm import tqdm

from .. import devices
from ..checkpoint import Checkpoint, check_path, find_folder, find_tokenizer
from ..checkpoint import convert as checkpoint_convert
from ..checkpoint.calibrate import LEAST, WINDOW
from ..engine import Engine
from ..generation import Llama
from ..request import Request
from ..sampling import SamplingParams
from ..tokenizer import Tokenizer
from .flags import documented

OWN = 4 * LEAST  # tokens that a model writes to calibrate with
AT_ONCE = 16  # texts that it writes at a time


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
        calibrate: a text file in UTF-8, or auto for text that the model generates: quantize by GPTQ, which minimizes
            the change of each layer's outputs on this text
    """
    folder = find_folder(src, "src")
    asked = None if dtype is None else devices.as_dtype(dtype)
    named = {"symmetric": symmetric, "search": search, "calibrate": calibrate}
    if quantize is None and (alone := [name for name, value in named.items() if value]):
        raise ValueError(f"{alone[0]} needs --quantize int8 or int4")
    for name in ("symmetric", "search"):
        if named[name] not in (None, True, False):
            raise ValueError(f"{name} is {named[name]!r}; it must be True or False")
    if calibrate not in (None, "auto"):
        calibrate = str(check_path(calibrate, "calibrate", "file"))
    tokenizer = find_tokenizer(folder, tokenizer_path)

    def text() -> list[int]:
        if calibrate == "auto":
            llama = Llama.build(folder, tokenizer, WINDOW, AT_ONCE, lora=lora)
            llama.model.params.check_output()
            return own_text(llama.engine, llama.tokenizer.bos_id, llama.tokenizer.eos_ids, OWN)
        return Tokenizer(tokenizer).encode(Path(str(calibrate)).read_text("utf-8"), bos=True, eos=False)

    searched = quantize == "int4" if search is None else search
    target, calibration = Path(dst).expanduser(), text if calibrate else None
    rounding = (quantize, group_size, symmetric, searched, calibration)
    checkpoint_convert.convert(folder, target, to, mp, asked, tokenizer, *rounding, lora)
    written = Checkpoint(find_folder(target, "dst"))
    size = sum(file.stat().st_size for file in target.iterdir())
    precision = written.scheme or devices.dtype_name(written.dtype())
    print(f"written to {target}: {to} in {precision}, {size / 1e6:,.1f} MB")


def own_text(engine: Engine, bos: int, ends: Collection[int], count: int) -> list[int]:
    """At least `count` token ids that the model samples at temperature 1, in texts that begin with BOS."""
    ids: list[int] = []
    seed, limit = 0, min(WINDOW, engine.model.params.max_seq_len)
    with tqdm(desc="writing", total=count, unit="token", disable=None, leave=False) as bar:
        while len(ids) < count:
            seeds = range(seed, seed + -(-(count - len(ids)) // limit))
            requests = [Request([bos], limit, SamplingParams(temperature=1.0, seed=seed), ends) for seed in seeds]
            for events in engine.run(requests):
                bar.update(sum(len(event.tokens) for event in events))
            ids += [id for request in requests for id in request.ids]
            seed = seeds.stop
    return ids
