"""Llama 3, 3.1 and 3.2, and folders of models that differ from Llama 2, compared with transformers."""

import json

import pytest
import torch
from small import LLAMA3, TOKENIZER, edit_params, needs_cpp, relative_error, save_random

from llama import Llama, ModelArgs, checkpoint
from llama.args import RopeScaling
from llama.checkpoint import Checkpoint, hf
from llama.checkpoint.convert import convert
from llama.model import scale_rope_frequencies

TOKENS = torch.tensor([[1, 300, 301, 4, 550, 7, 1000, 1023] * 5, [1, 9, 8, 7, 6, 5, 4, 3] * 5])
# With positions up to 40 and an original context of 32, all three frequency bands matter.
BANDS = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
FAMILY = {
    "llama3 scaling": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **BANDS}},
    "linear scaling": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "tied": {"tie_word_embeddings": True},
    "wider heads": {"head_dim": 32},
    "narrower heads": {"head_dim": 8, "num_key_value_heads": 1},
    "3.2 1B": {
        "tie_word_embeddings": True,
        "head_dim": 32,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **BANDS, "factor": 32.0},
    },
}


def save(folder, **changes):
    """Save a random model of transformers; returns its logits."""
    from transformers import LlamaConfig, LlamaForCausalLM

    usual = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    usual |= {"num_key_value_heads": 2, "vocab_size": 1024, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**usual | changes, initializer_range=0.2)).eval()
    model.save_pretrained(folder)
    with torch.inference_mode():
        return model(TOKENS % model.config.vocab_size).logits


def logits(folder, compile=False):
    llama = Llama.build(folder, TOKENIZER, max_seq_len=64, device="cpu", dtype="float32", compile=compile)
    prompts = TOKENS.tolist()
    with torch.inference_mode():
        model = llama.model(TOKENS, 0).clone()
    scores = llama.generate(prompts, 1, temperature=0, logprobs=True, echo=True)[1]
    return model, torch.tensor([row[: TOKENS.shape[1]] for row in scores])


def token_logprobs(of):
    found = of.log_softmax(-1)[:, :-1].gather(-1, TOKENS[:, 1:, None])[..., 0]
    return torch.cat((torch.zeros(len(TOKENS), 1), found), 1)


@pytest.mark.parametrize("kind", FAMILY)
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=needs_cpp)])
def test_logits_are_those_of_transformers_in_both_layouts(tmp_path, kind, compile):
    theirs = save(tmp_path / "hf", **FAMILY[kind])
    convert(tmp_path / "hf", tmp_path / "meta", "meta", 1, None, TOKENIZER)
    for folder in (tmp_path / "hf", tmp_path / "meta"):
        ours, scores = logits(folder, compile)
        assert relative_error(ours, theirs) <= 1e-5
        assert (scores - token_logprobs(theirs))[:, 1:].abs().max() <= 1e-4


def rank_logits(folder):
    return logits(folder)[0]


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("kind", FAMILY)
def test_on_several_ranks_in_both_layouts(tmp_path, ranks, world_size, kind):
    theirs = save(tmp_path / "hf", **FAMILY[kind])
    convert(tmp_path / "hf", tmp_path / "meta", "meta", 2, None, TOKENIZER)
    for folder in ("hf", "meta"):
        for ours in ranks(world_size).run(rank_logits, tmp_path / folder):
            assert relative_error(ours, theirs) <= 1e-5


@pytest.mark.parametrize("kind", FAMILY)
def test_conversion_there_and_back_is_lossless(tmp_path, kind):
    from safetensors.torch import load_file
    from transformers import LlamaForCausalLM

    theirs = save(tmp_path / "hf", **FAMILY[kind])
    convert(tmp_path / "hf", tmp_path / "meta", "meta", 1, None, TOKENIZER)
    convert(tmp_path / "meta", tmp_path / "back", "hf", 1, None, TOKENIZER)
    first, last = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back"))
    assert first.keys() == last.keys()
    assert all(torch.equal(first[name], last[name]) for name in first)
    again = LlamaForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    with torch.inference_mode():
        assert relative_error(again(TOKENS).logits, theirs) <= 1e-6
        ids = again.generate(TOKENS[:1, :5], max_new_tokens=8, do_sample=False)[0, 5:]
    llama = Llama.build(tmp_path / "back", TOKENIZER, max_seq_len=64, device="cpu", dtype="float32")
    assert llama.generate([TOKENS[0, :5].tolist()], 8, temperature=0)[0][0] == ids.tolist()


def test_a_tied_output_shares_memory(tmp_path):
    save(tmp_path / "hf", tie_word_embeddings=True)
    convert(tmp_path / "hf", tmp_path / "meta", "meta", 1, None, TOKENIZER)
    sizes = {"hf": 1024 * 64 * 4, "meta": 1024 * 64 * 4}
    for name, size in sizes.items():
        source = Checkpoint(tmp_path / name)
        args = source.args(1024)
        assert args.tie_word_embeddings
        untied = checkpoint.footprint(args, 2, torch.float32).weights * 2
        assert checkpoint.footprint(args, 1, torch.float32).weights <= untied - size
        for dtype in ("float32", "bfloat16"):  # memory-mapped, and copied
            llama = Llama.build(tmp_path / name, TOKENIZER, max_seq_len=16, device="cpu", dtype=dtype)
            assert llama.model.output.weight.data_ptr() == llama.model.tok_embeddings.weight.data_ptr()
    state = torch.load(tmp_path / "meta" / "consolidated.00.pth", weights_only=True)
    assert state["output.weight"].data_ptr() == state["tok_embeddings.weight"].data_ptr()


# Values in double precision, from the definition in the paper's code: pairs that keep their frequency, change smoothly,
# and are divided by the factor.
TABLES = [
    (128, 8, {0: 1.0, 1: 0.81461723, 28: 0.003211446, 29: 0.0021665708, 30: 0.0013718936, 31: 0.00085675141,
              32: 0.00052484616, 33: 0.00031269375, 34: 0.00017850781, 35: 9.5562124e-05, 63: 3.068926e-07}),
    (64, 32, {1: 0.66360124, 14: 0.003211446, 15: 0.0012905479, 16: 0.0004295568, 17: 9.7082878e-05,
              18: 1.9461638e-05, 31: 9.4183067e-08}),
    (128, 32, {29: 0.002118407, 30: 0.0012905479, 31: 0.0007625412, 32: 0.0004295568, 33: 0.0002227635,
               34: 9.7082878e-05, 35: 2.3890531e-05, 63: 7.672315e-08}),
]  # fmt: skip


@pytest.mark.parametrize(("D", "factor", "expected"), TABLES)
def test_scaled_frequencies(D, factor, expected):
    found = scale_rope_frequencies(1.0 / 500000.0 ** (torch.arange(0, D, 2).float() / D), RopeScaling(factor))
    for pair, frequency in expected.items():
        assert found[pair].item() == pytest.approx(frequency, rel=1e-6)


@pytest.mark.parametrize(
    ("size", "hidden", "head_dim", "parameters"),
    [
        ("3, 3.1 8B", 14336, 128, 8_030_261_248),
        ("3, 3.1, 3.3 70B", 28672, 128, 70_553_706_496),
        ("3.1 405B", 53248, 128, 405_853_388_800),
        ("3.2 1B", 8192, 64, 1_235_814_400),
        ("3.2 3B", 8192, 128, 3_212_749_824),
    ],
)
def test_the_shapes_of_published_models(size, hidden, head_dim, parameters):
    args = ModelArgs(**LLAMA3[size])
    assert (args.ffn_hidden, args.head_dim) == (hidden, head_dim)
    assert checkpoint.footprint(args, 1, torch.bfloat16).weights == 2 * parameters
    found = hf.ffn_params(args.dim, hidden)
    assert ModelArgs(**{**LLAMA3[size], "ffn_dim_multiplier": None, **found}).ffn_hidden == hidden


@pytest.mark.parametrize(
    ("change", "factor"),
    [
        ({"use_scaled_rope": True}, 8),
        ({"use_scaled_rope": True, "dim": 2048, "n_heads": 32}, 32),
        ({"use_scaled_rope": True, "dim": 3072, "n_heads": 24}, 32),
        ({"use_scaled_rope": True, "rope_scaling_factor": 16.0}, 16),
        ({"use_scaled_rope": True, "rope_scaling": {"factor": 4.0}}, 4),
        ({"rope_scaling": {"factor": 2.0, "rope_type": "linear"}}, 2),
    ],
)
def test_the_scaling_that_metas_files_mean(tmp_path, change, factor):
    (tmp_path / "params.json").write_text(json.dumps({"dim": 64, "n_layers": 1, "n_heads": 4} | change))
    edit_params(tmp_path, multiple_of=256, norm_eps=1e-5)
    params = checkpoint.read_params(tmp_path / "params.json")
    assert ModelArgs(**params).rope_scaling.factor == factor
    nested = json.loads((tmp_path / "params.json").read_text())
    (tmp_path / "params.json").write_text(json.dumps({"model": nested}))
    assert checkpoint.read_params(tmp_path / "params.json") == params


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantization_args": {"group_size": 32}}, "quantization_args: it is of weights that SpinQuant or QLoRA"),
        ({"lora_args": {"rank": 16}}, "lora_args: it is of weights with LoRA adapters"),
        ({"vision_chunk_size": 448}, "vision_chunk_size: it is of a model of images and text"),
        ({"moe_args": {"num_experts": 16}}, "moe_args: it is of a mixture of experts"),
        ({"use_scaled_rope": "yes"}, "use_scaled_rope is 'yes'"),
        ({"rope_scaling_factor": 4}, "use_scaled_rope is False and rope_scaling_factor 4"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling is .*yarn.*; known are factor, low_freq_factor"),
        ({"nonsense": 1}, "unknown keys nonsense"),
    ],
)
def test_keys_of_other_models_are_refused_by_name(tmp_path, change, message):
    save_random(tmp_path)
    edit_params(tmp_path, **change)
    with pytest.raises(ValueError, match=message):
        Checkpoint(tmp_path)


def test_key_value_heads_that_were_duplicated(tmp_path):
    """The largest 3.1 has each key-value head twice in its 16 shards, and params.json counts both."""
    theirs = save(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "meta", "meta", 1, None, TOKENIZER)
    path = tmp_path / "meta" / "consolidated.00.pth"
    state = torch.load(path, weights_only=True)
    for name in [name for name in state if name.split(".")[-2] in ("wk", "wv")]:
        state[name] = state[name].view(2, 16, 64).repeat_interleave(2, 0).flatten(0, 1)
    torch.save(state, path)
    edit_params(tmp_path / "meta", n_kv_heads=4)
    assert relative_error(logits(tmp_path / "meta")[0], theirs) <= 1e-5
