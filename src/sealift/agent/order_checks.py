"""What an order to move must say before a host begins anything; pure."""

from __future__ import annotations

from uuid import UUID

from sealift.agent.vm_files import VmFile, from_order
from sealift.channel.protocol import CHANNEL_VERSION
from sealift.domain.move import MoveOrder, refuse_plain
from sealift.domain.vm import HardwareRecord, VmConfig
from sealift.errors import InvalidInput, PlanRefused


def check_order(order: MoveOrder, meant: UUID, *, host: UUID, name: str, can_seal: bool) -> None:
    """Raises InvalidInput for an order that is not host ``host``'s, or contradicts itself; PlanRefused for one that
    this host (``name``) cannot carry out. ``meant``: the host that the order names for this side."""
    if meant != host or order.source == order.target:
        raise InvalidInput("the migration order is not for this host")
    if order.protection == "sealed" and not can_seal:
        raise PlanRefused(f"host {name} cannot seal a move", todo="plan it again")
    if order.protection == "sealed" and order.channel_version != CHANNEL_VERSION:
        raise PlanRefused(f"host {name} does not speak channel version {order.channel_version}")
    if order.hardware.config.uuid != order.vm:
        raise InvalidInput("the migration order's hardware is another VM's")
    refuse_plain(order)


def check_own(order: MoveOrder, config: VmConfig, hardware: HardwareRecord | None) -> None:
    """What the source knows of its VM by itself; the order's word is not taken for it.

    Raises InvalidInput for a plain order to move a VM that is encrypted here (promise P5), whatever the order says of
    its disks, and for one that describes other hardware than the VM runs with.
    """
    if order.protection == "plain" and (config.deks or (hardware is not None and hardware.config.deks)):
        raise InvalidInput(
            f"the migration order would move VM {config.name}, which is encrypted here, in plain text",
            todo="an encrypted VM is always moved sealed; plan the migration again",
        )
    if order.hardware != hardware:
        raise InvalidInput(
            f"the migration order's hardware is not that with which VM {config.name} runs",
            todo="plan the migration again",
        )


def file_in(order: MoveOrder) -> VmFile | None:
    """The configuration file of an encrypted VM that the order brings; None for a VM in clear.

    Raises InvalidInput or BundleInvalid when it is not one of this VM, and of these disks.
    """
    deks = order.hardware.config.deks
    if not deks and not order.file:
        return None
    if not deks or not order.file:
        raise InvalidInput(
            f"the migration order for VM {order.vm_name} has a configuration file or keys, and not both",
            todo="plan the migration again",
        )
    file = from_order(order.file, order.vm)
    if file.config.deks != deks:
        raise InvalidInput(
            f"the migration order for VM {order.vm_name} brings a configuration file of other disks",
            todo="plan the migration again",
        )
    return file
