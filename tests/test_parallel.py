"""Ranks and their process groups."""

import io
import os
import subprocess
import sys
from contextlib import redirect_stdout

import pytest
import ranks as ranks_module
import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as fairscale
from ranks import free_port
from small import MODELS, random_model

from llama import Llama, parallel
from llama.cli import script


@pytest.mark.parametrize("size", [2, 0, -1, True, "1"])
def test_a_model_parallel_size_that_does_not_fit_says_what_to_run(size):
    with pytest.raises(ValueError, match=r"model_parallel_size .* does not fit 1 running rank"):
        parallel.init_model_parallel(size)


def test_a_path_with_a_backends_name_is_not_a_lost_connection(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "lost contact" not in script.one_line(FileNotFoundError("igloo/NCCL is not an existing folder"))
    assert "lost contact" in script.one_line(RuntimeError("[gloo/transport] Connection closed by peer"))


@pytest.mark.parametrize(("rank", "world"), [("2", "2"), ("-1", "2"), ("a", "2"), ("0", "")])
def test_an_environment_that_does_not_fit_is_named(monkeypatch, rank, world):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(ValueError, match=f"RANK={rank} and WORLD_SIZE={world} in the environment do not fit"):
        parallel.launched()


def test_initialization_prints_nothing_and_needs_no_environment():
    """Regression: `build` needed torchrun's variables even for one process, and fairscale printed to stdout."""
    code = "from llama import parallel; parallel.init_model_parallel(); print(parallel.world_size(), parallel.rank())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PATH": ""}, timeout=60)
    assert (done.stdout, done.returncode) == ("1 0\n", 0), done.stderr
    with redirect_stdout(io.StringIO()) as out:
        parallel.init_model_parallel()
    assert out.getvalue() == ""


def _divide(value):
    return parallel.divide(value, "n_heads")


def test_indivisible_shapes_are_named(ranks):
    assert ranks(2).run(_divide, 6) == [3, 3]
    for _, error in ranks(2).outcomes(_divide, 7):
        assert error[:2] == ("ValueError", "n_heads 7 cannot be divided among 2 ranks")


def _fail_on(number):
    with parallel.all_or_none():
        if parallel.rank() == number:
            raise FileNotFoundError("no such file")
    return parallel.gather_objects(parallel.rank())


def test_when_one_rank_fails_all_raise(ranks):
    (_, first), (_, second) = ranks(2).outcomes(_fail_on, 1)
    assert first[:2] == ("RankError", "rank 1: no such file")
    assert second[:2] == ("FileNotFoundError", "no such file")
    assert ranks(2).run(_fail_on, None) == [[0, 1], [0, 1]]


@pytest.mark.parametrize(("last_line", "joined"), [("", False), ("raise KeyError", True)])
def test_exits_leave_the_groups_and_after_an_error_do_not_wait(last_line, joined):
    code = f"""
import atexit
import torch.distributed as dist
atexit.register(lambda: print(dist.is_initialized()))
from llama import parallel
parallel.init_model_parallel()
{last_line}
"""
    joining = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    run = [sys.executable, "-c", code]
    both = [subprocess.Popen(run, env={**joining, "RANK": f"{i}"}, stdout=subprocess.PIPE, text=True) for i in range(2)]
    assert [process.communicate(timeout=60)[0] for process in both] == [f"{joined}\n"] * 2


def test_one_process_needs_no_network():
    """Regression: one process joined a gloo group, with a traceback where gloo found no interface and a warning where
    the host's name was unknown."""
    environment = {"GLOO_SOCKET_IFNAME": "eth9", "MASTER_ADDR": "no.such.host", "RANK": "0", "WORLD_SIZE": "1"}
    code = f"""
import torch.distributed as dist
from llama import Llama
llama = Llama.build({str(MODELS / "small")!r}, device="cpu", dtype="float32")
print(llama.text_completion(["Once"], max_gen_len=1)[0]["finish_reason"], dist.is_initialized())
"""
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, capture_output=True, text=True, env={**os.environ, **environment}, timeout=60)
    assert (done.stdout, done.stderr) == ("length False\n", "")


@pytest.fixture
def group_of_another():
    """A default process group that another library has made."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("with_fairscale", [False, True])
def test_one_rank_does_not_use_another_librarys_group(base, group_of_another, with_fairscale):
    """Regression: "initialized twice" for a library that joined after this one; "Group is not registered" after it had
    left."""
    expected = base.generate([[1, 306]], 4, temperature=0)
    if with_fairscale:
        fairscale.initialize_model_parallel(1)
    parallel.init_model_parallel(1)
    try:
        assert random_model()(torch.tensor([[1, 2, 3]])).isfinite().all()
        dist.destroy_process_group()
        assert base.generate([[1, 306]], 4, temperature=0) == expected
        random_model().requires_grad_(True)(torch.tensor([[1, 2, 3]])).sum().backward()
    finally:
        fairscale.destroy_model_parallel()


def _within_the_callers_group(file):
    """The tokens of a model within the caller's group; an all-reduce in the caller's group; the error of a model whose
    group was destroyed; the tokens of a new model in a new group."""
    dist.destroy_process_group()
    found = []
    for i in range(2):
        dist.init_process_group("gloo", init_method=f"file://{file}{i}", rank=int(os.environ["RANK"]), world_size=2)
        fairscale.initialize_model_parallel(1)
        llama = Llama.build(MODELS / "small", max_seq_len=32, max_batch_size=1, device="cpu", dtype="float32")
        one = torch.ones(1)
        dist.all_reduce(one)
        found += [llama.generate([[1, 306]], 4, temperature=0)[0], one.item(), dist.group.WORLD is not None]
        fairscale.destroy_model_parallel()
        dist.destroy_process_group()
        try:
            llama.generate([[1, 306]], 4, temperature=0)
        except RuntimeError as error:
            found.append(str(error))
    return found


def test_several_ranks_use_the_callers_group(tmp_path, base):
    """Regression: a destroyed group was still used, "Group is not registered". fairscale's groups may be another
    library's."""
    pool = ranks_module.Ranks(2)
    try:
        expected = [base.generate([[1, 306]], 4, temperature=0)[0], 2.0, True]
        expected.append("the ranks' process group was destroyed, or is that of the process this one was forked from")
        assert pool.run(_within_the_callers_group, tmp_path / "store") == [expected * 2] * 2
    finally:
        pool.close()


def _data_parallel():
    """A model of one rank on each of two processes that torchrun has started, as in data-parallel training."""
    parallel._ranks = parallel.UNKNOWN
    dist.destroy_process_group()
    llama = Llama.build(MODELS / "small", None, 32, 1, model_parallel_size=1, device="cpu", dtype="float32")
    return llama.generate([[1, 306]], 4, temperature=0)[0], parallel.rank(), dist.is_initialized()


def test_a_model_of_one_rank_in_each_of_several_processes(base):
    pool = ranks_module.Ranks(2)
    try:
        expected = (base.generate([[1, 306]], 4, temperature=0)[0], 0, False)
        assert pool.run(_data_parallel) == [expected] * 2
    finally:
        pool.close()
