"""Known answers that the cipher of this host must give before it may take part in a sealed move.

A counted set: a published AES-256-GCM vector through the very calls the channel uses, both ways and with a flipped
bit, and one frozen record of ours with the key change that follows it. Pure; takes well under a millisecond.
"""

from __future__ import annotations

from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from sealift.channel.protocol import TAG_BYTES, RecordType, RekeyLimits
from sealift.channel.records import RecordOpener, RecordSealer
from sealift.errors import RecordForged, SelfTestFailed
from sealift.secret import Secret

CHECKS: Final = 6

# McGrew and Viega, "The Galois/Counter Mode of Operation (GCM)", appendix B, test case 16.
_KEY: Final = bytes.fromhex("feffe9928665731c6d6a8f9467308308feffe9928665731c6d6a8f9467308308")
_IV: Final = bytes.fromhex("cafebabefacedbaddecaf888")
_ASSOCIATED: Final = bytes.fromhex("feedfacedeadbeeffeedfacedeadbeefabaddad2")
_PLAINTEXT: Final = bytes.fromhex(
    "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72"
    "1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39"
)
_SEALED: Final = bytes.fromhex(
    "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa"
    "8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662"
    "76fc6ece0f4e1768cddf8853bb2d551b"
)

# Two records sealed under _KEY with a key change between them; frozen with the channel's version.
_NONCE: Final = bytes.fromhex("0011223344556677")
_PAYLOADS: Final = (b"sealift", b"known answer")
_RECORDS: Final = (
    bytes.fromhex("0300000793368c01282a9c45057134a90d7309414e4593bc98b5e9"),
    bytes.fromhex("0300000c94445a202c980c264c99ccc48067bd0aae34b19db281beca67c4284e"),
)


def run() -> int:
    """Run every check and return how many there were (``CHECKS``); raises SelfTestFailed at the first wrong answer."""
    passed = 0
    for check in (_seal, _open, _refuse, _seal_records, _open_records, _refuse_record):
        check()
        passed += 1
    if passed != CHECKS:
        raise SelfTestFailed(f"the self-test of the cipher ran {passed} checks instead of {CHECKS}")
    return passed


def _seal() -> None:
    out = bytearray(len(_SEALED))
    AESGCM(_KEY).encrypt_into(_IV, _PLAINTEXT, _ASSOCIATED, out)
    _expect(out == _SEALED, "AES-256-GCM encryption")


def _open() -> None:
    out = bytearray(len(_PLAINTEXT))
    try:
        AESGCM(_KEY).decrypt_into(_IV, _SEALED, _ASSOCIATED, out)
    except InvalidTag:
        _expect(False, "AES-256-GCM verification")
    _expect(out == _PLAINTEXT, "AES-256-GCM decryption")


def _refuse() -> None:
    flipped = bytearray(_SEALED)
    flipped[-1] ^= 1
    try:
        AESGCM(_KEY).decrypt_into(_IV, flipped, _ASSOCIATED, bytearray(len(_PLAINTEXT)))
    except InvalidTag:
        return
    _expect(False, "the refusal of a wrong tag")


def _seal_records() -> None:
    sealer = RecordSealer(*_state())
    for payload, record in zip(_PAYLOADS, _RECORDS, strict=True):
        out = bytearray(len(record))
        _expect(sealer.seal_into(RecordType.DATA, payload, memoryview(out)) == len(record), "a record's length")
        _expect(out == record, "sealing a record")


def _open_records() -> None:
    opener = RecordOpener(*_state())
    for payload, record in zip(_PAYLOADS, _RECORDS, strict=True):
        out = bytearray(len(payload))
        try:
            opener.open_into(opener.header(record), memoryview(record)[4:], memoryview(out))
        except RecordForged:
            _expect(False, "verifying a record")
        _expect(out == payload, "opening a record")


def _refuse_record() -> None:
    opener = RecordOpener(*_state())
    # The second record in the first one's place.
    record, out = _RECORDS[1], bytearray(len(_RECORDS[1]) - TAG_BYTES)
    try:
        opener.open_into(opener.header(record), memoryview(record)[4:], memoryview(out))
    except RecordForged:
        return
    _expect(False, "the refusal of a record out of order")


def _state() -> tuple[Secret, Secret, RekeyLimits]:
    return Secret(_KEY, length=32), Secret(_NONCE, length=8), RekeyLimits(records=1)


def _expect(right: bool, what: str) -> None:
    if not right:
        raise SelfTestFailed(
            f"the cipher of this host gave a wrong answer: {what}",
            todo="check the installation of the Python package `cryptography` and the machine's memory",
        )
