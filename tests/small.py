"""Small random models, Hugging Face's Llama with the same weights, and paths, prompts and commands for tests."""

import io
import json
import os
import shlex
import shutil
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from subprocess import CompletedProcess
from unittest import mock

import pytest
import torch

from llama import Llama, ModelArgs, Transformer, checkpoint, parallel
from llama.cli import script

ROOT = Path(__file__).parent.parent
MODELS = ROOT / "models"
TOKENIZER = MODELS / "tokenizer.model"
needs_cpp = pytest.mark.skipif(not shutil.which(shlex.split(os.environ.get("CXX") or "g++")[0]), reason="needs g++")


def cases(most):
    """The number of random cases for a test: a tenth of `most`, or `most` with the environment variable LONG_TESTS."""
    return most if os.environ.get("LONG_TESTS") else most // 10


GQA = {"dim": 64, "n_layers": 3, "n_heads": 8, "n_kv_heads": 4, "multiple_of": 32}
SHAPES = {
    "MHA": {**GQA, "n_kv_heads": None},
    "GQA": GQA,
    "MQA": {**GQA, "n_kv_heads": 1},
    "wide heads": {**GQA, "n_heads": 4, "n_kv_heads": 2},  # head size 16, a whole vector
    "odd FFN": {**GQA, "multiple_of": 4, "ffn_dim_multiplier": 1.3},  # hidden size 220
    "other theta and eps": {**GQA, "rope_theta": 1e6, "norm_eps": 1e-2},
}


# The shapes of Llama 2, as in the params.json of each.
PUBLISHED = {
    "7B": {},
    "13B": {"dim": 5120, "n_layers": 40, "n_heads": 40},
    "70B": {
        "dim": 8192,
        "n_layers": 80,
        "n_heads": 64,
        "n_kv_heads": 8,
        "multiple_of": 4096,
        "ffn_dim_multiplier": 1.3,
    },
}
# And of Llama 3; 405B in 8 shards, as in 16 the key-value heads are doubled.
_3 = {"vocab_size": 128256, "rope_theta": 500000.0, "n_kv_heads": 8}
_BIG = {**PUBLISHED["70B"], **_3}
LLAMA3 = {
    "3, 3.1 8B": {"ffn_dim_multiplier": 1.3, "multiple_of": 1024, **_3},
    "3, 3.1, 3.3 70B": _BIG,
    "3.1 405B": {**_BIG, "dim": 16384, "n_layers": 126, "n_heads": 128, "ffn_dim_multiplier": 1.2},
    "3.2 1B": {"dim": 2048, "n_layers": 16, "ffn_dim_multiplier": 1.5, "tie_word_embeddings": True, **_3},
    "3.2 3B": {"dim": 3072, "n_layers": 28, "n_heads": 24, "tie_word_embeddings": True, **_3},
}


def random_model(shape=GQA, vocab_size=128, max_batch_size=4, max_seq_len=64, seed=0):
    """A random model whose weights are large enough that each of its parts affects the logits."""
    parallel.init_model_parallel()
    torch.manual_seed(seed)
    args = ModelArgs(**shape, vocab_size=vocab_size, max_batch_size=max_batch_size, max_seq_len=max_seq_len)
    model = Transformer(args).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        weight.copy_(torch.rand_like(weight) + 0.5 if "norm" in name else torch.randn_like(weight) * 0.15)
    return model


def save_random(folder, shape=GQA, mp=1, vocab_size=-1, dtype=torch.float32, **options):
    """Write a random model as a checkpoint of `mp` shards, and return its whole state dict."""
    words = vocab_size if vocab_size > 0 else 1024
    state = {name: w.to(dtype) for name, w in random_model(shape, words, **options).state_dict().items()}
    params = {key: value for key, value in shape.items() if value is not None}
    checkpoint.save(state, folder, {"norm_eps": 1e-5, **params, "vocab_size": vocab_size}, mp)
    return state


WORDS = [
    "the quick brown fox jumps over the lazy dog",
    "def f(x):  return x + 3",
    "once upon a time there was a hat",
] * 9


def trained(folder, **settings):
    """The path of a small SentencePiece model with Llama's settings, except for those given."""
    from sentencepiece import SentencePieceTrainer

    usual = {"model_type": "bpe", "vocab_size": 330, "byte_fallback": True, "normalization_rule_name": "identity"}
    usual |= {"remove_extra_whitespaces": False, "hard_vocab_limit": False, "minloglevel": 2}
    model = io.BytesIO()
    SentencePieceTrainer.train(sentence_iterator=iter(WORDS), model_writer=model, **usual | settings)
    path = folder / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


OPTIONS = {"tokenizer_path": TOKENIZER, "max_seq_len": 32, "device": "cpu", "dtype": "float32"}


def build(folder, **options):
    """Build a model from a folder without a tokenizer."""
    return Llama.build(folder, **{**OPTIONS, **options})


def edit_params(folder, **changes):
    path = folder / "params.json"
    params = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in params.items() if value != "delete"}))


def edit_shard(folder, change, name="consolidated.00.pth"):
    state = torch.load(folder / name, weights_only=True)
    change(state)
    torch.save(state, folder / name)


def hugging_face(args, state):
    """Hugging Face's model with the same weights. The mapping is from FACTS about the two layouts, not from llama/."""
    from transformers import LlamaConfig, LlamaForCausalLM

    kv_heads = args.n_kv_heads or args.n_heads
    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.dim,
        intermediate_size=state["layers.0.feed_forward.w1.weight"].shape[0],
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=args.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": args.rope_theta},
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
    )

    def halves(weight, heads):
        """Rows (heads, D/2, 2) -> (heads, 2, D/2): adjacent pairs become elements i and i + D/2."""
        return weight.view(heads, -1, 2, args.dim).transpose(1, 2).reshape(weight.shape)

    renamed = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}
    theirs = {f"{hf}.weight": state[f"{meta}.weight"] for hf, meta in renamed.items()}
    for i in range(args.n_layers):
        ours, layer = f"layers.{i}.", f"model.layers.{i}."
        theirs[layer + "self_attn.q_proj.weight"] = halves(state[ours + "attention.wq.weight"], args.n_heads)
        theirs[layer + "self_attn.k_proj.weight"] = halves(state[ours + "attention.wk.weight"], kv_heads)
        theirs[layer + "self_attn.v_proj.weight"] = state[ours + "attention.wv.weight"]
        theirs[layer + "self_attn.o_proj.weight"] = state[ours + "attention.wo.weight"]
        theirs[layer + "mlp.gate_proj.weight"] = state[ours + "feed_forward.w1.weight"]
        theirs[layer + "mlp.down_proj.weight"] = state[ours + "feed_forward.w2.weight"]
        theirs[layer + "mlp.up_proj.weight"] = state[ours + "feed_forward.w3.weight"]
        theirs[layer + "input_layernorm.weight"] = state[ours + "attention_norm.weight"]
        theirs[layer + "post_attention_layernorm.weight"] = state[ours + "ffn_norm.weight"]
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(theirs, strict=True)
    return model


# Prompts as ids of the bundled tokenizer, with several lengths.
PROMPTS = [[1, 400, 401, 402], [1, 17], [1, *range(300, 319)], [1, 99, 98, 97, 96, 95, 94]]


def greedy(llama, prompts, max_gen_len=10, **options):
    return llama.generate(prompts, max_gen_len, temperature=0, **options)


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


def in_process(function, *flags):
    """Run a command in this process: (exit code, stdout, stderr)."""
    out, code, err = io.StringIO(), 0, ""
    try:
        with redirect_stdout(out):
            for call in script.parse(function, [str(flag) for flag in flags]):
                call()
    except script.FORESEEN as error:
        code, err = 1, f"error: {script.one_line(error)}\n"
    return CompletedProcess(flags, code, out.getvalue(), err)


@contextmanager
def passes(llama):
    """The number of tokens of each forward pass, in a list that grows."""
    seen, real = [], Transformer.hidden

    def forward(self, batch):
        seen.append(len(batch.tokens))
        return real(self, batch)

    with mock.patch.object(Transformer, "hidden", forward):
        yield seen
