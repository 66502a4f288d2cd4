"""The estimate of the memory that a model needs, and the command that prints it."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import GQA, LLAMA3, MODELS, PUBLISHED, ROOT, TOKENIZER, in_process, random_model, save_random

from llama import Llama, ModelArgs, checkpoint
from llama.checkpoint import memory, shapes
from llama.cli.inspect import inspect as command

SEVENTY = PUBLISHED["70B"]


def test_footprints_worked_out_by_hand():
    seven = ModelArgs(vocab_size=32000, max_batch_size=1, max_seq_len=4096)
    on_one = memory.footprint(seven, 1, torch.bfloat16)
    assert on_one.weights == 2 * 6_738_415_616
    assert on_one.cache == 2 * 32 * 32 * 128 * 4096 * 2 == 2_147_483_648
    seventy = ModelArgs(**SEVENTY, vocab_size=32000, max_batch_size=1, max_seq_len=4096)
    norms = 161 * 8192
    assert memory.footprint(seventy, 8, torch.bfloat16).weights == 2 * ((68_976_648_192 - norms) // 8 + norms)
    assert memory.footprint(seventy, 16, torch.bfloat16).cache == 2 * 80 * 1 * 128 * 4096 * 2  # no head is split


def test_the_readmes_table():
    rows = re.findall(r"^\| ([^|]*B) \| (\d+\.\d \+ .+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    shapes = {size: {"vocab_size": 32000, **shape} for size, shape in PUBLISHED.items()} | LLAMA3
    assert {size for size, _ in rows} == {*shapes}
    for size, cells in rows:
        args = ModelArgs(**shapes[size], max_batch_size=1, max_seq_len=4096)
        needed = [memory.footprint(args, ranks, torch.bfloat16) for ranks in (1, 2, 4, 8)]
        assert cells == " | ".join(f"{n.weights / 1e9:.1f} + {n.cache / 1e9:.1f}" for n in needed)
        assert all(0.05e9 < n.activations < 1.95e9 for n in needed)


def test_weights_and_cache_equal_the_models(tokenizer):
    model = random_model(vocab_size=1024)
    needed = memory.footprint(model.params, 1, torch.float32)
    assert needed.weights == sum(weight.nbytes for weight in model.parameters())
    assert needed.cache == sum(cache.nbytes for cache in model.buffers())


def test_build_stops_before_it_allocates_too_much(tmp_path):
    save_random(tmp_path)
    with pytest.raises(MemoryError, match=r"each of 1 rank\(s\) needs .* and cpu has .* GB free; use more ranks"):
        Llama.build(tmp_path, TOKENIZER, max_seq_len=10**9, device="cpu")


def test_the_check_can_be_overridden(tmp_path, monkeypatch):
    save_random(tmp_path)
    monkeypatch.setattr("llama.checkpoint.memory.available", lambda device: 1000)
    with pytest.raises(MemoryError, match="check_memory=False tries all the same"):
        Llama.build(tmp_path, TOKENIZER, device="cpu")
    Llama.build(tmp_path, TOKENIZER, device="cpu", check_memory=False)


def system(root, groups, files):
    """A /proc and a /sys with these cgroups of this process and these files; 64 GB are free."""
    files = {"proc/meminfo": "MemTotal: 99000000 kB\nMemAvailable: 62500000 kB\n", "proc/self/cgroup": groups, **files}
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return memory.available(torch.device("cpu"), root)


def cgroup(folder, limit, used, inactive=0, active=0, version=2):
    """The files of one cgroup."""
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    total = "total_" * (version == 1)
    stat = f"anon 5\nfile 10\n{total}inactive_file {inactive}\n{total}active_file {active}\n"
    contents = zip((*names, "memory.stat"), (f"{limit}\n", f"{used}\n", stat), strict=True)
    return {f"sys/fs/cgroup/{folder}/{name}": text for name, text in contents}


V1, GB = {"version": 1}, 10**9
NO_LIMIT = 9223372036854771712  # no limit, in version 1


@pytest.mark.parametrize(
    ("groups", "files", "free"),
    [
        ("0::/\n", cgroup("", 8 * GB, 7998 * 10**6, inactive=5 * GB, active=2900 * 10**6), 7902 * 10**6),
        ("0::/\n", cgroup("", "max", 9 * GB), 64 * GB),
        ("0::/app\n", cgroup("", "max", 9 * GB) | cgroup("app", 8 * GB, 2 * GB), 6 * GB),
        ("0::/pod/app\n", cgroup("pod", 8 * GB, 7 * GB, active=GB) | cgroup("pod/app", "max", GB), 2 * GB),
        ("0::/pod/app\n", cgroup("pod", 8 * GB, 3 * GB) | cgroup("pod/app", 4 * GB, 3 * GB, inactive=GB), 2 * GB),
        ("3:cpu,memory:/\n0::/\n", cgroup("memory", 8 * GB, 7 * GB, 2 * GB, 3 * GB, **V1), 6 * GB),
        ("4:memory:/docker/1f\n", cgroup("memory", 8 * GB, 3 * GB, **V1), 5 * GB),
        ("4:memory:/a/b\n", cgroup("memory/a", 8 * GB, GB, **V1) | cgroup("memory/a/b", NO_LIMIT, GB, **V1), 7 * GB),
        ("4:memory:/\n", cgroup("memory", NO_LIMIT, 3 * GB, **V1), 64 * GB),
        ("", {"proc/meminfo": "MemTotal: 9 kB\nMemFree: 1 kB\nBuffers: 2 kB\nCached: 3 kB\nSwapTotal: 0 kB\n"}, 6144),
        ("", {}, 64 * GB),
    ],
)
def test_page_cache_and_all_cgroup_limits(tmp_path, groups, files, free):
    """Regression: after a download or a checksum, page cache counted against a container's limit, so that a model of 10
    MB got a MemoryError; limits of cgroup version 1, of the process's own group and of parent groups were ignored."""
    assert system(tmp_path, groups, files) == free


VM_STAT = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                              100000.
Pages active:                            300000.
Pages inactive:                          250000.
Pages speculative:                        50000.
Pages throttled:                              0.
Pages wired down:                        120000.
"Translation faults":                9000000000.
"""


@pytest.mark.parametrize(("text", "free"), [(VM_STAT, 16384 * 400_000), ("no such thing", 2**63), (None, 2**63)])
def test_free_memory_of_a_mac(monkeypatch, tmp_path, text, free):
    """Regression: it was infinite, as there is no /proc."""

    def run(command, **options):
        assert command == ["vm_stat"]
        if text is None:
            raise FileNotFoundError("vm_stat")
        return subprocess.CompletedProcess(command, 0, text, "")

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(subprocess, "run", run)
    assert memory.available(torch.device("cpu"), tmp_path) == free


def test_torchs_cached_gpu_blocks_count_as_free(monkeypatch):
    """Regression: after `del llama` a second model did not fit, although the caching allocator could reuse the first
    one's memory."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * GB, 24 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 20 * GB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5 * GB)
    assert memory.available(torch.device("cuda", 0)) == 17 * GB


def inspect(*flags):
    return in_process(command, *flags)


def test_inspect_prints_what_there_is_and_what_to_run():
    done = inspect(MODELS / "small-chat", "--world_size", 2, "--dtype", "float32", "--device", "cpu", "--verify")
    assert done.returncode == 0, done.stderr
    for words in ("Meta's", "1,049,728", "(2 key-value)", "2, in bfloat16", "2 rank(s)", "in float32", "fits: yes"):
        assert words in done.stdout
    assert "torchrun --nproc_per_node 2 example_text_completion.py --ckpt_dir" in done.stdout
    assert "verified: params.json, consolidated.00.pth, consolidated.01.pth, tokenizer.model" in done.stdout


def test_verify_names_differing_files(tmp_path):
    shutil.copytree(MODELS / "small-chat", tmp_path / "model")
    path = tmp_path / "model" / "consolidated.01.pth"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    (tmp_path / "model" / "SHA256SUMS").write_text(f"{'0' * 64} *params.json\n{'1' * 64}  gone.json\n")
    done = inspect(tmp_path / "model", "--tokenizer_path", TOKENIZER, "--verify")
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    folder = tmp_path / "model"
    assert f"missing: {folder}/gone.json; " in line
    assert f"other than their sums say: {folder}/params.json, {folder}/consolidated.01.pth; " in line
    assert "verified" not in done.stdout


@pytest.mark.parametrize(
    ("lines", "message"), [("12 params.json\n", "not a line of md5sum's"), (None, "no list of sums")]
)
def test_a_checksum_list_without_files_is_an_error(tmp_path, lines, message):
    save_random(tmp_path / "model")
    shutil.copy(TOKENIZER, tmp_path / "model")
    if lines is None:
        (tmp_path / "model" / "checklist.chk").unlink()
    else:
        (tmp_path / "model" / "checklist.chk").write_text(lines)
    done = inspect(tmp_path / "model", "--verify")
    assert done.returncode == 1
    assert message in done.stderr


def test_checksum_lists_of_other_programs(tmp_path):
    """Regression: a byte order mark made the first line "no line of md5sum", and a form feed in a name ended it."""
    save_random(tmp_path / "model")
    for name in ("tokenizer.model", "two\fparts"):
        shutil.copy(TOKENIZER, tmp_path / "model" / name)
    path = tmp_path / "model" / "checklist.chk"
    lines = path.read_text() + f"{checkpoint.digest(TOKENIZER, 'md5')}  two\fparts\n"
    path.write_bytes(b"\xef\xbb\xbf" + lines.replace("\n", "\r\n").encode())
    done = inspect(tmp_path / "model", "--verify")
    assert done.stderr == ""
    assert "verified: params.json, consolidated.00.pth, two\fparts" in done.stdout


@pytest.mark.parametrize("world_size", [3, 0, "abc", 8])
def test_inspect_names_a_number_of_ranks_that_does_not_fit(world_size):
    done = inspect(MODELS / "small-chat", "--world_size", world_size, "--device", "cpu")
    assert done.returncode == 1
    assert "does not divide the model; 1, 2, 4 do" in done.stderr
    assert done.stdout == ""


def test_the_command_to_run_can_be_pasted(tmp_path):
    save_random(tmp_path / "a model")
    shutil.copy(TOKENIZER, tmp_path / "a model")
    done = inspect(tmp_path / "a model")
    assert f"--ckpt_dir '{tmp_path}/a model' --tokenizer_path '{tmp_path}/a model/tokenizer.model'" in done.stdout


def test_inspect_does_without_a_tokenizer_and_counts_shards(tmp_path):
    save_random(tmp_path / "model", mp=4)
    done = inspect(tmp_path / "model")
    assert done.returncode == 0, done.stderr
    assert "tokenizer: missing: no tokenizer.model in" in done.stdout
    assert "vocabulary 1024" in done.stdout
    (tmp_path / "model" / "consolidated.03.pth").unlink()
    done = inspect(tmp_path / "model")
    assert done.returncode == 1
    assert "has 3 of 4 shards; download consolidated.03.pth" in done.stderr


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not report the peak of memory")
def test_inspect_of_70b_reads_headers_alone(tmp_path):
    """Eight sparse shards of 17 GB, which take 400 MB at most. benchmarks/startup.py measures the time."""
    args = ModelArgs(**SEVENTY, vocab_size=1024)
    with torch.serialization.skip_data():
        for i in range(8):
            part = {}
            for name, shape in shapes(args).items():
                dim = checkpoint.shard_dim(name)
                part[name] = torch.empty([n // 8 if d == dim else n for d, n in enumerate(shape)], dtype=torch.bfloat16)
            torch.save(part, tmp_path / f"consolidated.{i:02d}.pth")
    (tmp_path / "params.json").write_text(json.dumps({**SEVENTY, "norm_eps": 1e-5, "vocab_size": -1}))
    code = """
import runpy, torch
def peak(): print(*(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
peak()
runpy.run_module("llama", run_name="__main__")
peak()
"""
    command = [sys.executable, "-c", code, "inspect", str(tmp_path), "--tokenizer_path", str(TOKENIZER)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert "68,469,137,408" in done.stdout, done.stderr
    imported, peak = (int(kilobytes) * 1024 for kilobytes in re.findall(r"VmHWM:\s+(\d+) kB", done.stdout))
    assert peak - imported <= 50e6
    assert peak <= 400e6 or torch.version.cuda  # torch alone takes more with CUDA's libraries


def test_a_smaller_model_needs_less():
    wide, narrow = ({**GQA, "n_kv_heads": kv_heads} for kv_heads in (8, 2))
    options = {"vocab_size": 1024, "max_batch_size": 4, "max_seq_len": 128}
    assert memory.footprint(ModelArgs(**narrow, **options), 1, torch.float32) < memory.footprint(
        ModelArgs(**wide, **options), 1, torch.float32
    )
