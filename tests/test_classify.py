"""Score heads against transformers' LlamaForSequenceClassification with the same ids."""

import copy
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import GQA, MODELS, TOKENIZER, in_process, needs_cpp, random_model, relative_error, save_random
from test_chat_formats import TEMPLATES
from test_vocabulary import write_ranks

from llama import Chat, Llama, Tokenizer, checkpoint
from llama.backends.cpu import Native
from llama.batch import Batch
from llama.chat import get_chat_format
from llama.checkpoint.convert import convert
from llama.cli.bench import bench
from llama.cli.convert import convert as convert_command
from llama.cli.inspect import inspect
from llama.scoring import classify, perplexity

OURS = Tokenizer(TOKENIZER)
TEXTS = ["The sun was warm.", "", "a🙂b", "Once upon a time there was a fox", "x", "The sun was cold and far away"]
ROWS = [OURS.encode(text, bos=True, eos=False) for text in TEXTS]
ANSWERED = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}]
SYSTEM = [{"role": "system", "content": "Be short."}, *ANSWERED]
LONG = [*SYSTEM, {"role": "user", "content": "And then?"}, {"role": "assistant", "content": "Nothing."}]
DIALOGS = [ANSWERED, SYSTEM, LONG]


def saved(folder, num_labels=2, **settings):
    """Save a random model with transformers; returns the model."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    shape = {"vocab_size": OURS.n_words, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    model = LlamaForSequenceClassification(LlamaConfig(**{"num_labels": num_labels, **shape, **settings})).eval()
    model.save_pretrained(folder)
    return model


def build(folder, max_seq_len=64, max_batch_size=4, **options):
    settings = {"device": "cpu", "dtype": "float32", **options}
    return Llama.build(folder, TOKENIZER, max_seq_len, max_batch_size, **settings)


@torch.no_grad()
def theirs(model, rows):
    return torch.cat([model(torch.tensor([row])).logits for row in rows])


@pytest.mark.parametrize("num_labels", [1, 2, 5])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_cpp)])
def test_logits_are_transformers(tmp_path, num_labels, compiled):
    model = saved(tmp_path, num_labels)
    llama = build(tmp_path, compile=compiled)
    found = llama.classify(TEXTS)  # more than max_batch_size
    assert isinstance(llama.engine.backend, Native) == compiled
    assert found.shape == (len(TEXTS), num_labels) and found.dtype == torch.float32
    assert relative_error(found, theirs(model, ROWS)) < 1e-5
    assert torch.allclose(llama.classify(TEXTS[3:4]), found[3:4], atol=1e-5)
    assert llama.classify([]).shape == (0, num_labels)
    assert llama.labels == [f"LABEL_{i}" for i in range(num_labels)]


@pytest.mark.parametrize("tied", [False, True])
def test_other_keys_of_a_config(tmp_path, tied):
    """tie_word_embeddings and problem_type have no effect; labels have names."""
    names = {0: "sad", 1: "calm", 2: "happy"}
    settings = {"tie_word_embeddings": tied, "problem_type": "multi_label_classification", "id2label": names}
    model = saved(tmp_path, 3, **settings)
    llama = build(tmp_path)
    assert relative_error(llama.classify(TEXTS), theirs(model, ROWS)) < 1e-5
    assert llama.labels == [*names.values()] == copy.deepcopy(llama).labels


PADS = {
    "the text's last token": ROWS[0][-1],
    "a token within the text": ROWS[3][3],
    "BOS, all that an empty text has": 1,
    "EOS": 2,
    "the first id": 0,
    "none of the vocabulary's": -1,
}


@pytest.mark.parametrize("pad", PADS)
def test_padding_is_ignored(tmp_path, pad):
    id = PADS[pad]
    model = saved(tmp_path, 3, pad_token_id=id)
    llama = build(tmp_path)
    assert relative_error(llama.classify(TEXTS), theirs(model, ROWS)) < 1e-5
    if id >= 0:
        rows = [[*ROWS[0], id], [*ROWS[0], id, id, 7], [id], [id, id, id], [1, 5, id], [id, 5, 6], [id, id, 5, id]]
        assert relative_error(classify(llama.engine, rows, llama.pad_id), theirs(model, rows)) < 1e-5
        longest = max(map(len, rows))
        together = torch.tensor([row + [id] * (longest - len(row)) for row in rows])
        with torch.no_grad():
            batch = model(together).logits
        assert relative_error(classify(llama.engine, rows, llama.pad_id), batch) < 1e-5


def test_embedding_rows_beyond_the_vocabulary(tmp_path):
    """Reward models often have a padding token that the tokenizer's file lacks."""
    model = saved(tmp_path, 1, vocab_size=OURS.n_words + 8, pad_token_id=OURS.n_words)
    llama = build(tmp_path)
    assert llama.model.vocab_size == OURS.n_words and llama.pad_id is None
    assert relative_error(llama.classify(TEXTS), theirs(model, ROWS)) < 1e-5


@pytest.mark.parametrize(("quantize", "group", "bound"), [("int8", 128, 0.04), ("int4", 32, 0.3)])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_cpp)])
def test_quantized_models_are_close(tmp_path, quantize, group, bound, compiled):
    model = saved(tmp_path / "hf", 3)
    llama = build(tmp_path / "hf", quantize=quantize, group_size=group, compile=compiled)
    assert isinstance(llama.model.score.weight, torch.Tensor)
    assert relative_error(llama.classify(TEXTS), theirs(model, ROWS)) < bound
    convert(tmp_path / "hf", tmp_path / "meta", "meta", 1, None, TOKENIZER, quantize, group)
    again = build(tmp_path / "meta", compile=compiled)
    assert torch.equal(again.model.score.weight, model.score.weight)
    assert relative_error(again.classify(TEXTS), llama.classify(TEXTS)) < 1e-5


def test_calibration_leaves_the_head_alone(tmp_path):
    model = saved(tmp_path / "hf", 3)
    text = list(range(3, 259)) * 5
    convert(tmp_path / "hf", tmp_path / "meta", "meta", 1, None, TOKENIZER, "int8", text=lambda: text)
    assert relative_error(build(tmp_path / "meta").classify(TEXTS), theirs(model, ROWS)) < 0.03


def test_bfloat16(tmp_path):
    model = saved(tmp_path, 3)
    for compiled in (False, True):
        found = build(tmp_path, dtype="bfloat16", compile=compiled).classify(TEXTS)
        assert found.dtype == torch.float32 and relative_error(found, theirs(model, ROWS)) < 0.05


def on_ranks(folder, compiled, dialogs):
    llama = build(folder, compile=compiled)
    assert llama.model.score.weight.shape == (3, 64)
    return llama.classify(TEXTS), llama.classify(dialogs), llama.embed(TEXTS)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_cpp)])
def test_ranks_return_the_same_logits(ranks, tmp_path, compiled):
    model = saved(tmp_path / "hf", 3, pad_token_id=2)
    convert(tmp_path / "hf", tmp_path / "meta", "meta", 2, None, TOKENIZER)
    texts, dialogs, embeddings = on_ranks(tmp_path / "hf", compiled, DIALOGS)
    assert relative_error(texts, theirs(model, ROWS)) < 1e-5
    for layout in ("hf", "meta"):
        for found in ranks(2).run(on_ranks, tmp_path / layout, compiled, DIALOGS):
            for ours, alone in zip(found, (texts, dialogs, embeddings), strict=True):
                assert relative_error(ours, alone) < 1e-5


def test_ranks_with_other_heads_are_an_error(ranks, tmp_path):
    """The head of one label is a single row, which the fingerprint must include."""
    for i in range(2):
        saved(tmp_path / str(i), 1)
    weights = load_file(tmp_path / "1" / "model.safetensors")
    weights["score.weight"] += 1
    save_file(weights, tmp_path / "1" / "model.safetensors", {"format": "pt"})
    for _, error in ranks(2).outcomes(of_own_rank, tmp_path):
        assert error[0] == "ValueError" and "the ranks differ in weights" in error[1]


def of_own_rank(folder):
    from llama import parallel

    build(folder / str(parallel.rank()))


@pytest.mark.parametrize("name", ["ChatML", "Zephyr", "Llama 2", "Llama 3", "Alpaca", "generation"])
@pytest.mark.parametrize("pad", [None, 2])
def test_dialogs_in_a_folders_template(tmp_path, name, pad):
    from transformers import AutoTokenizer

    folder = tmp_path / "hf"
    convert(MODELS / "small-chat", folder, "hf", 1, None)
    model = saved(folder, 1, pad_token_id=pad)
    (folder / "chat_template.jinja").write_text(TEMPLATES[name])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [tokenizer.apply_chat_template(d, add_generation_prompt=False)["input_ids"] for d in DIALOGS]
    llama = Llama.build(folder, max_seq_len=256, device="cpu", dtype="float32")
    assert [llama.chat_format.encode(llama.tokenizer, d, answered=True) for d in DIALOGS] == rows
    assert relative_error(llama.classify(DIALOGS), theirs(model, rows)) < 1e-5


def test_dialogs_in_llama_2s_format(tmp_path):
    """They end with EOS, which is often the padding token too: the token before it is used."""
    model = saved(tmp_path, 2, pad_token_id=2)
    llama = build(tmp_path)

    def ids(text):
        return OURS.encode(text, bos=True, eos=True)

    system = "<<SYS>>\nBe short.\n<</SYS>>\n\nHello"
    rows = [ids("[INST] Hello [/INST] Hi! "), ids(f"[INST] {system} [/INST] Hi! ")]
    rows.append([*rows[1], *ids("[INST] And then? [/INST] Nothing. ")])
    assert [llama.chat_format.encode(OURS, dialog, answered=True) for dialog in DIALOGS] == rows
    found = llama.classify(DIALOGS)
    assert relative_error(found, theirs(model, rows)) < 1e-5
    assert relative_error(found, theirs(model, [row[:-1] for row in rows])) < 1e-5


def test_dialogs_in_llama_3s_format(tmp_path):
    tokenizer = Tokenizer(write_ranks(tmp_path))
    start, end, over = (tokenizer.special[f"<|{name}|>"] for name in ("start_header_id", "end_header_id", "eot_id"))

    def text(of):
        return tokenizer.encode(of, bos=False, eos=False)

    user, assistant = ([start, *text(role), end, *text("\n\n")] for role in ("user", "assistant"))
    expected = [tokenizer.bos_id, *user, *text("Hello"), over, *assistant, *text("Hi!"), over]
    assert get_chat_format(tokenizer).encode(tokenizer, ANSWERED, answered=True) == expected


def test_both_layouts_are_equivalent(tmp_path):
    """Hugging Face's -> Meta's -> Hugging Face's is bit-identical, with labels and padding; transformers reads it."""
    from transformers import AutoModelForSequenceClassification

    model = saved(tmp_path / "hf", 3, id2label={0: "sad", 1: "calm", 2: "happy"}, pad_token_id=5)
    expected = theirs(model, ROWS)
    convert(tmp_path / "hf", tmp_path / "meta", "meta", 2, None, TOKENIZER)
    convert(tmp_path / "meta", tmp_path / "back", "hf", 1, None, TOKENIZER)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "back", dtype=torch.float32)
    assert torch.equal(theirs(again, ROWS), expected)
    assert again.config.id2label == model.config.id2label and again.config.pad_token_id == 5
    assert json.loads((tmp_path / "meta" / "params.json").read_text())["n_labels"] == 3
    for layout in ("hf", "meta", "back"):
        llama = build(tmp_path / layout)
        assert relative_error(llama.classify(TEXTS), expected) < 1e-5
        assert (llama.labels, llama.pad_id) == (["sad", "calm", "happy"], 5)


def test_embeddings_and_hooks(tmp_path):
    model = saved(tmp_path, 3)
    llama = build(tmp_path)
    with torch.no_grad():
        states = [model.model(torch.tensor([row])).last_hidden_state[0] for row in ROWS]
    assert relative_error(llama.embed(TEXTS), torch.stack([part.mean(0) for part in states])) < 1e-5
    assert relative_error(llama.embed(TEXTS, "last"), torch.stack([part[-1] for part in states])) < 1e-5
    tokens = torch.tensor([ROWS[0]])
    assert relative_error(llama.model(tokens)[:, -1], theirs(model, ROWS[:1])) < 1e-5
    expected, seen = theirs(model, ROWS), []
    llama.model.score.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    assert relative_error(llama.classify(TEXTS), expected) < 1e-5 and sum(seen) == len(TEXTS)
    llama.model.register_forward_hook(lambda module, args, output: 2 * output)
    assert relative_error(llama.classify(TEXTS), 2 * expected) < 1e-5


def test_the_cuda_backend():
    pytest.importorskip("triton")
    from test_cuda_backend import Interpreted, both

    ways = [random_model({**GQA, "n_layers": 1, "n_labels": 3}) for _ in range(2)]
    plain, found = both((ways[0], Interpreted(ways[1])), [(0, 0, [5, 17, 99]), (1, 0, [64])])
    assert found.shape == (4, 3) and relative_error(found, plain) < 1e-5


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    model = saved(tmp_path, 3)
    found = build(tmp_path, device="cuda").classify(TEXTS).cpu()
    assert relative_error(found, theirs(model, ROWS)) < 1e-3


@pytest.mark.parametrize(("name", "layer"), [("layers.1.feed_forward.w2", "layers.1"), ("score", "score")])
def test_non_finite_logits_name_the_layer(tmp_path, name, layer):
    saved(tmp_path)
    llama = build(tmp_path)
    llama.model.get_submodule(name).weight.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match=rf"first layer to give such values is {layer}$"):
        llama.classify(["x", "Hello"])


CALLS = {
    "generate": lambda llama: llama.generate([[1, 2]], 4),
    "generate_stream": lambda llama: llama.generate_stream([[1, 2]], 4),
    "text_completion": lambda llama: llama.text_completion(["x"]),
    "echo": lambda llama: llama.text_completion(["x"], max_gen_len=0, echo=True, logprobs=True),
    "text_stream": lambda llama: llama.text_stream(["x"]),
    "chat_completion": lambda llama: llama.chat_completion([ANSWERED[:1]]),
    "chat_stream": lambda llama: llama.chat_stream([ANSWERED[:1]]),
    "Chat": lambda llama: Chat(llama),
    "score": lambda llama: llama.score(["x"]),
    "continuations": lambda llama: llama.score(["x"], [" y"]),
    "perplexity": lambda llama: perplexity(llama.model, [1, 2, 3], 8, 4),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("score")
    saved(path)
    return path


@pytest.mark.parametrize("call", CALLS)
def test_calls_that_need_an_output_matrix(folder, call):
    with pytest.raises(ValueError, match="the model has a score head and no output matrix; use classify"):
        CALLS[call](build(folder))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("text", "inputs is 'text'; it must be a list of str"),
        (["x", 3], "input 1 is 3, which is not a str"),
        (["x", ANSWERED], "input 1 is "),
        (ANSWERED, "dialog 0 is {.*; it must be a list of messages"),
        ([ANSWERED, []], "dialog 1 is .*; it must be a list of messages"),
        ([ANSWERED, ANSWERED[:1]], r"dialog 1 has the roles \['user'\].*beginning with user and ending with assistant"),
        ([SYSTEM[:1]], "dialog 0 ends with the role system; its last message must be the assistant's"),
        ([[{"role": "user", "content": "[INST]"}, ANSWERED[1]]], "dialog 0: Error: a message may not contain the tags"),
        (["x", "a " * 99], "input 1 has .* tokens, more than max_seq_len 64"),
    ],
)
def test_inputs_that_cannot_be_classified(folder, inputs, message):
    with pytest.raises(ValueError, match=message):
        build(folder).classify(inputs)


def test_a_model_without_a_score_head(tmp_path):
    save_random(tmp_path)
    llama = build(tmp_path)
    assert llama.labels == []
    with pytest.raises(ValueError, match="the model has no score head"):
        llama.classify(["x"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_labels": -1}, "id2label None with num_labels -1 does not name the labels 0, 1, ..."),
        ({"id2label": {"1": "a"}}, "does not name the labels"),
        ({"id2label": ["a"]}, "does not name the labels"),
        ({"num_labels": 4}, r"misshapen: score.weight \(2, 64\) instead of \(4, 64\)"),
        ({"architectures": ["LlamaForCausalLM"]}, "unexpected: score.weight"),
        ({"architectures": None}, "unexpected: score.weight"),
    ],
)
def test_configs_that_do_not_fit(tmp_path, change, message):
    saved(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        build(tmp_path)


def test_labels_that_do_not_fit_in_metas_layout(tmp_path):
    """Regression: fewer labels than outputs of the head were taken, and a wrong id2label was an error without path."""
    saved(tmp_path / "hf")
    convert(tmp_path / "hf", path := tmp_path / "meta", "meta", 1, None, TOKENIZER)
    config = json.loads((path / "config.json").read_text())
    for message, names in {"gives 1 labels; .* head has 2": {"0": "a"}, "does not name the labels": ["a"]}.items():
        (path / "config.json").write_text(json.dumps({**config, "id2label": names}))
        with pytest.raises(ValueError, match=f"config.json: id2label .*{message}"):
            build(path)


@pytest.mark.parametrize("name", ["v_head.weight", "regression_layer.weight", "score.bias", "lm_head.weight"])
def test_other_heads_are_refused_by_name(tmp_path, name):
    saved(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, name: torch.zeros(2, 64)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="unexpected: " + name):
        build(tmp_path)
    weights[name] = weights.pop("score.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="unexpected: |missing: "):
        build(tmp_path)


def test_commands(folder, tmp_path):
    shown = in_process(inspect, "--ckpt_dir", folder, "--tokenizer_path", TOKENIZER, "--device", "cpu")
    assert shown.returncode == 0 and "    labels: LABEL_0, LABEL_1\n" in shown.stdout
    assert f"Llama.build({str(folder)!r}).classify(texts), on 1 rank(s)" in shown.stdout
    use = "the model has a score head and no output matrix; use classify"
    flags = ["--ckpt_dir", folder, "--tokenizer_path", TOKENIZER, "--device", "cpu"]
    assert use in in_process(bench, *flags).stderr
    flags = [folder, tmp_path / "new", "--to", "meta", "--tokenizer_path", TOKENIZER, "--quantize", "int8"]
    assert use in in_process(convert_command, *flags, "--calibrate", "auto").stderr


def test_estimated_memory_is_allocated_memory(folder):
    llama = build(folder)
    needed = checkpoint.footprint(llama.model.params, 1, torch.float32)
    assert needed.weights == sum(weight.nbytes for weight in llama.model.parameters())


def test_a_batch_of_the_model_itself():
    model = random_model({**GQA, "n_labels": 4})
    assert model.logits(model.hidden(Batch.of([(0, 0, [1, 2, 3])]))).shape == (3, 4)
    assert Llama(model, OURS).labels == ["LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3"]
