"""Who may ask: admin tokens, join tokens, and the rules of a join.

A token is looked up by the SHA-256 of its 128 random bits; the bits themselves are stored nowhere.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from uuid import UUID, uuid4

from cryptography.hazmat.primitives.asymmetric import ec
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from sealift.controller.authority import Authority, csr_public_key, key_der
from sealift.controller.events import EventLog, Happening
from sealift.controller.models import HostRow, TokenRow
from sealift.domain.token import SECRET_BYTES, Token, TokenKind, parse_token
from sealift.domain.vm import check_name
from sealift.errors import (
    HostNameTaken,
    InvalidInput,
    NotAuthenticated,
    SealiftError,
    TokenExpired,
    TokenInvalid,
    TokenUsed,
)
from sealift.secret import Secret

JOIN_LIFE_S = 3600.0


@dataclass(frozen=True)
class JoinAsk:
    """What an agent sends to join."""

    token: str
    csr: str
    name: str
    address: str
    migration_address: str


@dataclass(frozen=True)
class JoinAnswer:
    """What it gets; the certificate is its own followed by its authority's, PEM."""

    host: UUID
    name: str
    certificate: str


class Access:
    """Tokens and joins of one controller."""

    def __init__(self, events: EventLog, authority: Authority) -> None:
        self._events = events
        self._authority = authority

    async def new_admin_token(self, name: str) -> Token:
        """A token for everything the API offers; shown once by whoever asked."""
        return await self._new_token(TokenKind.ADMIN, name=name, expires_at=None, replaces=None)

    async def new_join_token(self, *, replaces: str | None, asked_by: str) -> tuple[Token, float]:
        """A token for one join within the hour, and when it ends (seconds since the epoch)."""
        if replaces is not None:
            check_name("host", replaces)
        expires_at = time.time() + JOIN_LIFE_S
        token = await self._new_token(TokenKind.JOIN, name=asked_by, expires_at=expires_at, replaces=replaces)
        return token, expires_at

    async def _new_token(self, kind: TokenKind, *, name: str, expires_at: float | None, replaces: str | None) -> Token:
        secret = Secret(secrets.token_bytes(SECRET_BYTES), length=SECRET_BYTES)
        token = Token(kind, self._authority.controllers.fingerprint, secret)
        async with self._events.transaction() as session:
            session.add(
                TokenRow(
                    kind=kind.value,
                    name=name,
                    digest=token.digest(),
                    created_at=time.time(),
                    expires_at=expires_at,
                    replaces=replaces,
                )
            )
            until = " for an hour" if kind is TokenKind.JOIN else ""
            self._events.add(session, Happening("token.made", f"a {kind.value} token was made by {name}{until}"))
        return token

    async def who(self, text: str) -> str:
        """The name of an admin token's owner; raises NotAuthenticated, always with the same words."""
        refused = NotAuthenticated("the request carries no valid access token", todo="run `sealift login`")
        try:
            token = parse_token(text)
        except TokenInvalid:
            raise refused from None
        async with self._events.reading() as session:
            row = await _find(session, token)
        if row is None or row.kind != TokenKind.ADMIN.value or token.kind is not TokenKind.ADMIN:
            raise refused
        return row.name

    async def join(self, ask: JoinAsk) -> JoinAnswer:
        """Take a host in: its key pinned, its token consumed, in one transaction.

        Asked again with the same token and key within the token's hour, it answers the same certificate, so that a
        lost answer does no harm. Raises TokenInvalid, TokenUsed, TokenExpired, HostNameTaken, InvalidInput; each
        leaves everything as it was, but for an event.
        """
        token = parse_token(ask.token)
        public_key = csr_public_key(ask.csr)
        check_name("host", ask.name)
        for address in (ask.address, ask.migration_address):
            _check_address(address)
        async with self._events.transaction() as session:
            outcome = await self._join(session, token, public_key, ask)
        if isinstance(outcome, SealiftError):
            raise outcome  # only now: the event of the refusal had to be committed
        return outcome

    async def _join(
        self, session: AsyncSession, token: Token, public_key: ec.EllipticCurvePublicKey, ask: JoinAsk
    ) -> JoinAnswer | SealiftError:
        now, key = time.time(), key_der(public_key)
        row = await _find(session, token)
        if row is None or row.kind != TokenKind.JOIN.value or token.kind is not TokenKind.JOIN:
            # No event: whoever has no token of ours must not be able to fill our table.
            return TokenInvalid(
                "this controller did not give out that join token", todo="make one with `sealift host token`"
            )
        if row.used_at is not None and row.used_key != key:
            todo = "make a new token; if you did not use this one, remove the host that did"
            return self._refuse(session, ask, TokenUsed("the join token was used already, by another key", todo=todo))
        if row.expires_at is not None and now >= row.expires_at:
            todo = "make a new one with `sealift host token`"
            return self._refuse(session, ask, TokenExpired("the join token is older than an hour", todo=todo))
        if row.used_at is not None:
            joined = await session.get(HostRow, row.host)
            if joined is None or row.certificate is None:
                return self._refuse(session, ask, TokenUsed("the host that used this token was removed since"))
            return JoinAnswer(joined.id, joined.name, row.certificate)
        host = await session.scalar(select(HostRow).where(HostRow.name == ask.name))
        if host is not None and row.replaces != ask.name:
            todo = "choose another name, or make a token with `--replaces`"
            return self._refuse(session, ask, HostNameTaken(f"a host named {ask.name} has joined already", todo=todo))
        return self._admit(session, row, host, public_key, ask)

    def _admit(
        self,
        session: AsyncSession,
        row: TokenRow,
        host: HostRow | None,
        public_key: ec.EllipticCurvePublicKey,
        ask: JoinAsk,
    ) -> JoinAnswer:
        replaced = host is not None
        if host is None:
            host = HostRow(id=uuid4(), name=ask.name)
            session.add(host)
        # A machine that takes a place keeps the id, so the VMs placed there stay placed; the old key is unpinned.
        host.address, host.migration_address = ask.address, ask.migration_address
        host.public_key, host.joined_at = key_der(public_key), time.time()
        host.was_capable, host.lost_at = False, None
        certificate = self._authority.host_certificate(public_key, host.id, ask.name) + self._authority.hosts.pem
        row.used_at, row.used_key = time.time(), host.public_key
        row.host, row.certificate = host.id, certificate
        text = f"host {ask.name} joined from {ask.address}" + (", taking the place of the old one" if replaced else "")
        self._events.add(session, Happening("host.joined", text, host=ask.name))
        return JoinAnswer(host.id, ask.name, certificate)

    def _refuse(self, session: AsyncSession, ask: JoinAsk, error: SealiftError) -> SealiftError:
        text = f"a join as {ask.name} was refused: {error.what}"
        self._events.add(session, Happening("host.join_refused", text, host=ask.name))
        return error


async def _find(session: AsyncSession, token: Token) -> TokenRow | None:
    found: TokenRow | None = await session.scalar(select(TokenRow).where(TokenRow.digest == token.digest()))
    return found


def _check_address(text: str) -> None:
    host, _, port = text.rpartition(":")
    plain = text.isascii() and all(char.isalnum() or char in ".-:[]" for char in host)
    if not host or not plain or not port.isdigit() or not 0 < int(port) < 65536:
        raise InvalidInput("the host's address is not valid", todo="give host:port")
