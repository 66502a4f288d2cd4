"""download.sh: successful downloads, ways to call it, and machines that lack programs."""

import shutil
import sys

import pytest

from download.server import BASH, QUERY, SHARD, User, assert_complete, assert_nothing_wrong, checklist, expected

# Successful downloads


def test_downloads_everything_and_leaves_the_projects_own_documents_alone(user: User) -> None:
    """Regression: Meta's LICENSE, saved to the current folder, overwrote the checkout's."""
    own = {"LICENSE": b"MIT", "USE_POLICY.md": b"ours", "README.md": b"ours too"}
    for name, data in own.items():
        user.put(name, data)
    result = user.download()
    assert result.returncode == 0, result.stderr
    assert user.has() == expected(user.server, "7b") | own
    assert "Signature" not in result.stdout + result.stderr  # the link is a secret: anyone who has it can download


def test_a_second_run_downloads_nothing(any_user: User) -> None:
    """Regression: each run used up some of the link's limited downloads."""
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
    """Copied from an e-mail's source, & is &amp;, and some e-mail programs wrap the link: both gave 403."""
    link = any_user.server.link.replace("&", "&amp;")
    assert_complete(any_user, any_user.run(f" {link[:40]}\n{link[40:]} ", "7B"))


# Choice of models, and links


@pytest.mark.parametrize("models", ["8B", "7B,34B", "7B;13B", "7B-Chat-hf", "*", ",", "llama-2-7b"])
def test_an_unknown_model_is_named(any_user: User, models: str) -> None:
    """Regression: an unknown size used the previous model's path."""
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
    """Regression: each of these was requested, and the response saved. Some users entered their e-mail address."""
    for result in (any_user.run(link, "7B"), any_user.run(stdin=f"{link}\n7B\n")):
        assert result.returncode != 0 and not any_user.target.exists()
        assert words in result.stderr and "In the e-mail" in result.stderr


def test_end_of_input_instead_of_a_model_name(any_user: User) -> None:
    """End of input is not an empty answer, and must not start the download of all models."""
    result = any_user.run(any_user.server.link)
    assert result.returncode != 0 and "second argument" in result.stderr and any_user.server.requests == []


# Programs of the machine


def test_macos_checks_too(any_user: User) -> None:
    """macOS has md5 instead of md5sum. Regression: the check printed an error and the script went on."""
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
    """Regression: where sh is not bash, "sh download.sh" ended in a syntax error."""
    (any_user.bin / "bash").symlink_to(BASH)
    any_user.shell = shutil.which("sh") or BASH
    assert_complete(any_user, any_user.download())
