"""What is on the wire, as numbers and as frozen values: preface, channel specification, record types, limits.

All integers are big-endian. The preface, in clear, the first 28 bytes of every connection:

    offset  0        4         5      6          8                24       28
            | magic  | version | kind | channel  | route          | epoch  |
            | 4      | u8      | u8   | u16      | 16             | u32    |

The specification of a channel, never sent: both ends hash it into the handshake (``ChannelSpec.encode``):

    offset  0         16        32       48       64     65        66         68       76              84           92
            | attempt | subject | source | target | plan | version | channels | window | rekey records | rekey bytes |
            | 16      | 16      | 16     | 16     | u8   | u8      | u16      | u64    | u64           | u64         |

Source: docs/protocol/channel.md, sections 2 to 6.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from sealift.errors import ChannelUnexpected, InvalidInput, PrefaceInvalid

# Protocol constants: changing one breaks the protocol.

CHANNEL_VERSION: Final = 1
PROLOGUE_LABEL: Final = b"sealift-channel-v1"
MAGIC_SEALED: Final = b"SLFT"
MAGIC_PLAIN: Final = b"SLFP"
PREFACE_BYTES: Final = 28
ROUTE_BYTES: Final = 16
SPEC_BYTES: Final = 92
KEY_BYTES: Final = 32
NONCE_BYTES: Final = 8
TAG_BYTES: Final = 16
MESSAGE_BYTES: Final = 48
"""Both handshake messages: a 32-byte public key and the tag of an empty payload."""

HEADER_BYTES: Final = 4
RECORD_OVERHEAD: Final = HEADER_BYTES + TAG_BYTES
MAX_PAYLOAD: Final = 1 << 20
MAX_RECORD: Final = MAX_PAYLOAD + RECORD_OVERHEAD
OPEN_RECORD_BYTES: Final = 16 + RECORD_OVERHEAD

MAX_REKEY_RECORDS: Final = 1 << 24
MAX_REKEY_BYTES: Final = 1 << 36
"""64 GiB under one key: (s+q+1)^2/2^129 with s+q+1 <= 2^32 + 2^25 + 2^17 blocks is 2^-65 (channel.md, section 8)."""

LAST_SEQUENCE: Final = (1 << 64) - 2
"""The highest sequence number a record may have; 2^64-1 is never used, so that counting cannot wrap."""

CONTROL_FRAME_BYTES: Final = 4096
"""Longest JSON text of one control frame, without its two length bytes."""

_PREFACE: Final = struct.Struct(">4sBBH16sI")
_SPEC: Final = struct.Struct(">16s16s16s16sBBHQQQ")


class Kind(IntEnum):
    """What the byte stream of a connection is."""

    CONTROL = 1
    MAIN = 2
    MULTIFD = 3
    DISK = 4
    """Reserved: refused in this version."""
    LIBVIRT = 5
    """Reserved: refused in this version."""


class Plan(IntEnum):
    """How a move is protected; there is no default."""

    SEALED = 1
    PLAIN = 2
    """Never part of a handshake: a plain move has none."""


class RecordType(IntEnum):
    """What a record is. ``PAYLOAD_BYTES`` has the lengths each may have."""

    OPEN = 1
    """First record each way: (next expected offset u64, first retained offset u64), both 0: nothing came yet."""
    RESUME = 2
    """The same in place of OPEN, on every connection after the first that the sender saw confirmed."""
    DATA = 3
    ACK = 4
    """Next expected offset u64, cumulative: everything before it was written in full to the local socket."""
    END = 5
    """Authenticated end of the stream in this direction; occupies one offset."""
    HEARTBEAT = 6
    """Control channel only: (my clock in us, the peer's clock last heard or 0, us held between), each u64."""
    CLOSE = 7
    """The sender gives the channel up and says why (``CloseReason``)."""


PAYLOAD_BYTES: Final[dict[RecordType, tuple[int, int]]] = {
    RecordType.OPEN: (16, 16),
    RecordType.RESUME: (16, 16),
    RecordType.DATA: (1, MAX_PAYLOAD),
    RecordType.ACK: (8, 8),
    RecordType.END: (0, 0),
    RecordType.HEARTBEAT: (24, 24),
    RecordType.CLOSE: (1, 1),
}
"""Shortest and longest payload of each record type."""


class CloseReason(IntEnum):
    """Why a side gives a channel up."""

    MOVE_ENDED = 1
    """The move was ended by order (finished, cancelled or aborted)."""
    RECORD_REFUSED = 2
    """A record from the peer was forged, oversize or out of place."""
    LOCAL_BROKEN = 3
    """The local socket to QEMU ended in another way than by end of stream."""
    PEER_SILENT = 4
    """Nothing was heard on the control channel in time."""
    REPLACED = 5
    """Reserved: a connection that a newer one replaces is closed without a word."""
    OTHER_CHANNEL = 6
    """Another channel of the same move has ended badly."""
    INTERNAL = 7
    """A defect or an exhausted limit at the sender."""


@dataclass(frozen=True, slots=True)
class RekeyLimits:
    """After how many records or plaintext bytes (both counted since the last rekey) the next record has a new key.

    Raises InvalidInput above the protocol's limits or below 1.
    """

    records: int = MAX_REKEY_RECORDS
    bytes: int = MAX_REKEY_BYTES

    def __post_init__(self) -> None:
        if not 1 <= self.records <= MAX_REKEY_RECORDS or not 1 <= self.bytes <= MAX_REKEY_BYTES:
            raise InvalidInput(f"a rekey limit is outside 1..{MAX_REKEY_RECORDS} records or 1..{MAX_REKEY_BYTES} bytes")


@dataclass(frozen=True, slots=True)
class Preface:
    """The first bytes of a connection, in clear: which move it belongs to, and which of its channels it is.

    ``route`` is the attempt id of a sealed move, the one-time token of a plain one. ``epoch`` is raised by the source
    with every connect of a channel. Raises PrefaceInvalid for values that do not fit their fields.
    """

    plain: bool
    version: int
    kind: Kind
    channel: int
    route: bytes
    epoch: int

    def __post_init__(self) -> None:
        fits = 0 <= self.channel < 1 << 16 and 0 <= self.epoch < 1 << 32 and len(self.route) == ROUTE_BYTES
        if not fits or self.version != CHANNEL_VERSION:
            raise PrefaceInvalid("a preface has a field out of range")

    def encode(self) -> bytes:
        """The 28 bytes as they are sent."""
        magic = MAGIC_PLAIN if self.plain else MAGIC_SEALED
        return _PREFACE.pack(magic, self.version, self.kind, self.channel, self.route, self.epoch)

    @classmethod
    def decode(cls, data: bytes | bytearray | memoryview) -> Preface:
        """The preface that exactly these 28 bytes are; raises PrefaceInvalid for anything else."""
        if len(data) != PREFACE_BYTES:
            raise PrefaceInvalid(f"a preface has {PREFACE_BYTES} bytes, not {len(data)}")
        magic, version, kind, channel, route, epoch = _PREFACE.unpack(data)
        if magic not in (MAGIC_SEALED, MAGIC_PLAIN) or version != CHANNEL_VERSION:
            raise PrefaceInvalid("a connection did not begin with a preface of this version")
        try:
            known = Kind(kind)
        except ValueError:
            raise PrefaceInvalid("a preface names an unknown kind of channel") from None
        return cls(magic == MAGIC_PLAIN, version, known, channel, route, epoch)


@dataclass(frozen=True, slots=True)
class ChannelSpec:
    """The public part of a move's specification, which both ends must hold alike for a handshake to succeed.

    ``attempt``, ``subject`` (the VM's uuid), ``source`` and ``target`` (host ids) are 16 bytes each; ``channels``
    counts the data channels (1 main and N multifd, not the control channel); ``window`` is how many bytes a side may
    keep for resume in each direction, all data channels together. Raises InvalidInput for values that do not fit.
    """

    attempt: bytes
    subject: bytes
    source: bytes
    target: bytes
    plan: Plan
    version: int
    channels: int
    window: int
    rekey_records: int
    rekey_bytes: int

    def __post_init__(self) -> None:
        if any(len(i) != ROUTE_BYTES for i in (self.attempt, self.subject, self.source, self.target)):
            raise InvalidInput(f"an id in a channel specification does not have {ROUTE_BYTES} bytes")
        if not 1 <= self.channels < 1 << 16 or not 0 <= self.window < 1 << 64:
            raise InvalidInput("a channel specification has a number out of range")
        if self.version != CHANNEL_VERSION or self.plan not in tuple(Plan):
            raise InvalidInput(f"a channel specification is not of version {CHANNEL_VERSION}, or has an unknown plan")
        _ = self.limits

    @property
    def limits(self) -> RekeyLimits:
        """When records get a new key."""
        return RekeyLimits(self.rekey_records, self.rekey_bytes)

    def encode(self) -> bytes:
        """The fixed-width layout whose SHA-256 is part of the prologue (92 bytes)."""
        return _SPEC.pack(
            *(self.attempt, self.subject, self.source, self.target),
            *(self.plan, self.version, self.channels, self.window, self.rekey_records, self.rekey_bytes),
        )

    def preface(self, channel: int, epoch: int) -> Preface:
        """The preface of one connection of this sealed move; raises ChannelUnexpected if it has no such channel."""
        preface = Preface(False, self.version, kind_of(channel), channel, self.attempt, epoch)
        self.admit(preface)
        return preface

    def admit(self, preface: Preface) -> None:
        """Refuse a preface that names another move, or a channel this one does not have, with ChannelUnexpected."""
        if preface.plain or self.plan != Plan.SEALED or preface.route != self.attempt:
            raise ChannelUnexpected("a connection names another move than this sealed one")
        if preface.kind is not kind_of(preface.channel) or preface.channel > self.channels:
            raise ChannelUnexpected(f"this move has no channel {preface.channel} of kind {preface.kind.name.lower()}")


def kind_of(channel: int) -> Kind:
    """The kind that a channel number has in this version: 0 control, 1 main, from 2 multifd."""
    if channel == 0:
        return Kind.CONTROL
    return Kind.MAIN if channel == 1 else Kind.MULTIFD
