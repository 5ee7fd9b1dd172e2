"""Encrypting, decrypting and rekeying VMs."""

from __future__ import annotations

from uuid import UUID

from fastapi import APIRouter, Response

from sealift.api import render
from sealift.api.caller import Caller, Controller
from sealift.api.encryption import Conversion, DecryptRequest, EncryptRequest, Rekeyed, RekeyManyRequest, RekeyRequest
from sealift.api.problems import problem
from sealift.api.schemas import VmRestored
from sealift.controller.conversions import REFUSED, what
from sealift.controller.models import ConversionRow
from sealift.controller.services import Services
from sealift.errors import PlanRefused

router = APIRouter(prefix="/api/v1", tags=["encryption"])

_DONE = {"encrypt": "encrypted", "decrypt": "decrypted", "rekey": "rekeyed", "deep-rekey": "rekeyed"}


def refusal(row: ConversionRow) -> Response:
    """The answer to a conversion whose plan was refused."""
    error = PlanRefused(f"VM {row.vm_name} cannot be {_DONE[what(row)]}: {row.error}", todo=row.todo)
    return problem(error, findings=render.findings(row))


def _document(controller: Services, row: ConversionRow) -> Conversion:
    encryption = controller.encryption
    return render.conversion(row, encryption.report(row.id), encryption.silence(row.id))


def _begun(controller: Services, row: ConversionRow, response: Response, *, dry_run: bool) -> object:
    if dry_run:
        response.status_code = 200
        return render.conversion(row, None, rehearsed=True)
    if row.state == REFUSED:
        return refusal(row)
    return _document(controller, row)


@router.post("/vms/{vm}/encrypt", status_code=201, response_model=Conversion)
async def encrypt(controller: Controller, name: Caller, vm: str, body: EncryptRequest, response: Response) -> object:
    """Encrypt a stopped VM's disks: planned now, then carried out by itself."""
    row = await controller.encryption.encrypt(
        vm, body.provider, verify=body.verify, dry_run=body.dry_run, asked_by=name
    )
    return _begun(controller, row, response, dry_run=body.dry_run)


@router.post("/vms/{vm}/decrypt", status_code=201, response_model=Conversion)
async def decrypt(controller: Controller, name: Caller, vm: str, body: DecryptRequest, response: Response) -> object:
    """Decrypt a stopped VM's disks: planned now, then carried out by itself."""
    row = await controller.encryption.decrypt(vm, verify=body.verify, dry_run=body.dry_run, asked_by=name)
    return _begun(controller, row, response, dry_run=body.dry_run)


@router.post("/vms/{vm}/rekey", status_code=201, response_model=Conversion)
async def rekey(controller: Controller, name: Caller, vm: str, body: RekeyRequest, response: Response) -> object:
    """Give a VM a new key: done when answered; with ``deep`` a copy of a stopped VM's disks, carried out by itself."""
    row = await controller.encryption.rekey(
        vm, body.provider, deep=body.deep, verify=body.verify, dry_run=body.dry_run, asked_by=name
    )
    return _begun(controller, row, response, dry_run=body.dry_run)


@router.post("/vms/{vm}/restore-config")
async def restore_config(controller: Controller, name: Caller, vm: str) -> VmRestored:
    """Put the last authentic configuration file back on the VM's host, or take over a newer one from there."""
    seen, outcome = await controller.encryption.restore_config(vm, asked_by=name)
    return render.restored(seen, outcome)


@router.post("/rekey")
async def rekey_many(controller: Controller, name: Caller, body: RekeyManyRequest) -> list[Rekeyed]:
    """Move every VM's key from one key provider to another; shallow, and each VM for itself."""
    found = await controller.encryption.rekey_many(body.source, body.target, asked_by=name)
    return [render.rekeyed(each) for each in found]


@router.get("/conversions")
async def conversions(controller: Controller, name: Caller) -> list[Conversion]:
    """The newest conversions, newest first."""
    return [_document(controller, row) for row in await controller.conversions.all()]


@router.get("/conversions/{conversion}")
async def show(controller: Controller, name: Caller, conversion: UUID) -> Conversion:
    """One conversion; while it is under way, with its progress."""
    return _document(controller, await controller.conversions.get(conversion))


@router.post("/conversions/{conversion}/cancel", status_code=202)
async def cancel(controller: Controller, name: Caller, conversion: UUID) -> Conversion:
    """Ask for the old images to be kept; watch it to see whether they still could be."""
    return _document(controller, await controller.encryption.cancel(conversion, asked_by=name))
