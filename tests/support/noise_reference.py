"""The handshake's two messages written a second time, from docs/protocol/channel.md and primitives alone.

The X25519 result is an argument: so a published one can be put in, and so can the all-zero one that an attacker knows.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

NAME = b"Noise_NNpsk0_25519_AESGCM_SHA256"


@dataclass(frozen=True)
class Transcript:
    """``h`` and ``ck`` after message 1."""

    h: bytes
    ck: bytes


def public_of(private: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def shared_of(private: bytes, public: bytes) -> bytes:
    """X25519 as the library has it, but all zero where the library refuses."""
    try:
        return X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        return bytes(32)


def message_1(psk: bytes, prologue: bytes, e_i: bytes) -> tuple[bytes, Transcript]:
    """The message of an initiator whose public key is ``e_i``; nobody need know the private one."""
    h = _sha(NAME + prologue)
    ck, bound, _ = _hkdf(NAME, psk, 3)
    h = _sha(_sha(h + bound) + e_i)
    ck, k = _hkdf(ck, e_i, 2)
    tag = _tag(k, h)
    return e_i + tag, Transcript(_sha(h + tag), ck)


def message_2(so_far: Transcript, e_r: bytes, shared: bytes) -> tuple[bytes, tuple[bytes, bytes]]:
    """The answer of a responder whose public key is ``e_r``, and both transport keys, the initiator's first."""
    h = _sha(so_far.h + e_r)
    ck, _ = _hkdf(so_far.ck, e_r, 2)
    ck, k = _hkdf(ck, shared, 2)
    first, second = _hkdf(ck, b"", 2)
    return e_r + _tag(k, h), (first, second)


def _sha(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _tag(key: bytes, associated: bytes) -> bytes:
    return AESGCM(key).encrypt(bytes(12), b"", associated)


def _hkdf(ck: bytes, material: bytes, outputs: int) -> list[bytes]:
    t = hmac.digest(ck, material, "sha256")
    o1 = hmac.digest(t, b"\x01", "sha256")
    o2 = hmac.digest(t, o1 + b"\x02", "sha256")
    o3 = hmac.digest(t, o2 + b"\x03", "sha256")
    return [o1, o2, o3][:outputs]
