"""python -m llama batch: answers the lines of a file, with one or several replicas of the model."""

from __future__ import annotations

import itertools
import os
import pickle
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from .. import parallel
from ..checkpoint import check_path
from ..generation import Llama
from ..server.loop import Job
from ..server.schema import ApiError, Work
from .batch_files import Files
from .batch_lines import Task, failed, parse_line
from .flags import documented

PART = 2**22  # bytes of a value: the store ends connections that send more than 8 MiB
PAUSE = 0.05  # seconds between two polls of the store while there is nothing to compute


@documented
def batch(
    infile: str,
    outfile: str,
    ckpt_dir: str,
    tokenizer_path: str | None = None,
    max_seq_len: int = 2048,
    max_batch_size: int = 8,
    model_parallel_size: int | None = None,
    seed: int = 1,
    **options: Any,
) -> None:
    """Answer each line of INFILE in OUTFILE. The same command resumes an interrupted job; see docs/batch.md.

    Args:
        infile: file of lines in OpenAI's batch format, or of {"prompt": ...} or {"messages": ...} with options
        outfile: answers are appended in the order in which they are done; lines that have an answer there are skipped
        max_batch_size: maximum number of requests that a replica runs at the same time
        model_parallel_size: number of ranks that a model is split over; N ranks under torchrun form
            N / model_parallel_size replicas. By default all ranks share one model
        seed: lines without a seed get their own, derived from this one and the line's number
    """
    parallel.init_model_parallel(model_parallel_size)
    files = None
    with parallel.all_or_none():
        queues()
        if parallel.rank() == parallel.replica()[0] == 0:
            files = Files(check_path(infile, "infile", "file"), Path(outfile).expanduser())
    llama = Llama.build(ckpt_dir, tokenizer_path, max_seq_len, max_batch_size, seed=seed, **options)
    answer_lines(llama, files, seed, Path(os.path.abspath(os.path.expanduser(ckpt_dir))).name)


def answer_lines(llama: Llama, files: Files | None, seed: int, model: str) -> None:
    """Answer lines until there are no more, keeping all slots busy. All ranks of a replica call this; the first rank of
    each replica has the lines, and rank 0 has the files."""
    slots = len(llama.engine.slots)
    capacity = slots + slots // 4 + 1  # some wait: a request does not run while another computes the same prefix
    share = Share(capacity, files) if parallel.rank() == 0 else None
    running, tasks, more = list[Job](), list[Task](), True

    def take(count: int) -> tuple[list[Work], bool]:
        """Fill `tasks` from up to `count` lines. Returns their work, and whether there may be more lines."""
        assert share
        tasks.clear()
        for number, content in share.take(count):
            line = parse_line(number, content)
            try:
                tasks.append(Task(llama, line, seed, model))
            except Exception as error:  # whatever it is, the others are answered
                known = error if isinstance(error, ApiError) else ApiError(500, repr(error))
                share.put(failed(line, known), 0, True)
        if not (tasks or running or share.ended):
            time.sleep(PAUSE)
        return [task.work for task in tasks], not share.ended

    while more or running:
        if share:
            share.exchange()
        free = capacity - sum(len(job.unfinished) for job in running)
        if more and free > 0:
            works, more = parallel.ask_first_rank(take, free)
            for job in tasks if share else map(Job, works):
                job.submit(llama)
                running.append(job)
        if running:
            llama.engine.step()
        for job in [job for job in running if not job.unfinished]:
            running.remove(job)
            if share and isinstance(job, Task):
                share.put(*job.answer())


def queues() -> Any:
    """The store that replicas share. RuntimeError if it has no queues."""
    store: Any = dist.PrefixStore("llama/batch", parallel.store())
    try:
        store.queue_len("lines")
    except NotImplementedError as error:
        raise RuntimeError("torch's store has no queues where USE_LIBUV is 0; unset it") from error
    return store


class Share:
    """A replica's share of the lines. Lines and answers go through two queues of torch's store: the first replica,
    which has the files, keeps as many lines in one as all replicas can run, and writes the answers from the other.
    Behind the last line, the queue has an empty tuple for each replica."""

    def __init__(self, capacity: int, files: Files | None) -> None:
        self.files = files
        self.store = queues()
        self.replicas = parallel.replica()[1]
        self.ahead = capacity * self.replicas
        self.out_of_lines = False
        self.ended = False  # nothing is left to do but what this replica is computing
        if files:
            self.lines = itertools.chain(files.unanswered(), [()] * self.replicas)
            self.published = self.written = 0
            self.began, self.errors, self.tokens = time.monotonic(), 0, 0
            self.bar = tqdm(total=files.count, initial=files.answered, unit="line", smoothing=0, disable=None)

    def take(self, count: int) -> list[tuple[int, bytes]]:
        """Take up to `count` lines, which no other replica will take. Returns their numbers and contents."""
        found: list[tuple[int, bytes]] = []
        while len(found) < count and not self.out_of_lines and (line := self._pop("lines")) is not None:
            if line:
                found.append(line)
            else:
                self.out_of_lines = True
                self.store.add("out", 1)
        self.ended |= self.out_of_lines and not self.files
        return found

    def put(self, answer: bytes, tokens: int, failed: bool) -> None:
        """Pass an answer to the first replica, which writes it."""
        self._push("answers", (answer, tokens, failed))

    def exchange(self) -> None:
        """Publish lines and write answers; only the first replica does."""
        if not self.files:
            return
        for line in itertools.islice(self.lines, self.ahead - self.store.queue_len("lines")):
            self._push("lines", line)
            self.published += bool(line)
        self._write()
        if self.written == self.published and self.store.add("out", 0) == self.replicas:
            self.ended = True
            self.bar.close()
            seconds = time.monotonic() - self.began
            rate = f"{self.tokens:,} new tokens in {seconds:.1f} s ({self.tokens / seconds:,.0f} tokens/s)"
            print(f"{self.written:,} lines answered, {self.errors:,} of them with an error; {rate}", file=sys.stderr)

    def _write(self) -> None:
        answers = []
        while put := self._pop("answers"):
            answer, tokens, failed = put
            answers.append(answer)
            self.tokens += tokens
            self.errors += failed
            self.written += 1
        if answers and self.files:
            self.files.write(b"".join(answers))
            self.bar.set_postfix_str(f"{self.tokens / (time.monotonic() - self.began):,.0f} tokens/s", refresh=False)
            self.bar.update(len(answers))

    def _push(self, queue: str, value: tuple[Any, ...]) -> None:
        """Append a value to a queue, which gets the keys of its parts once they are in the store."""
        data, name = pickle.dumps(value), uuid.uuid4().hex
        parts = {f"{name}-{i}": data[i : i + PART] for i in range(0, len(data), PART)}
        for key, part in parts.items():
            self.store.set(key, part)
        self.store.queue_push(queue, " ".join(parts))

    def _pop(self, queue: str) -> Any:
        """Remove the first value of a queue; None if there is none."""
        try:
            keys = self.store.queue_pop(queue, block=False).decode().split()
        except dist.QueueEmptyError:
            return None
        value = pickle.loads(b"".join(map(self.store.get, keys)))
        for key in keys:
            self.store.delete_key(key)
        return value
