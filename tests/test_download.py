"""download.sh, run for real against a small server on this machine: each case is a way in which downloads went wrong.

The server has made-up files under the published paths. It insists on the query of the link, so that
every success also shows that the shell neither split nor expanded it.
"""

import contextlib
import gzip
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

SCRIPT = Path(__file__).parent.parent / "download.sh"
BASH = shutil.which("bash") or ""
pytestmark = pytest.mark.skipif(not BASH, reason="bash is not installed")

# A signed link has all of these: & and * and ~ for the shell, % for whoever decodes, _ and - and = besides.
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
    """What the server has, by path."""
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


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


class User:
    """Someone with an (almost) empty machine: a folder to download to, and only the named programs on the PATH."""

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
        """What a finished download leaves, without one file."""
        for path, data in expected(self.server, "7b").items():
            if path != missing:
                self.put(path, data)

    def has(self) -> dict[str, bytes]:
        paths = (path for path in self.target.rglob("*") if path.is_file())
        return {str(path.relative_to(self.target)): path.read_bytes() for path in paths}


HASHER = ("md5sum",) if shutil.which("md5sum") else ("md5",)


@pytest.fixture(params=["curl", "wget"])
def user(request: pytest.FixtureRequest, tmp_path: Path, server: Server) -> User:
    if shutil.which(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    return User(tmp_path, server, (request.param, *HASHER, *TOOLS))


@pytest.fixture
def any_user(tmp_path: Path, server: Server) -> User:
    """For what has nothing to do with which of curl and wget is there."""
    if not (shutil.which("curl") or shutil.which("wget")):
        pytest.skip("neither curl nor wget is installed")
    return User(tmp_path, server, ("curl", "wget", *HASHER, *TOOLS))


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
    """Whatever has a final name holds what the server publishes under it."""
    right = expected(user.server, *models)
    wrong = [path for path, data in user.has().items() if not path.endswith(".part") and right.get(path) != data]
    assert wrong == []


# ---- When all goes well ----------------------------------------------------------------------------------------------


def test_downloads_everything_and_leaves_the_projects_own_documents_alone(user: User) -> None:
    """Meta's LICENSE, saved to the current folder, overwrote the one of the checkout."""
    own = {"LICENSE": b"MIT", "USE_POLICY.md": b"ours", "README.md": b"ours too"}
    for name, data in own.items():
        user.put(name, data)
    result = user.download()
    assert result.returncode == 0, result.stderr
    assert user.has() == expected(user.server, "7b") | own
    assert "Signature" not in result.stdout + result.stderr  # whoever has the link can download with it


def test_a_second_run_downloads_nothing(any_user: User) -> None:
    """Each run spent the link's limited number of downloads again."""
    any_user.download()
    any_user.server.requests.clear()
    assert_complete(any_user, any_user.download())
    assert any_user.server.requests == []


def test_several_models_asked_for_in_each_of_the_ways(any_user: User) -> None:
    user, models = any_user, "7B-chat,13B"
    for name, run in {
        "arguments": lambda: user.run(user.server.link, models),
        "environment": lambda: user.run(PRESIGNED_URL=user.server.link, MODEL_SIZE="7b-chat 13b"),
        "answers": lambda: user.run(stdin=f"{user.server.link}\n{models}"),
    }.items():
        user.target = user.home / name
        assert_complete(user, run(), "7b-chat", "13b")


def test_no_model_named_means_all(any_user: User) -> None:
    any_user.server.files = dict.fromkeys(any_user.server.files, b"")
    any_user.server.files |= {"tokenizer.model": b"t", "tokenizer_checklist.chk": checklist({"tokenizer.model": b"t"})}
    any_user.server.files |= {"LICENSE": b"L", "USE_POLICY.md": b"U"}
    for model, n_shards in {"7b": 1, "13b": 2, "70b": 8, "7b-chat": 1, "13b-chat": 2, "70b-chat": 8}.items():
        folder = {name: name.encode() for name in ["params.json", *(f"consolidated.0{i}.pth" for i in range(n_shards))]}
        any_user.server.files |= {f"llama-2-{model}/{name}": data for name, data in folder.items()}
        any_user.server.files[f"llama-2-{model}/checklist.chk"] = checklist(folder)
    result = any_user.run(any_user.server.link, stdin="\n")
    assert_complete(any_user, result, "7b", "13b", "70b", "7b-chat", "13b-chat", "70b-chat")


def test_downloads_to_the_current_folder_by_default(any_user: User) -> None:
    assert any_user.download(TARGET_FOLDER="").returncode == 0
    assert (any_user.home / SHARD).read_bytes() == any_user.server.files[SHARD]


def test_a_link_damaged_on_its_way_is_repaired(any_user: User) -> None:
    """Copied from a mail's source its & are &amp;, and some mail programs wrap it: both gave 403."""
    link = any_user.server.link.replace("&", "&amp;")
    assert_complete(any_user, any_user.run(f" {link[:40]}\n{link[40:]} ", "7B"))


# ---- A download that stopped -----------------------------------------------------------------------------------------


def test_goes_on_where_a_part_ends(user: User) -> None:
    user.put_all_but(SHARD)
    user.put(f"{SHARD}.part", user.server.files[SHARD][:100_000])
    assert_complete(user, user.download())
    assert user.server.asked(SHARD) == [100_000]


def test_a_whole_part_is_only_checked(user: User) -> None:
    """Killed between the last byte and the renaming: the server has nothing more to send (416), which is no error."""
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


def test_a_part_that_is_a_web_page_is_thrown_away(any_user: User) -> None:
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
    """It was "the connection broke", and then a number of curl's."""
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
    """curl does not say what it takes, and some servers and proxies then send gzip: each right file was "damaged"."""
    user.server.compress = compress
    if begun:
        whole = user.server.files[SHARD]
        user.put_all_but(SHARD)
        user.put(f"{SHARD}.part", (whole if begun == "of the file" else gzip.compress(whole))[:100_000])
    assert_complete(user, user.download())


def test_a_compressed_web_page_is_one(user: User) -> None:
    user.server.compress = "always"
    user.put_all_but(SHARD)
    user.server.pages = {SHARD}
    result = user.download()
    assert result.returncode != 0 and "a web page instead of the file" in result.stderr
    assert_nothing_wrong(user)


@pytest.mark.parametrize("whole_group", [True, False], ids=["all processes", "only the script"])
def test_killed_midway_and_run_again(user: User, whole_group: bool) -> None:
    """A killed download stayed under its final name. And where only the script is killed, its wget lives on: it must
    not write into the file of the next run, which here is over before the old one's next bytes arrive."""
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


# ---- Refused and wrong answers ---------------------------------------------------------------------------------------


def test_an_expired_link_is_explained(user: User) -> None:
    """Status 403 and nothing else was all that users saw, again and again."""
    user.server.expired = True
    result = user.download()
    assert result.returncode != 0 and user.has() == {}
    for words in ("403", "24 hours", "limited number", "request a new one", "copy", "tokenizer_checklist.chk"):
        assert words in result.stderr


def test_a_link_that_expires_midway_loses_nothing(user: User) -> None:
    user.put_all_but(SHARD)
    user.put(f"{SHARD}.part", user.server.files[SHARD][:100_000])
    user.server.expired = True
    before = user.has()
    result = user.download()
    assert result.returncode != 0 and "24 hours" in result.stderr and SHARD in result.stderr
    assert user.has() == before


@pytest.mark.parametrize(("path", "file"), [("LICENSE", "llama-2-7b/LICENSE"), (CHECKLIST, CHECKLIST), (SHARD, SHARD)])
def test_a_web_page_is_never_kept(user: User, path: str, file: str) -> None:
    """A page with status 200 was saved as a shard, and taken for it by the next run."""
    user.put_all_but(file)
    user.server.pages.add(path)
    before = user.has()
    result = user.download()
    assert result.returncode != 0
    assert path in result.stderr and "web page" in result.stderr
    assert user.has() == before
    user.server.pages.clear()
    assert_complete(user, user.download())


def test_web_pages_of_an_older_script_are_replaced(any_user: User) -> None:
    for path in expected(any_user.server, "7b"):
        any_user.put(path, PAGE)
    assert_complete(any_user, any_user.download())


def test_a_corrupted_byte(user: User) -> None:
    """One wrong byte in gigabytes: the file must not get its name, and the next run must not build on it."""
    user.put_all_but(SHARD)
    right = user.server.files[SHARD]
    user.server.files[SHARD] = right[:200_000] + b"?" + right[200_001:]
    result = user.download()
    assert result.returncode != 0 and SHARD in result.stderr and "damaged" in result.stderr
    assert not (user.target / SHARD).exists() and not (user.target / f"{SHARD}.part").exists()
    user.server.files[SHARD] = right
    assert_complete(user, user.download())


def test_a_wrong_file_that_is_already_here_is_replaced(any_user: User) -> None:
    """An existing file was believed: now it is checked, and one that only lacks its end is completed."""
    any_user.put_all_but(SHARD)
    right = any_user.server.files[SHARD]
    any_user.put(SHARD, right[:-1] + b"?")
    any_user.put("tokenizer.model", any_user.server.files["tokenizer.model"][:1000])
    assert_complete(any_user, any_user.download())
    assert any_user.server.requests == [("tokenizer.model", 1000), (SHARD, len(right)), (SHARD, 0)]


def test_a_wrong_file_does_not_stay_when_it_cannot_be_replaced(any_user: User) -> None:
    any_user.put_all_but(SHARD)
    any_user.put(SHARD, b"wrong")
    any_user.server.expired = True
    assert any_user.download().returncode != 0
    assert not (any_user.target / SHARD).exists()


@pytest.mark.parametrize(
    "content",
    [b'{"error": "denied"}', b"", b"0123456789abcdef0123456789abcdef  params.json\n"],
    ids=["json", "empty", "shard missing"],
)
def test_a_checklist_must_be_one(any_user: User, content: bytes) -> None:
    """A checklist that lists nothing checked nothing."""
    any_user.server.files[CHECKLIST] = content
    result = any_user.download()
    assert result.returncode != 0 and CHECKLIST in result.stderr
    assert any_user.server.asked(SHARD) == [] and not (any_user.target / CHECKLIST).exists()


def test_a_file_that_the_server_does_not_have(user: User) -> None:
    user.put_all_but(SHARD)
    del user.server.files[SHARD]
    result = user.download()
    assert result.returncode != 0 and SHARD in result.stderr and "404" in result.stderr


def test_no_server_at_all(user: User) -> None:
    result = user.run(f"http://127.0.0.1:1/*?{QUERY}", "7B")
    assert result.returncode != 0 and "network" in result.stderr and user.has() == {}


# ---- What the user asks for ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("models", ["8B", "7B,34B", "7B;13B", "7B-Chat-hf", "*", ",", "llama-2-7b"])
def test_an_unknown_model_is_named(any_user: User, models: str) -> None:
    """An unknown size went on with the path of the model before it."""
    result = any_user.download(models)
    assert result.returncode != 0 and any_user.server.requests == [] and not any_user.target.exists()
    assert f'"{models.removeprefix("7B,").strip(",")}"' in result.stderr
    assert "7B,13B,70B,7B-chat,13B-chat,70B-chat" in result.stderr


@pytest.mark.parametrize(
    "link, words",
    [
        ("https://l.facebook.com/l.php?u=https%3A%2F%2Fdownload.llamameta.net%2F*%3FPolicy", "l.facebook.com"),
        ("", "no link"),
        ("  ", "no link"),
        ("someone@example.com", "not a link"),
        ("ftp://127.0.0.1/*", "not a link"),
        (f"http://127.0.0.1/?{QUERY.replace('*', '')}", "no *"),
        ('http://127.0.0.1/*"\\', "quote"),
    ],
)
def test_a_link_that_cannot_work_is_refused(any_user: User, link: str, words: str) -> None:
    """Each of these was tried, and what came back was saved. Some people gave their e-mail address."""
    for result in (any_user.run(link, "7B"), any_user.run(stdin=f"{link}\n7B\n")):
        assert result.returncode != 0 and not any_user.target.exists()
        assert words in result.stderr and "In the e-mail" in result.stderr


def test_nobody_there_to_name_a_model(any_user: User) -> None:
    """End of input is not the empty answer: it must not start the download of everything."""
    result = any_user.run(any_user.server.link)
    assert result.returncode != 0 and "second argument" in result.stderr and any_user.server.requests == []


# ---- What the machine has --------------------------------------------------------------------------------------------


def test_macos_checks_too(any_user: User) -> None:
    """macOS has md5 and not md5sum: there the check printed an error and the script went on."""
    (any_user.bin / "md5sum").unlink(missing_ok=True)
    (any_user.bin / "md5").unlink(missing_ok=True)
    (any_user.bin / "md5").write_text(
        f"#!{sys.executable} -IS\nimport hashlib, sys\nassert sys.argv[1:] == ['-q']\n"
        "print(hashlib.md5(sys.stdin.buffer.read()).hexdigest())\n"
    )
    (any_user.bin / "md5").chmod(0o755)
    assert_complete(any_user, any_user.download())
    right = any_user.server.files[SHARD]
    any_user.put(SHARD, right[:-1] + b"?")
    any_user.server.files[SHARD] = b"?" + right[1:]
    result = any_user.download()
    assert result.returncode != 0 and SHARD in result.stderr
    assert_nothing_wrong(any_user)
    assert not (any_user.target / SHARD).exists()


@pytest.mark.parametrize("missing", [("curl", "wget"), ("md5sum", "md5")])
def test_a_missing_program_is_named(any_user: User, missing: tuple[str, ...]) -> None:
    for name in missing:
        (any_user.bin / name).unlink(missing_ok=True)
    result = any_user.download()
    assert result.returncode != 0 and all(name in result.stderr for name in missing)
    assert any_user.server.requests == []


def test_started_with_sh(any_user: User) -> None:
    """Where sh is not bash, "sh download.sh" ended in a syntax error."""
    (any_user.bin / "bash").symlink_to(BASH)
    any_user.shell = shutil.which("sh") or BASH
    assert_complete(any_user, any_user.download())
