"""The kept corpus's named inputs, from the real encoders: ``python tests/fuzz/make_corpus.py`` writes them.

The files called ``found-*`` beside them are what the fuzzer found (``./dev fuzz --keep``).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.agent_targets import HANDOVER
from fuzz.targets import CORPUS
from sealift.channel.control_frames import encode_frame
from sealift.channel.protocol import Kind, Preface, RecordType
from sealift.domain.token import Token, TokenKind
from sealift.keys.ttlv import MAX_DEPTH, encode, structure
from support.channel_pair import PSK, SPEC, data, pair, secret

_TYPES = {kind: number for number, kind in enumerate(RecordType)}
_VM = Path(__file__).parents[2] / "docs" / "vm-file.md"

# Points of small order, RFC 7748, section 7, and https://cr.yp.to/ecdh.html.
_SMALL_ORDER = {
    "zero": bytes(32),
    "one": b"\x01" + bytes(31),
    "order-8": bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    "prime": bytes.fromhex("edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
}


def seeds() -> dict[str, dict[str, bytes]]:
    """By target and name."""
    return {
        "preface": _prefaces(),
        "handshake_responder": {
            "as-meant": bytes([0, 5, 3]),
            "answer-before-it-is-due": bytes([3, 0, 5, 3]),
            "twice": bytes([0, 5, 0, 5, 3]),
            "flipped-then-right": bytes([0, 0, 0, 47, 1, 0, 5, 3]),
            "another-move": bytes([0, 2, 3]),
            "another-key": bytes([0, 3, 3]),
            "with-payload": bytes([0, 0, 2, 4]) + b"more" + bytes([3]),
            **{f"point-{name}": bytes([0, 1]) + point + bytes([3]) for name, point in _SMALL_ORDER.items()},
        },
        "handshake_initiator": {
            "as-meant": bytes([0, 1, 5]),
            "answer-before-it-is-due": bytes([1, 5, 0]),
            "twice": bytes([0, 1, 5, 1, 5]),
            "flipped-then-right": bytes([0, 1, 0, 0, 47, 1, 1, 5]),
            "reflected": bytes([0, 1, 3]),
            **{f"point-{name}": bytes([0, 1, 2]) + point for name, point in _SMALL_ORDER.items()},
        },
        "control_frames": _frames(),
        "records": {
            "every-type": bytes(
                [0, 0, 0, 0, 0, 3, 1, 3, 3, 0, 3, 2, 0, 40, 0, 3, 3, 3, 0, 3, 4, 0, 3, 5, 0, 0, 0, 0, 3]
            ),
            "a-new-key-for-each": bytes([1, 0, 0, *[2, 0, 9, 0, 3] * 5]),
            "a-new-key-after-three": bytes([1, 2, 255, *[2, 0, 9, 0, 3] * 7]),
            "flipped-tag": bytes([0, 2, 0, 0, 0, 0, 20, 1, 2, 0, 0, 0, 3]),
        },
        "receive_half": _connections(),
        "receive_raw": _raw(),
        "ledger": _ledgers(),
        "resume": {
            "both-ways": bytes([1, 0, 35, 40, 0, 3, 35, 40, 1, 3, 35, 40, 1, 2, 0, 3, 35, 40, 0, 4, 1, 3, 35, 40]),
            "cut-in-flight": bytes([1, 0, 35, 40, 0, 3, 35, 40, 1, 3, 35, 40, 1, 2, 1, 2, 0, 3, 20, 0, 0, 6]),
            "flipped-in-flight": bytes([1, 0, 35, 40, 0, 3, 35, 40, 1, 3, 35, 40, 1, 2, 1, 7, 99, 3, 0, 3, 35, 40]),
            "acknowledgement-lost": bytes(
                [1, 0, 35, 40, 0, 3, 35, 40, 1, 3, 35, 40, 1, 2, 0, 3, 35, 40, 0, 4, 0, 6, 0, 3, 35, 40, 1, 3, 35, 40]
            ),
            "end-lost": bytes([1, 0, 35, 40, 0, 3, 35, 40, 1, 3, 35, 40, 1, 5, 3, 1, 2, 1, 2, 0, 3, 35, 40, 0, 6]),
        },
        "relay_spec": {
            "sealed": b"\x01" + HANDOVER + b"\x00",
            "as-encoded": bytes([0, 0, 0, 40, 0]),
            "record-bytes-is-a-text": _spec_with(b'"record_bytes": 262144', b'"record_bytes": "x"'),
            "window-is-a-fraction": _spec_with(b'"window": 1048576', b'"window": 1.5'),
            "directory-is-a-list": _spec_with(b'"directory": "/run/move"', b'"directory": []'),
            "nested-too-deep": _framed(b"[" * 5000),
            "patience-is-nan": _spec_with(b'"patience_s": 5.0', b'"patience_s": NaN'),
        },
        "vm_file": {
            "example": _VM.read_bytes().split(b"```toml\n")[1].split(b"```")[0],
            "least": b'name = "web1"\nvcpus = 2\nmemory = "512MiB"\n',
            "bridge": b'name="a"\nvcpus=1\nmemory="2G"\n[network]\nkind="bridge"\nbridge="br0"\n[boot]\nkernel="/k"\n',
            "nested-too-deep": b"a = " + b"[" * 2000,
            "number-of-5000-digits": b"vcpus = " + b"9" * 4001 + b"9" * 999,
            "vcpus-not-writable": b'name = "a"\nmemory = "512MiB"\nvcpus = 0x' + b"f" * 3800,
        },
        "join_token": {
            "join": Token(TokenKind.JOIN, bytes(range(32)), secret(bytes(16))).text().encode(),
            "admin": Token(TokenKind.ADMIN, bytes(32), secret(b"\xff" * 16)).text().encode() + b"\n",
            "padded": b"slft1.join." + b"A" * 43 + b"=." + b"A" * 22 + b"==",
            "unused-bits": b"slft1.join." + b"A" * 42 + b"B." + b"A" * 22,
        },
        "commit_log": {
            "source-let-go": bytes([1, 2, 0, 0, 0, 1, 0, 2, 0, 0, 1, 0]),
            "torn": bytes([1, 2, 3, 0, 0, 1, 0, 4, 0, 0, 1, 3, 1, 0, 7, 0]),
            "damaged-in-the-middle": bytes([1, 3, 3, 0, 0, 1, 3, 0, 9, 9, 0, 4, 0, 0, 1, 0, 5, 0, 0, 1, 0]),
        },
        "kmip_answer": {
            "versions": bytes([0, 1, 0, 0]),
            "created": bytes([1, 1, 8, 0]),
            "a-key": bytes([3, 1, 1, 0]),
            "a-short-key": bytes([3, 1, 4, 0]),
            "its-state": bytes([4, 1, 6, 0]),
            "activated": bytes([5, 1, 3, 0]),
            "refused": bytes([3, 1, 7, 0]),
            "a-key-flipped": bytes([3, 1, 1, 1, 0, 60, 1]),
            "a-key-cut": bytes([3, 1, 1, 1, 1, 100]),
            "4-gib": bytes([3, 0]) + bytes.fromhex("42007b01ffffffff"),
            "nested-too-deep": bytes([0, 0]) + _nested(MAX_DEPTH + 1),
            "a-longer-big-integer-than-needed": bytes([0, 0]) + bytes.fromhex("4200200400000010") + bytes(16),
        },
    }


def _nested(levels: int) -> bytes:
    item = structure(0x420020)
    for _ in range(levels - 1):
        item = structure(0x420020, item)
    return encode(item)


def _ledgers() -> dict[str, bytes]:
    start, fill = bytes([0, 78, 32]), bytes([0, 78, 32])  # 64 KiB in blocks of 16, filled a block at a time
    sent, end = fill * 2 + b"\x03\x03", b"\x02\x03"

    def meet(wants: bytes, keeps: bytes = b"\x01\x00") -> bytes:
        return b"\x06\x01" + wants + keeps

    inputs = {
        "filled-sent-acknowledged": sent + b"\x05\x01\x78\x20",
        "full": fill * 9,
        "ended": fill + end + b"\x03\x03\x05\x01\x40\x01",
        "nothing-but-the-end": end + b"\x03\x05\x01\x01",
        "resumed-in-an-earlier-block": sent + meet(b"\x01\x27\x10") + b"\x03\x03",
        "resumed-behind-the-end": fill + end + b"\x03\x03" + meet(b"\x01\x40\x01"),
        "resumed-too-far": sent + meet(b"\x00\x02"),
        "resumed-where-nothing-is-kept": sent + meet(b"\x01\x00\x00", b"\x00\x02"),
        "acknowledged-beyond-what-was-sent": sent + b"\x05\x00\x02",
        "acknowledged-beyond-this-connection": sent + meet(b"\x01\x00\x00") + b"\x05\x00\x02",
        "acknowledged-less-than-before": sent + b"\x05\x01\x78\x20\x05\x00\x01",
        "opened-again": fill + b"\x03\x05\x01\x00\x09\x06\x00",
        "heard": b"\x07\x03\xe8\x08\x03\xe8\x01\x09",
    }
    return {name: start + content for name, content in inputs.items()}


def _prefaces() -> dict[str, bytes]:
    route = SPEC.attempt
    made = {f"channel-{number}": SPEC.preface(number, 1) for number in (0, 1, 3)}
    made["plain"] = Preface(True, 1, Kind.MAIN, 1, route, 1)
    made["reserved-kind"] = Preface(False, 1, Kind.DISK, 4, route, 1)
    made["channel-too-high"] = Preface(False, 1, Kind.MULTIFD, 4, route, 1)
    made["another-move"] = Preface(False, 1, Kind.MAIN, 1, bytes(16), 0xFFFFFFFF)
    whole = {name: preface.encode() for name, preface in made.items()}
    first = whole["channel-1"]
    return whole | {
        "unknown-kind": first[:5] + b"\x09" + first[6:],
        "cut": first[:27],
        "http": b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    }


def _frames() -> dict[str, bytes]:
    ready = encode_frame({"type": "READY"})
    commit = encode_frame({"type": "COMMIT", "attempt": "0" * 36, "fence": 7})
    text = b'{"type":"X","a":' + b"[" * 800 + b"]" * 800 + b"}"
    return {
        "two-in-one": b"\x3f" + ready + commit,
        "byte-by-byte": b"\x00" + ready + commit,
        "no-type": b"\x00\x00\x02{}",
        "too-long": b"\x00\x10\x01",
        "not-a-number": b"\x07" + encode_frame({"type": "X", "n": float("nan")}),
        "half-a-surrogate": b"\x07" + encode_frame({"type": "\ud800"}),
        "nested-too-deep": b"\x3f" + len(text).to_bytes(2, "big") + text,
    }


def _connections() -> dict[str, bytes]:
    def stream(records: bytes, count: int, *, control: int = 0, rekey: bytes = b"\x00", tail: bytes = b"\x00") -> bytes:
        sizes = b"\x04\xb0" + b"\x02\xbb" * 4  # a buffer that holds a record, pieces as large as they come
        return bytes([control]) + rekey + sizes + bytes([count - 1]) + records + tail

    def record(kind: RecordType, *payload: int) -> bytes:
        return bytes([_TYPES[kind], *payload, 0])

    resumed = bytes([0, 3, 0, 0])  # RESUME at offset 1
    page, end = record(RecordType.DATA, 0, 99), record(RecordType.END)
    ack, close = record(RecordType.ACK, 5), record(RecordType.CLOSE, 1)
    beat = record(RecordType.HEARTBEAT, 3, 4, 5)
    return {
        "whole": stream(resumed + page + ack + end + ack, 5),
        "opened": stream(bytes([3, 0, 0, 0, 0]) + page + end, 3),
        "closed": stream(resumed + page + close, 3),
        "unknown-reason": stream(resumed + record(RecordType.CLOSE, 9), 2),
        "heartbeats": stream(resumed + beat + page + beat, 4, control=1),
        "heartbeat-on-data": stream(resumed + beat, 2),
        "data-after-end": stream(resumed + end + page, 3),
        "opened-twice": stream(resumed + record(RecordType.OPEN, 0, 0), 2),
        "opened-elsewhere": stream(bytes([3, 0, 3, 0, 0]), 1),
        "rekeyed": stream(resumed + page * 6, 7, rekey=b"\x01\x01\x40"),
        "longest-in-small-buffer": stream(resumed + record(RecordType.DATA, 3, 255, 7) + end, 3).replace(
            b"\x04\xb0", b"\x00\x00", 1
        ),
        "cut": stream(resumed + page + end, 3, tail=b"\x03\x01\x40"),
        "flipped": stream(resumed + page + end, 3, tail=b"\x03\x00\x64\x01"),
        "opened-with-something-kept": stream(bytes([3, 0, 0, 3, 0]), 1),
        "part-of-a-header-behind-the-end": stream(resumed + end, 2, tail=b"\x00\x04\x00\x00"),
        "more-behind-the-end": stream(resumed + end, 2, tail=b"\x00" + bytes(30)),
    }


def _raw() -> dict[str, bytes]:
    both = pair()
    opening = both.source.send.open()
    both.source.send.peer_opened()
    foreign = opening + data(both.source.send, b"page") + both.source.send.end()
    start = {"before": b"\x00\x00", "after-open": b"\x00\x01", "after-end": b"\x01\x02", "after-close": b"\x00\x03"}
    buffer = b"\x01\x2c" + b"\x4f" * 3
    made = {f"foreign-key-{name}": state + buffer + foreign for name, state in start.items()}
    made["longest-announced"] = start["after-open"] + buffer + b"\x03\x10\x00\x00" + bytes(50)
    made["longer-announced"] = start["after-open"] + buffer + b"\x03\x10\x00\x01" + bytes(50)
    made["another-length-announced"] = start["before"] + buffer + b"\x01\x00\x00\x11" + bytes(50)
    made["clear-text"] = start["before"] + buffer + b"GET / HTTP/1.1\r\n\r\n" + PSK[:3]
    return made


def _spec_with(old: bytes, new: bytes) -> bytes:
    text = HANDOVER[4:-40]
    assert old in text
    return _framed(text.replace(old, new))


def _framed(text: bytes) -> bytes:
    return b"\x01" + len(text).to_bytes(4, "big") + text + HANDOVER[-40:]


def main() -> None:
    for target, inputs in seeds().items():
        directory = CORPUS / target
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in inputs.items():
            (directory / name).write_bytes(content)


if __name__ == "__main__":
    main()
