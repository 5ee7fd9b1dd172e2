"""Keys of disks behind orders: what is written is read, and what is anything else is refused without being quoted."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealift.domain.deks import (
    DEK_BYTES,
    MAX_KEYS,
    Deks,
    decode_frame,
    decode_keys,
    encode_frame,
    encode_keys,
    wipe,
)
from sealift.domain.move import (
    ChannelLimits,
    MoveOptions,
    MoveOrder,
    MoveSecret,
    PlainToken,
    SealedSecret,
    decode_spec,
    encode_spec,
)
from sealift.domain.vm import Accelerator, Disk, HardwareRecord, VmConfig
from sealift.errors import InvalidInput
from sealift.secret import Secret

RAW = st.dictionaries(st.uuids(), st.binary(min_size=DEK_BYTES, max_size=DEK_BYTES), max_size=MAX_KEYS)
A, B = UUID(int=1), UUID(int=2)
KEY_A, KEY_B = b"A" * DEK_BYTES, b"B" * DEK_BYTES


def secrets_of(raw: dict[UUID, bytes]) -> dict[UUID, Secret]:
    return {dek: Secret(key, length=DEK_BYTES) for dek, key in raw.items()}


def revealed(deks: Deks) -> dict[UUID, bytes]:
    return {dek: key.reveal() for dek, key in deks.items()}


@given(RAW)
def test_keys_that_were_written_are_read(raw: dict[UUID, bytes]) -> None:
    assert revealed(decode_keys(encode_keys(secrets_of(raw)))) == raw


@given(RAW, st.binary(max_size=300))
def test_a_frame_that_was_written_is_read(raw: dict[UUID, bytes], order: bytes) -> None:
    found, deks = decode_frame(encode_frame(order, secrets_of(raw)))
    assert (found, revealed(deks)) == (order, raw)


@given(st.binary(max_size=300))
def test_anything_is_read_or_refused(body: bytes) -> None:
    try:
        order, deks = decode_frame(body)
    except InvalidInput:
        return
    assert encode_frame(order, deks) == body


@given(RAW.filter(bool), st.data())
def test_keys_cut_short_or_with_more_behind_are_refused(raw: dict[UUID, bytes], data: st.DataObject) -> None:
    good = encode_keys(secrets_of(raw))
    cut = data.draw(st.integers(0, len(good) - 1))
    for bad in (good[:cut], good + b"\0"):
        with pytest.raises(InvalidInput) as raised:
            decode_keys(bad)
        assert not any(key.hex() in str(raised.value) for key in raw.values())


def test_a_key_twice_and_too_many_keys_are_refused() -> None:
    twice = struct.pack(">H", 2) + 2 * (A.bytes + KEY_A)
    many = struct.pack(">H", MAX_KEYS + 1) + b"".join(uuid4().bytes + KEY_A for _ in range(MAX_KEYS + 1))
    for bad in (twice, many):
        with pytest.raises(InvalidInput):
            decode_keys(bad)


def test_wiped_keys_are_gone() -> None:
    deks = secrets_of({A: KEY_A, B: KEY_B})
    wipe(deks)
    for dek in deks.values():
        with pytest.raises(ValueError, match="wiped"):
            dek.reveal()


# behind an order to move


def order(*deks: UUID, **changes: Any) -> MoveOrder:
    config = VmConfig(
        "web", uuid4(), 1, 64 << 20, disks=tuple(Disk(f"/x/{n}", "qcow2", dek) for n, dek in enumerate(deks))
    )
    hardware = HardwareRecord(1, config, "pc-q35-7.2", "max", Accelerator.TCG, {}, "7.2.22")
    made = MoveOrder(
        attempt=uuid4(),
        fence=2,
        vm=config.uuid,
        vm_name="web",
        source=uuid4(),
        source_name="a",
        source_address="127.0.0.1",
        target=uuid4(),
        target_name="b",
        target_address="127.0.0.1:7421",
        protection="sealed",
        channel_version=1,
        reason="both can",
        options=MoveOptions(),
        limits=ChannelLimits(),
        hardware=hardware,
        file="the file, \xff",
    )
    return replace(made, **changes)


def sealed() -> SealedSecret:
    return SealedSecret(Secret(b"k" * 32, length=32), Secret(b"n" * 8, length=8))


def token() -> PlainToken:
    return PlainToken(Secret(b"t" * 16, length=16))


@pytest.mark.parametrize("raw", [{}, {A: KEY_A, B: KEY_B}], ids=["none", "all"])
def test_an_order_carries_all_keys_or_none(raw: dict[UUID, bytes]) -> None:
    made = order(A, B)
    found, secret, deks = decode_spec(encode_spec(made, sealed(), secrets_of(raw)))
    assert (found, revealed(deks)) == (made, raw)
    assert isinstance(secret, SealedSecret)
    assert (secret.key.reveal(), secret.nonce.reveal()) == (b"k" * 32, b"n" * 8)


@pytest.mark.parametrize(("protection", "secret"), [("sealed", sealed), ("plain", token)])
def test_an_order_for_a_vm_in_clear_is_as_it_always_was(protection: str, secret: Any) -> None:
    made = order(protection=protection, file="")
    body = encode_spec(made, secret(), {})
    size = 40 if protection == "sealed" else 16
    assert len(body) == 4 + struct.unpack_from(">I", body)[0] + size
    assert decode_spec(body)[0] == made
    with pytest.raises(InvalidInput):
        decode_spec(body + encode_keys({}))


@pytest.mark.parametrize("some", [{A: KEY_A}, {A: KEY_A, B: KEY_B, UUID(int=3): KEY_A}], ids=["too few", "too many"])
def test_an_order_with_other_keys_than_the_disks_is_refused_at_both_ends(some: dict[UUID, bytes]) -> None:
    made = order(A, B)
    with pytest.raises(ValueError, match="keys"):
        encode_spec(made, sealed(), secrets_of(some))
    bare = encode_spec(made, sealed(), {})[: -len(encode_keys({}))]
    with pytest.raises(InvalidInput) as raised:
        decode_spec(bare + encode_keys(secrets_of(some)))
    assert "AAAA" not in str(raised.value)


def test_p5_an_encrypted_vm_has_no_plain_order_at_either_end() -> None:
    plain = order(A, protection="plain")
    with pytest.raises(InvalidInput, match="web in plain text"):
        encode_spec(plain, token(), {})
    body = encode_spec(order(A), sealed(), secrets_of({A: KEY_A}))
    (length,) = struct.unpack_from(">I", body)
    public = json.dumps(json.loads(body[4 : 4 + length]) | {"protection": "plain"}).encode()
    with pytest.raises(InvalidInput, match="web in plain text"):
        decode_spec(struct.pack(">I", len(public)) + public + bytes(16) + body[4 + length + 40 :])


def test_a_secret_that_does_not_fit_is_a_mistake_of_ours() -> None:
    wrong: MoveSecret = token()
    with pytest.raises(ValueError, match="protection"):
        encode_spec(order(A), wrong, {})
