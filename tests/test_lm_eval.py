"""lm-evaluation-harness against the server: its log likelihoods are those of `Llama.score`."""

import math

import pytest
from harness_tasks import QUESTIONS, check_equal, evaluated, write_tasks
from serving import build, serving
from small import MODELS

from llama.checkpoint.convert import convert

pytest.importorskip("lm_eval")
pytest.importorskip("aiohttp")
pytest.importorskip("tenacity")

from llama.evaluation import HarnessModel

ASKED = "What is the opposite of big?"
CHOICES = [
    *((question, choices, right) for question, choices, right in QUESTIONS if question),
    ("Question: Who are you?\nAnswer:", ["A cat.", "x", "yes yes yes"], 1),
    # The first is followed by EOS, which is not a token of the answer.
    (f"[INST] {ASKED} [/INST]", ["The opposite of big is small.", "Big.", "Red."], 0),
]


@pytest.fixture(scope="module")
def llama():
    return build()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tasks, and the tokenizer for transformers."""
    folder = write_tasks(tmp_path_factory.mktemp("lm_eval"), CHOICES)
    convert(MODELS / "small-chat", folder / "hf", "hf", 1, None)
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))


def served(url, folder, tokenizer=True, **more):
    """The harness's results through the server."""
    known = {"tokenizer_backend": "huggingface", "tokenizer": folder / "hf", "add_bos_token": True}
    args = {"model": "small-chat", "base_url": f"{url}/v1/completions", "max_length": 256}
    args |= (known if tokenizer else {"tokenizer_backend": "None"}) | more.pop("model", {})
    written = ",".join(f"{name}={value}" for name, value in args.items())
    return evaluated("local-completions", folder, model_args=written, **more)


@pytest.mark.parametrize("model", [{}, {"batch_size": 3}, {"num_concurrent": 4}], ids=["one", "batch", "concurrent"])
def test_metrics_equal_those_of_the_library(llama, folder, model):
    with serving(llama) as client:
        found = served(client.url, folder, model=model)
    check_equal(found, evaluated(HarnessModel(llama, progress=False), folder))
    scores = {sample["doc_id"]: sample["filtered_resps"] for sample in found["samples"]["own_choice"]}
    for i, (question, choices, _) in enumerate(CHOICES):
        texts = [f" {choice}" for choice in choices]
        own = llama.score([question] * len(texts), texts)
        assert [float(score) for score, _ in scores[i]] == pytest.approx([score["sum"] for score in own], abs=1e-3)
        assert all(math.isfinite(score) for score, _ in scores[i])


def test_generate_until_equals_the_library(llama, folder):
    """Prompts are texts, without a tokenizer; `eos_string` is a stop string like others."""
    with serving(llama) as client:
        found = served(client.url, folder, False, model={"eos_string": "</s>"}, tasks=["own_written"])
    prompts = [question for question, _, _ in CHOICES]
    own = llama.text_completion(prompts, temperature=0, max_gen_len=12, stop=["\n", ".", "</s>"])
    samples = sorted(found["samples"]["own_written"], key=lambda sample: sample["doc_id"])
    assert [sample["resps"][0][0] for sample in samples] == [row["generation"] for row in own]
