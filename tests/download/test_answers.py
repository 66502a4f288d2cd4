"""download.sh with a server that refuses, or answers with other contents."""

import pytest

from download.server import CHECKLIST, PAGE, QUERY, SHARD, User, assert_complete, expected


def test_an_expired_link_is_explained(user: User) -> None:
    """Regression: users only saw status 403, for every file."""
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
    """Regression: a page with status 200 was saved as a shard, which the next run accepted."""
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
    """One wrong byte in gigabytes: the file must not get its final name, and the next run must not resume from it."""
    user.put_all_but(SHARD)
    right = user.server.files[SHARD]
    user.server.files[SHARD] = right[:200_000] + b"?" + right[200_001:]
    result = user.download()
    assert result.returncode != 0 and SHARD in result.stderr and "damaged" in result.stderr
    assert not (user.target / SHARD).exists() and not (user.target / f"{SHARD}.part").exists()
    user.server.files[SHARD] = right
    assert_complete(user, user.download())


def test_an_existing_wrong_file_is_replaced(any_user: User) -> None:
    """Regression: existing files were trusted. They are checked now, and an incomplete one is resumed."""
    any_user.put_all_but(SHARD)
    right = any_user.server.files[SHARD]
    any_user.put(SHARD, right[:-1] + b"?")
    any_user.put("tokenizer.model", any_user.server.files["tokenizer.model"][:1000])
    assert_complete(any_user, any_user.download())
    assert any_user.server.requests == [("tokenizer.model", 1000), (SHARD, len(right)), (SHARD, 0)]


def test_a_wrong_file_is_removed_even_if_it_cannot_be_replaced(any_user: User) -> None:
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
def test_an_invalid_checklist_is_an_error(any_user: User, content: bytes) -> None:
    """Regression: with an empty checklist nothing was checked."""
    any_user.server.files[CHECKLIST] = content
    result = any_user.download()
    assert result.returncode != 0 and CHECKLIST in result.stderr
    assert any_user.server.asked(SHARD) == [] and not (any_user.target / CHECKLIST).exists()


def test_a_file_that_the_server_does_not_have(user: User) -> None:
    user.put_all_but(SHARD)
    del user.server.files[SHARD]
    result = user.download()
    assert result.returncode != 0 and SHARD in result.stderr and "404" in result.stderr


def test_no_server(user: User) -> None:
    result = user.run(f"http://127.0.0.1:1/*?{QUERY}", "7B")
    assert result.returncode != 0 and "network" in result.stderr and user.has() == {}
