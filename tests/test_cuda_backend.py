"""The CUDA backend's kernels in Triton's interpreter on a CPU, compared with the plain backend."""

import pytest
import torch
from small import SHAPES, random_model, relative_error

if torch.cuda.is_available():
    pytest.skip("there the kernels run as they are: test_gpu.py", allow_module_level=True)
pytest.importorskip("triton")

from llama import Llama, backends, engine
from llama.backends import cuda, quantized, quantized_matmul
from llama.backends.quantized import Scheme
from llama.batch import Batch, Span

PROMPTS = [[5, 17, 99, 3], [64], [127, 0, 7, 7, 7, 8, 9, 100, 101, 102]]
SHORT = {name: {**SHAPES[name], "n_layers": 1} for name in ("GQA", "MQA", "odd FFN")}
# The interpreter takes a millisecond for each program, several with coverage: few and large programs.
cuda.kernels.ONE.update({32: (64, 512, 4, 2), 8: (64, 256, 4, 2), 4: (64, 256, 4, 2)})
cuda.kernels.SOME.update({32: (64, 64, 4, 3), 8: (32, 256, 4, 4), 4: (32, 256, 4, 4)})  # quantized: each warp a slice
cuda.kernels.MORE.update({32: (64, 64, 4, 3), 8: (64, 128, 4, 3), 4: (64, 64, 4, 3)})


class Interpreted(cuda.Cuda):
    """The backend without CUDA graphs."""

    def hidden(self, batch):
        single = all(sequence.length == 1 for sequence in batch.sequences)
        return self.layers_output(*batch[:3], None if single else batch)


def both(model, parts):
    """Logits of a pass by the plain backend and by the CUDA backend, each with its own cache."""
    return [way.logits(way.hidden(Batch.of(parts))) for way in model]


@pytest.mark.parametrize("shape", SHORT)
def test_prompts_and_steps_give_the_models_logits(shape):
    """Prompts of several lengths in one pass, then steps of one sequence and of all, with a longer chunk between."""
    ways = random_model(SHORT[shape]), Interpreted(random_model(SHORT[shape]))
    passes = [
        [(slot, 0, ids) for slot, ids in enumerate(PROMPTS)],
        [(1, 1, [11])],
        [(0, 4, [11]), (1, 2, [12]), (2, 10, [13])],
        [(0, 5, [12]), (2, 8, [101, 102, 11]), (1, 3, [11])],
    ]
    for parts in passes:
        plain, found = both(ways, parts)
        assert relative_error(found, plain) < 1e-5


@pytest.mark.parametrize("few", [0, 64])
def test_the_last_layer_is_computed_only_where_it_is_needed(few, monkeypatch):
    monkeypatch.setitem(cuda.FEW, 16, few)
    model, sequences = random_model(SHORT["GQA"]), [(0, 0, 5), (2, 0, 1), (1, 0, 7)]
    batch = Batch.arrange(torch.arange(13), [Span(*sequence) for sequence in sequences])
    exact, embedded = model.hidden(batch), model.tok_embeddings(batch.tokens)
    for outputs in ([1, 1, 2], [0, 1, 0], [0, 0, 0], [5, 1, 7]):
        found = Interpreted(random_model(SHORT["GQA"])).hidden(batch._replace(outputs=outputs))
        needed = [row for end, count in zip((5, 6, 13), outputs, strict=True) for row in range(end - count, end)]
        rest = [row for row in range(13) if row not in needed]
        assert torch.allclose(found[needed], exact[needed], rtol=1e-4, atol=1e-5)
        assert torch.equal(found[rest], embedded[rest])  # the input of the only layer


def on_two_ranks():
    ways = random_model(SHORT["GQA"]), Interpreted(random_model(SHORT["GQA"]))
    passes = [(0, 0, [5, 17, 99]), (1, 0, [64] * 20)], [(0, 3, [7])], [(0, 4, [7]), (1, 20, [8])]
    return max(relative_error(found, plain) for plain, found in (both(ways, parts) for parts in passes))


def test_ranks_share_a_pass(ranks):
    assert max(ranks(2).run(on_two_ranks)) < 1e-5


@pytest.mark.parametrize("strides", [False, True])
def test_many_tokens_use_cublas(strides, monkeypatch):
    """Also where attention returns strides (…, D, H D, 1), as one of its kernels does."""
    if strides:
        real = torch.nn.functional.scaled_dot_product_attention

        def permuted(*args, **options):
            return real(*args, **options).transpose(1, 2).contiguous().transpose(1, 2)

        monkeypatch.setattr(cuda.F, "scaled_dot_product_attention", permuted)
    ways = random_model(SHORT["GQA"]), Interpreted(random_model(SHORT["GQA"]))
    plain, found = both(ways, [(1, 0, torch.randint(128, (40,), generator=torch.Generator().manual_seed(0)).tolist())])
    assert relative_error(found, plain) < 1e-5
    plain, found = both(ways, [(0, 0, [5]), (1, 40, [7, 8])])
    assert relative_error(found, plain) < 1e-5


SCHEMES = [Scheme(8), Scheme(8, 16), Scheme(8, 32), Scheme(8, 32, False)]
SCHEMES += [Scheme(4, 16), Scheme(4, 32, False), Scheme(4, 32)]


def check_matmul(scheme, rows, columns):
    matrix = torch.randn(40, columns, generator=torch.Generator().manual_seed(0))
    weight = quantized.quantize(matrix, scheme)
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    exact = x.double() @ quantized.dequantize(weight).double().t()
    assert relative_error(quantized_matmul.Cuda(weight, torch.device("cpu"))(x).double(), exact) < 1e-5


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 40, 80])
def test_quantized_matrices(scheme, rows):
    check_matmul(scheme, rows, 352)


@pytest.mark.parametrize("scheme", [Scheme(8), Scheme(8, 32), Scheme(4, 32)], ids=str)
@pytest.mark.parametrize("size", [1e12, 1e-12])
def test_large_and_small_activations(scheme, size):
    weight = quantized.quantize(torch.randn(40, 352, generator=torch.Generator().manual_seed(0)), scheme)
    x = torch.randn(1, 352, generator=torch.Generator().manual_seed(1)) * size
    exact = x.double() @ quantized.dequantize(weight).double().t()
    assert relative_error(quantized_matmul.Cuda(weight, torch.device("cpu"))(x).double(), exact) < 1e-5


@pytest.mark.parametrize(
    ("scheme", "columns", "has"),
    [
        (Scheme(8), 340, True),
        (Scheme(8, 32), 340, True),
        (Scheme(8, 32, False), 340, False),
        (Scheme(4, 16), 352, True),
    ],
)
def test_which_matrices_have_a_kernel(scheme, columns, has):
    assert quantized_matmul.has_cuda_kernel(quantized.quantize(torch.randn(4, columns), scheme)) == has


@pytest.mark.parametrize(("scheme", "columns"), [(Scheme(8), 340), (Scheme(4, 32), 336)])
def test_one_token_where_columns_are_no_whole_chunks(scheme, columns):
    check_matmul(scheme, 1, columns)


def test_padding_stores_nothing():
    backend = Interpreted(random_model(SHORT["GQA"]))
    step = Batch.of([(0, 0, [5])])
    one = backend.logits(backend.hidden(step))
    before = [layer.cache.clone() for layer in backend.layers]
    tokens, positions, slots = torch.tensor([5, 0]), torch.tensor([0, -1]), torch.tensor([0, 0])
    two = backend.logits(backend.layers_output(tokens, positions, slots)[:1])
    assert relative_error(two, one) < 1e-5
    for layer, cache in zip(backend.layers, before, strict=True):
        assert relative_error(layer.cache, cache) < 1e-5


def test_launching_ahead_gives_the_plain_tokens(tokenizer, monkeypatch):
    """More prompts than slots, so that prompts and steps share passes."""
    prompts, lengths = [[1, 400, 401], [1], [1, *range(300, 318)]], [4, 2, 3]
    expected = Llama(random_model(SHORT["GQA"], vocab_size=tokenizer.n_words, max_batch_size=2), tokenizer).generate(
        prompts, lengths, 0
    )
    monkeypatch.setattr(engine, "AHEAD", {"cpu"})
    monkeypatch.setattr(backends, "choose", lambda model, compile: Interpreted(model))
    llama = Llama(random_model(SHORT["GQA"], vocab_size=tokenizer.n_words, max_batch_size=2), tokenizer)
    assert llama.generate(prompts, lengths, 0) == expected
    assert type(llama.engine.backend) is Interpreted


def test_a_step_that_cannot_be_captured_is_launched_each_time(monkeypatch, caplog):
    class Stream:
        def wait_stream(self, other): ...

        def __enter__(self): ...

        def __exit__(self, *error): ...

    def refuse(*args):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(torch.cuda, "device", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: type("Graph", (), {"replay": None}))
    monkeypatch.setattr(torch.cuda, "graph", refuse)
    ways = random_model(SHORT["GQA"]), cuda.Cuda(random_model(SHORT["GQA"]))
    for parts in ([(0, 0, [5])], [(0, 1, [6]), (2, 0, [7])], [(0, 2, [6])]):
        plain, found = both(ways, parts)
        assert relative_error(found, plain) < 1e-5
    assert [record.message for record in caplog.records] == 2 * [
        "decoding without CUDA graphs, as recording one failed: operation not permitted when stream is capturing"
    ]


def test_weights_are_concatenated_once():
    model = random_model(SHORT["GQA"])
    expected = [weight.clone() for weight in model.parameters()]
    first = cuda.Cuda(model).layers[0].qkv.q.data_ptr()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected, strict=True))
    assert cuda.Cuda(model).layers[0].qkv.q.data_ptr() == first == model.layers[0].attention.wq.weight.data_ptr()


@pytest.mark.parametrize("scheme", ["int8", "int4", "mixed"])
def test_concatenated_quantized_matrices(scheme):
    """As loaded for a GPU. In a GGUF file wv often has more bits than wq and wk."""
    model = random_model(WIDE := {**SHORT["GQA"], "dim": 128})
    plain = random_model(WIDE)
    for layer, same in zip(model.layers, plain.layers, strict=True):
        for part, names in (
            ("attention", "wq wk wv"),
            ("attention", "wo"),
            ("feed_forward", "w1 w3"),
            ("feed_forward", "w2"),
        ):
            ours = [getattr(getattr(layer, part), name) for name in names.split()]
            theirs = [getattr(getattr(same, part), name) for name in names.split()]
            mixed = {"wv": Scheme(8, 16), "w3": Scheme(8, 32)}
            usual = Scheme(4, 32, False) if scheme == "mixed" else quantized.scheme(scheme)
            schemes = [mixed.get(name, usual) if scheme == "mixed" else usual for name in names.split()]
            rounded = [quantized.quantize(linear.weight, own) for linear, own in zip(ours, schemes, strict=True)]
            whole, at = quantized_matmul.Cuda(quantized.stack(rounded), torch.device("cpu")), 0
            for linear, other, weight in zip(ours, theirs, rounded, strict=True):
                other.weight.copy_(quantized.dequantize(weight))
                del linear.weight
                end = at + len(weight.q)
                linear.weight = quantized_matmul.Rows(whole, at, end) if len(ours) > 1 else whole
                at = end
    ways = plain, Interpreted(model)
    for parts in (
        [(0, 0, [5, 17, 99]), (1, 0, [64] * 70 ** (scheme == "int8"))],
        [(0, 3, [7])],
        [(0, 4, [7]), (1, 1, [8])],
    ):
        parts = [(slot, start, ids[:60]) for slot, start, ids in parts]
        exact, found = both(ways, parts)
        assert relative_error(found, exact) < 1e-3
