"""The exported key provider: opened again, refused when it is not one, and passphrases that nobody guesses."""

from __future__ import annotations

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mnemonic import Mnemonic

from sealift.domain.vm import NAME
from sealift.errors import ExportInvalid, InvalidInput, PassphraseWeak
from sealift.keys.export import check_passphrase, decode_payload, draw_words, encode_payload, open_export, seal_export
from sealift.secret import Secret

KDK = bytes(range(32))
LIST = Mnemonic("english").wordlist


def secret(text: str) -> Secret:
    raw = text.encode()
    return Secret(raw, length=len(raw))


WORDS = secret("gr\u00fcn und nobody guesses this")


@pytest.fixture(scope="module")
def export() -> str:
    return seal_export("built-in", Secret(KDK, length=32), WORDS)


def test_an_export_opens_again(export: str) -> None:
    assert export.startswith("-----BEGIN AGE ENCRYPTED FILE-----\n")
    assert export.isascii()
    # As it comes back from an editor of another system.
    name, kdk = open_export("\r\n" + export.replace("\n", "\r\n"), WORDS)
    assert (name, kdk.reveal()) == ("built-in", KDK)


def test_another_passphrase_does_not_open_it(export: str) -> None:
    with pytest.raises(ExportInvalid, match="does not open"):
        open_export(export, secret("gr\u00fcn und somebody guesses this"))


@pytest.mark.parametrize("damage", [lambda text: text[:200], lambda text: "", lambda text: text + "\xe9", str.lower])
def test_a_damaged_export_is_refused(export: str, damage: object) -> None:
    assert callable(damage)
    with pytest.raises(ExportInvalid) as refused:
        open_export(damage(export), WORDS)
    assert "\n" not in str(refused.value)


@given(st.from_regex(NAME, fullmatch=True), st.binary(min_size=32, max_size=32))
def test_what_is_sealed_is_json_for_everybody(name: str, kdk: bytes) -> None:
    payload = encode_payload(name, Secret(kdk, length=32))
    assert json.loads(payload) == {"format": "sealift-key-provider", "version": 1, "name": name, "kdk": kdk.hex()}
    read, key = decode_payload(payload)
    assert (read, key.reveal()) == (name, kdk)


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        (b'{"format":"sealift-key-provider","version":2,"seed":"x"}\n', "version 2"),
        (b'{"format":"sealift-key-provider","version":1,"seed":"x"}\n', "something else"),
        (b'{"format":"sealift-key-provider","version":1,"name":".a","kdk":"' + b"0" * 64 + b'"}\n', "something else"),
        (b'{"format":"sealift-key-provider","version":1,"name":"a","kdk":"' + b"0" * 62 + b'"}\n', "something else"),
        (b"", "something else"),
    ],
)
def test_an_age_file_of_something_else_is_refused(payload: bytes, said: str) -> None:
    with pytest.raises(ExportInvalid, match=said):
        decode_payload(payload)


@given(st.binary())
def test_any_payload_is_read_or_refused(payload: bytes) -> None:
    with pytest.raises(ExportInvalid):
        decode_payload(payload)


def test_an_export_has_a_sane_name() -> None:
    with pytest.raises(InvalidInput):
        seal_export('a"b', Secret(KDK, length=32), WORDS)


def test_the_words_are_those_of_bip_39() -> None:
    # SHA-256 of english.txt in the BIP's repository (bitcoin/bips, bip-0039), the same on every machine.
    listed = "".join(f"{word}\n" for word in LIST)
    assert hashlib.sha256(listed.encode()).hexdigest() == (
        "2f5eed53a4727b4bf8880d8f3f199efc90e58503646d9ff8eff3a2ed3b24dbda"
    )


def test_drawn_words_are_the_same_everywhere() -> None:
    assert draw_words(lambda count: bytes(count)) == "-".join(["abandon"] * 8)
    assert draw_words(lambda count: b"\xff" * count) == "-".join(["zoo"] * 8)
    assert draw_words(lambda count: bytes(range(count))) == "abandon-amount-liar-amount-expire-adjust-cage-candy"


@given(st.binary(min_size=11, max_size=11))
def test_every_bit_that_was_drawn_is_in_the_words(drawn: bytes) -> None:
    asked: list[int] = []

    def draw(count: int) -> bytes:
        asked.append(count)
        return drawn

    words = draw_words(draw).split("-")
    assert asked == [11]
    number = 0
    for word in words:
        number = number << 11 | LIST.index(word)
    assert number.to_bytes(11, "big") == drawn


def test_drawn_words_pass_as_a_passphrase() -> None:
    check_passphrase(draw_words(lambda count: bytes.fromhex("f1d3c5b7a99b8d7f615243")))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "gF7#kq9!Zr2@xW",
        "aaaaaaaaaaaaaaaaaaaaaaaa",
        "passwordpassword",
        "1234567890123456",
        "qwertyuiopasdfghjkl",
        "x" * 500,
    ],
)
def test_a_weak_passphrase_is_refused_with_the_rule(text: str) -> None:
    with pytest.raises(PassphraseWeak) as refused:
        check_passphrase(text)
    assert "16 characters or more" in refused.value.todo
    assert not text or text not in str(refused.value)


@pytest.mark.parametrize("text", ["gF7#kq9!Zr2@xWpL", "correct horse battery staple", "Zr2@" * 2 + "gF7#kq9!Wp" * 40])
def test_a_strong_passphrase_is_taken(text: str) -> None:
    check_passphrase(text)
