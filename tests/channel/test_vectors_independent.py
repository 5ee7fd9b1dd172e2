"""A second derivation of ``channel-v1.json``, written from docs/protocol/channel.md with primitives only.

It imports nothing of Sealift and shares no code with it, so that a mistake must be made twice to go unseen.
"""

from __future__ import annotations

import ast
import hashlib
import hmac
import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

FILE = Path(__file__).parent.parent / "vectors" / "channel-v1.json"
V = json.loads(FILE.read_text())
LENGTHS = {1: (16, 16), 2: (16, 16), 3: (1, 1048576), 4: (8, 8), 5: (0, 0), 6: (24, 24), 7: (1, 1)}


def be(value: int, size: int) -> bytes:
    return value.to_bytes(size, "big")


def sha(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def mac(key: bytes, data: bytes) -> bytes:
    return hmac.new(key, data, hashlib.sha256).digest()


def hkdf2(ck: bytes, ikm: bytes) -> tuple[bytes, bytes]:
    t = mac(ck, ikm)
    o1 = mac(t, b"\x01")
    return o1, mac(t, o1 + b"\x02")


def hkdf3(ck: bytes, ikm: bytes) -> tuple[bytes, bytes, bytes]:
    t = mac(ck, ikm)
    o1 = mac(t, b"\x01")
    o2 = mac(t, o1 + b"\x02")
    return o1, o2, mac(t, o2 + b"\x03")


def public(private: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def test_this_derivation_is_independent():
    tree = ast.parse(Path(__file__).read_text())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not any(name.split(".")[0] in ("sealift", "support") for name in names)


def spec_bytes() -> bytes:
    s = V["spec"]
    ids = b"".join(bytes.fromhex(s[name]) for name in ("attempt", "subject", "source", "target"))
    numbers = be(s["plan"], 1) + be(s["version"], 1) + be(s["channels"], 2)
    return ids + numbers + be(s["window"], 8) + be(s["rekey_records"], 8) + be(s["rekey_bytes"], 8)


def test_specification():
    assert len(spec_bytes()) == 92
    assert spec_bytes().hex() == V["spec_encoded"]


@pytest.fixture(params=V["connections"], ids=lambda c: f"channel-{c['preface_fields']['channel']}")
def connection(request):
    return request.param


def preface_bytes(connection) -> bytes:
    f = connection["preface_fields"]
    attempt = bytes.fromhex(V["spec"]["attempt"])
    return b"SLFT" + b"\x01" + be(f["kind"], 1) + be(f["channel"], 2) + attempt + be(f["epoch"], 4)


def prologue_bytes(connection) -> bytes:
    return b"sealift-channel-v1" + preface_bytes(connection) + bytes.fromhex(V["nonce"]) + sha(spec_bytes())


def test_preface_and_prologue(connection):
    assert preface_bytes(connection).hex() == connection["preface"]
    assert prologue_bytes(connection).hex() == connection["prologue"]


def test_handshake(connection):
    e_i, e_r = bytes.fromhex(connection["initiator_ephemeral"]), bytes.fromhex(connection["responder_ephemeral"])
    zero_iv = bytes(12)

    h = ck = b"Noise_NNpsk0_25519_AESGCM_SHA256"
    h = sha(h + prologue_bytes(connection))
    # message 1: psk, e
    ck, bound, k = hkdf3(ck, bytes.fromhex(V["psk"]))
    h = sha(h + bound)
    h = sha(h + public(e_i))
    ck, k = hkdf2(ck, public(e_i))
    tag = AESGCM(k).encrypt(zero_iv, b"", h)
    h = sha(h + tag)
    assert (public(e_i) + tag).hex() == connection["message1"]
    # message 2: e, ee
    h = sha(h + public(e_r))
    ck, k = hkdf2(ck, public(e_r))
    shared = X25519PrivateKey.from_private_bytes(e_i).exchange(X25519PublicKey.from_public_bytes(public(e_r)))
    ck, k = hkdf2(ck, shared)
    tag = AESGCM(k).encrypt(zero_iv, b"", h)
    assert (public(e_r) + tag).hex() == connection["message2"]
    # split
    k1, k2 = hkdf2(ck, b"")
    assert connection["keys"] == {"initiator_to_responder": k1.hex(), "responder_to_initiator": k2.hex()}


@pytest.mark.parametrize("direction", ["initiator_to_responder", "responder_to_initiator"])
def test_records(connection, direction):
    key = bytes.fromhex(connection["keys"][direction])
    nonce = int(V["nonce"], 16)
    records = plaintext_bytes = rekeys = 0
    for sequence, row in enumerate(connection["records"][direction]):
        if "plaintext" in row:
            plaintext = bytes.fromhex(row["plaintext"])
        else:
            plaintext = bytes(i % 251 for i in range(row["plaintext_bytes"]))
        assert (row["sequence"], row["rekeys"]) == (sequence, rekeys)
        assert LENGTHS[row["type"]][0] <= len(plaintext) <= LENGTHS[row["type"]][1]
        header = be(row["type"], 1) + be(len(plaintext), 3)
        iv = bytes(4) + be(nonce ^ sequence, 8)
        record = header + AESGCM(key).encrypt(iv, plaintext, header + be(sequence, 8))
        if "record" in row:
            assert record.hex() == row["record"]
        else:
            assert sha(record).hex() == row["record_sha256"]
        records += 1
        plaintext_bytes += len(plaintext)
        if records >= V["spec"]["rekey_records"] or plaintext_bytes >= V["spec"]["rekey_bytes"]:
            key = AESGCM(key).encrypt(b"\xff" * 12, bytes(32), b"")[:32]
            records = plaintext_bytes = 0
            rekeys += 1


def test_the_vectors_cover_every_record_type_and_several_keys():
    rows = [row for c in V["connections"] for rows in c["records"].values() for row in rows]
    assert {row["type"] for row in rows} == set(LENGTHS)
    assert max(row["rekeys"] for row in rows) >= 3
