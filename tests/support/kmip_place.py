"""KMIP providers of servers that a test scripts: certificates, and what goes wrong with answers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sealift.demo.kmip import ServerAuthority
from sealift.keys.kmip import KmipProvider
from sealift.keys.kmip_link import Link
from sealift.keys.kmip_member import Member
from sealift.keys.kmip_numbers import Operation
from sealift.keys.ttlv import Item
from support.kmip_server import Answer, Saying, client, saying, server_context

PATIENT_S = 20.0
"""For servers that answer: on a machine that does something else, an answer may take seconds."""
SILENT_S = 0.3
"""For those of which it is known that they do not."""

_T = TypeVar("_T")


class SilentMember(Member):
    """A server that falls silent: its connections have their time to come about, its answers only ``waits_s``."""

    waits_s = SILENT_S

    async def _step(self, link: Link, step: Callable[[Link], Awaitable[_T]]) -> _T:
        link._answer_s = self.waits_s
        return await super()._step(link, step)


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
    place: Place, *answers: Answer, greets: bool = True, silent: Collection[int] = ()
) -> AsyncIterator[tuple[KmipProvider, list[Saying]]]:
    """A provider whose servers answer so; those that are ``silent``, counted from 0, are not waited for long."""
    context = server_context(place.authority, place.certificate)
    async with AsyncExitStack() as stack:
        found = [await stack.enter_async_context(saying(context, answer, greets=greets)) for answer in answers]
        provider = provider_of(place, *found)
        for which in silent:
            address = provider._members[which].address
            provider._members[which] = SilentMember(address, place.client, connect_s=PATIENT_S, answer_s=PATIENT_S)
        stack.push_async_callback(provider.close)
        yield provider, found


def provider_of(place: Place, *servers: Saying) -> KmipProvider:
    """A provider of these servers."""
    return patient(place.client, *(each.member for each in servers))


def patient(directory: Path, *members: str) -> KmipProvider:
    """The provider kms of the client in ``directory``, of servers that have as long as they need."""
    return KmipProvider("kms", members, directory, connect_s=PATIENT_S, answer_s=PATIENT_S)


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
