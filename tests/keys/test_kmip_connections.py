"""The connections of the KMIP provider, its pauses, and the addresses that it takes."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import ClassVar

import pytest

from sealift.errors import InvalidInput, ProviderImpostor, ProviderUnreachable
from sealift.keys import kmip_messages, kmip_trust
from sealift.keys.kmip import KmipProvider
from sealift.keys.kmip_link import connect, parse_address
from sealift.keys.kmip_member import LONGEST_PAUSE_S, Pace
from sealift.keys.kmip_messages import Call
from sealift.keys.kmip_numbers import Operation
from sealift.keys.ttlv import Item
from sealift.secret import Secret
from support.kmip_place import (
    PATIENT_S,
    SILENT_S,
    Place,
    SilentMember,
    always,
    failing_on,
    make_place,
    members,
    patient,
    provider_of,
    raising,
)
from support.kmip_server import Die, Hang, Store, key_item, message, saying, server_context, versions


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("place"))


# connections


def test_connections_are_kept_and_few(place: Place) -> None:
    store = Store()
    key_id = store.add("vm", 2)

    async def main() -> None:
        async with members(place, store.answers()) as (provider, (server,)):
            for _ in range(20):
                await provider.get(key_id)
            assert server.connections == 1
            await asyncio.gather(*(provider.get(key_id) for _ in range(40)))
            assert server.connections == 8

    asyncio.run(main())


def test_who_stops_waiting_leaves_no_answer_behind(place: Place) -> None:
    store = Store()
    one, other = store.add("one", 2), store.add("other", 2)
    asked = asyncio.Event()

    def hook(operation: Operation) -> None:
        if not asked.is_set():
            asked.set()
            raise Hang()

    async def main() -> None:
        right = server_context(place.authority, place.certificate)
        async with saying(right, store.answers(before=hook)) as server:
            provider = provider_of(place, server)
            waiting = asyncio.create_task(provider.get(one))
            await asked.wait()
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert (await provider.get(other)).reveal() == store.materials[other]
            assert server.connections == 2
            await provider.close()

    asyncio.run(main())


def test_a_closed_provider_keeps_no_connection(place: Place) -> None:
    store = Store()
    key_id = store.add("vm", 2)

    async def main() -> None:
        async with members(place, store.answers()) as (provider, (server,)):
            await provider.get(key_id)
            await provider.close()
            for count in (2, 3):
                await provider.get(key_id)
                assert server.connections == count

    asyncio.run(main())


def test_a_kept_connection_that_falls_silent_is_not_tried_twice(place: Place) -> None:
    async def main() -> None:
        silent = Store().answers(before=failing_on(Operation.GET, Hang()))
        async with members(place, silent) as (provider, (server,)):
            assert await provider.locate("vm") == []
            (member,) = provider._members
            (kept,) = member._idle
            kept._answer_s = SILENT_S
            with pytest.raises(ProviderUnreachable, match="does not answer within"):
                await provider.get("key-1")
            assert server.connections == 1

    asyncio.run(main())


def test_the_name_that_is_checked_is_the_one_that_was_configured(place: Place, tmp_path: Path) -> None:
    store = Store()
    key_id = store.add("vm", 2)
    named = tmp_path / "named.pem"
    place.authority.server(named, "localhost")

    async def main() -> None:
        for certificate, host, right in (
            (place.certificate, "127.0.0.1", True),
            (place.certificate, "localhost", False),
            (named, "localhost", True),
            (named, "127.0.0.1", False),
        ):
            async with saying(server_context(place.authority, certificate), store.answers()) as server:
                provider = patient(place.client, f"{host}:{server.port}")
                if right:
                    await provider.get(key_id)
                else:
                    with pytest.raises(ProviderImpostor, match="is not valid for"):
                        await provider.get(key_id)
                    assert server.plaintext == 0
                await provider.close()

    asyncio.run(main())


class _Kept(Call[Secret]):
    """Looks at what the link does to an answer after it was read."""

    raws: ClassVar[list[bytes | bytearray]] = []

    def answer(self, raw: bytes | bytearray) -> Secret:
        self.raws.append(raw)
        return super().answer(raw)


def test_received_keys_are_overwritten(place: Place) -> None:
    """Whole ones after they were read, and the beginning of one whose end never came."""
    store = Store()
    key_id = store.add("vm", 2)
    whole = message(Operation.GET, *key_item(key_id, store.materials[key_id]))
    begun = whole[: whole.index(store.materials[key_id]) + 16]

    def answer(operation: Operation, payload: Item) -> bytes:
        if operation is Operation.GET:
            return whole
        raise Die(begun)

    async def main() -> None:
        async with saying(server_context(place.authority, place.certificate), answer) as server:
            link = await connect(
                parse_address(server.member), kmip_trust.load(place.client), connect_s=PATIENT_S, answer_s=PATIENT_S
            )
            call = kmip_messages.get(key_id)
            secret = await link.ask(_Kept(call.operation, call.payload, call.read))
            assert secret.reveal() == store.materials[key_id]
            (raw,) = _Kept.raws
            assert len(raw) == len(whole)
            assert not any(raw)
            stream = link._stream
            with pytest.raises(ProviderUnreachable):
                await link.ask(kmip_messages.get_state(key_id))
            assert len(stream._buffer) == len(whole), "the length of the answer that had begun"
            assert not any(stream._buffer)
            await link.close()

    asyncio.run(main())


# pauses and addresses


def rest(provider: KmipProvider) -> None:
    """All members have just failed, the first one first, and are left alone for a while."""
    now = asyncio.get_running_loop().time()
    for number, member in enumerate(provider._members):
        member.pace = Pace(30.0, now + 30 + number / 100)


def test_while_all_members_are_away_a_call_waits_for_one_of_them_and_names_each(place: Place) -> None:
    store = Store()
    key_id = store.add("vm", 2)
    hangs = True

    def hook(operation: Operation) -> None:
        if hangs:
            raise Hang()

    async def main() -> None:
        nonlocal hangs
        async with members(place, *[store.answers(before=hook)] * 3, silent=range(3)) as (provider, servers):
            asked: list[list[int]] = []
            for number in range(4):
                with pytest.raises(ProviderUnreachable) as gone:
                    await provider.get(key_id)
                for server in servers:
                    assert re.search(
                        f"{server.member}: (not asked again yet; )?it does not answer within", gone.value.what
                    )
                asked.append([server.connections for server in servers])
                if number == 0:
                    rest(provider)
            assert asked == [[1, 1, 1], [2, 1, 1], [2, 2, 1], [2, 2, 2]], "one at a time, and each in its turn"
            hangs = False
            for member in provider._members:
                assert isinstance(member, SilentMember)
                member.waits_s = PATIENT_S
            assert (await provider.get(key_id)).reveal() == store.materials[key_id], "no pause is waited for"

    asyncio.run(main())


def test_a_member_that_answers_a_probe_is_asked_at_once(place: Place) -> None:
    store = Store()
    key_id = store.add("vm", 2)

    async def main() -> None:
        right = store.answers()

        def well(operation: Operation, payload: Item) -> bytes:
            return versions() if operation is Operation.DISCOVER_VERSIONS else right(operation, payload)

        async with members(place, raising(Die()), well, greets=False) as (provider, servers):
            rest(provider)
            with pytest.raises(ProviderUnreachable, match=f"{servers[1].member}: not asked again yet"):
                await provider.get(key_id)
            assert [member.ok for member in (await provider.probe()).members] == [False, True]
            assert (await provider.get(key_id)).reveal() == store.materials[key_id]

    asyncio.run(main())


def test_a_host_name_that_cannot_be_looked_up_is_a_member_that_is_away(place: Place) -> None:
    store = Store()
    key_id = store.add("vm", 2)

    async def main() -> None:
        async with saying(server_context(place.authority, place.certificate), store.answers()) as server:
            long = "k" * 64 + ".example:5696"
            provider = patient(place.client, long, server.member)
            assert (await provider.get(key_id)).reveal() == store.materials[key_id]
            odd, well = (await provider.probe()).members
            assert (odd.ok, odd.message) == (False, "no connection: its host name is not valid")
            assert well.ok
            await provider.close()

    asyncio.run(main())


def test_pauses_grow_from_a_second_to_thirty_and_end_with_success() -> None:
    pace, now, pauses = Pace(), 100.0, []
    assert not pace.rests(now)
    for _ in range(7):
        pace = pace.failed(now)
        assert pace.rests(now)
        assert pace.rests(pace.until - 0.01)
        assert not pace.rests(pace.until)
        pauses.append(pace.pause_s)
        now = pace.until
    assert pauses == [1, 2, 4, 8, 16, LONGEST_PAUSE_S, LONGEST_PAUSE_S]


def test_failures_at_the_same_time_count_once() -> None:
    once = Pace().failed(100.0)
    again = once.failed(100.5)
    assert again.pause_s == once.pause_s
    assert again.until == 101.5


@pytest.mark.parametrize(
    ("written", "host", "port"),
    [
        ("kms.example:5696", "kms.example", 5696),
        ("192.0.2.1:1", "192.0.2.1", 1),
        ("[2001:db8::1]:5696", "2001:db8::1", 5696),
    ],
)
def test_addresses(written: str, host: str, port: int) -> None:
    address = parse_address(written)
    assert (address.host, address.port, str(address)) == (host, port, written)


@pytest.mark.parametrize(
    "written",
    [
        "",
        "kms",
        ":5696",
        "kms:",
        "kms:0",
        "kms:65536",
        "kms:x",
        "kms :1",
        "2001:db8::1:5696",
        "[]:1",
        "kms:\uff11",
        "k\nms:1",
    ],
)
def test_what_is_no_address_is_refused(written: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput):
        KmipProvider("kms", [written], tmp_path)


@pytest.mark.parametrize("members", [[], ["kms:1", "kms:1"], [f"kms:{port}" for port in range(1, 18)]])
def test_a_provider_has_some_members_each_once(members: list[str], tmp_path: Path) -> None:
    with pytest.raises(InvalidInput):
        KmipProvider("kms", members, tmp_path)


def test_what_is_no_key_id_or_label_is_asked_of_nobody(place: Place) -> None:
    async def main() -> None:
        async with members(place, always(b"")) as (provider, (server,)):
            by_id: tuple[Callable[[str], Awaitable[object]], ...] = (
                provider.get,
                provider.state,
                provider.activate,
                provider.destroy,
            )
            for call in by_id:
                with pytest.raises(InvalidInput):
                    await call("no key id")
            for label in ("", "x" * 256):
                with pytest.raises(InvalidInput):
                    await provider.create(label)
                with pytest.raises(InvalidInput):
                    await provider.locate(label)
            assert server.connections == 0

    asyncio.run(main())
