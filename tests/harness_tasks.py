"""Our own small tasks for lm-evaluation-harness, one of each output type, which need no data set from the Hub."""

import json

import pytest

QUESTIONS = [
    ("The opposite of hot is", ["cold", "small", "wet"], 0),
    ("The opposite of big is", ["red", "small", "high"], 1),
    ("3 + 4 =", ["7", "8", "12"], 0),
    ("A sheep is bigger than a", ["house", "mouse", "mountain"], 1),
    ("Snow is", ["white and cold", "white and hot", "green"], 0),
    ("In the evening the sun", ["rises", "sings", "goes down"], 2),
    ("Les élèves vont à l'", ["école", "eau 🐟", "été"], 0),
    ("", ["Once upon a time", "zzz"], 0),
]
TEXTS = ["Once upon a time, there was a little fox.", "The sun was warm. " * 30, "Été 🐈 x"]
TASKS = {
    "own_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "own_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "own_written": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": [".", "\n"], "max_gen_toks": 12},
        # The harness's `hf` drops the space that begins a continuation of a Llama 2 model; a server sends it.
        "filter_list": [{"name": "text", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
        "metric_list": [{"metric": "exact_match", "ignore_case": True}],
    },
}


def write_tasks(folder, questions=QUESTIONS):
    """The tasks as YAML files, for `include_path`."""
    import yaml

    asked = [{"question": q, "choices": choices, "answer": right} for q, choices, right in questions]
    for name, rows in {"questions": asked, "texts": [{"text": text} for text in TEXTS]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in TASKS.items():
        data = str(folder / ("texts.jsonl" if name == "own_rolling" else "questions.jsonl"))
        common = {"task": name, "dataset_path": "json", "test_split": "test", "fewshot_split": "test"}
        common |= {"dataset_kwargs": {"data_files": {"test": data}}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(common | task))
    return folder


def evaluated(model, folder, **options):
    """The harness's results for all tasks of a folder."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    options = {"tasks": [*TASKS], "bootstrap_iters": 0, **options}
    return lm_eval.simple_evaluate(model, task_manager=manager, **options)


def check_equal(found, expected, rel=0.0):
    """Compare results: metrics are equal; log likelihoods differ by at most 1e-4, or `rel` of their value, and those of
    whole texts, which are sums of hundreds, by a millionth."""
    assert {*found["results"]} == {*expected["results"]}
    for task, metrics in expected["results"].items():
        for metric, value in metrics.items():
            if isinstance(value, float):
                assert found["results"][task][metric] == pytest.approx(value, rel=1e-5), (task, metric)
    for task, samples in expected["samples"].items():
        mine = {sample["doc_id"]: sample["filtered_resps"] for sample in found["samples"][task]}
        for sample in samples:
            for x, y in zip(mine[sample["doc_id"]], sample["filtered_resps"], strict=True):
                if isinstance(y, (tuple, list)):
                    assert x[0] == pytest.approx(y[0], rel=rel, abs=1e-4) and str(x[1]) == str(y[1])
                elif isinstance(y, float):
                    assert x == pytest.approx(y, rel=max(rel, 1e-6), abs=1e-4)
                else:  # bytes that are no character: SentencePiece and Hugging Face's tokenizers show them differently
                    assert x.partition("\ufffd")[0] == y.partition("\ufffd")[0]
