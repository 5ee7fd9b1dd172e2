"""Who may come in, and the hosts that did."""

from __future__ import annotations

from fastapi import APIRouter

from sealift import __version__
from sealift.api import render
from sealift.api.caller import Caller, Controller
from sealift.api.schemas import Authority, Host, Joined, JoinRequest, JoinToken, JoinTokenRequest, WhoAmI
from sealift.controller.access import JoinAsk
from sealift.domain.token import fingerprint_text

router = APIRouter(prefix="/api/v1")


@router.get("/authority", tags=["access"])
async def authority(controller: Controller) -> Authority:
    """The certificate by which this controller is recognised; its fingerprint is in every token. Open to anyone."""
    return Authority(certificate=controller.authority.controllers.pem)


@router.post("/join", tags=["access"])
async def join(controller: Controller, body: JoinRequest) -> Joined:
    """Take a host in. The join token in the body is the only key to this door."""
    answer = await controller.access.join(
        JoinAsk(body.token.get_secret_value(), body.csr, body.name, body.address, body.migration_address)
    )
    return Joined(
        host=answer.host,
        name=answer.name,
        certificate=answer.certificate,
        controllers_authority=controller.authority.controllers.pem,
        hosts_authority=controller.authority.hosts.pem,
    )


@router.get("/whoami", tags=["access"])
async def whoami(controller: Controller, name: Caller) -> WhoAmI:
    """Whose token this is, and which controller answers."""
    return WhoAmI(
        name=name,
        controller=controller.settings.controller,
        version=__version__,
        fingerprint=fingerprint_text(controller.authority.controllers.fingerprint),
    )


@router.post("/join-tokens", tags=["access"], status_code=201)
async def new_join_token(controller: Controller, name: Caller, body: JoinTokenRequest) -> JoinToken:
    """Make a token for one join within the hour."""
    token, expires_at = await controller.access.new_join_token(replaces=body.replaces, asked_by=name)
    return JoinToken(
        token=token.text(),
        expires_at=render.moment(expires_at),
        fingerprint=fingerprint_text(token.fingerprint),
        join_command=f"sealift agent join {controller.settings.url} --token -",
    )


@router.get("/hosts", tags=["hosts"])
async def hosts(controller: Controller, name: Caller) -> list[Host]:
    """Every host, asked just now."""
    return [render.host(seen) for seen in await controller.inventory.hosts()]


@router.get("/hosts/{host}", tags=["hosts"])
async def show_host(controller: Controller, name: Caller, host: str) -> Host:
    """One host, asked just now."""
    return render.host(await controller.inventory.host(host))


@router.delete("/hosts/{host}", tags=["hosts"], status_code=204)
async def remove_host(controller: Controller, name: Caller, host: str) -> None:
    """Remove a host without VMs; it cannot be reached with its certificate afterwards."""
    await controller.inventory.remove_host(host, asked_by=name)


@router.post("/hosts/{host}/accept", tags=["hosts"])
async def accept_host(controller: Controller, name: Caller, host: str) -> Host:
    """Take a host that lost its capability to seal as one that cannot."""
    return render.host(await controller.inventory.accept(host, asked_by=name))
