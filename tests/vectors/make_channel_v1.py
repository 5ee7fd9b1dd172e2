"""Writes ``channel-v1.json``, which freezes the sealed channel of version 1.

    python tests/vectors/make_channel_v1.py > tests/vectors/channel-v1.json

Run once for a version of the channel. If the output ever differs from the file, the wire has changed, and that needs a
new version and a new file. ``tests/channel/test_vectors_independent.py`` derives the same from primitives alone.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict
from typing import Any

from sealift.channel.noise import Initiator, Responder
from sealift.channel.protocol import MAX_PAYLOAD, RECORD_OVERHEAD, ChannelSpec, CloseReason, Plan, RecordType
from sealift.channel.records import RecordSealer
from sealift.channel.session import bind
from sealift.secret import Secret

PSK = bytes(range(0x40, 0x60))
NONCE = bytes.fromhex("f1e2d3c4b5a69788")
SPEC = ChannelSpec(
    attempt=bytes.fromhex("0b5f1c7e4a3d4e5f8a9b0c1d2e3f4051"),
    subject=bytes.fromhex("7d1e2f3a4b5c4d6e9f80a1b2c3d4e5f6"),
    source=bytes.fromhex("11111111222243338444555555555555"),
    target=bytes.fromhex("aaaaaaaabbbb4cccaddddeeeeeeeeeee"),
    plan=Plan.SEALED,
    version=1,
    channels=3,
    window=64 << 20,
    rekey_records=4,
    rekey_bytes=100,
)
# (channel, epoch, private key of the initiator, private key of the responder)
CONNECTIONS = [
    (0, 1, bytes(range(32)), bytes(range(32, 64))),
    (1, 2, bytes(range(64, 96)), bytes(range(96, 128))),
    (3, 0xFFFFFFFF, bytes(range(128, 160)), bytes(range(160, 192))),
]
OPEN = (RecordType.OPEN, bytes(16))
RECORDS: dict[int, dict[str, list[tuple[RecordType, bytes]]]] = {
    0: {
        "initiator_to_responder": [
            OPEN,
            (RecordType.HEARTBEAT, (1_000_000).to_bytes(8, "big") + bytes(16)),
            (RecordType.DATA, b'\x00\x11{"type": "READY"}'),
            (RecordType.HEARTBEAT, b"".join(n.to_bytes(8, "big") for n in (2_000_000, 7_000_123, 999_000))),
            (RecordType.DATA, b'\x00\x12{"type": "COMMIT"}'),
            (RecordType.END, b""),
        ],
        "responder_to_initiator": [OPEN, (RecordType.CLOSE, bytes([CloseReason.MOVE_ENDED]))],
    },
    1: {
        # Key changes: after 16 + 84 bytes, after the 101 bytes, after four records.
        "initiator_to_responder": [
            OPEN,
            (RecordType.DATA, bytes(84)),
            (RecordType.DATA, bytes(range(101))),
            (RecordType.DATA, b"a"),
            (RecordType.DATA, b"b"),
            (RecordType.DATA, b"c"),
            (RecordType.DATA, b"d"),
            (RecordType.DATA, b"first under the fourth key"),
            (RecordType.END, b""),
        ],
        "responder_to_initiator": [OPEN, (RecordType.DATA, b"return path"), (RecordType.END, b"")],
    },
    # A later connection: each goes on where the other is, and acknowledges.
    3: {
        "initiator_to_responder": [
            (RecordType.RESUME, (1 << 40).to_bytes(8, "big") + (1 << 39).to_bytes(8, "big")),
            (RecordType.ACK, ((1 << 40) + 8).to_bytes(8, "big")),
            (RecordType.DATA, bytes(i % 251 for i in range(MAX_PAYLOAD))),
            (RecordType.CLOSE, bytes([CloseReason.RECORD_REFUSED])),
        ],
        "responder_to_initiator": [
            (RecordType.RESUME, ((1 << 39) + 7).to_bytes(8, "big") + ((1 << 40) - 3).to_bytes(8, "big")),
            (RecordType.DATA, b"goes on"),
            (RecordType.END, b""),
            (RecordType.ACK, ((1 << 39) + 7).to_bytes(8, "big")),
        ],
    },
}


def build() -> dict[str, Any]:
    """The whole file as one object."""
    nonce = Secret(NONCE, length=8)
    connections = []
    for channel, epoch, initiator_private, responder_private in CONNECTIONS:
        preface = SPEC.preface(channel, epoch)
        prologue = bind(SPEC, preface, nonce)
        initiator = Initiator(Secret(PSK, length=32), prologue, initiator_private)
        responder = Responder(Secret(PSK, length=32), prologue, responder_private)
        message1 = initiator.message1()
        responder.message1(message1)
        message2, keys = responder.message2()
        initiator.message2(message2)
        directions = {
            "initiator_to_responder": keys.initiator_to_responder,
            "responder_to_initiator": keys.responder_to_initiator,
        }
        connections.append(
            {
                "preface_fields": {"kind": int(preface.kind), "channel": channel, "epoch": epoch},
                "preface": preface.encode().hex(),
                "prologue": prologue.hex(),
                "initiator_ephemeral": initiator_private.hex(),
                "responder_ephemeral": responder_private.hex(),
                "message1": message1.hex(),
                "message2": message2.hex(),
                "keys": {name: key.reveal().hex() for name, key in directions.items()},
                "records": {name: _seal(key, nonce, RECORDS[channel][name]) for name, key in directions.items()},
            }
        )
    return {
        "about": "Frozen vectors of the sealed channel, version 1; see docs/protocol/channel.md. Keys are test values.",
        "psk": PSK.hex(),
        "nonce": NONCE.hex(),
        "spec": {name: v.hex() if isinstance(v, bytes) else int(v) for name, v in asdict(SPEC).items()},
        "spec_encoded": SPEC.encode().hex(),
        "connections": connections,
    }


def _seal(key: Secret, nonce: Secret, plan: list[tuple[RecordType, bytes]]) -> list[dict[str, Any]]:
    sealer = RecordSealer(key, nonce, SPEC.limits)
    rows: list[dict[str, Any]] = []
    for kind, plaintext in plan:
        row: dict[str, Any] = {"sequence": sealer.records, "rekeys": sealer.rekeys, "type": int(kind)}
        record = bytearray(RECORD_OVERHEAD + len(plaintext))
        sealer.seal_into(kind, plaintext, memoryview(record))
        if len(plaintext) < 1024:
            row |= {"plaintext": plaintext.hex(), "record": record.hex()}
        else:
            # A long one: byte i of the plaintext is i mod 251.
            row |= {"plaintext_bytes": len(plaintext), "record_sha256": hashlib.sha256(record).hexdigest()}
        rows.append(row)
    return rows


if __name__ == "__main__":
    json.dump(build(), sys.stdout, indent=1)
    sys.stdout.write("\n")
