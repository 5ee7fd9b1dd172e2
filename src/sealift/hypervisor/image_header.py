"""What the first bytes of an image say of it; pure.

Sources: QEMU docs/interop/qcow2 (header, big-endian); LUKS1 on-disk format specification 1.2.3, section 2.2 (header,
big-endian). Both tell without a key what is needed here, the size that the guest sees included.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Literal

from sealift.errors import HypervisorError

HEAD_BYTES = 592
"""As much of an image as ``parse`` looks at: a LUKS1 header."""

SECTOR_BYTES = 512

_QCOW2_MAGIC = 0x514649FB
_EXTERNAL_DATA = 1 << 2  # incompatible feature bit
_CRYPT_LUKS = 2
_LUKS_MAGIC = b"LUKS\xba\xbe"
_QEMU_PAYLOAD_SECTORS = 4040
"""Where QEMU lets the data begin behind its LUKS headers with AES-256-XTS; cryptsetup(8) aligns it to 1 MiB."""


@dataclass(frozen=True)
class ImageHeader:
    """``virtual_bytes`` is the size that the guest sees, a multiple of 512. ``encrypted``: by QEMU, as LUKS."""

    virtual_bytes: int
    encrypted: bool
    other_cipher: bool = False  # encrypted, but not as LUKS
    snapshots: int = 0
    refers: bool = False  # to another file: a backing file or external data


def parse(head: bytes, format: Literal["qcow2", "raw"], file_bytes: int) -> ImageHeader:
    """Parse the first ``HEAD_BYTES`` of an image (fewer of a shorter one) of ``file_bytes`` in all.

    Raises HypervisorError for what is no qcow2 image. Any content is a raw image; with a LUKS header as QEMU writes
    one it is an encrypted one. A guest's own LUKS on a whole raw disk is data like any other.
    """
    return _qcow2(head) if format == "qcow2" else _raw(head, file_bytes)


def _qcow2(head: bytes) -> ImageHeader:
    magic, version, backing, _, _, size, crypt = struct.unpack_from(">IIQIIQI", head.ljust(HEAD_BYTES, b"\0"))
    if magic != _QCOW2_MAGIC or version not in (2, 3):
        raise HypervisorError("it is not a qcow2 image", todo="correct its format in the VM file")
    (snapshots,) = struct.unpack_from(">I", head.ljust(HEAD_BYTES, b"\0"), 60)
    (features,) = struct.unpack_from(">Q", head.ljust(HEAD_BYTES, b"\0"), 72)
    return ImageHeader(
        virtual_bytes=size // SECTOR_BYTES * SECTOR_BYTES,
        encrypted=crypt == _CRYPT_LUKS,
        other_cipher=crypt not in (0, _CRYPT_LUKS),
        snapshots=snapshots,
        refers=bool(backing) or (version >= 3 and bool(features & _EXTERNAL_DATA)),
    )


def _raw(head: bytes, file_bytes: int) -> ImageHeader:
    sectors = -(-file_bytes // SECTOR_BYTES)  # QEMU fills the last one up
    if head.startswith(_LUKS_MAGIC) and len(head) >= HEAD_BYTES:
        version, payload = struct.unpack_from(">H", head, 6)[0], struct.unpack_from(">I", head, 104)[0]
        if (version, payload) == (1, _QEMU_PAYLOAD_SECTORS) and sectors >= payload:
            return ImageHeader((sectors - payload) * SECTOR_BYTES, encrypted=True)
    return ImageHeader(sectors * SECTOR_BYTES, encrypted=False)
