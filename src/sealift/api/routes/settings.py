"""The controller's settings."""

from __future__ import annotations

from fastapi import APIRouter

from sealift.api.caller import Caller, Controller
from sealift.api.encryption import Setting, SettingChange

router = APIRouter(prefix="/api/v1/settings", tags=["settings"])


@router.get("")
async def settings(controller: Controller, name: Caller) -> list[Setting]:
    """Every setting, with its value and what that means."""
    return [Setting(**vars(each)) for each in await controller.settings_store.list()]


@router.put("/{setting}")
async def change(controller: Controller, name: Caller, setting: str, body: SettingChange) -> Setting:
    """Change a setting; it holds from the next plan on."""
    return Setting(**vars(await controller.settings_store.set(setting, body.value, asked_by=name)))
