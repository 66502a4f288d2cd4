"""Multiple choice with lm-evaluation-harness: this library compared with the harness's own transformers model.

    python benchmarks/evaluation.py [--questions 200] [--letters] [--batch 8]

Questions with four choices after the same five examples, about 800 tokens, on the 110M shape with random float32
weights (dim 768, 12 layers, 12 heads, FFN 2048, vocabulary 32000). Choices are texts of several tokens, or with
`--letters` the letters A to D. Both are measured once; their results must agree. Needs the extras `eval` and `bench`.
"""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import fire
import torch
from common import random_folder

from llama import Llama
from llama.checkpoint.convert import convert
from llama.evaluation import HarnessModel

TEXT = "the little fox had a red hat and went to a warm house where it was cold in winter but not in summer"
CONTEXT = 1024


def requests(questions: int, letters: bool, seed: int = 0) -> list[tuple[str, str]]:
    chance = random.Random(seed)

    def sentence(words: int) -> str:
        return " ".join(chance.choices(TEXT.split(), k=words))

    def question() -> tuple[str, list[str]]:
        choices = [sentence(4) for _ in range(4)]
        listed = "".join(f"\n{letter}. {choice}" for letter, choice in zip("ABCD", choices, strict=True))
        return f"Question: {sentence(14)}?{listed if letters else ''}\nAnswer:", choices

    shots = ""
    while len(shots) < 1200:  # about 800 tokens
        text, choices = question()
        shots += f"{text} {'A' if letters else choices[0]}\n\n"
    asked = [question() for _ in range(questions)]
    return [(shots + text, f" {end}") for text, choices in asked for end in ("ABCD" if letters else choices)]


def main(questions: int = 200, letters: bool = False, batch: int = 8) -> None:
    from lm_eval.models.huggingface import HFLM

    with tempfile.TemporaryDirectory() as name:
        meta, hf = random_folder(Path(name) / "meta", "110M", torch.float32), Path(name) / "hf"
        convert(meta, hf, "hf", 1, None)
        llama = Llama.build(meta, max_seq_len=CONTEXT, max_batch_size=batch, device="cpu", dtype="float32")
        mine = HarnessModel(llama, progress=False)
        theirs = HFLM(pretrained=str(hf), device="cpu", dtype="float32", batch_size=batch, max_length=CONTEXT)
    pairs = requests(questions, letters)
    asked = [SimpleNamespace(args=pair) for pair in pairs]
    print(f"{len(asked)} requests; the first has {len(mine.tok_encode(''.join(pairs[0])))} tokens")
    times, results = [], []
    for model in (mine, theirs):
        model.loglikelihood(asked[:8], disable_tqdm=True)  # to warm up
        if model is mine:
            llama.engine.forget()
        began = time.perf_counter()
        results.append(model.loglikelihood(asked, disable_tqdm=True))
        times.append(time.perf_counter() - began)
    worst = max(abs(a - b) for (a, _), (b, _) in zip(*results, strict=True))
    print(f"{times[0]:.1f} s, transformers {times[1]:.1f} s: {times[1] / times[0]:.2f} times as fast")
    print(f"log likelihoods differ by {worst:.1e} at most")


if __name__ == "__main__":
    fire.Fire(main)
