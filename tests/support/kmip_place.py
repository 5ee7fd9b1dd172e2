"""KMIP providers of servers that a test scripts: certificates, and what goes wrong with answers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from sealift.demo.kmip import ServerAuthority
from sealift.keys.kmip import KmipProvider
from sealift.keys.kmip_numbers import Operation
from sealift.keys.ttlv import Item
from support.kmip_server import Answer, Saying, client, saying, server_context

PATIENT_S = 20.0
"""For servers that answer: on a machine that does something else, an answer may take seconds."""
SHORT_S = 1.0
"""For those that do not, where no other has to answer meanwhile."""
SOON_S = 4.0
"""For those that do not, beside one that does."""


@dataclass
class Place:
    """An authority, the directory of a client that its servers know, and certificates of servers, one misnamed."""

    authority: ServerAuthority
    client: Path
    certificate: Path
    other_name: Path


def make_place(root: Path) -> Place:
    """Make them below ``root``."""
    authority = ServerAuthority()
    found = Place(authority, client(authority, root / "client"), root / "server.pem", root / "other.pem")
    authority.server(found.certificate, "127.0.0.1")
    authority.server(found.other_name, "some-other-server.example")
    return found


@asynccontextmanager
async def members(
    place: Place, *answers: Answer, greets: bool = True, answer_s: float = PATIENT_S
) -> AsyncIterator[tuple[KmipProvider, list[Saying]]]:
    """A provider whose servers answer so."""
    context = server_context(place.authority, place.certificate)
    async with AsyncExitStack() as stack:
        found = [await stack.enter_async_context(saying(context, answer, greets=greets)) for answer in answers]
        provider = provider_of(place, *found, answer_s=answer_s)
        stack.push_async_callback(provider.close)
        yield provider, found


def provider_of(place: Place, *servers: Saying, answer_s: float = PATIENT_S) -> KmipProvider:
    """A provider of these servers."""
    return KmipProvider("kms", [each.member for each in servers], place.client, connect_s=PATIENT_S, answer_s=answer_s)


def always(raw: bytes) -> Answer:
    """The same bytes, whatever is asked."""
    return lambda operation, payload: raw


def raising(failure: Exception) -> Answer:
    """No answer, in this way."""

    def answer(operation: Operation, payload: Item) -> bytes:
        raise failure

    return answer


def failing_on(which: Operation, failure: Exception, *, times: int = 1000) -> Callable[[Operation], None]:
    """Raises ``failure`` the first ``times`` that it is called with ``which``."""
    left = times

    def hook(operation: Operation) -> None:
        nonlocal left
        if operation is which and left:
            left -= 1
            raise failure

    return hook
