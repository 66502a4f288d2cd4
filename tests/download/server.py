"""A server of fake weights under the published paths, and users who download from it with download.sh. The server
checks the link's query, so that a success also shows that the shell neither split nor expanded it."""

import gzip
import hashlib
import re
import shutil
import subprocess
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

from small import ROOT

SCRIPT = ROOT / "download.sh"
BASH = shutil.which("bash") or ""

# A signed link has all of these: & * ~ are special to the shell, % to URL decoding, and there are _ - = too.
QUERY = "Policy=eyJTd_-~&Signature=a~b%7Ec%2Bd*&Key-Pair-Id=K1$HOME"
PAGE = b"\n <!DOCTYPE html><html><body>Update your browser</body></html>\n"
SHARD = "llama-2-7b/consolidated.00.pth"
CHECKLIST = "llama-2-7b/checklist.chk"
CHUNK = 1 << 16
TOOLS = (
    "gzip",
    "head",
    "mkdir",
    "mv",
    "rm",
    "sed",
    "tail",
    "tr",
    "wc",
    "ps",
)  # what download.sh needs besides curl and md5sum


def checklist(folder: dict[str, bytes]) -> bytes:
    return "".join(f"{hashlib.md5(data).hexdigest()}  {name}\n" for name, data in folder.items()).encode()


def published_files() -> dict[str, bytes]:
    """The server's files, by path."""
    # A SentencePiece model begins like this: a check for web pages that skips too much would see its "<".
    tokenizer = b"\n\x0e\n\x05<unk>\x15" + bytes(range(256)) * 4
    files = {"LICENSE": b"LLAMA 2 COMMUNITY LICENSE", "USE_POLICY.md": b"# Llama 2 Acceptable Use Policy"}
    files |= {"tokenizer.model": tokenizer, "tokenizer_checklist.chk": checklist({"tokenizer.model": tokenizer})}
    for model, n_shards in {"7b": 1, "13b": 2, "7b-chat": 1}.items():
        folder = {"params.json": b'{"dim": 4096}'}
        for i in range(n_shards):
            folder[f"consolidated.{i:02d}.pth"] = b"PK" + hashlib.sha256(f"{model}{i}".encode()).digest() * 12_000
        files |= {f"llama-2-{model}/{name}": data for name, data in folder.items()}
        files[f"llama-2-{model}/checklist.chk"] = checklist(folder)
    return files


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = published_files()
        self.requests: list[tuple[str, int]] = []  # path, first byte asked for
        self.expired = False  # every answer is 403
        self.pages: set[str] = set()  # paths answered with a web page and status 200
        self.cut: dict[str, int] = {}  # path -> after how many bytes to hang up, once
        self.trickle: set[str] = set()  # paths sent slowly, once
        self.ranges = True
        self.compress = ""  # "unasked": where the request does not say identity; "always"

    @property
    def link(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/*?{QUERY}"

    def asked(self, path: str) -> list[int]:
        return [start for asked, start in self.requests if asked == path]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path, _, query = self.path[1:].partition("?")
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        self.server.requests.append((path, start))
        data = self.server.files.get(path, b"")
        if self.server.expired or unquote(query) != unquote(QUERY):  # wget may write ~ for %7E
            return self.answer(403, b"<html>403 Forbidden</html>", kind="text/html")
        if path in self.server.pages:
            packed = {"Content-Encoding": "gzip"} if self.server.compress else None
            return self.answer(200, gzip.compress(PAGE) if packed else PAGE, packed, kind="text/html")
        if path not in self.server.files:
            return self.answer(404, b"<html>404 Not Found</html>", kind="text/html")
        if self.server.compress == "always" or (
            self.server.compress and self.headers.get("Accept-Encoding") != "identity"
        ):
            return self.answer(200, gzip.compress(data), {"Content-Encoding": "gzip"})
        if not asked or not self.server.ranges:
            return self.answer(200, data)
        if start >= len(data):
            return self.answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        self.answer(206, data[start:], {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"})

    def answer(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, kind: str = "binary/octet-stream"
    ) -> None:
        path = self.path[1:].partition("?")[0]
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            if path in self.server.trickle:
                self.server.trickle.remove(path)
                for i in range(0, len(body), CHUNK):
                    self.wfile.write(body[i : i + CHUNK])
                    time.sleep(0.2)
            else:
                self.wfile.write(body[: self.server.cut.pop(path, None)])
        except ConnectionError:
            pass  # the downloader was killed


class User:
    """A user on a machine with a download folder and only the named programs on PATH."""

    def __init__(self, home: Path, server: Server, programs: tuple[str, ...]) -> None:
        self.home, self.server = home, server
        self.target = home / "weights of mine"
        self.bin = home / "bin"
        self.shell = BASH
        self.bin.mkdir()
        for name in programs:
            if found := shutil.which(name):
                (self.bin / name).symlink_to(found)

    def command(self, *args: str) -> list[str]:
        return [self.shell, str(SCRIPT), *args]

    def environment(self, **variables: str) -> dict[str, str]:
        return {"PATH": str(self.bin), "HOME": str(self.home), "TARGET_FOLDER": str(self.target), **variables}

    def run(self, *args: str, stdin: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*args),
            env=self.environment(**variables),
            cwd=self.home,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def download(self, models: str = "7B", **variables: str) -> subprocess.CompletedProcess[str]:
        return self.run(self.server.link, models, **variables)

    def put(self, path: str, data: bytes) -> None:
        (self.target / path).parent.mkdir(parents=True, exist_ok=True)
        (self.target / path).write_bytes(data)

    def put_all_but(self, missing: str) -> None:
        """Write the files of a finished download, except one."""
        for path, data in expected(self.server, "7b").items():
            if path != missing:
                self.put(path, data)

    def has(self) -> dict[str, bytes]:
        paths = (path for path in self.target.rglob("*") if path.is_file())
        return {str(path.relative_to(self.target)): path.read_bytes() for path in paths}


HASHER = ("md5sum",) if shutil.which("md5sum") else ("md5",)


def expected(server: Server, *models: str) -> dict[str, bytes]:
    files = {name: server.files[name] for name in ("tokenizer.model", "tokenizer_checklist.chk")}
    for model in models:
        files |= {path: data for path, data in server.files.items() if path.startswith(f"llama-2-{model}/")}
        files |= {f"llama-2-{model}/{name}": server.files[name] for name in ("LICENSE", "USE_POLICY.md")}
    return files


def assert_complete(user: User, result: subprocess.CompletedProcess[str], *models: str) -> None:
    assert result.returncode == 0, result.stderr
    assert user.has() == expected(user.server, *models or ("7b",))


def assert_nothing_wrong(user: User, models: tuple[str, ...] = ("7b",)) -> None:
    """Files with a final name have the published contents."""
    right = expected(user.server, *models)
    wrong = [path for path, data in user.has().items() if not path.endswith(".part") and right.get(path) != data]
    assert wrong == []
