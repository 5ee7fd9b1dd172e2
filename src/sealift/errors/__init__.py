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
    ├── KeyProviderError                                                a key provider, or a key of it
    │   ├── ProviderUnreachable, ProviderRefused, ProviderImpostor, ProviderAnswerInvalid, ProviderNotExported
    │   └── KeyMissing, KeyNotActive, ExportInvalid, PassphraseWeak
    ├── EncryptionError                                                 an encrypted VM
    │   ├── VmLocked, VmTampered, BundleInvalid, UnwrapFailed, KeysNotHeld
    │   └── ConversionFailed, ConversionCancelled, DatastoreFull
    ├── ToolMissing                                                     a program or package the demonstration needs
    ├── SelfTestFailed                                                  the cipher here computes something else
    ├── MemoryUnprotected                                               dumps of a process with keys are not forbidden
    └── IllegalTransition                                               our bug: the lifecycle has no such step

The first line of each docstring is the error's line in ``docs/errors.md``. A message says what happened, to which VM
and host; ``todo`` says what to do next. Neither may quote a secret, and neither may quote a malformed request.
"""

from __future__ import annotations

from sealift.errors.base import (
    AlreadyExists,
    AuthenticationError,
    Conflict,
    ControllerUnreachable,
    FingerprintMismatch,
    HostIdentityMismatch,
    HostNameTaken,
    HostUnreachable,
    IllegalTransition,
    InvalidInput,
    MemoryUnprotected,
    NotAuthenticated,
    NotFound,
    PlanRefused,
    SealiftError,
    SelfTestFailed,
    StaleFence,
    TokenExpired,
    TokenInvalid,
    TokenUsed,
    ToolMissing,
    Unreachable,
    VmLetGo,
    all_errors,
    from_problem,
    from_slug,
    to_problem,
)
from sealift.errors.channel import (
    BytesNotRetained,
    ChannelAborted,
    ChannelError,
    ChannelUnexpected,
    EpochStale,
    HandshakeFailed,
    LocalClosed,
    LocalPeerRefused,
    OffsetInvalid,
    OpenMissing,
    PeerClosed,
    PeerSilent,
    PeerUnreachable,
    PrefaceInvalid,
    RecordForged,
    RecordOversize,
    RecordUnexpected,
    RelayGone,
    SequenceExhausted,
    StreamTruncated,
)
from sealift.errors.keys import (
    BundleInvalid,
    ConversionCancelled,
    ConversionFailed,
    DatastoreFull,
    EncryptionError,
    ExportInvalid,
    KeyMissing,
    KeyNotActive,
    KeyProviderError,
    KeysNotHeld,
    PassphraseWeak,
    ProviderAnswerInvalid,
    ProviderImpostor,
    ProviderNotExported,
    ProviderRefused,
    ProviderUnreachable,
    UnwrapFailed,
    VmLocked,
    VmTampered,
)
from sealift.errors.machines import (
    AcceleratorUnavailable,
    ContRefused,
    DatastoreNotShared,
    HardwareMismatch,
    HypervisorError,
    MigrationCancelled,
    MigrationError,
    MigrationFailed,
    OutcomeUnknown,
    QemuGone,
    QemuMissing,
    QmpRefused,
    QmpTimeout,
    VmCrashed,
)

__all__ = [
    "AcceleratorUnavailable",
    "AlreadyExists",
    "AuthenticationError",
    "BundleInvalid",
    "BytesNotRetained",
    "ChannelAborted",
    "ChannelError",
    "ChannelUnexpected",
    "Conflict",
    "ContRefused",
    "ControllerUnreachable",
    "ConversionCancelled",
    "ConversionFailed",
    "DatastoreFull",
    "DatastoreNotShared",
    "EncryptionError",
    "EpochStale",
    "ExportInvalid",
    "FingerprintMismatch",
    "HandshakeFailed",
    "HardwareMismatch",
    "HostIdentityMismatch",
    "HostNameTaken",
    "HostUnreachable",
    "HypervisorError",
    "IllegalTransition",
    "InvalidInput",
    "KeyMissing",
    "KeyNotActive",
    "KeyProviderError",
    "KeysNotHeld",
    "LocalClosed",
    "LocalPeerRefused",
    "MemoryUnprotected",
    "MigrationCancelled",
    "MigrationError",
    "MigrationFailed",
    "NotAuthenticated",
    "NotFound",
    "OffsetInvalid",
    "OpenMissing",
    "OutcomeUnknown",
    "PassphraseWeak",
    "PeerClosed",
    "PeerSilent",
    "PeerUnreachable",
    "PlanRefused",
    "PrefaceInvalid",
    "ProviderAnswerInvalid",
    "ProviderImpostor",
    "ProviderNotExported",
    "ProviderRefused",
    "ProviderUnreachable",
    "QemuGone",
    "QemuMissing",
    "QmpRefused",
    "QmpTimeout",
    "RecordForged",
    "RecordOversize",
    "RecordUnexpected",
    "RelayGone",
    "SealiftError",
    "SelfTestFailed",
    "SequenceExhausted",
    "StaleFence",
    "StreamTruncated",
    "TokenExpired",
    "TokenInvalid",
    "TokenUsed",
    "ToolMissing",
    "Unreachable",
    "UnwrapFailed",
    "VmCrashed",
    "VmLetGo",
    "VmLocked",
    "VmTampered",
    "all_errors",
    "from_problem",
    "from_slug",
    "to_problem",
]
