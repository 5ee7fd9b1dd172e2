"""Whom an agent believes when it joins, and what it stores."""

from __future__ import annotations

import asyncio
import stat
from pathlib import Path

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse

from sealift.agent.join import join, load_identity
from sealift.agent.settings import AgentSettings
from sealift.api.app import create_app
from sealift.controller.authority import Authority, load_authority
from sealift.controller.services import load_settings
from sealift.domain.token import Token, TokenKind
from sealift.errors import Conflict, ControllerUnreachable, FingerprintMismatch, SealiftError, TokenInvalid
from sealift.secret import Secret
from support.controllers import a_controller, make_state
from support.serving import serving


def settings(directory: Path) -> AgentSettings:
    return AgentSettings("host-a", directory / "agent", address="127.0.0.1:7420", migration_address="127.0.0.1:7421")


def authority(directory: Path) -> Authority:
    directory.mkdir()
    state = make_state(directory)
    return load_authority(state, load_settings(state).controller)


def token_of(authority: Authority) -> Token:
    return Token(TokenKind.JOIN, authority.controllers.fingerprint, Secret(bytes(16), length=16))


def test_a_host_that_joined_keeps_its_identity_for_itself(tmp_path: Path) -> None:
    async def main() -> None:
        async with a_controller(make_state(tmp_path)) as services:
            token, _ = await services.access.new_join_token(replaces=None, asked_by="test")
            context = services.authority.server_context(("127.0.0.1",))
            async with serving(create_app(services), context) as port:
                identity = await join(f"https://127.0.0.1:{port}", token, settings(tmp_path))
                with pytest.raises(Conflict):
                    await join(f"https://127.0.0.1:{port}", token, settings(tmp_path))
            assert (await services.inventory.host_row("host-a")).id == identity.host
            assert identity.controllers.read_text() == services.authority.controllers.pem
        assert load_identity(settings(tmp_path).identity) == identity
        for path in settings(tmp_path).identity.iterdir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path

    asyncio.run(main())


def test_a_host_that_has_not_joined_is_told_to(tmp_path: Path) -> None:
    with pytest.raises(Conflict, match="has not joined"):
        load_identity(settings(tmp_path).identity)


@pytest.mark.parametrize("served", ["own", "both", "both, own first", "nothing"])
def test_one_in_between_never_sees_the_token(tmp_path: Path, served: str) -> None:
    """He may send the true authority's certificate, which is public, and one of his own along with it."""
    true, his = authority(tmp_path / "true"), authority(tmp_path / "his")
    answers = {
        "own": his.controllers.pem,
        "both": true.controllers.pem + his.controllers.pem,
        "both, own first": his.controllers.pem + true.controllers.pem,
        "nothing": "",
    }
    asked: list[str] = []
    app = FastAPI()

    @app.get("/api/v1/authority")
    async def give() -> dict[str, str]:
        return {"certificate": answers[served]}

    @app.post("/api/v1/join")
    async def take(request: Request) -> dict[str, str]:
        asked.append((await request.body()).decode())
        return {}

    async def main() -> None:
        async with serving(app, his.server_context(("127.0.0.1",))) as port:
            with pytest.raises((FingerprintMismatch, ControllerUnreachable)):
                await join(f"https://127.0.0.1:{port}", token_of(true), settings(tmp_path))

    asyncio.run(main())
    assert asked == []
    assert not (settings(tmp_path).identity / "host.json").exists()


def test_something_else_at_the_address_is_named_as_such(tmp_path: Path) -> None:
    app = FastAPI()

    @app.get("/{path:path}")
    async def page(path: str) -> PlainTextResponse:
        return PlainTextResponse("<html>a page</html>")

    async def main() -> None:
        one = authority(tmp_path / "one")
        async with serving(app, one.server_context(("127.0.0.1",))) as port:
            with pytest.raises(ControllerUnreachable, match="no controller"):
                await join(f"https://127.0.0.1:{port}", token_of(one), settings(tmp_path))

    asyncio.run(main())


def test_a_refusal_comes_as_its_own_class_and_the_key_is_kept_for_the_next_try(tmp_path: Path) -> None:
    async def main() -> None:
        async with a_controller(make_state(tmp_path)) as services:
            context = services.authority.server_context(("127.0.0.1",))
            key = settings(tmp_path).identity / "key.pem"
            async with serving(create_app(services), context) as port:
                url = f"https://127.0.0.1:{port}"
                with pytest.raises(TokenInvalid) as refusal:
                    await join(url, token_of(services.authority), settings(tmp_path))
                before = key.read_bytes()
                token, _ = await services.access.new_join_token(replaces=None, asked_by="test")
                await join(url, token, settings(tmp_path))
                assert key.read_bytes() == before
            assert isinstance(refusal.value, SealiftError)

    asyncio.run(main())
