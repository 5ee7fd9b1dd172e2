"""What both hosts need for one move, and what they report of it.

``MoveOrder`` is the migration spec without its secret; ``encode_spec``/``decode_spec`` are the body of the order, in
which the secret travels as raw bytes behind the order's JSON, so that no JSON parser and no validation error ever
holds it (promise P2).

    offset  size  field
    0       4     length n of the JSON, big-endian
    4       n     MoveOrder as JSON, UTF-8
    4+n     40    sealed move: key (32 bytes), nonce (8 bytes)   |   plain move: 16 bytes, the one-time token
    44+n    ...   of an encrypted VM only: the keys of its disks (``domain.deks``), all of them or none

An order to the source carries no keys of disks, and one to a target that holds them already needs none. An encrypted VM
has no plain order at all (promise P5).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from enum import Enum
from typing import Literal
from uuid import UUID

from pydantic import TypeAdapter, ValidationError

from sealift.domain.deks import Deks, decode_keys, encode_keys, wipe
from sealift.domain.patience import GIVE_UP_MS, SWITCHOVER_TIMEOUT_MS
from sealift.domain.vm import HardwareRecord
from sealift.errors import InvalidInput
from sealift.secret import Secret

KEY_BYTES, NONCE_BYTES, TOKEN_BYTES = 32, 8, 16
MAX_ORDER_BYTES = 1 << 20


class Role(Enum):
    """A host's side of a move."""

    SOURCE = "source"
    TARGET = "target"


@dataclass(frozen=True)
class ChannelLimits:
    """Limits of the sealed channel that both ends bind into the handshake (docs/protocol/channel.md)."""

    window_bytes: int = 64 << 20
    rekey_records: int = 1 << 24
    rekey_bytes: int = 1 << 36


@dataclass(frozen=True)
class MoveOptions:
    """What the person asked for. Bandwidth in bytes per second (0: no limit); see ``patience`` for the last two."""

    bandwidth: int = 0
    max_downtime_ms: int = 300
    multifd_channels: int = 0  # 0: one stream, no multifd
    give_up_ms: int = GIVE_UP_MS
    switchover_timeout_ms: int = SWITCHOVER_TIMEOUT_MS


@dataclass(frozen=True)
class MoveOrder:
    """One attempt to move one VM: the public part of the migration spec, the same for both hosts."""

    attempt: UUID
    fence: int
    vm: UUID
    vm_name: str
    source: UUID
    source_name: str
    source_address: str  # the source's migration address, without port
    target: UUID
    target_name: str
    target_address: str  # host:port of the target's doorman
    protection: Literal["sealed", "plain"]
    channel_version: int
    reason: str  # why sealed or plain, in words
    options: MoveOptions
    limits: ChannelLimits
    hardware: HardwareRecord
    file: str = ""  # of an encrypted VM: its configuration file, byte for byte (latin-1)


@dataclass(frozen=True)
class SealedSecret:
    """The one-time key and nonce of a sealed move."""

    key: Secret
    nonce: Secret

    def wipe(self) -> None:
        """Overwrite both."""
        self.key.wipe()
        self.nonce.wipe()


@dataclass(frozen=True)
class PlainToken:
    """The one-time token of a plain move: access control, not secrecy."""

    token: Secret

    def wipe(self) -> None:
        """Overwrite it."""
        self.token.wipe()


MoveSecret = SealedSecret | PlainToken

_ORDER = TypeAdapter(MoveOrder)


def refuse_plain(order: MoveOrder) -> None:
    """Raises InvalidInput for a plain order to move an encrypted VM (promise P5); controller and both hosts ask."""
    if order.protection == "plain" and order.hardware.config.deks:
        raise InvalidInput(
            f"the migration order would move the encrypted VM {order.hardware.config.name} in plain text",
            todo="an encrypted VM is always moved sealed; plan the migration again",
        )


def encode_spec(order: MoveOrder, secret: MoveSecret, deks: Deks) -> bytes:
    """The body of an order; its secret must fit the order's protection, and ``deks`` the disks, or be empty.

    Raises ValueError when they do not, InvalidInput for a plain order to move an encrypted VM.
    """
    refuse_plain(order)
    if isinstance(secret, SealedSecret) is not (order.protection == "sealed"):
        raise ValueError("the secret does not fit the order's protection")
    needed = order.hardware.config.deks
    if deks and set(deks) != set(needed):
        raise ValueError("the keys are not those of the VM's disks")
    public = _ORDER.dump_json(order)
    match secret:
        case SealedSecret(key, nonce):
            raw = key.reveal() + nonce.reveal()
        case PlainToken(token):
            raw = token.reveal()
    return struct.pack(">I", len(public)) + public + raw + (encode_keys(deks) if needed else b"")


def decode_spec(body: bytes) -> tuple[MoveOrder, MoveSecret, dict[UUID, Secret]]:
    """Parse an order's body: the order, its one-time secret, the keys of the VM's disks that came with it.

    Raises InvalidInput, which never quotes what it was given.
    """
    bad = InvalidInput("the migration order is malformed", todo="controller and agent must be of matching versions")
    if len(body) < 4 or len(body) > MAX_ORDER_BYTES:
        raise bad
    (length,) = struct.unpack_from(">I", body)
    if length > len(body) - 4:
        raise bad
    try:
        order = _ORDER.validate_json(body[4 : 4 + length])
    except (ValidationError, InvalidInput):
        raise bad from None  # the cause would quote the input
    if not 0 <= order.fence < 10**18:
        raise bad
    refuse_plain(order)
    sealed, needed = order.protection == "sealed", set(order.hardware.config.deks)
    raw, size = body[4 + length :], KEY_BYTES + NONCE_BYTES if sealed else TOKEN_BYTES
    if len(raw) < size or (len(raw) > size and not needed):
        raise bad
    deks = decode_keys(raw[size:]) if needed else {}
    if deks and set(deks) != needed:
        wipe(deks)
        raise bad
    if sealed:
        key, nonce = Secret(raw[:KEY_BYTES], length=KEY_BYTES), Secret(raw[KEY_BYTES:size], length=NONCE_BYTES)
        return order, SealedSecret(key, nonce), deks
    return order, PlainToken(Secret(raw[:size], length=TOKEN_BYTES)), deks


class MoveState(Enum):
    """Where one host stands in one attempt."""

    PREPARING = "preparing"  # both: relay and QEMU are being set up
    WAITING = "waiting"  # target: listening, nothing is complete yet
    PRECOPY = "precopy"  # source: memory is being copied
    SWITCHOVER = "switchover"  # source: the guest is stopped
    READY = "ready"  # target: holds a complete, paused copy
    COMMITTING = "committing"  # source: let go, waits for RUNNING; target: committed, starting the guest
    AWAITING_ANSWER = "awaiting_answer"  # source: let go, the link is gone; the controller must carry the question
    DONE = "done"  # source: released; target: runs
    FAILED = "failed"  # source: the guest runs on here; target: empty
    CANCELLED = "cancelled"
    CRASHED = "crashed"  # the QEMU that held the VM here is gone
    UNKNOWN = "unknown"  # cannot be settled here


MOVE_FINAL = frozenset({MoveState.DONE, MoveState.FAILED, MoveState.CANCELLED, MoveState.CRASHED})


class Answer(Enum):
    """The target's answer to COMMIT; both are durable at the target before they are given."""

    RUNNING = "running"
    ABORTED = "aborted"


@dataclass(frozen=True)
class Progress:
    """QEMU's migration statistics at one moment; bytes, bytes per second, pages per second, milliseconds.

    QEMU counts as transferred what it wrote into its local socket; ``taken`` corrects that.
    """

    total_bytes: int = 0
    remaining_bytes: int = 0
    transferred_bytes: int = 0
    rate: float = 0.0
    dirty_rate: float = 0.0  # bytes per second the guest dirties
    passes: int = 0
    expected_downtime_ms: int = 0

    @property
    def eta_s(self) -> float | None:
        """Seconds until memory is copied at this rate; None when it does not converge or is not known."""
        gain = self.rate - self.dirty_rate
        return self.remaining_bytes / gain if gain > 0 else None

    def taken(self, acked: int) -> Progress:
        """The same as far as the target has it: it acknowledged ``acked`` bytes, the rest is still to come.

        What the relays hold counts as remaining, so nothing is shown as sent that a broken link could still cost.
        """
        held = max(0, self.transferred_bytes - acked)
        remaining = min(self.total_bytes, self.remaining_bytes + held)
        return replace(self, transferred_bytes=self.transferred_bytes - held, remaining_bytes=remaining)


OUTAGES_TOLD = 32
"""So many outages of an attempt are told one by one; more, which an attacker can cause for ever, are only counted."""


@dataclass(frozen=True)
class Outage:
    """A stretch in which the link between the hosts was down: at least one channel had no connection."""

    slug: str  # of the error that began it
    what: str
    lasted_ms: int | None = None  # None: it is not over


@dataclass(frozen=True)
class LinkDown:
    """The link is down at this moment; seconds."""

    down_s: float
    left_s: float | None  # until it is given up, if nothing changes; None: never
    slug: str
    what: str


@dataclass(frozen=True)
class LinkReport:
    """How the link between the hosts has fared so far, as one of them saw it."""

    outages: tuple[Outage, ...] = ()  # in order, the first OUTAGES_TOLD
    count: int = 0  # of all of them
    longest_ms: int = 0  # of those that are over
    reconnects: int = 0  # one for each channel that went on, on a new connection
    down: LinkDown | None = None


@dataclass(frozen=True)
class MoveStatus:
    """One host's report of one attempt. Times are seconds since the epoch on that host's clock.

    ``timeline`` says when each step of setting up was done: at the target ``ordered``, ``qemu``, ``relay``,
    ``listening``; at the source ``ordered``, ``relay``, ``connected`` (the control channel), ``migrate`` (QEMU was
    told), ``local`` (QEMU connected to the relay), ``first_byte`` (of QEMU's stream went out).
    """

    attempt: UUID
    role: Role
    state: MoveState
    progress: Progress = Progress()
    channels: int = 0
    sealed_out: int = 0  # plaintext bytes this host sealed
    sealed_in: int = 0  # plaintext bytes this host opened
    stopped_at: float | None = None  # source: the guest's STOP
    resumed_at: float | None = None  # target: the guest's RESUME
    clock_offset_s: float | None = None  # source: target's clock minus source's
    answer: Answer | None = None  # target: its durable answer, once given
    link: LinkReport = LinkReport()
    timeline: tuple[tuple[str, float], ...] = ()
    error_slug: str = ""
    error: str = ""
