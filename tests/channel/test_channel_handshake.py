"""The handshake between two of us, and everything that must make it fail. Nothing is delivered before it succeeded."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from sealift.channel.noise import PUBLIC_BYTES, Exchange, Initiator, SymmetricState
from sealift.channel.protocol import MESSAGE_BYTES, Kind, Plan, Preface
from sealift.channel.session import bind
from sealift.errors import ChannelUnexpected, HandshakeFailed, PrefaceInvalid, RecordForged
from support.channel_pair import (
    NONCE,
    PSK,
    SPEC,
    data,
    deliver,
    feed,
    initiator,
    pair,
    prologue,
    responder,
    secret,
)

# Points of small order on Curve25519 and its twist, with non-canonical encodings (as listed by RFC 7748's
# security considerations and https://cr.yp.to/ecdh.html, "Which secret keys are safe").
SMALL_ORDER = [
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0100000000000000000000000000000000000000000000000000000000000000",
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
]


def flips(data: bytes) -> list[bytes]:
    """``data`` with each one of its bits flipped."""
    whole = int.from_bytes(data, "big")
    return [(whole ^ 1 << bit).to_bytes(len(data), "big") for bit in range(8 * len(data))]


def test_both_sides_come_to_the_same_keys_and_every_connection_to_others():
    seen = set()
    for source, target in itertools.product((b"\x01" * 32, b"\x02" * 32), (b"\x03" * 32, b"\x04" * 32)):
        both = pair(source_private=source, target_private=target)
        for name in ("initiator_to_responder", "responder_to_initiator"):
            mine, theirs = getattr(both.source.keys, name).reveal(), getattr(both.target.keys, name).reveal()
            assert mine == theirs
            seen.add(mine)
    assert len(seen) == 8


def test_messages_have_the_length_that_the_wire_gives_them():
    ours, theirs = initiator(), responder()
    message1 = ours.message1()
    theirs.message1(memoryview(message1))
    message2, _ = theirs.message2()
    assert len(message1) == len(message2) == MESSAGE_BYTES


def test_a_flipped_bit_anywhere_in_the_preface():
    preface = SPEC.preface(1, 1)
    message1 = initiator(bound=prologue(preface=preface)).message1()
    outcomes = set()
    for flipped in flips(preface.encode()):
        with pytest.raises((PrefaceInvalid, HandshakeFailed)) as caught:
            _receive_preface_and_message1(flipped, message1)
        outcomes.add(type(caught.value))
        assert not isinstance(caught.value, ChannelUnexpected)
    assert outcomes == {PrefaceInvalid, HandshakeFailed}


def _receive_preface_and_message1(received: bytes, message1: bytes) -> None:
    responder(bound=prologue(preface=Preface.decode(received))).message1(message1)


def test_the_epoch_and_the_channel_number_are_bound_into_the_handshake():
    message1 = initiator(bound=prologue(preface=SPEC.preface(2, 5))).message1()
    for channel, epoch in ((2, 6), (3, 5)):
        with pytest.raises(HandshakeFailed):
            responder(bound=prologue(preface=SPEC.preface(channel, epoch))).message1(message1)


def test_a_flipped_bit_anywhere_in_message_1():
    for flipped in flips(initiator().message1()):
        theirs = responder()
        with pytest.raises(HandshakeFailed):
            theirs.message1(flipped)
        with pytest.raises(HandshakeFailed):
            theirs.message2()


def test_a_flipped_bit_anywhere_in_message_2():
    theirs, message1 = responder(), initiator().message1()
    theirs.message1(message1)
    message2, _ = theirs.message2()
    for flipped in flips(message2):
        ours = initiator()
        ours.message1()
        with pytest.raises(HandshakeFailed):
            ours.message2(flipped)
        with pytest.raises(HandshakeFailed):
            ours.message2(message2)


def test_wrong_key():
    with pytest.raises(HandshakeFailed):
        responder(psk=PSK[:-1] + b"!").message1(initiator().message1())


def test_wrong_key_at_the_target():
    _, ours = initiator(), initiator()
    theirs = responder(psk=bytes(32))
    theirs.message1(initiator(psk=bytes(32)).message1())
    ours.message1()
    with pytest.raises(HandshakeFailed):
        ours.message2(theirs.message2()[0])


def test_wrong_nonce():
    with pytest.raises(HandshakeFailed):
        responder(bound=prologue(nonce=NONCE[::-1])).message1(initiator().message1())


def test_wrong_migration_id():
    other = replace(SPEC, attempt=b"another attempt!")
    with pytest.raises(HandshakeFailed):
        responder(bound=prologue(other)).message1(initiator().message1())
    with pytest.raises(HandshakeFailed):
        bind(other, SPEC.preface(1, 1), secret(NONCE))


@pytest.mark.parametrize(
    "change",
    [
        {"subject": bytes(16)},
        {"source": bytes(16)},
        {"target": bytes(16)},
        {"source": SPEC.target, "target": SPEC.source},
        {"channels": SPEC.channels + 1},
        {"window": SPEC.window + 1},
        {"rekey_records": SPEC.rekey_records - 1},
        {"rekey_bytes": SPEC.rekey_bytes - 1},
    ],
    ids=lambda change: "+".join(change),
)
def test_ends_that_were_given_different_specifications(change):
    with pytest.raises(HandshakeFailed):
        responder(bound=prologue(replace(SPEC, **change))).message1(initiator().message1())


@pytest.mark.parametrize("length", [0, 1, 31, 32, 47, 49, 96])
def test_messages_of_another_length(length):
    ours, theirs = initiator(), responder()
    ours.message1()
    with pytest.raises(HandshakeFailed):
        theirs.message1(bytes(length))
    with pytest.raises(HandshakeFailed):
        ours.message2(bytes(length))


def test_messages_with_a_payload_are_refused_though_they_verify():
    target, source = responder(), initiator()
    with pytest.raises(HandshakeFailed):
        target.message1(Exchange(secret(PSK), prologue(), b"\x05" * 32).write_1(b"payload"))
    other = Exchange(secret(PSK), prologue(), b"\x05" * 32)
    other.read_1(source.message1())
    with pytest.raises(HandshakeFailed):
        source.message2(other.write_2(b"payload"))


def test_a_replayed_handshake_opens_nothing():
    """Message 1 of a recording verifies (the key is still the move's), but the recorded OPEN cannot."""
    ours, theirs = initiator(), responder()
    message1 = ours.message1()
    theirs.message1(message1)
    recorded = pair()
    opening = recorded.source.send.open()
    recorded.source.send.peer_opened()
    stream = opening + data(recorded.source.send, b"recorded page")
    assert deliver(recorded.target.receive, stream)[-1] == b"recorded page"

    again = pair(target_private=b"\x99" * 32)  # the responder draws a fresh ephemeral key for every connection
    events: list[object] = []
    with pytest.raises(RecordForged):
        feed(again.target.receive, stream, events)
    assert events == []


def test_a_replayed_message_2_does_not_complete_a_new_connection():
    theirs = responder()
    theirs.message1(initiator().message1())
    recorded, _ = theirs.message2()
    ours = initiator(private=b"\x99" * 32)
    ours.message1()
    with pytest.raises(HandshakeFailed):
        ours.message2(recorded)


def test_a_reflected_message_1_is_no_message_2():
    ours = initiator()
    with pytest.raises(HandshakeFailed):
        ours.message2(ours.message1())


@pytest.mark.parametrize("point", SMALL_ORDER)
def test_a_small_order_point_from_an_initiator_that_knows_the_key(point):
    public = bytes.fromhex(point)
    symmetric = SymmetricState(prologue())
    symmetric.mix_key_and_hash(PSK)
    symmetric.mix_hash(public)
    symmetric.mix_key(public)
    theirs = responder()
    theirs.message1(public + symmetric.encrypt_and_hash(b""))  # its tag is right
    with pytest.raises(HandshakeFailed):
        theirs.message2()


@pytest.mark.parametrize("point", SMALL_ORDER)
def test_a_small_order_point_from_a_responder(point):
    ours = initiator()
    ours.message1()
    with pytest.raises(HandshakeFailed):
        ours.message2(bytes.fromhex(point) + bytes(16))


def test_message_1_is_checked_before_any_scalar_multiplication(monkeypatch: pytest.MonkeyPatch):
    message1 = initiator().message1()

    class NoCurve:
        @classmethod
        def from_private_bytes(cls, _: bytes):
            raise AssertionError("a scalar multiplication was begun")

    monkeypatch.setattr("sealift.channel.noise.X25519PrivateKey", NoCurve)
    theirs = responder()
    theirs.message1(message1)
    with pytest.raises(AssertionError):
        theirs.message2()


def test_every_step_is_taken_once_and_in_order():
    ours = initiator()
    with pytest.raises(HandshakeFailed):
        initiator().message2(bytes(48))
    message1 = ours.message1()
    with pytest.raises(HandshakeFailed):
        ours.message1()
    with pytest.raises(HandshakeFailed):
        responder().message2()
    theirs = responder()
    theirs.message1(message1)
    with pytest.raises(HandshakeFailed):
        theirs.message1(message1)
    message2, _ = theirs.message2()
    with pytest.raises(HandshakeFailed):
        theirs.message2()
    ours.message2(message2)
    with pytest.raises(HandshakeFailed):
        ours.message2(message2)


def test_errors_do_not_say_what_did_not_match():
    said = set()
    for attempt in (lambda: responder(psk=bytes(32)), lambda: responder(bound=prologue(nonce=bytes(8)))):
        with pytest.raises(HandshakeFailed) as caught:
            attempt().message1(initiator().message1())
        said.add(str(caught.value))
        assert caught.value.__cause__ is None
    assert len(said) == 1


def test_an_ephemeral_key_has_32_bytes():
    with pytest.raises(ValueError, match="31"):
        Initiator(secret(PSK), b"", bytes(PUBLIC_BYTES - 1))


def test_a_nonce_has_8_bytes():
    with pytest.raises(ValueError, match="8 bytes"):
        bind(SPEC, SPEC.preface(1, 1), secret(b"seven b"))


def test_a_plain_move_has_no_handshake():
    plain = replace(SPEC, plan=Plan.PLAIN)
    with pytest.raises(HandshakeFailed):
        bind(plain, SPEC.preface(1, 1), secret(NONCE))
    with pytest.raises(HandshakeFailed):
        bind(SPEC, Preface(True, 1, Kind.MAIN, 1, SPEC.attempt, 1), secret(NONCE))
