"""One connection to one KMIP server: TLS, one request and one answer at a time.

Answers are received into a buffer of ours that is as long as the answer's header says, never longer than we take, and
overwritten once it was read. Bytes that nobody asked for end the connection: they cannot become the answer to a later
request.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from dataclasses import dataclass
from typing import TypeVar, cast

from sealift.errors import (
    InvalidInput,
    KeyMissing,
    KeyProviderError,
    ProviderAnswerInvalid,
    ProviderImpostor,
    ProviderRefused,
    ProviderUnreachable,
)
from sealift.keys.kmip_messages import VERSIONS, Call, Version, answer_length, discover_versions
from sealift.keys.kmip_trust import Trust
from sealift.keys.ttlv import HEADER_BYTES

_T = TypeVar("_T")


@dataclass(frozen=True)
class Address:
    """Where a server listens; ``str`` is how it was written."""

    host: str
    port: int
    text: str

    def __str__(self) -> str:
        return self.text


def parse_address(text: str) -> Address:
    """``host:port``, an IPv6 address in brackets; raises InvalidInput."""
    host, _, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    good = bare and text.isascii() and text.isprintable() and " " not in text and (bare != host or ":" not in host)
    if not good or not port.isdigit() or not 0 < int(port) < 65536:
        raise InvalidInput(f"{text!r} is not the address of a key server", todo="write host:port; KMIP's port is 5696")
    return Address(bare, int(port), text)


class _Stream(asyncio.BufferedProtocol):
    """Receives one whole message at a time."""

    def __init__(self) -> None:
        self._buffer = bytearray(HEADER_BYTES)
        self._filled = 0
        self._waiter: asyncio.Future[bytearray] | None = None
        self._transport: asyncio.Transport | None = None
        self.over: KeyProviderError | None = None
        """Why nothing more can be asked here."""
        self.closed = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        return memoryview(self._buffer)[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        self._filled += nbytes
        if self._waiter is None:
            self.end(ProviderAnswerInvalid("it sends what nobody asked for"))
        elif self._filled == HEADER_BYTES and len(self._buffer) == HEADER_BYTES:
            try:
                length = answer_length(self._buffer)
            except ProviderAnswerInvalid as invalid:
                self.end(invalid)
                return
            self._buffer = self._buffer + bytes(length)
        if self._waiter is not None and self._filled == len(self._buffer):
            waiter, self._waiter = self._waiter, None
            whole, self._buffer, self._filled = self._buffer, bytearray(HEADER_BYTES), 0
            if waiter.done():  # whoever waited was cancelled, and ends the connection
                whole[:] = bytes(len(whole))
            else:
                waiter.set_result(whole)

    def eof_received(self) -> None:
        self.end(ProviderUnreachable("it closed the connection"))

    def connection_lost(self, exc: Exception | None) -> None:
        if isinstance(exc, ssl.SSLError):
            self.end(_tls_failure(exc))
        else:
            self.end(ProviderUnreachable("the connection broke"))
        self.closed.set()

    def end(self, why: KeyProviderError) -> None:
        """Nothing more is sent or received; ``why`` is what who waits is told. The first reason counts."""
        if self.over is None:
            self.over = why
        self._buffer[:] = bytes(len(self._buffer))
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_exception(self.over)
        if self._transport is not None:
            self._transport.abort()

    def ask(self, request: bytes) -> asyncio.Future[bytearray]:
        """Send a request; the answer, or why there is none."""
        if self.over is not None:
            raise self.over
        assert self._transport is not None
        assert self._waiter is None
        self._waiter = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._waiter


class Link:
    """A connection on which version and authenticity of the server are known. ``close`` it."""

    def __init__(self, stream: _Stream, answer_s: float) -> None:
        self._stream = stream
        self._answer_s = answer_s
        self._version: Version = VERSIONS[-1]
        self.silent = False
        """Whether it ended because no answer came in time."""

    @property
    def usable(self) -> bool:
        """Whether something can be asked here, for all that is known."""
        return self._stream.over is None

    async def ask(self, call: Call[_T]) -> _T:
        """Ask, and read the answer.

        Raises KeyMissing and ProviderRefused (the server says no; the link stays usable), ProviderUnreachable (whether
        it was carried out is not known) and ProviderAnswerInvalid.
        """
        try:
            async with asyncio.timeout(self._answer_s):
                raw = await self._stream.ask(call.request(self._version))
        except TimeoutError:
            self.silent = True
            gone = ProviderUnreachable(f"it does not answer within {self._answer_s:g} s")
            self._stream.end(gone)
            raise gone from None
        except asyncio.CancelledError:
            self._stream.end(ProviderUnreachable("an answer was not waited for"))
            raise
        try:
            return call.answer(raw)
        except ProviderAnswerInvalid as invalid:
            self._stream.end(invalid)
            raise
        finally:
            raw[:] = bytes(len(raw))

    async def agree(self) -> None:
        """Find the version to speak; like ``ask``, but for KeyMissing."""
        try:
            self._version = await self.ask(discover_versions())
        except KeyMissing as odd:  # there is no key in this question
            raise ProviderRefused(odd.what) from None

    async def close(self) -> None:
        """End the connection."""
        self._stream.end(ProviderUnreachable("the connection was closed here"))
        await self._stream.closed.wait()


async def connect(address: Address, trust: Trust, *, connect_s: float, answer_s: float) -> Link:
    """Connect, see that the server is the one that is meant, and agree on a version.

    Raises ProviderImpostor (nothing was asked), ProviderUnreachable, ProviderRefused (it does not take our certificate,
    or not the request) and ProviderAnswerInvalid; none of them names the server.
    """
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(connect_s):
            transport, stream = await loop.create_connection(
                _Stream, address.host, address.port, ssl=trust.context, server_hostname=address.host
            )
    except TimeoutError:
        raise ProviderUnreachable(f"no connection within {connect_s:g} s") from None
    except ssl.SSLError as failure:
        raise _tls_failure(failure) from None
    except OSError as failure:
        raise ProviderUnreachable(f"no connection: {_why(failure)}") from None
    except ValueError:  # UnicodeError of a host name that no resolver can be asked for, as with a label over 63 bytes
        raise ProviderUnreachable("no connection: its host name is not valid", todo=_RENAME) from None
    link = Link(stream, answer_s)
    try:
        certificate = transport.get_extra_info("ssl_object").getpeercert(binary_form=True)
        if trust.pinned and certificate not in trust.pinned:
            raise ProviderImpostor("its certificate is not the one that was pinned", todo=_LOOK)
        await link.agree()
    except BaseException:
        await link.close()
        raise
    return link


def _why(failure: OSError) -> str:
    if isinstance(failure, ConnectionError) and not failure.errno:
        return "it closed the connection in the TLS handshake"  # asyncio raises it so, without a number
    if isinstance(failure, socket.gaierror) or not failure.errno:
        return failure.strerror or "none of its addresses answers"
    return os.strerror(failure.errno)  # asyncio's own text repeats the address


_RENAME = "remove the key provider and add it again with the server's right name"
_LOOK = "see who answers at that address; if the server has a new certificate, add the key provider anew"


def _tls_failure(failure: ssl.SSLError) -> KeyProviderError:
    """What a failed handshake means; alerts are RFC 8446, section 6."""
    if isinstance(failure, ssl.SSLCertVerificationError):
        return ProviderImpostor(f"it cannot show that it is that server: {failure.verify_message}", todo=_LOOK)
    reason = (failure.reason or "").replace("_", " ").lower()
    if "alert" in reason and ("certificate" in reason or "unknown ca" in reason or "access denied" in reason):
        return ProviderRefused(
            f"it does not take our certificate: {reason}", todo="make the client certificate known to the key server"
        )
    return ProviderAnswerInvalid(f"no TLS connection came about: {reason or 'the connection broke'}")
