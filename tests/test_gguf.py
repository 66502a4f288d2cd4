"""GGUF files, against the package gguf and the same weights in a model of ours."""

import pytest
import torch
from small import GQA, TOKENIZER, needs_cpp, random_model, relative_error

from llama import Llama
from llama.backends.quantized import dequantize
from llama.checkpoint.blocks import CODECS

gguf = pytest.importorskip("gguf")
import gguf_files  # noqa: E402

WIDE = {**GQA, "dim": 256, "n_layers": 2, "multiple_of": 256}
TOKENS = torch.tensor([[1, 300, 301, 4, 550, 7, 1000, 1023] * 4, [1, 9, 8, 7, 6, 5, 4, 3] * 4])
FLOATS = ("F32", "F16", "BF16")
MIXED = {"attention.wv": "Q6_K", "feed_forward.w2": "Q6_K", "output": "Q6_K", "tok_embeddings": "Q4_K"}


def mixed(name):
    """As a Q4_K_M file has it."""
    return next((kind for key, kind in MIXED.items() if key in name), "Q4_K")


KINDS = {**{kind: kind for kind in (*FLOATS, *CODECS)}, "mixed": mixed}


@pytest.mark.parametrize("kind", CODECS)
def test_blocks_are_what_gguf_makes_of_them(kind):
    """Exactly; but for float16's rounding of scales that are products of two numbers."""
    blocks = gguf_files.random_blocks(kind, 40, 1024)
    exact = torch.from_numpy(gguf.dequantize(blocks, gguf_files.TYPE[kind]))
    found = gguf_files.unpacked(kind, blocks)
    assert found.shape == exact.shape
    if kind not in gguf_files.SUPERBLOCKS:
        assert torch.equal(dequantize(found), exact)
        return
    scales = [found.scale.float().abs() * (31 if kind != "Q4_K" else 15)]
    scales += [] if found.min is None else [found.min.float().abs()]
    per = exact.shape[1] // found.scale.shape[1]
    allowed = sum(scales).repeat_interleave(per, 1) * 2**-11 + 32 * 2**-25  # half of float16's steps; subnormal ones
    assert ((dequantize(found) - exact).abs() <= allowed).all()


def build(path, **options):
    return Llama.build(path, max_seq_len=64, device="cpu", **options)


def logits(path, **options):
    llama = build(path, **options)
    with torch.inference_mode():
        return llama.model(TOKENS, 0).clone()


@pytest.fixture(scope="module", params=KINDS)
def written(request, tmp_path_factory):
    """A file of a random model of each kind, and the logits of the weights that it stands for."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    model = random_model(WIDE, 1024)
    found = gguf_files.write(path, model.params, model.state_dict(), KINDS[request.param], TOKENIZER)
    model.load_state_dict(found)
    with torch.inference_mode():
        return path, request.param, model(TOKENS, 0).clone()


def test_logits_are_those_of_the_weights_in_the_file(written):
    path, _, exact = written
    assert relative_error(logits(path, dtype="float32", compile=False), exact) <= 1e-5


@needs_cpp
def test_in_compiled_code(written):
    """Which rounds activations to 8 bits where weights are quantized."""
    path, kind, exact = written
    found = logits(path, dtype="float32", compile=True)
    assert relative_error(found, exact) <= (1e-5 if kind in FLOATS else 0.05)


def rank_logits(path):
    return logits(path, dtype="float32")


def test_on_two_ranks(written, ranks):
    path, _, exact = written
    for found in ranks(2).run(rank_logits, path):
        assert relative_error(found, exact) <= 1e-5
