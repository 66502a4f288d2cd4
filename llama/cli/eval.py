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
from .flags import FLAGS, loading
from .script import texts


def eval(ckpt_dir: str, harness: Sequence[str], card: bool, **options: Any) -> None:
    """Evaluate a model with lm-evaluation-harness; its flags, such as --tasks, --num_fewshot and --limit, follow."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        raise ValueError(f"eval needs the package {error.name}; pip install 'llama-reference[eval]'") from error
    from ..evaluation import harness as own

    find_folder(ckpt_dir, "ckpt_dir")  # before the harness reads its tasks, which takes seconds

    def build() -> own.HarnessModel:
        return own.HarnessModel(Llama.build(ckpt_dir, **options), ckpt_dir)

    if card:
        return evaluate_card(build, harness)
    own.register(build)
    sys.argv = ["lm_eval", "run", "--model", own.NAME, *harness]
    cli_evaluate()


def evaluate_card(build: Callable[[], Any], args: Sequence[str]) -> None:
    """Compute the model card's table; `args` are the flags of --card."""
    from ..evaluation import card

    parser = argparse.ArgumentParser("python -m llama eval --card", allow_abbrev=False)
    parser.add_argument("--limit", type=float, help="documents per task, or a fraction of them")
    parser.add_argument("--published", help=f"the row to compare with: {', '.join(card.PUBLISHED)}")
    parser.add_argument("--include_path", help="folder of tasks that replace the harness's own")
    parser.add_argument("--output_path", default="card", help="folder to write card.json and card.md to")
    flags = vars(parser.parse_args(args))
    folder = Path(flags.pop("output_path")).expanduser()
    card.published_row(ModelArgs(), flags["published"])  # checked before the model is loaded
    scores = card.evaluate(build(), **flags)
    if parallel.rank() == 0:
        card.write(scores, folder)
        print(card.table(scores))
        print(f"written to {folder / 'card.json'} and {folder / 'card.md'}")


def parse(args: Sequence[str]) -> Callable[[], None]:
    """Parse a command line into the call to make."""
    parser = argparse.ArgumentParser("python -m llama eval", description=eval.__doc__, allow_abbrev=False)
    parser.add_argument("ckpt_dir", help=FLAGS["ckpt_dir"])
    for name, kind in (texts(loading) | {"tokenizer_path": str, "group_size": int}).items():
        parser.add_argument(f"--{name}", type=kind, help=FLAGS[name])
    for name, default in {"max_seq_len": 2048, "max_batch_size": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{FLAGS[name]}; by default {default}")
    parser.add_argument("--card", action="store_true", help="run MODEL_CARD.md's benchmarks, next to the published row")
    found, harness = parser.parse_known_args(args)
    options = {name: value for name, value in vars(found).items() if value is not None}
    return partial(eval, harness=harness, **options)


eval.parse = parse  # type: ignore[attr-defined]
