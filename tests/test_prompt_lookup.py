"""Prompt lookup: draft tokens from the preceding text, which change no result."""

import pytest
from small import MODELS, random_model

from llama import Llama
from llama.engine import Engine
from llama.request import Request


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_lookup_changes_no_token(temperature):
    """Also with penalties, which count only accepted tokens, with stops, and with full contexts."""
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
    """The model's next token depends on the last one alone, so that the text repeats with period 9."""
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
