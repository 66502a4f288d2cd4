"""lm-evaluation-harness against the server: its log likelihoods are those of `Llama.score`."""

import json
import math

import pytest
from serving import build, serving
from small import MODELS

from llama.checkpoint.convert import convert

lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("aiohttp")
pytest.importorskip("tenacity")

from lm_eval.tasks import TaskManager  # noqa: E402

ASKED = "What is the opposite of big?"
CHOICES = [
    {"question": "The opposite of hot is", "choices": ["cold", "a little dog", "big"], "answer": 0},
    {"question": "The opposite of big is", "choices": ["small", "big", "the old tree"], "answer": 0},
    {"question": "Once upon a time there was", "choices": ["a little girl", "seven"], "answer": 0},
    {"question": "Question: Who are you?\nAnswer:", "choices": ["A cat.", "x", "yes yes yes"], "answer": 1},
    # The first is followed by EOS, which is no token of an answer.
    {"question": f"[INST] {ASKED} [/INST]", "choices": ["The opposite of big is small.", "Big."], "answer": 0},
]
TASKS = {
    "own_choices": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
""",
    "own_answers": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n", "."], max_gen_toks: 12, do_sample: false, temperature: 0}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def llama():
    return build()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tasks, and the tokenizer as transformers reads it."""
    folder = tmp_path_factory.mktemp("lm_eval")
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHOICES))
    source = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'data.jsonl'}}}}}\ntest_split: test\n"
    )
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{source}{task.lstrip()}")
    convert(MODELS / "small-chat", folder / "hf", "hf", 1, None)
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))


def samples(url, folder, task, **more):
    """The samples of a task."""
    args = {"model": "small-chat", "base_url": f"{url}/v1/completions", "max_length": 256, **more}
    found = lm_eval.simple_evaluate(
        model="local-completions",
        model_args=",".join(f"{name}={value}" for name, value in args.items()),
        tasks=[task],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    return sorted(found["samples"][task], key=lambda sample: sample["doc_id"])


@pytest.mark.parametrize("more", [{}, {"batch_size": 3}, {"num_concurrent": 4}], ids=["one", "batch", "concurrent"])
def test_log_likelihoods_are_the_librarys(llama, folder, more):
    with serving(llama) as client:
        tokenizer = {"tokenizer_backend": "huggingface", "tokenizer": folder / "hf", "add_bos_token": True}
        found = samples(client.url, folder, "own_choices", **tokenizer, **more)
    for row, sample in zip(CHOICES, found, strict=True):
        texts = [f" {choice}" for choice in row["choices"]]
        own = llama.score([row["question"]] * len(texts), texts, top_logprobs=1)
        greedy = [
            all(best == logprob for [(_, best)], logprob in zip(score["top_logprobs"], score["logprobs"], strict=True))
            for score in own
        ]
        [theirs] = [sample["filtered_resps"]]
        assert [float(score) for score, _ in theirs] == pytest.approx([score["sum"] for score in own], abs=1e-3)
        assert [str(is_greedy) for _, is_greedy in theirs] == [*map(str, greedy)]
        best = max(range(len(own)), key=lambda i: own[i]["sum"])
        assert sample["acc"] == float(best == row["answer"])
        assert all(math.isfinite(score) for score, _ in theirs)


def test_answers_are_the_librarys(llama, folder):
    """Without a tokenizer, as texts; `eos_string` is a stop string like others."""
    with serving(llama) as client:
        found = samples(client.url, folder, "own_answers", tokenizer_backend="None", eos_string="</s>")
    prompts = [row["question"] for row in CHOICES]
    own = llama.text_completion(prompts, temperature=0, max_gen_len=12, stop=["\n", ".", "</s>"])
    assert [sample["resps"][0][0] for sample in found] == [row["generation"] for row in own]
