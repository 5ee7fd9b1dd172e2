"""Key providers by name: added, exported, imported, tried out, away, removed; and what each does to VMs."""

from __future__ import annotations

import asyncio
import re
import sqlite3
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from sealift.controller.models import KeyProviderRow
from sealift.controller.provider_ask import ProviderAsk
from sealift.controller.provider_trial import TrialStep, try_out
from sealift.demo.kmip import KmipServers, ServerAuthority
from sealift.demo.ports import free_port
from sealift.errors import (
    AlreadyExists,
    Conflict,
    ExportInvalid,
    InvalidInput,
    NotFound,
    PassphraseWeak,
    ProviderNotExported,
    ProviderUnreachable,
    VmLocked,
)
from sealift.keys.kmip_numbers import Operation
from sealift.keys.native import NativeProvider
from sealift.keys.provider import KeyState, ProviderHealth
from sealift.keys.ttlv import Item
from sealift.secret import Secret
from support.age import cheap_export
from support.kmip_place import failing_on, make_place, members
from support.kmip_server import Die, Store
from support.registries import Registry, a_registry, with_registry


def secret(text: str) -> Secret:
    return Secret(text.encode(), length=len(text.encode()))


CA = ServerAuthority()
STEPS = ("create", "activate", "get", "locate", "destroy")
GOOD = ProviderAsk("kms", "kmip", ("kms1.example.net:5696",), CA.pem)

# Defaults


def test_the_first_is_the_default_until_it_is_removed_or_another_is_chosen(tmp_path: Path) -> None:
    async def story(registry: Registry) -> None:
        providers = registry.providers
        with pytest.raises(NotFound, match="no default"):
            await providers.default()
        await registry.add("one")
        assert await providers.default() == "one"
        await registry.add("two")
        assert await providers.default() == "one"
        await registry.add("three", default=True)
        assert await providers.default() == "three"
        assert (await providers.set_default("two", asked_by="ann")).row.is_default
        assert [each.row.is_default for each in await providers.list()] == [False, False, True]  # one, three, two
        await providers.remove("two", force=False, asked_by="ann")
        with pytest.raises(NotFound, match="no default"):
            await providers.default()
        await registry.add("four")  # not the first
        with pytest.raises(NotFound, match="no default"):
            await providers.default()
        with pytest.raises(NotFound, match="no key provider five"):
            await providers.set_default("five", asked_by="ann")
        told = [event.text for event in await registry.happened("key_provider.default")]
        assert [re.findall(r"key provider (\w+)", text) for text in told] == [["one"], ["three"], ["two"]]
        assert "first one" in told[0]

    with_registry(tmp_path, story)


# Native


def test_a_native_provider_from_its_making_to_its_import_elsewhere(tmp_path: Path) -> None:
    async def here(registry: Registry) -> tuple[str, Secret, str, bytes]:
        providers = registry.providers
        await registry.add("home")
        vm = await registry.add_vm("vm1", None)
        seen = await providers.show("home")
        assert (seen.state, seen.row.exported_at, seen.members[0].ok) == ("not_exported", None, True)
        assert any("tombstone" in note for note in seen.notes)
        assert any(str(registry.directory / "home") in note for note in seen.notes)
        with pytest.raises(ProviderNotExported, match="home"):
            await registry.keyring.new_kek("home", vm, "vm1")
        with pytest.raises(PassphraseWeak):
            await providers.export("home", secret("password12345678"), asked_by="ann")
        words = secret("Xylophon-Umbra-97-quergestreift")
        file, drawn = await providers.export("home", words, asked_by="ann")
        assert drawn is None
        with pytest.raises(ProviderNotExported):  # it was not read back yet
            await registry.keyring.new_kek("home", vm, "vm1")
        seen = await providers.confirm_export("home", file, words, asked_by="ann")
        assert seen.state == "ok"
        assert seen.row.exported_at is not None
        key_id, kek = await registry.keyring.new_kek("home", vm, "vm1")
        kinds = [event.type for event in await registry.happened() if "home" in event.text]
        assert kinds == [f"key_provider.{what}" for what in ("added", "default", "exported", "export_confirmed")]
        native = await providers.open("home")
        assert isinstance(native, NativeProvider)
        return cheap_export("home", await native.derivation_key(), words), words, key_id, kek.reveal()

    async def elsewhere(registry: Registry, file: str, words: Secret, key_id: str, kek: bytes) -> None:
        await registry.add_vm("vm1", "home", key_id)
        await registry.add_vm("vm2", "away", key_id)
        await registry.add_vm("vm3", "home", key_id)
        await registry.lock("vm1", "vm2")
        with pytest.raises(VmLocked, match="no key provider of that name"):
            await registry.keyring.kek("home", key_id, vm="vm1")
        changed = registry.providers.changed
        added = await registry.providers.import_(file, words, default=False, asked_by="bob")
        assert added.unlocks == ("vm1",), "vm2 is locked, and refers to another one"
        assert (added.provider.row.name, added.provider.state, added.provider.vms) == ("home", "ok", ("vm1", "vm3"))
        assert changed.is_set()
        again, _ = await registry.keyring.kek("home", key_id, vm="vm1")
        assert again.reveal() == kek
        assert await registry.providers.default() == "home"
        [event] = await registry.happened("key_provider.imported")
        assert "bob" in event.text
        assert "vm1" in event.text
        assert "vm2" not in event.text

    async def main() -> tuple[str, Secret, str, bytes]:
        async with a_registry(tmp_path / "here") as registry:
            told = await here(registry)
        async with a_registry(tmp_path / "elsewhere") as registry:
            await elsewhere(registry, *told)
        return told

    for name in ("here", "elsewhere"):
        (tmp_path / name).mkdir()
    _, words, _, kek = asyncio.run(main())
    secrets = [words.reveal(), kek, kek.hex().encode()]
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
            assert not any(each in path.read_bytes() for each in secrets), path
        elif "providers" in path.parts:
            assert stat.S_IMODE(path.stat().st_mode) == 0o700, path


def test_only_an_export_of_this_very_provider_counts_for_it(tmp_path: Path) -> None:
    async def story(registry: Registry) -> None:
        providers, words = registry.providers, secret("lend-weapon-buddy")
        files = []
        for _ in range(2):  # the second one of that name has another key
            await registry.add("home")
            native = await providers.open("home")
            assert isinstance(native, NativeProvider)
            files.append(cheap_export("home", await native.derivation_key(), words))
            files.append(cheap_export("other", await native.derivation_key(), words))
            with pytest.raises(AlreadyExists, match="home is here already") as already:
                await providers.import_(files[0], words, default=False, asked_by="ann")
            assert "nothing to import" in already.value.todo
            await providers.remove("home", force=False, asked_by="ann")
        await registry.add("home")
        native = await providers.open("home")
        assert isinstance(native, NativeProvider)
        good = cheap_export("home", await native.derivation_key(), words)
        for file, passphrase in [
            *((file, words) for file in files),
            (cheap_export("other", await native.derivation_key(), words), words),
            (good, secret("lend-weapon-body")),
            (good[:-60], words),
            ("", words),
        ]:
            with pytest.raises(ExportInvalid):
                await providers.confirm_export("home", file, passphrase, asked_by="ann")
            assert (await providers.show("home")).state == "not_exported"
        assert (await providers.confirm_export("home", good, words, asked_by="ann")).state == "ok"
        # What cannot be opened, or has a name that no provider can have, is not imported either.
        await providers.remove("home", force=False, asked_by="ann")
        kdk = Secret(bytes(32), length=32)
        for file in (good[:-60], cheap_export("..", kdk, words), cheap_export(".aside-1", kdk, words)):
            with pytest.raises((ExportInvalid, InvalidInput)):
                await providers.import_(file, words, default=True, asked_by="ann")
        assert registry.files() == set()
        assert await providers.list() == []

    with_registry(tmp_path, story)


def test_a_provider_is_there_again_after_a_restart(tmp_path: Path) -> None:
    async def main() -> None:
        async with a_registry(tmp_path) as registry:
            await registry.add_usable("home")
            vm = await registry.add_vm("vm1", "home")
            key_id, kek = await registry.keyring.new_kek("home", vm, "vm1")
        async with a_registry(tmp_path) as registry:
            assert (await registry.keyring.kek("home", key_id, vm="vm1"))[0].reveal() == kek.reveal()
            assert [(each.row.name, each.state) for each in await registry.providers.list()] == [("home", "ok")]

    asyncio.run(main())


def test_a_trial_says_how_each_step_went_and_leaves_no_key(tmp_path: Path) -> None:
    async def story(registry: Registry) -> None:
        await registry.add("home")
        ok, steps = await registry.providers.test("home", asked_by="ann")
        assert ok
        assert [(step.name, step.ok, step.message) for step in steps] == [(f"home: {what}", True, "") for what in STEPS]
        assert all(step.ms > 0 for step in steps)
        book = sqlite3.connect(registry.directory / "home" / "keys.db")
        [(label, state)] = book.execute("SELECT label, state FROM keys").fetchall()
        book.close()
        assert label.startswith("sealift-test-")
        assert state == "destroyed"
        (registry.directory / "home" / "keys.db").unlink()
        ok, steps = await registry.providers.test("home", asked_by="ann")
        assert not ok
        assert [step.name for step in steps] == ["home: create"]
        assert "home" in steps[0].message
        passed, failed = await registry.happened("key_provider.tested")
        assert "passed" in passed.text
        assert steps[0].message in failed.text

    with_registry(tmp_path, story)


class Cut(NativeProvider):
    """Makes a key, and its answer is lost; from then on it does not do what is in ``fails``."""

    fails: tuple[str, ...] = ()
    made = ""

    async def create(self, label: str) -> str:
        self.made = await super().create(label)
        return self._lost("create", self.made)

    async def locate(self, label: str) -> list[str]:
        return self._lost("locate", await super().locate(label))

    async def destroy(self, key_id: str) -> None:
        self._lost("destroy", "")
        await super().destroy(key_id)

    def _lost(self, what: str, answer: Any) -> Any:
        if what in self.fails:
            raise ProviderUnreachable(f"key provider {self.name} does not answer")
        return answer


@pytest.mark.parametrize(
    ("fails", "left"),
    [
        (("create",), ""),
        (("create", "locate"), "a key of a test, label sealift-test-"),
        (("create", "destroy"), "a key of a test, label sealift-test-"),
        (("destroy",), "key {key_id} of a test"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_a_trial_that_is_cut_off_leaves_no_key_without_a_word(
    fails: tuple[str, ...], left: str, tmp_path: Path
) -> None:
    async def story(registry: Registry) -> None:
        await registry.add_usable("home")
        await registry.providers.close()
        cut = registry.providers._opened["home"] = Cut("home", registry.directory / "home")
        cut.fails = fails
        ok, steps = await registry.providers.test("home", asked_by="ann")
        assert not ok
        assert (await cut.state(cut.made) is KeyState.DESTROYED) is not bool(left)
        told = await registry.happened("key.left_over")
        if left:
            [event] = told
            assert left.format(key_id=cut.made) in event.text
            assert left.format(key_id=cut.made) in steps[-1].message
        else:
            assert told == []

    with_registry(tmp_path, story)


@pytest.mark.parametrize("where", ["create", "get"])
def test_a_trial_that_nobody_waits_for_any_more_leaves_no_key(where: str, tmp_path: Path) -> None:
    async def story(registry: Registry) -> None:
        await registry.add_usable("home")
        await registry.providers.close()
        cut = registry.providers._opened["home"] = Cut("home", registry.directory / "home")
        reached, real = asyncio.Event(), getattr(cut, where)

        async def wait(what: str) -> None:
            await real(what)
            reached.set()
            await asyncio.Event().wait()

        setattr(cut, where, wait)
        trying = asyncio.create_task(registry.providers.test("home", asked_by="ann"))
        await reached.wait()
        trying.cancel()
        with pytest.raises(asyncio.CancelledError):
            await trying
        assert await cut.state(cut.made) is KeyState.DESTROYED

    with_registry(tmp_path, story)


def test_a_key_server_that_dies_when_it_has_made_the_key_of_a_trial_keeps_none(tmp_path: Path) -> None:
    store, place = Store(), make_place(tmp_path)
    other = store.add("somebody's", 2)
    told: list[str] = []

    async def main() -> Sequence[TrialStep]:
        async def used(name: str) -> frozenset[str]:
            return frozenset()

        async def left(text: str) -> None:
            told.append(text)

        async with members(place, store.answers(after=failing_on(Operation.CREATE, Die()))) as (provider, _):
            return await try_out(provider, "kms1", used=used, left=left)

    assert [(step.name, step.ok) for step in asyncio.run(main())] == [("kms1: create", False)]
    assert store.states == {other: 2, "key-2": 5}
    assert told == []


# Away and back


def test_a_provider_that_goes_and_comes_back_is_told_of_once_each_and_wakes_who_waits(tmp_path: Path) -> None:
    async def story(registry: Registry) -> None:
        await registry.add_usable("home")
        vm = await registry.add_vm("vm1", "home")
        key_id, _ = await registry.keyring.new_kek("home", vm, "vm1")
        await registry.providers.close()  # which makes it read its key again
        (registry.directory / "home").rename(tmp_path / "unmounted")
        changed = registry.providers.changed
        for _ in range(2):
            with pytest.raises(VmLocked, match=f"VM vm1 .* key {key_id} of key provider home") as locked:
                await registry.keyring.kek("home", key_id, vm="vm1")
            assert "import it again" in locked.value.todo
            assert (await registry.providers.show("home")).state == "unreachable"
        assert changed.is_set()
        changed = registry.providers.changed
        (tmp_path / "unmounted").rename(registry.directory / "home")
        for _ in range(2):
            await registry.keyring.kek("home", key_id, vm="vm1")
        assert changed.is_set()
        assert registry.providers.changed is not changed
        assert (await registry.providers.show("home")).state == "ok"
        kinds = [event.type for event in await registry.happened()]
        assert kinds[-2:] == ["key_provider.unreachable", "key_provider.back"]
        assert len(kinds) == 4

    with_registry(tmp_path, story)


class Odd(NativeProvider):
    """Meets a defect when it is asked how it is, and finds nothing."""

    async def probe(self) -> ProviderHealth:
        raise RuntimeError("what nobody thought of")

    async def locate(self, label: str) -> list[str]:
        return []


async def add_odd(registry: Registry) -> None:
    await registry.add_usable("odd")
    await registry.providers.close()
    registry.providers._opened["odd"] = Odd("odd", registry.directory / "odd")


def test_a_defect_met_at_one_provider_hides_no_other(tmp_path: Path) -> None:
    async def story(registry: Registry) -> None:
        await add_odd(registry)
        await registry.add_usable("home")
        home, odd = await registry.providers.list()
        assert (home.row.name, home.state) == ("home", "ok")
        assert (odd.row.name, odd.state) == ("odd", "unreachable")
        assert "RuntimeError" in odd.message
        assert "nobody thought of" not in odd.message
        assert not (await registry.providers.probe("odd")).ok
        (registry.directory / "odd").rename(tmp_path / "away")
        (registry.directory / "odd").write_text("no directory")
        async with registry.events.transaction() as session:
            (await session.get_one(KeyProviderRow, "odd")).kind = "kmip"
        home, odd = await registry.providers.list()
        assert (home.state, odd.state) == ("ok", "unreachable")
        assert odd.message

    with_registry(tmp_path, story)


def test_a_key_that_is_not_found_by_its_label_fails_the_test_and_is_destroyed(tmp_path: Path) -> None:
    async def story(registry: Registry) -> None:
        await add_odd(registry)
        ok, steps = await registry.providers.test("odd", asked_by="ann")
        assert not ok
        assert [(step.name, step.ok) for step in steps] == [(f"odd: {what}", what != "locate") for what in STEPS]
        assert "does not find" in steps[3].message

    with_registry(tmp_path, story)


def test_a_server_that_says_who_it_is_and_gives_no_key_does_not_come_and_go(tmp_path: Path) -> None:
    store, place = Store(), make_place(tmp_path)
    key_id = store.add("vm one", 2)
    broken = True

    def answer(operation: Operation, payload: Item) -> bytes:
        return b"HTTP/1.1 500 no" if broken else store.answers()(operation, payload)

    async def story(registry: Registry) -> None:
        nonlocal broken
        async with members(place, answer) as (provider, _):
            await registry.providers.add(GOOD, asked_by="ann")  # where nobody answers yet
            registry.providers._opened["kms"] = provider
            for _ in range(3):
                with pytest.raises(VmLocked):
                    await registry.keyring.kek("kms", key_id, vm="vm1")
                assert (await registry.providers.probe("kms")).ok
            broken = False
            await registry.keyring.kek("kms", key_id, vm="vm1")
        kinds = [event.type for event in await registry.happened() if event.type.endswith(("unreachable", "back"))]
        assert kinds == ["key_provider.unreachable", "key_provider.back"]

    (tmp_path / "registry").mkdir()
    with_registry(tmp_path / "registry", story)


# Removal


def test_one_in_use_is_removed_by_force_only_and_says_who_locks(tmp_path: Path) -> None:
    async def story(registry: Registry) -> None:
        await registry.add("home")
        for name in ("vm2", "vm1"):
            await registry.add_vm(name, "home")
        await registry.add_vm("vm3", "other")
        with pytest.raises(Conflict, match="vm1, vm2") as refused:
            await registry.providers.remove("home", force=False, asked_by="ann")
        assert "was not removed" in refused.value.what
        assert "rekey --from home --to NAME" in refused.value.todo
        assert "would be gone" in refused.value.todo
        assert registry.files() == {"home"}
        await registry.providers.open("home")
        changed = registry.providers.changed
        removed = await registry.providers.remove("home", force=True, asked_by="ann")
        assert (removed.name, removed.locks, removed.was_default) == ("home", ("vm1", "vm2"), True)
        assert "never exported" in removed.lost
        assert changed.is_set()
        assert registry.files() == set()
        for gone in (registry.providers.open("home"), registry.providers.show("home")):
            with pytest.raises(NotFound, match="home"):
                await gone
        with pytest.raises(VmLocked, match="no key provider of that name") as locked:
            await registry.keyring.kek("home", "k", vm="vm1")
        assert "add or import key provider home" in locked.value.todo
        [event] = await registry.happened("key_provider.removed")
        assert "these VMs lock when the agent of their host is restarted" in event.text
        assert "vm1, vm2" in event.text
        assert "there is no default key provider now" in event.text
        await registry.lock("vm2")
        added = await registry.providers.add(ProviderAsk("home", "native"), asked_by="ann")
        assert added.unlocks == ("vm2",)
        assert added.provider.vms == ("vm1", "vm2")
        assert "vm1, vm2" in (await registry.happened("key_provider.added"))[-1].text

    with_registry(tmp_path, story)


def test_removing_says_what_is_gone_for_good(tmp_path: Path) -> None:
    async def story(registry: Registry) -> None:
        await registry.add("home")
        removed = await registry.providers.remove("home", force=False, asked_by="ann")
        assert "never exported" in removed.lost
        await registry.providers.add(GOOD, asked_by="ann")
        removed = await registry.providers.remove("kms", force=False, asked_by="ann")
        assert "stay at its servers" in removed.lost
        assert registry.files() == set()
        with pytest.raises(NotFound):
            await registry.providers.remove("home", force=True, asked_by="ann")

    with_registry(tmp_path, story)


def test_what_a_crash_left_is_swept_up_unless_it_may_hold_keys(tmp_path: Path) -> None:
    async def story(registry: Registry) -> None:
        for name in (".aside-0011", "lost"):
            (registry.directory / name).mkdir(parents=True)
            (registry.directory / name / "kdk").write_bytes(b"k")
        await registry.add("home")
        assert registry.files() == {"home", "lost"}
        with pytest.raises(Conflict, match="lost is there already"):
            await registry.add("lost")
        assert (registry.directory / "lost" / "kdk").read_bytes() == b"k"
        assert registry.files() == {"home", "lost"}
        assert [each.row.name for each in await registry.providers.list()] == ["home"]

    with_registry(tmp_path, story)


# KMIP; how servers are asked is tested in tests/keys


def test_a_kmip_provider_waits_for_the_certificate_that_it_asked_for(tmp_path: Path) -> None:
    async def story(registry: Registry) -> None:
        providers = registry.providers
        members = (f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}")
        ask = ProviderAsk("kms", "kmip", members, CA.pem, client="csr")
        added = await providers.add(ask, asked_by="ann")
        seen = added.provider
        assert (seen.state, seen.client_certificate) == ("no_certificate", "")
        assert [(each.address, each.ok) for each in seen.members] == [(each, False) for each in members]
        subject = x509.load_pem_x509_csr(seen.certificate_request.encode()).subject
        assert subject.rfc4514_string() == "CN=sealift kms"
        for early in (
            providers.open("kms"),
            providers.test("kms", asked_by="ann"),
            providers.require_usable("kms"),
        ):
            with pytest.raises(Conflict, match="no client certificate yet") as refused:
                await early
            assert "key-provider certificate kms FILE" in refused.value.todo
        with pytest.raises(VmLocked, match="no client certificate yet"):
            await registry.keyring.kek("kms", "k", vm="vm1")
        for bad in (CA.pem, "no certificate", ""):
            with pytest.raises(InvalidInput):
                await providers.accept_certificate("kms", bad, asked_by="ann")
        assert (await providers.show("kms")).state == "no_certificate"
        certificate, changed = CA.client(seen.certificate_request), providers.changed
        seen = await providers.accept_certificate("kms", certificate, asked_by="ann")
        assert changed.is_set()
        assert (seen.client_certificate, seen.certificate_request) == (certificate, "")
        # Nobody listens there: each member says so for itself.
        assert seen.state == "unreachable"
        assert [(member.address, member.ok) for member in seen.members] == [(member, False) for member in members]
        ok, steps = await providers.test("kms", asked_by="ann")
        assert not ok
        assert [step.name for step in steps] == [f"{member}: create" for member in members]
        await providers.require_usable("kms")
        kinds = [event.type for event in await registry.happened()]
        assert kinds == [f"key_provider.{what}" for what in ("added", "default", "certified", "unreachable", "tested")]

    with_registry(tmp_path, story)


def test_only_what_a_kind_has_can_be_done_with_it(tmp_path: Path) -> None:
    async def story(registry: Registry) -> None:
        await registry.providers.add(GOOD, asked_by="ann")
        await registry.add("home")
        with pytest.raises(Conflict, match="kms is not native"):
            await registry.providers.export("kms", None, asked_by="ann")
        with pytest.raises(Conflict, match="kms is not native"):
            await registry.providers.confirm_export("kms", "", secret("x"), asked_by="ann")
        with pytest.raises(Conflict, match="home is native"):
            await registry.providers.accept_certificate("home", CA.pem, asked_by="ann")
        with pytest.raises(AlreadyExists, match="kms"):
            await registry.providers.add(ProviderAsk("kms", "native"), asked_by="ann")

    with_registry(tmp_path, story)


def test_two_real_key_servers_of_which_one_dies_and_then_the_other(tmp_path: Path) -> None:
    async def story(registry: Registry, servers: KmipServers) -> None:
        providers, keyring = registry.providers, registry.keyring
        ask = ProviderAsk("kms", "kmip", tuple(servers.members), servers.authority.pem, client="csr")
        request = (await providers.add(ask, asked_by="ann")).provider.certificate_request
        seen = await providers.accept_certificate("kms", servers.authority.client(request), asked_by="ann")
        assert seen.state == "ok"
        assert [(each.address, each.ok) for each in seen.members] == [(each, True) for each in servers.members]
        ok, steps = await providers.test("kms", asked_by="ann")
        assert ok, steps
        steps_of_all = [f"{each}: {what}" for each in servers.members for what in STEPS]
        assert [step.name for step in steps] == steps_of_all
        vm = await registry.add_vm("vm1", "kms")
        key_id, kek = await keyring.new_kek("kms", vm, "vm1")
        first, second = servers.members
        await asyncio.to_thread(servers.kill, 0)
        seen = await providers.show("kms")
        assert (seen.state, [each.ok for each in seen.members]) == ("degraded", [False, True])
        assert first in seen.message
        ok, steps = await providers.test("kms", asked_by="ann")
        assert not ok
        assert [(step.name, step.ok) for step in steps] == [
            (f"{first}: create", False),
            *((f"{second}: {what}", True) for what in STEPS),
        ]
        assert (await keyring.kek("kms", key_id, vm="vm1"))[0].reveal() == kek.reveal()
        changed = providers.changed
        await asyncio.to_thread(servers.kill, 1)
        with pytest.raises(VmLocked, match=f"VM vm1 .*{key_id}.* key provider kms") as locked:
            await keyring.kek("kms", key_id, vm="vm1")
        assert first in locked.value.what
        assert second in locked.value.what
        assert changed.is_set()
        assert (await providers.show("kms")).state == "unreachable"
        changed = providers.changed
        await asyncio.to_thread(servers.start)
        assert (await keyring.kek("kms", key_id, vm="vm1"))[0].reveal() == kek.reveal()
        assert changed.is_set()
        found = await providers.open("kms")
        await found.destroy(key_id)
        with pytest.raises(VmLocked, match=key_id) as locked:
            await keyring.kek("kms", key_id, vm="vm1")
        assert "destroyed there" in locked.value.todo
        kinds = [event.type for event in await registry.happened() if event.type.endswith(("unreachable", "back"))]
        assert kinds == ["key_provider.unreachable", "key_provider.back"]
        assert await registry.happened("key.left_over") == []

    servers = KmipServers(tmp_path / "kmip")
    try:
        servers.start()
        with_registry(tmp_path, lambda registry: story(registry, servers))
    finally:
        servers.close()
