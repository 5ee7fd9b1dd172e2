"""Who gets in: admin tokens, and every rule of a join."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from sqlalchemy import select, update

from doubles.agent import joined_agent
from sealift.controller.access import JoinAsk
from sealift.controller.models import HostRow, TokenRow
from sealift.controller.services import Services
from sealift.domain.token import Token, TokenKind
from sealift.errors import (
    Conflict,
    HostNameTaken,
    InvalidInput,
    NotAuthenticated,
    NotFound,
    SealiftError,
    TokenExpired,
    TokenInvalid,
    TokenUsed,
)
from sealift.secret import Secret
from support.controllers import a_controller, make_state
from support.moves import happened, running_vm


def ask(token: Token, *, name: str = "a", key: ec.EllipticCurvePrivateKey | None = None) -> JoinAsk:
    """A join by a machine with ``key``."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    pem = csr.public_bytes(serialization.Encoding.PEM).decode()
    return JoinAsk(token.text(), pem, name, "10.0.0.1:7420", "10.0.0.1:7421")


async def token(services: Services, *, replaces: str | None = None) -> Token:
    return (await services.access.new_join_token(replaces=replaces, asked_by="test"))[0]


async def refused(services: Services, wish: JoinAsk, error: type[SealiftError]) -> None:
    """The join is refused, and neither host nor token changed."""
    async with services.events.reading() as session:
        before = (await session.scalars(select(HostRow.public_key))).all()
    with pytest.raises(error):
        await services.access.join(wish)
    async with services.events.reading() as session:
        assert (await session.scalars(select(HostRow.public_key))).all() == before


def test_an_admin_token_opens_and_nothing_else_does(tmp_path: Path) -> None:
    async def main() -> None:
        async with a_controller(make_state(tmp_path)) as services:
            admin = await services.access.new_admin_token("ann")
            assert await services.access.who(admin.text()) == "ann"
            join = await token(services)
            disguised = Token(TokenKind.ADMIN, join.fingerprint, join.secret)
            other = Token(TokenKind.ADMIN, admin.fingerprint, Secret(bytes(16), length=16))
            for text in ("", "nonsense", join.text(), disguised.text(), other.text()):
                with pytest.raises(NotAuthenticated) as caught:
                    await services.access.who(text)
                assert str(caught.value) == "the request carries no valid access token (run `sealift login`)"

    asyncio.run(main())


def test_secrets_of_tokens_are_not_in_the_database(tmp_path: Path) -> None:
    async def main() -> None:
        state = make_state(tmp_path)
        async with a_controller(state) as services:
            made = [await services.access.new_admin_token("ann"), await token(services)]
            await services.access.join(ask(made[1]))
        content = b"".join(path.read_bytes() for path in state.glob("controller.db*"))
        for each in made:
            assert each.digest() in content
            assert each.secret.reveal() not in content
            assert each.text().rpartition(".")[2].encode() not in content

    asyncio.run(main())


def test_a_join_stores_the_key_and_uses_up_the_token(tmp_path: Path) -> None:
    async def main() -> None:
        async with a_controller(make_state(tmp_path)) as services:
            key, made = ec.generate_private_key(ec.SECP256R1()), await token(services)
            answer = await services.access.join(ask(made, key=key))
            [leaf, authority] = x509.load_pem_x509_certificates(answer.certificate.encode())
            assert leaf.public_key() == key.public_key()
            assert authority == services.authority.hosts.certificate
            # The answer was lost: the same machine asks again.
            assert await services.access.join(ask(made, key=key)) == answer
            await refused(services, ask(made), TokenUsed)
            [*_, event] = await happened(services)
            assert (event.type, event.host) == ("host.join_refused", "a")
            assert "another key" in event.text

    asyncio.run(main())


def test_of_many_machines_with_one_token_one_gets_in(tmp_path: Path) -> None:
    async def main() -> None:
        async with a_controller(make_state(tmp_path)) as services:
            made = await token(services)
            answers = await asyncio.gather(
                *(services.access.join(ask(made, name=f"host-{number}")) for number in range(8)), return_exceptions=True
            )
            assert sorted(type(answer).__name__ for answer in answers) == ["JoinAnswer"] + ["TokenUsed"] * 7

    asyncio.run(main())


def test_a_token_is_good_for_an_hour(tmp_path: Path) -> None:
    async def main() -> None:
        async with a_controller(make_state(tmp_path)) as services:
            key, used, unused = ec.generate_private_key(ec.SECP256R1()), await token(services), await token(services)
            await services.access.join(ask(used, key=key))
            async with services.events.transaction() as session:
                rows = (await session.scalars(select(TokenRow))).all()
                for row in rows:
                    assert row.expires_at is not None
                    assert 3590 < row.expires_at - time.time() <= 3600
                await session.execute(update(TokenRow).values(expires_at=time.time() - 1))
            await refused(services, ask(unused, name="b"), TokenExpired)
            await refused(services, ask(used, key=key), TokenExpired)
            await refused(services, ask(used), TokenUsed)

    asyncio.run(main())


def test_a_token_that_is_none_of_ours_is_refused_and_fills_no_table(tmp_path: Path) -> None:
    async def main() -> None:
        async with a_controller(make_state(tmp_path)) as services:
            admin = await services.access.new_admin_token("ann")
            before = len(await happened(services))
            unknown = Token(TokenKind.JOIN, admin.fingerprint, Secret(bytes(16), length=16))
            disguised = Token(TokenKind.JOIN, admin.fingerprint, admin.secret)
            for made in (unknown, admin, disguised):
                await refused(services, ask(made), TokenInvalid)
            assert len(await happened(services)) == before

    asyncio.run(main())


def test_a_name_is_given_once_unless_the_token_replaces_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with a_controller(make_state(tmp_path)) as services:
            first = await services.access.join(ask(await token(services)))
            await refused(services, ask(await token(services)), HostNameTaken)
            await refused(services, ask(await token(services, replaces="b")), HostNameTaken)
            second = await services.access.join(ask(await token(services, replaces="a")))
            assert second.host == first.host
            assert second.certificate != first.certificate
            # A token that may replace is good for a new name as well.
            await services.access.join(ask(await token(services, replaces="new"), name="new"))

    asyncio.run(main())


@pytest.mark.parametrize("address", ["", "a", "a:", ":7420", "a:0", "a:70000", "a b:1", "a/b:1", "a@b:1"])
def test_an_address_must_be_one(tmp_path: Path, address: str) -> None:
    async def main() -> None:
        async with a_controller(make_state(tmp_path)) as services:
            good = ask(await token(services))
            for wish in (
                JoinAsk(good.token, good.csr, "a", address, good.migration_address),
                JoinAsk(good.token, good.csr, "a", good.address, address),
            ):
                await refused(services, wish, InvalidInput)
            await services.access.join(good)  # the token is still good

    asyncio.run(main())


def test_a_host_with_vms_is_not_removed_and_a_removed_one_is_gone(tmp_path: Path) -> None:
    async def main() -> None:
        async with a_controller(make_state(tmp_path)) as services:
            a = await joined_agent(services, "a", tmp_path, 1)
            made = await token(services)
            key = ec.generate_private_key(ec.SECP256R1())
            await services.access.join(ask(made, name="b", key=key))
            await running_vm(services, a)
            with pytest.raises(Conflict, match="vm1"):
                await services.inventory.remove_host("a", asked_by="test")
            await services.inventory.remove_host("b", asked_by="test")
            with pytest.raises(NotFound):
                await services.inventory.host_row("b")
            await refused(services, ask(made, name="b", key=key), TokenUsed)

    asyncio.run(main())
