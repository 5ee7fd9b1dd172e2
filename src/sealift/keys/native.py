"""The built-in key provider: its keys are derived from one key derivation key (KDK), nothing else is needed.

    key id     32 random hex digits, "-", 16 hex digits of HMAC-SHA256 over the former under the id sub-key of the KDK
    KEK        HKDF-SHA256 of the KDK, info = "sealift-native-kek-v1" and the key id
    sub-keys   HKDF-SHA256 of the KDK, info = "sealift-native-id-v1" and "sealift-native-check-v1"

Whoever has the KDK has every key, so it lies outside the database (``keys.storage``), and a provider that was imported
on another controller has all keys of the first at once. The second half of an id lets it recognise its own.

States and labels are in ``keys.db``. It holds no secret, and is not part of an export: a key that an imported provider
does not know there counts as active.

**Destroying a key is a tombstone.** This provider will not derive it again, but whoever has the KDK, from an export or
a backup, can. Where a key must be gone, the key server of a ``kmip`` provider destroys it.
"""

from __future__ import annotations

import asyncio
import hmac
import re
import secrets
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final

from sealift.domain.vm import check_name
from sealift.errors import (
    AlreadyExists,
    KeyMissing,
    KeyProviderError,
    ProviderAnswerInvalid,
    ProviderUnreachable,
)
from sealift.keys.envelope import hkdf
from sealift.keys.provider import KeyState, MemberHealth, ProviderHealth
from sealift.keys.storage import KeyStorage, describe, load, store, stored
from sealift.secret import Secret

_KEY_ID: Final = re.compile(r"([0-9a-f]{32})-([0-9a-f]{16})")
_KEK_LABEL: Final = b"sealift-native-kek-v1"
_ID_LABEL: Final = b"sealift-native-id-v1"
_CHECK_LABEL: Final = b"sealift-native-check-v1"
_BOOK: Final = "keys.db"
_BOOK_VERSION: Final = 1

_MAY_BECOME: Final = {
    KeyState.PRE_ACTIVE: {KeyState.ACTIVE, KeyState.DESTROYED},
    KeyState.ACTIVE: {KeyState.ACTIVE, KeyState.DESTROYED},
    KeyState.DESTROYED: {KeyState.DESTROYED},
}
"""The states this provider has, and where each leads (KMIP 1.4, section 3.22, without deactivation and compromise)."""


class NativeProvider:
    """See the module and ``keys.provider.KeyProvider``. It holds its KDK in memory from the first use to ``close``."""

    def __init__(self, name: str, directory: Path, draw: Callable[[int], bytes] = secrets.token_bytes) -> None:
        """Open what ``make`` made; nothing is read yet. ``draw(n)`` gives n random bytes, for key ids only."""
        self._name = check_name("key provider", name)
        self._directory = directory
        self._draw = draw
        self._kdk: Secret | None = None
        self._loading = asyncio.Lock()

    @classmethod
    def make(cls, name: str, directory: Path, *, kdk: Secret, storage: KeyStorage) -> NativeProvider:
        """A provider with this KDK: 32 fresh random bytes, or those of an export. May take seconds (TPM).

        ``directory`` may be there, without a provider; a make that was cut off is done again. Raises AlreadyExists, and
        ProviderUnreachable when systemd-creds fails.
        """
        provider = cls(name, directory)
        if stored(directory) is not None:
            raise AlreadyExists(f"key provider {name} has its key already", todo="give another name")
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
        book = directory / _BOOK
        book.touch(mode=0o600)
        with provider._book() as db:
            db.execute("CREATE TABLE IF NOT EXISTS keys (key_id TEXT PRIMARY KEY, label TEXT NOT NULL, state TEXT)")
            db.execute("CREATE TABLE IF NOT EXISTS kdk (one INTEGER PRIMARY KEY CHECK (one = 1), mark TEXT NOT NULL)")
            db.execute("INSERT OR REPLACE INTO kdk VALUES (1, ?)", (_mark(kdk),))
            db.execute(f"PRAGMA user_version = {_BOOK_VERSION}")
        # Last, since its being there means that the provider is.
        store(name, directory, kdk, storage)
        return provider

    @property
    def name(self) -> str:
        """The name that VMs find it by."""
        return self._name

    @property
    def key_storage(self) -> str:
        """Where the KDK lies and who could get it, for people."""
        return describe(self._directory)

    @property
    def notes(self) -> str:
        """What people must know of this kind of provider."""
        return (
            "destroying a key is a tombstone: this provider will not give it out again, but whoever has the provider's "
            "key derivation key, from an export or a backup, can derive it again"
        )

    async def derivation_key(self) -> Secret:
        """A copy of the KDK, to be exported; the caller wipes it. Raises ProviderUnreachable, ProviderAnswerInvalid."""
        raw = (await self._key()).reveal()
        return Secret(raw, length=len(raw))

    async def holds(self, kdk: Secret) -> bool:
        """Whether that is this provider's KDK, as when an export was read back."""
        return hmac.compare_digest((await self._key()).reveal(), kdk.reveal())

    async def create(self, label: str) -> str:
        """See ``KeyProvider``."""
        half = self._draw(16).hex()
        key_id = f"{half}-{_second_half(await self._key(), half)}"
        with self._book() as db:
            # A primary key: an id that was there, destroyed or not, is refused by the database.
            db.execute("INSERT INTO keys VALUES (?, ?, ?)", (key_id, label, KeyState.PRE_ACTIVE.value))
        return key_id

    async def activate(self, key_id: str) -> None:
        """See ``KeyProvider``."""
        await self._become(key_id, KeyState.ACTIVE)

    async def get(self, key_id: str) -> Secret:
        """See ``KeyProvider``."""
        state = await self.state(key_id)
        if state in (KeyState.DESTROYED, KeyState.DESTROYED_COMPROMISED):
            raise self._missing(key_id, f"is {state.value}")
        return hkdf(await self._key(), _KEK_LABEL + key_id.encode())

    async def state(self, key_id: str) -> KeyState:
        """See ``KeyProvider``."""
        await self._recognise(key_id)
        with self._book() as db:
            return _state(db, key_id)

    async def locate(self, label: str) -> list[str]:
        """See ``KeyProvider``; keys made elsewhere before an import have no label here."""
        with self._book() as db:
            found = db.execute(
                "SELECT key_id FROM keys WHERE label = ? AND state != ?", (label, KeyState.DESTROYED.value)
            )
            return [key_id for (key_id,) in found]

    async def destroy(self, key_id: str) -> None:
        """See ``KeyProvider``, and the module for what it means here."""
        await self._become(key_id, KeyState.DESTROYED)

    async def probe(self) -> ProviderHealth:
        """Whether the KDK can be had now, from where it lies, and is the right one. Raises nothing."""
        message = ""
        try:
            (await self._load()).wipe()
        except KeyProviderError as error:
            message = error.what
        return ProviderHealth(not message, message, (MemberHealth("built in", not message, message),))

    async def close(self) -> None:
        """Drop the KDK from memory."""
        if self._kdk is not None:
            self._kdk.wipe()
        self._kdk = None

    async def _key(self) -> Secret:
        async with self._loading:
            if self._kdk is None:
                self._kdk = await self._load()
            return self._kdk

    async def _load(self) -> Secret:
        kdk = await asyncio.to_thread(load, self._name, self._directory)
        with self._book() as db:
            marks = [mark for (mark,) in db.execute("SELECT mark FROM kdk")]
        if marks != [_mark(kdk)]:
            raise ProviderAnswerInvalid(
                f"key provider {self._name} has another key derivation key than it was made with",
                todo="remove the provider and import it again under the same name from its export",
            )
        return kdk

    async def _recognise(self, key_id: str) -> None:
        """Raises KeyMissing unless the id was made with this KDK, here or on another controller."""
        found = _KEY_ID.fullmatch(key_id)
        if not found or not hmac.compare_digest(_second_half(await self._key(), found[1]), found[2]):
            raise self._missing(key_id, "is not one of its own")

    async def _become(self, key_id: str, state: KeyState) -> None:
        await self._recognise(key_id)
        with self._book() as db:
            before = _state(db, key_id)
            if state not in _MAY_BECOME[before]:
                raise self._missing(key_id, f"is {before.value}")
            # The label of a key made elsewhere is not known; nobody looks for the empty one.
            db.execute(
                "INSERT INTO keys VALUES (?, '', ?) ON CONFLICT (key_id) DO UPDATE SET state = excluded.state",
                (key_id, state.value),
            )

    @contextmanager
    def _book(self) -> Iterator[sqlite3.Connection]:
        """One transaction on keys.db, on the disk when this ends; raises ProviderUnreachable."""
        try:
            path = f"{(self._directory / _BOOK).absolute().as_uri()}?mode=rw"
            with closing(sqlite3.connect(path, uri=True, isolation_level=None)) as db:
                db.execute("PRAGMA synchronous = FULL")
                db.execute("BEGIN IMMEDIATE")
                yield db
                db.execute("COMMIT")
        except sqlite3.Error as error:
            raise ProviderUnreachable(
                f"key provider {self._name} cannot use its record of keys in {self._directory / _BOOK}: {error}",
                todo="look at the file and the room on its file system",
            ) from None

    def _missing(self, key_id: str, why: str) -> KeyMissing:
        return KeyMissing(
            f"key {key_id} {why}, says key provider {self._name}",
            todo="import the provider that made it under this name, or restore the VM from a backup",
        )


def _state(db: sqlite3.Connection, key_id: str) -> KeyState:
    """What the book says; one of ours that it does not know was made elsewhere, and is in use."""
    row = db.execute("SELECT state FROM keys WHERE key_id = ?", (key_id,)).fetchone()
    return KeyState(row[0]) if row else KeyState.ACTIVE


def _second_half(kdk: Secret, half: str) -> str:
    key = hkdf(kdk, _ID_LABEL)
    return hmac.digest(key.reveal(), half.encode(), "sha256")[:8].hex()


def _mark(kdk: Secret) -> str:
    """What tells this KDK from another without telling anything else of it."""
    return hkdf(kdk, _CHECK_LABEL, length=16).reveal().hex()
