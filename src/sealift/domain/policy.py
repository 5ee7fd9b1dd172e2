"""May this VM move, and sealed or plain? ``decide`` is pure and total (promises P1 and P5).

Besides each VM's setting there may be a floor of the whole controller that no VM can undercut; the stricter one holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class MigrateEncryption(Enum):
    """The setting of each VM, as in vSphere, from the laxest to the strictest."""

    DISABLED = "disabled"
    OPPORTUNISTIC = "opportunistic"
    REQUIRED = "required"


def stricter(one: MigrateEncryption, other: MigrateEncryption) -> MigrateEncryption:
    """Whichever of two settings demands more."""
    return max(one, other, key=list(MigrateEncryption).index)


class Capability(Enum):
    """What a host said, over mutual TLS and for this attempt, about sealing moves."""

    CAPABLE = "capable"
    INCAPABLE = "incapable"
    LOST = "lost"  # once capable, now says it is not; a person must accept that first
    UNKNOWN = "unknown"  # it did not answer


@dataclass(frozen=True)
class Sealed:
    """Everything is encrypted and authenticated, in channel version ``version``."""

    version: int
    reason: str


@dataclass(frozen=True)
class Plain:
    """Nothing is encrypted or authenticated, because the VM's setting allows it."""

    reason: str


@dataclass(frozen=True)
class Refused:
    """Nothing may move."""

    reason: str
    todo: str


Plan = Sealed | Plain | Refused


@dataclass(frozen=True)
class HostView:
    """One end of a move as the decision sees it: name, capability, and the channel versions it speaks."""

    name: str
    capability: Capability
    versions: tuple[int, ...]


def decide(
    setting: MigrateEncryption, *, encrypted: bool, floor: MigrateEncryption, source: HostView, target: HostView
) -> Plan:
    """The plan for a move, with its reason in words. Raises nothing; there is no default outcome.

    ``floor`` is the controller's, and ``DISABLED`` is none. Order of the rules: what is unknown is refused; a lost
    capability is refused; then the stricter of setting and floor (an encrypted VM's is always ``required``) meets the
    two hosts. The reason says whether the VM's encryption, its setting, or the floor decided.
    """
    for host in (source, target):
        if host.capability is Capability.UNKNOWN:
            return Refused(
                f"host {host.name} did not say whether it can seal a move", f"see that the agent on {host.name} runs"
            )
    for host in (source, target):
        if host.capability is Capability.LOST:
            return Refused(
                f"host {host.name} could seal moves before and now says it cannot",
                f"find out why; `sealift host accept {host.name}` takes it as it is",
            )
    strictest = MigrateEncryption.REQUIRED if encrypted else stricter(setting, floor)
    who = _who(setting, encrypted=encrypted, floor=floor)
    if strictest is MigrateEncryption.DISABLED:
        return Plain(who)
    incapable = [host.name for host in (source, target) if host.capability is Capability.INCAPABLE]
    if incapable:
        hosts = " and ".join(incapable)
        if strictest is MigrateEncryption.REQUIRED:
            return Refused(
                f"{who}, and {hosts} cannot seal a move",
                f"enable the sealed channel on {hosts}, or choose another host",
            )
        return Plain(f"{who}, and {hosts} cannot seal a move")
    common = set(source.versions) & set(target.versions)
    if not common:
        # Both can seal, so falling back would be a downgrade nobody asked for.
        return Refused(
            f"{source.name} and {target.name} have no channel version in common",
            "upgrade the older agent",
        )
    return Sealed(max(common), f"{who}, and both hosts can seal")


def _who(setting: MigrateEncryption, *, encrypted: bool, floor: MigrateEncryption) -> str:
    """What decides how strict a move is; where VM and floor demand the same, the VM does."""
    if encrypted:
        return "the VM is encrypted"
    if stricter(setting, floor) is setting:
        return f"the VM's setting is {setting.value}"
    return f"the floor of this controller is {floor.value} (the VM's setting is {setting.value})"
