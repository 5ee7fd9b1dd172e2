"""Hosts and VMs as they were just seen: the controller's rows beside what the hosts say."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from sealift.controller.models import HostRow, VmRow
from sealift.domain.host import HostCapabilities
from sealift.domain.policy import Capability, HostView
from sealift.domain.vm import VmConfig, VmStatus
from sealift.keys.bundle import Judgement


@dataclass(frozen=True)
class SeenHost:
    """A host as it was just seen; ``error`` says why it has no ``capabilities``."""

    row: HostRow
    capability: Capability
    capabilities: HostCapabilities | None
    error: str = ""

    @property
    def view(self) -> HostView:
        """What the policy decides from."""
        versions = self.capabilities.channel_versions if self.capabilities else ()
        return HostView(self.row.name, self.capability, versions)


@dataclass(frozen=True)
class SeenVm:
    """A VM as it was just seen; ``error`` says why it has no ``status``.

    Of an encrypted one ``file`` is what to think of its configuration file, if its host answered, and ``note`` what is
    to be known of its keys although it can be used. ``conversion`` is the one under way.
    """

    row: VmRow
    host: str
    config: VmConfig
    status: VmStatus | None
    error: str = ""
    file: Judgement | None = None
    note: str = ""
    conversion: UUID | None = None
