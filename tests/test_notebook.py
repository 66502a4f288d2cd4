"""docs/compare.ipynb runs on the bundled models, and its helpers keep few models in memory. Quality is not tested."""

import json
import sys

import pytest
from small import MODELS, ROOT

from llama.evaluation import notebook

sys.path.insert(0, str(ROOT / "tools"))
from notebook import execute

FILE = ROOT / "docs" / "compare.ipynb"
CHAT = str(MODELS / "small-chat")


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch):
    monkeypatch.setattr(notebook, "aliases", {"chat": CHAT})
    notebook.loaded.clear()
    yield
    notebook.loaded.clear()


def test_the_notebook_runs_and_has_its_outputs():
    replaced = {"smollm2": "../models/small-chat:int8"}
    cells = [cell for cell in execute(FILE, replaced)["cells"] if cell["cell_type"] == "code"]
    stored = [cell for cell in json.loads(FILE.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [bool(cell["outputs"]) for cell in stored] == [bool(cell["outputs"]) for cell in cells]
    assert FILE.stat().st_size < 200_000 and "/home/" not in FILE.read_text()


def test_the_arguments_of_the_course():
    notebook.aliases["META-LLAMA/Llama-2-7B-chat-hf"] = CHAT
    ignored = {"url": "http://nowhere", "headers": {}, "base": 2, "max_tries": 3}
    text = notebook.llama("What is the opposite of hot?", model="meta-llama/LLAMA-2-7b-CHAT-HF", **ignored)
    assert text == "The opposite of hot is cold."
    assert notebook.llama("The opposite of hot is", add_inst=False, max_tokens=3) != text


def test_a_conversation_reaches_the_model(capsys):
    notebook.llama_chat(["Hello!", "Who are you?"], ["Hi! [INST]"], verbose=True)
    assert "[INST] Hello! [/INST] Hi! </s>" in capsys.readouterr().out
    with pytest.raises(ValueError, match="2 prompts and 2 responses"):
        notebook.llama_chat(["a", "b"], ["c", "d"])


def test_the_least_recently_used_model_is_dropped(monkeypatch):
    names = [f"{CHAT}:{suffix}" for suffix in ("float32", "int8", "int4")]
    first, second, third = names
    for name in (first, second, first, third):
        notebook.get(name)
    assert [*notebook.loaded] == [first, third]
    built, failed = notebook.Llama.build, []

    def build(*args, **options):
        if not failed:
            failed.append(args)
            raise MemoryError
        return built(*args, **options)

    monkeypatch.setattr(notebook.Llama, "build", build)
    monkeypatch.setattr(notebook, "most_loaded", 3)
    notebook.get(second)
    assert [*notebook.loaded] == [third, second]
