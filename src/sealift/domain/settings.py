"""The settings of a controller: their names, what they may be, and what they mean. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from sealift.domain.policy import MigrateEncryption
from sealift.errors import InvalidInput, NotFound

MIGRATION_FLOOR: Final = "migration-encryption-floor"
NO_FLOOR: Final = "none"


@dataclass(frozen=True)
class Choice:
    """A setting that is one of a few words. ``meanings`` tells what each does; the first word is the default."""

    name: str
    meanings: Mapping[str, str]

    @property
    def default(self) -> str:
        """What holds until somebody changes it."""
        return next(iter(self.meanings))

    def check(self, value: str) -> str:
        """``value`` itself; raises InvalidInput, which does not quote it, when it is none of the words."""
        if value not in self.meanings:
            words = ", ".join(self.meanings)
            raise InvalidInput(f"that is no value of the setting {self.name}", todo=f"give one of: {words}")
        return value


_ALL = (
    Choice(
        MIGRATION_FLOOR,
        MappingProxyType(
            {
                NO_FLOOR: "each VM's own setting decides how it moves",
                "opportunistic": "every move is sealed where both hosts can, also of VMs whose setting is disabled",
                "required": "every move is sealed or refused, whatever the VM's setting is",
            }
        ),
    ),
)

SETTINGS: Final[Mapping[str, Choice]] = MappingProxyType({choice.name: choice for choice in _ALL})
"""Every setting by its name."""


def setting(name: str) -> Choice:
    """The setting of that name; raises NotFound, which does not quote it."""
    found = SETTINGS.get(name)
    if found is None:
        raise NotFound("there is no such setting", todo="see `sealift settings list`")
    return found


def floor_of(value: str) -> MigrateEncryption:
    """What a value of ``migration-encryption-floor`` means to the policy: ``none`` is below every VM's setting."""
    return MigrateEncryption.DISABLED if value == NO_FLOOR else MigrateEncryption(value)
