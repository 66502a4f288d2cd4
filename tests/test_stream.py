"""Streams, and the options of generation: settings of each prompt, seeds, stops, filters, prompt lookup."""

import gc
import threading

import pytest
from small import MODELS, TOKENIZER, passes, random_model, save_random

from llama import Llama, engine, parallel
from llama.engine import Engine
from llama.request import Request

PROMPTS = [[1, 400, 401, 402], [1, 17], [1, *range(300, 319)], [1, 99, 98, 97, 96, 95, 94]]


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
def test_a_stream_is_the_completion_as_it_happens(llama, echo):
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


def test_a_chat_stream_is_the_chat(bundled):
    dialogs = [[{"role": "user", "content": text}] for text in ("Hello", "Who are you?")]
    whole = bundled.chat_completion(dialogs, temperature=0, max_gen_len=30)
    rows = joined(bundled.chat_stream(dialogs, temperature=0, max_gen_len=30), 2)
    assert [row[0] for row in rows] == [result["generation"]["content"] for result in whole]
    assert [row[3] for row in rows] == [result["finish_reason"] for result in whole]


def test_streams_share_the_passes(llama):
    """Two may be open, beside other calls; each gets what it gets alone."""
    prompts = [PROMPTS[:2], PROMPTS[2:3], PROMPTS[3:]]
    alone = [llama.generate(some, 12, temperature=0)[0] for some in prompts]
    llama.engine.forget()
    first, second = (llama.generate_stream(some, 12, temperature=0) for some in prompts[:2])
    found = [next(first)]
    with passes(llama) as seen:
        third = llama.generate(prompts[2], 12, temperature=0)[0]
    assert seen[1:-2] == [4] * (len(seen) - 3)  # each beside those of both streams
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
    llama.generate_stream(PROMPTS, 30)  # never read, and dropped at once
    with passes(llama) as seen:
        assert llama.generate([[1]], 3, temperature=0)[0] == llama.generate([[1]], 3, temperature=0)[0]
    assert max(seen) == 1
    assert not any(slot.request for slot in llama.engine.slots) and not llama.engine.waiting


def test_a_stream_that_its_own_filter_holds_is_collected(bundled):
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


def test_no_end_before_min_gen_len(llama, monkeypatch):
    ids = llama.generate([PROMPTS[0]], 10, temperature=0)[0][0]
    monkeypatch.setattr(llama.tokenizer, "eos_ids", {ids[1]})
    [row] = llama.generate([PROMPTS[0]], 10, temperature=0, min_gen_len=6, stop_token_ids=[ids[2]])[0]
    assert len(row) >= 6
    assert not {ids[1], ids[2]} & set(row[:6])
    assert row[0] == ids[0]


def test_a_stop_string_cuts_the_text_and_its_tokens(llama):
    [whole] = llama.text_completion(["Hello"], temperature=0, max_gen_len=20)
    text = whole["generation"]
    stop = text[8:12]
    [result] = llama.text_completion(["Hello"], temperature=0, max_gen_len=20, stop=[stop, "never"], logprobs=True)
    assert result["generation"] == text[: text.index(stop)] == "".join(result["tokens"])
    assert result["finish_reason"] == "stop"
    assert len(result["tokens"]) == len(result["logprobs"])
    rows = llama.text_completion(["Hello"] * 2, temperature=0, max_gen_len=20, stop=[[stop], []])
    assert [row["generation"] for row in rows] == [result["generation"], text]


SETTINGS = {
    "temperature": [0, 1.0, 0.7, 1.3, 1.0, 0.5, 2.0, 1.0],
    "top_p": [0.9, 1.0, 0.9, 1.0, 0.8, 0.5, 0.99, 1.0],
    "top_k": [0, 0, 0, 40, 7, 3, 0, 0],
    "min_p": [0, 0, 0, 0, 0.1, 0, 0.01, 0],
    "repetition_penalty": [1, 1, 1, 1, 1.3, 1, 1, 2.0],
    "frequency_penalty": [0, 0, 0, 0, 0.2, 0, 0, 0.5],
    "presence_penalty": [0, 0, 0, 0, 0.3, 0, 0, 0],
    "logit_bias": [{}, {}, {}, {}, {5: 4.0}, {}, {6: -5.0}, {}],
    "seed": [1, 2, 3, 4, 5, 6, 7, 8],
    "max_gen_len": [12, 20, 20, 15, 20, 20, 9, 20],
    "min_gen_len": [0, 5, 0, 0, 0, 0, 0, 0],
    "stop_token_ids": [[], [], [9], [], [], [], [], [11, 12]],
}
EIGHT = [[1, *range(300, 300 + n)] for n in (3, 1, 18, 7, 5, 2, 9, 4)]


def _together_and_alone(folder):
    llama = Llama.build(folder, TOKENIZER, 64, 8, device="cpu", dtype="float32")
    together, _ = llama.generate(EIGHT, **SETTINGS)
    alone = []
    for i, prompt in enumerate(EIGHT):
        alone += llama.generate([prompt], **{name: [values[i]] for name, values in SETTINGS.items()})[0]
    return together, alone


def test_a_rows_tokens_are_its_own_affair(ranks, tmp_path):
    """Whatever its neighbours are and ask for, and on however many ranks: the same tokens."""
    save_random(tmp_path, mp=2)
    parallel.init_model_parallel()
    together, alone = _together_and_alone(tmp_path)
    assert together == alone
    assert len({tuple(row) for row in together}) == 8
    assert ranks(2).run(_together_and_alone, tmp_path) == [(together, alone)] * 2


def test_a_seed_drawn_from_the_llamas_own(tokenizer):
    model = random_model(vocab_size=tokenizer.n_words)
    runs = [Llama(model, tokenizer, seed=7).generate(PROMPTS, 9, 1.0)[0] for _ in range(2)]
    assert runs[0] == runs[1]
    llama = Llama(model, tokenizer, seed=7)
    assert llama.generate(PROMPTS, 9, 1.0)[0] == runs[0] != llama.generate(PROMPTS, 9, 1.0)[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": [1, 2, 3]}, "top_k has 3 values for 2 rows"),
        ({"top_k": -1}, "top_k is -1"),
        ({"stop": [["a"], 3]}, "stop has 3; it must be a list of str"),
        ({"stop": 3}, "stop is 3"),
        ({"stop": ""}, "empty string"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids"),
        ({"min_gen_len": -1}, "min_gen_len is -1"),
        ({"logit_bias": {10**6: 1.0}}, "logit_bias or stop_token_ids has the id 1000000; ids go from 0 to 1023"),
        ({"logit_bias": dict.fromkeys(range(1024), float("-inf"))}, "leave none of 1024 ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids has the id -1"),
        ({"seed": [1, "a"]}, "seed is 'a'"),
        ({"prompt_lookup": 1.5}, "prompt_lookup is 1.5"),
    ],
)
def test_options_that_mean_nothing(llama, options, message):
    with pytest.raises(ValueError) as error:
        llama.generate([[1], [2]], 3, **options)
    assert message in str(error.value)
    with pytest.raises(
        TypeError, match="there is no option 'top_q'; there are frequency_penalty, json_schema, logit_bias"
    ):
        llama.generate([[1]], 3, top_q=3)


# Ranks


def _close_on_rank_0(folder):
    llama = Llama.build(folder, TOKENIZER, 64, 4, device="cpu")
    counts = []
    for after in (0, 1, 7):
        stream = llama.generate_stream(PROMPTS, 30, temperature=0)
        count = 0
        for _ in zip(range(after), stream) if parallel.rank() == 0 else stream:  # noqa: B905
            count += 1
        if parallel.rank() == 0:
            stream.close()
        counts.append(count)
    both = []
    for after in (0, 3):  # a break on all ranks, as a script's own loop has it
        with llama.generate_stream(PROMPTS, 30, temperature=0) as stream:
            both.append(len([event for _, event in zip(range(after), stream)]))  # noqa: B905
    return counts, both, llama.generate(PROMPTS, 5, temperature=0)[0]


def test_other_ranks_end_when_the_first_stops_listening(ranks, tmp_path):
    save_random(tmp_path, mp=2)
    (first, both, ids), (second, both_too, ids_too) = ranks(2).run(_close_on_rank_0, tmp_path)
    assert first == [0, 1, 7] and all(count < 4 * 30 for count in second)
    assert both == both_too == [0, 3]
    assert ids == ids_too


def _two_at_a_time(folder):
    """Two streams and a call beside them; the first rank closes one early."""
    llama = Llama.build(folder, TOKENIZER, 64, 2, device="cpu")
    first, second = (llama.generate_stream([prompt], 20, temperature=0) for prompt in PROMPTS[:2])
    ids = [next(first).tokens[0], next(second).tokens[0]]
    between = llama.generate([PROMPTS[3]], 5, temperature=0)[0]  # waits for a slot
    if parallel.rank() == 0:
        first.close()
    else:
        assert len(list(first)) < 20
    ids += [id for event in second for id in event.tokens]
    alone = [llama.generate([prompt], 20, temperature=0)[0][0] for prompt in (PROMPTS[1], PROMPTS[3])]
    return ids[1:] == alone[0], between[0] == alone[1][:5], [bool(slot.request) for slot in llama.engine.slots]


def test_ranks_have_several_streams(ranks, tmp_path):
    save_random(tmp_path, mp=2)
    assert ranks(2).run(_two_at_a_time, tmp_path) == [(True, True, [False, False])] * 2


def test_a_stream_that_goes_from_thread_to_thread(llama):
    expected = llama.generate(PROMPTS, 30, 0)[0]
    streams = []
    thread = threading.Thread(target=lambda: streams.append(llama.generate_stream(PROMPTS, 30, 0)))
    thread.start()
    thread.join()
    assert llama.generate([[1]], 3, 0)[0] == [llama.generate([[1]], 3, 0)[0][0]]
    assert [row.tokens for row in streams[0].drain()] == expected


def test_threads_share_the_passes(llama):
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


def test_an_error_of_one_thread_is_told_to_those_who_share_its_pass(llama, monkeypatch):
    stream = llama.generate_stream(PROMPTS[:1], 30, temperature=0)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "choose", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            llama.generate([[1]], 3)
    with pytest.raises(RuntimeError, match="a pass shared with another call failed: ZeroDivisionError"):
        list(stream)
    assert llama.generate([[1]], 3, temperature=0)[0]


def _one_after_another(folder):
    """Calls that fail on the first rank, each followed by one that must work."""
    llama = Llama.build(folder, TOKENIZER, 64, 4, device="cpu")
    dialogs = [[{"role": "user", "content": text}] for text in ("a", "b")]

    def interrupt(dialog):
        raise KeyboardInterrupt

    def lock(dialog):
        return threading.Lock()

    calls = [
        lambda: llama.text_completion(["a", (i for i in [1])]),
        lambda: llama.chat_completion(dialogs, input_filter=lock),
        lambda: llama.chat_completion(dialogs, input_filter=interrupt),
        lambda: llama.chat_completion(dialogs, output_filter=lambda text: 3, max_gen_len=2),
        lambda: llama.text_completion(["a"], top_k=-1),
    ]
    found = []
    for call in calls:
        try:
            call()
        except BaseException as error:
            found.append(type(error).__name__)
        found.append(llama.generate([[1, 2]], 3, temperature=0)[0])
    with llama.chat_stream(dialogs, input_filter=lambda dialog: "No." if "a" in str(dialog[-1]) else None) as stream:
        found.append(next(stream).finish_reason)
    return found, llama.generate([[1, 2]], 3, temperature=0)[0]


def test_ranks_keep_step_through_errors(ranks, tmp_path):
    save_random(tmp_path, mp=2)
    (first, last), (second, last_too) = ranks(2).run(_one_after_another, tmp_path)
    assert first[1::2][:5] == [last] * 5 == second[1::2][:5] and last == last_too
    assert first[:10:2][2:] == ["KeyboardInterrupt", "ValueError", "ValueError"]
    assert second[:10:2] == ["RankError", "RankError", "RankError", "ValueError", "ValueError"]
    assert first[-1] == second[-1] == "refused"


# Filters


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


def test_what_is_refused_on_input_is_never_generated(bundled):
    with passes(bundled) as seen:
        [result] = bundled.chat_completion([[{"role": "user", "content": "a bomb"}]], input_filter=refuse_input)
    assert result == {"generation": {"role": "assistant", "content": "Not that."}, "finish_reason": "refused"}
    assert seen == []


def _filter_on_ranks(folder):
    llama = Llama.build(folder, TOKENIZER, 64, 4, device="cpu")
    asked = []

    def check(text):
        asked.append(text)
        return f"said {len(asked)}" if len(asked) % 2 else None

    dialogs = [[{"role": "user", "content": text}] for text in ("a", "b", "c")]
    results = llama.chat_completion(dialogs, temperature=0, max_gen_len=4, output_filter=check)
    return [result["generation"]["content"] for result in results], len(asked)


def test_the_first_rank_filters_for_all(ranks, tmp_path):
    save_random(tmp_path, mp=2)
    (first, asked), (second, asked_too) = ranks(2).run(_filter_on_ranks, tmp_path)
    assert first == second and (asked, asked_too) == (3, 0)
    assert first[0] == "said 1" and first[2] == "said 3"


# Lookup


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_lookup_changes_no_token(temperature):
    """Also with penalties, which count what was accepted and nothing else, with stops, and where contexts fill up."""
    bundled = Llama.build(MODELS / "small-chat", max_seq_len=128, max_batch_size=4, device="cpu", dtype="float32")
    story = "Tom had a red ball. Tom had a red ball. Tom had a"
    prompts = [bundled.tokenizer.encode(text, bos=True, eos=False) for text in (story, "Once", story[:30])]
    for options in ({}, {"repetition_penalty": 1.2, "frequency_penalty": 0.1}, {"stop": "ball", "min_gen_len": 20}):
        options |= {"temperature": temperature, "top_p": 0.95, "seed": 3, "logprobs": True}
        plain = bundled.generate(prompts, 500, **options)
        fast = bundled.generate(prompts, 500, prompt_lookup=7, **options)
        assert fast[0] == plain[0]
        for a, b in zip(fast[1], plain[1], strict=True):
            assert a == pytest.approx(b, abs=1e-3)


def test_lookup_takes_fewer_steps_where_text_repeats():
    """As what follows a token is made to depend on that alone, the text goes in circles of 9."""
    model = random_model()
    for layer in model.layers:
        layer.attention.wo.weight.data.zero_()
        layer.feed_forward.w2.weight.data.zero_()
    model.output.weight.data.zero_()[[*range(1, 9), 0]] = model.tok_embeddings.weight.data[:9]
    requests = [[Request([5], 64, lookup=most), Request([3, 4], 50, lookup=most)] for most in (0, 7)]
    plain, fast = (list(Engine.of(model).run(some)) for some in requests)
    assert [request.ids for request in requests[0]] == [request.ids for request in requests[1]]
    assert requests[0][0].ids == [i % 9 for i in range(5, 69)]
    assert len(plain) == 63
    assert len(fast) < 30
