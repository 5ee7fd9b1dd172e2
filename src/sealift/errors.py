"""Every error of Sealift: one root, and for each class a stable slug, an HTTP status and an exit code.

    SealiftError
    ├── InvalidInput, NotFound, AlreadyExists, Conflict                 the request cannot be carried out as asked
    ├── AuthenticationError                                             who are you?
    │   ├── NotAuthenticated, TokenInvalid, TokenUsed, TokenExpired
    │   └── FingerprintMismatch, HostIdentityMismatch
    ├── Unreachable                                                     nobody answered
    │   └── ControllerUnreachable, HostUnreachable
    ├── PlanRefused, HostNameTaken, StaleFence, VmLetGo                 we will not, and say why
    ├── HypervisorError                                                 QEMU, or what it stands on
    │   └── QemuMissing, QmpTimeout, QmpRefused, QemuGone, ContRefused, AcceleratorUnavailable, HardwareMismatch,
    │       DatastoreNotShared
    ├── MigrationError                                                  how a migration can end, other than done
    │   └── MigrationFailed, MigrationCancelled, OutcomeUnknown, VmCrashed
    ├── ChannelError                                                    the sealed channel
    │   ├── PrefaceInvalid, HandshakeFailed, EpochStale, ChannelUnexpected, OpenMissing
    │   ├── RecordForged, RecordOversize, RecordUnexpected, StreamTruncated, SequenceExhausted
    │   └── PeerSilent, PeerClosed, PeerUnreachable, LocalPeerRefused, LocalClosed, ChannelAborted, RelayGone
    ├── ToolMissing                                                     a program or package the demonstration needs
    ├── SelfTestFailed                                                  the cipher here computes something else
    ├── MemoryUnprotected                                               dumps of a process with keys are not forbidden
    └── IllegalTransition                                               our bug: the lifecycle has no such step

The first line of each docstring is the error's line in ``docs/errors.md``. A message says what happened, to which VM
and host; ``todo`` says what to do next. Neither may quote a secret, and neither may quote a malformed request.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar


class SealiftError(Exception):
    """Something unexpected went wrong inside Sealift; the log of the process that said so has the details."""

    slug: ClassVar[str] = "internal"
    status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, todo: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.todo = todo

    def __str__(self) -> str:
        return f"{self.what} ({self.todo})" if self.todo else self.what


class InvalidInput(SealiftError):
    """The request or file does not say what it must; nothing was changed."""

    slug, status, exit_code = "invalid_input", 422, 2


class NotFound(SealiftError):
    """There is no such host, VM, migration or page."""

    slug, status, exit_code = "not_found", 404, 4


class AlreadyExists(SealiftError):
    """Something of that name or uuid is already there."""

    slug, status, exit_code = "already_exists", 409, 4


class Conflict(SealiftError):
    """The VM, host or migration is not in a state that allows this now."""

    slug, status, exit_code = "conflict", 409, 4


class AuthenticationError(SealiftError):
    """The other side could not show who it is."""

    slug, status, exit_code = "authentication_failed", 401, 6


class NotAuthenticated(AuthenticationError):
    """The request carries no valid access token; run `sealift login`."""

    slug, status, exit_code = "not_authenticated", 401, 6


class TokenInvalid(AuthenticationError):
    """The join token is not one this controller gave out."""

    slug, status, exit_code = "token_invalid", 401, 6


class TokenUsed(AuthenticationError):
    """The join token was used already, by another key."""

    slug, status, exit_code = "token_used", 401, 6


class TokenExpired(AuthenticationError):
    """The join token is older than its hour; make a new one with `sealift host token`."""

    slug, status, exit_code = "token_expired", 401, 6


class FingerprintMismatch(AuthenticationError):
    """The controller's authority is not the one the token names: wrong address, or somebody is in between."""

    slug, status, exit_code = "fingerprint_mismatch", 502, 6


class HostIdentityMismatch(AuthenticationError):
    """Whoever answers at a host's address is not that host; no order was sent."""

    slug, status, exit_code = "host_identity_mismatch", 502, 6


class Unreachable(SealiftError):
    """Nobody answered in time."""

    slug, status, exit_code = "unreachable", 502, 5


class ControllerUnreachable(Unreachable):
    """The controller did not answer at its address."""

    slug, status, exit_code = "controller_unreachable", 502, 5


class HostUnreachable(Unreachable):
    """The host's agent did not answer the controller."""

    slug, status, exit_code = "host_unreachable", 502, 5


class PlanRefused(SealiftError):
    """The migration was refused before anything moved; the message says by whom and why."""

    slug, status, exit_code = "plan_refused", 409, 3


class HostNameTaken(SealiftError):
    """A host of that name has joined already; a token made with `--replaces` lets a new machine take its place."""

    slug, status, exit_code = "host_name_taken", 409, 4


class StaleFence(SealiftError):
    """The order carries a lower fence number than one already seen for this VM: it comes from the past."""

    slug, status, exit_code = "stale_fence", 409, 4


class VmLetGo(SealiftError):
    """This host has let the VM go in a migration; starting it here could run it twice."""

    slug, status, exit_code = "vm_let_go", 409, 3


class HypervisorError(SealiftError):
    """QEMU did not do what it was asked."""

    slug, status, exit_code = "hypervisor_failed", 500, 7


class QemuMissing(HypervisorError):
    """QEMU is not installed on the host, or not where the configuration says."""

    slug, status, exit_code = "qemu_missing", 500, 7


class QmpTimeout(HypervisorError):
    """QEMU did not answer a QMP command in time."""

    slug, status, exit_code = "qmp_timeout", 504, 7


class QmpRefused(HypervisorError):
    """QEMU refused a QMP command, and said why."""

    slug, status, exit_code = "qmp_refused", 500, 7


class QemuGone(HypervisorError):
    """The QEMU process of the VM has ended."""

    slug, status, exit_code = "qemu_gone", 500, 7


class ContRefused(HypervisorError):
    """The guest was not let run, because in QEMU's present state that could make two copies run."""

    slug, status, exit_code = "cont_refused", 409, 7


class AcceleratorUnavailable(HypervisorError):
    """The configured accelerator does not run a virtual CPU on this host."""

    slug, status, exit_code = "accelerator_unavailable", 409, 7


class HardwareMismatch(HypervisorError):
    """The target host cannot build the very hardware the VM runs on."""

    slug, status, exit_code = "hardware_mismatch", 409, 3


class DatastoreNotShared(HypervisorError):
    """The target host does not see the file that the source host has just written beside the disk."""

    slug, status, exit_code = "datastore_not_shared", 409, 3


class MigrationError(SealiftError):
    """A migration ended in another way than done."""

    slug, status, exit_code = "migration_error", 500, 7


class MigrationFailed(MigrationError):
    """The migration failed; the VM runs at the source as before, and nothing is left at the target."""

    slug, status, exit_code = "migration_failed", 500, 7


class MigrationCancelled(MigrationError):
    """The migration was cancelled; the VM runs at the source as before, and nothing is left at the target."""

    slug, status, exit_code = "migration_cancelled", 409, 8


class OutcomeUnknown(MigrationError):
    """It cannot be known from here which host has the VM; it is left paused, and a person must look."""

    slug, status, exit_code = "outcome_unknown", 500, 9


class VmCrashed(MigrationError):
    """The VM's QEMU ended during the migration; the VM can be started again from its disk at its host."""

    slug, status, exit_code = "vm_crashed", 500, 10


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


class ToolMissing(SealiftError):
    """A program or package that the demonstration's guest is built with is not to be had on this machine."""

    slug, status, exit_code = "tool_missing", 500, 1


class SelfTestFailed(SealiftError):
    """The cipher on this host does not compute its known answers; sealed moves are refused here."""

    slug, status, exit_code = "self_test_failed", 500, 1


class MemoryUnprotected(SealiftError):
    """The kernel did not let a process that will hold keys forbid dumps of its memory; the process did not start."""

    slug, status, exit_code = "memory_unprotected", 500, 1


class IllegalTransition(SealiftError):
    """The lifecycle has no such step from the present state (a defect in Sealift)."""

    slug, status, exit_code = "illegal_transition", 500, 1


def all_errors() -> list[type[SealiftError]]:
    """Every error class, root first, in the order of definition."""
    found: list[type[SealiftError]] = []
    waiting: list[type[SealiftError]] = [SealiftError]
    while waiting:
        cls = waiting.pop(0)
        found.append(cls)
        waiting.extend(cls.__subclasses__())
    return found


def from_slug(slug: str, what: str, todo: str = "") -> SealiftError:
    """The error that crossed the wire as ``slug``, as its own class again; the root class if we do not know it."""
    for cls in all_errors():
        if cls.slug == slug:
            return cls(what, todo=todo)
    return SealiftError(f"{slug}: {what}", todo=todo)


def to_problem(error: SealiftError) -> dict[str, Any]:
    """The problem document (RFC 9457) of an error, with ``slug`` and ``todo`` as extension members."""
    return {
        "type": "about:blank",
        "title": (type(error).__doc__ or "").strip(),
        "status": error.status,
        "detail": error.what,
        "slug": error.slug,
        "todo": error.todo,
    }


def from_problem(body: bytes, status: int) -> SealiftError:
    """The error in a problem document; the root class when the answer is something else."""
    try:
        document = json.loads(body)
        return from_slug(str(document["slug"]), str(document["detail"]), str(document.get("todo", "")))
    except (ValueError, KeyError, TypeError):
        return SealiftError(f"the answer was HTTP {status} and not one of Sealift's")
