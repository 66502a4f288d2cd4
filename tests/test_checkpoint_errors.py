"""Checkpoint folders: every kind of damage is named."""

import pickle
import shutil

import pytest
import torch
from small import MODELS, build, edit_params, edit_shard, save_random

from llama.checkpoint import files


def truncate(folder):
    path = folder / "consolidated.00.pth"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"consolidated\.00\.pth \([\d,]+ bytes\) is not a readable shard"),
        (lambda f: (f / "consolidated.00.pth").write_bytes(b""), r"\(0 bytes\) is not a readable shard"),
        (lambda f: (f / "consolidated.00.pth").write_bytes(b"<html>Access denied</html>"), "not a readable shard"),
        (lambda f: (f / "consolidated.00.pth").write_bytes(bytes(range(256)) * 9), "not a readable shard"),
        (lambda f: torch.save([1, 2], f / "consolidated.00.pth"), "something other than named tensors"),
        (lambda f: torch.save({"a": 1}, f / "consolidated.00.pth"), "something other than named tensors"),
        (lambda f: (f / "consolidated.00.pth").unlink(), r"no consolidated\.\*\.pth in"),
        (lambda f: (f / "params.json").unlink(), r"no params\.json or config\.json in"),
        (lambda f: (f / "params.json").write_text("{"), r"params\.json is not JSON"),
        (lambda f: (f / "params.json").write_bytes(b"\xff\xfe"), r"params\.json is not JSON"),
        (lambda f: (f / "params.json").write_text("[]"), "contains a list, not an object"),
        (lambda f: edit_params(f, dropout=0.1), "unknown keys dropout; known are dim, n_layers"),
        (lambda f: edit_params(f, norm_eps="delete", dim="delete"), "lacks the keys dim, norm_eps"),
        (lambda f: edit_params(f, n_kv_heads=3), r"params\.json: n_heads 8 is not divisible by n_kv_heads 3"),
        (lambda f: edit_params(f, n_layers="3"), r"params\.json: n_layers is '3'"),
        (lambda f: edit_params(f, vocab_size=32000), "vocab_size 32000 differs from the tokenizer's 1024 pieces"),
        (lambda f: edit_params(f, n_layers=2**30), "n_layers is 1073741824; it must be at most 10000"),
        (lambda f: edit_params(f, n_layers=4), r"missing: layers\.3\.attention\.wq\.weight, .*layers\.3\.ffn_norm"),
        (lambda f: edit_params(f, n_layers=2), r"unexpected: layers\.2\.attention\.wq\.weight, "),
        (lambda f: edit_params(f, multiple_of=7), r"misshapen: .*w1\.weight \(192, 64\) instead of \(175, 64\), "),
        (lambda f: torch.save({1: torch.ones(3)}, f / "consolidated.00.pth"), "something other than named tensors"),
        (lambda f: torch.save({"a": torch.ones(3).to_sparse()}, f / "consolidated.00.pth"), "not a readable|other"),
        (lambda f: edit_shard(f, lambda s: s.pop("norm.weight")), r"missing: norm\.weight"),
        (
            lambda f: edit_shard(f, lambda s: s.update({"output.weight": s["output.weight"].to(torch.int8)})),
            r"of a dtype that cannot be read: output\.weight torch\.int8",
        ),
        (lambda f: (f / "consolidated.00.pth").rename(f / "consolidated.01.pth"), r"lacks consolidated\.00\.pth"),
        (lambda f: shutil.copy(f / "consolidated.00.pth", f / "consolidated.02.pth"), r"lacks consolidated\.01\.pth"),
        (lambda f: shutil.copy(f / "consolidated.00.pth", f / "consolidated.old.pth"), r"consolidated\.old\.pth"),
        (
            lambda f: shutil.copy(f / "consolidated.00.pth", f / "consolidated.01.pth"),
            r"weights in .* 2048: not a pair",
        ),
    ],
)
def test_damage_is_named(folder, damage, message):
    """Regression: bare asserts; strict=False hid missing and unexpected weights; shards were not counted."""
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        build(folder)
    assert str(folder) in str(caught.value)


def test_all_problems_of_a_shard_are_named_at_once(folder):
    def change(state):
        state["extra.weight"] = state.pop("norm.weight")
        state["output.weight"] = state["output.weight"][:, :-1]

    edit_shard(folder, change)
    with pytest.raises(ValueError, match=r"missing: norm\.weight; unexpected: extra\.weight; misshapen: out"):
        build(folder)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_shard_with_any_damaged_byte_is_read_or_named(folder, zipped):
    """Damage causes a dozen types of errors inside torch and pickle; each must become one that names the file."""
    path = folder / "consolidated.00.pth"
    torch.save({"norm.weight": torch.ones(4)}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for i in range(0, len(whole), 7):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 0x55]) + whole[i + 1 :])
        for read in (files.read_shard, files.open_file):
            try:
                read(path)
            except ValueError as error:
                assert str(path) in str(error)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_shard_is_executed(folder, tmp_path, zipped):
    target = tmp_path / "executed"
    if zipped:
        torch.save({"norm.weight": Malicious(target)}, folder / "consolidated.00.pth")
    else:
        (folder / "consolidated.00.pth").write_bytes(pickle.dumps(Malicious(target)))
    with pytest.raises(ValueError, match="not a readable shard"):
        build(folder)
    assert not target.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_seq_len": 0}, "^max_seq_len is 0"),
        ({"max_batch_size": -1}, "^max_batch_size is -1"),
        ({"max_batch_size": 0}, "^max_batch_size is 0"),
        ({"max_seq_len": "128"}, "^max_seq_len is '128'"),
        ({"device": "quantum"}, "device 'quantum'"),
        ({"dtype": "float8"}, "dtype 'float8'"),
        ({"model_parallel_size": 2}, "model_parallel_size 2 does not fit 1"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"tokenizer_path": "no/tokenizer.model"}, r"tokenizer_path no/tokenizer\.model is not an existing file"),
        ({"tokenizer_path": str(MODELS)}, "is not an existing file"),
    ],
)
def test_bad_options_are_named(folder, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build(folder, **options)


@pytest.mark.parametrize("value", [" --ckpt_dir", "--tokenizer_path", " llama-2-7b/", ""])
@pytest.mark.parametrize("name", ["ckpt_dir", "tokenizer_path"])
def test_a_flag_is_not_taken_for_a_path(folder, name, value):
    """Regression: flags of a command that was pasted as one line."""
    with pytest.raises(ValueError, match=f"{name} is '{value}', which looks like a flag .*remove the backslashes"):
        build(**{"folder": folder, **({"folder": value} if name == "ckpt_dir" else {name: value})})


@pytest.mark.parametrize("value", [True, None, 7])
def test_a_flag_without_a_value_is_named(value):
    with pytest.raises(ValueError, match=f"ckpt_dir is {value}; it must be the path of a folder"):
        build(value)


def test_shards_of_different_models_are_named(tmp_path):
    """They match in everything except their values."""
    save_random(tmp_path, mp=2)
    save_random(tmp_path / "other", mp=2, seed=1)
    shutil.copy(tmp_path / "other" / "consolidated.01.pth", tmp_path)
    with pytest.raises(
        ValueError, match=r"consolidated\.01\.pth and consolidated\.00\.pth are shards of different models"
    ):
        build(tmp_path)


def test_the_same_shard_twice_is_named(tmp_path):
    save_random(tmp_path, mp=2)
    shutil.copy(tmp_path / "consolidated.00.pth", tmp_path / "consolidated.01.pth")
    with pytest.raises(ValueError, match=r"consolidated\.01\.pth and consolidated\.00\.pth are the same shard"):
        build(tmp_path)


def test_shards_that_split_the_embeddings_differently_are_named(tmp_path):
    state = save_random(tmp_path, mp=2)["tok_embeddings.weight"]
    edit_shard(tmp_path, lambda shard: shard.update({"tok_embeddings.weight": state[512:]}), "consolidated.01.pth")
    message = r"01\.pth .* misshapen: tok_embeddings\.weight \(512, 64\) instead of \(1024, 32\)"
    with pytest.raises(ValueError, match=message):
        build(tmp_path)


def test_a_tokenizer_of_another_model_is_named(tmp_path):
    save_random(tmp_path, vocab_size=2000)
    edit_params(tmp_path, vocab_size=-1)
    with pytest.raises(ValueError, match="the tokenizer has 1024 pieces and the weights in .* 2000: not a pair"):
        build(tmp_path)


def test_a_file_without_read_permission_is_not_called_damaged(folder, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(files.zipfile, "ZipFile", refuse)
    with pytest.raises(PermissionError, match="Permission denied"):
        build(folder)


@pytest.mark.parametrize("content", [b"<html>", b"version https://git-lfs.github.com/spec/v1\n"])
def test_errors_never_recommend_unsafe_pickles(folder, content):
    """Torch's own message recommends weights_only=False."""
    (folder / "consolidated.00.pth").write_bytes(content)
    with pytest.raises(ValueError) as caught:
        build(folder)
    assert "weights_only" not in str(caught.value)
    assert "trust" not in str(caught.value)
