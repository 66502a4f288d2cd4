"""Filters of the input and output of chats."""

import pytest
from small import MODELS, passes

from llama import Llama


@pytest.fixture(scope="module")
def bundled():
    return Llama.build(MODELS / "small-chat", max_seq_len=512, max_batch_size=4, device="cpu", dtype="float32")


def refuse_input(dialog):
    return "Not that." if "bomb" in dialog[-1]["content"] else None


def refuse_output(text):
    return "I said nothing." if "a" in text else None


def test_filters(bundled):
    good = [{"role": "user", "content": "Hello"}]
    bad = [{"role": "user", "content": "a bomb"}]
    options = {"temperature": 0, "max_gen_len": 10}
    [plain] = bundled.chat_completion([good], **options)
    results = bundled.chat_completion([bad, good, bad], input_filter=refuse_input, **options)
    assert [result["generation"]["content"] for result in results] == [
        "Not that.",
        plain["generation"]["content"],
        "Not that.",
    ]
    assert [result["finish_reason"] for result in results] == ["refused", plain["finish_reason"], "refused"]
    [silenced] = bundled.chat_completion([good], output_filter=lambda text: "No." if text else None, **options)
    assert silenced["generation"]["content"] == "No."
    [allowed] = bundled.chat_completion([good], output_filter=lambda text: None, **options)
    assert allowed == plain
    events = list(bundled.chat_stream([good], output_filter=lambda text: None, **options))
    assert [event.text for event in events] == [plain["generation"]["content"]]  # held back until it was checked


def test_filters_by_their_old_names(bundled):
    good = [{"role": "user", "content": "Hello"}]
    with pytest.warns(DeprecationWarning, match="judge_output is now called output_filter"):
        [result] = bundled.chat_completion([good], max_gen_len=2, judge_output=lambda text: "No.")
    assert result["generation"]["content"] == "No."
    with pytest.warns(DeprecationWarning, match="judge_input is now called input_filter"):
        assert next(bundled.chat_stream([good], judge_input=lambda dialog: "No.")).text == "No."


def test_refused_inputs_are_not_generated(bundled):
    with passes(bundled) as seen:
        [result] = bundled.chat_completion([[{"role": "user", "content": "a bomb"}]], input_filter=refuse_input)
    assert result == {"generation": {"role": "assistant", "content": "Not that."}, "finish_reason": "refused"}
    assert seen == []
