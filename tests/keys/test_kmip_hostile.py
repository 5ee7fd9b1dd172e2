"""The KMIP provider against servers that are not what they should be, or whose answers are none."""

from __future__ import annotations

import asyncio
import ssl
import traceback
from pathlib import Path

import pytest

from sealift.demo.kmip import ServerAuthority
from sealift.errors import (
    KeyProviderError,
    ProviderAnswerInvalid,
    ProviderImpostor,
    ProviderRefused,
    ProviderUnreachable,
)
from sealift.keys import kmip_member, kmip_trust
from sealift.keys.kmip_link import connect, parse_address
from sealift.keys.kmip_messages import MAX_ANSWER_BYTES
from sealift.keys.kmip_numbers import Operation, Tag
from sealift.keys.ttlv import Item, ItemType, encode, structure, text
from support.kmip_place import PATIENT_S, Place, always, make_place, members, patient, provider_of, raising
from support.kmip_server import (
    Answer,
    Die,
    Hang,
    Saying,
    Store,
    client,
    key_item,
    message,
    refusal,
    saying,
    server_context,
    version,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("place"))


MATERIAL = bytes(range(100, 132))


# impostors


@pytest.mark.parametrize("which", ["another name", "another authority", "pinned"])
def test_an_impostor_is_asked_nothing(place: Place, tmp_path: Path, which: str) -> None:
    """One with a certificate of the right authority for another name, one of another authority, an unknown one."""
    store = Store()
    key_id = store.add("vm", 2)
    certificate, directory = place.other_name, place.client
    if which == "another authority":
        certificate = tmp_path / "server.pem"
        ServerAuthority().server(certificate, "127.0.0.1")
    genuine = place.certificate
    if which == "pinned":
        certificate, directory = place.certificate, tmp_path / "pins"
        own = client(place.authority, directory) / "own.pem"
        kmip_trust.pin(directory, place.authority.server(own, "127.0.0.1"))
        genuine = own

    async def main() -> None:
        right = server_context(place.authority, genuine)
        wrong = server_context(place.authority, certificate)
        async with saying(wrong, store.answers()) as impostor, saying(right, store.answers()) as server:
            provider = patient(directory, impostor.member, server.member)
            assert (await provider.get(key_id)).reveal() == store.materials[key_id]
            (first, second) = (await provider.probe()).members
            assert not first.ok
            assert "it cannot show that it is that server" in first.message
            assert second.ok
            await provider.close()

            alone = patient(directory, impostor.member)
            with pytest.raises(ProviderImpostor, match=f"kms cannot get key {key_id}: {impostor.member}: it cannot"):
                await alone.get(key_id)
            assert impostor.plaintext == 0

    asyncio.run(main())


def test_the_very_certificate_that_was_pinned_is_needed(place: Place, tmp_path: Path) -> None:
    """A pinned certificate that may sign others would be taken for their authority's; it is not."""
    pinned = tmp_path / "pinned.pem"
    directory = client(place.authority, tmp_path / "client")
    kmip_trust.pin(directory, place.authority.server(pinned, "127.0.0.1"))
    trust = kmip_trust.load(directory)
    with_authority = (directory / "server-authority.pem").read_text() + place.authority.pem
    trust.context.load_verify_locations(cadata=with_authority)

    async def main() -> None:
        context = server_context(place.authority, place.certificate)
        async with saying(context, always(b"")) as impostor:
            with pytest.raises(ProviderImpostor, match="not the one that was pinned"):
                await connect(parse_address(impostor.member), trust, connect_s=PATIENT_S, answer_s=PATIENT_S)
            assert impostor.plaintext == 0

    asyncio.run(main())


def test_the_most_telling_failure_is_raised_and_each_member_named(place: Place) -> None:
    async def main() -> None:
        wrong = server_context(place.authority, place.other_name)
        right = server_context(place.authority, place.certificate)
        async with (
            saying(right, raising(Die())) as dying,
            saying(wrong, always(b"")) as impostor,
            saying(right, always(b"\0" * 8)) as babbling,
        ):
            gone = Saying(port=1)
            servers = (gone, dying, babbling, impostor)
            provider = provider_of(place, *servers)
            with pytest.raises(ProviderImpostor) as worst:
                await provider.create("vm")
            for server in servers:
                assert f"{server.member}: " in worst.value.what
            assert "see who answers at that address" in worst.value.todo
            await provider.close()

            provider = provider_of(place, gone, dying)
            with pytest.raises(ProviderUnreachable, match=r"Connection refused; .*closed the connection"):
                await provider.create("vm")
            await provider.close()

    asyncio.run(main())


# answers that are none

_GET = Operation.GET
_ANNOUNCES = bytes.fromhex("42007b01")
_NOT_ANSWERS: dict[str, tuple[Answer, str]] = {
    "garbage": (always(b"\xa7" * 64), "not TTLV"),
    "http": (always(b"HTTP/1.1 400 Bad Request\r\n\r\n"), "not TTLV|no response message"),
    "4 GiB": (always(_ANNOUNCES + b"\xff" * 4), "announces 4294967295 bytes"),
    "a little too long": (
        always(_ANNOUNCES + MAX_ANSWER_BYTES.to_bytes(4, "big")),
        f"announces {MAX_ANSWER_BYTES} bytes",
    ),
    "empty": (always(_ANNOUNCES + bytes(4)), "missing: response header"),
    "a request": (always(encode(structure(Tag.REQUEST_MESSAGE))), "no response message"),
    "another operation": (
        always(message(Operation.DESTROY, text(Tag.UNIQUE_IDENTIFIER, "key-1"))),
        "another operation",
    ),
    "another key": (always(message(_GET, *key_item("key-2", MATERIAL))), "another key"),
    "a wrapped key": (always(message(_GET, *key_item("key-1", MATERIAL, wrapped=True))), "wrapped"),
    "a short key": (always(message(_GET, *key_item("key-1", MATERIAL[:16], bits=128))), "256 bits"),
    "a key of another kind": (always(message(_GET, *key_item("key-1", MATERIAL, algorithm=2))), "256 bits"),
    "padding": (always(message(_GET, Item(Tag.KEY_MATERIAL, ItemType.BYTE_STRING, b"1"))[:-1] + b"1"), "padding"),
}


@pytest.mark.parametrize("what", _NOT_ANSWERS)
def test_what_is_no_answer_is_refused_and_the_next_member_asked(place: Place, what: str) -> None:
    answer, why = _NOT_ANSWERS[what]
    store = Store()
    assert store.add("vm", 2) == "key-1"

    async def main() -> None:
        async with members(place, answer) as (provider, _):
            with pytest.raises(ProviderAnswerInvalid, match=why) as refused:
                await provider.get("key-1")
            told = "".join(traceback.TracebackException.from_exception(refused.value, capture_locals=True).format())
            for secret in (MATERIAL, MATERIAL[:16]):
                assert repr(secret)[2:-1] not in told
        async with members(place, answer, store.answers()) as (provider, _):
            assert (await provider.get("key-1")).reveal() == store.materials["key-1"]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("greeting", "kind", "why"),
    [
        (message(Operation.DISCOVER_VERSIONS, version(2, 1), version(1, 1)), ProviderAnswerInvalid, "none of KMIP"),
        (refusal(Operation.DISCOVER_VERSIONS, 5, "what?"), ProviderRefused, "operation not supported: what"),
        (refusal(Operation.DISCOVER_VERSIONS, 1, "what?"), ProviderRefused, "item not found: what"),
        (message(Operation.GET, version(1, 4)), ProviderAnswerInvalid, "another operation"),
    ],
)
def test_a_server_that_does_not_speak_our_versions_is_passed_over(
    place: Place, greeting: bytes, kind: type[KeyProviderError], why: str
) -> None:
    store = Store()
    key_id = store.add("vm", 2)

    async def main() -> None:
        async with members(place, always(greeting), greets=False) as (provider, _):
            with pytest.raises(kind, match=why):
                await provider.get(key_id)
        right = server_context(place.authority, place.certificate)
        async with saying(right, always(greeting), greets=False) as odd, saying(right, store.answers()) as server:
            provider = provider_of(place, odd, server)
            assert (await provider.get(key_id)).reveal() == store.materials[key_id]
            await provider.close()

    asyncio.run(main())


def test_a_server_without_tls_is_asked_nothing(place: Place) -> None:
    got = bytearray()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.extend(await reader.read(4096))
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()
        await writer.wait_closed()

    async def main() -> None:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            plain = Saying(port=server.sockets[0].getsockname()[1])
            provider = provider_of(place, plain)
            with pytest.raises(ProviderAnswerInvalid, match=f"{plain.member}: no TLS connection came about"):
                await provider.get("key-1")
            await provider.close()

    asyncio.run(main())
    assert b"key-1" not in got


def test_a_server_whose_tls_is_older_than_1_2_is_asked_nothing(place: Place) -> None:
    old = server_context(place.authority, place.certificate)
    lax = kmip_trust.load(place.client).context
    for context in (old, lax):
        context.set_ciphers("ALL:@SECLEVEL=0")  # Debian's OpenSSL has no TLS 1.1 above that
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            context.minimum_version = ssl.TLSVersion.TLSv1_1
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.maximum_version = ssl.TLSVersion.TLSv1_1

    async def main() -> None:
        async with saying(old, always(b"")) as server:
            _, writer = await asyncio.open_connection("127.0.0.1", server.port, ssl=lax, server_hostname="127.0.0.1")
            assert writer.get_extra_info("ssl_object").version() == "TLSv1.1", "who wants to can"
            writer.close()
            await writer.wait_closed()
            provider = provider_of(place, server)
            with pytest.raises(ProviderUnreachable, match="it closed the connection in the TLS handshake"):
                await provider.get("key-1")
            assert server.plaintext == 0
            await provider.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("failure", "why"),
    [
        (Hang(), "does not answer within 0.3 s"),
        (Die(), "closed the connection"),
        (Die(message(_GET, *key_item("key-1", MATERIAL))[:100]), "closed the connection"),
        (Die(b"\x42\x00\x7b"), "closed the connection"),
    ],
)
def test_a_server_that_hangs_or_dies_in_its_answer_is_given_up(
    place: Place, failure: Exception, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kmip_member, "FIRST_PAUSE_S", 30.0)  # no pause ends between two calls
    store = Store()
    store.add("vm", 2)
    silent = [0] if isinstance(failure, Hang) else []

    async def main() -> None:
        async with members(place, raising(failure), silent=silent) as (provider, _):
            with pytest.raises(ProviderUnreachable, match=why):
                await provider.get("key-1")
        async with members(place, raising(failure), store.answers(), silent=silent) as (provider, (bad, _)):
            for _ in range(3):
                assert (await provider.get("key-1")).reveal() == store.materials["key-1"]
            assert bad.asked == [_GET], "it is left alone after it failed"

    asyncio.run(main())


def test_what_nobody_asked_for_never_becomes_an_answer(place: Place) -> None:
    """A server that answers twice: the second answer is for no request."""
    store = Store()
    one, other = store.add("one", 2), store.add("other", 2)
    right = store.answers()

    def twice(operation: Operation, payload: Item) -> bytes:
        return right(operation, payload) * 2

    async def main() -> None:
        async with members(place, twice) as (provider, (server,)):
            assert (await provider.get(one)).reveal() == store.materials[one]
            assert (await provider.get(other)).reveal() == store.materials[other]
            assert server.connections == 2

    asyncio.run(main())
