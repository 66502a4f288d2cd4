"""Damaged and unsupported GGUF files: an error of one line, at once and without much memory."""

import struct
import time
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import GQA, TOKENIZER, cases, in_process, save_random

from llama import Llama, Tokenizer
from llama.checkpoint import Checkpoint
from llama.checkpoint.convert import convert
from llama.cli.inspect import inspect
from llama.gguf import TYPES, header_bytes, read_gguf

F32, F16 = TYPES[0], TYPES[1]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    save_random(folder / "meta", GQA)
    convert(folder / "meta", folder / "to", "gguf", 1, torch.float32, TOKENIZER)
    return (folder / "to" / "model.gguf").read_bytes()


def at(offset, value):
    return lambda content: content[:offset] + value + content[offset + len(value) :]


def u64(value):
    return struct.pack("<Q", value)


def after(marker, skip, value):
    """Write a value some bytes after the first occurrence of a name."""
    return lambda content: at(content.index(marker) + len(marker) + skip, value)(content)


def rewritten(change):
    """The file with other keys or tensors, and zeros for their data."""

    def damage(content):
        keys = {
            "general.architecture": "llama", "llama.embedding_length": 64, "llama.block_count": 1,
            "llama.feed_forward_length": 128, "llama.attention.head_count": 4, "llama.context_length": 64,
            "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "a"],
            "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -1.0], "tokenizer.ggml.token_type": [2, 3, 3, 1],
            "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
        }  # fmt: skip
        tensors = {"token_embd.weight": (F32, (4, 64)), "output_norm.weight": (F32, (64,))}
        change(keys, tensors)
        return header_bytes(keys, tensors) + bytes(4096)

    return damage


def key(name, value):
    return rewritten(lambda keys, tensors: keys.update({name: value}))


# The numbers of tensors and keys are at bytes 8 and 16; the first key is general.architecture.
DAMAGE = {
    "empty": (lambda content: b"", "it is empty"),
    "half a header": (lambda content: content[:1000], "too short for|its header is cut"),
    "only a magic": (lambda content: content[:4], "its header is cut"),
    "truncated data": (lambda content: content[: len(content) // 2], r"it ends inside of \S+; download it again"),
    "another magic": (at(0, b"GGML"), "it begins with b'GGML'"),
    "version 1": (at(4, b"\1\0\0\0"), "it has version 1; versions 2 and 3 are read"),
    "big-endian": (at(4, b"\0\0\0\3"), "version 50331648 in big-endian order"),
    "2^60 tensors": (at(8, u64(2**60)), "too short for 1,152,921,504,606,846,976 tensors"),
    "2^60 keys": (at(16, u64(2**60)), "too short for 1,152,921,504,606,846,976 keys"),
    "a giant string": (after(b"general.architecture", 4, u64(2**62)), "too short for .* bytes of a string"),
    "a giant name": (at(24, u64(2**63)), "too short for .* bytes of a string"),
    "a giant array": (after(b"tokenizer.ggml.tokens", 8, u64(2**61)), "too short for .* strings of tokenizer"),
    "giant numbers": (after(b"tokenizer.ggml.scores", 8, u64(2**61)), "too short for .* numbers of tokenizer"),
    "arrays in arrays": (after(b"tokenizer.ggml.scores", 4, b"\x09\0\0\0"), "scores is an array of type 9"),
    "an unknown type": (after(b"general.architecture", 0, b"\x63\0\0\0"), "has the unknown type 99"),
    "no UTF-8": (after(b"general.architecture", 12, b"\xff\xfe"), "can't decode byte"),
    "9 dimensions": (after(b"blk.0.attn_q.weight", 0, b"\x09\0\0\0"), "blk.0.attn_q.weight has 9 dimensions"),
    "a shape that lies": (after(b"blk.0.attn_q.weight", 4, u64(2**40)), "it ends inside of|overlaps"),
    "an empty shape": (after(b"blk.0.attn_q.weight", 4, u64(0)), r"of type F32 has the shape \(64, 0\)"),
    "a tensor type": (after(b"blk.0.attn_q.weight", 20, b"\x0a\0\0\0"), "is of type Q2_K; the types F32, .* are read"),
    "overlapping": (after(b"blk.0.attn_q.weight", 24, u64(0)), "overlaps"),
    "an odd offset": (after(b"blk.0.attn_q.weight", 24, u64(7)), "has the offset 7, no multiple of 32"),
    "an offset outside": (after(b"blk.0.attn_q.weight", 24, u64(2**63 - 32)), r"it ends inside of blk\.0\.attn_q"),
    "another architecture": (key("general.architecture", "qwen2"), "general.architecture is 'qwen2'; only llama is"),
    "experts": (key("llama.expert_count", 8), "llama.expert_count is 8; only 0 is supported"),
    "no width": (rewritten(lambda keys, tensors: keys.pop("llama.embedding_length")), "embedding_length is None"),
    "a width of text": (key("llama.embedding_length", "wide"), "embedding_length is 'wide', not a positive"),
    "no heads": (key("llama.attention.head_count", 0), "llama.attention.head_count is 0, not a positive whole number"),
    "giant layers": (key("llama.block_count", 2**30), "n_layers is 1073741824; it must be at most 10000"),
    "partial RoPE": (key("llama.rope.dimension_count", 8), "dimension_count is 8; only the size of a head, 16,"),
    "YaRN": (rewritten(lambda keys, tensors: keys.update({"llama.rope.scaling.type": "yarn",
             "llama.rope.scaling.factor": 4.0})), "llama.rope.scaling.type is 'yarn'"),
    "two scalings": (rewritten(lambda keys, tensors: (keys.update({"llama.rope.scaling.factor": 4.0}),
                     tensors.update({"rope_freqs.weight": (F32, (8,))}))), "scaling.factor is 4.0 beside rope_freqs"),
    "missing tensors": (rewritten(lambda keys, tensors: None), r"does not fit model.gguf: missing: \S+"),
    "an extra tensor in blocks": (rewritten(lambda keys, tensors: tensors.update(extra=(TYPES[2], (1, 32)))),
                                  "does not fit model.gguf: unexpected: extra"),  # was an IndexError
    "an alignment": (key("general.alignment", 3), "general.alignment is 3, which is not a multiple of 8"),
    "no tokens": (rewritten(lambda keys, tensors: keys.pop("tokenizer.ggml.tokens")), "vocab_size is None|no tokens"),
    "a tokenizer": (key("tokenizer.ggml.model", "bert"), "model is 'bert'; llama and gpt2 are"),
    "too few scores": (key("tokenizer.ggml.scores", [0.0]), "scores must be a number for each of 4 tokens"),
    "scores of text": (key("tokenizer.ggml.scores", ["a"] * 4), "scores must be a number for each of 4 tokens"),
    "odd token types": (key("tokenizer.ggml.token_type", [9, 9, 9, 9]), "token_type must be a type from 1 to 6"),
    "BOS outside": (key("tokenizer.ggml.bos_token_id", 99), "tokenizer.ggml.bos_token_id is 99; there are 4 tokens"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_at_once(tmp_path, good, name):
    damage, message = DAMAGE[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(damage(good))
    tracemalloc.start()
    began = time.perf_counter()
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        Llama.build(path, max_seq_len=16, device="cpu")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.perf_counter() - began < 5 and peak < 50e6
    assert "model.gguf" in str(caught.value) and "\n" not in str(caught.value)
    done = in_process(inspect, path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1


@settings(max_examples=cases(1000), deadline=None)
@given(data=st.data())
def test_any_damaged_byte_of_a_header(good, tmp_path_factory, data):
    """The file loads, or there is a ValueError and no other error."""
    header = good.index(b"blk.2.ffn_down.weight") + 100
    content = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, header))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("fuzz") / "model.gguf"
    path.write_bytes(content)
    for work in (read_gguf, lambda path: Checkpoint(path).args(1024), Tokenizer):
        try:
            work(path)
        except ValueError as error:
            assert "model.gguf" in str(error)
