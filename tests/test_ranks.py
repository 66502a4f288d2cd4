"""Several ranks that share a model agree on requests, seeds, options, streams, filters and errors."""

import threading
from unittest import mock

import pytest
from small import MODELS, PROMPTS, TOKENIZER, save_random

from llama import Llama, parallel


def _sample_with_own_seed(folder, seed_of_rank):
    llama = Llama.build(folder, MODELS / "tokenizer.model", 64, 4, seed=seed_of_rank[parallel.rank()], device="cpu")
    ids, logprobs = llama.generate(PROMPTS, 10, temperature=1.0, logprobs=True)
    return ids, [[round(x, 3) for x in row] for row in logprobs]


def test_ranks_with_different_seeds_agree(ranks, tmp_path):
    """Regression: each rank sampled with its own generator, assumed equal on all, and nothing was broadcast."""
    save_random(tmp_path, mp=2)
    first, second = ranks(2).run(_sample_with_own_seed, tmp_path, [1, 1234])
    assert first == second
    other, _ = ranks(2).run(_sample_with_own_seed, tmp_path, [1234, 1])
    assert other != first


def _own_prompts(folder, prompts_of_rank):
    llama = Llama.build(folder, MODELS / "tokenizer.model", 64, 4, device="cpu")
    mine = prompts_of_rank[parallel.rank()]
    texts = llama.text_completion(mine, temperature=0, max_gen_len=5)
    chats = llama.chat_completion([[{"role": "user", "content": text}] for text in mine], temperature=0, max_gen_len=5)
    return texts, chats


def test_the_first_ranks_request_is_served(ranks, tmp_path):
    save_random(tmp_path, mp=2)
    first, second = ranks(2).run(_own_prompts, tmp_path, [["one", "[INST] two"], ["three", "four"]])
    assert first == second == ranks(2).run(_own_prompts, tmp_path, [["one", "[INST] two"]] * 2)[0]


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


def test_other_ranks_end_when_the_first_closes_its_stream(ranks, tmp_path):
    save_random(tmp_path, mp=2)
    (first, both, ids), (second, both_too, ids_too) = ranks(2).run(_close_on_rank_0, tmp_path)
    assert first == [0, 1, 7] and all(count < 4 * 30 for count in second)
    assert both == both_too == [0, 3]
    assert ids == ids_too


def _two_at_a_time(folder):
    """Two open streams and another call; the first rank closes one stream early."""
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


def _filter_on_ranks(folder):
    llama = Llama.build(folder, TOKENIZER, 64, 4, device="cpu")
    asked = []

    def check(text):
        asked.append(text)
        return f"said {len(asked)}" if len(asked) % 2 else None

    dialogs = [[{"role": "user", "content": text}] for text in ("a", "b", "c")]
    results = llama.chat_completion(dialogs, temperature=0, max_gen_len=4, output_filter=check)
    return [result["generation"]["content"] for result in results], len(asked)


def test_only_the_first_rank_filters(ranks, tmp_path):
    save_random(tmp_path, mp=2)
    (first, asked), (second, asked_too) = ranks(2).run(_filter_on_ranks, tmp_path)
    assert first == second and (asked, asked_too) == (3, 0)
    assert first[0] == "said 1" and first[2] == "said 3"


def _one_after_another(folder):
    """Calls that fail on the first rank, each followed by one that must succeed."""
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


def test_ranks_stay_in_lockstep_after_errors(ranks, tmp_path):
    save_random(tmp_path, mp=2)
    (first, last), (second, last_too) = ranks(2).run(_one_after_another, tmp_path)
    assert first[1::2][:5] == [last] * 5 == second[1::2][:5] and last == last_too
    assert first[:10:2][2:] == ["KeyboardInterrupt", "ValueError", "ValueError"]
    assert second[:10:2] == ["RankError", "RankError", "RankError", "ValueError", "ValueError"]
    assert first[-1] == second[-1] == "refused"


def _fail_on_one_rank_and_go_on(folder):
    def alone(llama):
        llama.generate_stream.__wrapped__(llama, [[1, 2]], 3)

    llama = Llama.build(folder, MODELS / "tokenizer.model", 64, 4, device="cpu")
    if parallel.rank() == 0:
        return "waits"  # the other rank's failure must not depend on this one
    with mock.patch.object(llama.model, "hidden", side_effect=MemoryError("no memory")), pytest.raises(MemoryError):
        alone(llama)
    with pytest.raises(RuntimeError, match="an earlier call failed on this rank .* start the job again"):
        alone(llama)


def test_a_rank_out_of_lockstep_raises_an_error(ranks, tmp_path):
    """After an error on one rank alone, which the script caught, its next call would wait for ever."""
    save_random(tmp_path, mp=2)
    assert ranks(2).run(_fail_on_one_rank_and_go_on, tmp_path) == ["waits", None]
