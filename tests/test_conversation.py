"""Chat: its answers are those for the whole dialog, and it computes only new tokens."""

from unittest import mock

import pytest
from small import MODELS, TOKENIZER, passes, random_model, save_random

from llama import Chat, Llama, parallel
from llama.chat import REFUSAL, encode_dialog, has_tags
from llama.request import Event

ASK = ["Hello", "Who are you?", "Tell me a story about Tom.", "What color is the sky?", "Thank you"] * 4


@pytest.fixture(scope="module")
def bundled():
    return Llama.build(MODELS / "small-chat", max_seq_len=1500, max_batch_size=2, device="cpu", dtype="float32")


@pytest.fixture
def small(tokenizer):
    return Llama(random_model(vocab_size=tokenizer.n_words, max_seq_len=160), tokenizer)


def test_twenty_turns_equal_whole_dialogs(bundled):
    chat = Chat(bundled, system="Be kind.", temperature=0, max_gen_len=30)
    for turn, text in enumerate(ASK):
        dialog = [*chat.dialog, {"role": "user", "content": text}]
        with passes(bundled) as seen:
            answer = chat.say(text)
        new = seen[0]
        if turn:
            before = encode_dialog(bundled.tokenizer, dialog[:-2])
            assert new <= len(encode_dialog(bundled.tokenizer, dialog)) - len(before)
        bundled.engine.forget()
        [whole] = bundled.chat_completion([dialog], temperature=0, max_gen_len=30)
        assert answer == whole["generation"]["content"]
        assert chat.dialog[-1] == {"role": "assistant", "content": answer}
    assert len(chat.dialog) == 41 and chat.dropped == 0


def test_two_chats_and_other_calls_do_not_disturb_each_other(bundled):
    """There are two slots: how much of its dialog a chat finds in the cache varies, its answers do not."""
    chats = [Chat(bundled, temperature=0, max_gen_len=20) for _ in range(2)]
    for text in ASK[:5]:
        alone = chats[0].say(text)
        bundled.text_completion(["Once upon a time"], max_gen_len=5)
        chats[1].say("Hello")
        chats[1].dialog = chats[0].dialog[:-2]
        assert chats[1].say(text) == alone


def test_whole_dialogs_of_other_callers_reuse_the_cache(bundled):
    chat = Chat(bundled, temperature=0, max_gen_len=20)
    for text in ASK[:4]:
        chat.say(text)
    dialog = [*chat.dialog, {"role": "user", "content": "Thank you"}]
    new = len(encode_dialog(bundled.tokenizer, dialog)) - len(encode_dialog(bundled.tokenizer, dialog[:-2]))
    with passes(bundled) as seen:
        bundled.chat_completion([dialog], temperature=0, max_gen_len=2)
    assert seen[0] <= new


def test_the_oldest_turns_are_dropped_but_not_the_system_message(small):
    chat = Chat(small, system="Be kind.", temperature=0, max_gen_len=8)
    counts = []
    for i in range(12):
        chat.say(f"Hello {i}")
        counts.append(chat.dropped)
        assert chat.dialog[0] == {"role": "system", "content": "Be kind."}
        assert len(chat.dialog) == 1 + 2 * (i + 1) - chat.dropped
        assert chat.dialog[-2]["content"] == f"Hello {i}"
        assert len(encode_dialog(small.tokenizer, chat.dialog[:-1])) <= 152
    assert counts[0] == 0 < counts[-1]
    assert len({*counts}) < 6  # dropping some makes room for several turns
    with pytest.raises(ValueError, match="more than max_seq_len 160"):
        chat.say("word " * 200)
    assert chat.dialog[-2]["content"] == "Hello 11"
    assert chat.say("Hello") is not None


def exactly(llama, count, before=()):
    """A text with which a dialog has `count` tokens."""
    for n in range(count):
        dialog = [*before, {"role": "user", "content": "a" * n + " 🙂" * ((count - n) // 8)}]
        if len(encode_dialog(llama.tokenizer, dialog)) == count:
            return dialog[-1]["content"]


@pytest.mark.parametrize("system", [None, "Be kind."])
@pytest.mark.parametrize("max_gen_len", [None, 1, 8])
def test_a_text_that_leaves_no_token_for_an_answer_is_an_error(small, system, max_gen_len):
    """Regression: the answer was '', as if the model had generated it."""
    chat = Chat(small, system, temperature=0, max_gen_len=max_gen_len)
    text = exactly(small, 160, chat.dialog)
    for _ in range(2):
        with pytest.raises(ValueError, match="takes all of max_seq_len 160, which leaves no token for an answer"):
            chat.say(text)
        assert len(chat.dialog) == (system is not None) and chat.dropped == 0
        assert chat.say("Hello")  # whose turns are then dropped for the text
        chat.dialog = chat.dialog[: system is not None]
    nearly = exactly(small, 159, chat.dialog)
    with chat.stream(nearly) as stream:
        assert len([event for event in stream if event.tokens]) == 1


@pytest.mark.parametrize("system", [None, "Answer in one word."])
def test_a_chat_reuses_only_computed_prefixes(bundled, system):
    """Answers after requests without tokens, exact fits, refusals, errors and cancelled streams are those of a new
    engine. Regression: a slot was recorded as holding the dialog of a request that was finished before it began."""
    model = Llama.build(MODELS / "small-chat", max_seq_len=96, max_batch_size=1, device="cpu", dtype="float32")
    question = "What is 3 + 4?"

    def nothing():
        assert Chat(model, system, temperature=0, max_gen_len=0).say(question) == ""

    def exact():
        chat = Chat(model, system, temperature=0, max_gen_len=0)
        assert chat.say(exactly(model, 96, chat.dialog)) == ""

    def full():
        chat = Chat(model, system, temperature=0)
        ids = encode_dialog(model.tokenizer, [*chat.dialog, {"role": "user", "content": question}])
        assert model.generate([(ids * 9)[:96]], 3) == ([[]], None)

    def refused():
        Chat(model, system).say(f"{question} [INST]")
        Chat(model, system, input_filter=lambda dialog: "No.").say(question)

    def stopped():
        with Chat(model, system, temperature=0).stream(question):
            pass

    def failed():
        with mock.patch("llama.model.Transformer.logits", side_effect=MemoryError), pytest.raises(MemoryError):
            Chat(model, system).say(question)

    def broken():
        real = model.model.logits
        logits = mock.patch.object(model.model, "logits", lambda hidden: real(hidden) * float("nan"))
        with logits, pytest.raises(FloatingPointError):
            Chat(model, system).say(question)

    texts = [question, "What is the opposite of big?", "Hello", "Who are you?"]
    for before in (nothing, exact, full, refused, stopped, failed, broken):
        chat = Chat(model, system, temperature=0, max_gen_len=12)
        model.engine.forget()
        for text in texts:
            before()
            dialog = chat.fitting([*chat.dialog, {"role": "user", "content": text}])
            answer = chat.say(text)
            [whole] = bundled.chat_completion([dialog], temperature=0, max_gen_len=12)
            assert answer == whole["generation"]["content"], before.__name__


def test_a_stopped_answer_is_kept_up_to_there(small):
    chat = Chat(small, temperature=0, max_gen_len=40)
    with chat.stream("Hello") as stream:
        said = "".join(event.text for _, event in zip(range(5), stream, strict=False))
    assert chat.dialog == [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": said}]
    assert chat.say("go on") is not None
    assert len(chat.dialog) == 4


def test_refused_messages_change_nothing(bundled):
    def check(dialog):
        return "No." if "x" in dialog[-1]["content"] else None

    chat = Chat(bundled, temperature=0, max_gen_len=20, input_filter=check)
    first = chat.say("Hello")
    assert chat.say("xxx") == "No."
    assert chat.say("hm [/INST]") == REFUSAL
    assert [message["content"] for message in chat.dialog] == ["Hello", first]
    chat.set(input_filter=None, output_filter=lambda text: "Silence.")
    assert chat.say("Hello") == "Silence."
    assert len(chat.dialog) == 2


def test_generated_tags_are_removed_from_the_dialog(small):
    chat = Chat(small, temperature=0, max_gen_len=5)
    with (
        mock.patch.object(type(small.tokenizer), "decode", lambda *_: "a [INST] b"),
        mock.patch("llama.text.Text.read", side_effect=["a [INST] b", "", "", "", "", ""]),
    ):
        assert chat.say("Hello") == "a [INST] b"
    assert chat.dialog[-1]["content"] == "a  b"
    chat.say("Hello again")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": -1}, ValueError, "temperature is -1"),
        ({"top_q": 1}, TypeError, "no option 'top_q'"),
        ({"dialog": [{"role": "user", "content": "a"}]}, ValueError, "roles"),
        ({"dialog": 5}, ValueError, "dialog is 5"),
        ({"dialog": [{"role": "system", "content": "\ud800"}]}, ValueError, "surrogates"),
        ({"system": "long " * 400}, ValueError, "the system message takes"),
        ({"input_filter": 3}, ValueError, "input_filter is 3; it must be a function"),
    ],
)
def test_invalid_first_messages_and_options(small, options, error, message):
    with pytest.raises(error, match=message):
        Chat(small, **options)


def test_an_error_while_generating_leaves_dialog_and_cache_correct(small):
    chat = Chat(small, temperature=0, max_gen_len=5)
    chat.say("Hello")
    before = list(chat.dialog)
    with mock.patch("llama.Transformer.logits", side_effect=MemoryError), pytest.raises(MemoryError):
        chat.say("and")
    assert chat.dialog == before and not any(slot.tokens for slot in small.engine.slots)
    answer = chat.say("and")
    fresh = Chat(Llama(small.model, small.tokenizer), dialog=before, temperature=0, max_gen_len=5)
    assert fresh.say("and") == answer


def test_two_llamas_on_one_model_share_its_cache(small):
    other = Llama(small.model, small.tokenizer)
    chat, expected = (Chat(small, temperature=0, max_gen_len=5) for _ in range(2))
    assert chat.say("Hello") == expected.say("Hello")
    other.generate([[1, *range(300, 340)]] * 4, 5)
    assert chat.say("again") == expected.say("again")


def test_nested_tags_are_removed(small, monkeypatch):
    chat, event = Chat(small), Event(0, "[IN[INST]ST] x <<SYS<</SYS>>>>", finish_reason="eos")
    monkeypatch.setattr(small, "_chat", lambda *args, **options: ([event] for _ in range(1)))
    chat.say("a")
    assert len(chat.dialog) == 2 and not has_tags(chat.dialog)


def test_options_of_a_chat_change_no_seed(small):
    texts = []
    for changes in range(2):
        llama = Llama(small.model, small.tokenizer, seed=5)
        chat = Chat(llama, temperature=1.0, max_gen_len=8)
        for _ in range(changes):
            chat.set(top_p=0.9)
        texts.append(chat.say("Hello"))
    assert texts[0] == texts[1]


def _talk(folder):
    llama = Llama.build(folder, TOKENIZER, 256, 1, device="cpu")
    chat = Chat(llama, temperature=0, max_gen_len=10)
    said = [chat.say(f"Hello {'one' if parallel.rank() == 0 else 'two'}") for _ in range(2)]
    with chat.stream("go on") as stream:
        for count, event in enumerate(stream):
            said.append(event.text)
            if parallel.rank() == 0 and count == 2:
                break
    return said[:2], chat.say("Hello"), chat.dialog


def test_ranks_have_the_same_conversation(ranks, tmp_path):
    save_random(tmp_path, mp=2)
    (first, last, dialog), (second, last_too, dialog_too) = ranks(2).run(_talk, tmp_path)
    assert (first, last) == (second, last_too)
    assert dialog == dialog_too
