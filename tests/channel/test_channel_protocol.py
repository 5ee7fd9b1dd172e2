"""Prefaces and specifications: exact layouts, and a refusal for everything else."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sealift.channel import protocol
from sealift.channel.protocol import MAX_REKEY_BYTES, MAX_REKEY_RECORDS, ChannelSpec, Kind, Preface, RekeyLimits
from sealift.errors import ChannelUnexpected, InvalidInput, PrefaceInvalid
from support.channel_pair import SPEC

prefaces = st.builds(
    Preface,
    plain=st.booleans(),
    version=st.just(1),
    kind=st.sampled_from(Kind),
    channel=st.integers(0, 0xFFFF),
    route=st.binary(min_size=16, max_size=16),
    epoch=st.integers(0, 0xFFFFFFFF),
)


def test_the_layout_of_a_preface():
    preface = Preface(False, 1, Kind.MULTIFD, 0x0203, bytes(range(16)), 0x0A0B0C0D)
    assert preface.encode().hex() == "534c465401030203000102030405060708090a0b0c0d0e0f0a0b0c0d"
    assert replace(preface, plain=True).encode()[:4] == b"SLFP"


@given(prefaces)
def test_a_preface_survives_the_wire(preface):
    encoded = preface.encode()
    assert len(encoded) == protocol.PREFACE_BYTES
    assert Preface.decode(encoded) == Preface.decode(memoryview(encoded)) == preface


@given(st.one_of(st.binary(max_size=64), st.binary(min_size=28, max_size=28).map(lambda b: b"SLFT\x01" + b[5:])))
@example(b"SLFT\x01\x06" + bytes(22))
@example(b"SLFT\x02\x01" + bytes(22))
@example(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n\r\n")
def test_any_bytes_are_one_preface_or_refused(data):
    try:
        preface = Preface.decode(data)
    except PrefaceInvalid:
        assert len(data) != 28 or data[:5] not in (b"SLFT\x01", b"SLFP\x01") or data[5] not in list(Kind)
    else:
        assert preface.encode() == data


@pytest.mark.parametrize(
    "change",
    [{"channel": -1}, {"channel": 1 << 16}, {"epoch": -1}, {"epoch": 1 << 32}, {"route": b"x"}, {"version": 2}],
)
def test_a_preface_with_a_field_out_of_range_is_not_made(change):
    with pytest.raises(PrefaceInvalid):
        replace(SPEC.preface(1, 1), **change)


def test_the_layout_of_a_specification():
    spec = ChannelSpec(
        b"a" * 16, b"v" * 16, b"s" * 16, b"t" * 16, protocol.Plan.SEALED, 1, 0x0102, 0x03, MAX_REKEY_RECORDS, 0x05
    )
    tail = "01010102000000000000000300000000010000000000000000000005"
    assert spec.encode() == b"a" * 16 + b"v" * 16 + b"s" * 16 + b"t" * 16 + bytes.fromhex(tail)
    assert spec.limits == RekeyLimits(MAX_REKEY_RECORDS, 5)


@pytest.mark.parametrize(
    "change",
    [
        {"attempt": bytes(15)},
        {"subject": bytes(17)},
        {"source": b""},
        {"target": bytes(32)},
        {"plan": 0},
        {"plan": 3},
        {"version": 0},
        {"version": 2},
        {"channels": 0},
        {"channels": 1 << 16},
        {"window": -1},
        {"window": 1 << 64},
        {"rekey_records": 0},
        {"rekey_records": MAX_REKEY_RECORDS + 1},
        {"rekey_bytes": 0},
        {"rekey_bytes": MAX_REKEY_BYTES + 1},
    ],
    ids=lambda change: "-".join(f"{k}-{v!r:.9}" for k, v in change.items()),
)
def test_a_specification_with_a_field_out_of_range_is_not_made(change):
    with pytest.raises(InvalidInput):
        replace(SPEC, **change)


def test_a_move_has_a_control_channel_a_main_channel_and_its_multifd_channels():
    assert [SPEC.preface(n, 1).kind for n in range(4)] == [Kind.CONTROL, Kind.MAIN, Kind.MULTIFD, Kind.MULTIFD]
    with pytest.raises(ChannelUnexpected):
        SPEC.preface(4, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": Kind.MAIN},
        {"kind": Kind.DISK},
        {"kind": Kind.LIBVIRT},
        {"channel": 0},
        {"channel": 1},
        {"channel": 4},
        {"channel": 0xFFFF},
        {"route": bytes(16)},
        {"plain": True},
    ],
    ids=lambda change: "-".join(f"{k}-{v!r:.9}" for k, v in change.items()),
)
def test_a_preface_for_a_channel_that_the_move_does_not_have(change):
    with pytest.raises(ChannelUnexpected):
        SPEC.admit(replace(SPEC.preface(2, 1), **change))


def test_every_record_type_has_its_lengths():
    assert set(protocol.PAYLOAD_BYTES) == set(protocol.RecordType)
    assert all(0 <= low <= high <= protocol.MAX_PAYLOAD for low, high in protocol.PAYLOAD_BYTES.values())
