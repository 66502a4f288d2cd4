"""What only a GPU can test: the same results as on the CPU."""

import pytest
import torch
from small import SHAPES, TOKENIZER, hugging_face, random_model, relative_error, save_random

from llama import Llama, Transformer, backends
from llama.backends import choose, quantized, quantized_matmul
from llama.backends.quantized import Scheme
from llama.backends.quantized_matmul import Dequantized, kernel
from llama.batch import Batch

Cuda = pytest.importorskip("llama.backends.cuda").Cuda  # needs Triton

pytestmark = pytest.mark.gpu

TOKENS = torch.tensor([[5, 17, 99, 3, 64, 64, 127, 0], [7, 7, 7, 8, 9, 100, 101, 102]])
PROMPTS = [[1, 400, 401, 402], [1, 17], [1, *range(300, 319)]]


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_those_of_the_cpu(shape):
    expected = random_model(SHAPES[shape])(TOKENS, 0)
    logits = random_model(SHAPES[shape]).cuda()(TOKENS.cuda(), 0)
    assert relative_error(logits.cpu(), expected) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prompt_and_step_equal_hugging_face(dtype):
    """Head size 128, GQA with 2 query heads a group: logits of a prompt of 40 tokens and of the step after it."""
    shape = {"dim": 512, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 64}
    model = random_model(shape, vocab_size=256, max_seq_len=64)
    theirs = hugging_face(model.params, model.state_dict()).cuda()
    ids = torch.randint(256, (1, 41), generator=torch.Generator().manual_seed(0)).cuda()
    with torch.inference_mode():
        exact = theirs(ids).logits[0]
        rounded = theirs.to(dtype)(ids).logits[0].float()
        fast = choose(model.to(dtype).cuda())
        assert type(fast) is Cuda
        prompt = fast.logits(fast.hidden(Batch.of([(0, 0, ids[0, :40].tolist())], "cuda")))
        step = fast.logits(fast.hidden(Batch.of([(0, 40, ids[0, 40:].tolist())], "cuda")))
    found = torch.cat((prompt, step))
    assert relative_error(found, exact) < 1.3 * relative_error(rounded, exact) + 1e-4
    if dtype == torch.float32:
        assert torch.equal(found.argmax(-1), exact.argmax(-1))


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


def test_non_finite_logits_name_the_layer(tokenizer):
    llama = Llama(random_model(vocab_size=tokenizer.n_words).cuda(), tokenizer)
    llama.model.layers[1].feed_forward.w2.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"layers\.1$"):
        llama.generate([[1, 2, 3]], 3)


@pytest.mark.parametrize("shape", SHAPES)
def test_graphs_give_the_tokens_of_the_plain_backend(tokenizer, monkeypatch, shape):
    model = random_model(SHAPES[shape], vocab_size=tokenizer.n_words).cuda()
    llama = Llama(model, tokenizer)
    fast = llama.generate(PROMPTS, 20, temperature=0, logprobs=True)
    assert llama.engine.backend.graphs
    monkeypatch.setattr(backends, "choose", lambda model, compile: model)
    model.norm.weight.mul_(1)  # weights were written to: a backend is chosen again
    slow = llama.generate(PROMPTS, 20, temperature=0, logprobs=True)
    assert type(llama.engine.backend) is Transformer
    assert fast[0] == slow[0]
    for a, b in zip(fast[1], slow[1], strict=True):
        assert a == pytest.approx(b, abs=1e-3)


def test_continuous_batching_equals_each_alone(tokenizer):
    """More prompts than slots, answers of different lengths, sampled: mixed passes, and CUDA graphs of several
    sizes."""
    llama = Llama(random_model(vocab_size=tokenizer.n_words, max_batch_size=4).cuda(), tokenizer)
    generator = torch.Generator().manual_seed(0)
    prompts = [[1, *torch.randint(3, 400, (2 + 5 * i % 23,), generator=generator).tolist()] for i in range(13)]
    lengths = [3 + 7 * i % 19 for i in range(13)]
    options = {"temperature": [0.0, 0.9] * 6 + [0.0], "top_p": 0.9, "seed": [*range(13)]}
    together = llama.generate(prompts, lengths, **options)[0]
    for i, prompt in enumerate(prompts):
        alone = {name: value if isinstance(value, float) else value[i] for name, value in options.items()}
        assert llama.generate([prompt], lengths[i], **alone)[0] == [together[i]]


@pytest.mark.parametrize("scheme", [Scheme(8), Scheme(4, 32), Scheme(4, 64), Scheme(4, 128)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_quantized_matmuls_equal_plain_ones(scheme, dtype, rows):
    weight = quantized.quantize(torch.randn(72, 352 if scheme.group < 64 else 384), scheme)
    fast, plain = (kind(weight, torch.device("cuda")) for kind in (kernel, Dequantized))
    assert isinstance(fast, quantized_matmul.Cuda)
    x = torch.randn(rows, 2 * fast.shape[1], device="cuda").to(dtype)[:, : fast.shape[1]]  # not contiguous
    exact = x.double() @ quantized.dequantize(plain.weight).double().t()
    assert relative_error(fast(x).double(), exact) < {torch.float32: 1e-3, torch.bfloat16: 1e-2}[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("slots", [1, 3, 16, 40])
def test_passes_equal_the_models_within_16_bit_rounding(dtype, slots):
    """A pass of prompts, a step of one token each, and both together, with head size 128 and GQA."""
    shape = {"dim": 512, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 64}

    def model():
        return random_model(shape, max_batch_size=slots, max_seq_len=300).cuda()

    ways = [model(), model().to(dtype), choose(model().to(dtype))]
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(128, (5 + 7 * i,), generator=generator).tolist() for i in range(slots)]
    passes = [
        [(slot, 0, ids) for slot, ids in enumerate(prompts)],
        [(slot, len(ids), [9]) for slot, ids in enumerate(prompts)],
        [(slot, len(ids) + 1, [9] * (1 + slot % 3)) for slot, ids in enumerate(prompts)],
    ]
    for parts in passes:
        with torch.inference_mode():
            exact, plain, found = (way.logits(way.hidden(Batch.of(parts, "cuda"))) for way in ways)
        assert relative_error(found, exact) < 1.3 * relative_error(plain, exact) + 1e-3


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantized_model_equals_that_of_the_cpu(tmp_path, kind):
    save_random(tmp_path, {**SHAPES["GQA"], "dim": 128, "n_layers": 1})
    logits = []
    for device in ("cpu", "cuda"):
        model = Llama.build(tmp_path, TOKENIZER, 64, 4, device=device, dtype="float32", quantize=kind).model
        with torch.inference_mode():
            logits.append(model(TOKENS.to(device), 0).cpu())
    assert relative_error(*logits) < 0.05
