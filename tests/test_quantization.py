"""int8 and int4 quantization: against the definition, fast kernels against plain ones, and on several ranks."""

import doctest
import json
import math

import pytest
import torch
import torch.nn.functional as F
from small import (
    GQA,
    MODELS,
    ROOT,
    TOKENIZER,
    edit_params,
    in_process,
    random_model,
    relative_error,
    save_random,
)

from llama import Llama
from llama.backends.quantized import Quantized, Scheme, dequantize, quantize, scheme
from llama.backends.quantized_matmul import Dequantized, Packed, kernel
from llama.checkpoint import Checkpoint, memory
from llama.cli import measure as bench
from llama.cli.convert import convert
from llama.cli.inspect import inspect
from llama.layers import linear

CPU = torch.device("cpu")
SCHEMES = [*(Scheme(8, group) for group in (0, 32, 128)), *(Scheme(4, group, False) for group in (16, 32, 64, 128))]
SCHEMES += [Scheme(4, 32)]
TOKENS = torch.tensor([[1, 5, 9, 2, 77, 30], [3, 3, 8, 100, 41, 6]])
EACH = pytest.mark.parametrize("scheme", SCHEMES, ids=str)
ASKED = pytest.mark.parametrize("scheme", SCHEMES[:-1], ids=str)  # values of `quantize` and `group_size`
# One layer: further random layers amplify the first one's rounding errors. Hidden size 384.
WIDE = {**GQA, "dim": 128, "multiple_of": 128, "n_layers": 1}


def test_the_example_of_the_documents():
    assert doctest.testfile(str(ROOT / "docs" / "quantization.md"), module_relative=False) == (0, 6)


def test_eight_bits_worked_out_by_hand():
    """A row's scale is its largest magnitude / 127; 0.1 / (0.254 / 127) = 50."""
    found = quantize(torch.tensor([[0.254, -0.1, 0.0], [-1.27, 0.634, 0.02]]), Scheme(8))
    assert found.q.tolist() == [[127, -50, 0], [-127, 63, 2]]
    assert found.scale.flatten().tolist() == pytest.approx([0.002, 0.01], rel=1e-3)
    assert found.min is None


def test_four_bits_worked_out_by_hand():
    """-0.25 to 0.5 in 15 steps of 0.05: -0.25 is 0, 0 is 5, 0.12 is 7, 0.5 is 15."""
    row = torch.zeros(1, 64)
    row[0, :4] = torch.tensor([-0.25, 0.5, 0.12, 0.0])
    q, scale, least = quantize(row, Scheme(4, 64, symmetric=False))
    assert scale.tolist() == [[pytest.approx(0.05, rel=1e-3)]] and least.tolist() == [[-0.25]]
    assert q[0, :2].tolist() == [0 | 15 << 4, 7 | 5 << 4]
    assert dequantize(Quantized(q, scale, least))[0, :4].tolist() == pytest.approx([-0.25, 0.5, 0.1, 0], abs=1e-3)
    # Symmetric: 0.5 is -8 steps of -0.0625; 4 is the least distance from -0.25, and -1.92 is nearest to -2.
    q, scale, least = quantize(row, Scheme(4, 64))
    assert scale.tolist() == [[-0.0625]] and least is None
    assert q[0, :2].tolist() == [12 | 0 << 4, 6 | 8 << 4]


@EACH
def test_errors_are_at_most_half_a_step(scheme):
    weight = torch.randn(48, 256) * 0.02
    found = quantize(weight, scheme)
    step = found.scale.float().abs().repeat_interleave(256 // found.scale.shape[1], 1)
    off = (dequantize(found) - weight).abs()
    # Symmetric int4 ends at 7, which the largest weight of opposite sign may exceed by up to a step.
    assert (off <= step * (1.01 if scheme.symmetric and scheme.bits == 4 else 0.52)).all()


def test_constant_weights_are_unchanged():
    for which in SCHEMES:
        assert not dequantize(quantize(torch.zeros(16, 128), which)).any()
    ones = torch.ones(16, 128)
    for which in SCHEMES:
        assert torch.allclose(dequantize(quantize(ones, which)), ones, rtol=1e-3)


@EACH
@pytest.mark.parametrize("rows", [1, 3, 40, 150])
@pytest.mark.parametrize("shape", [(48, 128), (64, 352), (8, 96), (272, 128)])
@pytest.mark.parametrize("compiled", [False, True])
def test_fast_kernels_equal_plain_ones(scheme, rows, shape, compiled):
    torch.manual_seed(0)  # for one seed in a hundred the smallest shape exceeds the bound
    weight = quantize(torch.randn(shape), scheme)
    matrix, plain = kernel(weight, CPU, compiled), Dequantized(weight, CPU)
    assert matrix.nbytes == scheme.nbytes(shape) or (shape[0] % 64 and matrix.shape == plain.shape == shape)
    fast, x = matrix, torch.randn(2, rows, shape[1])
    assert relative_error(fast(x), plain(x)) < 1e-2
    assert relative_error(plain(x), F.linear(x, dequantize(weight))) < 1e-6
    assert fast(x.bfloat16()).dtype == torch.bfloat16
    assert fast(x * 1e-20).isfinite().all() and not fast(x * 0).any()
    half = torch.cat((x, x), -1).bfloat16()[..., : shape[1]]  # strided, as the gate of a feed-forward layer is
    assert relative_error(fast(half).float(), plain(x)) < 2e-2


@EACH
@pytest.mark.parametrize("compiled", [False, True])
def test_matmul_of_no_rows(scheme, compiled):
    matrix = kernel(quantize(torch.randn(64, 128), scheme), CPU, compiled)
    assert linear(torch.randn(2, 0, 128), matrix).shape == (2, 0, 64)


@pytest.mark.parametrize("compiled", [False, True])
def test_non_finite_values_stay_in_their_row(compiled):
    for which in SCHEMES:
        multiply = kernel(quantize(torch.randn(64, 128), which), CPU, compiled)
        x = torch.randn(11, 128)
        x[4, 100], x[9, 3] = math.nan, math.inf
        finite = multiply(x).isfinite()
        assert finite.all(1).tolist() == [i not in (4, 9) for i in range(11)]
        assert not finite[4].any() and not finite[9].any()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_row_of_a_batch_is_computed_as_it_would_be_alone(compiled):
    """If a batch shared a scale of activations, a large row would take precision from others. A row may differ by the
    rounding of its sums, whose order depends on the number of rows: relative to the row's largest output."""
    torch.manual_seed(0)
    for which in SCHEMES:
        multiply = kernel(quantize(torch.randn(64, 128), which), CPU, compiled)
        x = torch.randn(5, 128) * torch.tensor([[1.0], [100.0], [0.01], [1.0], [1e4]])
        together, alone = multiply(x), torch.cat([multiply(row[None]) for row in x])
        assert ((together - alone).abs().amax(-1) <= 1e-5 * alone.abs().amax(-1)).all()


def build(folder, quantize=None, group_size=None, **options):
    return Llama.build(
        folder, TOKENIZER, 64, 4, device="cpu", dtype="float32", quantize=quantize, group_size=group_size, **options
    )


def asked(scheme):
    """Options for a scheme. Symmetric int4 groups exist in files only."""
    return f"int{scheme.bits}", scheme.group


def logits(model):
    model.allocate_cache()
    with torch.inference_mode():
        return model(TOKENS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("wide")
    save_random(path, WIDE, mp=2)
    return path


@ASKED
def test_a_quantized_model_equals_one_of_dequantized_matrices(folder, scheme):
    """The reference is an unquantized model with the dequantized weights."""
    llama = build(folder, *asked(scheme))
    plain = build(folder).model
    for name, weight in plain.named_parameters():
        if own := scheme.of(name):
            weight.copy_(dequantize(quantize(weight, own)))
    exact = logits(build(folder).model)
    assert relative_error(logits(llama.model), logits(plain)) < 0.04
    assert relative_error(logits(plain), exact) < (0.03 if scheme.bits == 8 else 0.4)
    assert llama.model.layers[0].attention.wk.weight.shape == (64, 128)
    assert not any(scheme.of(name) for name, _ in llama.model.named_parameters())


@ASKED
def test_converted_and_loaded_quantization_are_equal(folder, scheme, tmp_path):
    kind = f"int{scheme.bits}"
    flags = ("--quantize", kind, "--nosearch", "--tokenizer_path", TOKENIZER)
    flags += ("--group_size", scheme.group) if scheme.group else ()
    for mp in (1, 2) if scheme.group < 128 else (1,):  # half of wo's 128 columns cannot have groups of 128
        done = in_process(convert, folder, tmp_path / f"{mp}", "--mp", mp, *flags)
        assert done.returncode == 0, done.stderr
        loaded = build(tmp_path / f"{mp}")
        assert torch.equal(logits(loaded.model), logits(build(folder, *asked(scheme)).model))
    assert json.loads((tmp_path / "1" / "params.json").read_text())["quantization"] == scheme.params()
    told = in_process(inspect, tmp_path / "1", "--device", "cpu", "--verify", "--tokenizer_path", TOKENIZER)
    assert f"in {scheme}" in told.stdout
    back = in_process(convert, tmp_path / f"{mp}", tmp_path / "back", "--tokenizer_path", TOKENIZER)
    assert back.returncode == 0, back.stderr
    assert torch.equal(logits(build(tmp_path / "back").model), logits(loaded.model))  # 2 shards -> 1, still quantized


@pytest.mark.parametrize(("device", "group"), [("cpu", 128), ("cuda", 0), (None, 0)])
def test_default_groups_of_int8(folder, device, group):
    target = device and torch.device(device)
    checkpoint = Checkpoint(folder)
    assert checkpoint.scheme_for("int8", None, device=target) == Scheme(8, group)
    assert checkpoint.scheme_for("int8", 0, device=target) == Scheme(8)
    assert checkpoint.scheme_for("int4", None, device=target) == Scheme(4, 32, False)


def test_indivisible_columns_of_int8_have_one_scale_for_each_row():
    weight = torch.randn(3, 40)
    assert Scheme(8, 128).group_size(40) == 40
    rows, grouped = (dequantize(quantize(weight, Scheme(8, group))) for group in (0, 128))
    assert torch.equal(rows, grouped)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_folder_of_hugging_face_is_quantized_when_loaded(folder, kind, tmp_path):
    in_process(convert, folder, tmp_path / "hf", "--to", "hf", "--tokenizer_path", TOKENIZER)
    assert torch.equal(logits(build(tmp_path / "hf", kind).model), logits(build(folder, kind).model))


def on_ranks(path, kind):
    model = build(path, kind, 32).model
    with torch.inference_mode():
        return model(TOKENS), bench.work(model, bench.Case(1, 8, 2))[0]


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(("kind", "saved"), [("int8", False), ("int4", False), ("int8", True), ("int4", True)])
def test_ranks_share_a_quantized_model(ranks, folder, tmp_path, world_size, kind, saved):
    expected = logits(build(folder, kind, 32).model)
    path = folder
    if saved:
        path, flags = tmp_path / "saved", ("--nosearch", "--group_size", 32, "--tokenizer_path", TOKENIZER)
        assert not in_process(convert, folder, path, "--quantize", kind, *flags).returncode
    for found, _ in ranks(world_size).run(on_ranks, path, None if saved else kind):
        assert relative_error(found, expected) < 0.04  # each rank quantizes its own activations


def default_on_ranks(path, kind="int8"):
    with torch.inference_mode():
        return build(path, kind).model(TOKENS)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_int8_in_groups_that_divide_their_columns(ranks, folder, world_size):
    """Of wo's 128 columns each rank has 64 or 32, which cannot have groups of 128."""
    expected = logits(build(folder, "int8").model)
    for found in ranks(world_size).run(default_on_ranks, folder):
        assert relative_error(found, expected) < 0.04


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_divide_groups(ranks, folder, tmp_path, world_size):
    """Of wo's 128 columns, one group, each rank has 64 or 32; of w2's 384 in three groups, 192 or 96."""
    path, flags = tmp_path / "coarse", ("--quantize", "int4", "--group_size", 128, "--tokenizer_path", TOKENIZER)
    assert not in_process(convert, folder, path, *flags).returncode
    expected = logits(build(path).model)
    for found in ranks(world_size).run(default_on_ranks, path, None):
        assert relative_error(found, expected) < 0.04


def test_groups_that_ranks_cannot_divide_are_named(ranks, tmp_path):
    """Of w2's 368 columns each rank has 184."""
    save_random(tmp_path / "odd", {**WIDE, "multiple_of": 368})
    flags = ("--quantize", "int4", "--nosearch", "--tokenizer_path", TOKENIZER)
    assert not in_process(convert, tmp_path / "odd", tmp_path / "saved", *flags).returncode
    messages = [error[1] for _, error in ranks(2).outcomes(default_on_ranks, tmp_path / "saved", None)]
    assert (
        "feed_forward.w2.weight (128, 368) of int4 in groups of 32 cannot be divided at columns 0 and 184"
        in messages[0]
    )


@pytest.mark.parametrize("scheme", [Scheme(8), Scheme(8, 128), Scheme(4, 64), Scheme(4, 32, False)], ids=str)
@pytest.mark.parametrize(("begin", "end"), [(0, 256), (0, 128), (64, 128), (48, 256), (208, 224)])
def test_columns_keep_their_values(scheme, begin, end):
    whole = quantize(torch.randn(5, 256), scheme)
    assert torch.equal(dequantize(whole.columns(begin, end)), dequantize(whole)[:, begin:end])


def test_groups_that_shards_cannot_divide_are_named(folder, tmp_path):
    flags = ("--quantize", "int4", "--group_size", 128, "--tokenizer_path", TOKENIZER)
    done = in_process(convert, folder, tmp_path / "two", *flags, "--mp", 2)
    assert "wo.scales (128, 1) cannot be divided into mp 2 shards" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int3"}, "quantize is 'int3'; it must be int8 or int4"),
        ({"quantize": 8}, "quantize is 8; it must be int8 or int4"),
        ({"quantize": "int4", "group_size": 48}, "group_size is 48; it must be one of 16, 32, 64, 128"),
        ({"quantize": "int4", "group_size": "64"}, "group_size is '64'"),
        ({"quantize": "int4", "group_size": 0}, "group_size is 0; it must be one of 16, 32, 64, 128"),
        ({"quantize": "int8", "group_size": 8}, "group_size is 8; it must be one of 0, 16, 32, 64, 128"),
    ],
)
def test_bad_schemes_are_named(folder, options, message):
    with pytest.raises(ValueError, match=message):
        build(folder, **options)


def test_a_quantized_checkpoint_is_of_one_scheme(folder, tmp_path):
    flags = ("--tokenizer_path", TOKENIZER)
    in_process(convert, folder, tmp_path / "q", "--quantize", "int8", *flags)
    with pytest.raises(ValueError, match="is quantized already, to int8; it cannot become int4 in groups of 32"):
        build(tmp_path / "q", "int4")
    with pytest.raises(ValueError, match="is quantized already, to int8; it cannot become int8 in groups of 32"):
        build(tmp_path / "q", "int8", 32)
    done = in_process(convert, tmp_path / "q", tmp_path / "hf", "--to", "hf", *flags)
    assert "Hugging Face's layout cannot hold int8" in done.stderr
    edit_params(tmp_path / "q", quantization={"bits": 5})
    with pytest.raises(ValueError, match=r"params.json: quantization is \{'bits': 5\}"):
        build(tmp_path / "q")
    edit_params(tmp_path / "q", quantization={"bits": 4, "group_size": 64})  # of an earlier release
    with pytest.raises(ValueError, match=r"convert SOURCE TARGET --quantize"):
        build(tmp_path / "q")
    edit_params(tmp_path / "q", quantization={"bits": 4, "group_size": 64, "symmetric": False})
    with pytest.raises(ValueError, match=r"missing: .*layers.0.attention.wq.scales"):
        build(tmp_path / "q")


@ASKED
def test_estimated_memory_is_allocated_memory(folder, scheme):
    llama = build(folder, *asked(scheme))
    held = sum(weight.nbytes for weight in llama.model.parameters())
    weights = [getattr(module, "weight", None) for module in llama.model.modules()]
    held += sum(weight.nbytes for weight in weights if isinstance(weight, (Dequantized, Packed)))
    assert memory.footprint(llama.model.params, 1, torch.float32, scheme).weights == held


@pytest.mark.parametrize("name", ["small", "small-chat"])
def test_quantized_bundled_models_keep_their_accuracy(name):
    llama = Llama.build(MODELS / name, max_seq_len=128, max_batch_size=2, device="cpu", quantize="int8")
    if name == "small":
        [found] = llama.text_completion(["The opposite of hot is"], temperature=0, max_gen_len=4)
        assert found["generation"].startswith(" cold")
    else:
        dialog = [{"role": "user", "content": "What is the opposite of big?"}]
        [answer] = llama.chat_completion([dialog], temperature=0)
        assert "small" in answer["generation"]["content"]


def test_a_quantized_model_outside_of_inference_mode(folder):
    assert build(folder, "int8").model(TOKENS).shape == (2, 6, 1024)  # without inference mode


def test_a_random_model_keeps_its_vocabulary():
    assert random_model(WIDE).vocab_size == 128
    with pytest.raises(ValueError, match="40 columns cannot be quantized in groups of 16"):
        scheme("int4").group_size(40)
