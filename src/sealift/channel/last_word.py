"""What the other host is told of why a move ended, from the error that ended it here. Pure."""

from __future__ import annotations

from typing import Final

from sealift.channel.protocol import CloseReason
from sealift.errors import (
    ChannelAborted,
    LocalClosed,
    LocalPeerRefused,
    PeerClosed,
    PeerSilent,
    PeerUnreachable,
    RecordForged,
    RecordOversize,
    RecordUnexpected,
    SealiftError,
    StreamTruncated,
)

_REASONS: Final[list[tuple[tuple[type[SealiftError], ...], CloseReason]]] = [
    ((ChannelAborted,), CloseReason.MOVE_ENDED),
    ((RecordForged, RecordOversize, RecordUnexpected), CloseReason.RECORD_REFUSED),
    ((LocalClosed, LocalPeerRefused), CloseReason.LOCAL_BROKEN),
    ((PeerSilent,), CloseReason.PEER_SILENT),
    ((StreamTruncated, PeerClosed, PeerUnreachable), CloseReason.OTHER_CHANNEL),
]


def close_reason(error: SealiftError | None) -> CloseReason:
    """The reason of the close record; INTERNAL for what the other host need not understand."""
    return next((reason for classes, reason in _REASONS if isinstance(error, classes)), CloseReason.INTERNAL)
