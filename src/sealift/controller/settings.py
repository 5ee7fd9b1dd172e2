"""The settings of a controller as they are now: what was changed is in the database, the rest has its default."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sealift.controller.events import EventLog, Happening
from sealift.controller.models import SettingRow
from sealift.domain.policy import MigrateEncryption
from sealift.domain.settings import MIGRATION_FLOOR, SETTINGS, Choice, floor_of, setting


@dataclass(frozen=True)
class SettingNow:
    """A setting, its value, and what that value means."""

    name: str
    value: str
    meaning: str


class ControllerSettings:
    """The settings of one controller. They hold from the next plan on: a move under way keeps the plan it was given."""

    def __init__(self, events: EventLog) -> None:
        self._events = events

    async def list(self) -> Sequence[SettingNow]:
        """Every setting, by name."""
        return [await self.get(name) for name in sorted(SETTINGS)]

    async def get(self, name: str) -> SettingNow:
        """One setting; raises NotFound."""
        choice = setting(name)
        async with self._events.reading() as session:
            row = await session.get(SettingRow, choice.name)
        return _now(choice, row.value if row else choice.default)

    async def set(self, name: str, value: str, *, asked_by: str) -> SettingNow:
        """Change a setting; raises NotFound, InvalidInput. Setting what it is already is no event."""
        choice = setting(name)
        choice.check(value)
        async with self._events.transaction() as session:
            row = await session.get(SettingRow, choice.name)
            before = row.value if row else choice.default
            if row is None:
                session.add(SettingRow(name=choice.name, value=value))
            else:
                row.value = value
            if value != before:
                text = f"{choice.name} was changed from {before} to {value} by {asked_by}: {choice.meanings[value]}"
                self._events.add(session, Happening("setting.changed", text))
        return _now(choice, value)

    async def migration_floor(self) -> MigrateEncryption:
        """Below which no VM may move (``policy.decide``)."""
        return floor_of((await self.get(MIGRATION_FLOOR)).value)


def _now(choice: Choice, value: str) -> SettingNow:
    return SettingNow(choice.name, value, choice.meanings[value])
