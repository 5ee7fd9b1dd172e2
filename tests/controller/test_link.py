"""What is said of a host's agent that does not answer."""

from __future__ import annotations

import asyncio
import socket
from uuid import UUID

import httpx2
import pytest

from sealift.controller import link
from sealift.controller.link import AgentLink, Peer
from sealift.errors import HostUnreachable


async def told(address: str) -> str:
    """The message of an order to whoever is at an address."""
    async with httpx2.AsyncClient(base_url=f"https://{address}", trust_env=False) as client:
        with pytest.raises(HostUnreachable) as failed:
            await AgentLink(Peer(UUID(int=1), "alpha", address, b""), client).capabilities()
        return failed.value.what


def test_it_is_said_in_words_how_an_agent_did_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "CONNECT_S", 0.2)

    async def main() -> None:
        async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.close()

        with socket.socket() as nobody, socket.create_server(("127.0.0.1", 0)) as silent:
            nobody.bind(("127.0.0.1", 0))
            async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as rude:
                places = [each.getsockname()[1] for each in (nobody, silent, rude.sockets[0])]
                said = [await told(f"127.0.0.1:{port}") for port in places]
        for port, why, text in zip(
            places, ("connection refused", "no answer within 0.2 s", "the connection ended"), said, strict=True
        ):
            assert text == f"host alpha at 127.0.0.1:{port} did not answer: {why}"

    asyncio.run(main())
