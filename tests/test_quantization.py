"""Rounding to 8 and 4 bits: against the definition, and fast against plain, on any number of ranks."""

import doctest
import json
import math
import os
import subprocess
import sys
from functools import partial
from unittest import mock

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
    needs_cpp,
    random_model,
    relative_error,
    save_random,
)

from llama import Llama, checkpoint
from llama.backends import cpu, quantized
from llama.backends.quantized import Plain, Quantized, Scheme, dequantize, kernel, quantize, scheme
from llama.checkpoint import memory
from llama.cli import measure as bench
from llama.cli.convert import convert
from llama.cli.inspect import inspect
from llama.layers import linear
from llama.parallel import cpu_has

CPU = torch.device("cpu")
SCHEMES = [Scheme(8, 0), Scheme(4, 32), Scheme(4, 64), Scheme(4, 128)]
TOKENS = torch.tensor([[1, 5, 9, 2, 77, 30], [3, 3, 8, 100, 41, 6]])
EACH = pytest.mark.parametrize("scheme", SCHEMES, ids=str)
# One layer: random ones that follow multiply what rounding does to the first. Feed-forward 384.
WIDE = {**GQA, "dim": 128, "multiple_of": 128, "n_layers": 1}


def test_the_document_says_what_happens():
    assert doctest.testfile(str(ROOT / "docs" / "quantization.md"), module_relative=False) == (0, 6)


def test_eight_bits_worked_out_by_hand():
    """A scale of a row is its largest number / 127; 0.1 / (0.254 / 127) = 50."""
    found = quantize(torch.tensor([[0.254, -0.1, 0.0], [-1.27, 0.634, 0.02]]), Scheme(8, 0))
    assert found.q.tolist() == [[127, -50, 0], [-127, 63, 2]]
    assert found.scale.flatten().tolist() == pytest.approx([0.002, 0.01])
    assert found.zero is None


def test_four_bits_worked_out_by_hand():
    """-0.25 to 0.5 in 15 steps of 0.05 (0.0500488 in bfloat16): -0.25 is 0, 0 is 5, 0.12 is 7, 0.5 is 15."""
    row = torch.zeros(1, 64)
    row[0, :4] = torch.tensor([-0.25, 0.5, 0.12, 0.0])
    q, scale, zero = quantize(row, Scheme(4, 64))
    assert scale.tolist() == [[0.050048828125]] and zero.tolist() == [[5]]
    assert q[0, :2].tolist() == [0 | 15 << 4, 7 | 5 << 4]
    assert dequantize(Quantized(q, scale, zero))[0, :4].tolist() == pytest.approx([-0.25, 0.5, 0.1, 0], rel=2e-3)


@EACH
@pytest.mark.parametrize("search", [False, True])
def test_no_number_is_further_off_than_half_a_step(scheme, search):
    weight = torch.randn(48, 256) * 0.02
    found = quantize(weight, scheme, search)
    step = found.scale.float().repeat_interleave(256 // found.scale.shape[1], 1)
    off = (dequantize(found) - weight).abs()
    if search and scheme.bits == 4:  # the ends of a range may be further off, the sum of squares is not
        assert off.square().sum() < (dequantize(quantize(weight, scheme)) - weight).square().sum()
    else:
        assert (off <= step * 0.52 + (0.06 * step if scheme.bits == 4 else 0)).all()


def test_numbers_of_no_range_stay_what_they_are():
    for which in SCHEMES:
        assert not dequantize(quantize(torch.zeros(16, 128), which)).any()
    ones = torch.ones(16, 128)
    assert torch.allclose(dequantize(quantize(ones, Scheme(8, 0))), ones)
    assert torch.allclose(dequantize(quantize(ones, Scheme(4, 64))), ones, rtol=4e-3)


@EACH
@pytest.mark.parametrize("rows", [1, 3, 40, 150])
@pytest.mark.parametrize("shape", [(48, 128), (64, 352), (8, 96), (272, 128)])
@pytest.mark.parametrize("compiled", [False, True])
def test_fast_is_plain(scheme, rows, shape, compiled):
    torch.manual_seed(0)  # one draw in a hundred of the smallest shape is rounded worse than is allowed
    weight = quantize(torch.randn(shape), scheme)
    matrix, plain = kernel(weight, CPU, compiled), Plain(weight, CPU)
    assert matrix.nbytes == scheme.nbytes(shape) and matrix.shape == plain.shape == shape
    fast, x = matrix, torch.randn(2, rows, shape[1])
    assert relative_error(fast(x), plain(x)) < 1e-2
    assert relative_error(plain(x), F.linear(x, dequantize(weight))) < 1e-6
    assert fast(x.bfloat16()).dtype == torch.bfloat16
    assert fast(x * 1e-20).isfinite().all() and not fast(x * 0).any()
    half = torch.cat((x, x), -1).bfloat16()[..., : shape[1]]  # strided, as the gate of a feed-forward layer is
    assert relative_error(fast(half).float(), plain(x)) < 2e-2


@EACH
@pytest.mark.parametrize("compiled", [False, True])
def test_no_rows(scheme, compiled):
    matrix = kernel(quantize(torch.randn(64, 128), scheme), CPU, compiled)
    assert linear(torch.randn(2, 0, 128), matrix).shape == (2, 0, 64)


@pytest.mark.skipif(not cpu_has("avx512_vnni", "avx_vnni"), reason="needs a CPU with VNNI")
def test_int8_reaches_no_reference_code():
    """oneDNN multiplies in a way that is for reference where it has no other, a thousand times as slowly."""
    code = """import torch; from llama.backends.quantized import *; from llama.backends.quantized import kernel
kernel(quantize(torch.randn(64, 128), scheme("int8")), torch.device("cpu"))(torch.randn(64, 128))"""
    told = subprocess.check_output([sys.executable, "-c", code], env={**os.environ, "ONEDNN_VERBOSE": "1"}, text=True)
    products = [line for line in told.splitlines() if ",matmul," in line]
    assert products
    assert not any(",ref" in line for line in products)


@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_not_finite_stays_so_in_its_row(compiled):
    for which in SCHEMES:
        multiply = kernel(quantize(torch.randn(64, 128), which), CPU, compiled)
        x = torch.randn(11, 128)
        x[4, 100], x[9, 3] = math.nan, math.inf
        finite = multiply(x).isfinite()
        assert finite.all(1).tolist() == [i not in (4, 9) for i in range(11)]
        assert not finite[4].any() and not finite[9].any()


@needs_cpp
def test_four_bits_are_compiled_where_that_is_possible(folder, monkeypatch, caplog):
    build_one = partial(build, folder, "int4", compile=True)
    assert isinstance(build_one().model.output.weight, quantized.Int4Compiled)
    assert not isinstance(build(folder, "int4").model.output.weight, quantized.Int4Compiled)
    monkeypatch.setattr(cpu, "cpp", cpu.cpp.__wrapped__)
    monkeypatch.setattr(cpu, "library", mock.Mock(side_effect=RuntimeError("no g++")))
    assert isinstance(build_one().model.output.weight, quantized.Int4Cpu)
    assert "cpu.cpp is not compiled, which is slower: RuntimeError: no g++" in caplog.text
    monkeypatch.setattr(cpu, "cpu_has", lambda *units: False)
    assert isinstance(build_one().model.output.weight, quantized.Int4Cpu)


@pytest.mark.parametrize("out", [48, 64, 1152])
def test_four_bits_are_packed_by_hand_only_as_torch_packs_them(out, monkeypatch):
    weight = quantize(torch.randn(out, 128), scheme("int4"))
    packed = quantized.Int4Cpu(weight, CPU).packed
    assert torch.equal(packed, quantized.packed_by_torch(weight.q).view(out, -1))
    monkeypatch.setattr(quantized, "packed_by_hand", torch.zeros_like)
    assert torch.equal(packed, quantized.Int4Cpu(weight, CPU).packed)


@needs_cpp
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_few_rows_by_eight_bits_read_what_onednn_has_packed(rows, monkeypatch):
    weight, x = quantize(torch.randn(192, 320), scheme("int8")), torch.randn(rows, 320)
    multiply = kernel(weight, CPU, compiled=True)
    assert isinstance(multiply.native, cpu.Matrix)
    assert relative_error(multiply(x), kernel(weight, CPU)(x)) < 1e-6
    monkeypatch.setattr(torch, "equal", lambda *tensors: False)  # as if it had packed in another way
    multiply = kernel(weight, CPU, compiled=True)
    assert multiply.native is None
    assert relative_error(multiply(x), kernel(weight, CPU)(x)) < 1e-6


@pytest.mark.parametrize("compiled", [False, True])
def test_a_row_of_a_batch_is_computed_as_it_would_be_alone(compiled):
    """Were the activations of a batch scaled together, a large row would blur its neighbours. A row may differ by the
    rounding of its sums, whose order depends on the number of rows: relative to the row's largest output."""
    torch.manual_seed(0)
    for which in SCHEMES:
        multiply = kernel(quantize(torch.randn(64, 128), which), CPU, compiled)
        x = torch.randn(5, 128) * torch.tensor([[1.0], [100.0], [0.01], [1.0], [1e4]])
        together, alone = multiply(x), torch.cat([multiply(row[None]) for row in x])
        assert ((together - alone).abs().amax(-1) <= 1e-5 * alone.abs().amax(-1)).all()


def build(folder, quantize=None, group_size=64, **options):
    return Llama.build(
        folder, TOKENIZER, 64, 4, device="cpu", dtype="float32", quantize=quantize, group_size=group_size, **options
    )


def logits(model):
    model.allocate_cache()
    with torch.inference_mode():
        return model(TOKENS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("wide")
    save_random(path, WIDE, mp=2)
    return path


@EACH
def test_a_model_is_quantized_as_its_matrices_are(folder, scheme):
    """The oracle: an unquantized model that holds what the rounded matrices say."""
    llama = build(folder, f"int{scheme.bits}", scheme.group or 64)
    plain = build(folder).model
    for name, weight in plain.named_parameters():
        if checkpoint.is_matrix(name):
            weight.copy_(dequantize(quantize(weight, scheme)))
    exact = logits(build(folder).model)
    assert relative_error(logits(llama.model), logits(plain)) < 0.04
    assert relative_error(logits(plain), exact) < (0.03 if scheme.bits == 8 else 0.4)
    assert llama.model.layers[0].attention.wk.weight.shape == (64, 128)
    assert not any(checkpoint.is_matrix(name) for name, _ in llama.model.named_parameters())


@EACH
def test_a_checkpoint_that_was_quantized_is_what_is_quantized_when_loaded(folder, scheme, tmp_path):
    kind = f"int{scheme.bits}"
    flags = ("--quantize", kind, "--group_size", scheme.group or 64, "--nosearch", "--tokenizer_path", TOKENIZER)
    for mp in (1, 2) if scheme.group < 128 else (1,):  # half of wo's 128 columns are no group of 128
        done = in_process(convert, folder, tmp_path / f"{mp}", "--mp", mp, *flags)
        assert done.returncode == 0, done.stderr
        loaded = build(tmp_path / f"{mp}")
        assert torch.equal(logits(loaded.model), logits(build(folder, kind, scheme.group or 64).model))
    assert json.loads((tmp_path / "1" / "params.json").read_text())["quantization"] == scheme.params()
    told = in_process(inspect, tmp_path / "1", "--device", "cpu", "--verify", "--tokenizer_path", TOKENIZER)
    assert f"in {scheme}" in told.stdout
    back = in_process(convert, tmp_path / f"{mp}", tmp_path / "back", "--tokenizer_path", TOKENIZER)
    assert back.returncode == 0, back.stderr
    assert torch.equal(logits(build(tmp_path / "back").model), logits(loaded.model))  # 2 shards -> 1, still quantized


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
        assert relative_error(found, expected) < 0.04  # each rank rounds activations of its own


def test_groups_that_ranks_cannot_divide_are_named(ranks, folder, tmp_path):
    path, flags = tmp_path / "coarse", ("--quantize", "int4", "--group_size", 128, "--tokenizer_path", TOKENIZER)
    assert not in_process(convert, folder, path, *flags).returncode
    for _, error in ranks(2).outcomes(on_ranks, path, None):
        assert error[0] == "ValueError" and "groups are too large for this number of ranks" in error[1]
    done = in_process(convert, folder, tmp_path / "two", *flags, "--mp", 2)
    assert "wo.scales (128, 1) cannot be divided into mp 2 shards" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int3"}, "quantize is 'int3'; it must be int8 or int4"),
        ({"quantize": 8}, "quantize is 8; it must be int8 or int4"),
        ({"quantize": "int4", "group_size": 48}, "group_size is 48; it must be one of 32, 64, 128"),
        ({"quantize": "int4", "group_size": "64"}, "group_size is '64'"),
    ],
)
def test_bad_schemes_are_named(folder, options, message):
    with pytest.raises(ValueError, match=message):
        build(folder, **options)


def test_a_quantized_checkpoint_is_of_one_scheme(folder, tmp_path):
    flags = ("--nosearch", "--tokenizer_path", TOKENIZER)
    in_process(convert, folder, tmp_path / "q", "--quantize", "int8", *flags)
    with pytest.raises(ValueError, match="is quantized already, to int8; it cannot become int4 in groups of 64"):
        build(tmp_path / "q", "int4")
    done = in_process(convert, tmp_path / "q", tmp_path / "hf", "--to", "hf", *flags)
    assert "Hugging Face's layout has no place for int8" in done.stderr
    edit_params(tmp_path / "q", quantization={"bits": 5})
    with pytest.raises(ValueError, match=r"params.json: quantization is \{'bits': 5\}"):
        build(tmp_path / "q")
    edit_params(tmp_path / "q", quantization={"bits": 4, "group_size": 64})
    with pytest.raises(ValueError, match=r"missing: .*layers.0.attention.wq.scales"):
        build(tmp_path / "q")


@EACH
def test_the_footprint_is_what_is_held(folder, scheme):
    llama = build(folder, f"int{scheme.bits}", scheme.group or 64)
    held = sum(weight.nbytes for weight in llama.model.parameters())
    weights = [getattr(module, "weight", None) for module in llama.model.modules()]
    held += sum(weight.nbytes for weight in weights if isinstance(weight, (Plain, quantized.Rows)))
    assert memory.footprint(llama.model.params, 1, torch.float32, scheme).weights == held


@pytest.mark.parametrize("name", ["small", "small-chat"])
def test_the_bundled_models_still_know_what_they_know(name):
    llama = Llama.build(MODELS / name, max_seq_len=128, max_batch_size=2, device="cpu", quantize="int8")
    if name == "small":
        [found] = llama.text_completion(["The opposite of hot is"], temperature=0, max_gen_len=4)
        assert found["generation"].startswith(" cold")
    else:
        dialog = [{"role": "user", "content": "What is the opposite of big?"}]
        [answer] = llama.chat_completion([dialog], temperature=0)
        assert "small" in answer["generation"]["content"]


def test_gradients_have_no_way_through_whole_numbers_but_logits_do(folder):
    assert build(folder, "int8").model(TOKENS).shape == (2, 6, 1024)  # without inference mode


def test_a_random_model_keeps_its_vocabulary():
    assert random_model(WIDE).vocab_size == 128
    with pytest.raises(ValueError, match="40 columns cannot be quantized in groups of 32"):
        scheme("int4").columns(40)
