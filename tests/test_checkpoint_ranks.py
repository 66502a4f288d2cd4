"""Checkpoints on several ranks: all ranks raise the same error, and ranks that load different models are named."""

import shutil

import pytest
import torch
from small import GQA, TOKENIZER, edit_params, edit_shard, save_random

from llama import Llama, parallel
from llama.checkpoint import convert


def _build(folder, options):
    Llama.build(folder, TOKENIZER, 32, device="cpu", **options)


def test_a_bad_shard_ends_all_ranks(ranks, tmp_path):
    save_random(tmp_path, mp=2)
    truncate_me = tmp_path / "consolidated.01.pth"
    truncate_me.write_bytes(truncate_me.read_bytes()[:5000])
    for _, error in ranks(2).outcomes(_build, tmp_path, {}):
        assert error[0] == "ValueError"
        assert "consolidated.01.pth (5,000 bytes) is not a readable shard" in error[1]


def _build_by_rank(folder, options):
    _build(folder, options[parallel.rank()])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"dtype": "bfloat16"},
            "the ranks differ in dtype: [torch.float32, torch.bfloat16]; give all of them the same",
        ),
        ({"max_batch_size": 3}, "the ranks differ in max_batch_size: [4, 3]; give all of them the same arguments"),
    ],
)
def test_ranks_that_build_differently_are_named(ranks, tmp_path, other, message):
    """An all-reduce of bfloat16 on one rank and float32 on another gives garbage, or ends the process."""
    save_random(tmp_path, mp=2)
    same = {"dtype": "float32"}
    for _, error in ranks(2).outcomes(_build_by_rank, tmp_path, [same, {**same, **other}]):
        assert error[0] == "ValueError"
        assert message in error[1]
    ranks(2).run(_build, tmp_path, same)


def _build_one_of(folders):
    llama = Llama.build(folders[parallel.rank()], None, 32, device="cpu", dtype="float32")
    return llama.generate([[1, 2, 3]], 5, temperature=0)[0]


def rewrite_tokenizer(folder):
    """The same number of pieces, two of which are swapped."""
    content = (folder / "tokenizer.model").read_bytes()
    (folder / "tokenizer.model").write_bytes(content.replace(b"\x01t", b"\x01#").replace(b"\x01e", b"\x01t"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: save_random(f, mp=2, seed=1), "the ranks differ in weights: ['"),
        (
            lambda f: save_random(f, {**GQA, "n_layers": 2}, mp=2),
            "the ranks differ in params: [\"{'dim': 64, 'n_layers': 3",
        ),
        (lambda f: edit_params(f, norm_eps=1e-6), "the ranks differ in params: [\"{'dim': 64"),
        (lambda f: edit_params(f, rope_theta=5e5), "'rope_theta': 500000.0"),
        (lambda f: save_random(f, mp=2, dtype=torch.bfloat16), "the ranks differ in weights: ['"),
        (
            lambda f: edit_shard(f, lambda s: s["layers.2.attention.wv.weight"][0].add_(1)),
            "the ranks differ in weights: ",
        ),
        (rewrite_tokenizer, "the ranks differ in tokenizer: ['"),
    ],
)
def test_ranks_that_load_different_checkpoints_are_named(ranks, tmp_path, change, message):
    """Regression: nodes with their own copies generated from slices of two models."""
    for name in ("one", "two"):
        save_random(tmp_path / name, mp=2)
        shutil.copy(TOKENIZER, tmp_path / name)
    change(tmp_path / "two")
    for _, error in ranks(2).outcomes(_build_one_of, [tmp_path / "one", tmp_path / "two"]):
        assert error[0] == "ValueError"
        assert message in error[1]


def test_ranks_may_load_one_model_from_different_folders(ranks, tmp_path):
    """A different number of shards, or another layout, is the same model."""
    save_random(tmp_path / "one", {**GQA, "multiple_of": 4, "ffn_dim_multiplier": 1.3}, mp=2)
    convert.convert(tmp_path / "one", tmp_path / "two", "meta", 1, None, TOKENIZER)
    convert.convert(tmp_path / "one", tmp_path / "hf", "hf", 1, None, TOKENIZER)
    shutil.copy(TOKENIZER, tmp_path / "one")
    expected = ranks(2).run(_build_one_of, [tmp_path / "one"] * 2)
    for other in ("two", "hf"):
        assert ranks(2).run(_build_one_of, [tmp_path / "one", tmp_path / other]) == expected


def test_indivisible_shapes_are_named(ranks, tmp_path):
    save_random(tmp_path, {**GQA, "dim": 72, "n_heads": 9, "n_kv_heads": 3})
    for _, error in ranks(2).outcomes(_build, tmp_path, {}):
        assert error[:2] == ("ValueError", "n_heads 9 cannot be divided among 2 ranks")
