"""VMs that are being defined: from the first look at their disks until they are one of the host's, or are not.

That may take as long as a datastore that hangs, and whoever asked for it may have stopped waiting. Until it is over
nobody is told that the host does not know the VM, since a definition that was forgotten would come to life behind
everybody's back; and nobody else gets its name or its disks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from uuid import UUID

from sealift.domain.vm import VmConfig
from sealift.errors import Conflict


class Definitions:
    """Those of one host."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._under_way: dict[UUID, VmConfig] = {}

    @contextmanager
    def claim(self, config: VmConfig, defined: Iterable[VmConfig]) -> Iterator[list[VmConfig]]:
        """While this is entered the VM is being defined. The others of this host: ``defined``, and those under way.

        Raises Conflict while it is being defined already.
        """
        self.refuse(config.uuid)
        others = [*defined, *self._under_way.values()]
        self._under_way[config.uuid] = config
        try:
            yield others
        finally:
            del self._under_way[config.uuid]

    def refuse(self, vm: UUID) -> None:
        """Raises Conflict while this VM is being defined."""
        if config := self._under_way.get(vm):
            raise Conflict(
                f"VM {config.name} is still being defined on host {self._host}",
                todo="wait until that is done; if it takes long, see whether the datastores of its disks answer",
            )
