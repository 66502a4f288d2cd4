"""What only a GPU can show: the same model there as on the CPU."""

import pytest
import torch
from small import SHAPES, TOKENIZER, random_model, relative_error, save_random

from llama import Llama, decode, engine, quantization

pytestmark = pytest.mark.gpu

TOKENS = torch.tensor([[5, 17, 99, 3, 64, 64, 127, 0], [7, 7, 7, 8, 9, 100, 101, 102]])
PROMPTS = [[1, 400, 401, 402], [1, 17], [1, *range(300, 319)]]


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_those_of_the_cpu(shape):
    expected = random_model(SHAPES[shape])(TOKENS, 0)
    logits = random_model(SHAPES[shape]).cuda()(TOKENS.cuda(), 0)
    assert relative_error(logits.cpu(), expected) <= 1e-5


def test_chunks_and_rows_at_their_own_positions():
    model = random_model().cuda()
    whole = model(TOKENS.cuda(), 0)
    model(TOKENS[:, :6].cuda(), 0)
    step = model(torch.stack([TOKENS[0, 6:8], TOKENS[1, 3:5]]).cuda(), [6, 3])
    assert relative_error(step, torch.stack([whole[0, 6:8], whole[1, 3:5]])) <= 1e-5


def test_greedy_tokens_equal_those_of_the_cpu(tmp_path):
    save_random(tmp_path)
    results = []
    for device in ("cpu", "cuda"):
        llama = Llama.build(tmp_path, TOKENIZER, 64, 4, device=device, dtype="float32")
        results.append(llama.generate(PROMPTS, 10, temperature=0, logprobs=True, echo=True))
    (ids, logprobs), (gpu_ids, gpu_logprobs) = results
    assert gpu_ids == ids
    for a, b in zip(gpu_logprobs, logprobs, strict=True):
        assert a == pytest.approx(b, abs=1e-3)


def test_the_default_is_the_gpu_in_the_checkpoints_dtype(tmp_path):
    save_random(tmp_path, dtype=torch.bfloat16)
    llama = Llama.build(tmp_path, TOKENIZER, 64, 4)
    assert {(w.device.type, w.dtype) for w in llama.model.parameters()} == {("cuda", torch.bfloat16)}
    runs = [Llama(llama.model, llama.tokenizer, seed=5).generate(PROMPTS, 10, temperature=1.0)[0] for _ in range(2)]
    assert runs[0] == runs[1]


def test_logits_that_are_not_finite_name_the_layer(tokenizer):
    llama = Llama(random_model(vocab_size=tokenizer.n_words).cuda(), tokenizer)
    llama.model.layers[1].feed_forward.w2.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"layers\.1$"):
        llama.generate([[1, 2, 3]], 3)


@pytest.mark.parametrize("shape", SHAPES)
def test_graphs_give_the_tokens_of_plain_steps(tokenizer, monkeypatch, shape):
    llama = Llama(random_model(SHAPES[shape], vocab_size=tokenizer.n_words).cuda(), tokenizer)
    fast = llama.generate(PROMPTS, 20, temperature=0, logprobs=True)
    assert llama.model in decode._captured
    monkeypatch.setattr(engine, "decoder", lambda model, B: model)
    slow = llama.generate(PROMPTS, 20, temperature=0, logprobs=True)
    assert fast[0] == slow[0]
    for a, b in zip(fast[1], slow[1], strict=True):
        assert a == pytest.approx(b, abs=1e-3)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_four_bits_are_plain_four_bits(group, rows):
    weight = quantization.quantize(torch.randn(64, 256), quantization.Scheme(4, group))
    fast, plain = (kind(weight, torch.device("cuda")) for kind in (quantization.kernel, quantization.Plain))
    assert isinstance(fast, quantization.Int4Cuda)
    x = torch.randn(rows, 256, device="cuda").bfloat16()
    assert relative_error(fast(x).float(), plain(x).float()) < 1e-2


@pytest.mark.parametrize("rows", [1, 5, 70])
def test_eight_bits_are_plain_eight_bits(rows):
    weight = quantization.quantize(torch.randn(64, 256), quantization.scheme("int8"))
    fast, plain = (kind(weight, torch.device("cuda")) for kind in (quantization.kernel, quantization.Plain))
    assert isinstance(fast, quantization.Int8Cuda)
    x = torch.randn(rows, 256, device="cuda").bfloat16()
    assert relative_error(fast(x).float(), plain(x).float()) < 1e-2


def test_the_pieces_are_compiled(tokenizer):
    llama = Llama(random_model(vocab_size=tokenizer.n_words).cuda(), tokenizer)
    llama.generate(PROMPTS, 3, temperature=0)
    for piece in decode.FUSED:
        assert piece.call and not piece.failed


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantized_model_is_that_of_the_cpu(tmp_path, kind):
    save_random(tmp_path, {**SHAPES["GQA"], "dim": 128, "n_layers": 1})
    logits = []
    for device in ("cpu", "cuda"):
        model = Llama.build(tmp_path, TOKENIZER, 64, 4, device=device, dtype="float32", quantize=kind).model
        with torch.inference_mode():
            logits.append(model(TOKENS.to(device), 0).cpu())
    assert relative_error(*logits) < 0.05
