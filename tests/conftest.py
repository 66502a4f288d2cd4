import os
import shutil

if not shutil.which("nvidia-smi"):
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, in ranks too: kernels run on the CPU

import pytest
import ranks as ranks_module
import torch
from small import MODELS, TOKENIZER, random_model, save_random

from llama import Llama, Tokenizer, parallel

torch.set_num_threads(1)  # for small models a second thread gains little, and on a busy machine it costs time


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def one_process():
    """A process group of one process, without torchrun and its environment variables."""
    parallel.init_model_parallel()


@pytest.fixture(scope="session")
def ranks():
    """ranks(n): n processes that act as ranks, started when first requested."""
    pools = {}

    def get(world_size):
        if world_size not in pools:
            pools[world_size] = ranks_module.Ranks(world_size)
        return pools[world_size]

    yield get
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer(TOKENIZER)


@pytest.fixture(scope="session")
def base():
    """The bundled base model."""
    return Llama.build(MODELS / "small", max_seq_len=256, max_batch_size=8, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def llama(tokenizer):
    """A random model with the bundled tokenizer. Its greedy text does not end by itself."""
    return Llama(random_model(vocab_size=tokenizer.n_words), tokenizer)


@pytest.fixture(scope="module")
def two_threads():
    """Two PyTorch threads, for code that runs in parallel."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def folder(tmp_path):
    """A random model as a checkpoint of one shard."""
    save_random(tmp_path / "model")
    return tmp_path / "model"
