"""The key providers of one controller, by name. A name is for ever: VMs find their provider by it.

What was committed to the database is what counts; each provider's directory is put in place just before, and deleted
just after.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from sealift.controller.events import EventLog, Happening
from sealift.controller.fresh_keys import FreshKeys
from sealift.controller.models import KeyProviderRow
from sealift.controller.provider_ask import ProviderAsk, check_ask, check_certificate
from sealift.controller.provider_files import ProviderFiles, build, build_native
from sealift.controller.provider_presence import Presence
from sealift.controller.provider_trial import TrialStep, try_members, try_out
from sealift.controller.provider_view import (
    Added,
    ProviderState,
    Removed,
    SeenProvider,
    judge,
    keys_in_use,
    locked_of,
    lost_with,
    new_row,
    no_certificate,
    notes_on,
    provider_row,
    refuse_removal,
    told,
    told_of_locks,
    users_of,
)
from sealift.domain.vm import check_name
from sealift.errors import (
    AlreadyExists,
    Conflict,
    ExportInvalid,
    KeyMissing,
    KeyNotActive,
    NotFound,
    ProviderAnswerInvalid,
    ProviderImpostor,
    ProviderNotExported,
    ProviderRefused,
    ProviderUnreachable,
)
from sealift.keys import kmip_trust
from sealift.keys.export import check_passphrase, draw_words, open_export, seal_export
from sealift.keys.kinds import Kind, open_provider
from sealift.keys.native import NativeProvider
from sealift.keys.provider import KeyProvider, MemberHealth, ProviderHealth
from sealift.secret import Secret


class Providers:
    """The key providers of one controller. What they keep secret lies below ``directory``, one directory each."""

    def __init__(self, events: EventLog, directory: Path) -> None:
        self._events, self._files = events, ProviderFiles(directory)
        self._changing = asyncio.Lock()  # held by whatever changes a row or a directory, and while one is opened
        self._opened: dict[str, KeyProvider] = {}
        self._presence = Presence()
        self.fresh = FreshKeys(events)  # told by the keyring: they make their provider one in use
        self.changed = asyncio.Event()
        """Set, and replaced by a new one, whenever keys may be had that could not be had before, or no more."""

    # Adding and removing

    async def add(self, ask: ProviderAsk, *, asked_by: str) -> Added:
        """A new provider; the first one becomes the default. Raises InvalidInput, AlreadyExists, Conflict."""
        check_ask(ask)
        async with self._changing:
            await self._must_be_free(ask.name)
            with self._files.aside() as built:
                await asyncio.to_thread(build, built, ask)
                row = new_row(ask.name, ask.kind, members=ask.members, exported_at=None)
                said = f"key provider {ask.name} ({ask.kind}) was added by {asked_by}"
                unlocks = await self._place(built, row, "key_provider.added", said, default=ask.default)
        return Added(await self.show(ask.name), unlocks)

    async def _place(
        self, built: Path, row: KeyProviderRow, event: str, said: str, *, default: bool
    ) -> tuple[str, ...]:
        """Put a provider's directory and row in place; the names of the VMs that are locked for want of it."""
        with self._files.placing(built, row.name):
            async with self._events.transaction() as session:
                first = await session.scalar(select(KeyProviderRow.name).limit(1)) is None
                session.add(row)
                users, locked = await users_of(session, row.name), await locked_of(session, row.name)
                text = said + (f"; these VMs have their keys there: {', '.join(users)}" if users else "")
                self._events.add(session, Happening(event, text))
                if default or first:
                    await self._make_default(session, row, "as the first one" if first else "when it was added")
        self._wake()
        return locked

    async def remove(self, name: str, *, force: bool, asked_by: str) -> Removed:
        """Forget a provider and delete what is kept of it here. Raises NotFound, and Conflict while VMs use it.

        With ``force`` those VMs lock, each as soon as its host has lost its keys, until a provider of that name is
        back; those that run go on. A VM for which a key is being made uses it too.
        """
        async with self._changing:
            async with self._events.transaction() as session:
                row = await provider_row(session, name)
                users, making = await users_of(session, name), self.fresh.vms_of(name)
                if not force:
                    refuse_removal(row, users, making)
                await session.delete(row)
                await self.fresh.provider_removed(session, name)
                removed = Removed(name, tuple(sorted({*users, *making})), lost_with(row), row.is_default)
                text = f"key provider {name} was removed by {asked_by}{told_of_locks(removed.locks)}. {removed.lost}"
                if removed.was_default:
                    text += "; there is no default key provider now"
                self._events.add(session, Happening("key_provider.removed", text))
            await self._close(name)
            self._presence.forget(name)
            await asyncio.to_thread(self._files.delete, name)
        self._wake()
        return removed

    # Looking

    async def list(self) -> Sequence[SeenProvider]:
        """Every provider, asked just now."""
        async with self._events.reading() as session:
            names = await session.scalars(select(KeyProviderRow.name).order_by(KeyProviderRow.name))
        seen = await asyncio.gather(*(self.show(name) for name in names), return_exceptions=True)
        for each in seen:
            if isinstance(each, BaseException) and not isinstance(each, NotFound):  # removed meanwhile
                raise each
        return [each for each in seen if not isinstance(each, BaseException)]

    async def show(self, name: str) -> SeenProvider:
        """One provider, asked just now; raises NotFound."""
        async with self._events.reading() as session:
            row, users = await provider_row(session, name), await users_of(session, name)
        try:
            return await self._see(row, users)
        except NotFound:
            raise
        except Exception as error:  # the others can be seen all the same
            return SeenProvider(row, "unreachable", told(name, error), (), users, ())

    async def _see(self, row: KeyProviderRow, users: tuple[str, ...]) -> SeenProvider:
        name, place = row.name, self._files.of(row.name)
        certificate = request = ""
        if row.kind == "kmip":
            certificate, request = kmip_trust.client_certificate(place), kmip_trust.certificate_request(place)
        state: ProviderState
        if row.kind == "kmip" and not certificate:
            state, message = "no_certificate", no_certificate(name).what
            members = tuple(MemberHealth(each, False, "not asked without a certificate") for each in row.members)
        else:
            health = await self.probe(name)
            state, message = judge(row, health)
            members = health.members
        return SeenProvider(row, state, message, members, users, notes_on(row, place), certificate, request)

    async def probe(self, name: str) -> ProviderHealth:
        """Ask every member of a provider whether it answers; raises NotFound."""
        try:
            health = await (await self.open(name)).probe()
        except NotFound:
            raise
        except Exception as error:
            health = ProviderHealth(ok=False, message=told(name, error))
        if health.ok:
            await self._tell(name, self._presence.probe_answered(name))
        else:
            await self._tell(name, self._presence.probe_failed(name), health.message or "it does not answer")
        return health

    async def test(self, name: str, *, asked_by: str) -> tuple[bool, Sequence[TrialStep]]:
        """Make, activate, read, find and destroy a key on every member; raises NotFound, Conflict, KeyProviderError."""
        whole = await self.open(name)
        async with self._events.reading() as session:
            row = await provider_row(session, name)
        used, left = self.used_keys, self.fresh.left_over
        if row.kind == "native":
            steps = await try_out(whole, name, used=used, left=left)
        else:
            steps = await try_members(name, self._files.of(name), row.members, used=used, left=left)
        failed = next((f"{step.name}: {step.message}" for step in steps if not step.ok), "")
        async with self._events.transaction() as session:
            outcome = f"did not pass: {failed}" if failed else "passed"
            text = f"key provider {name} was tested by {asked_by} and {outcome}"
            self._events.add(session, Happening("key_provider.tested", text))
        return not failed, steps

    # Changing

    async def set_default(self, name: str, *, asked_by: str) -> SeenProvider:
        """Let new encrypted VMs use this provider when none is named; raises NotFound."""
        async with self._changing, self._events.transaction() as session:
            await self._make_default(session, await provider_row(session, name), f"by {asked_by}")
        return await self.show(name)

    async def default(self) -> str:
        """The name of the default provider; raises NotFound when there is none."""
        async with self._events.reading() as session:
            found: str | None = await session.scalar(select(KeyProviderRow.name).where(KeyProviderRow.is_default))
        if found is None:
            raise NotFound(
                "there is no default key provider",
                todo="name one with `--provider NAME`, or set it with `sealift key-provider default NAME`",
            )
        return found

    async def accept_certificate(self, name: str, pem: str, *, asked_by: str) -> SeenProvider:
        """Take the certificate (PEM) that was signed for a kmip provider's request; raises NotFound, InvalidInput."""
        check_certificate(pem)
        async with self._changing:
            async with self._events.reading() as session:
                row = await provider_row(session, name)
            if row.kind != "kmip":
                raise Conflict(f"key provider {name} is native and has no certificate", todo="leave it as it is")
            await asyncio.to_thread(kmip_trust.accept_certificate, self._files.of(name), pem)
            await self._close(name)  # the next one to ask uses the new one
            async with self._events.transaction() as session:
                text = f"key provider {name} was given its client certificate by {asked_by}"
                self._events.add(session, Happening("key_provider.certified", text))
        self._wake()
        return await self.show(name)

    # Exports of native providers

    async def export(self, name: str, passphrase: Secret | None, *, asked_by: str) -> tuple[str, Secret | None]:
        """A native provider as a file sealed under ``passphrase``, or under words that are drawn and answered too.

        It counts only once it was read back (``confirm_export``). The age library keeps the interpreter to itself for
        the second that stretching a passphrase takes, here and below. Raises NotFound, Conflict, PassphraseWeak.
        """
        native = await self._native(name)
        words = None
        if passphrase is None:
            text = draw_words(secrets.token_bytes).encode()
            passphrase = words = Secret(text, length=len(text))
        else:
            await asyncio.to_thread(check_passphrase, passphrase.reveal().decode())
        kdk = await native.derivation_key()
        try:
            file = await asyncio.to_thread(seal_export, name, kdk, passphrase)
        finally:
            kdk.wipe()
        async with self._events.transaction() as session:
            said = f"key provider {name} was exported by {asked_by}; that counts once it was read back"
            self._events.add(session, Happening("key_provider.exported", said))
        return file, words

    async def confirm_export(self, name: str, file: str, passphrase: Secret, *, asked_by: str) -> SeenProvider:
        """Let an export count that opens and has this very provider's key. Raises NotFound, Conflict, ExportInvalid."""
        native = await self._native(name)
        exported_name, kdk = await asyncio.to_thread(open_export, file, passphrase)
        try:
            if exported_name != name or not await native.holds(kdk):
                raise ExportInvalid(
                    f"that is the export of another key provider than {name} as it is now",
                    todo="read back the file that was exported last",
                )
        finally:
            kdk.wipe()
        async with self._events.transaction() as session:
            row = await provider_row(session, name)
            row.exported_at = time.time()
            text = f"the export of key provider {name} was read back by {asked_by}; VMs may use it"
            self._events.add(session, Happening("key_provider.export_confirmed", text))
        self._wake()
        return await self.show(name)

    async def import_(self, file: str, passphrase: Secret, *, default: bool, asked_by: str) -> Added:
        """A native provider from its export, under the name it had. Raises AlreadyExists, ExportInvalid, Conflict."""
        name, kdk = await asyncio.to_thread(open_export, file, passphrase)
        try:
            check_name("key provider", name)
            async with self._changing:
                await self._must_be_free(name, todo="there is nothing to import")
                with self._files.aside() as built:
                    await asyncio.to_thread(build_native, built, name, kdk)
                    row = new_row(name, "native", members=(), exported_at=time.time())
                    said = f"key provider {name} (native) was imported by {asked_by}"
                    unlocks = await self._place(built, row, "key_provider.imported", said, default=default)
        finally:
            kdk.wipe()
        return Added(await self.show(name), unlocks)

    async def _native(self, name: str) -> NativeProvider:
        found = await self.open(name)
        if not isinstance(found, NativeProvider):
            raise Conflict(
                f"key provider {name} is not native and cannot be exported", todo="back up its key servers instead"
            )
        return found

    # Using

    async def open(self, name: str) -> KeyProvider:
        """The provider of that name, kept open; raises NotFound, KeyProviderError, Conflict (no certificate yet)."""
        found = self._opened.get(name)
        if found is not None:
            return found
        async with self._changing:
            if name not in self._opened:
                async with self._events.reading() as session:
                    row = await provider_row(session, name)
                place = self._files.of(name)
                if row.kind == "kmip" and not kmip_trust.client_certificate(place):
                    raise no_certificate(name)
                kind: Kind = "kmip" if row.kind == "kmip" else "native"
                self._opened[name] = await asyncio.to_thread(open_provider, kind, name, place, row.members)
            return self._opened[name]

    @asynccontextmanager
    async def asking(self, name: str) -> AsyncIterator[KeyProvider]:
        """The provider, for questions in the block; whether it answers them is kept track of. Raises as ``open``."""
        found = await self.open(name)
        try:
            yield found
        except (ProviderUnreachable, ProviderImpostor, ProviderAnswerInvalid) as error:
            reached = isinstance(error, ProviderAnswerInvalid)
            await self._tell(name, self._presence.question_failed(name, reached=reached), error.what)
            raise
        except (KeyMissing, KeyNotActive, ProviderRefused):  # which are answers too
            await self._tell(name, self._presence.question_answered(name))
            raise
        await self._tell(name, self._presence.question_answered(name))

    async def require_usable(self, name: str) -> None:
        """Raise NotFound, Conflict or ProviderNotExported unless new keys may be made there."""
        async with self._events.reading() as session:
            row = await provider_row(session, name)
        if row.kind == "native" and row.exported_at is None:
            raise ProviderNotExported(
                f"key provider {name} was never exported; if this controller were lost, so would be every VM of it",
                todo=f"run `sealift key-provider export {name} --output FILE`",
            )
        await self.open(name)

    async def require_there(self, name: str) -> None:
        """Raise NotFound unless there is such a provider."""
        async with self._events.reading() as session:
            await provider_row(session, name)

    async def used_keys(self, name: str) -> frozenset[str]:
        """The ids of the provider's keys that a VM has, or a conversion under way gives or takes."""
        async with self._events.reading() as session:
            return await keys_in_use(session, name)

    async def close(self) -> None:
        """Close connections."""
        for name in [*self._opened]:
            await self._close(name)

    async def _close(self, name: str) -> None:
        found = self._opened.pop(name, None)
        if found is not None:
            await found.close()

    async def _tell(self, name: str, news: bool, why: str = "") -> None:
        """If it is news, tell that a provider is away, and why, or without a reason that it is back."""
        if not news:
            return
        happening = Happening("key_provider.back", f"key provider {name} answers again")
        if why:
            happening = Happening("key_provider.unreachable", f"key provider {name} cannot be asked: {why}")
        async with self._events.transaction() as session:
            self._events.add(session, happening)
        self._wake()

    def _wake(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    async def _make_default(self, session: AsyncSession, row: KeyProviderRow, how: str) -> None:
        for other in await session.scalars(select(KeyProviderRow).where(KeyProviderRow.is_default)):
            other.is_default = False
        row.is_default = True
        text = f"key provider {row.name} was made the default {how}"
        self._events.add(session, Happening("key_provider.default", text))

    async def _must_be_free(self, name: str, todo: str = "choose another name") -> None:
        async with self._events.reading() as session:
            if await session.get(KeyProviderRow, name) is not None:
                raise AlreadyExists(f"key provider {name} is here already", todo=todo)
