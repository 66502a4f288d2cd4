"""Options of generation for each prompt: stops, minimum length, sampling settings, seeds."""

from small import PROMPTS, TOKENIZER, random_model, save_random

from llama import Llama, parallel


def test_min_gen_len(llama, monkeypatch):
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


def test_rows_do_not_affect_each_other(ranks, tmp_path):
    """Same tokens whatever the other rows are, and for any number of ranks."""
    save_random(tmp_path, mp=2)
    parallel.init_model_parallel()
    together, alone = _together_and_alone(tmp_path)
    assert together == alone
    assert len({tuple(row) for row in together}) == 8
    assert ranks(2).run(_together_and_alone, tmp_path) == [(together, alone)] * 2


def test_default_seeds_come_from_the_llamas_seed(tokenizer):
    model = random_model(vocab_size=tokenizer.n_words)
    runs = [Llama(model, tokenizer, seed=7).generate(PROMPTS, 9, 1.0)[0] for _ in range(2)]
    assert runs[0] == runs[1]
    llama = Llama(model, tokenizer, seed=7)
    assert llama.generate(PROMPTS, 9, 1.0)[0] == runs[0] != llama.generate(PROMPTS, 9, 1.0)[0]
