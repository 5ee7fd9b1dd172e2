"""The built-in key provider: the conformance suite, import, what it leaves on the disk, and where its key lies."""

from __future__ import annotations

import asyncio
import hmac
import re
import shutil
import sqlite3
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from contract.check_key_provider import CHECKS, Bench, check_key_provider
from sealift.errors import (
    AlreadyExists,
    InvalidInput,
    KeyMissing,
    KeyProviderError,
    ProviderAnswerInvalid,
    ProviderUnreachable,
)
from sealift.keys.kinds import open_provider
from sealift.keys.native import NativeProvider
from sealift.keys.provider import KeyState, new_key
from sealift.keys.storage import TOOL, KeyStorage, choose_storage, find_storage, seals_here
from sealift.secret import Secret

KDK = bytes(range(1, 33))


def make(directory: Path, *, kdk: bytes = KDK, name: str = "built-in") -> NativeProvider:
    return NativeProvider.make(name, directory, kdk=Secret(kdk, length=32), storage=KeyStorage.FILE)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conformance(check: Callable[[Bench], Awaitable[None]], tmp_path: Path) -> None:
    make(tmp_path / "p")
    asyncio.run(check_key_provider(lambda: open_provider("native", "built-in", tmp_path / "p", ()), (check,)))


def test_keys_follow_from_the_derivation_key_and_the_id_alone(tmp_path: Path) -> None:
    """HKDF-SHA256 from RFC 5869 by hand: what an export protects must be enough for ever."""
    make(tmp_path)
    provider = NativeProvider("built-in", tmp_path, draw=lambda count: b"\xab" * count)
    key_id = asyncio.run(provider.create("x"))

    def derive(info: bytes) -> bytes:
        return hmac.digest(hmac.digest(bytes(32), KDK, "sha256"), info + b"\x01", "sha256")

    second = hmac.digest(derive(b"sealift-native-id-v1"), b"ab" * 16, "sha256").hex()[:16]
    assert key_id == f"{'ab' * 16}-{second}"
    assert asyncio.run(provider.get(key_id)).reveal() == derive(b"sealift-native-kek-v1" + key_id.encode())
    with pytest.raises(KeyProviderError, match=r"keys\.db"):
        asyncio.run(provider.create("the same bytes drawn again"))


def test_an_imported_provider_has_every_key_of_the_first(tmp_path: Path) -> None:
    async def scenario() -> None:
        first = make(tmp_path / "a")
        key_id = await new_key(first, "web1")
        key, kdk = (await first.get(key_id)).reveal(), await first.derivation_key()
        second = make(tmp_path / "b", kdk=kdk.reveal())
        assert await second.holds(kdk)
        assert (await second.get(key_id)).reveal() == key
        assert await second.state(key_id) is KeyState.ACTIVE
        await second.destroy(key_id)
        with pytest.raises(KeyMissing, match="destroyed"):
            await second.get(key_id)
        assert await first.state(key_id) is KeyState.ACTIVE, "a tombstone stands where it was put up"
        other = make(tmp_path / "c", kdk=bytes(32))
        assert not await other.holds(kdk)
        with pytest.raises(KeyMissing, match="not one of its own"):
            await other.get(key_id)

    asyncio.run(scenario())


def test_nothing_of_a_key_is_in_the_book_and_all_of_it_is_private(tmp_path: Path) -> None:
    directory = tmp_path / "p"
    provider = make(directory)
    key_id = asyncio.run(new_key(provider, "web1"))
    key = asyncio.run(provider.get(key_id)).reveal()
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    files = {path.name: path for path in directory.iterdir()}
    assert files.keys() == {"kdk", "keys.db"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files.values()} == {0o600}
    assert files["kdk"].read_bytes() == KDK
    book = files["keys.db"].read_bytes()
    assert key_id.encode() in book
    for secret in (KDK, key):
        assert secret not in book
        assert secret.hex().encode() not in book


def test_a_provider_is_made_once_and_under_a_sane_name(tmp_path: Path) -> None:
    make(tmp_path / "p")
    with pytest.raises(AlreadyExists):
        make(tmp_path / "p", kdk=bytes(32))
    assert (tmp_path / "p" / "kdk").read_bytes() == KDK
    with pytest.raises(InvalidInput):
        make(tmp_path / "q", name="../q")
    assert not (tmp_path / "q").exists()


def test_a_make_that_was_cut_off_is_done_again(tmp_path: Path) -> None:
    (tmp_path / "keys.db").touch(mode=0o600)
    (tmp_path / "kdk.new").write_bytes(b"half")
    key_id = asyncio.run(new_key(make(tmp_path), "web1"))
    assert re.fullmatch("[0-9a-f]{32}-[0-9a-f]{16}", key_id)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kdk", "keys.db"]


def test_a_lost_or_changed_derivation_key_is_said(tmp_path: Path) -> None:
    async def said(error: type[KeyProviderError], words: str) -> None:
        provider = NativeProvider("built-in", tmp_path)
        with pytest.raises(error, match=words) as refused:
            await provider.get(key_id)
        assert "built-in" in refused.value.what
        assert "import it again" in refused.value.todo
        health = await provider.probe()
        assert not health.ok
        assert health.message == refused.value.what

    key_id = asyncio.run(new_key(make(tmp_path), "web1"))
    (tmp_path / "kdk").write_bytes(bytes(32))
    asyncio.run(said(ProviderAnswerInvalid, "another"))
    (tmp_path / "kdk").write_bytes(KDK[:31])
    asyncio.run(said(ProviderUnreachable, "32 bytes"))
    (tmp_path / "kdk").unlink()
    asyncio.run(said(ProviderUnreachable, "no key"))
    # Imported again in the same place: what was destroyed stays so.
    provider = make(tmp_path)
    asyncio.run(provider.destroy(key_id))
    (tmp_path / "kdk").unlink()
    assert asyncio.run(make(tmp_path).state(key_id)) is KeyState.DESTROYED


def test_a_damaged_book_is_said(tmp_path: Path) -> None:
    key_id = asyncio.run(new_key(make(tmp_path), "web1"))
    for content in (b"no database" * 100, None):
        (tmp_path / "keys.db").unlink() if content is None else (tmp_path / "keys.db").write_bytes(content)
        with pytest.raises(ProviderUnreachable, match=r"keys\.db"):
            asyncio.run(NativeProvider("built-in", tmp_path).get(key_id))
    assert not (tmp_path / "keys.db").exists(), "an empty one would have forgotten what was destroyed"


def test_a_failed_call_changes_nothing(tmp_path: Path) -> None:
    provider = make(tmp_path)
    key_id = asyncio.run(provider.create("web1"))
    with sqlite3.connect(tmp_path / "keys.db") as db:
        db.execute("CREATE TRIGGER full BEFORE UPDATE ON keys BEGIN SELECT RAISE(ABORT, 'disk full'); END")
    db.close()
    with pytest.raises(ProviderUnreachable, match="disk full"):
        asyncio.run(provider.activate(key_id))
    assert asyncio.run(provider.state(key_id)) is KeyState.PRE_ACTIVE


def test_people_are_told_where_the_key_is_and_what_destroying_means(tmp_path: Path) -> None:
    provider = make(tmp_path)
    assert f"unsealed, in {tmp_path}/kdk" in provider.key_storage
    assert "whoever can read that file" in provider.key_storage
    assert "can derive it again" in provider.notes
    (tmp_path / "kdk").rename(tmp_path / "kdk.cred")
    assert "sealed to this machine by systemd-creds" in provider.key_storage
    (tmp_path / "kdk.cred").unlink()
    assert "missing" in provider.key_storage


@pytest.mark.parametrize(
    ("booted", "seals", "chosen"),
    [
        (True, True, KeyStorage.SYSTEMD_CREDS),
        (True, False, KeyStorage.FILE),
        (False, False, KeyStorage.FILE),
        (False, True, KeyStorage.FILE),
    ],
)
def test_systemd_creds_is_chosen_where_it_will_stay(booted: bool, seals: bool, chosen: KeyStorage) -> None:
    assert choose_storage(booted=booted, seals=seals) is chosen


def test_without_systemd_creds_a_file_is_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not seals_here()
    assert find_storage() is KeyStorage.FILE
    with pytest.raises(ProviderUnreachable, match="not on this machine"):
        NativeProvider.make("built-in", tmp_path / "p", kdk=Secret(KDK, length=32), storage=KeyStorage.SYSTEMD_CREDS)


@pytest.mark.skipif(shutil.which(TOOL) is None, reason="systemd-creds is not on this machine")
def test_systemd_creds_seals_the_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # The host's secret of systemd-creds, which only root has, stays out of this: systemd-creds(1), ENVIRONMENT.
    monkeypatch.setenv("SYSTEMD_CREDENTIAL_SECRET", str(tmp_path / "host-secret"))
    directory = tmp_path / "p"
    assert seals_here()
    provider = NativeProvider.make("built-in", directory, kdk=Secret(KDK, length=32), storage=KeyStorage.SYSTEMD_CREDS)
    key_id = asyncio.run(new_key(provider, "web1"))
    key = asyncio.run(provider.get(key_id)).reveal()
    asyncio.run(provider.close())
    assert sorted(path.name for path in directory.iterdir()) == ["kdk.cred", "keys.db"]
    sealed = (directory / "kdk.cred").read_bytes()
    assert KDK not in sealed
    assert asyncio.run(NativeProvider("built-in", directory).get(key_id)).reveal() == key
    # Neither under another name, nor on a machine with another secret.
    with pytest.raises(ProviderUnreachable, match="systemd-creds failed"):
        asyncio.run(NativeProvider("another", directory).get(key_id))
    monkeypatch.setenv("SYSTEMD_CREDENTIAL_SECRET", str(tmp_path / "other-secret"))
    with pytest.raises(ProviderUnreachable, match="systemd-creds failed"):
        asyncio.run(NativeProvider("built-in", directory).get(key_id))
