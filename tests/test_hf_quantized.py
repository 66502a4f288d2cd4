"""Hugging Face folders whose weights are quantized: GPTQ, AWQ, compressed-tensors, bitsandbytes, FP8 and FP4."""

import hashlib
import json
import shutil

import pytest
import quantized_folders
import torch
from quantized_folders import ERRORS, METHODS, both, edited, part, settings, widened
from safetensors.torch import load_file
from small import GQA, SHAPES, TOKENIZER, in_process, needs_cpp, random_model, relative_error
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from llama import Llama
from llama.checkpoint import Checkpoint
from llama.checkpoint.convert import convert
from llama.checkpoint.hf import names, to_pairs
from llama.checkpoint.plan import shapes, shard_dim
from llama.cli.inspect import inspect

WIDE = {**GQA, "dim": 256, "n_layers": 2, "multiple_of": 256}
TOKENS = torch.tensor([[1, 300, 301, 4, 550, 7, 1000, 1023] * 4, [1, 9, 8, 7, 6, 5, 4, 3] * 4])
FLOATS = {
    "gptq in another order",
    "w4a16 in groups of 4",
    "nf4",
    "fp4",
    *(method for method in METHODS if method.startswith(("fp8", "mxfp8"))),
}


def write(folder, method, shape=WIDE, **options):
    """A folder of a method, with a tokenizer, and Hugging Face's model of the dequantized weights."""
    if method in ("nf4", "fp4"):
        pytest.importorskip("bitsandbytes")
    theirs = quantized_folders.write(folder, random_model(shape, 1024), method, **options)
    shutil.copy(TOKENIZER, folder)
    return theirs


@pytest.fixture(scope="module", params=METHODS)
def written(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized") / "model"
    return folder, request.param, write(folder, request.param)


def build(path, **options):
    return Llama.build(path, max_seq_len=64, device="cpu", dtype="float32", **options)


def logits(path, **options):
    llama = build(path, **options)
    with torch.inference_mode():
        return llama.model(TOKENS, 0).clone()


def exact(theirs):
    with torch.inference_mode():
        return theirs(TOKENS).logits


def test_values_are_those_of_the_folder(written):
    """Exactly, or up to the rounding to float16 of a scale and of a minimum, which is up to 15 or 128 scales."""
    folder, method, theirs = written
    checkpoint = Checkpoint(folder)
    assert (checkpoint.scheme is None) == (method in FLOATS)
    state = theirs.state_dict()
    keys = names(2)
    for name in shapes(checkpoint.args(1024)):
        whole = state[keys[name]]
        whole = to_pairs(whole, 32) if ".wq." in name or ".wk." in name else whole
        bound = 1e-6 * whole.abs()
        if checkpoint.scheme and (own := checkpoint.scheme.of(name)):
            matrix = checkpoint.quantized(name, whole.shape, 0, whole.shape[shard_dim(name)])
            most = sum(part.abs().amax() for part in matrix[1:] if part is not None).float()
            bound = whole.abs() * 2**-10 + most * 2**-10
            assert (matrix.bits, matrix.min is None) == (own.bits, own.symmetric)
            assert matrix.shape[1] // matrix.scale.shape[1] == own.group_size(matrix.shape[1])
        dim = shard_dim(name) or 0
        for begin, end in ((0, whole.shape[dim]), (whole.shape[dim] // 2, whole.shape[dim])):
            found = checkpoint.read(name, whole.shape, begin, end, torch.float32)
            expected = whole.narrow(dim, begin, end - begin)
            assert ((found - expected).abs() <= bound.narrow(dim, begin, end - begin)).all(), name


def test_logits(written):
    folder, method, theirs = written
    assert relative_error(logits(folder, compile=False), exact(theirs)) < (1e-5 if method in FLOATS else 5e-3)


@needs_cpp
def test_logits_of_the_native_backend(written):
    """It quantizes activations to 8 bits where weights are quantized."""
    folder, method, theirs = written
    assert relative_error(logits(folder, compile=True), exact(theirs)) < (1e-5 if method in FLOATS else 0.06)


def test_on_two_ranks(written, ranks):
    folder, method, theirs = written
    for found in ranks(2).run(logits, folder):
        assert relative_error(found, exact(theirs)) < (1e-5 if method in FLOATS else 5e-3)


# Against the packages that write such folders


@pytest.mark.parametrize("method", ["w4a16", "w8a16"])
def test_transformers_loads_the_same(tmp_path, method):
    """With 8-bit activations, as of w8a8, it would round these too."""
    pytest.importorskip("compressed_tensors")
    theirs = write(tmp_path / "model", method)
    assert torch.equal(exact(AutoModelForCausalLM.from_pretrained(tmp_path / "model")), exact(theirs))


PARTS = {
    "w4a16 with zeros": "PackedQuantizationCompressor",
    "w8a8 with zeros": "IntQuantizationCompressor",
    "mxfp8": "MXFP8QuantizationCompressor",
    "nvfp4": "NVFP4PackedCompressor",
    "mxfp4": "MXFP4PackedCompressor",
}


@pytest.mark.parametrize("method", PARTS)
def test_values_are_those_of_compressed_tensors(tmp_path, method):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors import compressors
    from compressed_tensors.quantization import QuantizationConfig

    theirs = write(tmp_path / "model", method)
    config = QuantizationConfig(**json.loads((tmp_path / "model/config.json").read_text())["quantization_config"])
    stem, tensors = "model.layers.0.mlp.up_proj.", {}
    for file in (tmp_path / "model").glob("*.safetensors"):
        tensors |= {key.removeprefix(stem): tensor for key, tensor in load_file(file).items() if key.startswith(stem)}
    found = getattr(compressors, PARTS[method]).decompress(tensors, config.config_groups["group_0"])["weight"]
    expected = theirs.state_dict()[f"{stem}weight"]
    assert relative_error(found.float(), expected) < 4e-3  # it computes in the dtype of the scale, bfloat16


def test_awq_is_unpacked_as_by_compressed_tensors(tmp_path):
    converters = pytest.importorskip("compressed_tensors.entrypoints.convert.converters")
    weight, generator = torch.randn(64, 96), torch.Generator().manual_seed(0)
    tensors, values = quantized_folders.awq(weight, generator)
    found = converters.AutoAWQConverter()._convert_gemm_module(**tensors)
    q, scale, zero = (part.float().repeat_interleave(96 // part.shape[1], 1) for part in found)
    assert torch.equal((q - zero) * scale, values)


@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
def test_bitsandbytes_as_saved_by_transformers(tmp_path, storage):
    bnb = pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    write(tmp_path / "model", "fp8").save_pretrained(tmp_path / "float")
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": storage}
    config = BitsAndBytesConfig(load_in_4bit=True, **options)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config, device_map="cpu")
    saved.save_pretrained(tmp_path / "saved")
    layer = saved.model.layers[1].mlp.down_proj.weight
    expected = bnb.functional.dequantize_4bit(layer.data, layer.quant_state).float()
    checkpoint = Checkpoint(tmp_path / "saved")
    found = checkpoint.read("layers.1.feed_forward.w2.weight", expected.shape, 0, 768, torch.float32)
    assert relative_error(found, expected) < 1e-6


# Other folders


def test_an_output_matrix_is_quantized_too(tmp_path):
    theirs = write(tmp_path / "model", "gptq", output=True)
    assert Checkpoint(tmp_path / "model").scheme.of("output.weight") == (4, 32, False)
    assert relative_error(logits(tmp_path / "model", compile=False), exact(theirs)) < 5e-3


COMPRESSED = {"format": "dense", "global_sparsity": 0.1, "ignore": [], "sparsity_structure": "unstructured"}
SAME = {
    "not sparse": ("w4a16", settings(sparsity_config=COMPRESSED, transform_config={}), None),
    "sparseml": ("w8a8", settings(quant_method="sparseml"), None),
    "compression_config": (
        "fp8 by rows",
        lambda config: config.update(compression_config=config.pop("quantization_config")),
        None,
    ),
    "nested": (
        "w4a16",
        lambda config: config.update(quantization_config={"quantization_config": config["quantization_config"]}),
        None,
    ),
    "8 bits in one matrix": (
        "w4a16",
        settings(format="mixed-precision"),
        part("weight_packed", lambda t: widened(t, 120)),
    ),
    "a dynamic GPTQ": (
        "gptq",
        settings(dynamic={"up_proj": {"bits": 8}}, format="gptq"),
        both(part("qweight", lambda t: widened(t.T).T), part("qzeros", widened)),
    ),
    "version in upper case": ("gptq v2", settings(checkpoint_format="GPTQ_V2"), None),
    "version by format": ("gptq v2", settings(checkpoint_format=None, format="gptq_v2"), None),
    "AutoRound": ("gptq", settings(quant_method="auto-round", packing_format="auto_round:auto_gptq"), None),
    "AutoRound by AWQ": ("awq", settings(quant_method="intel/auto-round", packing_format="auto_round:auto_awq"), None),
    "modelopt": ("fp8", settings(quant_method="modelopt", quant_algo="FP8"), None),
    "no method": ("llm.int8", settings(quant_method=None), None),
    "scales of the cache": (
        "fp8",
        None,
        lambda tensors: tensors.update(
            {f"model.layers.0.self_attn.{n}": torch.ones(1) for n in ("kv_scale", "q_scale")}
        ),
    ),
    "a scale (1, 1)": ("fp8", None, part("weight_scale", lambda t: t.view(1, 1))),
    "a scale (rows,)": ("fp8 by rows", None, part("weight_scale", lambda t: t[:, 0])),
    "scales of groups": ("fp8 by rows", None, part("weight_scale", lambda t: t.repeat(1, 4))),
    "signed zeros": (
        "w4a16 with zeros",
        None,
        part("weight_zero_point", lambda t: widened(t.T)[:, None].view(torch.int8).flatten(1).T - 8),
    ),
    "an order that is not used": (
        "w4a16",
        None,
        lambda tensors: tensors.update({"model.layers.1.mlp.up_proj.weight_g_idx": torch.full((256,), -1).int()}),
    ),
    "bytes as floats": ("nf4", None, part("weight", lambda t: t.view(-1).view(torch.bfloat16)[:, None])),
}


@pytest.mark.parametrize("case", SAME)
def test_spellings_of_the_same_matrices(tmp_path, case):
    method, config, tensors = SAME[case]
    theirs = write(tmp_path / "model", method)
    edited(tmp_path / "model", config, tensors)
    assert relative_error(logits(tmp_path / "model", compile=False), exact(theirs)) < 1e-2


FILES = {
    "quantize_config.json": ("gptq", {"bits": 4, "group_size": 32, "desc_act": False}),
    "quant_config.json": ("awq", {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}),
    "hf_quant_config.json": ("fp8", {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None}}),
}


@pytest.mark.parametrize("name", FILES)
def test_files_in_place_of_quantization_config(tmp_path, name):
    method, content = FILES[name]
    theirs = write(tmp_path / "model", method)
    edited(tmp_path / "model", lambda config: config.pop("quantization_config"), lambda tensors: None)
    (tmp_path / "model" / name).write_text(json.dumps(content))
    if method == "gptq":  # AutoGPTQ's name
        (tmp_path / "model/model.safetensors").rename(tmp_path / "model/gptq_model-4bit-32g.safetensors")
    assert relative_error(logits(tmp_path / "model", compile=False), exact(theirs)) < 5e-3


@pytest.mark.parametrize("method", ["gptq", "awq", "w4a16 with zeros", "w8a8", "fp8 by blocks", "nf4"])
def test_rows_of_padding_are_left_out(tmp_path, method):
    """The last of AWQ's words of eight rows was left out with them."""
    theirs = write(tmp_path / "model", method, output=True)
    checkpoint = Checkpoint(tmp_path / "model")
    checkpoint.trim(1021)
    found = checkpoint.read("output.weight", (1021, 256), 0, 1021, torch.float32)
    assert relative_error(found, theirs.lm_head.weight[:1021]) < 5e-3


def test_columns_that_fill_no_word(tmp_path):
    theirs = write(tmp_path / "model", "w4a16 in groups of 4", {**SHAPES["odd FFN"], "n_layers": 2})
    assert relative_error(logits(tmp_path / "model", compile=False), exact(theirs)) < 1e-5


def test_a_bin_file(tmp_path):
    theirs = write(tmp_path / "model", "fp8")
    tensors = {}
    for file in (tmp_path / "model").glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    torch.save(tensors, tmp_path / "model" / "pytorch_model.bin")
    assert relative_error(logits(tmp_path / "model", compile=False), exact(theirs)) < 1e-5


def test_commands_take_a_folder(tmp_path):
    write(tmp_path / "model", "awq")
    done = in_process(inspect, tmp_path / "model", "--max_seq_len", 64)
    assert done.returncode == 0 and "in int4 in groups of 32 by awq" in done.stdout
    names = [file.name for file in (tmp_path / "model").iterdir() if file.suffix in (".safetensors", ".model")]
    sums = [f"{hashlib.md5((tmp_path / 'model' / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (tmp_path / "model" / "checklist.chk").write_text("".join(sums))
    done = in_process(inspect, tmp_path / "model", "--verify")
    assert done.returncode == 0 and "files: 2, in int4" in done.stdout
    done = in_process(inspect, tmp_path / "model", "--quantize", "int8")
    assert "model is quantized already, to int4 in groups of 32 by awq; it cannot become int8" in done.stderr
    for to in ("meta", "hf"):
        convert(tmp_path / "model", tmp_path / to, to, 1, torch.float32)
        assert relative_error(logits(tmp_path / to, compile=False), logits(tmp_path / "model", compile=False)) < 1e-5
    write(tmp_path / "fp8", "fp8")
    done = in_process(inspect, tmp_path / "fp8")
    assert "files: 2, in float32, with matrices by fp8 that are loaded as floats" in done.stdout
    assert build(tmp_path / "fp8", quantize="int8").text_completion(["Once"], max_gen_len=4, temperature=0)


@pytest.mark.parametrize("case", ERRORS)
def test_what_cannot_be_read_is_named(tmp_path, case):
    method, config, tensors, message = ERRORS[case]
    write(tmp_path / "model", method)
    edited(tmp_path / "model", config, tensors)
    with pytest.raises(ValueError, match=message) as error:
        build(tmp_path / "model", compile=False)
    assert "model" in str(error.value)


def test_ranks_divide_a_group(tmp_path, ranks):
    """Of wo's 256 columns, two groups, each of 4 ranks has 64."""
    theirs = write(tmp_path / "model", "w8a16", {**WIDE, "n_heads": 8})
    for found in ranks(4).run(logits, tmp_path / "model"):
        assert relative_error(found, exact(theirs)) < 5e-3
