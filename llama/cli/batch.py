"""python -m llama batch: answers the lines of a file, with one or several replicas of the model."""

from __future__ import annotations

import itertools
import os
import sys
import time
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


class Share:
    """A replica's share of the lines. Lines and answers go through torch's store: the first replica, which has the
    files, publishes a few more lines than all replicas have taken, and writes the answers of all."""

    def __init__(self, capacity: int, files: Files | None) -> None:
        self.files = files
        self.store: Any = dist.PrefixStore("llama/batch", parallel.store())
        self.replicas = parallel.replica()[1]
        self.ahead = capacity * self.replicas
        self.claimed: int | None = None  # the line that this replica takes next, once it is published
        self.out_of_lines = False
        self.ended = False  # nothing is left to do but what this replica is computing
        if files:
            self.lines, self.published, self.written = files.unanswered(), 0, 0
            self.began, self.errors, self.tokens = time.monotonic(), 0, 0
            self.bar = tqdm(total=files.count, initial=files.answered, unit="line", smoothing=0, disable=None)

    def take(self, count: int) -> list[tuple[int, bytes]]:
        """Take up to `count` lines, which no other replica will take. Returns their numbers and contents."""
        found: list[tuple[int, bytes]] = []
        while len(found) < count and not self.out_of_lines:
            if self.claimed is None:
                self.claimed = self.store.add("taken", 1) - 1
            end = self.store.check(["end"])  # asked before the line, which is published before the end is
            if self.store.check([f"line {self.claimed}"]):
                number, content = self._pop(f"line {self.claimed}").split(b" ", 1)
                found.append((int(number), content))
                self.claimed = None
            elif end:
                self.out_of_lines = True
                self.store.add("out", 1)
            else:
                break
        self.ended |= self.out_of_lines and not self.files
        return found

    def put(self, answer: bytes, tokens: int, failed: bool) -> None:
        """Pass an answer to the first replica, which writes it."""
        self._set(f"answer {self.store.add('answered', 1) - 1}", b"%d %d %b" % (tokens, failed, answer))

    def exchange(self) -> None:
        """Publish lines and write answers; only the first replica does."""
        if not self.files:
            return
        wanted = self.store.add("taken", 0) + self.ahead
        for line in itertools.islice(self.lines, wanted - self.published):
            self._set(f"line {self.published}", b"%d %b" % line)
            self.published += 1
        if self.published < wanted:  # there are no more lines
            self.store.set("end", b"")
        self._write()
        if self.written == self.published < wanted and self.store.add("out", 0) == self.replicas:
            self.ended = True
            self.bar.close()
            seconds = time.monotonic() - self.began
            rate = f"{self.tokens:,} new tokens in {seconds:.1f} s ({self.tokens / seconds:,.0f} tokens/s)"
            print(f"{self.written:,} lines answered, {self.errors:,} of them with an error; {rate}", file=sys.stderr)

    def _write(self) -> None:
        answers = []
        while self.store.check([key := f"answer {self.written}"]):
            tokens, failed, answer = self._pop(key).split(b" ", 2)
            answers.append(answer)
            self.tokens += int(tokens)
            self.errors += int(failed)
            self.written += 1
        if answers and self.files:
            self.files.write(b"".join(answers))
            self.bar.set_postfix_str(f"{self.tokens / (time.monotonic() - self.began):,.0f} tokens/s", refresh=False)
            self.bar.update(len(answers))

    def _set(self, key: str, value: bytes) -> None:
        parts = [value[i : i + PART] for i in range(0, len(value), PART)]
        for i, part in enumerate(parts[1:], 1):
            self.store.set(f"{key} {i}", part)
        self.store.set(key, b"%d %b" % (len(parts), parts[0]))  # last, as it is what others look for

    def _pop(self, key: str) -> bytes:
        """Read a value and delete it."""
        count, first = self.store.get(key).split(b" ", 1)
        parts = [f"{key} {i}" for i in range(1, int(count))]
        value: bytes = first + b"".join(map(self.store.get, parts))
        for part in (key, *parts):
            self.store.delete_key(part)
        return value
