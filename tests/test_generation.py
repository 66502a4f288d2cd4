"""generate: tokens and log probabilities, shared passes and slots, the end of a row, and randomness."""

import random
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from small import PROMPTS, SHAPES, greedy, hugging_face, passes, random_model

from llama import Llama

# Against Hugging Face, and against itself


@pytest.mark.parametrize("shape", ["MHA", "GQA", "MQA"])
def test_ragged_batch_equals_each_alone_equals_hugging_face(shape, tokenizer):
    """Tokens are equal; log probabilities differ by at most 1e-4."""
    llama = Llama(random_model(SHAPES[shape], vocab_size=tokenizer.n_words), tokenizer)
    theirs = hugging_face(llama.model.params, llama.model.state_dict())
    together, together_logprobs = greedy(llama, PROMPTS, logprobs=True)
    for prompt, ids, logprobs in zip(PROMPTS, together, together_logprobs, strict=True):
        alone, alone_logprobs = greedy(llama, [prompt], logprobs=True)
        expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False, eos_token_id=None)[0]
        all_logprobs = theirs(expected[None]).logits[0].log_softmax(-1)
        expected_logprobs = [all_logprobs[i - 1, expected[i]].item() for i in range(len(prompt), len(expected))]
        assert ids == alone[0] == expected[len(prompt) :].tolist()
        assert logprobs == pytest.approx(alone_logprobs[0], abs=1e-4)
        assert logprobs == pytest.approx(expected_logprobs, abs=1e-4)


def test_log_probabilities_while_decoding_equal_those_of_rescoring(llama):
    """With echo and max_gen_len 0, generate scores a text: generated tokens must have the same log probabilities."""
    ids, logprobs = greedy(llama, PROMPTS, logprobs=True, echo=True)
    again, rescored = greedy(llama, ids, max_gen_len=0, logprobs=True, echo=True)
    assert again == ids
    for a, b in zip(logprobs, rescored, strict=True):
        assert a[0] == 0.0
        assert a == pytest.approx(b, abs=1e-4)


def test_a_long_prompt_is_scored_in_chunks(llama, monkeypatch):
    whole = greedy(llama, PROMPTS, 0, logprobs=True, echo=True)[1]
    monkeypatch.setattr("llama.scoring.AT_ONCE", 3)
    pieces = greedy(llama, PROMPTS, 0, logprobs=True, echo=True)[1]
    for a, b in zip(whole, pieces, strict=True):
        assert a == pytest.approx(b, abs=1e-5)


def test_a_prompt_that_fills_max_seq_len_is_scored_at_its_own_positions(llama):
    """Regression: the log probability of token i was from the logits at i, not i - 1."""
    prompt = [1, *range(100, 163)]
    assert len(prompt) == llama.model.params.max_seq_len
    ids, logprobs = greedy(llama, [prompt], logprobs=True, echo=True)
    assert ids == [prompt]
    theirs = (
        hugging_face(llama.model.params, llama.model.state_dict())(torch.tensor([prompt])).logits[0].log_softmax(-1)
    )
    assert logprobs[0] == pytest.approx([0.0] + [theirs[i, prompt[i + 1]].item() for i in range(63)], abs=1e-4)
    assert greedy(llama, [prompt]) == ([[]], None)


def test_a_ragged_batch_is_prefilled_in_one_pass(llama):
    """Regression: everything beyond the shortest prompt was prefilled one token at a time."""
    llama.engine.forget()
    with passes(llama) as seen:
        greedy(llama, PROMPTS, max_gen_len=5)
    assert seen == [sum(map(len, PROMPTS)), 4, 4, 4, 4]  # no padding, and no pass after the last token


@pytest.mark.parametrize("options", [{}, {"logprobs": True}, {"logprobs": True, "echo": True}], ids=str)
def test_a_shared_prefix_is_computed_once(llama, monkeypatch, options):
    beginning = list(range(3, 23))
    prompts = [[*beginning, *rest] for rest in ([30], [40, 41, 42], [50, 51], [])]
    llama.engine.forget()
    with monkeypatch.context() as patch:
        patch.setattr("llama.engine.WORTH_SHARING", 10**9)
        expected = greedy(llama, prompts, max_gen_len=5, **options)
    monkeypatch.setattr("llama.engine.WORTH_SHARING", 8)
    llama.engine.forget()
    with passes(llama) as seen:
        found = greedy(llama, prompts, max_gen_len=5, **options)
    if "echo" in options:  # if all positions are scored, all are computed
        assert seen[0] == sum(map(len, prompts))
    else:  # the first prompt, then a token of its answer and the new tokens of the others
        assert seen == [21, 1 + 3 + 2 + 1, 4, 4, 4, 3]
    assert found[0] == expected[0]
    for ours, theirs in zip(found[1] or [], expected[1] or [], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_a_long_prompt_does_not_stall_decoding(llama, monkeypatch, chunk):
    """Its chunks are computed in the passes that decode the others, and change no result."""
    long = [1, *range(100, 150)]
    expected = greedy(llama, [PROMPTS[0], long], max_gen_len=10)[0]
    monkeypatch.setattr("llama.engine.CHUNK", chunk)
    llama.engine.forget()
    stream = llama.generate_stream([PROMPTS[0]], 10, temperature=0)
    with passes(llama) as seen:
        assert greedy(llama, [long], 10)[0] == expected[1:]
    assert stream.drain()[0].tokens == expected[0]
    assert max(seen[:8]) <= chunk + 1


def test_more_prompts_than_slots_wait_for_one(llama):
    prompts = [[1, *range(200 + 7 * i, 203 + 9 * i)] for i in range(11)]
    lengths = [3, 9, 1, 0, 12, 5, 7, 2, 2, 8, 4]
    found, logprobs = greedy(llama, prompts, lengths, logprobs=True)
    assert [*map(len, found)] == lengths
    for prompt, length, ids, scores in zip(prompts, lengths, found, logprobs, strict=True):
        alone, alone_scores = greedy(llama, [prompt], length, logprobs=True)
        assert ids == alone[0]
        assert scores == pytest.approx(alone_scores[0], abs=1e-4)


def test_answers_of_different_lengths_leave_no_slot_idle(llama):
    """64 prompts need few passes more than their tokens, while static batches wait for the longest answer of each."""
    chance = random.Random(0)
    prompts = [[1, *(chance.randrange(3, 1000) for _ in range(chance.randint(3, 20)))] for _ in range(64)]
    lengths = [chance.randint(4, 32) for _ in prompts]
    with passes(llama) as seen:
        found = greedy(llama, prompts, lengths, min_gen_len=lengths)[0]
    assert [*map(len, found)] == lengths
    assert len(seen) < 1.1 * sum(lengths) / 4
    assert len(seen) < sum(max(lengths[i : i + 4]) for i in range(0, 64, 4)) / 1.25


def test_cached_prefixes_are_not_computed_again(llama):
    prompt = [1, *range(500, 540)]
    first = greedy(llama, [prompt], 5)[0]
    with passes(llama) as seen:
        assert greedy(llama, [prompt], 5)[0] == first
        greedy(llama, [[*prompt, *first[0], 7, 8]], 1)
    assert seen == [1, 1, 1, 1, 1, 1 + 2]  # the last sampled token had not been computed


@pytest.mark.parametrize("change", ["weights", "cache", "forward"])
def test_cached_prefixes_are_dropped_when_the_model_changes(tokenizer, change):
    llama = Llama(random_model(vocab_size=tokenizer.n_words), tokenizer)
    prompt = [1, *range(500, 540)]
    greedy(llama, [prompt], 5)
    if change == "weights":
        llama.model.layers[1].attention.wv.weight.mul_(1.5)
    elif change == "cache":
        llama.model.allocate_cache()
    else:
        llama.model(torch.tensor([[3] * 50] * 4))
    fresh = random_model(vocab_size=tokenizer.n_words)
    fresh.load_state_dict(llama.model.state_dict())
    assert greedy(llama, [prompt], 5) == greedy(Llama(fresh, tokenizer), [prompt], 5)


def test_threads_get_their_own_texts(llama):
    """Regression: calls of several threads overwrote each other's cache, without an error."""
    prompts = [[[1, 5, i]] for i in range(6)]
    expected = [greedy(llama, prompt, 20) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda prompt: greedy(llama, prompt, 20), prompts * 2)) == expected * 2


# Where a row ends


def test_a_row_ends_before_eos_and_the_others_go_on(llama, monkeypatch):
    ids, logprobs = greedy(llama, PROMPTS, logprobs=True)
    eos = ids[1][4]
    monkeypatch.setattr(llama.tokenizer, "eos_ids", {eos})
    shorter, shorter_logprobs = greedy(llama, PROMPTS, logprobs=True)
    for whole, cut, scores, whole_scores in zip(ids, shorter, shorter_logprobs, logprobs, strict=True):
        end = whole.index(eos) if eos in whole else len(whole)
        assert cut == whole[:end]
        assert scores == pytest.approx(whole_scores[:end], abs=1e-5)
    assert len(shorter[1]) <= 4


def test_generation_ends_when_all_rows_have(llama, monkeypatch):
    ids, _ = greedy(llama, [PROMPTS[0]])
    monkeypatch.setattr(llama.tokenizer, "eos_ids", {ids[0][2]})
    with mock.patch.object(llama.model, "logits", wraps=llama.model.logits) as logits:
        assert greedy(llama, [PROMPTS[0]])[0] == [ids[0][: ids[0].index(ids[0][2])]]
    assert logits.call_count <= 3


def test_echo_keeps_an_eos_inside_the_prompt(llama):
    """Regression: the output was cut at the prompt's EOS. Earlier turns of a dialog end with one."""
    prompt = [1, 50, llama.tokenizer.eos_id, 1, 51]
    ids, logprobs = greedy(llama, [prompt], max_gen_len=4, logprobs=True, echo=True)
    assert ids[0][:5] == prompt
    assert len(ids[0]) == len(logprobs[0]) == 9


def test_no_pass_without_tokens_to_generate(llama):
    full = [1, *range(100, 163)]
    with passes(llama) as seen:
        assert llama.generate([full], 5) == llama.generate([[1, 2]], 0) == ([[]], None)
    assert seen == []


def test_max_gen_len_counts_for_each_row_and_max_seq_len_for_the_sum(llama):
    long = [1, *range(100, 160)]  # 61 of 64
    ids, _ = greedy(llama, [PROMPTS[1], long], max_gen_len=5)
    assert [len(row) for row in ids] == [5, 3]
    assert ids[1] == greedy(llama, [long], max_gen_len=5)[0][0]
    assert greedy(llama, [PROMPTS[1]], max_gen_len=0)[0] == [[]]
    [result] = llama.text_completion(["a"], temperature=0, logprobs=True, max_gen_len=None)
    assert len(result["tokens"]) == 64 - len(llama.tokenizer.encode("a", bos=True, eos=False))


# Randomness


def test_a_seed_repeats_and_another_differs(tokenizer):
    model = random_model(vocab_size=tokenizer.n_words)

    def run(seed):
        return Llama(model, tokenizer, seed=seed).generate(PROMPTS, 10, temperature=1.0)

    assert run(3) == run(3) != run(4)


def test_generation_leaves_the_global_generator_alone(llama):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    llama.generate(PROMPTS, 3, temperature=1.0)
    assert torch.equal(torch.rand(3), expected)
