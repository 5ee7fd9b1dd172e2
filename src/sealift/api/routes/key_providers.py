"""Key providers. Secrets come in as ``SecretStr`` and leave by one answer only: that of an export."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter
from pydantic import SecretStr

from sealift.api.caller import Caller, Controller
from sealift.api.encryption import (
    Export,
    ExportConfirm,
    ExportRequest,
    ImportRequest,
    KeyProvider,
    KeyProviderAdd,
    KeyProviderAdded,
    KeyProviderChange,
    KeyProviderRemoved,
    KeyProviderTested,
    Member,
    TestStep,
)
from sealift.api.render import moment
from sealift.controller.provider_ask import ProviderAsk
from sealift.controller.provider_view import Added, SeenProvider
from sealift.errors import InvalidInput
from sealift.secret import Secret

router = APIRouter(prefix="/api/v1/key-providers", tags=["key providers"])

MAX_SECRET = 65536
"""Bytes of a passphrase or a private key in PEM."""


@router.post("", status_code=201)
async def add(controller: Controller, name: Caller, body: KeyProviderAdd) -> KeyProviderAdded:
    """Add a key provider; the first one becomes the default."""
    ask = ProviderAsk(
        name=body.name,
        kind=body.kind,
        members=tuple(body.members),
        server_authority=body.server_authority,
        client=body.client,
        client_certificate=body.client_certificate,
        client_key=_secret(body.client_key) if body.client_key is not None else None,
        default=body.default,
    )
    try:
        return _added(await controller.providers.add(ask, asked_by=name))
    finally:
        if ask.client_key is not None:
            ask.client_key.wipe()


@router.get("")
async def key_providers(controller: Controller, name: Caller) -> list[KeyProvider]:
    """Every key provider, asked just now."""
    return [_document(seen) for seen in await controller.providers.list()]


@router.post("/import", status_code=201)
async def import_(controller: Controller, name: Caller, body: ImportRequest) -> KeyProviderAdded:
    """Add a native key provider from its export, under the name it had."""
    passphrase = _secret(body.passphrase)
    try:
        return _added(await controller.providers.import_(body.file, passphrase, default=body.default, asked_by=name))
    finally:
        passphrase.wipe()


@router.get("/{provider}")
async def show(controller: Controller, name: Caller, provider: str) -> KeyProvider:
    """One key provider, asked just now."""
    return _document(await controller.providers.show(provider))


@router.patch("/{provider}")
async def change(controller: Controller, name: Caller, provider: str, body: KeyProviderChange) -> KeyProvider:
    """Hand in the certificate that was signed for its request, or make it the default, or both in that order."""
    if body.default is None and body.client_certificate is None:
        raise InvalidInput("nothing was asked to be changed", todo="give default or client_certificate")
    seen = None
    if body.client_certificate is not None:
        seen = await controller.providers.accept_certificate(provider, body.client_certificate, asked_by=name)
    if body.default is not None:
        seen = await controller.providers.set_default(provider, asked_by=name)
    assert seen is not None
    return _document(seen)


@router.delete("/{provider}")
async def remove(controller: Controller, name: Caller, provider: str, force: bool = False) -> KeyProviderRemoved:
    """Forget a key provider; with ``force`` also while VMs have their keys there, which then lock."""
    removed = await controller.providers.remove(provider, force=force, asked_by=name)
    return KeyProviderRemoved(
        name=removed.name, locks=list(removed.locks), lost=removed.lost, was_default=removed.was_default
    )


@router.post("/{provider}/test")
async def test(controller: Controller, name: Caller, provider: str) -> KeyProviderTested:
    """Make, activate, read, find and destroy a key on every member."""
    ok, steps = await controller.providers.test(provider, asked_by=name)
    return KeyProviderTested(ok=ok, steps=[TestStep(**vars(step)) for step in steps])


@router.post("/{provider}/export")
async def export(controller: Controller, name: Caller, provider: str, body: ExportRequest | None = None) -> Export:
    """Export a native key provider, under a passphrase or under eight words that are drawn and shown this once."""
    given = body.passphrase if body else None
    passphrase = _secret(given) if given is not None else None
    try:
        file, words = await controller.providers.export(provider, passphrase, asked_by=name)
        return Export(file=file, passphrase=words.reveal().decode() if words is not None else "")
    finally:
        if passphrase is not None:
            passphrase.wipe()


@router.post("/{provider}/export/confirm")
async def confirm_export(controller: Controller, name: Caller, provider: str, body: ExportConfirm) -> KeyProvider:
    """Show that an export can be opened, as it was read back from where it is kept; only then it counts."""
    passphrase = _secret(body.passphrase)
    try:
        return _document(await controller.providers.confirm_export(provider, body.file, passphrase, asked_by=name))
    finally:
        passphrase.wipe()


def _secret(text: SecretStr) -> Secret:
    try:
        raw = text.get_secret_value().encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can write; the error would quote it
        raw = b""
    if not 1 <= len(raw) <= MAX_SECRET:
        raise InvalidInput("a passphrase or key is empty, too long, or no text")
    return Secret(raw, length=len(raw))


def _added(added: Added) -> KeyProviderAdded:
    return KeyProviderAdded(provider=_document(added.provider), unlocks=list(added.unlocks))


def _document(seen: SeenProvider) -> KeyProvider:
    row = seen.row
    kind: Literal["native", "kmip"] = "kmip" if row.kind == "kmip" else "native"
    return KeyProvider(
        name=row.name,
        kind=kind,
        default=row.is_default,
        state=seen.state,
        message=seen.message,
        members=[Member(**vars(member)) for member in seen.members],
        vms=list(seen.vms),
        notes=list(seen.notes),
        client_certificate=seen.client_certificate,
        certificate_request=seen.certificate_request,
        exported_at=moment(row.exported_at) if row.exported_at is not None else None,
        created_at=moment(row.created_at),
    )
