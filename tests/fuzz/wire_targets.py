"""What a stranger meets first: the preface, both messages of the handshake, and the frames of the control stream."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace

from fuzz.choices import Choices, altered
from sealift.channel.control_frames import MAX_DEPTH, FrameReader, Message, encode_frame
from sealift.channel.noise import Initiator, Responder, TransportKeys
from sealift.channel.protocol import CONTROL_FRAME_BYTES, MESSAGE_BYTES, PREFACE_BYTES, Preface
from sealift.channel.session import bind
from sealift.errors import ChannelUnexpected, HandshakeFailed, InvalidInput, PrefaceInvalid, RecordUnexpected
from support.channel_pair import NONCE, PSK, SOURCE_PRIVATE, SPEC, TARGET_PRIVATE, prologue, secret
from support.noise_reference import Transcript, message_1, message_2, public_of, shared_of

_PROLOGUE = prologue()
_OTHER_PROLOGUE = prologue(replace(SPEC, window=SPEC.window + 1))
_SOURCE_PUBLIC, _TARGET_PUBLIC = public_of(SOURCE_PRIVATE), public_of(TARGET_PRIVATE)
_HELLO, _AFTER_HELLO = message_1(PSK, _PROLOGUE, _SOURCE_PUBLIC)
_ANSWER, _ = message_2(_AFTER_HELLO, _TARGET_PUBLIC, shared_of(TARGET_PRIVATE, _SOURCE_PUBLIC))


def preface(data: bytes) -> None:
    """What is taken for a preface is one, byte for byte; what a move lets in names it and a channel it has."""
    try:
        read = Preface.decode(data)
    except PrefaceInvalid:
        return
    assert len(data) == PREFACE_BYTES
    assert read.encode() == data
    try:
        SPEC.admit(read)
    except ChannelUnexpected:
        admitted = False
    else:
        admitted = True
        assert data[:4] == b"SLFT"
        assert read.route == SPEC.attempt
        assert (read.kind, read.channel) in {(1, 0), (2, 1), (3, 2), (3, 3)}
    try:
        bound = bind(SPEC, read, secret(NONCE))
    except HandshakeFailed:
        assert not admitted
    else:
        assert admitted
        assert data in bound


def handshake_responder(data: bytes) -> None:
    """A responder takes exactly the messages that a holder of the key made for this connection, once and in order."""
    choices = Choices(data)
    responder = Responder(secret(PSK), _PROLOGUE, TARGET_PRIVATE)
    waiting, checked = True, None
    for _ in range(6):
        if choices.number(3) == 3:
            keys, answer = None, b""
            with contextlib.suppress(HandshakeFailed):
                answer, keys = responder.message2()
            _expect_answer(checked, answer, keys)
            checked = None
            continue
        message = _to_responder(choices)
        right, after = message_1(PSK, _PROLOGUE, message[:32])
        try:
            responder.message1(message)
        except HandshakeFailed:
            assert not (waiting and message == right)
        else:
            assert waiting
            assert message == right
            checked = (after, message[:32])
        waiting = False


def _to_responder(choices: Choices) -> bytes:
    match choices.number(5):
        case 0:
            return altered(_HELLO, choices)
        case 1:
            return message_1(PSK, _PROLOGUE, choices.take(32).ljust(32, b"\0"))[0]
        case 2:
            return message_1(PSK, _OTHER_PROLOGUE, _SOURCE_PUBLIC)[0]
        case 3:
            return message_1(bytes(32), _PROLOGUE, _SOURCE_PUBLIC)[0]
        case 4:
            return choices.take(choices.number(MESSAGE_BYTES + 16))
        case _:
            return _HELLO


def _expect_answer(checked: tuple[Transcript, bytes] | None, answer: bytes, keys: TransportKeys | None) -> None:
    if checked is None:
        assert keys is None
        return
    shared = shared_of(TARGET_PRIVATE, checked[1])
    if not any(shared):
        assert keys is None
        return
    right, both = message_2(checked[0], _TARGET_PUBLIC, shared)
    assert answer == right
    _expect_keys(keys, both)


def _expect_keys(keys: TransportKeys | None, right: tuple[bytes, bytes]) -> None:
    assert keys is not None
    assert (keys.initiator_to_responder.reveal(), keys.responder_to_initiator.reveal()) == right


def handshake_initiator(data: bytes) -> None:
    """An initiator takes exactly the answers that a holder of the key made to its own message, once."""
    choices = Choices(data)
    initiator = Initiator(secret(PSK), _PROLOGUE, SOURCE_PRIVATE)
    sent = waiting = False
    fresh = True
    for _ in range(5):
        if choices.number(2) == 0:
            try:
                assert initiator.message1() == _HELLO
                assert fresh
                sent = waiting = True
            except HandshakeFailed:
                assert not fresh
            fresh = False
            continue
        message, keys = _to_initiator(choices), None
        shared = shared_of(SOURCE_PRIVATE, message[:32]) if len(message) >= 32 else b""
        right, both = message_2(_AFTER_HELLO, message[:32], shared)
        try:
            keys = initiator.message2(message)
        except HandshakeFailed:
            assert not (waiting and message == right and any(shared))
        else:
            assert sent
            assert waiting
            assert message == right
            assert any(shared)
            _expect_keys(keys, both)
        fresh = waiting = False


def _to_initiator(choices: Choices) -> bytes:
    match choices.number(5):
        case 0:
            return altered(_ANSWER, choices)
        case 1:
            public = choices.take(32).ljust(32, b"\0")
            return message_2(_AFTER_HELLO, public, shared_of(SOURCE_PRIVATE, public))[0]
        case 2:
            # What an attacker without any private key would try: a point that makes the result known.
            return message_2(_AFTER_HELLO, choices.take(32).ljust(32, b"\0"), bytes(32))[0]
        case 3:
            return _HELLO
        case 4:
            return choices.take(choices.number(MESSAGE_BYTES + 16))
        case _:
            return _ANSWER


def control_frames(data: bytes) -> None:
    """However the stream is cut, the same is read; at most a frame is kept; all that was read can be handed on."""
    size, stream = 1 + data[0] % 64 if data else 1, data[1:]
    read, refused = _read_frames(stream, size)
    expected, bad = _split_frames(stream)
    # A refusal takes the messages of the same piece with it.
    assert read == expected[: len(read)]
    assert refused == bad
    assert bad or len(read) == len(expected)
    for text in read:
        message: Message = json.loads(text)
        try:
            frame = encode_frame(message)
        except InvalidInput:
            # Written with every character escaped it may be longer than it was.
            assert len(json.dumps(message, separators=(",", ":"))) > CONTROL_FRAME_BYTES
        else:
            assert [json.dumps(again) for again in FrameReader().feed(frame)] == [text]


def _read_frames(stream: bytes, size: int) -> tuple[list[str], bool]:
    """The messages, as text since NaN is not itself, and whether the stream was refused."""
    reader, messages = FrameReader(), []
    for start in range(0, len(stream), size):
        try:
            messages += [json.dumps(message) for message in reader.feed(stream[start : start + size])]
        except RecordUnexpected:
            return messages, True
        assert len(reader._waiting) < 2 + CONTROL_FRAME_BYTES
    return messages, False


def _split_frames(stream: bytes) -> tuple[list[str], bool]:
    """Section 11 of channel.md once more."""
    messages = []
    while len(stream) >= 2:
        length = int.from_bytes(stream[:2], "big")
        if length > CONTROL_FRAME_BYTES:
            return messages, True
        text, stream = stream[2 : 2 + length], stream[2 + length :]
        if len(text) < length:
            break
        try:
            message = json.loads(text)
            if not isinstance(message["type"], str) or _depth(message) > MAX_DEPTH:
                return messages, True
        except (ValueError, LookupError, TypeError, RecursionError):
            return messages, True
        messages.append(json.dumps(message))
    return messages, False


def _depth(value: object) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max((_depth(each) for each in inner), default=0)
