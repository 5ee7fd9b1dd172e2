"""Wire models of the public API under /api/v1, shared by the server and its clients.

Times are ISO 8601 with an offset (UTC), sizes and rates in bytes and bytes per second, identifiers UUIDs. Hosts and
VMs are addressed by name. Requests refuse fields they do not know; answers may gain fields, so clients ignore what
they do not know. Every error is an RFC 9457 problem document (``Problem``).
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal
from uuid import UUID

from pydantic import Field, SecretStr

from sealift.api.encryption import Document, Request, Verify, VmEncryption
from sealift.domain.host import HostCapabilities
from sealift.domain.lifecycle import State
from sealift.domain.patience import GIVE_UP_MS, SWITCHOVER_TIMEOUT_MS
from sealift.domain.policy import Capability, MigrateEncryption
from sealift.domain.vm import HardwareRecord, VmConfig, VmState

# Who


class Authority(Document):
    """GET authority: the controllers' authority, PEM. Its fingerprint is SHA-256 over the certificate's DER."""

    certificate: str


class WhoAmI(Document):
    """GET whoami: the name of the token's owner, and the controller that answered."""

    name: str
    controller: UUID
    version: str
    fingerprint: str  # as domain.token.fingerprint_text writes it


class JoinTokenRequest(Request):
    """POST join-tokens. ``replaces`` names the host whose place the joining machine may take."""

    replaces: str | None = None


class JoinToken(Document):
    """A token for one join. It is shown here and never again."""

    token: str
    expires_at: datetime
    fingerprint: str
    join_command: str  # asks for the token on its standard input


class JoinRequest(Request):
    """POST join, by an agent that has no certificate yet. Of the CSR only key and proof of possession are used."""

    token: SecretStr
    csr: str = Field(max_length=16384)
    name: str = Field(max_length=63)
    address: str = Field(max_length=300)  # host:port of the agent's listener
    migration_address: str = Field(max_length=300)  # host:port of the doorman


class Joined(Document):
    """The answer to a join. ``certificate`` is the host's, followed by its authority's; all PEM."""

    host: UUID
    name: str
    certificate: str
    controllers_authority: str
    hosts_authority: str


# Hosts


class Host(Document):
    """A host. ``capability`` is what it says of sealing moves, and UNKNOWN while it does not answer."""

    id: UUID
    name: str
    address: str
    migration_address: str
    state: Literal["reachable", "unreachable"]
    capability: Capability
    capabilities: HostCapabilities | None  # None while unreachable
    message: str = ""  # why it is unreachable
    joined_at: datetime


# VMs


class VmCreate(Request):
    """POST vms: define a VM on ``host`` from the text of its TOML file.

    With ``encrypt`` its disks are encrypted before it can start, under a key of ``provider`` or of the default one;
    the answer then comes when the conversion has begun (``Vm.conversion``), and a VM whose encryption fails is not
    kept.
    """

    host: str
    config: str = Field(max_length=65536)
    encrypt: bool = False
    provider: str | None = None
    verify: Verify = "sample"


class VmChange(Request):
    """PATCH vms/{name}."""

    migrate_encryption: MigrateEncryption


class VmStop(Request):
    """POST vms/{name}/stop; ``force`` kills it, otherwise the guest is asked to power down."""

    force: bool = False


class Vm(Document):
    """A VM. ``state`` is None while its host does not answer; ``message`` then says why."""

    uuid: UUID
    name: str
    host: str
    state: VmState | None
    migrate_encryption: MigrateEncryption
    migrate_encryption_before: MigrateEncryption | None = None  # the setting before the VM was encrypted
    encrypted: bool = False
    encryption: VmEncryption | None = None
    conversion: UUID | None = None  # the one under way
    config: VmConfig
    hardware: HardwareRecord | None
    message: str = ""


class VmRestored(Vm):
    """The answer to POST vms/{name}/restore-config: the VM as it is then, and what was done to its file.

    ``unchanged``: the file was the last one already; ``restored``: the controller's copy was put back; ``adopted``: a
    newer authentic one was taken over from the host.
    """

    outcome: Literal["unchanged", "restored", "adopted"]


# Migrations


class MigrationCreate(Request):
    """POST migrations. Answers 201 with the Migration, which then runs by itself; 409 ``plan_refused`` otherwise.

    ``channels`` counts data streams: 1 is one stream, N >= 2 is multifd with N. ``give_up_ms`` is how long the link
    between the hosts may be down while the guest runs at the source before it is kept there (1 s to 24 h),
    ``switchover_timeout_ms`` the same while the guest stands still (1 s to 60 s). With ``dry_run`` nothing is stored or
    moved, and the answer is 200 with the Migration as it would be, in state ``planned`` or ``refused``, with its
    findings.
    """

    vm: str
    to: str
    dry_run: bool = False
    bandwidth: int = Field(default=0, ge=0, le=1 << 50)  # bytes per second; 0: no limit
    max_downtime_ms: int = Field(default=300, ge=1, le=2_000_000)
    channels: int = Field(default=1, ge=1, le=65535)
    give_up_ms: int = Field(default=GIVE_UP_MS, ge=0, lt=1 << 31)
    switchover_timeout_ms: int = Field(default=SWITCHOVER_TIMEOUT_MS, ge=0, lt=1 << 31)


class Finding(Document):
    """One thing the plan found; an error refuses the migration, a warning does not."""

    severity: Literal["error", "warning"]
    text: str
    todo: str


class Phase(Document):
    """When the migration entered a state."""

    state: State
    at: datetime


class Step(Document):
    """When a step of setting up was done, on the clock of where it was done.

    ``controller``: ``ordered`` (the spec goes out), ``target`` and ``source`` (that host has taken its order).
    ``source`` and ``target``: see ``domain.move.MoveStatus``.
    """

    where: Literal["controller", "source", "target"]
    step: str
    at: datetime


class LinkDown(Document):
    """The link between the hosts is down; seconds. ``left_s`` is None when nobody gives up any more."""

    down_s: float
    left_s: float | None
    slug: str
    what: str


class Progress(Document):
    """The source's statistics at the moment of the last look, while the migration runs.

    Bytes count as transferred when the target has acknowledged them; until then they are remaining.
    """

    total_bytes: int
    remaining_bytes: int
    transferred_bytes: int
    rate: float  # bytes per second
    dirty_rate: float  # bytes per second the guest dirties
    passes: int
    expected_downtime_ms: int


class Migration(Document):
    """A migration's record. ``protection`` and ``cipher`` are None until the plan is made; cipher is None if plain.

    ``sealed_out`` and ``sealed_in`` are plaintext bytes the source sealed (source to target) and opened (target to
    source); ``target_sealed_*`` are the target's own counts of what it sealed and opened. ``downtime_ms`` runs from
    the guest's stop at the source to its resume at the target, clocks compared over the control stream.

    ``outages`` counts how often the link between the hosts was down, ``reconnects`` the connections that were made
    anew because of it; both, and ``longest_outage_ms``, as the source saw it. ``link_down`` is None while it is up.
    """

    id: UUID
    dry_run: bool = False
    vm: UUID
    vm_name: str
    source: str
    target: str
    state: State
    finished: bool
    asked_policy: MigrateEncryption
    protection: Literal["sealed", "plain"] | None
    reason: str
    cipher: str | None
    channels: int
    bandwidth: int
    max_downtime_ms: int
    give_up_ms: int
    switchover_timeout_ms: int
    sealed_out: int
    sealed_in: int
    target_sealed_out: int
    target_sealed_in: int
    outages: int
    longest_outage_ms: int
    reconnects: int
    link_down: LinkDown | None
    phases: list[Phase]
    timeline: list[Step]
    total_s: float | None  # from request to end, or to now
    downtime_ms: float | None
    requested_by: str
    cancel_requested: bool
    progress: Progress | None
    eta_s: float | None
    error_slug: str
    error: str
    todo: str
    created_at: datetime
    finished_at: datetime | None
    findings: list[Finding]


# Events and errors


class Event(Document):
    """One thing that happened. ``seq`` only ever rises; server-sent events carry it as their id."""

    seq: int
    at: datetime
    type: str  # such as host.joined, host.capability_lost, migration.state, migration.plain
    text: str
    host: str | None = None
    vm: str | None = None
    migration: UUID | None = None
    state: str | None = None  # of a migration.state event: the state it entered
    slug: str | None = None  # of the error it tells of, such as what interrupted a link


class Problem(Document):
    """RFC 9457 problem document; ``slug`` names the error class (docs/errors.md)."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    slug: str
    todo: str = ""
    migration: UUID | None = None  # of a refused migration: its record
    findings: list[Finding] = Field(default=[])  # of a refused migration: everything that was found
