"""A wheel of the tracked files, installed in an empty environment, works outside of the repository."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest
from small import MODELS, ROOT, TOKENIZER

CHAT = ["--ckpt_dir", str(MODELS / "small-chat"), "--temperature", "0", "--device", "cpu", "--dtype", "float32"]


def run(*command, cwd, **options):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [str(part) for part in command]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=120, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built only from files that git tracks, so that no other file of the folder is in it."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("needs a git repository")
    clean, out = tmp_path_factory.mktemp("clean"), tmp_path_factory.mktemp("wheel")
    for name in run("git", "ls-files", "llama", "*.py", "*.toml", "*.txt", "*.md", cwd=ROOT).split("\n"):
        if name and "tests/" not in name and (ROOT / name).exists():
            (clean / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, clean / name)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    run(*pip, "-w", out, clean, cwd=out)
    return next(out.iterdir())


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """(python, folder): an environment with the wheel. Dependencies come from the environment of the tests."""
    folder = tmp_path_factory.mktemp("empty")
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel, cwd=folder)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    with open(f"{site}/dependencies.pth", "w") as file:  # after this one, and without its own .pth files
        file.writelines(f"{path}\n" for path in paths)
    found = run(python, "-c", "import llama; print(llama.__file__)", cwd=folder)
    assert found.startswith(site)
    return python, folder


def test_the_wheel_has_every_file_of_the_package(wheel):
    tracked = run("git", "ls-files", "llama", cwd=ROOT).split()
    expected = {name for name in tracked if (ROOT / name).exists()}
    assert {name for name in zipfile.ZipFile(wheel).namelist() if "dist-info" not in name} == expected


def test_the_examples_run(installed):
    python, folder = installed
    for name in ("example_text_completion.py", "example_chat_completion.py"):
        shutil.copy(ROOT / name, folder)
    flags = ["--tokenizer_path", TOKENIZER, "--max_gen_len", 8]
    out = run(python, "example_text_completion.py", "--ckpt_dir", MODELS / "small", *flags, cwd=folder)
    assert out.count("\n> ") == 4
    out = run(python, "example_chat_completion.py", *CHAT, *flags, cwd=folder)
    assert "> Assistant: " in out


def test_the_commands_run(installed):
    python, folder = installed
    llama = [python, "-m", "llama"]
    assert "fits: yes" in run(*llama, "inspect", MODELS / "small-chat", "--device", "cpu", cwd=folder)
    out = run(*llama, "convert", MODELS / "small-chat", "converted", "--to", "hf", cwd=folder)
    assert out.startswith("written to converted: hf in bfloat16")
    flags = ["--ckpt_dir", "converted", *CHAT[2:]]
    assert run(*llama, "chat", *flags, cwd=folder, input="Hello\n") == "Hello! How can I help you?\n"
    sizes = ["--prompts", 16, "--batches", 1, "--repeats", 1, "--tokens", 2, "--device", "cpu"]
    out = run(*llama, "bench", "--ckpt_dir", "converted", *sizes, cwd=folder)
    assert json.loads(out.splitlines()[-1])["cases"]
