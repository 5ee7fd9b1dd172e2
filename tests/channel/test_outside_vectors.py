"""Vectors that others published, through the very code of the channel: X25519 and Noise in real handshake messages of
both roles, AES-256-GCM in the opening and sealing of records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sealift.channel.noise import CipherState, Exchange, Initiator, Responder, TransportKeys
from sealift.channel.protocol import HEADER_BYTES, TAG_BYTES, RecordType, RekeyLimits
from sealift.channel.records import RecordOpener, RecordSealer
from sealift.errors import HandshakeFailed, RecordForged
from support.channel_pair import NONCE, PSK, prologue, secret
from support.noise_reference import message_1, message_2, public_of

VECTORS = Path(__file__).parent.parent / "vectors"
X25519 = json.loads((VECTORS / "x25519.json").read_text())["tests"]
NOISE = json.loads((VECTORS / "noise-nnpsk0-flynn.json").read_text())["tests"]
GCM = json.loads((VECTORS / "aes-256-gcm.json").read_text())["tests"]

PROLOGUE = prologue()
ZERO = [test for test in X25519 if "ZeroSharedSecret" in test["flags"]]
OTHERS = [test for test in X25519 if "ZeroSharedSecret" not in test["flags"]]


def _hex(test: dict[str, str], name: str) -> bytes:
    return bytes.fromhex(test.get(name, ""))


def _keys(keys: TransportKeys) -> tuple[bytes, bytes]:
    return keys.initiator_to_responder.reveal(), keys.responder_to_initiator.reveal()


def test_the_files_are_whole() -> None:
    assert len(X25519) == 518
    assert len(ZERO) == 31
    assert [test["tcId"] for test in X25519 if not any(_hex(test, "shared"))] == [test["tcId"] for test in ZERO]
    assert {"LowOrderPublic", "NonCanonicalPublic", "Twist", "SmallPublicKey"} <= {
        f for t in X25519 for f in t["flags"]
    }
    assert len(NOISE) == 4


def _answer(test: dict[str, str]) -> tuple[Responder, tuple[bytes, tuple[bytes, bytes]]]:
    """A responder that took a message with the vector's public key, and what it has to answer."""
    private, public, shared = (_hex(test, name) for name in ("private", "public", "shared"))
    message, so_far = message_1(PSK, PROLOGUE, public)
    responder = Responder(secret(PSK), PROLOGUE, private)
    responder.message1(message)
    return responder, message_2(so_far, public_of(private), shared)


def _asked(test: dict[str, str]) -> tuple[Initiator, tuple[bytes, tuple[bytes, bytes]]]:
    """An initiator that sent its message, and an answer with the vector's public key and the right tag."""
    private, public, shared = (_hex(test, name) for name in ("private", "public", "shared"))
    expected, so_far = message_1(PSK, PROLOGUE, public_of(private))
    initiator = Initiator(secret(PSK), PROLOGUE, private)
    assert initiator.message1() == expected
    return initiator, message_2(so_far, public, shared)


def test_x25519_as_published_in_a_responder() -> None:
    for test in OTHERS:
        responder, (right, keys) = _answer(test)
        message, made = responder.message2()
        assert (message, _keys(made)) == (right, keys), test["tcId"]


def test_x25519_as_published_in_an_initiator() -> None:
    for test in OTHERS:
        initiator, (message, keys) = _asked(test)
        assert _keys(initiator.message2(message)) == keys, test["tcId"]


@pytest.mark.parametrize("test", ZERO, ids=lambda test: str(test["tcId"]))
def test_a_shared_secret_of_zeros_is_refused_by_both_roles(test: dict[str, str]) -> None:
    """Though every tag is right: who sends such a point knows the secret without having a key of its own."""
    responder, _ = _answer(test)
    with pytest.raises(HandshakeFailed):
        responder.message2()
    initiator, (message, _) = _asked(test)
    with pytest.raises(HandshakeFailed):
        initiator.message2(message)


@pytest.mark.parametrize("test", NOISE, ids=range(len(NOISE)))
def test_noise_as_another_implementation_has_it(test: dict[str, str]) -> None:
    psk, bound = _hex(test, "preshared_key"), _hex(test, "prologue")
    said = [(_hex(test, f"msg_{n}_payload"), _hex(test, f"msg_{n}_ciphertext")) for n in range(4)]
    (hello, message1), (reply, message2), *transport = said
    ours = Exchange(secret(psk), bound, _hex(test, "gen_init_ephemeral"))
    theirs = Exchange(secret(psk), bound, _hex(test, "gen_resp_ephemeral"))
    assert ours.write_1(hello) == message1
    assert theirs.read_1(message1) == hello
    assert theirs.write_2(reply) == message2
    assert ours.read_2(message2) == reply
    assert ours.symmetric.split() == theirs.symmetric.split()
    for key, (payload, ciphertext) in zip(ours.symmetric.split(), transport, strict=True):
        assert CipherState(key).encrypt(b"", payload) == ciphertext
        assert CipherState(key).decrypt(b"", ciphertext) == payload


@pytest.mark.parametrize("test", [test for test in NOISE if not test["msg_0_payload"]], ids=["bare", "with prologue"])
def test_noise_as_the_channel_uses_it(test: dict[str, str]) -> None:
    """The two vectors with empty payloads are what ``Initiator`` and ``Responder`` send, byte for byte."""
    psk, bound = _hex(test, "preshared_key"), _hex(test, "prologue")
    initiator = Initiator(secret(psk), bound, _hex(test, "gen_init_ephemeral"))
    responder = Responder(secret(psk), bound, _hex(test, "gen_resp_ephemeral"))
    assert initiator.message1() == _hex(test, "msg_0_ciphertext")
    responder.message1(_hex(test, "msg_0_ciphertext"))
    answer, theirs = responder.message2()
    assert answer == _hex(test, "msg_1_ciphertext")
    ours = initiator.message2(_hex(test, "msg_1_ciphertext"))
    for keys in (ours, theirs):
        for key, number in zip(_keys(keys), (2, 3), strict=True):
            assert CipherState(key).encrypt(b"", _hex(test, f"msg_{number}_payload")) == _hex(
                test, f"msg_{number}_ciphertext"
            )


class _Opener(RecordOpener):
    """Opens with a published IV and associated data in place of those that a record has."""

    published: tuple[bytes, bytes]

    def _next(self, kind: RecordType, length: int) -> tuple[bytes, bytes]:
        return self.published


class _Sealer(RecordSealer):
    published: tuple[bytes, bytes]

    def _next(self, kind: RecordType, length: int) -> tuple[bytes, bytes]:
        return self.published


@pytest.mark.parametrize("test", GCM, ids=lambda test: str(test["tcId"]))
def test_aes_gcm_as_published_opens_as_records_do(test: dict[str, str]) -> None:
    message, sealed = _hex(test, "msg"), _hex(test, "ct") + _hex(test, "tag")
    opener = _Opener(secret(_hex(test, "key")), secret(NONCE), RekeyLimits())
    opener.published = _hex(test, "iv"), _hex(test, "aad")
    out = bytearray(b"\xa5" * (len(message) + 5))
    header = (RecordType.DATA, len(message))
    if test["result"] == "valid":
        assert opener.open_into(header, memoryview(sealed), memoryview(out)) == len(message)
        assert out == message + b"\xa5" * 5
    else:
        for _ in range(2):
            with pytest.raises(RecordForged):
                opener.open_into(header, memoryview(sealed), memoryview(out))
        assert out == bytes(len(message)) + b"\xa5" * 5


SEALABLE = [
    # A record has at least four bytes of associated data, its header.
    test
    for test in GCM
    if test["result"] == "valid" and len(_hex(test, "aad")) >= HEADER_BYTES
]


@pytest.mark.parametrize("test", SEALABLE, ids=lambda test: str(test["tcId"]))
def test_aes_gcm_as_published_seals_as_records_do(test: dict[str, str]) -> None:
    message = _hex(test, "msg")
    sealer = _Sealer(secret(_hex(test, "key")), secret(NONCE), RekeyLimits())
    sealer.published = _hex(test, "iv"), _hex(test, "aad")
    record = bytearray(HEADER_BYTES + len(message) + TAG_BYTES)
    sealer.seal_into(RecordType.DATA if message else RecordType.END, message, memoryview(record))
    assert record[HEADER_BYTES:] == _hex(test, "ct") + _hex(test, "tag")
