"""Batch inference with Ray Data: actors on the nodes of a cluster each load a model, and process batches of rows.

    python examples/ray_batch.py IN OUT CKPT [--actors 2] [--gpus 1] [--max_gen_len 100] [--temperature 0]

IN is a file or folder of JSON lines or Parquet whose rows have a `prompt` and optionally a `seed`. OUT is a folder of
Parquet files with an additional column `generation`. Every node must have CKPT. Needs
pip install 'llama-reference[ray]'.
"""

from __future__ import annotations

from typing import Any

import fire
import ray

from llama import Llama


class Completions:
    """The callable of an actor, which builds the model once."""

    def __init__(self, build: dict[str, Any], options: dict[str, Any]) -> None:
        self.llama, self.options = Llama.build(**build), options

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        seeds = {"seed": batch["seed"]} if "seed" in batch else {}
        answers = self.llama.text_completion(batch["prompt"], **self.options, **seeds)
        return {**batch, "generation": [answer["generation"] for answer in answers]}


def main(
    source: str,
    target: str,
    ckpt_dir: str,
    actors: int = 2,
    gpus: int = 0,
    max_seq_len: int = 2048,
    max_batch_size: int = 8,
    **options: Any,
) -> None:
    build = {"ckpt_dir": ckpt_dir, "max_seq_len": max_seq_len, "max_batch_size": max_batch_size}
    rows = ray.data.read_json(source) if "json" in source else ray.data.read_parquet(source)
    rows.map_batches(
        Completions,
        fn_constructor_args=(build, options),
        compute=ray.data.ActorPoolStrategy(size=actors),
        batch_size=16 * max_batch_size,  # rows that wait for a slot, so that few slots are idle at the end of a batch
        num_gpus=gpus,
    ).write_parquet(target)


if __name__ == "__main__":
    fire.Fire(main)
