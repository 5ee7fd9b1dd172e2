"""What processes of one host and people hand each other: specification, VM file, token, commit log."""

from __future__ import annotations

import hashlib
import json
import socket
import tomllib
from contextlib import suppress
from copy import deepcopy
from uuid import UUID

from fuzz.choices import Choices
from sealift.agent.commitlog import SLOT_BYTES, SLOTS, Mark, decode, encode_slot
from sealift.channel.protocol import MAX_REKEY_BYTES, SPEC_BYTES, Plan
from sealift.channel.relay_spec import RelaySpec, encode_handover, read_plain, read_sealed
from sealift.domain.token import parse_token
from sealift.domain.vm_file import dump_vm_toml, parse_vm_table, parse_vm_toml
from sealift.errors import InvalidInput, SealiftError, TokenInvalid
from support.channel_pair import SPEC

_SECRET = bytes(range(100, 140))
_UUID = UUID("99999999-2222-4333-8444-555555555555")
_MAC = "52:54:00:12:34:56"
HANDOVER = encode_handover(
    RelaySpec("source", SPEC, "/run/move", 4711, target="192.0.2.7:4600", record_bytes=256 << 10), _SECRET
)
_NOT_RIGHT = (None, True, -1, 0, 1, 2, 1.5, 1 << 16, 1 << 64, MAX_REKEY_BYTES + 1, float("nan"), "", "x", [], {}, [1])


def relay_spec(data: bytes) -> None:
    """What a process takes as its specification has every field of its type, and is the same when handed on again."""
    choices = Choices(data)
    frame, plan = _handover(choices), Plan.PLAIN if choices.flag() else Plan.SEALED
    read = _read_handover(frame, plan)
    if read is None:
        return
    spec, secret = read
    assert spec.spec.plan is plan
    assert len(spec.spec.encode()) == SPEC_BYTES
    assert all(isinstance(text, str) for text in (spec.directory, spec.target, spec.door, spec.source_address))
    assert all(type(number) is int for number in (spec.qemu_pid, spec.record_bytes))
    seconds = (spec.silence_s, spec.patience_s, spec.give_up_s, spec.switchover_timeout_s)
    assert all(number >= 0 for number in seconds)
    assert frame[4 + int.from_bytes(frame[:4], "big") :].startswith(secret)
    assert _read_handover(encode_handover(spec, secret), plan) == (spec, secret)


def _handover(choices: Choices) -> bytes:
    if choices.flag():
        return choices.rest()[:60_000]
    public = json.loads(HANDOVER[4:-40])
    for _ in range(choices.number(3)):
        part = public["spec"] if choices.flag() and isinstance(public.get("spec"), dict) else public
        name = choices.one_of([*part, "unknown"]) if part else "unknown"
        if choices.number(4) == 4:
            part.pop(name, None)
        else:
            part[name] = deepcopy(choices.one_of(_NOT_RIGHT))
    text = json.dumps(public).encode()
    return (len(text) + choices.number(1)).to_bytes(4, "big") + text + _SECRET[: choices.number(40)]


def _read_handover(frame: bytes, plan: Plan) -> tuple[RelaySpec, bytes] | None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(frame)
        ours.shutdown(socket.SHUT_WR)
        with suppress(InvalidInput):
            if plan is Plan.PLAIN:
                spec, token = read_plain(theirs)
                return spec, token.reveal()
            spec, secrets = read_sealed(theirs)
            return spec, secrets.key.reveal() + secrets.nonce.reveal()
    return None


def vm_file(data: bytes) -> None:
    """A VM file is refused by name or means one thing: written down again, every value says the same."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return
    try:
        config = parse_vm_toml(text, new_uuid=_UUID, mac=_MAC)
    except InvalidInput as refused:
        said = str(refused)
    else:
        said = ""
    assert not said or said.isprintable()
    assert said or parse_vm_table(tomllib.loads(dump_vm_toml(config))["vm"]) == config


def join_token(data: bytes) -> None:
    """A token is exactly what is written for it, and a refusal does not quote what was given."""
    text = data.decode("utf-8", "surrogateescape")
    try:
        token = parse_token(text)
    except TokenInvalid as refused:
        said = str(refused)
    else:
        said = ""
    if said:
        assert len(text) < 8 or text not in said
        return
    assert token.text() == text.strip()
    assert len(token.fingerprint) == 32
    assert token.digest() == hashlib.sha256(token.secret.reveal()).digest()


def commit_log(data: bytes) -> None:
    """What is read was written whole, slot after slot; only the last mark of a file may be torn."""
    choices = Choices(data)
    fence = choices.number(3)
    raw, whole = b"", []
    for slot in range(choices.number(SLOTS)):
        mark = choices.one_of(tuple(Mark))
        number = choices.number(SLOTS) if choices.number(7) == 7 else slot
        attempt = UUID(int=1) if choices.number(15) == 15 else _UUID
        block = bytearray(encode_slot(number, mark, attempt, choices.number(3) and fence, 1.5))
        if choices.number(3) == 3:
            at = choices.number(SLOT_BYTES - 1)
            block[at] = choices.number(255)
            if choices.flag():
                block[-32:] = hashlib.sha256(block[:-32]).digest()
        raw += block
        whole.append(mark)
    raw = (raw + bytes(SLOT_BYTES * choices.number(2)))[: SLOT_BYTES * SLOTS - choices.number(600)] + choices.rest()
    try:
        entries = decode(raw, _UUID, fence)
    except SealiftError:
        return
    good = 0
    for slot, entry in enumerate(entries):
        block = raw[slot * SLOT_BYTES : (slot + 1) * SLOT_BYTES]
        right = encode_slot(slot, entry.mark, _UUID, fence, entry.at)
        assert block[:30] == right[:30]
        assert block[-32:] == hashlib.sha256(block[:-32]).digest()
        good += 1
    torn = raw[good * SLOT_BYTES : SLOTS * SLOT_BYTES]
    assert not any(torn[SLOT_BYTES:])
