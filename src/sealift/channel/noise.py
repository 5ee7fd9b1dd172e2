"""The handshake: Noise_NNpsk0_25519_AESGCM_SHA256, revision 34 of the Noise specification.

    -> psk, e        message 1, 48 bytes: e (32) | tag over nothing (16)
    <- e, ee         message 2, 48 bytes: e (32) | tag over nothing (16)

The initiator is the source. Its first message is checked with the one-time key alone, so a stranger costs the
responder a few hashes and never a scalar multiplication. Both public keys are mixed into the chaining key as well
(Noise, section 9.2: pre-shared keys with ``e``).

``SymmetricState`` and ``Exchange`` are Noise as published, payloads included, so that published vectors can drive
them; ``Initiator`` and ``Responder`` are what Sealift uses: empty payloads, exact lengths, each step once. Any failure
is HandshakeFailed, which never says what did not match. Source: docs/protocol/channel.md, section 4.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from sealift.channel.protocol import KEY_BYTES, MESSAGE_BYTES, TAG_BYTES
from sealift.errors import HandshakeFailed
from sealift.secret import Secret

PROTOCOL_NAME: Final = b"Noise_NNpsk0_25519_AESGCM_SHA256"
PUBLIC_BYTES: Final = 32


def hkdf(chaining_key: bytes, material: bytes, outputs: int) -> list[bytes]:
    """Noise's HKDF over HMAC-SHA256: ``outputs`` (2 or 3) values of 32 bytes each."""
    temporary = hmac.digest(chaining_key, material, "sha256")
    values: list[bytes] = []
    previous = b""
    for number in range(1, outputs + 1):
        previous = hmac.digest(temporary, previous + bytes([number]), "sha256")
        values.append(previous)
    return values


class CipherState:
    """A key and a counter: 96-bit IV of four zero bytes and the counter."""

    def __init__(self, key: bytes) -> None:
        self._cipher = AESGCM(key)
        self._counter = 0

    def _iv(self) -> bytes:
        iv = self._counter.to_bytes(12, "big")
        self._counter += 1
        return iv

    def encrypt(self, associated: bytes, plaintext: bytes) -> bytes:
        """Ciphertext and tag."""
        return self._cipher.encrypt(self._iv(), plaintext, associated)

    def decrypt(self, associated: bytes, ciphertext: bytes) -> bytes:
        """The plaintext; raises HandshakeFailed when the tag is wrong."""
        try:
            return self._cipher.decrypt(self._iv(), ciphertext, associated)
        except InvalidTag:
            raise _failed() from None


class SymmetricState:
    """Noise's symmetric state: chaining key, transcript hash and, once a key was mixed in, a cipher."""

    def __init__(self, prologue: bytes) -> None:
        # The name has exactly 32 bytes, so it is itself the first hash (Noise, section 5.2).
        self.hash = PROTOCOL_NAME
        self._chaining_key = PROTOCOL_NAME
        self._cipher: CipherState | None = None
        self.mix_hash(prologue)

    def mix_hash(self, data: bytes) -> None:
        """Bind ``data`` into the transcript."""
        self.hash = hashlib.sha256(self.hash + data).digest()

    def mix_key(self, material: bytes) -> None:
        """Let everything encrypted from here on depend on ``material``."""
        self._chaining_key, key = hkdf(self._chaining_key, material, 2)
        self._cipher = CipherState(key)

    def mix_key_and_hash(self, material: bytes) -> None:
        """Both of the above, for a pre-shared key."""
        self._chaining_key, bound, key = hkdf(self._chaining_key, material, 3)
        self.mix_hash(bound)
        self._cipher = CipherState(key)

    def encrypt_and_hash(self, plaintext: bytes) -> bytes:
        """Encrypt under the transcript so far and bind the result; every message of psk0 has a key by then."""
        assert self._cipher is not None
        ciphertext = self._cipher.encrypt(self.hash, plaintext)
        self.mix_hash(ciphertext)
        return ciphertext

    def decrypt_and_hash(self, ciphertext: bytes) -> bytes:
        """The other side of ``encrypt_and_hash``; raises HandshakeFailed."""
        assert self._cipher is not None
        plaintext = self._cipher.decrypt(self.hash, ciphertext)
        self.mix_hash(ciphertext)
        return plaintext

    def split(self) -> tuple[bytes, bytes]:
        """The two transport keys: initiator to responder, responder to initiator."""
        first, second = hkdf(self._chaining_key, b"", 2)
        return first, second


class Exchange:
    """The two messages of NNpsk0 for either role, with payloads. The caller keeps the order."""

    def __init__(self, psk: Secret, prologue: bytes, ephemeral_private: bytes) -> None:
        self.symmetric = SymmetricState(prologue)
        self._psk = psk
        self._ephemeral_private = ephemeral_private
        self._peer = b""

    def write_1(self, payload: bytes) -> bytes:
        """psk, e, payload."""
        self.symmetric.mix_key_and_hash(self._psk.reveal())
        public = self._public()
        self._mix_ephemeral(public)
        return public + self.symmetric.encrypt_and_hash(payload)

    def read_1(self, message: bytes) -> bytes:
        """The payload of message 1; raises HandshakeFailed. No scalar multiplication happens here."""
        self._check_length(message)
        self.symmetric.mix_key_and_hash(self._psk.reveal())
        self._peer = message[:PUBLIC_BYTES]
        self._mix_ephemeral(self._peer)
        return self.symmetric.decrypt_and_hash(message[PUBLIC_BYTES:])

    def write_2(self, payload: bytes) -> bytes:
        """e, ee, payload; raises HandshakeFailed when the peer's point is of small order."""
        public = self._public()
        self._mix_ephemeral(public)
        self.symmetric.mix_key(self._shared())
        return public + self.symmetric.encrypt_and_hash(payload)

    def read_2(self, message: bytes) -> bytes:
        """The payload of message 2; raises HandshakeFailed."""
        self._check_length(message)
        self._peer = message[:PUBLIC_BYTES]
        self._mix_ephemeral(self._peer)
        self.symmetric.mix_key(self._shared())
        return self.symmetric.decrypt_and_hash(message[PUBLIC_BYTES:])

    def _mix_ephemeral(self, public: bytes) -> None:
        self.symmetric.mix_hash(public)
        self.symmetric.mix_key(public)

    def _public(self) -> bytes:
        return self._private().public_key().public_bytes_raw()

    def _private(self) -> X25519PrivateKey:
        return X25519PrivateKey.from_private_bytes(self._ephemeral_private)

    def _shared(self) -> bytes:
        try:
            shared = self._private().exchange(X25519PublicKey.from_public_bytes(self._peer))
        except ValueError:
            raise _failed() from None
        # The library refuses the all-zero result today; the protocol must not depend on that.
        if hmac.compare_digest(shared, bytes(PUBLIC_BYTES)):
            raise _failed()
        return shared

    @staticmethod
    def _check_length(message: bytes) -> None:
        if len(message) < PUBLIC_BYTES + TAG_BYTES:
            raise _failed()


@dataclass(frozen=True, slots=True)
class TransportKeys:
    """The keys of one connection, one for each direction (Noise ``Split``)."""

    initiator_to_responder: Secret
    responder_to_initiator: Secret


class Initiator:
    """The source's side: ``message1``, then ``message2``, each once."""

    def __init__(self, psk: Secret, prologue: bytes, ephemeral_private: bytes) -> None:
        """``ephemeral_private`` is 32 fresh random bytes, used for this connection only."""
        self._exchange: Exchange | None = _begin(psk, prologue, ephemeral_private)
        self._sent = False

    def message1(self) -> bytes:
        """The 48 bytes that follow the preface; raises HandshakeFailed when asked for twice."""
        if self._sent or self._exchange is None:
            raise _failed()
        self._sent = True
        return self._exchange.write_1(b"")

    def message2(self, data: bytes | bytearray | memoryview) -> TransportKeys:
        """The keys that the peer's answer leads to; raises HandshakeFailed, and so does every call after that."""
        exchange, self._exchange = self._exchange, None
        if exchange is None or not self._sent or len(data) != MESSAGE_BYTES:
            raise _failed()
        exchange.read_2(bytes(data))
        return _keys(exchange)


class Responder:
    """The target's side: ``message1``, then ``message2``, each once."""

    def __init__(self, psk: Secret, prologue: bytes, ephemeral_private: bytes) -> None:
        """``ephemeral_private`` is 32 fresh random bytes, used for this connection only."""
        self._waiting: Exchange | None = _begin(psk, prologue, ephemeral_private)
        self._checked: Exchange | None = None

    def message1(self, data: bytes | bytearray | memoryview) -> None:
        """Check the initiator's message; raises HandshakeFailed, and so does every call after that."""
        exchange, self._waiting = self._waiting, None
        if exchange is None or len(data) != MESSAGE_BYTES:
            raise _failed()
        exchange.read_1(bytes(data))
        self._checked = exchange

    def message2(self) -> tuple[bytes, TransportKeys]:
        """The answer and the keys, unconfirmed until the first record verifies; raises HandshakeFailed."""
        exchange, self._checked = self._checked, None
        if exchange is None:
            raise _failed()
        answer = exchange.write_2(b"")
        return answer, _keys(exchange)


def _begin(psk: Secret, prologue: bytes, ephemeral_private: bytes) -> Exchange:
    if len(ephemeral_private) != PUBLIC_BYTES:
        raise ValueError(f"an ephemeral private key of {PUBLIC_BYTES} bytes was given as {len(ephemeral_private)}")
    return Exchange(psk, prologue, ephemeral_private)


def _keys(exchange: Exchange) -> TransportKeys:
    first, second = exchange.symmetric.split()
    return TransportKeys(Secret(first, length=KEY_BYTES), Secret(second, length=KEY_BYTES))


def _failed() -> HandshakeFailed:
    return HandshakeFailed(
        "the handshake of a sealed channel did not verify",
        todo="start the migration again; if it repeats, somebody alters the traffic between the two hosts",
    )
