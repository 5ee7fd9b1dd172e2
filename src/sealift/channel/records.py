"""Records: header in clear, payload and tag sealed with AES-256-GCM.

    offset  0      1                4                      4 + length          20 + length
            | type | length u24     | ciphertext (length)  | tag (16)          |
            |<-- header, in clear ->|

    associated data (12 bytes): header (4) | sequence number u64
    IV              (12 bytes): 0 0 0 0    | nonce u64 XOR sequence number u64

The sequence number is not sent: it counts the records of one direction of one connection from 0, goes on across
rekeys, and never wraps. Sealing and opening change nothing when they refuse, except that an opener that met a forged
record is spent. Source: docs/protocol/channel.md, sections 5 to 8.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from sealift.channel.protocol import (
    HEADER_BYTES,
    KEY_BYTES,
    LAST_SEQUENCE,
    PAYLOAD_BYTES,
    TAG_BYTES,
    RecordType,
    RekeyLimits,
)
from sealift.errors import RecordForged, RecordOversize, RecordUnexpected, SequenceExhausted
from sealift.secret import Secret

_WORD_AND_SEQUENCE: Final = struct.Struct(">IQ")
_HEADER: Final = struct.Struct(">I")
_TYPES: Final = {int(kind): kind for kind in RecordType}
# No record's IV can be this one: those begin with four zero bytes.
_REKEY_IV: Final = b"\xff" * 12


class RecordHeader(NamedTuple):
    """The clear part of a record: its type and the length of its plaintext in bytes."""

    type: RecordType
    length: int


class _Direction:
    """Key, sequence number and rekey counters of one direction; both ends keep one and they move in step."""

    def __init__(self, key: Secret, nonce: Secret, limits: RekeyLimits) -> None:
        self._cipher = AESGCM(key.reveal())
        self._nonce = int.from_bytes(nonce.reveal(), "big")
        self._limits = limits
        self._key_records = 0
        self._key_bytes = 0
        self._sequence = 0
        self._rekeys = 0

    @property
    def records(self) -> int:
        """Records so far, which is also the next sequence number."""
        return self._sequence

    @property
    def rekeys(self) -> int:
        """How often this direction has changed its key."""
        return self._rekeys

    def _next(self, kind: RecordType, length: int) -> tuple[bytes, bytes]:
        """IV and associated data of the next record; raises SequenceExhausted."""
        sequence = self._sequence
        if sequence > LAST_SEQUENCE:
            raise SequenceExhausted("a connection of a sealed channel has used up its sequence numbers")
        associated = _WORD_AND_SEQUENCE.pack(kind << 24 | length, sequence)
        return _WORD_AND_SEQUENCE.pack(0, self._nonce ^ sequence), associated

    def _count(self, length: int) -> None:
        """Count a record that was sealed or opened, and change the key when a limit is reached."""
        self._sequence += 1
        self._key_records += 1
        self._key_bytes += length
        if self._key_records >= self._limits.records or self._key_bytes >= self._limits.bytes:
            self._cipher = AESGCM(self._cipher.encrypt(_REKEY_IV, bytes(KEY_BYTES), None)[:KEY_BYTES])
            self._key_records = self._key_bytes = 0
            self._rekeys += 1


class RecordSealer(_Direction):
    """Turns payloads into records, in the order in which they will be sent. Not for two threads at once.

    The key is copied into the cipher; the caller may wipe its secret afterwards.
    """

    def seal_into(self, kind: RecordType, payload: bytes | bytearray | memoryview, out: memoryview) -> int:
        """Write one record to the start of ``out`` and return its length, ``len(payload) + 20``.

        ``out`` must not overlap ``payload``. Raises RecordOversize for a length the type does not have,
        SequenceExhausted, and ValueError if ``out`` is too small; nothing was sealed then.
        """
        length = len(payload)
        shortest, longest = PAYLOAD_BYTES[kind]
        if not shortest <= length <= longest:
            raise RecordOversize(f"a {kind.name} record cannot have {length} bytes")
        end = HEADER_BYTES + length + TAG_BYTES
        if len(out) < end:
            raise ValueError(f"{end} bytes are needed to seal into, {len(out)} were given")
        iv, associated = self._next(kind, length)
        out[:HEADER_BYTES] = associated[:HEADER_BYTES]
        self._cipher.encrypt_into(iv, payload, associated, out[HEADER_BYTES:end])
        self._count(length)
        return end


class RecordOpener(_Direction):
    """Turns records back into payloads, in the order in which they were received. Not for two threads at once.

    After RecordForged every further call raises RecordForged.
    """

    def __init__(self, key: Secret, nonce: Secret, limits: RekeyLimits) -> None:
        super().__init__(key, nonce, limits)
        self._spent = False

    def header(self, view: bytes | bytearray | memoryview) -> RecordHeader:
        """The header in the first 4 bytes, not yet authentic: enough to refuse it before anything is buffered.

        Raises RecordUnexpected for an unknown type, RecordOversize for a length the type does not have.
        """
        (word,) = _HEADER.unpack_from(view)
        length = word & 0xFFFFFF
        kind = _TYPES.get(word >> 24)
        if kind is None:
            raise RecordUnexpected("the peer sent a record of an unknown type")
        shortest, longest = PAYLOAD_BYTES[kind]
        if not shortest <= length <= longest:
            raise RecordOversize(f"the peer announced a {kind.name} record of {length} bytes")
        return RecordHeader(kind, length)

    def open_into(self, header: tuple[RecordType, int], body: memoryview, out: memoryview) -> int:
        """Verify ``body`` (ciphertext and tag), write its plaintext to the start of ``out``, return its length.

        ``out`` must be private to the caller, since the cipher writes there before it has verified; it is overwritten
        when it did not. Raises RecordForged, SequenceExhausted, and ValueError for buffers of the wrong size.
        """
        if self._spent:
            raise _forged()
        kind, length = header
        if len(body) != length + TAG_BYTES or len(out) < length:
            raise ValueError("the buffers to open a record do not have its size")
        iv, associated = self._next(kind, length)
        plaintext = out[:length]
        try:
            self._cipher.decrypt_into(iv, body, associated, plaintext)
        except InvalidTag:
            self._spent = True
            plaintext[:] = bytes(length)
            raise _forged() from None
        self._count(length)
        return length


def _forged() -> RecordForged:
    return RecordForged(
        "a record on a sealed channel did not authenticate",
        todo="start the migration again; if it repeats, somebody alters the traffic between the two hosts",
    )
