"""Streams of text and tokens: results, closing, and threads that share passes."""

import gc
import threading

import pytest
from small import MODELS, PROMPTS, passes, random_model

from llama import Llama, engine


@pytest.fixture(scope="module")
def llama(tokenizer):
    return Llama(random_model(vocab_size=tokenizer.n_words, max_batch_size=8), tokenizer)


@pytest.fixture(scope="module")
def bundled():
    return Llama.build(MODELS / "small-chat", max_seq_len=512, max_batch_size=4, device="cpu", dtype="float32")


def joined(stream, B):
    rows = [("", [], [], None) for _ in range(B)]
    for event in stream:
        text, ids, logprobs, finish = rows[event.row]
        assert finish is None, "nothing comes after the end"
        rows[event.row] = (text + event.text, ids + event.tokens, logprobs + event.logprobs, event.finish_reason)
    return rows


@pytest.mark.parametrize("echo", [False, True])
def test_a_stream_equals_the_completion(llama, echo):
    prompts, options = ["Hello", "", "a b c"], {"temperature": 0.9, "seed": 5, "echo": echo, "logprobs": True}
    whole = llama.text_completion(prompts, max_gen_len=20, **options)
    events = list(llama.text_stream(prompts, max_gen_len=20, **options))
    assert len(events) >= 60
    rows = joined(events, 3)
    assert [row[0] for row in rows] == [result["generation"] for result in whole]
    assert [row[2] for row in rows] == [result["logprobs"] for result in whole]
    assert [row[3] for row in rows] == ["length"] * 3
    for (text, ids, _, _), prompt, result in zip(rows, prompts, whole, strict=True):
        before = [] if echo else llama.tokenizer.encode(prompt, bos=True, eos=False)
        assert text == "".join(result["tokens"]) == llama.tokenizer.decode(before + ids)[len("" if echo else prompt) :]
    ids, _ = llama.generate([[1, 2, 3]], 9, **options | {"echo": False, "logprobs": False})
    assert [row[1] for row in joined(llama.generate_stream([[1, 2, 3]], 9, temperature=0.9, seed=5), 1)] == ids


def test_a_chat_stream_equals_the_chat_completion(bundled):
    dialogs = [[{"role": "user", "content": text}] for text in ("Hello", "Who are you?")]
    whole = bundled.chat_completion(dialogs, temperature=0, max_gen_len=30)
    rows = joined(bundled.chat_stream(dialogs, temperature=0, max_gen_len=30), 2)
    assert [row[0] for row in rows] == [result["generation"]["content"] for result in whole]
    assert [row[3] for row in rows] == [result["finish_reason"] for result in whole]


def test_streams_share_passes(llama):
    """Two may be open during other calls; each gets what it would get alone."""
    prompts = [PROMPTS[:2], PROMPTS[2:3], PROMPTS[3:]]
    alone = [llama.generate(some, 12, temperature=0)[0] for some in prompts]
    llama.engine.forget()
    first, second = (llama.generate_stream(some, 12, temperature=0) for some in prompts[:2])
    found = [next(first)]
    with passes(llama) as seen:
        third = llama.generate(prompts[2], 12, temperature=0)[0]
    assert seen[1:-2] == [4] * (len(seen) - 3)  # each in a pass with both streams
    found += [*first]
    assert [[id for event in found if event.row == row for id in event.tokens] for row in (0, 1)] == alone[0]
    assert [row.tokens for row in second.drain()] == alone[1]
    assert third == alone[2]


def test_a_stream_that_is_closed_frees_its_slots(llama):
    stream = llama.generate_stream(PROMPTS * 2, 30, temperature=0)
    next(stream)
    stream.close()
    assert list(stream) == []
    with llama.generate_stream(PROMPTS, 30, temperature=0) as stream:
        next(stream)
    llama.generate_stream(PROMPTS, 30)  # never read, and freed at once
    with passes(llama) as seen:
        assert llama.generate([[1]], 3, temperature=0)[0] == llama.generate([[1]], 3, temperature=0)[0]
    assert max(seen) == 1
    assert not any(slot.request for slot in llama.engine.slots) and not llama.engine.waiting


def test_a_stream_in_a_reference_cycle_is_collected(bundled):
    class App:
        def check(self, text):
            return None

        def ask(self):
            self.stream = bundled.chat_stream([[{"role": "user", "content": "Hi"}]], output_filter=self.check)

    app = App()
    app.ask()
    del app
    gc.collect()
    assert bundled.text_completion(["a"], max_gen_len=1)


def test_a_stream_that_could_not_be_closed_can_be_later(llama, monkeypatch):
    stream, real = llama.generate_stream(PROMPTS, 30, temperature=0), engine.choose
    entered, leave = threading.Event(), threading.Event()

    def wait(*args):
        entered.set()
        leave.wait(10)
        return real(*args)

    monkeypatch.setattr(engine, "choose", wait)
    reader = threading.Thread(target=lambda: [next(stream) for _ in range(6)])
    reader.start()
    entered.wait(10)
    with pytest.raises(ValueError, match="generator already executing"):
        stream.close()
    leave.set()
    reader.join()
    stream.close()
    assert llama.generate([[1]], 3, temperature=0)


def test_finish_reasons(llama, monkeypatch):
    ids = llama.generate([PROMPTS[0]], 10, temperature=0)[0][0]
    assert joined(llama.generate_stream([PROMPTS[0]], 0), 1)[0][3] == "length"
    assert joined(llama.generate_stream([PROMPTS[0]], 4, 0, stop_token_ids=[ids[2]]), 1)[0][1:] == (ids[:2], [], "stop")
    monkeypatch.setattr(llama.tokenizer, "eos_ids", {ids[3]})
    assert joined(llama.generate_stream([PROMPTS[0]], 9, 0), 1)[0][1:] == (ids[: ids.index(ids[3])], [], "eos")


def test_a_stream_read_by_several_threads(llama):
    expected = llama.generate(PROMPTS, 30, 0)[0]
    streams = []
    thread = threading.Thread(target=lambda: streams.append(llama.generate_stream(PROMPTS, 30, 0)))
    thread.start()
    thread.join()
    assert llama.generate([[1]], 3, 0)[0] == [llama.generate([[1]], 3, 0)[0][0]]
    assert [row.tokens for row in streams[0].drain()] == expected


def test_threads_share_passes(llama):
    prompts = [[1, 300 + i, 7] for i in range(4)]
    alone = [llama.generate([prompt], 40, temperature=0)[0][0] for prompt in prompts]
    found, ready = {}, threading.Barrier(4)

    def ask(i):
        ready.wait()
        found[i] = llama.generate([prompts[i]], 40, temperature=0)[0][0]

    llama.engine.forget()
    with passes(llama) as seen:
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [found[i] for i in range(4)] == alone
    assert len(seen) < 2 * 40


def test_an_error_of_a_shared_pass_is_raised_in_all_its_threads(llama, monkeypatch):
    stream = llama.generate_stream(PROMPTS[:1], 30, temperature=0)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "choose", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            llama.generate([[1]], 3)
    with pytest.raises(RuntimeError, match="a pass shared with another call failed: ZeroDivisionError"):
        list(stream)
    assert llama.generate([[1]], 3, temperature=0)[0]
