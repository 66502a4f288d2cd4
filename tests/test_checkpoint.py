"""Folders of weights: what is read, and how everything that can be wrong with one is named."""

import json
import pickle
import shutil
import zipfile

import numpy as np
import pytest
import torch
from small import GQA, MODELS, SHAPES, TOKENIZER, edit_params, random_model, save_random

from llama import Llama, checkpoint, parallel
from llama.checkpoint import convert, files

OPTIONS = {"tokenizer_path": TOKENIZER, "max_seq_len": 32, "device": "cpu", "dtype": "float32"}


def build(folder, **options):
    return Llama.build(folder, **{**OPTIONS, **options})


@pytest.fixture
def folder(tmp_path):
    save_random(tmp_path / "model")
    return tmp_path / "model"


def edit_shard(folder, change, name="consolidated.00.pth"):
    state = torch.load(folder / name, weights_only=True)
    change(state)
    torch.save(state, folder / name)


# What is read


def test_every_weight_arrives_unchanged(folder):
    expected = random_model(vocab_size=1024).state_dict()
    state = build(folder).model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


@pytest.mark.parametrize("saved", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("asked", ["bfloat16", "float16", "float32"])
def test_dtype_is_the_one_asked_for(tmp_path, saved, asked):
    """Fault 3: bfloat16 weights silently became float16."""
    state = save_random(tmp_path, dtype=saved)
    model = build(tmp_path, dtype=asked).model
    for name, weight in model.state_dict().items():
        assert weight.dtype == getattr(torch, asked)
        assert torch.equal(weight, state[name].to(weight.dtype))
    assert model.layers[0].attention.cache.kv.dtype == getattr(torch, asked)


def test_a_model_is_a_view_of_its_files_that_neither_can_harm(folder):
    """Writing to the weights changes no file; saving to the folder or removing it changes no weights."""
    path = folder / "consolidated.00.pth"
    before, content = files.read_shard(path)["output.weight"].clone(), path.read_bytes()
    model = build(folder).model
    with torch.no_grad():
        model.output.weight.add_(1)
    assert path.read_bytes() == content
    zeros = {name: torch.zeros_like(weight) for name, weight in model.state_dict().items()}
    checkpoint.save(zeros, folder, GQA)
    assert torch.equal(model.output.weight, before + 1)
    assert not files.read_shard(path)["norm.weight"].any()
    shutil.rmtree(folder)
    assert torch.equal(model.output.weight, before + 1)
    assert model.norm.weight.any()


def rezip(path, compression):
    with zipfile.ZipFile(path) as archive:
        content = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


def big_endian(path):
    with zipfile.ZipFile(path) as archive:
        content = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            if "/data/" in name:
                data = np.frombuffer(data, "<f4").astype(">f4").tobytes()
            archive.writestr(name, b"big" if name.endswith("/byteorder") else data)


@pytest.mark.parametrize(
    "rewrite",
    [lambda path: rezip(path, zipfile.ZIP_STORED), lambda path: rezip(path, zipfile.ZIP_DEFLATED), big_endian],
    ids=["stored", "compressed", "big-endian"],
)
def test_an_archive_that_another_program_wrote_is_read_right(folder, rewrite):
    """Its records do not lie where torch would have put them."""
    before = build(folder).model.state_dict()
    before = {name: weight.clone() for name, weight in before.items()}
    rewrite(folder / "consolidated.00.pth")
    after = build(folder).model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_what_is_whole_and_of_the_final_dtype_is_not_copied(folder):
    """Two models of one file share its pages: their weights take no memory of their own."""
    opened = checkpoint.Checkpoint(folder)
    shape = opened.files[0].shapes["output.weight"]
    begin = torch.frombuffer(opened.files[0].pages, dtype=torch.uint8).data_ptr()
    inside = range(begin, begin + (folder / "consolidated.00.pth").stat().st_size)
    for span, dtype, viewed in [
        ((0, shape[0]), torch.float32, True),
        ((8, 16), torch.float32, True),
        ((0, shape[0]), torch.bfloat16, False),
    ]:
        weight = opened.read("output.weight", shape, *span, dtype)
        assert (weight.data_ptr() in inside) == viewed
        assert weight.shape == (span[1] - span[0], shape[1])
    column = opened.read("tok_embeddings.weight", opened.files[0].shapes["tok_embeddings.weight"], 4, 8, torch.float32)
    assert column.is_contiguous()
    assert column.data_ptr() not in inside


def test_rotary_frequencies_of_older_files_are_ignored_by_name(folder):
    def add(state):
        state["rope.freqs"] = torch.ones(4)
        state["layers.2.attention.inner_attention.rope.freqs"] = torch.ones(4)

    edit_shard(folder, add)
    build(folder)
    edit_shard(folder, lambda state: state.update({"layers.2.rope.freqs": torch.ones(4)}))
    with pytest.raises(ValueError, match=r"unexpected: layers\.2\.rope\.freqs"):
        build(folder)


AS_SAVED = {
    "byte order mark": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "UTF-16, little-endian": lambda text: b"\xff\xfe" + text.encode("utf-16-le"),
    "UTF-16, big-endian": lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
    "CRLF": lambda text: text.replace("\n", "\r\n").encode(),
}


@pytest.mark.parametrize("saved", AS_SAVED)
def test_text_as_other_programs_save_it(tmp_path, saved):
    """A byte order mark became part of a text, JSON that has one was "not JSON", and lines ended at a form feed."""
    text = "two\fparts \u2028 of a line\nand \r another 🙂\n"
    path = tmp_path / "text"
    path.write_bytes(AS_SAVED[saved](text))
    assert checkpoint.read_text(path) == text
    path.write_bytes(AS_SAVED[saved]('{"a":\n["\u2028"]}\n'))
    assert checkpoint.read_json(path) == {"a": ["\u2028"]}


def test_what_is_no_text_is_named(tmp_path):
    path = tmp_path / "text"
    path.write_bytes("naïve".encode("latin-1"))
    for read in (checkpoint.read_text, checkpoint.read_json):
        with pytest.raises(ValueError, match=f"{path} is not .*UTF-8: .* can't decode byte 0xef in position 2"):
            read(path)
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=f"{path} is not JSON: maximum recursion depth"):
        checkpoint.read_json(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="holds dict and not a list"):
        checkpoint.read_json(path, list)


@pytest.mark.parametrize("saved", AS_SAVED)
@pytest.mark.parametrize("layout", ["meta", "hf"])
def test_a_checkpoint_whose_json_was_edited(tmp_path, monkeypatch, layout, saved):
    """Windows' editors add a byte order mark to params.json, config.json and the index."""
    save_random(tmp_path / "model")
    folder = tmp_path / "model"
    if layout == "hf":
        monkeypatch.setattr(convert, "HF_FILE", 100_000)
        convert.convert(folder, tmp_path / "hf", "hf", 1, None, TOKENIZER)
        folder = tmp_path / "hf"
    before = {name: weight.clone() for name, weight in build(folder).model.state_dict().items()}
    for name in ("params.json", "config.json", "model.safetensors.index.json"):
        if (folder / name).exists():
            (folder / name).write_bytes(AS_SAVED[saved]((folder / name).read_text()))
    after = build(folder).model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    "change", [{"n_kv_heads": None, "rope_theta": None}, {"use_scaled_rope": False, "rope_scaling_factor": 1.0}]
)
def test_keys_of_params_json_that_change_nothing(tmp_path, change):
    """null for a default, and a scaling of RoPE that is off, were refused."""
    save_random(tmp_path, SHAPES["MHA"])
    edit_params(tmp_path, **change)
    assert not set(checkpoint.Checkpoint(tmp_path).params) & set(change)
    build(tmp_path)


def test_torchs_older_file_format_is_read(folder):
    state = torch.load(folder / "consolidated.00.pth", weights_only=True)
    torch.save(state, folder / "consolidated.00.pth", _use_new_zipfile_serialization=False)
    build(folder)


def test_the_tokenizer_is_found_beside_the_weights_or_one_folder_up(folder):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.model in .*model or .*; give tokenizer_path"):
        build(folder, tokenizer_path=None)
    for path in (folder.parent, folder):
        shutil.copy(TOKENIZER, path)
        assert build(folder, tokenizer_path=None).tokenizer.n_words == 1024
        (path / "tokenizer.model").unlink()


@pytest.mark.parametrize("shape", ["MHA", "GQA"])
def test_split_follows_facts(shape):
    """wq wk wv w1 w3 output by rows, wo w2 tok_embeddings by columns, norms whole."""
    state = random_model(SHAPES[shape]).state_dict()
    parts = checkpoint.split(state, 4)
    for name, whole in state.items():
        kind = name.split(".")[-2]
        if "norm" in kind:
            assert all(torch.equal(part[name], whole) for part in parts)
        else:
            dim = 1 if kind in ("wo", "w2", "tok_embeddings") else 0
            assert torch.equal(torch.cat([part[name] for part in parts], dim), whole)
            assert parts[0][name].shape[dim] * 4 == whole.shape[dim]


def test_saved_folder_has_metas_files(tmp_path):
    save_random(tmp_path, mp=2)
    names = ["params.json", "consolidated.00.pth", "consolidated.01.pth"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "checklist.chk"])
    lines = (tmp_path / "checklist.chk").read_text().splitlines()
    assert [line.split("  ")[1] for line in lines] == names
    assert all(len(line.split("  ")[0]) == 32 for line in lines)
    weights = sum(tensor.nbytes for tensor in torch.load(tmp_path / names[1], weights_only=True).values())
    assert (tmp_path / names[1]).stat().st_size < weights + 20_000  # a shard's file holds its own part alone


def test_what_cannot_be_split_is_named():
    with pytest.raises(ValueError, match=r"output\.weight \(7, 64\) cannot be divided into 2 shards along dimension 0"):
        checkpoint.split({"output.weight": torch.zeros(7, 64)}, 2)


# What is refused


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
        (lambda f: torch.save([1, 2], f / "consolidated.00.pth"), "something else than named tensors"),
        (lambda f: torch.save({"a": 1}, f / "consolidated.00.pth"), "something else than named tensors"),
        (lambda f: (f / "consolidated.00.pth").unlink(), r"no consolidated\.\*\.pth in"),
        (lambda f: (f / "params.json").unlink(), r"no params\.json or config\.json in"),
        (lambda f: (f / "params.json").write_text("{"), r"params\.json is not JSON"),
        (lambda f: (f / "params.json").write_bytes(b"\xff\xfe"), r"params\.json is not JSON"),
        (lambda f: (f / "params.json").write_text("[]"), "holds list and not an object"),
        (lambda f: edit_params(f, dropout=0.1), "unknown keys dropout; known are dim, n_layers"),
        (lambda f: edit_params(f, norm_eps="delete", dim="delete"), "lacks the keys dim, norm_eps"),
        (lambda f: edit_params(f, n_kv_heads=3), r"params\.json: n_heads 8 is not divisible by n_kv_heads 3"),
        (lambda f: edit_params(f, n_layers="3"), r"params\.json: n_layers is '3'"),
        (lambda f: edit_params(f, vocab_size=32000), "vocab_size 32000 differs from the tokenizer's 1024 pieces"),
        (lambda f: edit_params(f, n_layers=4), r"missing: layers\.3\.attention\.wq\.weight, .*layers\.3\.ffn_norm"),
        (lambda f: edit_params(f, n_layers=2), r"unexpected: layers\.2\.attention\.wq\.weight, "),
        (lambda f: edit_params(f, multiple_of=7), r"misshapen: .*w1\.weight \(192, 64\) instead of \(175, 64\), "),
        (lambda f: torch.save({1: torch.ones(3)}, f / "consolidated.00.pth"), "something else than named tensors"),
        (lambda f: torch.save({"a": torch.ones(3).to_sparse()}, f / "consolidated.00.pth"), "not a readable|else than"),
        (lambda f: edit_shard(f, lambda s: s.pop("norm.weight")), r"missing: norm\.weight"),
        (
            lambda f: edit_shard(f, lambda s: s.update({"output.weight": s["output.weight"].to(torch.int8)})),
            r"of a dtype that cannot be read: output\.weight torch\.int8",
        ),
        (lambda f: (f / "consolidated.00.pth").rename(f / "consolidated.01.pth"), r"lacks consolidated\.00\.pth"),
        (lambda f: shutil.copy(f / "consolidated.00.pth", f / "consolidated.02.pth"), r"lacks consolidated\.01\.pth"),
        (lambda f: shutil.copy(f / "consolidated.00.pth", f / "consolidated.old.pth"), r"holds consolidated\.old\.pth"),
        (
            lambda f: shutil.copy(f / "consolidated.00.pth", f / "consolidated.01.pth"),
            r"weights in .* 2048: not a pair",
        ),
    ],
)
def test_damage_is_named(folder, damage, message):
    """Faults 5, 7 and 12: bare asserts; strict=False hid missing and unexpected weights; the number of shards."""
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
    """Damage shows in a dozen types of errors deep inside of torch and pickle; each must become the file's name."""
    path = folder / "consolidated.00.pth"
    torch.save({"norm.weight": torch.ones(4)}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for i in range(0, len(whole), 7):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 0x55]) + whole[i + 1 :])
        for read in (files.read_shard, files.TorchFile):
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
    """Fault 14: the flags of a command that was pasted on one line."""
    with pytest.raises(ValueError, match=f"{name} is '{value}', which looks like a flag .*remove the backslashes"):
        build(**{"folder": folder, **({"folder": value} if name == "ckpt_dir" else {name: value})})


@pytest.mark.parametrize("value", [True, None, 7])
def test_a_flag_without_a_value_is_named(value):
    with pytest.raises(ValueError, match=f"ckpt_dir is {value}; it must be the path of a folder"):
        build(value)


# On several ranks


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
    """Bfloat16 on one rank and float32 on another would add up to nonsense, or end the process."""
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
    """The same number of pieces, two of which have changed places."""
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
    """Nodes with their own copies generated from the slices of two models."""
    for name in ("one", "two"):
        save_random(tmp_path / name, mp=2)
        shutil.copy(TOKENIZER, tmp_path / name)
    change(tmp_path / "two")
    for _, error in ranks(2).outcomes(_build_one_of, [tmp_path / "one", tmp_path / "two"]):
        assert error[0] == "ValueError"
        assert message in error[1]


def test_ranks_may_load_one_model_from_different_folders(ranks, tmp_path):
    """In another number of shards, or in another layout, it is the same model."""
    save_random(tmp_path / "one", {**GQA, "multiple_of": 4, "ffn_dim_multiplier": 1.3}, mp=2)
    convert.convert(tmp_path / "one", tmp_path / "two", "meta", 1, None, TOKENIZER)
    convert.convert(tmp_path / "one", tmp_path / "hf", "hf", 1, None, TOKENIZER)
    shutil.copy(TOKENIZER, tmp_path / "one")
    expected = ranks(2).run(_build_one_of, [tmp_path / "one"] * 2)
    for other in ("two", "hf"):
        assert ranks(2).run(_build_one_of, [tmp_path / "one", tmp_path / other]) == expected


def test_shards_of_different_models_are_named(tmp_path):
    """They fit each other in everything but their values."""
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


def test_a_file_that_may_not_be_read_is_no_broken_one(folder, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(files.zipfile, "ZipFile", refuse)
    with pytest.raises(PermissionError, match="Permission denied"):
        build(folder)


def test_headers_are_read_without_torch_as_torch_reads_them(folder, monkeypatch):
    """Parameters, views, other dtypes; what a pickle asks for besides tensors is not called but left to torch."""
    path = folder / "consolidated.00.pth"
    base = torch.arange(24.0).view(4, 6)
    state = {"whole": base, "rows": base[1:3], "half": base.half(), "long": torch.arange(5), "none": torch.empty(0, 3)}
    state["parameter"] = torch.nn.Parameter(torch.ones(2, 1, 3))
    torch.save(state, path)
    file = files.TorchFile(path)
    assert not file.state
    for name, tensor in state.items():
        assert (file.shapes[name], file.dtypes[name]) == (tuple(tensor.shape), tensor.dtype)
        if tensor.numel():
            assert torch.equal(file.read(name, 0, 0, len(tensor)), tensor)
    torch.save({**state, "columns": base[:, 1:3]}, path)  # not contiguous
    assert torch.equal(files.TorchFile(path).read("columns", 0, 0, 4), base[:, 1:3])
    torch.save({**state, "other": {1, 2}}, path)
    assert files.read_pth_header(path) is None


@pytest.mark.parametrize("content", [b"<html>", b"version https://git-lfs.github.com/spec/v1\n"])
def test_nobody_is_advised_to_run_pickles(folder, content):
    """Torch's own message goes on to recommend weights_only=False."""
    (folder / "consolidated.00.pth").write_bytes(content)
    with pytest.raises(ValueError) as caught:
        build(folder)
    assert "weights_only" not in str(caught.value)
    assert "trust" not in str(caught.value)


def test_what_does_not_divide_among_ranks_is_named(ranks, tmp_path):
    save_random(tmp_path, {**GQA, "dim": 72, "n_heads": 9, "n_kv_heads": 3})
    for _, error in ranks(2).outcomes(_build, tmp_path, {}):
        assert error[:2] == ("ValueError", "n_heads 9 cannot be divided among 2 ranks")


def test_params_keep_their_order_of_keys(folder):
    """params.json is written as given: nothing is added that other readers do not know."""
    assert list(json.loads((folder / "params.json").read_text())) == ["norm_eps", *GQA, "vocab_size"]
