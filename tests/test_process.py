"""The process that runs a model: the caller's PyTorch settings, forks, copies, interrupts and signals."""

import contextlib
import copy
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch
from small import MODELS, random_model, save_random

from llama import Chat, Llama, parallel
from llama.backends import cpu
from llama.request import Request

IDS = [[1, 306, 590], [1, 99]]


def build(**options):
    options = {"device": "cpu", "dtype": "float32", "max_seq_len": 64, "max_batch_size": 2, **options}
    return Llama.build(MODELS / "small", **options)


@contextlib.contextmanager
def setting(put, value, back):
    put(value)
    try:
        yield
    finally:
        put(back)


AMBIENT = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast of float16": lambda: torch.autocast("cpu", torch.float16),
    "device": lambda: torch.device("meta"),
    "default device": lambda: setting(torch.set_default_device, "meta", None),
    "float64": lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "bfloat16": lambda: setting(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "gradients": torch.enable_grad,
    "no gradients": torch.no_grad,
    "inference": torch.inference_mode,
    "deterministic": lambda: setting(torch.use_deterministic_algorithms, True, False),
    "threads": lambda: setting(torch.set_num_threads, 2, torch.get_num_threads()),
}


def everything(llama):
    """Tokens and numbers of every kind of computation."""
    llama.engine.forget()
    penalties = {"repetition_penalty": 1.1, "frequency_penalty": 0.0137, "presence_penalty": 0.1}
    [event] = llama.text_stream(["Once upon"], max_gen_len=1, logprobs=True)
    tokens = (
        llama.generate(IDS[:1], 4, temperature=0)[0],
        llama.generate(IDS, 4, temperature=[0.9, 2.0], top_p=[0.9, 0.8], min_p=0.01, seed=1, logit_bias={5: 1.007})[0],
        llama.generate(IDS, 4, temperature=0.5, top_k=[50, 0], seed=2, **penalties)[0],
        llama.generate([[1, 306, 306, 306]], 4, temperature=0, prompt_lookup=2)[0],
        llama.engine.sampler.counts.dtype,
    )
    score = llama.score(["The opposite of hot is"], [" cold."])[0]["sum"]
    return tokens, [*event.logprobs, score, *llama.embed(["Hello"])[0].tolist()]


@pytest.fixture(scope="module")
def usual():
    llama = build()
    return llama, *everything(llama)


@pytest.mark.parametrize("ambient", AMBIENT)
def test_the_callers_torch_settings_have_no_effect(ambient, usual):
    """Regression: within autocast an error of index_put; within a default device tensors without data; with another
    default dtype embeddings, top_p and penalties in that dtype."""
    outside, tokens, numbers = usual
    with AMBIENT[ambient]():
        for llama in (outside, build()):
            found, values = everything(llama)
            assert found == tokens
            assert values == pytest.approx(numbers, abs=1e-4)


@pytest.mark.parametrize("ambient", ["autocast", "device", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [{"quantize": "int8"}, {"quantize": "int4"}, {"dtype": "bfloat16"}, {"compile": True}],
    ids=["int8", "int4", "bfloat16", "compile"],
)
def test_nor_with_other_weights_and_backends(ambient, options):
    expected = build(**options).generate(IDS, 3, temperature=0)
    with AMBIENT[ambient]():
        assert build(**options).generate(IDS, 3, temperature=0) == expected


@pytest.mark.parametrize("ambient", [name for name in AMBIENT if "autocast" not in name])
def test_nor_for_a_model_that_is_called(ambient):
    model, ids = random_model(), torch.tensor(IDS[:1]) % 128
    expected = model(ids)
    with AMBIENT[ambient]():
        found = model(ids)
    assert found.dtype == torch.float32 and torch.allclose(found, expected, atol=1e-5)


def test_a_model_that_is_called_follows_autocast():
    """As any module does. Regression: it failed if the cache had another dtype."""
    model, ids = random_model(), torch.tensor(IDS[:1]) % 128
    expected = model(ids)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(ids)
    assert 0 < (found - expected).abs().max() < 0.1 * expected.abs().max()


def test_built_in_inference_mode_and_called_with_gradients():
    """Regression: the cache was an inference tensor, which cannot be written to outside of inference mode."""
    with torch.inference_mode():
        llama = build()
    llama.model.requires_grad_(True)(torch.tensor(IDS[:1])).sum().backward()
    assert llama.model.norm.weight.grad.abs().sum() > 0


def test_embeddings_train_what_comes_after_them():
    torch.nn.Linear(128, 2)(build().embed(["Hello"])).sum().backward()


def _what_building_leaves(folder):
    before = (torch.get_default_dtype(), torch.get_default_device(), sys.stdout)
    first = Llama.build(folder, MODELS / "tokenizer.model", 64, 4, dtype="bfloat16", device="cpu")
    second = Llama.build(folder, MODELS / "tokenizer.model", 32, 2, dtype="bfloat16", device="cpu")
    assert (torch.get_default_dtype(), torch.get_default_device(), sys.stdout) == before
    assert all(weight.dtype == torch.bfloat16 for weight in first.model.parameters())
    a, b = (llama.generate([[1, 2, 3]], 5, temperature=0)[0] for llama in (first, second))
    assert a == b
    return a


def test_build_twice_and_leave_defaults_alone(ranks, tmp_path):
    """Regression: a second build failed; bfloat16 became float16 and the default tensor type was changed; stdout was
    replaced on ranks other than 0."""
    save_random(tmp_path / "one", mp=1, dtype=torch.bfloat16)
    _what_building_leaves(tmp_path / "one")
    save_random(tmp_path / "two", mp=2, dtype=torch.bfloat16)
    first, second = ranks(2).run(_what_building_leaves, tmp_path / "two")
    assert first == second


# Forks, copies, interrupts, signals


def in_child(function):
    """The result of a function in a forked child, or its error as text; "nothing" if the child hangs."""
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        signal.alarm(20)  # which ends the process
        try:
            result = function()
        except BaseException as error:
            result = f"{type(error).__name__}: {error}"
        os.write(writer, json.dumps(result).encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(pid, 0)
    with open(reader) as file:
        return json.loads(file.read() or '"nothing"')


@pytest.mark.parametrize("options", [{}, {"quantize": "int8"}, {"compile": True}], ids=["plain", "int8", "compile"])
def test_a_forked_child_generates(options):
    """Regression: it waited for threads that only its parent has, in workers of gunicorn and multiprocessing."""
    llama = build(**options)
    expected = llama.generate(IDS, 8, temperature=0)[0]
    assert in_child(lambda: llama.generate(IDS, 8, temperature=0)[0]) == expected
    assert in_child(lambda: build(**options).generate(IDS, 8, temperature=0)[0]) == expected
    assert llama.generate(IDS, 8, temperature=0)[0] == expected


def test_a_child_that_is_forked_while_another_thread_generates():
    """Regression: the lock was held by a thread that the child does not have."""
    llama = build()
    expected = llama.generate(IDS[:1], 8, temperature=0)[0]
    step, inside, forked = llama.engine.step, threading.Event(), threading.Event()

    def slow():
        inside.set()
        forked.wait(30)
        return step()

    with mock.patch.object(llama.engine, "step", slow):
        thread = threading.Thread(target=llama.generate, args=(IDS, 3))
        thread.start()
        inside.wait(30)
        assert llama.engine.lock.locked()
        found = in_child(lambda: (vars(llama.engine).pop("step"), llama.generate(IDS[:1], 8, temperature=0)[0])[1])
        forked.set()
        thread.join()
    assert found == expected


def test_a_forked_child_does_not_read_its_parents_stream():
    """Both would get the same tokens."""
    llama = build()
    expected = [event.tokens for event in llama.text_stream(["Once upon a time"], max_gen_len=8, temperature=0)]
    stream = llama.text_stream(["Once upon a time"], max_gen_len=8, temperature=0)
    llama.engine.submit(waiting := Request([1, 306], 10))  # no slot was free for it
    error = "RuntimeError: the process was forked, and this stream is its parent's"
    assert in_child(lambda: [*stream]) == error
    assert in_child(lambda: f"{type(waiting.error).__name__}: {waiting.error}") == error
    assert [event.tokens for event in stream] == expected


def _child_of_a_rank():
    llama = build()
    return in_child(lambda: llama.generate(IDS, 3)), in_child(lambda: parallel.gather_objects(1))


def test_a_forked_child_does_not_act_as_its_rank(ranks):
    """Its messages to the other ranks would duplicate its parent's."""
    for told in ranks(2).run(_child_of_a_rank):
        assert all("is that of the process this one was forked from" in error for error in told)


@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": "bfloat16"}, {"quantize": "int8"}, {"quantize": "int4"}, {"quantize": "int8", "compile": True}],
    ids=["float32", "bfloat16", "int8", "int4", "int8 compiled"],
)
def test_a_deep_copy_is_independent(options):
    """Regression: copy.deepcopy raised "cannot pickle '_thread.lock' object"."""
    llama = build(**options)
    expected = llama.generate(IDS, 3, temperature=0)
    twin = copy.deepcopy(llama)
    assert twin.generate(IDS, 3) == llama.generate(IDS, 3)  # the state of the seeds' generator is copied
    with torch.no_grad():
        for weight in [*llama.model.parameters(), *llama.model.buffers()]:
            weight.fill_(0.5)
    assert twin.engine is not llama.engine and twin.engine.compile == llama.engine.compile
    assert twin.generate(IDS, 3, temperature=0) == expected
    assert llama.generate(IDS, 3, temperature=0) != expected


def test_a_copied_chat_uses_the_same_model():
    llama = Llama.build(MODELS / "small-chat", max_seq_len=256, device="cpu", dtype="float32")
    chat = Chat(llama, temperature=0)
    chat.say("My name is Tom.")
    twin = copy.deepcopy(chat)
    assert twin.llama is llama
    assert twin.say("What is my name?") == chat.say("What is my name?") == "Your name is Tom."
    twin.say("Hello")
    assert len(chat.dialog) == 4 and len(twin.dialog) == 6


@pytest.mark.parametrize(
    "what", [lambda llama: llama, lambda llama: llama.engine, Chat], ids=["Llama", "engine", "Chat"]
)
def test_pickle_says_what_to_do(what):
    with pytest.raises(TypeError, match=r"not pickled .*; call Llama\.build in the process that needs it"):
        pickle.dumps(what(build()))


def test_a_turn_after_an_interrupted_one():
    """Regression: the traceback of an interrupted notebook cell keeps its stream alive. When it was freed, the chat's
    dialog was reset and lost later turns."""
    chat = Chat(Llama.build(MODELS / "small-chat", max_seq_len=256, max_batch_size=1, device="cpu", dtype="float32"))
    chat.set(temperature=0)
    interrupted = chat.stream("My name is Tom.")
    said = next(interrupted).text
    chat.say("What is 3 + 4?")
    dialog = [*chat.dialog]
    assert dialog[1]["content"] == said and len(dialog) == 4
    interrupted.close()
    assert chat.dialog == dialog


def test_an_open_stream_does_not_block_others():
    llama = build(max_batch_size=1)
    expected = llama.generate(IDS[:1], 6, temperature=0)
    stream = llama.text_stream(["Once upon a time"])
    next(stream)
    assert llama.generate(IDS[:1], 6, temperature=0) == expected
    stream.close()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_signals_leave_no_partial_files(tmp_path, name):
    """Regression: a conversion that was terminated left its hidden folder, as large as the model."""
    code = f"""
import time
from pathlib import Path
from llama.checkpoint.write import new_folder
from llama.cli import script

def main():
    with new_folder(Path({str(tmp_path / "new")!r}), 1) as folder:
        (folder / "half").write_text("half")
        print("now", flush=True)
        time.sleep(30)

script.run(main)
"""
    number = getattr(signal, name)
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # under nohup it is ignored
    )
    assert process.stdout.readline() == "now\n"
    process.send_signal(number)
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 128 + getattr(signal, name)
    assert [*tmp_path.iterdir()] == []


def test_an_interrupted_compiler_leaves_no_files(tmp_path, monkeypatch):
    real = subprocess.run

    def interrupted(command, **options):
        if command[-1] == "--version":
            return real(command, **options)
        Path(command[-1]).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cpu.library.__wrapped__()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["lock"]
