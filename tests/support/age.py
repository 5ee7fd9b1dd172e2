"""Age files that take no second to open: the format (https://age-encryption.org/v1) written down once more, with little
stretching of the passphrase. The age library has no way to ask for that."""

from __future__ import annotations

import base64
import hmac
import json
import os
import textwrap

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from sealift.secret import Secret

LOG_N = 4


def cheap_export(name: str, kdk: Secret, passphrase: Secret) -> str:
    """A native provider's export as ``keys.export`` reads it."""
    document = {"format": "sealift-key-provider", "version": 1, "name": name, "kdk": kdk.reveal().hex()}
    return age(json.dumps(document, separators=(",", ":")).encode() + b"\n", passphrase.reveal())


def age(content: bytes, passphrase: bytes) -> str:
    """``content``, less than 64 KiB, for one passphrase."""
    file_key, salt, nonce = os.urandom(16), os.urandom(16), os.urandom(16)
    stretched = Scrypt(b"age-encryption.org/v1/scrypt" + salt, 32, 1 << LOG_N, 8, 1).derive(passphrase)
    wrapped = ChaCha20Poly1305(stretched).encrypt(bytes(12), file_key, None)
    header = b"age-encryption.org/v1\n-> scrypt %s %d\n%s\n---" % (_b64(salt), LOG_N, _b64(wrapped))
    tag = hmac.digest(_hkdf(file_key, b"", b"header"), header, "sha256")
    last_chunk = bytes(11) + b"\1"
    body = ChaCha20Poly1305(_hkdf(file_key, nonce, b"payload")).encrypt(last_chunk, content, None)
    whole = base64.b64encode(header + b" " + _b64(tag) + b"\n" + nonce + body).decode()
    lines = ["-----BEGIN AGE ENCRYPTED FILE-----", *textwrap.wrap(whole, 64), "-----END AGE ENCRYPTED FILE-----"]
    return "\n".join(lines) + "\n"


def _b64(raw: bytes) -> bytes:
    return base64.b64encode(raw).rstrip(b"=")


def _hkdf(key: bytes, salt: bytes, info: bytes) -> bytes:
    return HKDF(hashes.SHA256(), 32, salt, info).derive(key)
