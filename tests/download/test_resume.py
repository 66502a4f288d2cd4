"""download.sh after an interrupted download."""

import contextlib
import gzip
import os
import signal
import subprocess
import time

import pytest

from download.server import CHECKLIST, CHUNK, PAGE, SHARD, User, assert_complete, assert_nothing_wrong


def test_resumes_at_the_end_of_a_part(user: User) -> None:
    user.put_all_but(SHARD)
    user.put(f"{SHARD}.part", user.server.files[SHARD][:100_000])
    assert_complete(user, user.download())
    assert user.server.asked(SHARD) == [100_000]


def test_a_complete_part_is_only_checked(user: User) -> None:
    """Killed between the last byte and the renaming: the server has no more bytes (status 416), which is not an
    error."""
    user.put_all_but(SHARD)
    whole = user.server.files[SHARD]
    user.put(f"{SHARD}.part", whole)
    assert_complete(user, user.download())
    assert user.server.asked(SHARD) == [len(whole)]


@pytest.mark.parametrize("rubbish", [b"x" * 1000, b"x" * 1_000_000], ids=["short", "too long"])
def test_a_damaged_part_is_deleted(user: User, rubbish: bytes) -> None:
    user.put_all_but(SHARD)
    user.put(f"{SHARD}.part", rubbish)
    assert_complete(user, user.download())
    assert user.server.asked(SHARD) == [len(rubbish), 0]


def test_a_part_that_is_a_web_page_is_deleted(any_user: User) -> None:
    any_user.put(f"{SHARD}.part", PAGE)
    any_user.put(f"{CHECKLIST}.part", PAGE)
    assert_complete(any_user, any_user.download())
    assert any_user.server.asked(SHARD) == [0]


def test_a_broken_connection_is_resumed_at_once(user: User) -> None:
    user.put_all_but(SHARD)
    user.server.cut[SHARD] = 150_000
    assert_complete(user, user.download())
    assert user.server.asked(SHARD) == [0, 150_000]


def test_a_server_without_ranges(user: User) -> None:
    user.server.ranges = False
    user.put_all_but(SHARD)
    user.put(f"{SHARD}.part", user.server.files[SHARD][:100_000])
    assert_complete(user, user.download())


def test_a_full_disk_is_named(user: User) -> None:
    """Regression: the message was "the connection broke", followed by an error number of curl."""
    user.put_all_but(SHARD)
    folder = user.target / "llama-2-7b"
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "none", folder], capture_output=True).returncode:
        pytest.skip("no right to mount a small file system")
    try:
        for name, data in kept.items():
            (folder / name).write_bytes(data)
        result = user.download()
        assert result.returncode != 0 and f"{SHARD}.part cannot be written beyond" in result.stderr
        assert "connection" not in result.stdout and (folder / "consolidated.00.pth.part").stat().st_size > 100_000
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("compress", ["unasked", "always"])
@pytest.mark.parametrize("begun", [None, "of the file", "of a gzip file"])
def test_a_server_that_compresses(user: User, compress: str, begun: str | None) -> None:
    """curl sends no Accept-Encoding, and some servers and proxies then send gzip. Regression: each correct file was
    "damaged"."""
    user.server.compress = compress
    if begun:
        whole = user.server.files[SHARD]
        user.put_all_but(SHARD)
        user.put(f"{SHARD}.part", (whole if begun == "of the file" else gzip.compress(whole))[:100_000])
    assert_complete(user, user.download())


def test_a_compressed_web_page_is_recognized(user: User) -> None:
    user.server.compress = "always"
    user.put_all_but(SHARD)
    user.server.pages = {SHARD}
    result = user.download()
    assert result.returncode != 0 and "a web page instead of the file" in result.stderr
    assert_nothing_wrong(user)


@pytest.mark.parametrize("whole_group", [True, False], ids=["all processes", "only the script"])
def test_killed_midway_and_run_again(user: User, whole_group: bool) -> None:
    """Regression: a killed download kept its final name. If only the script is killed, its wget goes on: it must not
    write to the file of the next run, which here ends before the next bytes of the old one arrive."""
    user.put_all_but(SHARD)
    user.server.trickle.add(SHARD)
    process = subprocess.Popen(
        user.command(user.server.link, "7B"),
        env=user.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    part = user.target / f"{SHARD}.part"
    try:
        deadline = time.monotonic() + 30
        while not part.exists() or part.stat().st_size < CHUNK // 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
        process.wait()
        assert_nothing_wrong(user)
        result = user.download()
        time.sleep(0.45)  # two chunks of the old download
        assert_complete(user, result)
        assert user.server.asked(SHARD)[1] > 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
