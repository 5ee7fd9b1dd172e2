"""How the keys of a VM protect each other: sub-keys of its KEK, wrapped DEKs, the tag of its configuration file. Pure.

    sub-key      HKDF-SHA256 (RFC 5869), no salt, info = the sub-key's label, 32 bytes
    wrapped DEK  12 bytes IV | 32 bytes ciphertext | 16 bytes tag: AES-256-GCM under the DEK_WRAP sub-key
    its AAD      each of: "sealift-dek-v1", the VM's uuid, the DEK's id, provider name, key id, cipher; as UTF-8, the
                 uuids in their usual form, and each with its length before it (4 bytes, big-endian)
    config tag   HMAC-SHA256 under the CONFIG_TAG sub-key

The KEK itself is the key of nothing but HKDF, so no two uses can meet under one key. What the AAD names, a wrapped DEK
is bound to: it opens for no other VM, disk, provider or key. ``tests/vectors/envelope-v1.json`` freezes all of this.
"""

from __future__ import annotations

import hmac
from enum import Enum
from typing import Final
from uuid import UUID

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from sealift.domain.deks import DEK_BYTES
from sealift.errors import UnwrapFailed
from sealift.secret import Secret

CIPHER: Final = "AES-256-GCM"
SUBKEY_BYTES: Final = 32
IV_BYTES: Final = 12
WRAPPED_BYTES: Final = IV_BYTES + DEK_BYTES + 16
TAG_BYTES: Final = 32
_AAD_LABEL: Final = b"sealift-dek-v1"


class SubKey(Enum):
    """What a sub-key is for; the value is its HKDF label."""

    DEK_WRAP = b"sealift-dek-wrap-v1"
    CONFIG_TAG = b"sealift-config-tag-v1"
    DUMP_WRAP = b"sealift-dump-wrap-v1"


def hkdf(material: Secret, info: bytes, *, salt: bytes | None = None, length: int = SUBKEY_BYTES) -> Secret:
    """HKDF-SHA256 (RFC 5869), extract and expand, to ``length`` bytes."""
    derived = HKDF(algorithm=SHA256(), length=length, salt=salt, info=info).derive(material.reveal())
    return Secret(derived, length=length)


def subkey(kek: Secret, which: SubKey) -> Secret:
    """The sub-key of ``kek`` for one use."""
    return hkdf(kek, which.value)


def wrap(dek: Secret, *, kek: Secret, vm: UUID, dek_id: UUID, provider: str, key_id: str, iv: bytes) -> bytes:
    """``dek`` wrapped for a VM's file: ``WRAPPED_BYTES``. ``iv`` is 12 fresh random bytes, used this once.

    At random, since a KEK wraps a few keys in its life: 2^32 would be the limit (NIST SP 800-38D, section 8.3).
    """
    if len(iv) != IV_BYTES:
        raise ValueError(f"an IV of {IV_BYTES} bytes was given as {len(iv)}")
    key = subkey(kek, SubKey.DEK_WRAP)
    sealed = AESGCM(key.reveal()).encrypt(iv, dek.reveal(), _associated(vm, dek_id, provider, key_id))
    key.wipe()
    return iv + sealed


def unwrap(wrapped: bytes, *, kek: Secret, vm: UUID, dek_id: UUID, provider: str, key_id: str) -> Secret:
    """The DEK that ``wrap`` wrapped for just these; raises UnwrapFailed."""
    key = subkey(kek, SubKey.DEK_WRAP)
    try:
        if len(wrapped) != WRAPPED_BYTES:
            raise InvalidTag
        dek = AESGCM(key.reveal()).decrypt(
            wrapped[:IV_BYTES], wrapped[IV_BYTES:], _associated(vm, dek_id, provider, key_id)
        )
    except InvalidTag:
        raise UnwrapFailed(
            f"key {dek_id} of a disk of VM {vm} does not open with key {key_id} of key provider {provider}",
            todo="put back the VM's last authentic file with `sealift vm restore-config`",
        ) from None
    finally:
        key.wipe()
    return Secret(dek, length=DEK_BYTES)


def config_tag(kek: Secret, body: bytes) -> bytes:
    """The tag over all of a configuration file that stands before its last line: ``TAG_BYTES``."""
    key = subkey(kek, SubKey.CONFIG_TAG)
    tag = hmac.digest(key.reveal(), body, "sha256")
    key.wipe()
    return tag


def _associated(vm: UUID, dek_id: UUID, provider: str, key_id: str) -> bytes:
    texts = (str(vm), str(dek_id), provider, key_id, CIPHER)
    parts = (_AAD_LABEL, *(text.encode() for text in texts))
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)
