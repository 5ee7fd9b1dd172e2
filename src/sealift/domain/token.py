"""The text of an access token: what it is for, which authority stands behind it, and 128 random bits.

    slft1.<kind>.<fingerprint>.<secret>

    kind         "join" (a host, once, within an hour) or "admin" (a person or script)
    fingerprint  SHA-256 of the DER of the controllers' authority certificate, base64url without padding
    secret       16 random bytes, base64url without padding

The fingerprint lets the holder recognise the controller before the secret leaves the machine. The controller keeps
only ``digest`` of the secret.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from dataclasses import dataclass
from enum import Enum

from sealift.errors import TokenInvalid
from sealift.secret import Secret

PREFIX = "slft1"
SECRET_BYTES, FINGERPRINT_BYTES = 16, 32
_MAX_TEXT = 128


class TokenKind(Enum):
    """What a token opens."""

    JOIN = "join"
    ADMIN = "admin"


@dataclass(frozen=True)
class Token:
    """One token; ``fingerprint`` is public, ``secret`` is not and is never shown again after it was made."""

    kind: TokenKind
    fingerprint: bytes
    secret: Secret

    def text(self) -> str:
        """The token as people copy it; contains the secret."""
        return f"{PREFIX}.{self.kind.value}.{_encode(self.fingerprint)}.{_encode(self.secret.reveal())}"

    def digest(self) -> bytes:
        """SHA-256 of the secret: what may be stored. With 128 random bits behind it no salt or stretching is needed."""
        return hashlib.sha256(self.secret.reveal()).digest()


def parse_token(text: str) -> Token:
    """Read a token; raises TokenInvalid, which never quotes the text."""
    bad = TokenInvalid("this is not a Sealift token", todo="copy the whole token, beginning with 'slft1.'")
    parts = text.strip().split(".") if len(text) <= _MAX_TEXT else []
    if len(parts) != 4 or parts[0] != PREFIX or parts[1] not in {kind.value for kind in TokenKind}:
        raise bad
    fingerprint, secret = _decode(parts[2]), _decode(parts[3])
    if len(fingerprint) != FINGERPRINT_BYTES or len(secret) != SECRET_BYTES:
        raise bad
    return Token(TokenKind(parts[1]), fingerprint, Secret(secret, length=SECRET_BYTES))


def fingerprint_text(fingerprint: bytes) -> str:
    """A fingerprint as people compare it: SHA256: and base64url without padding, as in the token."""
    return f"SHA256:{_encode(fingerprint)}"


def _encode(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    """The bytes of unpadded base64url; empty when it is not exactly what ``_encode`` writes."""
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (ValueError, binascii.Error):
        return b""
    return raw if _encode(raw) == text else b""
