"""The Dockerfile, as far as it can be checked without Docker, and docs/server.md's examples for systemd and nginx."""

import ast
import fnmatch
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time

import pytest
from ranks import free_port
from serving import build, httpx, serving, slow_down
from small import ROOT

from llama.cli.serve import serve
from llama.server.app import Config
from llama.server.process import Server

DOCUMENT = (ROOT / "docs" / "server.md").read_text()
FLAGS = inspect.signature(serve).parameters


@pytest.fixture(scope="module")
def dockerfile():
    """(instruction, rest) for each line."""
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in lines]


def every(dockerfile, instruction):
    return [rest for name, rest in dockerfile if name == instruction]


def test_copied_files_suffice_to_install(dockerfile, tmp_path):
    ignored = (ROOT / ".dockerignore").read_text().split()
    kept = [name[1:] for name in ignored if name.startswith("!")]
    for rest in every(dockerfile, "COPY"):
        *sources, target = rest.split()
        for source in sources:
            assert source in kept
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, tmp_path / target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, tmp_path / target)
    assert ignored[0] == "*"
    assert {path.name for path in tmp_path.iterdir()} == {*kept}
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    found = (tmp_path / "llama_reference.egg-info" / "SOURCES.txt").read_text()
    assert "llama/server/app.py" in found
    assert "native.cpp" in found


def test_installed_packages(dockerfile):
    runs = "\n".join(every(dockerfile, "RUN"))
    [extras] = re.findall(r'"\.\[(.*?)\]"', runs)
    tree = ast.parse((ROOT / "setup.py").read_text())
    [declared] = [
        node.value for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "extras_require"
    ]
    assert {*extras.split(",")} <= {key.value for key in declared.keys}
    [torch] = re.findall(r'"(torch.*?)"', runs)
    assert torch in (ROOT / "requirements.txt").read_text().split()
    version = every(dockerfile, "FROM")[0].split(":")[1].split("-")[0]
    assert fnmatch.fnmatch(version, "3.1[0-3]")


def test_user_port_and_entrypoint(dockerfile):
    [user] = every(dockerfile, "USER")
    assert user != "root"
    assert any(re.search(rf"useradd .*{user}$", run) for run in every(dockerfile, "RUN"))
    names = [name for name, _ in dockerfile]
    assert names.index("USER") < names.index("ENTRYPOINT")
    assert int(*every(dockerfile, "EXPOSE")) == FLAGS["port"].default
    [entry], [command] = map(json.loads, every(dockerfile, "ENTRYPOINT")), map(json.loads, every(dockerfile, "CMD"))
    assert entry == ["python", "-m", "llama", "serve"]
    [shown] = re.findall(r"^docker run (.*) llama (.*)$", DOCUMENT, re.MULTILINE)
    folder, *flags = shown[1].split()
    for given in (command, [folder, *flags]):
        assert {flag[2:] for flag in given if flag.startswith("--")} <= {*FLAGS}
        assert given[given.index("--host") + 1] == "0.0.0.0"
    assert (ROOT / folder.removeprefix("/")).is_dir()
    assert (ROOT / folder.removeprefix("/")).parent.joinpath("tokenizer.model").is_file()


def test_the_health_check(dockerfile):
    """It fails while the model is loaded, and succeeds afterwards."""
    [check] = every(dockerfile, "HEALTHCHECK")
    command = json.loads(check.partition("CMD ")[2])
    assert command[0] == "python"
    server = Server(Config("small-chat"))
    command = [sys.executable, *(part.replace(":8000", f":{server.port}") for part in command[1:])]
    assert subprocess.run(command, capture_output=True, timeout=20).returncode == 1
    thread = threading.Thread(target=server.serve, args=(build(max_seq_len=16),))
    thread.start()
    try:
        time.sleep(0.5)
        assert subprocess.run(command, capture_output=True, timeout=20).returncode == 0
    finally:
        server.drain()
        thread.join()


def block(kind):
    """The only code block of this kind in docs/server.md."""
    [found] = re.findall(rf"^```{kind}\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)
    return found


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_the_systemd_unit(tmp_path):
    unit = block("ini")
    [line] = re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    python, *rest = line.split()
    assert rest[:3] == ["-m", "llama", "serve"]
    assert {flag[2:] for flag in rest if flag.startswith("--")} <= {*FLAGS}
    path = tmp_path / "llama.service"
    path.write_text(unit.replace(python, sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "llama.service" not in done.stderr, done.stderr


@pytest.fixture
def proxy(tmp_path):
    """A function that runs nginx with the document's configuration and returns its URL."""
    processes = []

    def start(port):
        own = free_port()
        config = block("nginx").replace("127.0.0.1:8000", f"127.0.0.1:{port}").replace("listen 443", f"listen {own}")
        for name in re.findall(r"/etc/\S+(?=;)", config):
            config = config.replace(name, str(tmp_path / name.split("/")[-1]))
        files = ["-keyout", str(tmp_path / "llama.key"), "-out", str(tmp_path / "llama.pem")]
        certificate = [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "1",
            "-subj",
            "/CN=localhost",
        ]
        subprocess.run([*certificate, *files], check=True, capture_output=True, timeout=60)
        temporary = "".join(
            f"{name}_temp_path {tmp_path}/{name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        (tmp_path / "nginx.conf").write_text(
            f"{'user root;' * (os.geteuid() == 0)} pid {tmp_path}/pid; error_log {tmp_path}/error.log; events {{}}\n"
            f"http {{ access_log off;\n{temporary}{config}}}\n"
        )
        command = ["nginx", "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf"), "-g", "daemon off;"]
        processes.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        return f"https://127.0.0.1:{own}"

    yield start
    for process in processes:
        process.terminate()
        process.wait(20)


@pytest.mark.skipif(not shutil.which("nginx") or not shutil.which("openssl"), reason="needs nginx and openssl")
def test_a_stream_through_nginx(proxy, monkeypatch):
    """Each event arrives when it is sent, the first before the others are generated."""
    llama = build()
    slow_down(llama, monkeypatch)
    body = {"prompt": "Once", "max_tokens": 60, "min_tokens": 60, "stream": True}
    with serving(llama) as client, httpx.Client(base_url=proxy(client.server.port), verify=False, timeout=30) as nginx:
        for _ in range(100):
            try:
                assert nginx.get("/health").status_code == 200
                break
            except httpx.TransportError:
                time.sleep(0.1)
        seen = []
        with nginx.stream("POST", "/v1/completions", json=body) as stream:
            for line in stream.iter_lines():
                if line.startswith("data: {"):
                    seen.append(client.server.service.loop.gauges()["num_requests_running"])
        assert len(seen) > 30
        assert seen[:20] == [1] * 20
        large = nginx.post("/v1/completions", json={"prompt": "a", "user": "x" * 2**21, "max_tokens": 1})
        assert large.status_code == 200  # below --max_body
        reply = nginx.post("/v1/completions", json={"prompt": "a", "user": "x" * 2**23})
        assert reply.status_code == 413
        assert nginx.get("/metrics").status_code == 403
        assert nginx.get("/v1/models").headers["x-request-id"]
