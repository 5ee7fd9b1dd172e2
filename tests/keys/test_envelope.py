"""Sub-keys, wrapped keys and tags: published vectors, our frozen ones from primitives alone, and what must not open."""

from __future__ import annotations

import hashlib
import hmac
import json
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from sealift.domain.deks import DEK_BYTES
from sealift.errors import UnwrapFailed
from sealift.keys.envelope import WRAPPED_BYTES, SubKey, config_tag, hkdf, subkey, unwrap, wrap
from sealift.secret import Secret
from vectors.make_envelope_v1 import vectors

FROZEN = json.loads((Path(__file__).parent.parent / "vectors" / "envelope-v1.json").read_text())
KEK = Secret(bytes(range(32)), length=32)
DEK = Secret(b"d" * 32, length=32)
PLACE = {"vm": UUID(int=1), "dek_id": UUID(int=2), "provider": "vault", "key_id": "k-1"}

# RFC 5869, appendix A.1 to A.3: test cases with SHA-256.
RFC_5869 = [
    (
        "0b" * 22,
        bytes(range(0x0D)).hex(),
        bytes(range(0xF0, 0xFA)).hex(),
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
    ),
    (
        bytes(range(0x50)).hex(),
        bytes(range(0x60, 0xB0)).hex(),
        bytes(range(0xB0, 0x100)).hex(),
        "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c59045a99cac7827271cb41c65e590e09"
        "da3275600c2f09b8367793a9aca3db71cc30c58179ec3e87c14c01d5c1f3434f1d87",
    ),
    (
        "0b" * 22,
        "",
        "",
        "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8",
    ),
]


@pytest.mark.parametrize(("material", "salt", "info", "output"), RFC_5869)
def test_hkdf_gives_the_published_values(material: str, salt: str, info: str, output: str) -> None:
    raw = bytes.fromhex(material)
    derived = hkdf(
        Secret(raw, length=len(raw)), bytes.fromhex(info), salt=bytes.fromhex(salt) or None, length=len(output) // 2
    )
    assert derived.reveal().hex() == output


def test_the_format_has_not_changed() -> None:
    assert vectors() == FROZEN, "VMs that were encrypted before can no longer be opened"


def extract_and_expand(material: bytes, info: bytes) -> bytes:
    """HKDF-SHA256 for one block, RFC 5869 section 2: an absent salt is 32 zero bytes."""
    return hmac.digest(hmac.digest(bytes(32), material, "sha256"), info + b"\x01", "sha256")


def test_the_frozen_values_follow_from_primitives_alone() -> None:
    kek = bytes.fromhex(FROZEN["kek"])
    subkeys = {label: extract_and_expand(kek, label.encode()) for label in FROZEN["subkeys"]}
    assert {label: key.hex() for label, key in subkeys.items()} == FROZEN["subkeys"]
    for each in FROZEN["deks"]:
        parts = ("sealift-dek-v1", FROZEN["vm"], each["id"], FROZEN["provider"], FROZEN["key_id"], "AES-256-GCM")
        associated = b"".join(len(part).to_bytes(4, "big") + part.encode() for part in parts)
        iv = bytes.fromhex(each["iv"])
        sealed = AESGCM(subkeys["sealift-dek-wrap-v1"]).encrypt(iv, bytes.fromhex(each["dek"]), associated)
        assert (iv + sealed).hex() == each["wrapped"]
    body, _, tag = FROZEN["file"].encode().rpartition(b"# sealift-tag-v1 hmac-sha256 ")
    mac = hmac.new(subkeys["sealift-config-tag-v1"], body, hashlib.sha256)
    assert tag == mac.hexdigest().encode() + b"\n"


def test_sub_keys_differ_from_each_other_and_from_the_kek() -> None:
    derived = {subkey(KEK, which).reveal() for which in SubKey}
    assert len(derived | {KEK.reveal()}) == 1 + len(SubKey)


@given(st.binary(min_size=32, max_size=32), st.binary(min_size=12, max_size=12), st.uuids(), st.uuids())
def test_what_was_wrapped_unwraps(dek: bytes, iv: bytes, vm: UUID, dek_id: UUID) -> None:
    place = {**PLACE, "vm": vm, "dek_id": dek_id}
    wrapped = wrap(Secret(dek, length=DEK_BYTES), kek=KEK, iv=iv, **place)  # type: ignore[arg-type]
    assert len(wrapped) == WRAPPED_BYTES
    assert wrapped.startswith(iv)
    assert unwrap(wrapped, kek=KEK, **place).reveal() == dek  # type: ignore[arg-type]


WRAPPED = wrap(DEK, kek=KEK, iv=bytes(12), **PLACE)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"vm": uuid4()},
        {"dek_id": uuid4()},
        {"vm": PLACE["dek_id"], "dek_id": PLACE["vm"]},
        {"provider": "vault2"},
        {"key_id": "k-2"},
        {"provider": "vaul", "key_id": "tk-1"},
        {"kek": Secret(bytes(32), length=32)},
    ],
)
def test_a_wrapped_key_opens_only_in_its_place(change: dict[str, object]) -> None:
    with pytest.raises(UnwrapFailed):
        unwrap(WRAPPED, **{"kek": KEK, **PLACE, **change})  # type: ignore[arg-type]


def test_every_flipped_bit_of_a_wrapped_key_is_caught() -> None:
    for bit in range(8 * len(WRAPPED)):
        changed = bytearray(WRAPPED)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(UnwrapFailed):
            unwrap(bytes(changed), kek=KEK, **PLACE)  # type: ignore[arg-type]


@given(st.binary(max_size=100))
def test_any_bytes_do_not_unwrap(wrapped: bytes) -> None:
    with pytest.raises(UnwrapFailed) as refused:
        unwrap(wrapped, kek=KEK, **PLACE)  # type: ignore[arg-type]
    assert "k-1" in str(refused.value)
    assert "vault" in str(refused.value)


def test_an_iv_of_another_length_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="12 bytes"):
        wrap(DEK, kek=KEK, iv=bytes(16), **PLACE)  # type: ignore[arg-type]


@given(st.binary(), st.binary())
def test_other_bytes_have_another_tag(one: bytes, other: bytes) -> None:
    assert (config_tag(KEK, one) == config_tag(KEK, other)) is (one == other)
