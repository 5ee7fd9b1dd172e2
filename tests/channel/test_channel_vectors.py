"""Published vectors, driven through our own code, and our frozen ones."""

from __future__ import annotations

import hashlib
import json
import runpy
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from sealift.channel.noise import PROTOCOL_NAME, CipherState, Exchange
from sealift.channel.protocol import ChannelSpec, Plan, Preface, RecordType
from sealift.channel.records import RecordOpener
from support.channel_pair import secret

VECTORS = Path(__file__).parent.parent / "vectors"
NOISE = json.loads((VECTORS / "noise-nnpsk0.json").read_text())["vectors"]
GCM = json.loads((VECTORS / "aes-256-gcm.json").read_text())["tests"]
CHANNEL = json.loads((VECTORS / "channel-v1.json").read_text())


def _hex(vector: dict, name: str) -> bytes:
    return bytes.fromhex(vector[name])


def test_the_published_files_are_whole():
    assert [v["protocol_name"].encode() for v in NOISE] == [PROTOCOL_NAME]
    assert len(GCM) == 66
    assert {t["result"] for t in GCM} == {"valid", "invalid"}


@pytest.mark.parametrize("role", ["initiator", "responder"])
@pytest.mark.parametrize("vector", NOISE, ids=lambda v: v["protocol_name"])
def test_noise_as_published(vector, role):
    first, second, *transport = [(_hex(m, "payload"), _hex(m, "ciphertext")) for m in vector["messages"]]
    if role == "initiator":
        exchange = Exchange(
            secret(bytes.fromhex(vector["init_psks"][0])), _hex(vector, "init_prologue"), _hex(vector, "init_ephemeral")
        )
        assert exchange.write_1(first[0]) == first[1]
        assert exchange.read_2(second[1]) == second[0]
    else:
        exchange = Exchange(
            secret(bytes.fromhex(vector["resp_psks"][0])), _hex(vector, "resp_prologue"), _hex(vector, "resp_ephemeral")
        )
        assert exchange.read_1(first[1]) == first[0]
        assert exchange.write_2(second[0]) == second[1]
    assert exchange.symmetric.hash == _hex(vector, "handshake_hash")
    sending, receiving = (CipherState(key) for key in exchange.symmetric.split())
    mine = 0 if role == "initiator" else 1
    if mine:
        sending, receiving = receiving, sending
    assert len(transport) == 4
    for number, (payload, ciphertext) in enumerate(transport):
        if number % 2 == mine:
            assert sending.encrypt(b"", payload) == ciphertext
        else:
            assert receiving.decrypt(b"", ciphertext) == payload


@pytest.mark.parametrize("test", GCM, ids=lambda t: f"{t['tcId']}-{t['comment']}".strip("-"))
def test_aes_gcm_as_published(test):
    key, iv, aad, message = (_hex(test, name) for name in ("key", "iv", "aad", "msg"))
    sealed = _hex(test, "ct") + _hex(test, "tag")
    cipher = AESGCM(key)
    out = bytearray(len(message) + 16)
    # As the records do it: from one part of a buffer into a part of another.
    cipher.encrypt_into(iv, memoryview(b"...." + message)[4:], aad, memoryview(out))
    opened = bytearray(len(message))
    if test["result"] == "valid":
        assert out == sealed
        cipher.decrypt_into(iv, memoryview(b"...." + sealed)[4:], aad, memoryview(opened))
        assert opened == message
    else:
        assert out != sealed
        with pytest.raises(InvalidTag):
            cipher.decrypt_into(iv, memoryview(sealed), aad, memoryview(opened))


def test_the_frozen_file_is_what_the_code_makes():
    made = runpy.run_path(str(VECTORS / "make_channel_v1.py"))["build"]()
    assert made == CHANNEL


@pytest.mark.parametrize(
    "connection", CHANNEL["connections"], ids=lambda c: f"channel-{c['preface_fields']['channel']}"
)
def test_the_frozen_records_open(connection):
    fields = {k: bytes.fromhex(v) if isinstance(v, str) else v for k, v in CHANNEL["spec"].items()}
    spec = ChannelSpec(**fields | {"plan": Plan(fields["plan"])})
    spec.admit(Preface.decode(_hex(connection, "preface")))
    nonce = secret(_hex(CHANNEL, "nonce"))
    for direction, rows in connection["records"].items():
        opener = RecordOpener(secret(bytes.fromhex(connection["keys"][direction])), nonce, spec.limits)
        for row in rows:
            if "record" not in row:
                break  # frozen by its hash only
            record, out = _hex(row, "record"), bytearray(100 + len(row["plaintext"]))
            assert opener.rekeys == row["rekeys"]
            assert opener.header(record).type is RecordType(row["type"])
            length = opener.open_into(opener.header(record), memoryview(record)[4:], memoryview(out))
            assert out[:length] == _hex(row, "plaintext")


def test_the_frozen_file_itself_does_not_change():
    """A change of the wire needs a new version and a new file."""
    canonical = json.dumps(CHANNEL, sort_keys=True).encode()
    assert hashlib.sha256(canonical).hexdigest() == "9282c305c7b1067d9809736e9a709efca9d4a55cca98961b8e9f55528263f8b6"
