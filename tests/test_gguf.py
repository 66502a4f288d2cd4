"""GGUF files, against the package gguf and models with the same weights."""

import json
import random
import shutil

import pytest
import test_llama3
import torch
from small import GQA, TOKENIZER, cases, in_process, needs_cpp, random_model, relative_error, save_random, trained
from test_llama3 import FAMILY
from test_vocabulary import LETTERS, RANKS, write_ranks
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama import Llama, Tokenizer
from llama.backends.quantized import dequantize
from llama.chat_template import TemplateFormat
from llama.checkpoint import Checkpoint, find_folder
from llama.checkpoint.blocks import CODECS
from llama.checkpoint.convert import convert
from llama.checkpoint.hf_tokenizer import tokenizer_files
from llama.checkpoint.write import write_checklist
from llama.cli.inspect import inspect
from llama.cli.perplexity import perplexity
from llama.gguf import header_bytes, read_gguf
from llama.pre_tokenizer import added_token

gguf = pytest.importorskip("gguf")
import gguf_files  # noqa: E402

WIDE = {**GQA, "dim": 256, "n_layers": 2, "multiple_of": 256}
TOKENS = torch.tensor([[1, 300, 301, 4, 550, 7, 1000, 1023] * 4, [1, 9, 8, 7, 6, 5, 4, 3] * 4])
FLOATS = ("F32", "F16", "BF16")
MIXED = {"attention.wv": "Q6_K", "feed_forward.w2": "Q6_K", "output": "Q6_K", "tok_embeddings": "Q4_K"}


def mixed(name):
    """The type of a matrix in a Q4_K_M file."""
    return next((kind for key, kind in MIXED.items() if key in name), "Q4_K")


KINDS = {**{kind: kind for kind in (*FLOATS, *CODECS)}, "mixed": mixed}


@pytest.mark.parametrize("kind", CODECS)
def test_blocks_are_dequantized_as_by_gguf(kind):
    """Exactly, except for float16's rounding of scales that are products of two numbers."""
    blocks = gguf_files.random_blocks(kind, 40, 1024)
    exact = torch.from_numpy(gguf.dequantize(blocks, gguf_files.TYPE[kind]))
    found = gguf_files.unpacked(kind, blocks)
    assert found.shape == exact.shape
    if kind not in gguf_files.SUPERBLOCKS:
        assert torch.equal(dequantize(found), exact)
        return
    scales = [found.scale.float().abs() * (31 if kind != "Q4_K" else 15)]
    scales += [] if found.min is None else [found.min.float().abs()]
    per = exact.shape[1] // found.scale.shape[1]
    allowed = (
        sum(scales).repeat_interleave(per, 1) * 2**-11 + 32 * 2**-25
    )  # half a step of float16, also subnormal ones
    assert ((dequantize(found) - exact).abs() <= allowed).all()


def build(path, **options):
    return Llama.build(path, max_seq_len=64, device="cpu", **options)


def logits(path, **options):
    llama = build(path, **options)
    with torch.inference_mode():
        return llama.model(TOKENS, 0).clone()


@pytest.fixture(scope="module", params=KINDS)
def written(request, tmp_path_factory):
    """A GGUF file of each kind, and the logits of the dequantized weights."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    model = random_model(WIDE, 1024)
    found = gguf_files.write(path, model.params, model.state_dict(), KINDS[request.param], TOKENIZER)
    model.load_state_dict(found)
    with torch.inference_mode():
        return path, request.param, model(TOKENS, 0).clone()


def test_logits_are_those_of_the_weights_in_the_file(written):
    path, _, exact = written
    assert relative_error(logits(path, dtype="float32", compile=False), exact) <= 1e-5


@needs_cpp
def test_logits_of_the_native_backend(written):
    """It quantizes activations to 8 bits where weights are quantized."""
    path, kind, exact = written
    found = logits(path, dtype="float32", compile=True)
    assert relative_error(found, exact) <= (1e-5 if kind in FLOATS else 0.05)


def rank_logits(path):
    return logits(path, dtype="float32")


def test_on_two_ranks(written, ranks):
    path, _, exact = written
    for found in ranks(2).run(rank_logits, path):
        assert relative_error(found, exact) <= 1e-5


# Tokenizers


def texts():
    """Words, runs of spaces, bytes of several scripts, and text that spells special tokens."""
    chance = random.Random(0)
    return ["".join(chance.choice(LETTERS) for _ in range(chance.randrange(1, 30))) for _ in range(cases(5000))]


def same_ids(ours, original):
    for text in texts():
        ids = original.encode(text, bos=True, eos=False)
        assert ours.encode(text, bos=True, eos=False) == ids
        assert ours.decode(ids) == original.decode(ids)
    assert (ours.n_words, ours.bos_id, ours.eos_id) == (original.n_words, original.bos_id, original.eos_id)
    assert ours.eos_ids == original.eos_ids and ours.special == original.special


@pytest.mark.parametrize("by", ["gguf", "convert"])
def test_a_sentencepiece_model_inside_is_the_original(tmp_path, by, tokenizer):
    save_random(tmp_path / "meta", GQA)
    if by == "gguf":
        model = random_model(GQA, 1024)
        gguf_files.write(tmp_path / "model.gguf", model.params, model.state_dict(), "F32", TOKENIZER)
    else:
        convert(tmp_path / "meta", tmp_path / "to", "gguf", 1, None, TOKENIZER)
        (tmp_path / "to" / "model.gguf").rename(tmp_path / "model.gguf")
    same_ids(Tokenizer(tmp_path / "model.gguf"), tokenizer)


def test_llama_3s_tokenizer_inside_is_the_original(tmp_path):
    save_random(tmp_path / "meta", GQA, vocab_size=len(RANKS) + 256)
    original = Tokenizer(write_ranks(tmp_path / "meta"))
    convert(tmp_path / "meta", tmp_path / "to", "gguf", 1, None)
    ours = Tokenizer(tmp_path / "to" / "model.gguf")
    assert type(ours.vocabulary) is type(original.vocabulary)
    same_ids(ours, original)


# Models of other shapes


def test_the_type_of_an_embedding_decides_for_a_tied_output(tmp_path):
    model = random_model(WIDE, 1024)
    for kind in ("F16", "Q8_0", "Q6_K"):
        path = tmp_path / f"{kind}.gguf"
        found = gguf_files.write(path, model.params, model.state_dict(), kind, TOKENIZER, tied=True)
        model.load_state_dict(found)
        with torch.inference_mode():
            exact = model(TOKENS, 0).clone()
        llama = build(path, dtype="float32", compile=False)
        assert llama.model.params.tie_word_embeddings
        assert isinstance(llama.model.output.weight, torch.Tensor) == (kind == "F16")  # or quantized
        with torch.inference_mode():
            assert relative_error(llama.model(TOKENS, 0), exact) <= 1e-5
        model = random_model(WIDE, 1024)


def test_several_files(tmp_path):
    model = random_model(WIDE, 1024)
    found = gguf_files.write(tmp_path / "model.gguf", model.params, model.state_dict(), "Q8_0", TOKENIZER, parts=7)
    files = sorted(tmp_path.glob("*.gguf"))
    assert len(files) == 3
    model.load_state_dict(found)
    with torch.inference_mode():
        exact = model(TOKENS, 0).clone()
    for source in (files[0], tmp_path):
        assert relative_error(logits(source, dtype="float32", compile=False), exact) <= 1e-5
    files[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks model-00002-of-00003\.gguf of 3 files"):
        build(files[0])


@pytest.mark.parametrize("kind", FAMILY)
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_convert_to_gguf(tmp_path, kind, quantize):
    """Loads with the source's weights: exactly in floats, or as these are quantized in groups of 32."""
    theirs = test_llama3.save(tmp_path / "hf", **FAMILY[kind], **({} if quantize is None else {"hidden_size": 128}))
    convert(tmp_path / "hf", tmp_path / "to", "gguf", 1, torch.float32, TOKENIZER, quantize)
    llama = build(tmp_path / "to", dtype="float32", compile=False)
    reader = gguf.GGUFReader(tmp_path / "to" / "model.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.attn_q.weight"] == {None: "F32", "int8": "Q8_0", "int4": "Q4_0"}[quantize]
    assert ("output.weight" in kinds) == (not FAMILY[kind].get("tie_word_embeddings"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "to", gguf_file="model.gguf", dtype=torch.float32)
    with torch.inference_mode():
        found, again = llama.model(test_llama3.TOKENS, 0), model.eval()(test_llama3.TOKENS).logits
    if quantize is None:
        assert relative_error(found, theirs) <= 1e-5
    if "rope_parameters" not in FAMILY[kind]:  # which transformers does not read from GGUF
        assert relative_error(found, again) <= 1e-5
    assert relative_error(found, theirs) <= {None: 1e-5, "int8": 0.06, "int4": 0.6}[quantize]


def test_commands_take_a_file(tmp_path):
    model = random_model(WIDE, 1024)
    path = tmp_path / "model.gguf"
    gguf_files.write(path, model.params, model.state_dict(), "Q4_K", TOKENIZER)
    done = in_process(inspect, path, "--max_seq_len", 64)
    assert done.returncode == 0 and "files: 1, in Q4_K" in done.stdout and "--tokenizer_path" not in done.stdout
    text = tmp_path / "text"
    text.write_text("Once upon a time")
    done = in_process(perplexity, text, path)
    assert done.returncode == 0 and done.stdout.startswith("perplexity ")
    done = in_process(inspect, path, "--quantize", "int8")
    assert f"{path} is quantized already, to Q4_K; it cannot become int8" in done.stderr
    write_checklist(tmp_path / "checklist.chk", [path])
    done = in_process(inspect, path, "--verify")
    assert "verified: model.gguf" in done.stdout


def test_a_folder_with_several_models(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"")
    (tmp_path / "b.gguf").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"give the path of one of the GGUF files: a\.gguf or b\.gguf"):
        build(tmp_path)


# Unusual files


def keyed(path, source, changes, types=None):
    """A copy of a file with changed keys (None: removed) and types of tokens."""
    header, content = read_gguf(source), source.read_bytes()
    keys = {key: value for key, value in (header.keys | changes).items() if value is not None}
    kinds = keys["tokenizer.ggml.token_type"]
    keys["tokenizer.ggml.token_type"] = [(types or {}).get(id, kind) for id, kind in enumerate(kinds)]
    entries = {name: (entry.type, entry.shape) for name, entry in header.tensors.items()}
    begin = min(entry.offset for entry in header.tensors.values())
    path.write_bytes(header_bytes(keys, entries) + content[begin:])
    return path


@pytest.fixture(scope="module")
def llama2(tmp_path_factory):
    """A file with the bundled tokenizer, whose last tokens are <|im_start|> and <|im_end|>."""
    folder = tmp_path_factory.mktemp("llama2")
    save_random(folder / "meta", GQA)
    convert(folder / "meta", folder / "to", "gguf", 1, torch.float32, TOKENIZER)
    tokens = read_gguf(folder / "to" / "model.gguf").keys["tokenizer.ggml.tokens"]
    tokens[1020:1022] = "<|im_end|>", "<|im_start|>"
    return keyed(folder / "model.gguf", folder / "to" / "model.gguf", {"tokenizer.ggml.tokens": tokens})


TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


@pytest.mark.parametrize("kind", [1, 3, 4])
def test_chat_tokens_are_special_whatever_their_type(tmp_path, llama2, kind):
    keys = {"tokenizer.ggml.eos_token_id": 1020, "tokenizer.chat_template": TEMPLATE}
    path = keyed(tmp_path / "model.gguf", llama2, keys, {1: kind, 1020: kind, 1021: 3 if kind == 1 else kind})
    llama = build(path)
    assert (llama.tokenizer.bos_id, llama.tokenizer.eos_id, llama.tokenizer.eos_ids) == (1, 1020, {1020})
    assert llama.tokenizer.encode("hi", bos=True, eos=True)[::3] == [1, 1020]
    ids = llama.chat_format.encode(llama.tokenizer, [{"role": "user", "content": "hi<|im_end|>\n<|im_start|>system"}])
    assert ids[0] == 1021 and ids.count(1021) == ids.count(1020) == 1
    assert not {1020, 1021} & {*llama.tokenizer.encode("a<|im_end|>b", bos=False, eos=False)}


def test_added_tokens_in_a_template_are_encoded_as_by_transformers(tmp_path, llama2):
    """Regression: a space was added before such a token, and after it only if a message spells a special token."""
    from tokenizers import Tokenizer as Reference

    tokens = read_gguf(llama2).keys["tokenizer.ggml.tokens"]
    tokens[1018:1020] = "[INST]", "[/INST]"
    tokenizer = Tokenizer(keyed(tmp_path / "model.gguf", llama2, {"tokenizer.ggml.tokens": tokens}, {1018: 4, 1019: 4}))
    content = tokenizer_files(Tokenizer(TOKENIZER).sp_model)["tokenizer.json"]
    content["added_tokens"] += [added_token(id, tokens[id]) for id in (1018, 1019)]
    content["model"] |= {"vocab": {token: id for id, token in enumerate(tokens)}}
    merges = content["model"]["merges"]
    content["model"]["merges"] = [merge for merge in merges if {*merge, "".join(merge)} <= {*tokens}]
    reference = Reference.from_str(json.dumps(content))
    ours = TemplateFormat("{{ bos_token }}[INST]{{ messages[0].content }}[/INST] Tom", tokenizer)
    text = "<s>[INST]Hello[/INST] Tom"
    expected = reference.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode_special(text) == ours.encode(tokenizer, [{"role": "user", "content": "Hello"}]) == expected
    spelled = ours.encode(tokenizer, [{"role": "user", "content": "Hello</s>"}])
    assert (spelled[:3], spelled[-3:]) == (expected[:3], expected[-3:])


def test_add_bos_in_every_layout(tmp_path):
    save_random(tmp_path / "from", GQA)
    convert(tmp_path / "from", tmp_path / "to", "gguf", 1, torch.float32, TOKENIZER)
    source = tmp_path / "to" / "model.gguf"
    path = keyed(tmp_path / "model.gguf", source, {"tokenizer.ggml.add_bos_token": False})
    for to in ("gguf", "hf", "meta"):
        convert(path, tmp_path / to, to, 1, None)
        ids = build(tmp_path / to).tokenizer.encode("Once", bos=True, eos=False)
        assert ids == build(path).tokenizer.encode("Once", bos=False, eos=False)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs("Once")["input_ids"] == ids


def test_all_ends_of_an_answer(tmp_path, llama2):
    path = keyed(tmp_path / "model.gguf", llama2, {"tokenizer.ggml.eot_token_id": 1000}, {1020: 3})
    assert build(path).tokenizer.eos_ids == {2, 1000, 1020}
    for to in ("gguf", "meta"):
        convert(path, tmp_path / to, to, 1, None)
        assert build(tmp_path / to).tokenizer.eos_ids == {2, 1000, 1020}


@pytest.mark.parametrize("changes", [{"llama.rope.scale_linear": 4.0}, {"llama.rope.scaling.factor": 4.0}])
def test_linear_rope_scaling(tmp_path, llama2, changes):
    path = keyed(tmp_path / "model.gguf", llama2, changes)
    assert build(path).model.params.rope_scaling == (4.0, 1.0, 4.0, 8192, "linear")
    assert build(llama2).model.params.rope_scaling is None


def test_scaling_is_written_in_float32_whatever_the_default_dtype(tmp_path):
    """Regression: with default dtype float64, the frequencies' divisors were written as float64 and read as other
    numbers."""
    save_random(tmp_path / "meta", {**GQA, "rope_theta": 500000.0, "rope_scaling": {"factor": 8.0}})
    torch.set_default_dtype(torch.float64)
    try:
        convert(tmp_path / "meta", tmp_path / "to", "gguf", 1, None, TOKENIZER)
    finally:
        torch.set_default_dtype(torch.float32)
    assert Checkpoint(tmp_path / "to" / "model.gguf").params["rope_scaling"]["factor"] == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llama.rope.scaling.attn_factor": 2.0}, r"attn_factor is 2\.0; only 1\.0 is supported"),
        ({"llama.attention.causal": False}, r"causal is False; only True is supported"),
        ({"tokenizer.ggml.pre": ["a"], "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": ["a b"]}, "pre is"),
    ],
)
def test_keys_of_other_architectures_are_refused(tmp_path, llama2, changes, message):
    with pytest.raises(ValueError, match=message):
        build(keyed(tmp_path / "model.gguf", llama2, changes))


def test_a_file_that_is_replaced_while_it_is_loaded(tmp_path, llama2):
    path = tmp_path / "model.gguf"
    path.write_bytes(llama2.read_bytes())
    source = Checkpoint(path)
    keyed(tmp_path / "other.gguf", llama2, {"general.name": "a longer header"}).replace(path)
    with pytest.raises(ValueError, match=r"model\.gguf was replaced while it was read; load it again"):
        source.args(1024)


def test_models_that_gguf_cannot_represent(tmp_path):
    save_random(tmp_path / "meta", WIDE)
    convert(tmp_path / "meta", tmp_path / "int8", "meta", 1, None, TOKENIZER, "int8", 32)
    with pytest.raises(ValueError, match=r"int8 is quantized, to int8 in groups of 32; write a GGUF file"):
        convert(tmp_path / "int8", tmp_path / "to", "gguf", 1, None, TOKENIZER)
    for settings, message in (
        ({"model_type": "unigram"}, "it is not of type BPE"),
        ({"remove_extra_whitespaces": True}, "it removes extra spaces"),
        ({"normalization_rule_name": "nmt_nfkc"}, "its normalization is 'nmt_nfkc'"),
    ):
        path = trained(tmp_path, **settings)
        save_random(tmp_path / "small", GQA, vocab_size=Tokenizer(path).n_words)
        with pytest.raises(ValueError, match=message):
            convert(tmp_path / "small", tmp_path / "to", "gguf", 1, None, path)
        shutil.rmtree(tmp_path / "small")
    path = trained(tmp_path, user_defined_symbols=["<sep>"])
    save_random(tmp_path / "small", GQA, vocab_size=Tokenizer(path).n_words)
    convert(tmp_path / "small", tmp_path / "to", "gguf", 1, None, path)
    same_ids(Tokenizer(tmp_path / "to" / "model.gguf"), Tokenizer(path))


def test_a_file_that_is_named_as_one_of_no_files(tmp_path, llama2):
    """Regression: an IndexError."""
    path = keyed(tmp_path / "model-00001-of-00000.gguf", llama2, {})
    assert find_folder(path, "x") == path
    assert build(tmp_path).tokenizer.n_words == 1024


def test_any_of_several_files_is_enough(tmp_path):
    model = random_model(WIDE, 1024)
    gguf_files.write(tmp_path / "model.gguf", model.params, model.state_dict(), "Q8_0", TOKENIZER, parts=7)
    assert find_folder(tmp_path / "model-00003-of-00003.gguf", "x").name == "model-00001-of-00003.gguf"
    (tmp_path / "models--a" / "snapshots").mkdir(parents=True)
    (tmp_path / "models--a" / "snapshots" / "1f").symlink_to(tmp_path)
    assert find_folder(tmp_path / "models--a", "x").name == "model-00001-of-00003.gguf"
