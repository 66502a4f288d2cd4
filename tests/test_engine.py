"""The engine under random load: a request's results are those that it gets alone."""

import random

import pytest
import torch
from small import TOKENIZER, cases, random_model

from llama import Tokenizer
from llama.batch import Batch
from llama.engine import Engine, common
from llama.request import Request
from llama.sampling import SamplingParams
from llama.text import Text

VOCABULARY, CONTEXT, SLOTS = 1024, 96, 4


def random_prompt(chance, earlier):
    """A new prompt, or one that continues another request's prompt or text."""
    new = [chance.randrange(VOCABULARY) for _ in range(chance.randint(1, 30))]
    if earlier and chance.random() < 0.6:
        before = chance.choice(earlier)
        new = [*before[: chance.randint(1, len(before))], *new]
    return new[: CONTEXT - 1]


def random_settings(chance, prompt):
    """Arguments of a request, except its stop strings."""
    sampling = SamplingParams(
        temperature=chance.choice([0, 0, 0.7, 1.0, 1.5]),
        # Few candidates: among many, some are so nearly equal that rounding changes their order.
        top_p=chance.choice([1.0, 1.0, 0.2]),
        top_k=chance.choice([0, 0, 5]),
        repetition_penalty=chance.choice([1.0, 1.0, 1.2]),
        frequency_penalty=chance.choice([0.0, 0.0, 0.3]),
        seed=chance.randrange(2**32),
    )
    return {
        "prompt": prompt,
        "max_len": min(CONTEXT, len(prompt) + chance.choice([0, 1, 5, 20, 40])),
        "sampling": sampling,
        "eos_ids": {chance.randrange(VOCABULARY) for _ in range(chance.choice([0, 1, 30]))},
        "stop_ids": [chance.randrange(VOCABULARY)],
        "min_new": chance.choice([0, 0, 4]),
        "lookup": chance.choice([0, 0, 3, 7]),
        "logprobs": chance.random() < 0.3,
    }


def requested(settings, stops, tokenizer):
    return Request(**settings, text=Text(tokenizer, stops, settings["min_new"]))


def answer(outputs):
    """All outputs of a request: tokens, text, log probabilities, finish reason."""
    tokens = [id for out in outputs for id in out.tokens]
    logprobs = [p for out in outputs for p in out.logprobs]
    finish = [out.finish_reason for out in outputs if out.finish_reason]
    return tokens, "".join(out.text for out in outputs), logprobs, finish


def alone(settings, stops, tokenizer, engine):
    engine.forget()
    request = requested(settings, stops, tokenizer)
    return answer([out for step in engine.run([request]) for out in step])


def fuzz(seed, count):
    """Submit `count` random requests at random times and cancel some. Returns (actual, expected) for each, and what
    remains in the engine."""
    chance, tokenizer = random.Random(seed), Tokenizer(TOKENIZER)
    engine, single = (
        Engine.of(random_model(vocab_size=VOCABULARY, max_seq_len=CONTEXT, max_batch_size=SLOTS)) for _ in range(2)
    )
    running, earlier, found = [], [], []
    asked = 0
    while asked < count or any(not request.finish_reason for request, _, _ in running):
        for _ in range(chance.choice([0, 0, 0, 1, 1, 3, 8]) if asked < count else 0):
            asked += 1
            prompt = random_prompt(chance, earlier[-20:])
            settings, stops = random_settings(chance, prompt), chance.choice([(), ("a",), ("ing", "e t")])
            request = requested(settings, stops, tokenizer)
            running.append((request, settings, stops))
            engine.submit(request)
        if running and chance.random() < 0.05:
            request = chance.choice(running)[0]
            if not request.finish_reason:
                engine.cancel(request)
        if any(not request.finish_reason for request, _, _ in running):
            engine.step()
        for request, settings, stops in [*running]:
            if request.finish_reason:
                running.remove((request, settings, stops))
                earlier.append(request.ids)
                found.append((answer(request.outputs), alone(settings, stops, tokenizer, single)))
    engine.step()  # drops the last cancelled requests
    left = [slot.request for slot in engine.slots if slot.request], [*engine.waiting]
    return found, left


def check(found, left):
    assert left == ([], [])
    for given, expected in found:
        tokens, text, logprobs, finish = given
        if finish == ["cancelled"]:
            assert tokens == expected[0][: len(tokens)]
            continue
        assert (tokens, text, finish) == (expected[0], expected[1], expected[3])
        assert logprobs == pytest.approx(expected[2], abs=1e-3)


def test_random_requests_equal_each_alone(monkeypatch):
    monkeypatch.setattr("llama.engine.WORTH_SHARING", 4)
    monkeypatch.setattr("llama.engine.CHUNK", 8)
    found, left = fuzz(0, cases(1000))
    check(found, left)
    assert sum(given[3] == ["cancelled"] for given, _ in found) > 5


def held(engine, other):
    """Whether the cache holds keys and values of the tokens recorded for each slot, compared with another model's."""
    for slot, ours in enumerate(engine.slots):
        if n := len(ours.tokens):
            with torch.inference_mode():
                other.hidden(Batch.of([(0, 0, ours.tokens)]))
            for a, b in zip(engine.model.buffers(), other.buffers(), strict=True):
                assert torch.allclose(a[slot, :, :n], b[0, :, :n], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("ahead", [{"cuda"}, {"cuda", "cpu"}], ids=["", "ahead"])
def test_recorded_tokens_of_a_slot_are_in_its_cache(monkeypatch, ahead):
    """After every step of random requests, some of which are cancelled, and of passes, some of which fail."""
    monkeypatch.setattr("llama.engine.WORTH_SHARING", 4)
    monkeypatch.setattr("llama.engine.CHUNK", 8)
    monkeypatch.setattr("llama.engine.AHEAD", ahead)
    chance, tokenizer = random.Random(2), Tokenizer(TOKENIZER)
    size = {"vocab_size": VOCABULARY, "max_seq_len": CONTEXT, "max_batch_size": SLOTS}
    engine, other = Engine.of(random_model(**size)), random_model(**size)
    running, earlier, failed = [], [], 0
    real = engine.model.hidden
    monkeypatch.setattr(engine.model, "hidden", lambda batch: after(real(batch)))

    def after(hidden):
        if chance.random() < 0.03:
            raise MemoryError
        if chance.random() < 0.03:
            hidden[chance.randrange(len(hidden))] = float("nan")
        return hidden

    for _ in range(120):
        for _ in range(chance.choice([0, 0, 1, 2])):
            prompt = random_prompt(chance, earlier[-20:])
            request = requested(random_settings(chance, prompt), chance.choice([(), ("a",)]), tokenizer)
            request.observe = chance.choice([None, None, lambda *args: True, lambda *args: chance.random() < 0.9])
            running.append(request)
            engine.submit(request)
        if running and chance.random() < 0.2:
            engine.cancel(chance.choice(running))
        try:
            engine.step()
        except MemoryError:
            failed += 1
        held(engine, other)
        earlier += [request.ids for request in running if request.finish_reason]
        running = [request for request in running if not request.finish_reason]
    assert failed and len(earlier) > 50


def test_steps_add_events_to_the_requests():
    engine = Engine.of(random_model())
    requests = [Request([1, 2], 5), Request([3, 4, 5], 9)]
    engine.submit(*requests)
    while any(not request.finish_reason for request in requests):
        engine.step()
    for request in requests:
        assert sum(len(event.tokens) for event in request.outputs) == request.max_len - len(request.prompt)


def test_a_request_whose_admission_fails_is_removed(monkeypatch):
    """Regression: it stayed in the queue although finished, and took a slot for ever."""
    engine = Engine.of(random_model())
    with monkeypatch.context() as patch:
        patch.setattr("llama.sampling.Sampler.admit", lambda *args: 1 / 0)
        with pytest.raises((ZeroDivisionError, RuntimeError)):
            [*engine.run([Request([1, 2], 5)])]
    assert not engine.waiting and not any(slot.request for slot in engine.slots)
    request = Request([1, 2], 5)
    assert [event.finish_reason for step in engine.run([request]) for event in step][-1] == "length"
    assert not any(slot.request for slot in engine.slots)


def test_a_request_that_no_pass_can_be_scheduled_for_ends(monkeypatch):
    """Regression: it stayed in the queue, and the server tried again at once, without end."""
    engine = Engine.of(random_model())
    engine.submit(request := Request([1, 2], 5))
    with monkeypatch.context() as patch:
        patch.setattr("llama.backends.choose", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    assert request.finish_reason == "error" and not engine.waiting
    assert [event.finish_reason for step in engine.run([Request([1, 2], 5)]) for event in step][-1] == "length"


def test_non_finite_values_are_found_in_every_chunk(monkeypatch):
    """Only the last position of a prompt is sampled. Regression: a cancelled request left NaN in a slot, as a prefix
    for others."""
    monkeypatch.setattr("llama.engine.CHUNK", 8)
    engine = Engine.of(random_model())
    engine.model.tok_embeddings.weight[77] = float("nan")
    engine.submit(first := Request([1, 2], 40))
    engine.step()
    engine.submit(second := Request([1, 77, *range(3, 40)], 60))
    engine.step()
    assert second.finish_reason == "error" and isinstance(second.error, FloatingPointError)
    assert not first.finish_reason and not any(77 in slot.tokens for slot in engine.slots)
    assert all(kv.isfinite().all() for kv in engine.model.buffers())


def _on_ranks(seed, count):
    from llama import engine

    engine.WORTH_SHARING, engine.CHUNK = 4, 8
    torch.manual_seed(0)
    return fuzz(seed, count)


def test_random_requests_on_two_ranks(ranks):
    results = ranks(2).run(_on_ranks, 1, cases(300))
    for found, left in results:
        check(found, left)
    assert results[0] == results[1]


@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 20])
def test_the_longest_common_prefix(n):
    for a, b in (([*range(n)], [*range(n), 50]), ([*range(n), 1, 2], [*range(n), 5]), ([*range(n)], [*range(n)])):
        assert common(a, b) == common(b, a) == n
    assert common([], [1]) == common([1], []) == common([2], [1]) == 0
