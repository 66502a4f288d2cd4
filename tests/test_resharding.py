"""Any number of shards on any number of ranks, in either layout."""

import doctest
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import GQA, PUBLISHED, ROOT, SHAPES, TOKENIZER, hugging_face, random_model, relative_error, save_random

from llama import Llama, ModelArgs, Transformer, checkpoint, parallel
from llama.checkpoint import Checkpoint, rank_range, shapes, slices
from llama.checkpoint.convert import convert

WIDE = {"dim": 128, "n_layers": 2, "n_heads": 8, "n_kv_heads": 8, "multiple_of": 32}
TOKENS = torch.tensor([[5, 17, 99, 3, 64, 64, 127, 0, 1, 2, 30, 31]])


def test_slices_worked_out_by_hand():
    """12 rows in 4 shards of 3, read by 3 ranks: the example in plan.py."""
    assert list(slices(12, 4, 4, 8)) == [(1, 1, 0, 2), (2, 0, 2, 2)]
    assert list(slices(12, 4, 0, 12)) == [(0, 0, 0, 3), (1, 0, 3, 3), (2, 0, 6, 3), (3, 0, 9, 3)]
    assert list(slices(12, 1, 4, 8)) == [(0, 4, 0, 4)]


def test_the_worked_example_of_the_documents():
    assert doctest.testfile(str(ROOT / "docs" / "checkpoints.md"), module_relative=False) == (0, 2)


def test_key_value_heads_are_repeated_in_the_right_order():
    """2 heads of 4 rows on 4 ranks are in the order 0 0 1 1, not 0 1 0 1: rank r has query heads 2r and 2r + 1 of 8."""
    args = ModelArgs(dim=32, n_heads=8, n_kv_heads=2, vocab_size=8)
    sizes = {"wk": 8, "wq": 32}
    ranges = {w: [rank_range(f"{w}.weight", size, args, rank, 4) for rank in range(4)] for w, size in sizes.items()}
    assert ranges == {"wk": [(0, 4), (0, 4), (4, 8), (4, 8)], "wq": [(0, 8), (8, 16), (16, 24), (24, 32)]}


@pytest.mark.parametrize("size", PUBLISHED)
@pytest.mark.parametrize("shards", [1, 2, 4, 8])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_plans_for_published_sizes_read_every_row_once(size, shards, ranks):
    args = ModelArgs(**PUBLISHED[size], vocab_size=32000)
    for name, shape in shapes(args).items():
        dim = checkpoint.shard_dim(name)
        if dim is None:
            continue
        covered = []
        for rank in range(ranks):
            begin, end = rank_range(name, shape[dim], args, rank, ranks)
            parts = list(slices(shape[dim], shards, begin, end))
            assert [part.offset for part in parts] == [sum(p.length for p in parts[:i]) for i in range(len(parts))]
            each = shape[dim] // shards
            assert all(0 <= part.begin and part.begin + part.length <= each for part in parts)
            covered += [part.shard * each + part.begin + i for part in parts for i in (0, part.length - 1)]
            assert sum(part.length for part in parts) == shape[dim] // ranks
        assert covered == sorted(covered)


@pytest.mark.parametrize("size", PUBLISHED)
def test_shapes_equal_the_models(size):
    args = ModelArgs(**PUBLISHED[size], vocab_size=32000)
    with torch.device("meta"):
        model = Transformer(args)
    assert shapes(args) == {name: tuple(weight.shape) for name, weight in model.state_dict().items()}


def _load(folder, tokens):
    llama = Llama.build(folder, TOKENIZER, max_seq_len=32, device="cpu", dtype="float32")
    with torch.inference_mode():
        logits = llama.model(tokens, 0).clone()
    return parallel.rank(), {name: weight.clone() for name, weight in llama.model.state_dict().items()}, logits


def rejoin(states, kv_heads):
    whole = {}
    for name in states[0]:
        dim, parts = checkpoint.shard_dim(name), [state[name] for state in states]
        if name.split(".")[-2] in ("wk", "wv") and len(states) > kv_heads:
            parts = parts[:: len(states) // kv_heads]
        whole[name] = parts[0] if dim is None else torch.cat(parts, dim)
    return whole


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("shards", [1, 2, 4, 8])
@pytest.mark.parametrize("kv_heads", [8, 2], ids=["MHA", "GQA"])
def test_any_shards_on_any_ranks(tmp_path, ranks, kv_heads, shards, world_size):
    """The joined weights are bit-identical, and logits equal within 1e-5. With 2 key-value heads on 4 ranks, or in 4
    and 8 shards, several ranks or shards have the same head."""
    shape = {**WIDE, "n_kv_heads": kv_heads}
    state = save_random(tmp_path, shape, mp=shards)
    expected = random_model(shape, vocab_size=1024)(TOKENS, 0)
    results = [_load(tmp_path, TOKENS)] if world_size == 1 else ranks(world_size).run(_load, tmp_path, TOKENS)
    whole = rejoin([result[1] for result in sorted(results, key=lambda result: result[0])], kv_heads)
    assert all(torch.equal(whole[name], state[name]) for name in state)
    for _, _, logits in results:
        assert relative_error(logits, expected) <= 1e-5


@pytest.mark.parametrize("shards", [2, 4])
def test_embeddings_split_by_rows_as_in_llama_3(tmp_path, ranks, shards):
    state = save_random(tmp_path, mp=shards)
    for i in range(shards):
        path = tmp_path / f"consolidated.{i:02d}.pth"
        part = torch.load(path, weights_only=True)
        part["tok_embeddings.weight"] = state["tok_embeddings.weight"].chunk(shards, 0)[i].clone()
        torch.save(part, path)
    for world_size in (1, 2):
        results = [_load(tmp_path, TOKENS)] if world_size == 1 else ranks(world_size).run(_load, tmp_path, TOKENS)
        whole = rejoin([result[1] for result in results], 4)
        assert torch.equal(whole["tok_embeddings.weight"], state["tok_embeddings.weight"])


# Hugging Face's layout


def save_hugging_face(folder, shape=GQA, dtype=torch.float32, max_shard_size="50GB", **changes):
    model = random_model(shape, vocab_size=1024)
    theirs = hugging_face(model.params, model.state_dict()).to(dtype)
    theirs.save_pretrained(folder, max_shard_size=max_shard_size)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return model


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("max_shard_size", ["50GB", "100KB"])
def test_a_hugging_face_folder_loads_directly(tmp_path, shape, max_shard_size):
    model = save_hugging_face(tmp_path, SHAPES[shape], max_shard_size=max_shard_size)
    _, state, logits = _load(tmp_path, TOKENS)
    assert all(torch.equal(weight, state[name]) for name, weight in model.state_dict().items())
    assert relative_error(logits, model(TOKENS, 0)) <= 1e-5


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_hugging_face_folder_on_several_ranks(tmp_path, ranks, world_size):
    model = save_hugging_face(tmp_path, {**GQA, "n_kv_heads": 2})
    results = ranks(world_size).run(_load, tmp_path, TOKENS)
    whole = rejoin([result[1] for result in results], 2)
    assert all(torch.equal(weight, whole[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings(tmp_path, tied):
    """They are the output matrix if the files have none, as in transformers."""
    from transformers import LlamaForCausalLM

    save_hugging_face(tmp_path, tie_word_embeddings=True)
    if tied:
        tensors = load_file(tmp_path / "model.safetensors")
        del tensors["lm_head.weight"]
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, state, logits = _load(tmp_path, TOKENS)
    assert torch.equal(state["output.weight"], state["tok_embeddings.weight"]) == tied
    with torch.inference_mode():
        theirs = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(TOKENS).logits
    assert relative_error(logits, theirs) <= 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling .*dynamic.* is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling .*yarn.* is not supported"),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}},
            "llama3 scaling of RoPE lacks factor, low",
        ),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
            "lacks original_max_position_embeddings",
        ),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "has the factor '2'; it must be a positive number"),
        ({"rope_parameters": {"factor": 2.0}}, "rope_parameters with factor 2.0 is not supported"),
        ({"rope_parameters": {"type": "default", "partial_rotary_factor": 0.5}}, "with partial_rotary_factor 0.5"),
        ({"rope_parameters": {"full_attention": {"type": "linear", "factor": 2.0}}}, "with full_attention {'type'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 1, "alpha": 1000}}, "rope_scaling with alpha 1000 is not"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 1}}, "with rope_type 'longrope' is not supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 1, "attention_factor": 0.9}}, "with attention_factor 0.9"),
        ({"rope_scaling_type": "linear", "rope_scaling_factor": 2}, "config with rope_scaling_type 'linear', rope_sc"),
        ({"partial_rotary_factor": 0.5}, "config with partial_rotary_factor 0.5 is not supported"),
        ({"rope_scaling": "linear"}, "rope_scaling 'linear' is not an object"),
        ({"attention_bias": True}, "attention_bias True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; only 'silu' is"),
        ({"model_type": "mistral"}, "model_type 'mistral' is not supported; only 'llama' is"),
        ({"head_dim": 16}, "misshapen: .*wq.weight"),
        ({"head_dim": 7}, "heads of even size"),
        ({"quantization_config": {"quant_method": "aqlm"}}, "weights quantized by aqlm are not read, only by gptq"),
        ({"quantization_config": "hqq"}, "weights quantized by hqq are not read"),
        ({"num_hidden_layers": 4}, "missing: layers.3.attention.wq.weight"),
        ({"num_hidden_layers": 2}, "unexpected: model.layers.2."),
        ({"intermediate_size": 128}, "misshapen: .*w1.weight"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, not a positive whole number"),
        ({"num_hidden_layers": 2**30}, "n_layers is 1073741824; it must be at most 10000"),
        ({"hidden_size": "64"}, "hidden_size is '64', not a positive whole number"),
        ({"intermediate_size": None}, "intermediate_size is None"),
        ({"rope_parameters": [1]}, r"rope_parameters \[1\] is not an object"),
        ({"vocab_size": 999}, "vocab_size 999 differs from the tokenizer's 1024 pieces"),
    ],
)
def test_other_architectures_are_refused_by_name(tmp_path, change, message):
    save_hugging_face(tmp_path, **change)
    with pytest.raises(ValueError, match=message) as caught:
        _load(tmp_path, TOKENS)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("rows", [1, 24])
def test_rows_beyond_the_tokenizers_are_padding(tmp_path, rows):
    """Regression: a folder with a padding token, or with rows up to a multiple of some number, was said to "differ"
    from its tokenizer."""
    model = save_hugging_face(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat((weights[name], torch.ones(rows, weights[name].shape[1])))
    save_file(weights, path, metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] + rows}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[PAD]": config["vocab_size"]}))
    assert relative_error(_load(tmp_path, TOKENS)[2], model(TOKENS)) < 1e-5
    for id in (1025, "1025"):
        (tmp_path / "added_tokens.json").write_text(json.dumps({"[PAD]": 1024, "<|user|>": id}))
        with pytest.raises(ValueError, match=r"added_tokens.json adds <\|user\|> to the tokenizer's 1024 pieces"):
            _load(tmp_path, TOKENS)


def test_padding_tokens_that_the_weights_have_no_rows_for(tmp_path):
    """A fine-tune whose embeddings were not resized. transformers loads it too."""
    convert(ROOT / "models" / "small-chat", tmp_path / "hf", "hf", 1, None)
    (tmp_path / "hf" / "tokenizer.model").unlink()
    path = tmp_path / "hf" / "tokenizer.json"
    content = json.loads(path.read_text())
    added = {**content["added_tokens"][0], "id": 1024, "content": "<pad>"}
    path.write_text(json.dumps({**content, "added_tokens": [*content["added_tokens"], added]}))
    tokenizer = Llama.build(tmp_path / "hf", max_seq_len=32, device="cpu").tokenizer
    assert tokenizer.n_words == 1024 and "<pad>" not in tokenizer.special
    added["content"] = "<|user|>"
    path.write_text(json.dumps({**content, "added_tokens": [*content["added_tokens"], added]}))
    with pytest.raises(ValueError, match="vocab_size 1024 differs from the tokenizer's 1025 pieces"):
        Llama.build(tmp_path / "hf", max_seq_len=32, device="cpu")


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": {"type": "default", "rope_theta": 5e5}},
        {"rope_scaling": {"type": "linear", "factor": 1.0, "rope_theta": 5e5}},
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "default"}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 1.0}},
        {
            "rope_theta": 5e5,
            "rope_scaling": {},
            "rope_scaling_factor": 1.0,
            "partial_rotary_factor": 1,
            "rope_x": False,
        },
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "llama3", "factor": 1.0, "low_freq_factor": 4.0}},
        {"rope_theta": 5e5, "mlp_bias": None, "attention_bias": None, "hidden_act": "swish", "rope_scaling": None},
    ],
)
def test_rope_theta_in_any_place_and_keys_without_effect(tmp_path, change):
    """Regression: scaling by 1, the type "default", and null for a bias were refused."""
    save_hugging_face(tmp_path, **{"rope_parameters": None, **change})
    expected = random_model({**GQA, "rope_theta": 5e5}, vocab_size=1024)(TOKENS, 0)
    assert relative_error(_load(tmp_path, TOKENS)[2], expected) <= 1e-5


def _load_weights(folder, n_words):
    weights = Checkpoint(folder)
    args = weights.args(n_words)
    with torch.device("meta"):
        model = Transformer(args)
    checkpoint.load(model, weights, args, torch.device("cpu"), torch.float32)
    return model.state_dict()


def test_three_shards_on_two_ranks_and_back(tmp_path, ranks):
    """Neither number divides the other."""
    shape = {"dim": 96, "n_layers": 2, "n_heads": 6, "n_kv_heads": 6, "multiple_of": 12, "ffn_dim_multiplier": 0.75}
    state = save_random(tmp_path, shape, mp=3, vocab_size=96)
    whole = rejoin(ranks(2).run(_load_weights, tmp_path, 96), 6)
    assert all(torch.equal(whole[name], state[name]) for name in state)


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[: len(whole) // 2],
        lambda whole: b"",
        lambda whole: b"<html>Access denied</html>",
        lambda whole: (2**60).to_bytes(8, "little") + whole[8:],  # a header that lies about its size
        lambda whole: (len(whole)).to_bytes(8, "little") + whole[8:],
        lambda whole: whole[:8] + b"x" + whole[9:],
    ],
)
def test_a_damaged_safetensors_file_is_named(tmp_path, damage):
    save_hugging_face(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"model\.safetensors \([\d,]+ bytes\) is not a readable shard"):
        _load(tmp_path, TOKENS)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"lm_head.weight": 1}}])
def test_a_damaged_index_is_named(tmp_path, index):
    save_hugging_face(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json has no weight_map"):
        _load(tmp_path, TOKENS)


def test_a_missing_safetensors_file_is_named(tmp_path):
    save_hugging_face(tmp_path, max_shard_size="100KB")
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks model-00002-of-\d+\.safetensors"):
        _load(tmp_path, TOKENS)


@pytest.mark.parametrize("old", checkpoint.RENAMED)
def test_names_of_the_previous_release_still_work(old):
    with pytest.deprecated_call(match=f"{old} is now {checkpoint.RENAMED[old]}"):
        assert getattr(checkpoint, old) is getattr(checkpoint.plan, checkpoint.RENAMED[old])
