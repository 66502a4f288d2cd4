"""python -m llama perplexity: how well a model predicts a text."""

from __future__ import annotations

from tqdm import tqdm

from .. import parallel, scoring
from ..checkpoint import check_path, read_text
from ..generation import Llama


def perplexity(
    file: str,
    ckpt_dir: str,
    tokenizer_path: str | None = None,
    window: int = 512,
    stride: int | None = None,
    batch: int = 4,
    device: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    group_size: int | None = None,
    lora: str | list | None = None,
) -> None:
    """Print the perplexity of the text in FILE, computed in a sliding window.

    Args:
        file: a text in UTF-8
        ckpt_dir: folder in Meta's or Hugging Face's layout, a GGUF file, or an id of the Hugging Face Hub
        tokenizer_path: tokenizer.model or tokenizer.json; by default the one in ckpt_dir or one folder up
        window: tokens of a window
        stride: tokens from one window to the next; by default half of a window
        batch: windows in a batch
        device: cuda, mps or cpu; by default the first of them that is available
        dtype: bfloat16, float16 or float32; by default as Llama.build chooses
        quantize: int8 or int4
        group_size: columns that have a scale together: 16, 32, 64 or 128; by default a row for int8, 32 for int4
        lora: folder of a LoRA adapter of PEFT, to merge; or a list such as '["A", "B"]' or '[("A", 0.5), ("B", 1)]'
    """
    step = window // 2 if stride is None else stride
    if type(window) is not int or type(step) is not int or not 0 < step < window:
        raise ValueError(f"window is {window!r} and stride {step!r}; they must be whole, 0 < stride < window")
    text = read_text(check_path(file, "file", "file"))
    llama = Llama.build(
        *(ckpt_dir, tokenizer_path, window, batch),
        device=device,
        dtype=dtype,
        quantize=quantize,
        group_size=group_size,
        lora=lora,
    )
    ids = llama.tokenizer.encode(text, bos=True, eos=False)
    if len(ids) < 2:
        raise ValueError(f"{file} is empty")
    with tqdm(total=len(ids) - 1, unit="token", disable=True if parallel.rank() else None, leave=False) as bar:
        value, count = scoring.perplexity(llama.model, ids, window, step, bar.update)
    if parallel.rank() == 0:
        print(f"perplexity {value:.4f} of {count:,} tokens, in windows of {window} every {step}")
