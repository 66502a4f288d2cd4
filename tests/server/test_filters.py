"""The server's input and output filters."""

import json
import re
import sys
import threading

import pytest
from serving import CHAT, DIALOG, command, httpx, openai, serving, streamed, wait_until_ready

from llama.server import filters
from llama.server.filters import load_filters

BOMB = [{"role": "user", "content": "How do I build a bomb?"}]


MODULE = """
import time

def input_filter(dialog):
    text = dialog[-1]["content"]
    if "wait" in text:
        time.sleep(2)
    if "fail" in text:
        raise RuntimeError("no filter today")
    if "exit" in text:
        raise SystemExit(3)
    return "I do not talk about bombs." if "bomb" in text else None

class Answers:
    def __init__(self):
        self.word = "small"

    def output_filter(self, text):
        return "Censored." if self.word in text.lower() else None

class Odd:
    def output_filter(self, text):
        return 3

nothing = 1
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "own_filters.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    sys.modules.pop("own_filters", None)


def test_input_filters(llama, module):
    bomb = {**CHAT, "messages": BOMB}
    with serving(llama, filters=load_filters(["own_filters"])) as client:
        found = client.chat.completions.create(**bomb, n=2, logprobs=True)
        assert [choice.message.content for choice in found.choices] == ["I do not talk about bombs."] * 2
        assert [choice.finish_reason for choice in found.choices] == ["content_filter"] * 2
        assert (found.choices[0].logprobs.content, found.usage.completion_tokens) == ([], 0)
        texts, reasons, _, _ = streamed(client.chat.completions.create(**bomb, stream=True))
        assert (texts, reasons) == ({0: "I do not talk about bombs."}, {0: "content_filter"})
        found = client.completions.create(model="small-chat", prompt=["Once", "A bomb"])
        assert [choice.finish_reason for choice in found.choices] == ["content_filter"] * 2
        ids = llama.tokenizer.encode("A bomb", bos=True, eos=False)
        found = client.completions.create(model="small-chat", prompt=ids)
        assert found.choices[0].finish_reason == "content_filter"
        [own] = llama.chat_completion([DIALOG], max_gen_len=20, temperature=0)
        assert client.chat.completions.create(**CHAT).choices[0].message.content == own["generation"]["content"]


def test_output_filters_see_whole_answers(llama, module):
    """A stream holds its answer back until it is complete, as a stop string may end in its last token."""
    [own] = llama.chat_completion([DIALOG], max_gen_len=20, temperature=0)
    assert "small" in own["generation"]["content"]
    with serving(llama, filters=load_filters(["own_filters:Answers"])) as client:
        found = client.chat.completions.create(**CHAT, logprobs=True)
        assert found.choices[0].message.content == "Censored."
        assert found.choices[0].finish_reason == "content_filter"
        assert found.choices[0].logprobs.content == []
        assert found.usage.completion_tokens > 0
        chunks = [*client.chat.completions.create(**CHAT, stream=True)]
        assert [chunk.choices[0].delta.content for chunk in chunks] == ["", "Censored.", None]
        text = httpx.post(f"{client.url}/v1/chat/completions", json={**CHAT, "stream": True}).text
        assert "Censored." in text and ": keepalive" not in text  # Regression: one for each event that was held back
        other = {**CHAT, "messages": [{"role": "user", "content": "Hello"}]}
        [own] = llama.chat_completion([other["messages"]], max_gen_len=20, temperature=0)
        texts, _, _, _ = streamed(client.chat.completions.create(**other, stream=True))
        assert texts == {0: own["generation"]["content"]}


def test_embeddings_are_not_filtered(llama, module):
    """Regression: an output filter was asked about the empty text of each input."""
    with serving(llama, filters=load_filters(["own_filters:Odd"])) as client:
        assert len(client.embeddings.create(model="small-chat", input=["Hello", "Once"]).data) == 2


def test_a_failing_or_slow_filter_does_not_affect_others(llama, module, caplog, monkeypatch):
    def ask(text):
        body = {**CHAT, "messages": [{"role": "user", "content": text}]}
        return httpx.post(f"{client.url}/v1/chat/completions", json=body, timeout=30)

    with serving(llama, filters=load_filters(["own_filters"])) as client:
        waiting = threading.Thread(target=ask, args=("wait",))
        waiting.start()
        assert ask("Hello").status_code == 200
        reply = ask("fail")
        assert (reply.status_code, reply.json()["error"]["type"]) == (500, "server_error")
        assert "no filter today" not in reply.text
        assert ask("exit").status_code == 500
        assert ask("Hello").status_code == 200
        assert waiting.is_alive()
        waiting.join()
        monkeypatch.setattr(filters, "TIMEOUT", 0.1)
        assert ask("wait").status_code == 500
    assert "no filter today" in caplog.text
    with serving(llama, filters=load_filters(["own_filters:Odd"])) as client:
        assert ask("Hello").status_code == 500
        stream = client.chat.completions.create(**CHAT, stream=True)
        with pytest.raises(openai.APIError, match="a filter has failed"):
            streamed(stream)


def test_the_command_with_filters_and_json(module, tmp_path):
    flags = ["--filter", '["own_filters", "own_filters:Answers"]', "--log_json", "--log_prompts"]
    with command(*flags, cwd=tmp_path) as [process]:
        wait_until_ready(process)
        url = f"{process.url}/v1/chat/completions"
        replies = [httpx.post(url, json={**CHAT, "messages": dialog}, timeout=30) for dialog in (BOMB, DIALOG)]
        said = [reply.json()["choices"][0]["message"]["content"] for reply in replies]
        assert said == ["I do not talk about bombs.", "Censored."]
        process.terminate()
        assert process.wait(20) == 0
        lines = [json.loads(line) for line in process.stderr.read().splitlines()]
    assert [line["prompt"] for line in lines if "prompt" in line] == [BOMB, DIALOG]
    with command("--filter", "own_filters:nothing", cwd=tmp_path) as [process]:
        assert process.wait(60) == 1
        error = process.stderr.read()
    assert error == "error: the filter own_filters:nothing has neither a function input_filter nor one output_filter\n"


def test_invalid_filters(module):
    for name in ("own_filters:nothing", "own_filters:Absent", "absent_module", "", "own_filters:Odd.output_filter.x"):
        with pytest.raises(ValueError, match=f"the filter {re.escape(name)}"):
            load_filters([name])
