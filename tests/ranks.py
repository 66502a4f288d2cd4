"""Ranks in processes that stay alive between tests and run functions in lockstep over gloo."""

import contextlib
import multiprocessing as mp
import os
import socket
import traceback

context = mp.get_context("forkserver")
context.set_forkserver_preload(["torch", "fairscale.nn.model_parallel", "llama"])


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _serve(rank, world_size, port, pipe):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import torch

    from llama import parallel

    torch.set_num_threads(1)
    parallel.init_model_parallel()
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            pipe.send((function(*args), None))
        except Exception as error:
            pipe.send((None, (type(error).__name__, str(error), traceback.format_exc())))


class Ranks:
    def __init__(self, world_size):
        port = free_port()
        pipes = [context.Pipe() for _ in range(world_size)]
        self.pipes = [mine for mine, _ in pipes]
        self.processes = [
            context.Process(target=_serve, args=(rank, world_size, port, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()

    def run(self, function, *args):
        """The results of `function(*args)` on each rank. AssertionError with the traceback if one failed."""
        outcomes = self.outcomes(function, *args)
        for _, error in outcomes:
            assert error is None, error[2]
        return [result for result, _ in outcomes]

    def outcomes(self, function, *args):
        """(result, None) or (None, (type name, message, traceback)) for each rank."""
        for pipe in self.pipes:
            pipe.send((function, args))
        outcomes = []
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(60), f"rank {rank} does not answer"
            outcomes.append(pipe.recv())
        return outcomes

    def close(self):
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
