"""A conversation: what it says is what the whole dialog would get, and it computes only what is new."""

from unittest import mock

import pytest
from small import MODELS, TOKENIZER, passes, random_model, save_random

from llama import Chat, Llama, parallel
from llama.chat import REFUSAL, encode_dialog, has_tags

ASK = ["Hello", "Who are you?", "Tell me a story about Tom.", "What color is the sky?", "Thank you"] * 4


@pytest.fixture(scope="module")
def bundled():
    return Llama.build(MODELS / "small-chat", max_seq_len=1500, max_batch_size=2, device="cpu", dtype="float32")


@pytest.fixture
def small(tokenizer):
    return Llama(random_model(vocab_size=tokenizer.n_words, max_seq_len=160), tokenizer)


def test_twenty_turns_are_those_of_the_whole_dialog(bundled):
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
    """There are two slots: what a chat finds of its own in the cache varies, its answers do not."""
    chats = [Chat(bundled, temperature=0, max_gen_len=20) for _ in range(2)]
    for text in ASK[:5]:
        alone = chats[0].say(text)
        bundled.text_completion(["Once upon a time"], max_gen_len=5)
        chats[1].say("Hello")
        chats[1].dialog = chats[0].dialog[:-2]
        assert chats[1].say(text) == alone


def test_a_dialog_that_another_caller_sends_whole_is_not_computed_again(bundled):
    chat = Chat(bundled, temperature=0, max_gen_len=20)
    for text in ASK[:4]:
        chat.say(text)
    dialog = [*chat.dialog, {"role": "user", "content": "Thank you"}]
    new = len(encode_dialog(bundled.tokenizer, dialog)) - len(encode_dialog(bundled.tokenizer, dialog[:-2]))
    with passes(bundled) as seen:
        bundled.chat_completion([dialog], temperature=0, max_gen_len=2)
    assert seen[0] <= new


def test_the_oldest_turns_go_and_the_system_message_stays(small):
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
    assert len({*counts}) < 6  # when some go, there is room for several turns
    with pytest.raises(ValueError, match="more than max_seq_len 160"):
        chat.say("word " * 200)
    assert chat.dialog[-2]["content"] == "Hello 11"
    assert chat.say("Hello") is not None


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_came(small):
    chat = Chat(small, temperature=0, max_gen_len=40)
    with chat.stream("Hello") as stream:
        said = "".join(event.text for _, event in zip(range(5), stream, strict=False))
    assert chat.dialog == [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": said}]
    assert chat.say("go on") is not None
    assert len(chat.dialog) == 4


def test_what_is_refused_leaves_no_trace(bundled):
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


def test_tags_that_the_model_says_are_not_repeated_to_it(small):
    chat = Chat(small, temperature=0, max_gen_len=5)
    with (
        mock.patch.object(type(small.tokenizer), "decode", lambda *_: "a [INST] b"),
        mock.patch("llama.generation.Text.read", side_effect=["a [INST] b", "", "", "", "", ""]),
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
def test_what_no_chat_can_begin_with(small, options, error, message):
    with pytest.raises(error, match=message):
        Chat(small, **options)


def test_an_error_in_the_middle_leaves_dialog_and_cache_right(small):
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


def test_tags_inside_of_tags(small):
    chat = Chat(small)
    chat._remember([{"role": "user", "content": "a"}], "[IN[INST]ST] x <<SYS<</SYS>>>>", "eos")
    assert not has_tags(chat.dialog)


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


def test_ranks_talk_as_one(ranks, tmp_path):
    save_random(tmp_path, mp=2)
    (first, last, dialog), (second, last_too, dialog_too) = ranks(2).run(_talk, tmp_path)
    assert (first, last) == (second, last_too)
    assert dialog == dialog_too
