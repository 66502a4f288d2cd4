"""python -m llama bench and benchmarks/: their arithmetic, worked out by hand, and that they run. No test measures
time."""

import importlib
import json
import re
import sys
from unittest import mock

import pytest
import torch
from small import MODELS, ROOT, TOKENIZER, in_process, needs_cpp, random_model

from llama import Llama, ModelArgs
from llama.backends import cpu
from llama.cli import measure
from llama.cli.bench import bench

sys.path.insert(0, str(ROOT / "benchmarks"))
import compare
import peers

CPU = torch.device("cpu")


def command(*flags):
    return in_process(bench, "--repeats", 1, "--tokens", 3, "--device", "cpu", *flags)


def test_flops_and_bytes_worked_out_by_hand():
    shape = {"dim": 8, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "multiple_of": 1}  # hidden int(64 / 3) = 21
    model = random_model(shape, vocab_size=10, max_batch_size=2)
    layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 21  # wq; wk, wv; wo; w1, w2, w3
    head = 10 * 8
    # Two rows decode 4 tokens after 6: on average 8 positions are seen, each a key and a value of 4 numbers.
    nbytes, operations = measure.work(model, measure.Case(batch=2, prompt=6, tokens=4))
    assert nbytes == 4 * (2 * layer + head) + 2 * 4 * 2 * 2 * 8 * 4
    assert operations == 2 * 2 * (2 * layer + head) + 2 * 2 * (4 * 8 * 8)
    # A prompt of 6, each of whose tokens looks at 3 others on average. In the last layer all but the last token, which
    # looks at 6, need only wk and wv.
    _, operations = measure.work(model, measure.Case(batch=1, prompt=6, tokens=1))
    assert operations == 2 * (7 * layer + 5 * 2 * 8 * 4 + head) + 4 * 8 * (6 * 3 + 6)


@pytest.mark.parametrize("kv_heads", [8, 4])
@pytest.mark.parametrize("peer", peers.PEERS)
def test_other_libraries_compute_the_same_steps(peer, kv_heads, monkeypatch):
    pytest.importorskip("llama_cpp" if peer.startswith("llama.cpp") else "transformers")
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # which takes a minute
    shape = {"dim": 256, "n_layers": 2, "n_heads": 8, "n_kv_heads": kv_heads, "multiple_of": 32, "norm_eps": 1e-3}
    args = ModelArgs(**shape, vocab_size=128, max_batch_size=2, max_seq_len=32)
    source = measure.Source(measure.RandomWeights(CPU), args, CPU, torch.float32)
    ids = torch.randint(3, 128, (2, 5), generator=torch.Generator().manual_seed(0))
    mine = [*measure.ours(measure.loaded(source))(ids, 12)]
    theirs = [torch.tensor(step).flatten().tolist() for step in peers.PEERS[peer](source)(ids, 12)]
    assert mine == theirs
    assert len(mine) == 12


def test_a_random_model_has_its_dtype_and_cache():
    args = ModelArgs(dim=64, n_layers=2, n_heads=4, vocab_size=32, max_batch_size=2, max_seq_len=16)
    model = measure.loaded(measure.Source(measure.RandomWeights(CPU), args, CPU, torch.bfloat16))
    assert {t.dtype for t in [*model.parameters(), *model.buffers()]} == {torch.bfloat16}
    assert model.layers[0].attention.cache.kv.shape == (2, 8, 16, 16)
    assert model.layers[0].attention.wq.weight.float().std() == pytest.approx(0.02, rel=0.1)


@needs_cpp
def test_native_steps_are_measured():
    with mock.patch.object(cpu, "Native", wraps=cpu.Native) as native:
        done = command("--ckpt_dir", str(MODELS / "small"), "--prompts", "16", "--batches", "2", "--compile")
    assert done.returncode == 0, done.stderr
    assert native.called
    assert json.loads(done.stdout.splitlines()[-1])["compile"] is True


def test_the_command_ends_with_json():
    done = command("--ckpt_dir", str(MODELS / "small"), "--prompts", "16", "--batches", "1,2", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert list(facts["cases"]) == ["prefill 16", "decode, batch 1", "decode, batch 2"]
    model = Llama.build(MODELS / "small", max_seq_len=160, max_batch_size=2, device="cpu", dtype="float32").model
    for case in (measure.Case(1, 16, 1), measure.Case(1, 128, 3), measure.Case(2, 128, 3)):
        found = facts["cases"][str(case)]
        limit, use, which = ("matrix_rate", "MFU", 1) if case.tokens == 1 else ("bandwidth", "MBU", 0)
        seconds = case.batch * (case.prompt if case.tokens == 1 else 1) / found["tokens_per_second"]["llama"][0]
        expected = measure.work(model, case)[which] / seconds / facts[limit]
        assert found[f"{use}_of_first_limit"] == pytest.approx(expected)
        assert found["MBU"] > 0 < found["MFU"]
    assert facts["first_token_s"] == 16 / facts["cases"]["prefill 16"]["tokens_per_second"]["llama"][0]
    rate, most = facts["cases"]["prefill 16"], facts["matrix_rate"]
    assert 0.1 < rate["MFU"] / rate["MFU_of_first_limit"] < 10 < most
    assert re.search(r"prefill 16: MFU 0\.\d\d \(\d\.\d\d of the first limit\)", done.stdout)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shape", "8B"], "shape is '8B'; it must be one of 110M, 1.1B, 7B, 13B, 70B"),
        (["--batches", "0"], "batches is 0; it must be of numbers from 1 on"),
        (["--prompts", "a"], "prompts is 'a'"),
        (["--context", "1.5"], "context is 1.5; it must be of numbers from 1 on"),
        (["--tokens", "1"], "tokens is 1; it must be of numbers from 2 on"),
        (["--ckpt_dir", "nowhere"], "ckpt_dir nowhere is not an existing folder"),
        (["--shape", "70B", "--dtype", "float32"], "use more ranks"),
    ],
)
def test_bad_flags_are_named(flags, message):
    done = command(*flags)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert message in line
    assert done.stdout == ""


def test_compare_measures_other_libraries(monkeypatch):
    monkeypatch.setitem(peers.PEERS, "ours again", lambda source: measure.ours(measure.loaded(source)))
    flags = ("--prompts", 16, "--batches", 1, "--repeats", 1, "--tokens", 3, "--device", "cpu", "--dtype", "float32")
    done = in_process(compare.main, "ours again", "--ckpt_dir", MODELS / "small", *flags)
    assert done.returncode == 0, done.stderr
    cases = json.loads(done.stdout.splitlines()[-1])["cases"]
    assert all(case["ratios"]["ours again"] > 0 and len(case["tokens_per_second"]) == 2 for case in cases.values())
    assert "there is no vllm; known are transformers" in in_process(compare.main, "vllm").stderr
    assert "there is no flag batch; known are ckpt_dir" in in_process(compare.main, "--batch", 1).stderr


def test_the_gpu_benchmark_runs_on_a_cpu(monkeypatch, capsys):
    """With a small shape instead of 7B, so that a job of minutes on a GPU does not fail on a wrong name."""
    gpu = importlib.import_module("gpu")
    monkeypatch.setitem(measure.SHAPES, "7B", {"dim": 64, "n_layers": 1, "n_heads": 4})
    monkeypatch.setattr(gpu, "DEVICE", CPU)
    monkeypatch.setattr(gpu, "times", lambda work, device, repeats: measure.times(work, device, 1))
    gpu.run(["decode", "int4", "memory"], str(TOKENIZER))
    decode, int4, memory = map(json.loads, capsys.readouterr().out.splitlines())
    assert decode["tokens/s"] > 0 and decode["stage"] == "decode"
    assert int4["batch 8"] > 0 and int4["prefill 2048 ms"] > 0
    assert memory["ratio"] == 0  # of what is on a GPU


def test_answers_of_the_gpu_benchmark_do_not_end_early(monkeypatch):
    """Regression: a model of random weights chose EOS now and then, and the step times were those of fewer tokens."""
    gpu = importlib.import_module("gpu")
    monkeypatch.setitem(measure.SHAPES, "7B", {"dim": 64, "n_layers": 1, "n_heads": 4})
    monkeypatch.setattr(gpu, "DEVICE", CPU)
    llama = gpu.build(tokenizer=str(TOKENIZER))
    likely = {llama.tokenizer.eos_id: 100.0}
    [ids], _ = llama.generate([[5, 6]], 9, temperature=0, logit_bias=likely)
    assert len(ids) == 9
