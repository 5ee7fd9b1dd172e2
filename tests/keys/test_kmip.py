"""The KMIP provider on PyKMIP's real server: two processes that are members of one cluster."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from contract.check_key_provider import check_key_provider
from sealift.demo.kmip import KmipServers
from sealift.errors import (
    KeyMissing,
    KeyNotActive,
    ProviderRefused,
    ProviderUnreachable,
)
from sealift.keys import kmip_messages, kmip_trust
from sealift.keys.kmip_messages import Call, Version
from sealift.keys.provider import KeyState, MemberHealth, new_key
from support.kmip_place import SILENT_S, patient
from support.kmip_server import client


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KmipServers]:
    found = KmipServers(tmp_path_factory.mktemp("kmip"), members=2)
    try:
        found.start()
        yield found
    finally:
        found.close()


@pytest.fixture(scope="module")
def known(servers: KmipServers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a provider whose client the servers know."""
    return client(servers.authority, tmp_path_factory.mktemp("client"))


def test_it_keeps_every_promise_of_a_key_provider(servers: KmipServers, known: Path) -> None:
    asyncio.run(check_key_provider(lambda: patient(known, *servers.members)))


@pytest.mark.parametrize("version", [(1, 3), (1, 2)])
def test_it_keeps_them_in_older_versions_too(
    servers: KmipServers, known: Path, monkeypatch: pytest.MonkeyPatch, version: tuple[int, int]
) -> None:
    """The client offers no other."""
    only = Version(*version)
    request, spoken = Call.request, Counter[Version]()

    def spy(call: Call[object], version: Version) -> bytes:
        spoken[version] += 1
        return request(call, version)

    monkeypatch.setattr(kmip_messages, "VERSIONS", (only,))
    monkeypatch.setattr(Call, "request", spy)
    asyncio.run(check_key_provider(lambda: patient(known, *servers.members)))
    assert spoken[only] > 50
    assert set(spoken) <= {only, Version(1, 2)}, "in 1.2 it is asked what to speak"


def test_members_have_each_others_keys(servers: KmipServers, known: Path) -> None:
    async def main() -> None:
        first, second = (patient(known, member) for member in servers.members)
        key_id = await new_key(first, "members have each other's keys")
        assert (await first.get(key_id)).reveal() == (await second.get(key_id)).reveal()
        await second.destroy(key_id)
        with pytest.raises(KeyMissing, match=f"kms cannot get key {key_id}: {servers.members[0]}: item not found"):
            await first.get(key_id)
        await first.close()
        await second.close()

    asyncio.run(main())


def test_a_key_that_somebody_revoked_is_given_out_and_said_not_to_be_active(servers: KmipServers, known: Path) -> None:
    async def main() -> None:
        provider = patient(known, servers.members[0])
        key_id = await new_key(provider, "revoked")
        before = (await provider.get(key_id)).reveal()
        await provider._on_key("revoke", key_id, lambda link: link.ask(kmip_messages.revoke(key_id)))
        assert await provider.state(key_id) is KeyState.DEACTIVATED
        assert (await provider.get(key_id)).reveal() == before
        with pytest.raises(KeyNotActive, match="deactivated"):
            await provider.activate(key_id)
        await provider.destroy(key_id)
        await provider.close()

    asyncio.run(main())


def test_members_may_go_and_come_back(servers: KmipServers, known: Path) -> None:
    async def main() -> None:
        provider = patient(known, *servers.members)
        key_id = await new_key(provider, "members may go and come back")
        key = (await provider.get(key_id)).reveal()
        one, other = servers.members

        servers.kill(0)  # while a connection to it is kept
        assert (await provider.get(key_id)).reveal() == key
        second = await new_key(provider, "made while one member was away")
        health = await provider.probe()
        assert health.ok
        assert health.members == (
            MemberHealth(one, False, "no connection: Connection refused"),
            MemberHealth(other, True),
        )

        servers.kill(1)
        with pytest.raises(ProviderUnreachable) as gone:
            await provider.get(key_id)
        for said in ("kms", key_id, f"{one}: no connection", f"{other}: no connection"):
            assert said in gone.value.what
        assert not (await provider.probe()).ok

        servers.start()  # not waiting until their pauses are over
        assert (await provider.get(key_id)).reveal() == key
        assert await provider.state(second) is KeyState.ACTIVE
        assert [member.ok for member in (await provider.probe()).members] == [True, True]

        servers.kill(0)
        servers.start()
        assert (await provider.get(key_id)).reveal() == key, "a connection that was closed meanwhile is made anew"
        await provider.close()

    asyncio.run(main())


def test_a_member_that_hangs_is_given_up(servers: KmipServers, known: Path) -> None:
    async def main() -> None:
        provider = patient(known, *servers.members)
        key_id = await new_key(provider, "a member that hangs is given up")
        servers.pause(0)
        paused = provider._members[0]
        (kept,) = paused._idle
        paused._connect_s = paused._answer_s = kept._answer_s = SILENT_S
        try:
            assert len((await provider.get(key_id)).reveal()) == 32
            (hanging, well) = (await provider.probe()).members
            assert (hanging.ok, hanging.message) == (False, f"no connection within {SILENT_S} s")
            assert well.ok
        finally:
            servers.resume(0)
        await provider.close()

    asyncio.run(main())


def test_another_client_gets_nothing_and_is_told_why(servers: KmipServers, known: Path, tmp_path: Path) -> None:
    other, unknown = tmp_path / "other", tmp_path / "unknown"
    for directory in (other, unknown):
        kmip_trust.pin(directory, servers.authority.pem)
    kmip_trust.request(other, "somebody else")
    kmip_trust.accept_certificate(other, servers.authority.client(kmip_trust.certificate_request(other)))
    kmip_trust.generate(unknown, "sealift-controller")

    async def main() -> None:
        provider = patient(known, *servers.members)
        key_id = await new_key(provider, "of the first client")
        stranger = patient(other, *servers.members)
        with pytest.raises(ProviderRefused, match=r"refused to get key \d+: .*: permission denied") as refused:
            await stranger.get(key_id)
        await stranger.close()
        assert servers.members[1] not in refused.value.what, "a server that says no is not asked around"
        with pytest.raises(ProviderRefused, match=r"does not take our certificate: .*unknown ca"):
            await patient(unknown, *servers.members).get(key_id)
        await provider.close()

    asyncio.run(main())


def test_the_servers_own_certificate_can_be_pinned(servers: KmipServers, known: Path, tmp_path: Path) -> None:
    own = (servers.directory / "server.pem").read_text()
    own = own[own.index("-----BEGIN CERTIFICATE") :]
    imitation = servers.authority.server(tmp_path / "imitation.pem", "127.0.0.1")

    async def asked(pinned: str) -> str:
        kmip_trust.pin(known, pinned)
        provider = patient(known, *servers.members)
        try:
            return (await provider.probe()).message
        finally:
            await provider.close()

    try:
        assert asyncio.run(asked(own)) == ""
        assert asyncio.run(asked(imitation + own)) == ""
        assert "it cannot show that it is that server" in asyncio.run(asked(imitation))
    finally:
        kmip_trust.pin(known, servers.authority.pem)


def test_a_provider_without_a_certificate_says_so(servers: KmipServers, tmp_path: Path) -> None:
    kmip_trust.pin(tmp_path, servers.authority.pem)
    kmip_trust.request(tmp_path, "sealift-controller")

    async def main() -> None:
        provider = patient(tmp_path, *servers.members)
        with pytest.raises(ProviderUnreachable, match="there is no client certificate yet"):
            await provider.create("never made")
        assert "there is no client certificate yet" in (await provider.probe()).message

    asyncio.run(main())


def test_a_certificate_made_here_is_good_once_a_server_trusts_it(tmp_path: Path) -> None:
    """What an administrator installs at a server is the certificate itself: it has signed itself."""
    servers, directory = KmipServers(tmp_path / "kmip", members=1), tmp_path / "client"
    kmip_trust.pin(directory, servers.authority.pem)
    with (servers.directory / "authority.pem").open("a") as trusted:
        trusted.write(kmip_trust.generate(directory, "sealift-controller"))

    async def main() -> None:
        provider = patient(directory, *servers.members)
        key_id = await new_key(provider, "made by who signed himself")
        assert len((await provider.get(key_id)).reveal()) == 32
        await provider.close()

    servers.start()
    try:
        asyncio.run(main())
    finally:
        servers.close()
