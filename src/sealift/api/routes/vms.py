"""VMs."""

from __future__ import annotations

from fastapi import APIRouter

from sealift.api import render
from sealift.api.caller import Caller, Controller
from sealift.api.routes.conversions import refusal
from sealift.api.schemas import Vm, VmChange, VmCreate, VmStop
from sealift.controller.conversions import REFUSED

router = APIRouter(prefix="/api/v1/vms", tags=["vms"])


@router.post("", status_code=201, response_model=Vm)
async def create(controller: Controller, name: Caller, body: VmCreate) -> object:
    """Define a VM on a host from its TOML file; with ``encrypt`` its disks are encrypted before it can start."""
    if body.encrypt:
        row = await controller.encryption.create(
            body.host, body.config, body.provider, verify=body.verify, asked_by=name
        )
        return refusal(row) if row.state == REFUSED else render.vm(await controller.inventory.vm(row.vm_name))
    return render.vm(await controller.inventory.create_vm(body.host, body.config, asked_by=name))


@router.get("")
async def vms(controller: Controller, name: Caller) -> list[Vm]:
    """Every VM, its host asked just now."""
    return [render.vm(seen) for seen in await controller.inventory.vms()]


@router.get("/{vm}")
async def show(controller: Controller, name: Caller, vm: str) -> Vm:
    """One VM, its host asked just now."""
    return render.vm(await controller.inventory.vm(vm))


@router.patch("/{vm}")
async def change(controller: Controller, name: Caller, vm: str, body: VmChange) -> Vm:
    """Change a VM's setting."""
    return render.vm(await controller.inventory.set_policy(vm, body.migrate_encryption, asked_by=name))


@router.post("/{vm}/start")
async def start(controller: Controller, name: Caller, vm: str) -> Vm:
    """Start a VM where it is."""
    return render.vm(await controller.inventory.start_vm(vm, asked_by=name))


@router.post("/{vm}/stop")
async def stop(controller: Controller, name: Caller, vm: str, body: VmStop | None = None) -> Vm:
    """Ask the guest to power down, or kill it."""
    force = body.force if body else False
    return render.vm(await controller.inventory.stop_vm(vm, force=force, asked_by=name))


@router.delete("/{vm}", status_code=204)
async def delete(controller: Controller, name: Caller, vm: str, force: bool = False) -> None:
    """Forget a stopped VM; its disks stay. An encrypted one only with ``force``: nobody can open its disks then."""
    await controller.inventory.delete_vm(vm, force=force, asked_by=name)
