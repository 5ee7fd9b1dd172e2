"""Key servers for tests: PyKMIP's real one, and one that says and does whatever a test tells it.

The real ones are ``sealift.demo.kmip.KmipServers``, PyKMIP in processes of its own; ``client`` makes a provider's
directory that they know. The other, ``saying``, is TLS and the encoding of KMIP with a test's own answers behind it.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sealift.demo.kmip import ServerAuthority
from sealift.keys import kmip_trust
from sealift.keys.kmip_numbers import Operation, Tag
from sealift.keys.ttlv import Item, ItemType, decode, encode, enumeration, integer, structure, text

COMMON_NAME = "sealift-controller"


def client(authority: ServerAuthority, directory: Path) -> Path:
    """A provider's directory: a key made there, a certificate that ``authority`` signed, and ``authority`` pinned."""
    request = kmip_trust.request(directory, COMMON_NAME)
    kmip_trust.accept_certificate(directory, authority.client(request))
    kmip_trust.pin(directory, authority.pem)
    return directory


class Hang(Exception):
    """Raised by an answer: nothing is said, and the connection stays."""


class Die(Exception):
    """Raised by an answer: the connection ends here, after the bytes that are its argument."""


@dataclass
class Saying:
    """A server that answers as ``answer`` says: a message's bytes for an operation and its request's payload."""

    port: int = 0
    connections: int = 0
    asked: list[Operation] = field(default_factory=list)
    plaintext: int = 0
    """How many bytes of requests came, of all connections."""

    @property
    def member(self) -> str:
        return f"127.0.0.1:{self.port}"


Answer = Callable[[Operation, Item], bytes]


def message(operation: Operation, *payload: Item, status: int = 0) -> bytes:
    """The answer of a server that did as it was asked."""
    head = enumeration(Tag.OPERATION, operation), enumeration(Tag.RESULT_STATUS, status)
    return wrapped(structure(Tag.BATCH_ITEM, *head, structure(Tag.RESPONSE_PAYLOAD, *payload)))


def refusal(operation: Operation, reason: int, said: str) -> bytes:
    """The answer of one that did not."""
    head = enumeration(Tag.OPERATION, operation), enumeration(Tag.RESULT_STATUS, 1)
    return wrapped(
        structure(Tag.BATCH_ITEM, *head, enumeration(Tag.RESULT_REASON, reason), text(Tag.RESULT_MESSAGE, said))
    )


def wrapped(*items: Item, count: int = 1) -> bytes:
    """A whole response message around batch items."""
    return encode(
        structure(
            Tag.RESPONSE_MESSAGE,
            structure(Tag.RESPONSE_HEADER, version(1, 4), integer(Tag.BATCH_COUNT, count)),
            *items,
        )
    )


def version(major: int, minor: int) -> Item:
    """A protocol version."""
    return structure(
        Tag.PROTOCOL_VERSION,
        integer(Tag.PROTOCOL_VERSION_MAJOR, major),
        integer(Tag.PROTOCOL_VERSION_MINOR, minor),
    )


def key_item(
    key_id: str,
    material: bytes,
    *,
    bits: int = 256,
    algorithm: int = 3,
    format: int = 1,
    object_type: int = 2,
    wrapped: bool = False,
) -> tuple[Item, ...]:
    """What the payload of an answer to Get holds: a whole AES-256 key in raw format, unless told otherwise."""
    value = structure(Tag.KEY_VALUE, Item(Tag.KEY_MATERIAL, ItemType.BYTE_STRING, material))
    block = (
        enumeration(Tag.KEY_FORMAT_TYPE, format),
        value,
        enumeration(Tag.CRYPTOGRAPHIC_ALGORITHM, algorithm),
        integer(Tag.CRYPTOGRAPHIC_LENGTH, bits),
        *([structure(Tag.KEY_WRAPPING_DATA)] if wrapped else []),
    )
    key = structure(Tag.SYMMETRIC_KEY, structure(Tag.KEY_BLOCK, *block))
    return enumeration(Tag.OBJECT_TYPE, object_type), text(Tag.UNIQUE_IDENTIFIER, key_id), key


def name_value(name: str, kind: int = 1) -> Item:
    """The value of an attribute Name; kind 1 is plain text."""
    return structure(Tag.ATTRIBUTE_VALUE, text(Tag.NAME_VALUE, name), enumeration(Tag.NAME_TYPE, kind))


def versions() -> bytes:
    """The answer to what every connection begins with."""
    return message(Operation.DISCOVER_VERSIONS, version(1, 4))


def server_context(authority: ServerAuthority, certificate: Path) -> ssl.SSLContext:
    """TLS as a key server has it: clients need a certificate of ``authority``."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=authority.pem)
    return context


class Store:
    """Keys of a cluster, and right answers about them; servers that share a store replicate at once.

    ``before`` and ``after`` are called with each operation and may raise ``Hang`` or ``Die``: before it was carried
    out, and when only the answer is missing. With ``finds_all`` Locate heeds no name and answers with every key; a key
    in ``nameless`` has none.
    """

    def __init__(self, *, finds_all: bool = False) -> None:
        self.finds_all = finds_all
        self.nameless: set[str] = set()
        self.labels: dict[str, str] = {}
        self.states: dict[str, int] = {}
        self.materials: dict[str, bytes] = {}

    def add(self, label: str, state: int = 1) -> str:
        """A key in this state, as ``enum State`` numbers them."""
        key_id = f"key-{len(self.labels) + 1}"
        self.labels[key_id], self.states[key_id], self.materials[key_id] = label, state, os.urandom(32)
        return key_id

    def answers(
        self,
        *,
        before: Callable[[Operation], None] = lambda operation: None,
        after: Callable[[Operation], None] = lambda operation: None,
    ) -> Answer:
        """A server's way of answering."""

        def answer(operation: Operation, payload: Item) -> bytes:
            before(operation)
            said = self._carry_out(operation, payload)
            after(operation)
            return said

        return answer

    def _carry_out(self, operation: Operation, payload: Item) -> bytes:
        if operation is Operation.CREATE:
            key_id = self.add(_label(payload))
            return message(operation, enumeration(Tag.OBJECT_TYPE, 2), text(Tag.UNIQUE_IDENTIFIER, key_id))
        if operation is Operation.LOCATE:
            wanted = _label(payload)
            found = [key_id for key_id, label in self.labels.items() if self.finds_all or label == wanted]
            return message(operation, *(text(Tag.UNIQUE_IDENTIFIER, each) for each in found))
        key_id = str(_inner(payload, Tag.UNIQUE_IDENTIFIER).value)
        if key_id not in self.states:
            return refusal(operation, 1, f"no {key_id} here")
        if operation is Operation.GET:
            if self.states[key_id] >= 5:
                return refusal(operation, 0xB, "it is destroyed")
            return message(operation, *key_item(key_id, self.materials[key_id]))
        if operation is Operation.GET_ATTRIBUTES:
            wanted = str(_inner(payload, Tag.ATTRIBUTE_NAME).value)
            value = enumeration(Tag.ATTRIBUTE_VALUE, self.states[key_id])
            if wanted == "Name":
                value = name_value(self.labels[key_id])
            has_it = wanted == "State" or key_id not in self.nameless
            told = [structure(Tag.ATTRIBUTE, text(Tag.ATTRIBUTE_NAME, wanted), value)] if has_it else []
            return message(operation, text(Tag.UNIQUE_IDENTIFIER, key_id), *told)
        needs, becomes = {
            Operation.ACTIVATE: ((1,), 2),
            Operation.REVOKE: ((2,), 3),
            Operation.DESTROY: ((1, 3), 5),
        }[operation]
        if self.states[key_id] not in needs:
            return refusal(operation, 0xC, "not in this state")
        self.states[key_id] = becomes
        return message(operation, text(Tag.UNIQUE_IDENTIFIER, key_id))


@asynccontextmanager
async def saying(context: ssl.SSLContext | None, answer: Answer, *, greets: bool = True) -> AsyncIterator[Saying]:
    """Serve on loopback. With ``greets`` DiscoverVersions is answered by itself. Without a context there is no TLS."""
    state = Saying()
    writers: set[asyncio.StreamWriter] = set()
    over = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.add(writer)
        state.connections += 1
        try:
            while True:
                head = await reader.readexactly(8)
                request = decode(head + await reader.readexactly(int.from_bytes(head[4:], "big")))
                state.plaintext += 8 + int.from_bytes(head[4:], "big")
                operation, payload = _asked(request)
                if greets and operation is Operation.DISCOVER_VERSIONS:
                    writer.write(versions())
                    continue
                state.asked.append(operation)
                writer.write(answer(operation, payload))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except Die as die:
            writer.write(die.args[0] if die.args else b"")
        except Hang:
            await over.wait()
        finally:
            writer.close()
            writers.discard(writer)

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    state.port = server.sockets[0].getsockname()[1]
    try:
        yield state
    finally:
        over.set()
        server.close()
        for writer in list(writers):
            writer.transport.abort()
        await server.wait_closed()
        await asyncio.sleep(0)


def _asked(request: Item) -> tuple[Operation, Item]:
    batch = _inner(request, Tag.BATCH_ITEM)
    number = _inner(batch, Tag.OPERATION).value
    assert isinstance(number, int)
    return Operation(number), _inner(batch, Tag.REQUEST_PAYLOAD)


def _inner(item: Item, tag: Tag) -> Item:
    assert isinstance(item.value, tuple)
    (found,) = [each for each in item.value if each.tag == tag]
    return found


def _label(item: Item) -> str:
    """The value of the one Name in it."""
    if isinstance(item.value, tuple):
        return "".join(_label(each) for each in item.value)
    return str(item.value) if item.tag == Tag.NAME_VALUE else ""
