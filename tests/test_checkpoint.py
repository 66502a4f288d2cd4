"""Checkpoint folders: reading and writing."""

import json
import shutil
import zipfile

import numpy as np
import pytest
import torch
from small import GQA, SHAPES, TOKENIZER, build, edit_params, edit_shard, random_model, save_random

from llama import checkpoint
from llama.checkpoint import convert, files


def test_every_weight_arrives_unchanged(folder):
    expected = random_model(vocab_size=1024).state_dict()
    state = build(folder).model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


@pytest.mark.parametrize("saved", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("asked", ["bfloat16", "float16", "float32"])
def test_dtype_is_the_one_asked_for(tmp_path, saved, asked):
    """Regression: bfloat16 weights silently became float16."""
    state = save_random(tmp_path, dtype=saved)
    model = build(tmp_path, dtype=asked).model
    for name, weight in model.state_dict().items():
        assert weight.dtype == getattr(torch, asked)
        assert torch.equal(weight, state[name].to(weight.dtype))
    assert model.layers[0].attention.cache.kv.dtype == getattr(torch, asked)


def test_a_models_mapped_files_and_weights_do_not_change_each_other(folder):
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


def test_rows_of_a_file_have_a_storage_of_their_own(folder):
    """Otherwise torch.save and deepcopy of a rank's weights would write whole tensors."""
    file = files.open_file(folder / "consolidated.00.pth")
    whole, rows = (file.read("output.weight", 0, begin, 128) for begin in (0, 96))
    assert torch.equal(rows, whole[96:])
    assert rows.untyped_storage().nbytes() == rows.nbytes
    assert torch.equal(file.read("output.weight", 1, 8, 24)[:128], whole[:, 8:24])


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
def test_an_archive_of_another_program_is_read_correctly(folder, rewrite):
    """Its records have other offsets than torch would choose."""
    before = build(folder).model.state_dict()
    before = {name: weight.clone() for name, weight in before.items()}
    rewrite(folder / "consolidated.00.pth")
    after = build(folder).model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_unsharded_weights_of_the_final_dtype_are_not_copied(folder):
    """Two models of one file share its mapped pages: their weights take no memory of their own."""
    opened = checkpoint.Checkpoint(folder)
    shape = opened.files[0].tensors["output.weight"].shape
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
    column = opened.read(
        "tok_embeddings.weight", opened.files[0].tensors["tok_embeddings.weight"].shape, 4, 8, torch.float32
    )
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
def test_text_files_of_other_programs(tmp_path, saved):
    """Regression: a byte order mark became part of a text, JSON with one was "not JSON", and lines ended at a form
    feed."""
    text = "two\fparts \u2028 of a line\nand \r another 🙂\n"
    path = tmp_path / "text"
    path.write_bytes(AS_SAVED[saved](text))
    assert checkpoint.read_text(path) == text
    path.write_bytes(AS_SAVED[saved]('{"a":\n["\u2028"]}\n'))
    assert checkpoint.read_json(path) == {"a": ["\u2028"]}


def test_files_that_are_not_text_are_named(tmp_path):
    path = tmp_path / "text"
    path.write_bytes("naïve".encode("latin-1"))
    for read in (checkpoint.read_text, checkpoint.read_json):
        with pytest.raises(ValueError, match=f"{path} is not .*UTF-8: .* can't decode byte 0xef in position 2"):
            read(path)
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=f"{path} is not JSON: maximum recursion depth"):
        checkpoint.read_json(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="contains a dict, not a list"):
        checkpoint.read_json(path, list)


@pytest.mark.parametrize("saved", AS_SAVED)
@pytest.mark.parametrize("layout", ["meta", "hf"])
def test_a_checkpoint_whose_json_was_edited(tmp_path, monkeypatch, layout, saved):
    """Editors on Windows add a byte order mark to params.json, config.json and the index."""
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
def test_keys_of_params_json_without_effect(tmp_path, change):
    """Regression: null for a default, and RoPE scaling that is turned off, were refused."""
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
def test_split_dimensions(shape):
    """wq wk wv w1 w3 output by rows, wo w2 tok_embeddings by columns; norms are not split."""
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
    assert (tmp_path / names[1]).stat().st_size < weights + 20_000  # a shard's file contains only its own part


def test_indivisible_weights_are_named():
    with pytest.raises(ValueError, match=r"output\.weight \(7, 64\) cannot be divided into mp 2 shards along"):
        checkpoint.split({"output.weight": torch.zeros(7, 64)}, 2)


def test_headers_are_read_without_torch_as_torch_reads_them(folder, monkeypatch):
    """Parameters, views, other dtypes. Other objects of a pickle are not called but left to torch."""
    path = folder / "consolidated.00.pth"
    base = torch.arange(24.0).view(4, 6)
    state = {"whole": base, "rows": base[1:3], "half": base.half(), "long": torch.arange(5), "none": torch.empty(0, 3)}
    state["parameter"] = torch.nn.Parameter(torch.ones(2, 1, 3))
    torch.save(state, path)
    file = files.open_file(path)
    assert type(file) is files.File
    for name, tensor in state.items():
        assert file.tensors[name][1:3] == (tuple(tensor.shape), tensor.dtype)
        if tensor.numel():
            assert torch.equal(file.read(name, 0, 0, len(tensor)), tensor)
    torch.save({**state, "columns": base[:, 1:3]}, path)  # not contiguous
    assert torch.equal(files.open_file(path).read("columns", 0, 0, 4), base[:, 1:3])
    torch.save({**state, "other": {1, 2}}, path)
    assert files.read_pth_header(path) is None


def test_params_keep_their_order_of_keys(folder):
    """params.json is written as given, without keys that other readers do not know."""
    assert list(json.loads((folder / "params.json").read_text())) == ["norm_eps", *GQA, "vocab_size"]
