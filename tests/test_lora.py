"""LoRA adapters, against PEFT's merge; adapters that are damaged or unsupported."""

import copy
import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import GQA, TOKENIZER, hugging_face, in_process, relative_error, save_random

from llama import Llama, ModelArgs, parallel
from llama.checkpoint import rank_range, shard_dim
from llama.checkpoint.convert import convert
from llama.cli import convert as convert_command
from llama.cli import inspect as inspect_command

peft = pytest.importorskip("peft")

WORDS = 1024  # tokens of the tokenizer
ARGS = ModelArgs(**GQA, vocab_size=WORDS, norm_eps=1e-5)
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SAFETENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
CASES = {
    "the default targets": {},
    "all linear layers": {"target_modules": "all-linear"},
    "rslora": {"target_modules": LINEAR, "use_rslora": True},
    "some layers": {"target_modules": LINEAR, "layers_to_transform": [1]},
    "patterns": {
        "target_modules": LINEAR,
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.\w+_proj": 6, "proj": 3},
        "alpha_pattern": {"down_proj": 3, "model.layers.0.self_attn.k_proj": 32, "eight_proj": 100},
    },
    "embeddings and output": {"target_modules": ["embed_tokens", "lm_head", "o_proj"]},
    "whole weights": {"target_modules": ["o_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm", "k_proj"]},
    "DoRA": {"target_modules": [*LINEAR, "lm_head"], "use_dora": True},
}


def train(model, folder, seed=1, **settings):
    """Save a random adapter; returns the model with it, not merged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what PEFT recommends for tied models
        config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **settings})
        wrapped = peft.get_peft_model(copy.deepcopy(model), config).eval()
        torch.manual_seed(seed)
        for weight in (weight for weight in wrapped.parameters() if weight.requires_grad):
            weight.data += torch.randn_like(weight) * 0.1
        wrapped.save_pretrained(folder)
    return wrapped


def state(folder, **options):
    """The weights of this rank, as loaded."""
    llama = Llama.build(folder, TOKENIZER, 32, 1, device="cpu", **options)
    return {name: weight.clone() for name, weight in llama.model.state_dict().items()}


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


def close(found, expected):
    return found.keys() == expected.keys() and all(
        (found[name] - weight).abs().max() <= 1e-6 * weight.abs().max() for name, weight in expected.items()
    )


def equal(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture
def base(tmp_path):
    """Hugging Face's model, saved in its layout as `hf`, and in two shards of Meta's layout as `meta`."""
    model = hugging_face(ARGS, save_random(tmp_path / "meta", mp=2))
    saved(model, tmp_path / "hf")
    return model


@pytest.mark.parametrize("case", CASES)
def test_weights_equal_those_merged_by_peft(base, tmp_path, ranks, case):
    """In both layouts, and bit-identical on one rank and two."""
    wrapped = train(base, tmp_path / "lora", **CASES[case])
    expected = state(saved(wrapped.merge_and_unload(), tmp_path / "merged"))
    found = state(tmp_path / "meta", lora=tmp_path / "lora")
    assert close(found, expected)
    assert not equal(found, state(tmp_path / "meta"))
    assert equal(state(tmp_path / "hf", lora=str(tmp_path / "lora")), found)
    for rank, part in enumerate(ranks(2).run(on_ranks, tmp_path / "meta", tmp_path / "lora")):
        for name, weight in found.items():
            dim = shard_dim(name)
            begin, end = rank_range(name, weight.shape[dim or 0], ARGS, rank, 2)
            assert torch.equal(part[name], weight.narrow(dim or 0, begin, end - begin)), name


def on_ranks(folder, lora):
    return state(folder, lora=lora)


TIED = {
    "embeddings": {"target_modules": ["embed_tokens"]},
    "output": {"target_modules": ["lm_head", "q_proj"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "both, tied": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "whole embeddings": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "neither": {"target_modules": ["q_proj"]},
}


@pytest.mark.parametrize("case", TIED)
def test_tied_embeddings_change_as_they_were_trained(tmp_path, case):
    """PEFT's merge adds the change of one to the other too: the reference is its model before merging."""
    from transformers import LlamaForCausalLM

    weights = save_random(tmp_path / "meta")
    untied = hugging_face(ARGS, weights | {"output.weight": weights["tok_embeddings.weight"]})
    config = copy.deepcopy(untied.config)
    config.tie_word_embeddings = True
    tied = LlamaForCausalLM(config).eval()
    tied.load_state_dict(untied.state_dict())
    tied.tie_weights()
    wrapped = train(tied, tmp_path / "lora", **TIED[case])
    llama = Llama.build(saved(tied, tmp_path / "hf"), TOKENIZER, 32, 1, device="cpu", lora=tmp_path / "lora")
    assert llama.model.params.tie_word_embeddings == (case == "neither")
    tokens = torch.tensor([[1, 5, 17, 99, 3, 64]])
    with torch.no_grad():
        assert relative_error(llama.model.forward(tokens, 0), wrapped(tokens).logits) < 1e-5
    for to in ("meta", "hf"):
        convert(tmp_path / "hf", tmp_path / f"to {to}", to, 1, None, TOKENIZER, lora=tmp_path / "lora")
        assert equal(state(tmp_path / f"to {to}"), dict(llama.model.state_dict()))


def test_several_adapters_add_up_by_their_weights(base, tmp_path):
    train(base, tmp_path / "a", target_modules=LINEAR)
    train(base, tmp_path / "b", seed=2, r=2, target_modules=["q_proj", "down_proj", "embed_tokens"])
    reference = None
    for name, weight in (("a", 0.5), ("b", -2)):
        shutil.copytree(tmp_path / name, tmp_path / f"weighted {name}")
        edit(tmp_path / f"weighted {name}", lora_alpha=8 * weight)
        if reference is None:
            reference = peft.PeftModel.from_pretrained(base, tmp_path / f"weighted {name}", name)
        else:
            reference.load_adapter(tmp_path / f"weighted {name}", name)
    lora = [(tmp_path / "a", 0.5), (str(tmp_path / "b"), -2)]
    found = state(tmp_path / "meta", lora=lora)
    merged = reference.base_model.merge_and_unload(adapter_names=["a", "b"])
    assert close(found, state(saved(merged, tmp_path / "merged")))
    once = state(tmp_path / "hf", lora=[tmp_path / "a"])
    assert equal(once, state(tmp_path / "hf", lora=tmp_path / "a"))
    assert not close(once, found)


def test_a_merged_weight_is_rounded_once_and_the_file_is_not_written(tmp_path):
    weights = save_random(tmp_path / "meta", dtype=torch.bfloat16)
    model = hugging_face(ARGS, {name: weight.float() for name, weight in weights.items()})
    wrapped = train(model, tmp_path / "lora", target_modules=LINEAR)
    before = state(tmp_path / "meta", dtype="bfloat16")
    found = state(tmp_path / "meta", lora=tmp_path / "lora", dtype="bfloat16")
    expected = state(saved(wrapped.merge_and_unload(), tmp_path / "merged"))
    for name, weight in expected.items():
        assert (found[name] != weight.bfloat16()).float().mean() < 1e-3, name  # few differ by float32's rounding
    assert equal(state(tmp_path / "meta", dtype="bfloat16"), before)


def test_merged_before_quantization(base, tmp_path):
    """The merged weights are quantized, when loading and when converting."""
    train(base, tmp_path / "lora", target_modules=[*LINEAR, "lm_head"])
    convert(tmp_path / "meta", tmp_path / "float", "meta", 2, None, TOKENIZER, lora=tmp_path / "lora")
    convert(tmp_path / "meta", tmp_path / "int4", "meta", 1, None, TOKENIZER, "int4", lora=tmp_path / "lora")
    tokens, logits = torch.tensor([[1, 5, 17, 99, 3, 64]]), []
    options = {"quantize": "int4", "lora": tmp_path / "lora"}
    for folder, given in (("meta", options), ("float", {"quantize": "int4"}), ("int4", {})):
        llama = Llama.build(tmp_path / folder, TOKENIZER, 32, 1, device="cpu", **given)
        logits.append(llama.model.forward(tokens, 0))
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    with pytest.raises(ValueError, match="int4 is quantized already, to .*; an adapter of layers.* needs the original"):
        state(tmp_path / "int4", lora=tmp_path / "lora")


def test_rows_beyond_the_tokenizers_tokens_are_dropped(base, tmp_path):
    base.resize_token_embeddings(WORDS + 8)
    wrapped = train(base, tmp_path / "lora", target_modules=["embed_tokens", "lm_head"])
    folder = saved(base, tmp_path / "padded")
    expected = state(saved(wrapped.merge_and_unload(), tmp_path / "merged"))
    assert close(state(folder, lora=tmp_path / "lora"), expected)


def test_torch_format(base, tmp_path):
    train(base, tmp_path / "lora", target_modules=LINEAR)
    expected = state(tmp_path / "meta", lora=tmp_path / "lora")
    torch.save(load_file(tmp_path / "lora" / SAFETENSORS), tmp_path / "lora" / "adapter_model.bin")
    (tmp_path / "lora" / SAFETENSORS).unlink()
    assert equal(state(tmp_path / "meta", lora=tmp_path / "lora"), expected)


def test_commands_take_a_folder_or_a_list(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(base, "a", target_modules=LINEAR)
    train(base, "b", seed=2, modules_to_save=["lm_head"])
    given = ["--tokenizer_path", TOKENIZER]
    done = in_process(inspect_command.inspect, "meta", *given, "--lora", '["a", "b"]')
    assert (
        "lora: a: rank 4 for 21 (down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj); b: rank" in done.stdout
    )
    assert "for 6 (q_proj, v_proj), whole 1 (lm_head)" in done.stdout
    for i, (flag, lora) in enumerate({"a": "a", '[("a", 0.5), ("b", 1)]': [("a", 0.5), ("b", 1)]}.items()):
        done = in_process(convert_command.convert, "meta", f"to{i}", *given, "--lora", flag)
        assert done.returncode == 0, done.stderr
        assert equal(state(f"to{i}"), state("hf", lora=lora))


def test_ranks_with_different_adapters_are_an_error(base, tmp_path, ranks):
    train(base, tmp_path / "0", target_modules=LINEAR)
    train(base, tmp_path / "1", target_modules=LINEAR, seed=2)
    for _, error in ranks(2).outcomes(own_adapter, tmp_path):
        assert error[0] == "ValueError"
        assert "the ranks differ in lora" in error[1]


def own_adapter(folder):
    return state(folder / "meta", lora=folder / str(parallel.rank()))


class Malicious:
    def __reduce__(self):
        return (open, (os.environ["EXECUTED"], "w"))


def edit(folder, **changes):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def config(**changes):
    return lambda folder: edit(folder, **changes)


def weights(change):
    """Damage: the adapter's saved file with one change."""

    def damage(folder):
        found = load_file(folder / SAFETENSORS)
        change(found)
        save_file(found, folder / SAFETENSORS)

    return damage


def cut(folder):
    path = folder / SAFETENSORS
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def malicious(folder):
    (folder / SAFETENSORS).unlink()
    torch.save({Q + "lora_A.weight": Malicious()}, folder / "adapter_model.bin")


def unlike(folder):
    """An adapter with weights in place of the base's, which differ from those of the other adapter."""
    found = load_file(folder / SAFETENSORS)
    save_file({**found, "base_model.model.lm_head.weight": torch.ones(WORDS, 64)}, folder / SAFETENSORS)


Q = "base_model.model.model.layers.0.self_attn.q_proj."
LAST = "base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight"
DAMAGE = {
    "truncated": (cut, rf"{SAFETENSORS} \([\d,]+ bytes\) is not a readable shard; download it again"),
    "no config": (lambda folder: (folder / CONFIG).unlink(), f"no {CONFIG} in .*lora; is it the folder of a LoRA"),
    "no weights": (lambda folder: (folder / SAFETENSORS).unlink(), f"lora lacks {SAFETENSORS}; download it again"),
    "a config that is not JSON": (lambda folder: (folder / CONFIG).write_text("{r: 4"), f"{CONFIG} is not JSON"),
    "a rank that lies": (config(r=8), r"misshapen: .*lora_A.weight \(4, 64\) instead of \(8, 64\)"),
    "no rank": (config(r="4"), f"{CONFIG}: r of model.layers.0.self_attn.q_proj is '4', not a positive whole number"),
    "no alpha": (config(lora_alpha=[1]), r"lora_alpha of model.layers.0.self_attn.q_proj is \[1\], not a number"),
    "an invalid pattern": (
        config(rank_pattern={"q(": 2}),
        r"rank_pattern contains .*q\(.*, which is not a regular expression",
    ),
    "patterns in a list": (config(alpha_pattern=[2]), r"alpha_pattern is \[2\], not an object of names and numbers"),
    "another method": (config(peft_type="IA3"), f"{CONFIG}: peft_type 'IA3' is not supported; only 'LORA' is"),
    "no method": (config(peft_type=None), "peft_type None is not supported; only 'LORA' is"),
    "biases": (config(bias="lora_only"), "bias 'lora_only' is not supported; only 'none' is"),
    "biases of B": (config(lora_bias=True), "lora_bias True is not supported"),
    "layers twice": (config(layer_replication=[[0, 2]]), r"layer_replication \[\[0, 2\]\] is not supported"),
    "tokens": (config(trainable_token_indices=[5]), r"trainable_token_indices \[5\] is not supported"),
    "transposed": (config(fan_in_fan_out=True), "fan_in_fan_out True is not supported"),
    "PiSSA": (config(init_lora_weights="pissa"), "init_lora_weights 'pissa' is not supported; only True is"),
    "an unknown key": (config(use_next=0.5), "use_next 0.5 is not supported"),
    "DoRA without norms": (config(use_dora=True), r"missing: .*layers.0.self_attn.q_proj.lora_magnitude_vector"),
    "A without B": (
        weights(lambda found: found.pop(Q + "lora_B.weight")),
        "missing: model.layers.0.self_attn.q_proj.lora_B",
    ),
    "an extra key": (weights(lambda found: found.update(more=torch.ones(1))), "unexpected: more"),
    "a layer that is not there": (
        weights(lambda found: found.update({LAST: torch.ones(4, 64)})),
        f"unexpected: {LAST}",
    ),
    "a score head": (
        weights(lambda found: found.update({"base_model.model.score.weight": torch.ones(2, 64)})),
        "unexpected: base_model.model.score.weight",
    ),
    "norms without DoRA": (
        weights(lambda found: found.update({Q + "lora_magnitude_vector": torch.ones(64)})),
        f"unexpected: {Q}lora_magnitude_vector",
    ),
    "another shape": (
        weights(lambda found: found.update({Q + "lora_B.weight": torch.ones(32, 4)})),
        rf"misshapen: {Q}lora_B.weight \(32, 4\) instead of \(64, 4\)",
    ),
    "a dtype of numbers": (
        weights(lambda found: found.update({Q + "lora_B.weight": torch.ones(64, 4, dtype=torch.int32)})),
        f"of a dtype that cannot be read: {Q}lora_B.weight",
    ),
    "nothing": (weights(dict.clear), f"{SAFETENSORS} is empty"),
    "code": (malicious, r"adapter_model.bin \([\d,]+ bytes\) is not a readable shard; download it again"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_adapters_are_named(base, tmp_path, monkeypatch, name):
    """In one line, from Python and from a command. Nothing is executed, and no files are left."""
    monkeypatch.setenv("EXECUTED", str(tmp_path / "executed"))
    damage, message = DAMAGE[name]
    train(base, tmp_path / "lora")
    damage(tmp_path / "lora")
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        state(tmp_path / "meta", lora=tmp_path / "lora")
    assert str(tmp_path / "lora") in str(caught.value)
    flags = ("--tokenizer_path", TOKENIZER, "--lora", tmp_path / "lora")
    done = in_process(convert_command.convert, tmp_path / "meta", tmp_path / "to", *flags)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert {*os.listdir(tmp_path)} == {"meta", "hf", "lora"}


def test_keys_without_effect_are_accepted(base, tmp_path):
    train(base, tmp_path / "lora")
    expected = state(tmp_path / "meta", lora=tmp_path / "lora")
    edit(tmp_path / "lora", later=None, off=False, none=[], empty={}, lora_dropout=0.1, init_lora_weights="gaussian")
    assert equal(state(tmp_path / "meta", lora=tmp_path / "lora"), expected)


@pytest.mark.parametrize(
    "lora, message",
    [
        (5, "lora is 5; it must be the path of a folder"),
        ([("a", "b")], "lora is .*; it must be a folder, or a list of folders or of pairs"),
        ([("lora", float("nan"))], "lora is .*; it must be a folder, or a list of folders or of pairs"),
        ("nowhere", "lora nowhere is not an existing folder"),
        (["lora", "whole", "unlike"], "whole and .*unlike have different weights in place of output.weight"),
        ([("whole", 0.5)], "whole has a whole weight for output.weight, which cannot be weighted or added"),
        (["dora", "lora"], "dora has DoRA for layers.*, which cannot be weighted or added to another"),
        ([("dora", 0.5)], "dora has DoRA for layers.*, which cannot be weighted or added to another"),
        ("dora of embeddings", "dora of embeddings has DoRA for the embeddings, which is not supported"),
    ],
)
def test_adapters_that_cannot_be_combined(base, tmp_path, monkeypatch, lora, message):
    monkeypatch.chdir(tmp_path)
    for name in ("lora", "whole", "unlike"):
        train(base, name, modules_to_save=["lm_head"] if name == "whole" else None)
    unlike(Path("unlike"))
    train(base, "dora", use_dora=True)
    train(base, "dora of embeddings", use_dora=True, target_modules=["embed_tokens"])
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        state("meta", lora=lora)
