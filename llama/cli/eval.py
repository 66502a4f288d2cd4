"""python -m llama eval: lm-evaluation-harness with a model of this library."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .. import parallel
from ..args import ModelArgs
from ..checkpoint import find_folder
from ..generation import Llama

# Flags of this library; all others are the harness's own.
FLAGS: dict[str, tuple[Callable[[str], Any], str]] = {
    "tokenizer_path": (str, "tokenizer.model or tokenizer.json; by default the one in CKPT or one folder up"),
    "max_seq_len": (int, "tokens of a prompt and its answer, at most; by default 2048"),
    "max_batch_size": (int, "requests that are computed together; by default 8"),
    "device": (str, "cuda, mps or cpu; by default the first of them that is available"),
    "dtype": (str, "bfloat16, float16 or float32; by default as Llama.build chooses"),
    "quantize": (str, "int8 or int4"),
    "group_size": (int, "columns that have a scale together: 16, 32, 64 or 128"),
    "chat_format": (str, "llama2, llama3 or template; by default the folder's template, else the tokenizer's format"),
    "lora": (str, "folder of a LoRA adapter of PEFT, to merge"),
}


def eval(ckpt_dir: str, harness: Sequence[str] = (), card: bool = False, **options: Any) -> None:
    """Evaluate CKPT with lm-evaluation-harness; its flags, such as --tasks, --num_fewshot and --limit, follow."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        raise ValueError(f"eval needs the package {error.name}; pip install 'llama-reference[eval]'") from error
    from ..evaluation import harness as own

    find_folder(ckpt_dir, "ckpt_dir")  # before the harness reads its tasks, which takes seconds
    options = {"max_seq_len": 2048, "max_batch_size": 8, **options}

    def build() -> own.HarnessModel:
        return own.HarnessModel(Llama.build(ckpt_dir, **options), ckpt_dir)

    if card:
        return evaluate_card(build, harness)
    own.register(build)
    sys.argv = ["lm_eval", "run", "--model", own.NAME, *harness]
    cli_evaluate()


def evaluate_card(build: Callable[[], Any], args: Sequence[str]) -> None:
    """The table of the model card; `args` are its flags."""
    from ..evaluation import card

    parser = argparse.ArgumentParser("llama eval --card", allow_abbrev=False)
    parser.add_argument("--limit", type=float, help="documents of a task, or a fraction of all")
    parser.add_argument("--published", help=f"the row to compare with: {', '.join(card.PUBLISHED)}")
    parser.add_argument("--include_path", help="folder of tasks that replace the harness's own")
    parser.add_argument("--output_path", default="card", help="folder of card.json and card.md")
    flags = vars(parser.parse_args(args))
    folder = Path(flags.pop("output_path")).expanduser()
    if flags["published"] and flags["published"] not in card.PUBLISHED:  # before the model is loaded
        card.published_row(ModelArgs(), flags["published"])
    scores = card.evaluate(build(), **flags)
    if parallel.rank() == 0:
        card.write(scores, folder)
        print(card.table(scores))
        print(f"written to {folder / 'card.json'} and {folder / 'card.md'}")


def parse(args: Sequence[str]) -> Callable[[], None]:
    """The call that a command line asks for."""
    about = "Evaluate a model with lm-evaluation-harness, whose flags, such as --tasks and --limit, follow."
    parser = argparse.ArgumentParser("llama eval", description=about, allow_abbrev=False)
    parser.add_argument("ckpt_dir", help="folder of a checkpoint, a GGUF file, or an id of the Hugging Face Hub")
    for name, (kind, text) in FLAGS.items():
        parser.add_argument(f"--{name}", type=kind, help=text)
    parser.add_argument("--card", action="store_true", help="the benchmarks of MODEL_CARD.md, beside the published row")
    found, harness = parser.parse_known_args(args)
    options = {name: value for name, value in vars(found).items() if value is not None}
    return partial(eval, harness=harness, **options)


eval.parse = parse  # type: ignore[attr-defined]
