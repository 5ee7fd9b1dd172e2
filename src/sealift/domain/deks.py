"""Data-encryption keys (DEKs) on their way from a controller to a host: raw bytes behind the JSON of an order.

As with a move's key (``domain.move``), no JSON parser and no validation error ever holds one. A frame is

    offset  size     field
    0       4        length n of the JSON, big-endian
    4       n        the order as JSON, UTF-8
    4+n     2        number k of keys, big-endian
    6+n     48 * k   each key: its id (a UUID's 16 bytes), then its 32 bytes

``encode_keys`` and ``decode_keys`` are the last two fields alone.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final
from uuid import UUID

from sealift.errors import InvalidInput
from sealift.secret import Secret

DEK_BYTES: Final = 32
_ID_BYTES: Final = 16
_ITEM: Final = _ID_BYTES + DEK_BYTES
MAX_KEYS: Final = 64
MAX_FRAME_BYTES: Final = 1 << 20

Deks = Mapping[UUID, Secret]
"""Keys of one VM by their ids."""


def wipe(deks: Deks) -> None:
    """Overwrite them all."""
    for dek in deks.values():
        dek.wipe()


def encode_keys(deks: Deks) -> bytes:
    """The keys as bytes."""
    return struct.pack(">H", len(deks)) + b"".join(dek_id.bytes + dek.reveal() for dek_id, dek in deks.items())


def decode_keys(raw: bytes) -> dict[UUID, Secret]:
    """Parse keys; raises InvalidInput, which never quotes what it was given."""
    bad = InvalidInput("the order's keys are malformed", todo="controller and agent must be of matching versions")
    if len(raw) < 2:
        raise bad
    (count,) = struct.unpack_from(">H", raw)
    if count > MAX_KEYS or len(raw) != 2 + count * _ITEM:
        raise bad
    found: dict[UUID, Secret] = {}
    for offset in range(2, len(raw), _ITEM):
        dek_id = UUID(bytes=raw[offset : offset + _ID_BYTES])
        if dek_id in found:
            raise bad
        found[dek_id] = Secret(raw[offset + _ID_BYTES : offset + _ITEM], length=DEK_BYTES)
    return found


def encode_frame(order: bytes, deks: Deks) -> bytes:
    """An order and the keys that go with it."""
    return struct.pack(">I", len(order)) + order + encode_keys(deks)


def decode_frame(body: bytes) -> tuple[bytes, dict[UUID, Secret]]:
    """The order's JSON, not yet validated, and its keys; raises InvalidInput."""
    if len(body) >= 4 and len(body) <= MAX_FRAME_BYTES:
        (length,) = struct.unpack_from(">I", body)
        if length <= len(body) - 4:
            return body[4 : 4 + length], decode_keys(body[4 + length :])
    raise InvalidInput("the order is malformed", todo="controller and agent must be of matching versions")
