"""The sealed channel."""

from __future__ import annotations

from sealift.errors.base import SealiftError


class ChannelError(SealiftError):
    """The sealed channel ended in another way than it should."""

    slug, status, exit_code = "channel_failed", 502, 7


class PrefaceInvalid(ChannelError):
    """A connection did not begin with a preface of ours within two seconds."""

    slug = "preface_invalid"


class HandshakeFailed(ChannelError):
    """The peer does not hold this move's key, nonce and spec, or its handshake was altered on the way."""

    slug = "handshake_failed"


class EpochStale(ChannelError):
    """A connection carried an epoch that was confirmed before: an old recording, or a late duplicate."""

    slug = "epoch_stale"


class ChannelUnexpected(ChannelError):
    """A connection named a channel number or kind that this move does not have."""

    slug = "channel_unexpected"


class OpenMissing(ChannelError):
    """After the handshake the peer did not prove itself with a first record in time."""

    slug = "open_missing"


class RecordForged(ChannelError):
    """A record did not authenticate: it was changed, replayed, reordered, reflected, or sealed under another key."""

    slug = "record_forged"


class RecordOversize(ChannelError):
    """A record announced a length that its type does not allow."""

    slug = "record_oversize"


class RecordUnexpected(ChannelError):
    """A record's type is unknown, or not allowed at this point of the stream."""

    slug = "record_unexpected"


class StreamTruncated(ChannelError):
    """The connection ended before the authenticated end of the stream."""

    slug = "stream_truncated"


class SequenceExhausted(ChannelError):
    """A connection used up its sequence numbers."""

    slug = "sequence_exhausted"


class OffsetInvalid(ChannelError):
    """The peer named an offset below what it had acknowledged, or above what was ever sent to it."""

    slug = "offset_invalid"


class BytesNotRetained(ChannelError):
    """The peer no longer holds bytes of the stream that this side has not received; nobody skips them."""

    slug = "bytes_not_retained"


class PeerSilent(ChannelError):
    """Nothing was heard from the other host's relay for five seconds."""

    slug = "peer_silent"


class PeerClosed(ChannelError):
    """The other host's relay closed the channel and gave a reason."""

    slug = "peer_closed"


class PeerUnreachable(ChannelError):
    """No connection to the target host's migration address could be made."""

    slug = "peer_unreachable"


class LocalPeerRefused(ChannelError):
    """Another process than the expected one connected to a relay's local socket."""

    slug = "local_peer_refused"


class LocalClosed(ChannelError):
    """The process whose stream a channel carries closed its socket before all of the stream was handed over."""

    slug = "local_closed"


class ChannelAborted(ChannelError):
    """The move's channels were closed by order of this host's agent."""

    slug = "channel_aborted"


class RelayGone(ChannelError):
    """The relay process of this move has ended."""

    slug = "relay_gone"
